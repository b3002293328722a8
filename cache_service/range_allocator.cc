#include "cache_service/range_allocator.h"

#include <iterator>

#include "kernels/base/check.h"

namespace clusterkv::cache_service {

RangeAllocator::RangeAllocator(int64_t size, int64_t granule) : granule_(granule) {
  CKV_CHECK(size >= 0 && granule >= 1) << size << " " << granule;
  free_bytes_ = size / granule * granule;
  if (free_bytes_ > 0) free_.emplace(0, free_bytes_);
}

std::optional<int64_t> RangeAllocator::Allocate(int64_t bytes) {
  CKV_CHECK(bytes >= 1) << bytes;
  if (bytes > free_bytes_) return std::nullopt;
  const int64_t wanted = RoundUp(bytes);
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    const auto [begin, end] = *range;
    if (end - begin < wanted) continue;
    free_.erase(range);
    if (begin + wanted < end) free_.emplace(begin + wanted, end);
    free_bytes_ -= wanted;
    return begin;
  }
  return std::nullopt;
}

void RangeAllocator::Free(int64_t begin, int64_t bytes) {
  int64_t end = begin + RoundUp(bytes);
  free_bytes_ += end - begin;
  auto after = free_.lower_bound(begin);
  CKV_CHECK(after == free_.end() || after->first >= end) << "freed twice: " << begin;
  if (after != free_.end() && after->first == end) {
    end = after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    CKV_CHECK(before->second <= begin) << "freed twice: " << begin;
    if (before->second == begin) {
      before->second = end;
      return;
    }
  }
  free_.emplace(begin, end);
}

}  // namespace clusterkv::cache_service
