// Tenants: who shares a server without knowing of each other.
//
// A tenant is known by the identities in its clients' certificates, has a view of the shard that
// shows nothing of the others (tenant_shard.h), quotas, and its turn at the select threads
// (fair_queue.h). Calls without a certificate are the default tenant's. Without any tenant
// configured none of this exists and calls reach the shard itself.
//
// Thread-safe once made.
#ifndef CLUSTERKV_CACHE_SERVICE_TENANTS_H_
#define CLUSTERKV_CACHE_SERVICE_TENANTS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "cache_service/fair_queue.h"
#include "cache_service/shard.h"
#include "cache_service/token_bucket.h"

namespace clusterkv::cache_service {

// The tenant of calls without a certificate. It may be configured, like any other.
constexpr char kDefaultTenant[] = "default";

struct TenantOptions {
  std::string name;
  // Of certificates: a URI of the subject alternative names, or, where there is none, the common
  // name. With '*' at its end: all that begin so.
  std::vector<std::string> identities;
  int64_t arena_bytes = 0;              // of all its sequences together; 0: no limit
  int64_t calls_per_second = 0;         // 0: no limit
  int64_t ingest_bytes_per_second = 0;  // of K and V, put and appended; 0: no limit
  int64_t weight = 1;                   // of its turns at the select threads
};

class Tenant {
 public:
  // shard: its own view; outlives it, as the options do.
  Tenant(TenantOptions options, std::unique_ptr<Shard> shard);

  const TenantOptions& options() const { return options_; }
  Shard& shard() { return *shard_; }

  // Errors: RATE_LIMITED with retryAfterMs.
  absl::Status AdmitCall(absl::Time now);
  absl::Status AdmitBytes(int64_t bytes, absl::Time now);

  std::atomic<uint64_t> calls{0}, ingested_bytes{0}, refusals{0};

 private:
  absl::Status Refuse(const char* limit, int64_t allowed, absl::Duration wait);

  const TenantOptions options_;
  const std::unique_ptr<Shard> shard_;
  TokenBucket calls_, bytes_;
};

class Tenants {
 public:
  // `shard` outlives it. options: not empty; names and identities are unique.
  Tenants(const std::vector<TenantOptions>& options, Shard* shard);

  // Of the first tenant that has one of the identities; null: none has.
  Tenant* OfIdentities(const std::vector<std::string>& identities);
  Tenant* OfName(std::string_view name);
  Tenant& default_tenant() { return *default_; }
  // Adds each tenant's figures.
  void AddTo(v1::Stats* stats) const;

 private:
  FairQueue queue_;
  std::vector<std::unique_ptr<Tenant>> tenants_;
  Tenant* default_ = nullptr;
};

// "spiffe://a/*" matches what begins with "spiffe://a/".
bool IdentityMatches(std::string_view pattern, std::string_view identity);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TENANTS_H_
