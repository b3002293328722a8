#include "cache_service/telemetry/server_metrics.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "kernels/base/check.h"
#include "prometheus/metric_family.h"
#include "prometheus/metric_type.h"

namespace clusterkv::cache_service {
namespace {

const char* const kMethodNames[] = {
    "clusterkv.v1.CacheService/GetServerInfo",
    "clusterkv.v1.CacheService/OpenSequence",
    "clusterkv.v1.CacheService/PutKv",
    "clusterkv.v1.CacheService/ConnectIngest",
    "clusterkv.v1.CacheService/PutWindow",
    "clusterkv.v1.CacheService/SealSequence",
    "clusterkv.v1.CacheService/GetSequence",
    "clusterkv.v1.CacheService/ListSequences",
    "clusterkv.v1.CacheService/ForkSequence",
    "clusterkv.v1.CacheService/ReleaseSequence",
    "clusterkv.v1.CacheService/Attach",
    "clusterkv.v1.CacheService/ConnectLink",
    "clusterkv.v1.CacheService/ConnectResident",
    "clusterkv.v1.CacheService/RenewResident",
    "clusterkv.v1.CacheService/DisconnectResident",
    "clusterkv.v1.CacheService/Detach",
    "clusterkv.v1.CacheService/SelectClusters",
    "clusterkv.v1.CacheService/StreamSelect",
    "clusterkv.v1.CacheService/RecallClusters",
    "clusterkv.v1.CacheService/SelectAndRecall",
    "clusterkv.v1.CacheService/StreamSelectAndRecall",
    "clusterkv.v1.CacheService/AppendKv",
    "clusterkv.v1.CacheService/GetIndex",
    "clusterkv.v1.SessionService/Session",
    "clusterkv.v1.AdminService/Drain",
    "clusterkv.v1.AdminService/GetStats",
    "clusterkv.v1.AdminService/VerifyLedger",
    "clusterkv.v1.AdminService/EvictSequence",
    "clusterkv.v1.AdminService/ForceReleaseWorker",
};
static_assert(std::size(kMethodNames) == static_cast<size_t>(Method::kCount));

const char* const kCodeNames[] = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

const char* const kStageNames[] = {"queue", "select", "refine", "pack", "send", "put", "append"};
static_assert(std::size(kStageNames) == static_cast<size_t>(Stage::kCount));

}  // namespace

std::string_view StageName(Stage stage) { return kStageNames[static_cast<int>(stage)]; }
std::string_view MethodName(Method method) { return kMethodNames[static_cast<int>(method)]; }

void ServerMetrics::CallEnded(Method method, absl::StatusCode code, absl::Duration duration) {
  const int index = std::clamp(static_cast<int>(code), 0, kCodes - 1);
  calls_[static_cast<int>(method)][index].Record(duration);
  ended_[static_cast<int>(method)].fetch_add(1, std::memory_order_release);
}

int64_t ServerMetrics::CallsInFlight(Method method) const {
  const int index = static_cast<int>(method);
  const uint64_t ended = ended_[index].load(std::memory_order_acquire);
  return static_cast<int64_t>(started_[index].load(std::memory_order_relaxed) - ended);
}

void ServerMetrics::ConnectionRefused(std::string_view reason) {
  (reason == "limit" ? refused_limit_ : refused_descriptors_)
      .fetch_add(1, std::memory_order_relaxed);
}

uint64_t ServerMetrics::connections_refused() const {
  return refused_limit_.load(std::memory_order_relaxed) +
         refused_descriptors_.load(std::memory_order_relaxed);
}

void ServerMetrics::CountLinkFallback(const std::string& reason) {
  absl::MutexLock lock(&mutex_);
  ++link_fallbacks_[reason];
}

void ServerMetrics::AddTo(v1::Stats* stats) const {
  // As they went over the wire; the shard knows neither the states' type nor why a link was
  // refused.
  stats->set_state_bytes(state_bytes_.load(std::memory_order_relaxed));
  stats->clear_link_fallbacks();
  absl::MutexLock lock(&mutex_);
  for (const auto& [reason, count] : link_fallbacks_) {
    (*stats->mutable_link_fallbacks())[reason] = count;
  }
}

// Fills the families of MetricTable() in its order; a name that is not there is a programmer's
// error.
class MetricWriter {
 public:
  MetricWriter() {
    for (const MetricDescriptor& descriptor : MetricTable()) {
      prometheus::MetricFamily family;
      family.name = descriptor.name;
      family.help = std::string(descriptor.help) + " Unit: " + descriptor.unit + ".";
      family.type = descriptor.type == MetricType::kCounter ? prometheus::MetricType::Counter
                    : descriptor.type == MetricType::kGauge ? prometheus::MetricType::Gauge
                                                            : prometheus::MetricType::Histogram;
      families_.push_back(std::move(family));
    }
  }

  using Labels = std::vector<prometheus::ClientMetric::Label>;

  void Value(std::string_view name, double value, Labels labels = {}) {
    prometheus::ClientMetric metric;
    metric.label = std::move(labels);
    prometheus::MetricFamily& family = Family(name);
    if (family.type == prometheus::MetricType::Counter) {
      metric.counter.value = value;
    } else {
      metric.gauge.value = value;
    }
    family.metric.push_back(std::move(metric));
  }

  void Histogram(std::string_view name, const BucketHistogram& histogram, Labels labels) {
    const BucketHistogram::Snapshot snapshot = histogram.Take();
    prometheus::ClientMetric metric;
    metric.label = std::move(labels);
    metric.histogram.sample_count = snapshot.count;
    metric.histogram.sample_sum = snapshot.sum_seconds;
    uint64_t cumulative = 0;
    for (int i = 0; i + 1 < BucketHistogram::kBuckets; ++i) {
      cumulative += snapshot.counts[i];
      metric.histogram.bucket.push_back(
          {cumulative, static_cast<double>(BucketHistogram::kBounds[i]) * 1e-9});
    }
    metric.histogram.bucket.push_back({snapshot.count, std::numeric_limits<double>::infinity()});
    Family(name).metric.push_back(std::move(metric));
  }

  // One for each entry of a message's map, by key.
  template <typename Map>
  void Values(std::string_view name, const char* label, const Map& map) {
    const std::map<std::string, double> sorted(map.begin(), map.end());
    for (const auto& [key, value] : sorted) Value(name, value, {{label, key}});
  }

  void ShardFigures(const v1::Stats& stats);
  void PlacementFigures(const v1::Stats& stats);
  void TenantFigures(const v1::Stats& stats);
  void ServerFigures(const ServerMetrics& metrics, int64_t connections);

  std::vector<prometheus::MetricFamily> Take() { return std::move(families_); }

 private:
  prometheus::MetricFamily& Family(std::string_view name) {
    const auto found = std::find_if(families_.begin(), families_.end(),
                                    [&](const auto& family) { return family.name == name; });
    CKV_CHECK(found != families_.end()) << "metric not in the table: " << name;
    return *found;
  }

  std::vector<prometheus::MetricFamily> families_;
};

void MetricWriter::ShardFigures(const v1::Stats& stats) {
  const auto number = [](uint64_t value) { return static_cast<double>(value); };
  Value("clusterkv_uptime_seconds", number(stats.uptime_ms()) * 1e-3);
  Value("clusterkv_draining", stats.draining() ? 1 : 0);
  const v1::Ledger& pages = stats.pages();
  Value("clusterkv_arena_pages", number(pages.free()), {{"state", "free"}});
  Value("clusterkv_arena_pages", number(pages.filling()), {{"state", "filling"}});
  Value("clusterkv_arena_pages", number(pages.ready()), {{"state", "ready"}});
  Value("clusterkv_arena_pages", number(pages.recalling()), {{"state", "recalling"}});
  Value("clusterkv_arena_pages", number(pages.quarantined()), {{"state", "quarantined"}});
  Value("clusterkv_arena_reserved_pages", number(stats.reserved_pages()));
  const uint64_t open_pages = pages.free() - std::min(pages.free(), stats.reserved_pages());
  Value("clusterkv_arena_used_ratio",
        pages.total() == 0 ? 0 : 1 - number(open_pages) / number(pages.total()));
  Value("clusterkv_arena_page_bytes", number(stats.page_bytes()));
  Value("clusterkv_resident_bytes", number(stats.resident_bytes()));
  Value("clusterkv_sequences", stats.sequences());
  Value("clusterkv_attachments", stats.attachments());
  Value("clusterkv_sessions", stats.sessions());
  Value("clusterkv_queued_selects", stats.queued_selects());
  Value("clusterkv_queued_builds", stats.queued_builds());
  Value("clusterkv_selects_total", number(stats.selects()));
  Value("clusterkv_recalled_tokens_total", number(stats.recalled_tokens()));
  Value("clusterkv_recalled_bytes_total", number(stats.recalled_bytes()));
  Value("clusterkv_state_bytes_total", number(stats.state_bytes()));
  Value("clusterkv_hot_cache_hits_total", number(stats.hits()));
  Value("clusterkv_hot_cache_misses_total", number(stats.misses()));
  Value("clusterkv_ingested_bytes_total", number(stats.ingested_bytes()));
  Value("clusterkv_window_bytes_total", number(stats.window_bytes()));
  Value("clusterkv_ingest_windows", stats.ingest_windows());
  Value("clusterkv_device_uploaded_bytes_total", number(stats.device_uploaded_bytes()));
  Value("clusterkv_device_fetched_bytes_total", number(stats.device_fetched_bytes()));
  Value("clusterkv_device_memory_bytes", number(stats.device_memory_bytes()));
  Value("clusterkv_device_selects_total", number(stats.device_selects()));
  Value("clusterkv_device_fallbacks_total", number(stats.device_fallbacks()));
  Value("clusterkv_device_failed", absl::EndsWith(stats.device(), " failed") ? 1 : 0);
  Value("clusterkv_link_bytes_total", number(stats.link_bytes()));
  Values("clusterkv_evictions_total", "reason", stats.evictions_by_reason());
  Values("clusterkv_errors_total", "reason", stats.errors());
  Values("clusterkv_link_attachments", "link", stats.attachments_by_link());
  Values("clusterkv_link_failovers_total", "link", stats.link_failovers());
  Values("clusterkv_link_fallbacks_total", "reason", stats.link_fallbacks());
}

void MetricWriter::PlacementFigures(const v1::Stats& stats) {
  Value("clusterkv_listed_shards", stats.shards());
  if (!stats.has_etcd()) return;
  const v1::EtcdStats& etcd = stats.etcd();
  Value("clusterkv_etcd_connected", etcd.connected() ? 1 : 0);
  Value("clusterkv_etcd_registered", etcd.registered() ? 1 : 0);
  Value("clusterkv_etcd_reconnects_total", static_cast<double>(etcd.reconnects()));
  Value("clusterkv_etcd_lost_leases_total", static_cast<double>(etcd.lost_leases()));
}

void MetricWriter::TenantFigures(const v1::Stats& stats) {
  const std::map<std::string, v1::TenantStats> tenants(stats.tenants().begin(),
                                                       stats.tenants().end());
  const auto number = [](uint64_t value) { return static_cast<double>(value); };
  for (const auto& [name, tenant] : tenants) {
    const Labels labels = {{"tenant", name}};
    Value("clusterkv_tenant_sequences", tenant.sequences(), labels);
    Value("clusterkv_tenant_planned_bytes", number(tenant.planned_bytes()), labels);
    Value("clusterkv_tenant_queued_selects", tenant.queued_selects(), labels);
    Value("clusterkv_tenant_calls_total", number(tenant.calls()), labels);
    Value("clusterkv_tenant_ingested_bytes_total", number(tenant.ingested_bytes()), labels);
    Value("clusterkv_tenant_refusals_total", number(tenant.refusals()), labels);
  }
}

void MetricWriter::ServerFigures(const ServerMetrics& metrics, int64_t connections) {
  for (int i = 0; i < static_cast<int>(Stage::kCount); ++i) {
    Histogram("clusterkv_stage_seconds", metrics.stages_[i], {{"stage", kStageNames[i]}});
  }
  const auto number = [](const std::atomic<uint64_t>& value) {
    return static_cast<double>(value.load(std::memory_order_relaxed));
  };
  Value("clusterkv_connections", static_cast<double>(connections));
  Value("clusterkv_connections_accepted_total", number(metrics.accepted_));
  Value("clusterkv_connections_refused_total", number(metrics.refused_limit_),
        {{"reason", "limit"}});
  Value("clusterkv_connections_refused_total", number(metrics.refused_descriptors_),
        {{"reason", "descriptors"}});
  for (int method = 0; method < ServerMetrics::kMethods; ++method) {
    Value("grpc_server_call_started_total", number(metrics.started_[method]),
          {{"grpc_method", kMethodNames[method]}});
    for (int code = 0; code < ServerMetrics::kCodes; ++code) {
      // A series per method and code that happened: all of them would be 400 histograms.
      const BucketHistogram& histogram = metrics.calls_[method][code];
      if (histogram.Take().count == 0) continue;
      Histogram("grpc_server_call_duration_seconds", histogram,
                {{"grpc_method", kMethodNames[method]}, {"grpc_status", kCodeNames[code]}});
    }
  }
}

std::vector<prometheus::MetricFamily> ServerMetrics::Families(const v1::Stats& stats,
                                                              int64_t connections) const {
  MetricWriter writer;
  writer.ShardFigures(stats);
  writer.PlacementFigures(stats);
  writer.TenantFigures(stats);
  writer.ServerFigures(*this, connections);
  return writer.Take();
}

}  // namespace clusterkv::cache_service
