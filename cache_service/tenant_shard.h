// One tenant's view of a shard: what it opened itself, and nothing that tells of the others.
//
//   names           live under a prefix that no name of the contract can have; "" lists its own
//   generations     are shown permuted by a key of the tenant: how many sequences others open
//                   cannot be read off them
//   attachment and  are shown combined with a key of the tenant: an id that is another's is one
//   that session ids     does not exist errors          name what the tenant named, and tell no
//   figures of the whole arena selects         take turns with the other tenants' quota what the
//   sequences that live were promised when they were opened; a fork counts
//                   as if it shared nothing
//
// The shard below knows nothing of tenants. Thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_TENANT_SHARD_H_
#define CLUSTERKV_CACHE_SERVICE_TENANT_SHARD_H_

#include <memory>
#include <string_view>

#include "cache_service/fair_queue.h"
#include "cache_service/shard.h"
#include "cache_service/tenants.h"

namespace clusterkv::cache_service {

// index: of the tenant, unique; `shard` and `queue` outlive the view. What concerns the server as a
// whole (drain, ledger, errors) is the shard's own; GetStats tells the tenant's sequences,
// reserved_pages (what counts for the quota) and queued_selects, and no other figures.
std::unique_ptr<Shard> MakeTenantShard(int index, const TenantOptions& options, Shard* shard,
                                       FairQueue* queue);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TENANT_SHARD_H_
