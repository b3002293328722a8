// Exact selection by weight within one block: which items of the largest keys fill a target.
//
// Items are ordered by descending key, then ascending index. WeightedThreshold finds where the
// running sum of their weights reaches the target: one histogram over 2,048 ranges of keys, then
// the few items of the range in which it happens are ranked against each other; where they are not
// few, a radix search. OrderedTake then visits the items in index order and says how much of each
// is taken. No sort, no float, no order of threads in the result.
#ifndef CLUSTERKV_KERNELS_SELECT_THRESHOLD_CUH_
#define CLUSTERKV_KERNELS_SELECT_THRESHOLD_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"

namespace clusterkv::kernels::cuda {

constexpr int kHistogramBins = 2048;

constexpr int kThresholdCandidates = 512;

// Shared memory of both functions.
struct ThresholdScratch {
  alignas(16) uint32_t histogram[kHistogramBins];
  uint32_t candidate_keys[kThresholdCandidates];
  int candidate_weights[kThresholdCandidates];
  int candidate_indices[kThresholdCandidates];
  unsigned long long warp_sums[2][kWarp];  // NOLINT(runtime/int): what shuffles take
  int found_bin;
  int found_above;
  int candidates;
  uint32_t key;
  int remaining;
};

struct Threshold {
  uint32_t key;   // items above it are taken whole
  int remaining;  // weight to take of the items that have it, in index order
};

// Sum over the block of each thread's x, and in *before the sum over the threads before this one.
// `sums` [kWarp] in shared memory, not used by the caller until the next barrier.
template <int kThreads, typename T>
__device__ __forceinline__ T BlockExclusiveSum(T x, T* sums, T* before) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  T inclusive = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T y = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += y;
  }
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  T base = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    const T sum = sums[w];
    base += w < warp ? sum : 0;
    total += sum;
  }
  *before = base + inclusive - x;
  return total;
}

// Finds among histogram bins, in the order `place` gives (0: first), that in which the sum reaches
// `target`; -1 in found_bin if none. Ends with a barrier.
template <int kThreads, typename Place>
__device__ __forceinline__ void FindBin(int target, const Place& place, ThresholdScratch& scratch) {
  using Sum = unsigned long long;  // NOLINT(runtime/int)
  constexpr int kBinsPerThread = kHistogramBins / kThreads;
  const int first = static_cast<int>(threadIdx.x) * kBinsPerThread;
  int bins[kBinsPerThread], sum = 0;
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) {
    bins[j] = static_cast<int>(scratch.histogram[place(first + j)]);
    sum += bins[j];
  }
  Sum before;
  BlockExclusiveSum<kThreads, Sum>(static_cast<Sum>(sum), scratch.warp_sums[0], &before);
  int above = static_cast<int>(before);
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) {
    if (above < target && above + bins[j] >= target) {
      scratch.found_bin = place(first + j);
      scratch.found_above = above;
    }
    above += bins[j];
  }
  __syncthreads();
}

// As WeightedThreshold, whatever the keys: three passes over 11, 11 and 10 bits.
template <int kThreads, typename Key, typename Weight>
__device__ Threshold RadixThreshold(int n, int target, const Key& key, const Weight& weight,
                                    ThresholdScratch& scratch) {
  uint32_t prefix = 0;
  int remaining = target;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const int bits = pass == 2 ? 10 : 11;
    for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) scratch.histogram[i] = 0;
    if (threadIdx.x == 0) scratch.found_bin = -1;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t k = key(i);
      const bool candidate = pass == 0 || k >> (shift + bits) == prefix;
      const int w = candidate ? weight(i) : 0;
      if (w > 0) {
        atomicAdd(&scratch.histogram[k >> shift & ((1u << bits) - 1)], static_cast<uint32_t>(w));
      }
    }
    __syncthreads();
    FindBin<kThreads>(
        remaining, [](int i) { return kHistogramBins - 1 - i; }, scratch);
    const int bin = scratch.found_bin, found_above = scratch.found_above;
    __syncthreads();
    if (bin < 0) return {0, 0x7fffffff};  // everything, and the target is not reached
    remaining -= found_above;
    prefix = prefix << bits | static_cast<uint32_t>(bin);
  }
  return {prefix, remaining};
}

// An order-preserving key of a rank's log2: fixed point, 2^-21, so that leading bits spread evenly
// over what matters. Ranks below 2^-1016 are equal.
__device__ __forceinline__ uint32_t RankKey(float log2_rank) {
  const float clamped = fminf(fmaxf(log2_rank, -1016.0f), 7.5f);
  return static_cast<uint32_t>(static_cast<int>(rintf(clamped * 2097152.0f)) + 1016 * 2097152) << 1;
}

// The range of keys, of 2^17, that a key is in, counted from the largest; the rest is one.
__device__ __forceinline__ int KeyRange(uint32_t key) {
  return min(static_cast<int>((0xffffffffu - key) >> 17), kHistogramBins - 1);
}

// key(i) -> uint32_t and weight(i) -> int >= 0 for i in [0, n). Less weight than the target in all:
// every item is taken. Ends with a barrier passed by all threads.
template <int kThreads, typename Key, typename Weight>
__device__ Threshold WeightedThreshold(int n, int target, const Key& key, const Weight& weight,
                                       ThresholdScratch& scratch) {
  static_assert(kThreads >= kThresholdCandidates);
  if (target <= 0) return {0xffffffffu, 0};
  for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) scratch.histogram[i] = 0;
  if (threadIdx.x == 0) {
    scratch.found_bin = -1;
    scratch.candidates = 0;
  }
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const int w = weight(i);
    if (w > 0) atomicAdd(&scratch.histogram[KeyRange(key(i))], static_cast<uint32_t>(w));
  }
  __syncthreads();
  FindBin<kThreads>(
      target, [](int i) { return i; }, scratch);
  const int bin = scratch.found_bin;
  if (bin < 0) return {0, 0x7fffffff};  // everything, and the target is not reached
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const uint32_t k = key(i);
    if (KeyRange(k) != bin || weight(i) <= 0) continue;
    const int at = atomicAdd(&scratch.candidates, 1);
    if (at >= kThresholdCandidates) continue;
    scratch.candidate_keys[at] = k;
    scratch.candidate_weights[at] = weight(i);
    scratch.candidate_indices[at] = i;
  }
  __syncthreads();
  const int candidates = scratch.candidates;
  if (candidates > kThresholdCandidates) {
    __syncthreads();
    return RadixThreshold<kThreads>(n, target, key, weight, scratch);
  }
  if (static_cast<int>(threadIdx.x) < candidates) {
    const uint32_t k = scratch.candidate_keys[threadIdx.x];
    const int index = scratch.candidate_indices[threadIdx.x];
    int above = scratch.found_above, tied = 0;
    for (int j = 0; j < candidates; ++j) {
      const uint32_t other = scratch.candidate_keys[j];
      const int w = scratch.candidate_weights[j];
      if (other > k) above += w;
      if (other == k && scratch.candidate_indices[j] < index) tied += w;
    }
    const int before = above + tied;
    if (before < target && before + scratch.candidate_weights[threadIdx.x] >= target) {
      scratch.key = k;
      scratch.remaining = target - above;
    }
  }
  __syncthreads();
  return {scratch.key, scratch.remaining};
}

// Calls emit(i, take, index, before) for every i in [0, n): take, 0 to weight(i); index, how many
// items before i have take > 0; before, their takes' sum. Items of weight 0 are never taken.
// Returns how many items are taken, and in *total their sum. Ends with a barrier.
template <int kThreads, typename Key, typename Weight, typename Emit>
__device__ int OrderedTake(int n, Threshold threshold, const Key& key, const Weight& weight,
                           ThresholdScratch& scratch, const Emit& emit, int* total) {
  using Sum = unsigned long long;  // NOLINT(runtime/int)
  const int per_thread = (n + kThreads - 1) / kThreads;
  const int begin = min(n, static_cast<int>(threadIdx.x) * per_thread);
  const int end = min(n, begin + per_thread);
  // Weight above the threshold and weight at it, and how many items have them.
  int tied = 0;
  for (int i = begin; i < end; ++i) {
    if (key(i) == threshold.key) tied += weight(i);
  }
  Sum tied_before;
  BlockExclusiveSum<kThreads, Sum>(static_cast<Sum>(tied), scratch.warp_sums[0], &tied_before);
  const auto take_of = [&](int i, int* ties) {
    const uint32_t k = key(i);
    const int w = weight(i);
    if (k > threshold.key) return w;
    if (k < threshold.key) return 0;
    const int take = max(0, min(w, threshold.remaining - *ties));
    *ties += w;
    return take;
  };
  int ties = static_cast<int>(tied_before), items = 0, sum = 0;
  for (int i = begin; i < end; ++i) {
    const int take = take_of(i, &ties);
    items += take > 0;
    sum += take;
  }
  Sum before;
  const Sum all = BlockExclusiveSum<kThreads, Sum>(
      static_cast<Sum>(items) << 32 | static_cast<Sum>(sum), scratch.warp_sums[1], &before);
  ties = static_cast<int>(tied_before);
  int index = static_cast<int>(before >> 32), taken = static_cast<int>(before & 0xffffffffu);
  for (int i = begin; i < end; ++i) {
    const int take = take_of(i, &ties);
    emit(i, take, index, taken);
    index += take > 0;
    taken += take;
  }
  *total = static_cast<int>(all & 0xffffffffu);
  __syncthreads();
  return static_cast<int>(all >> 32);
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_SELECT_THRESHOLD_CUH_
