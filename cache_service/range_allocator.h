// Hands out ranges of [0, size): first fit, neighbours joined when they are given back.
//
// Not thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_RANGE_ALLOCATOR_H_
#define CLUSTERKV_CACHE_SERVICE_RANGE_ALLOCATOR_H_

#include <cstdint>
#include <map>
#include <optional>

namespace clusterkv::cache_service {

class RangeAllocator {
 public:
  // Ranges begin at multiples of `granule`. REQUIRES: size >= 0, granule >= 1.
  RangeAllocator(int64_t size, int64_t granule);

  // Where a free range of `bytes` (at least 1) begins; nullopt when none is long enough.
  std::optional<int64_t> Allocate(int64_t bytes);
  // REQUIRES: Allocate(bytes) answered `begin`, and it was not freed since.
  void Free(int64_t begin, int64_t bytes);
  int64_t free_bytes() const { return free_bytes_; }

 private:
  int64_t RoundUp(int64_t bytes) const { return (bytes + granule_ - 1) / granule_ * granule_; }

  const int64_t granule_;
  std::map<int64_t, int64_t> free_;  // begin -> end
  int64_t free_bytes_ = 0;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RANGE_ALLOCATOR_H_
