// Which sequence leaves when the arena has no room.
//
// A policy only orders; what may leave at all (READY, without attachments, without a call under
// way) is decided by the store. Policies are stateless and immortal. A new one: a file with a class
// and one line in eviction_policy.cc.
#ifndef CLUSTERKV_CACHE_SERVICE_EVICTION_POLICY_H_
#define CLUSTERKV_CACHE_SERVICE_EVICTION_POLICY_H_

#include <cstdint>
#include <string_view>

#include "absl/types/span.h"

namespace clusterkv::cache_service {

struct EvictionCandidate {
  uint64_t last_use = 0;  // a counter of uses: larger is later
  int64_t pages = 0;      // that it holds, shared ones too
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  virtual std::string_view name() const = 0;
  // The one to leave first. REQUIRES: candidates is not empty.
  virtual size_t Choose(absl::Span<const EvictionCandidate> candidates) const = 0;
};

// The policy of that name, or null: "lru".
const EvictionPolicy* FindEvictionPolicy(std::string_view name);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_EVICTION_POLICY_H_
