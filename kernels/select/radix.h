// Stable sorting and selection by 32-bit keys, in linear time and without branches on the keys.
#ifndef CLUSTERKV_KERNELS_SELECT_RADIX_H_
#define CLUSTERKV_KERNELS_SELECT_RADIX_H_

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/base/check.h"

namespace clusterkv::kernels {

struct RadixScratch {
  std::vector<uint32_t> items;
  std::array<std::array<uint32_t, 2048>, 3> counts;
};

// Sorts `items` by ascending keys[item]; equal keys stay in order.
inline void SortByKey(const uint32_t* keys, RadixScratch& scratch, std::vector<uint32_t>* items) {
  constexpr int kDigitBits = 11;
  constexpr uint32_t kDigits = 1u << kDigitBits;
  for (auto& counts : scratch.counts) counts.fill(0);
  for (const uint32_t item : *items) {
    const uint32_t key = keys[item];
    for (int d = 0; d < 3; ++d) ++scratch.counts[d][key >> (d * kDigitBits) & (kDigits - 1)];
  }
  scratch.items.resize(items->size());
  for (int d = 0; d < 3; ++d) {
    auto& counts = scratch.counts[d];
    uint32_t begin = 0;
    bool one_digit = false;  // all keys have the same digit here: nothing to move
    for (uint32_t& count : counts) {
      one_digit |= count == items->size();
      begin += std::exchange(count, begin);
    }
    if (one_digit) continue;
    for (const uint32_t item : *items) {
      scratch.items[counts[keys[item] >> (d * kDigitBits) & (kDigits - 1)]++] = item;
    }
    items->swap(scratch.items);
  }
}

// The k-th smallest of keys [count], counted from 1.
inline uint32_t KthSmallest(const uint32_t* keys, int64_t count, int64_t k, RadixScratch& scratch) {
  CKV_CHECK(k >= 1 && k <= count) << k << " of " << count;
  uint32_t prefix = 0, mask = 0;
  for (const auto& [shift, bits] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
    auto& counts = scratch.counts[0];
    counts.fill(0);
    const uint32_t digit_mask = (1u << bits) - 1;
    for (int64_t i = 0; i < count; ++i) {
      if ((keys[i] & mask) == prefix) ++counts[keys[i] >> shift & digit_mask];
    }
    uint32_t digit = 0;
    while (k > counts[digit]) k -= counts[digit++];
    prefix |= digit << shift;
    mask |= digit_mask << shift;
  }
  return prefix;
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_SELECT_RADIX_H_
