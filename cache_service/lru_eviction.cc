// Least recently used first.
#include <algorithm>

#include "cache_service/eviction_policy.h"

namespace clusterkv::cache_service {
namespace {

class Lru : public EvictionPolicy {
 public:
  std::string_view name() const override { return "lru"; }
  size_t Choose(absl::Span<const EvictionCandidate> candidates) const override {
    const auto oldest =
        std::min_element(candidates.begin(), candidates.end(),
                         [](const auto& a, const auto& b) { return a.last_use < b.last_use; });
    return static_cast<size_t>(oldest - candidates.begin());
  }
};

}  // namespace

const EvictionPolicy& LruEviction() {
  static const Lru& lru = *new Lru;
  return lru;
}

}  // namespace clusterkv::cache_service
