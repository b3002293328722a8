#include "cache_service/tenants.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/tenant_shard.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

Tenant::Tenant(TenantOptions options, std::unique_ptr<Shard> shard)
    : options_(std::move(options)),
      shard_(std::move(shard)),
      calls_(static_cast<double>(options_.calls_per_second)),
      bytes_(static_cast<double>(options_.ingest_bytes_per_second)) {}

absl::Status Tenant::Refuse(const char* limit, int64_t allowed, absl::Duration wait) {
  refusals.fetch_add(1, std::memory_order_relaxed);
  const int64_t wait_ms = std::max<int64_t>(1, absl::ToInt64Milliseconds(wait));
  return Error(v1::RATE_LIMITED,
               absl::StrCat(limit, ": expected at most ", allowed, ", got more; try again after ",
                            wait_ms, " ms"),
               {{"limit", limit},
                {"expected", absl::StrCat(allowed)},
                {"retryAfterMs", absl::StrCat(wait_ms)}});
}

absl::Status Tenant::AdmitCall(absl::Time now) {
  calls.fetch_add(1, std::memory_order_relaxed);
  const absl::Duration wait = calls_.Take(1, now);
  if (wait <= absl::ZeroDuration()) return absl::OkStatus();
  return Refuse("calls_per_second", options_.calls_per_second, wait);
}

absl::Status Tenant::AdmitBytes(int64_t bytes, absl::Time now) {
  const absl::Duration wait = bytes_.Take(static_cast<double>(bytes), now);
  if (wait > absl::ZeroDuration()) {
    return Refuse("ingest_bytes_per_second", options_.ingest_bytes_per_second, wait);
  }
  ingested_bytes.fetch_add(static_cast<uint64_t>(bytes), std::memory_order_relaxed);
  return absl::OkStatus();
}

Tenants::Tenants(const std::vector<TenantOptions>& options, Shard* shard)
    : queue_(shard->options().select_threads, shard->options().max_queued_selects) {
  std::vector<TenantOptions> all = options;
  const bool has_default = std::any_of(all.begin(), all.end(), [](const TenantOptions& tenant) {
    return tenant.name == kDefaultTenant;
  });
  if (!has_default) {
    all.emplace_back();
    all.back().name = kDefaultTenant;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    auto view = MakeTenantShard(static_cast<int>(i), all[i], shard, &queue_);
    tenants_.push_back(std::make_unique<Tenant>(all[i], std::move(view)));
  }
  default_ = OfName(kDefaultTenant);
}

bool IdentityMatches(std::string_view pattern, std::string_view identity) {
  if (pattern.empty() || pattern.back() != '*') return pattern == identity;
  pattern.remove_suffix(1);
  return identity.substr(0, pattern.size()) == pattern;
}

Tenant* Tenants::OfIdentities(const std::vector<std::string>& identities) {
  for (const auto& tenant : tenants_) {
    for (const std::string& pattern : tenant->options().identities) {
      for (const std::string& identity : identities) {
        if (IdentityMatches(pattern, identity)) return tenant.get();
      }
    }
  }
  return nullptr;
}

Tenant* Tenants::OfName(std::string_view name) {
  for (const auto& tenant : tenants_) {
    if (tenant->options().name == name) return tenant.get();
  }
  return nullptr;
}

void Tenants::AddTo(v1::Stats* stats) const {
  for (const auto& tenant : tenants_) {
    const v1::Stats own = tenant->shard().GetStats();
    v1::TenantStats& figures = (*stats->mutable_tenants())[tenant->options().name];
    figures.set_sequences(own.sequences());
    figures.set_planned_bytes(own.reserved_pages() * own.page_bytes());
    figures.set_quota_bytes(static_cast<uint64_t>(tenant->options().arena_bytes));
    figures.set_queued_selects(own.queued_selects());
    figures.set_calls(tenant->calls.load(std::memory_order_relaxed));
    figures.set_ingested_bytes(tenant->ingested_bytes.load(std::memory_order_relaxed));
    figures.set_refusals(tenant->refusals.load(std::memory_order_relaxed));
  }
}

}  // namespace clusterkv::cache_service
