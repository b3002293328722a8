#include "cache_service/eviction_policy.h"

#include <array>

namespace clusterkv::cache_service {

const EvictionPolicy& LruEviction();  // lru_eviction.cc

const EvictionPolicy* FindEvictionPolicy(std::string_view name) {
  static const std::array<const EvictionPolicy*, 1> policies = {
      &LruEviction(),
  };
  for (const EvictionPolicy* policy : policies) {
    if (policy->name() == name) return policy;
  }
  return nullptr;
}

}  // namespace clusterkv::cache_service
