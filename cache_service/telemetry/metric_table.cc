#include "cache_service/telemetry/metric_table.h"

#include <iterator>
#include <nlohmann/json.hpp>

namespace clusterkv::cache_service {

namespace {

using enum MetricType;

constexpr MetricDescriptor kMetrics[] = {
    {"clusterkv_uptime_seconds", kGauge, "seconds", "", "Shard", "", "Since the process started."},
    {"clusterkv_draining", kGauge, "1", "", "Shard", "", "1 while no new work is taken."},
    {"clusterkv_sequences", kGauge, "1", "", "Shard", "", "Sequences that are held."},
    {"clusterkv_attachments", kGauge, "1", "", "Shard", "", "Attached decode workers."},
    {"clusterkv_sessions", kGauge, "1", "", "Shard", "", "Liveness sessions."},
    {"clusterkv_errors_total", kCounter, "1", "reason", "Shard", "",
     "Errors by their ErrorInfo reason."},
    {"clusterkv_listed_shards", kGauge, "1", "", "Shard", "",
     "Shards that the server knows of, itself too; 0: it knows of no list."},
    {"clusterkv_etcd_connected", kGauge, "1", "", "Shard", "etcd",
     "1 while etcd's list of shards is watched, 0 while it is of before."},
    {"clusterkv_etcd_registered", kGauge, "1", "", "Shard", "etcd",
     "1 while the server's own entry in etcd stands."},
    {"clusterkv_etcd_reconnects_total", kCounter, "1", "", "Shard", "etcd",
     "How often etcd was away."},
    {"clusterkv_etcd_lost_leases_total", kCounter, "1", "", "Shard", "etcd",
     "Leases that ended while the server lived."},

    {"clusterkv_selects_total", kCounter, "1", "", "Selection", "", "Selects that were answered."},
    {"clusterkv_queued_selects", kGauge, "1", "", "Selection", "",
     "Selects that wait for a thread."},
    {"clusterkv_stage_seconds", kHistogram, "seconds", "stage", "Selection", "",
     "Time by stage: queue, select (the work), refine (of it, scoring tokens and choosing, "
     "summed "
     "over threads), pack, send, put, append."},
    {"clusterkv_device_selects_total", kCounter, "1", "", "Selection", "device",
     "Selects that the GPU answered."},
    {"clusterkv_device_fallbacks_total", kCounter, "1", "", "Selection", "device",
     "Selects that were meant for the GPU and that the host answered."},
    {"clusterkv_device_failed", kGauge, "1", "", "Selection", "device",
     "1 once the GPU failed, so that the host answers for it."},

    {"clusterkv_hot_cache_hits_total", kCounter, "tokens", "", "Recall", "",
     "Exact tokens that the worker held already."},
    {"clusterkv_hot_cache_misses_total", kCounter, "tokens", "", "Recall", "",
     "Exact tokens that the worker lacked."},
    {"clusterkv_recalled_tokens_total", kCounter, "tokens", "", "Recall", "",
     "Records that were sent, of one token and KV head each."},
    {"clusterkv_recalled_bytes_total", kCounter, "bytes", "", "Recall", "",
     "Bytes of records that were sent."},
    {"clusterkv_state_bytes_total", kCounter, "bytes", "", "Recall", "",
     "Bytes of attention states and corrections that were sent."},
    {"clusterkv_link_attachments", kGauge, "1", "link", "Recall", "",
     "Attachments by the link that their records take: grpc, peer, nccl."},
    {"clusterkv_link_bytes_total", kCounter, "bytes", "", "Recall", "links",
     "Bytes of records that went over peer and nccl links."},
    {"clusterkv_link_failovers_total", kCounter, "1", "link", "Recall", "links",
     "Messages that a link failed to carry, so that gRPC did."},
    {"clusterkv_link_fallbacks_total", kCounter, "1", "reason", "Recall", "links",
     "Attachments that got another link than asked for."},

    {"clusterkv_ingested_bytes_total", kCounter, "bytes", "", "Prefill", "",
     "K and V that came in."},
    {"clusterkv_window_bytes_total", kCounter, "bytes", "", "Prefill", "links",
     "Of them, what the GPU took from prefill workers' windows."},
    {"clusterkv_ingest_windows", kGauge, "1", "", "Prefill", "links",
     "Windows of prefill workers that are mapped."},
    {"clusterkv_device_uploaded_bytes_total", kCounter, "bytes", "", "Prefill", "device",
     "K, V and index that were copied from host memory to the GPU."},
    {"clusterkv_device_fetched_bytes_total", kCounter, "bytes", "", "Prefill", "device",
     "K, V and index that were copied from the GPU to host memory."},
    {"clusterkv_queued_builds", kGauge, "1", "", "Prefill", "",
     "Layers that wait to be clustered."},

    {"clusterkv_arena_pages", kGauge, "pages", "state", "Memory", "",
     "Pages of the arena in each state."},
    {"clusterkv_arena_reserved_pages", kGauge, "pages", "", "Memory", "",
     "Free pages that are promised to open sequences."},
    {"clusterkv_arena_used_ratio", kGauge, "1", "", "Memory", "",
     "Share of the arena that is in use or promised."},
    {"clusterkv_arena_page_bytes", kGauge, "bytes", "", "Memory", "", "Size of a page."},
    {"clusterkv_resident_bytes", kGauge, "bytes", "", "Memory", "",
     "Resident memory of the process."},
    {"clusterkv_device_memory_bytes", kGauge, "bytes", "", "Memory", "device",
     "Memory of the GPU that the server has allocated; without the driver's and NCCL's own."},
    {"clusterkv_evictions_total", kCounter, "1", "reason", "Memory", "",
     "Sequences that were ended for room, for their tenant's quota, by their ttl, or by an "
     "administrator."},

    {"clusterkv_tenant_sequences", kGauge, "1", "tenant", "Tenants", "tenants",
     "Sequences that the tenant holds."},
    {"clusterkv_tenant_planned_bytes", kGauge, "bytes", "tenant", "Tenants", "tenants",
     "What the tenant's sequences were promised of the arena."},
    {"clusterkv_tenant_queued_selects", kGauge, "1", "tenant", "Tenants", "tenants",
     "The tenant's selects that wait for their turn."},
    {"clusterkv_tenant_calls_total", kCounter, "1", "tenant", "Tenants", "tenants",
     "Calls of the tenant."},
    {"clusterkv_tenant_ingested_bytes_total", kCounter, "bytes", "tenant", "Tenants", "tenants",
     "K and V that the tenant sent."},
    {"clusterkv_tenant_refusals_total", kCounter, "1", "tenant", "Tenants", "tenants",
     "Calls refused for the tenant's calls or bytes per second."},

    {"clusterkv_connections", kGauge, "1", "", "Connections", "", "Open connections."},
    {"clusterkv_connections_accepted_total", kCounter, "1", "", "Connections", "",
     "Connections that were taken."},
    {"clusterkv_connections_refused_total", kCounter, "1", "reason", "Connections", "",
     "Connections closed at once: over the limit, or out of file descriptors."},
    {"grpc_server_call_started_total", kCounter, "1", "grpc_method", "gRPC", "",
     "RPCs that began."},
    {"grpc_server_call_duration_seconds", kHistogram, "seconds", "grpc_method,grpc_status", "gRPC",
     "", "RPCs that ended, by status."},
};

}  // namespace

const std::vector<MetricDescriptor>& MetricTable() {
  static const auto& table =
      *new std::vector<MetricDescriptor>(std::begin(kMetrics), std::end(kMetrics));
  return table;
}

std::string MetricTableJson() {
  std::string lines;
  for (const MetricDescriptor& metric : MetricTable()) {
    const char* const type = metric.type == MetricType::kCounter ? "counter"
                             : metric.type == MetricType::kGauge ? "gauge"
                                                                 : "histogram";
    lines += nlohmann::ordered_json{{"name", metric.name},       {"type", type},
                                    {"unit", metric.unit},       {"label", metric.label},
                                    {"section", metric.section}, {"when", metric.when},
                                    {"help", metric.help}}
                 .dump() +
             "\n";
  }
  return lines;
}

}  // namespace clusterkv::cache_service
