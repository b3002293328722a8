// Exact selection by weight within one block: which items of the largest keys fill a target.
//
// Items are ordered by descending key, then ascending index. WeightedThreshold finds where the
// running sum of their weights reaches the target, by a radix search over 2,048-bin histograms;
// OrderedTake then visits the items in index order and says how much of each is taken. No sort, no
// float, no order of threads in the result.
#ifndef CLUSTERKV_KERNELS_SELECT_THRESHOLD_CUH_
#define CLUSTERKV_KERNELS_SELECT_THRESHOLD_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"

namespace clusterkv::kernels::cuda {

constexpr int kHistogramBins = 2048;

// Shared memory of both functions.
struct ThresholdScratch {
  uint32_t histogram[kHistogramBins];
  int warp_sums[4][kWarp];
  int found_bin;
  int found_above;
  int total;
};

struct Threshold {
  uint32_t key;   // items above it are taken whole
  int remaining;  // weight to take of the items that have it, in index order
};

// Sum over the block of each thread's x, and in *before the sum over the threads before this one.
// `sums` [kWarp] in shared memory, not used by the caller until the next barrier.
template <int kThreads>
__device__ __forceinline__ int BlockExclusiveSum(int x, int* sums, int* before) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int inclusive = WarpInclusiveSum(x);
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  int base = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    const int sum = sums[w];
    base += w < warp ? sum : 0;
    total += sum;
  }
  *before = base + inclusive - x;
  return total;
}

// key(i) -> uint32_t and weight(i) -> int >= 0 for i in [0, n). Less weight than the target in all:
// every item is taken. Ends with a barrier passed by all threads.
template <int kThreads, typename Key, typename Weight>
__device__ Threshold WeightedThreshold(int n, int target, const Key& key, const Weight& weight,
                                       ThresholdScratch& scratch) {
  constexpr int kBinsPerThread = kHistogramBins / kThreads;
  Threshold result = {0xffffffffu, 0};
  if (target <= 0) return result;
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
      if (w > 0)
        atomicAdd(&scratch.histogram[k >> shift & ((1u << bits) - 1)], static_cast<uint32_t>(w));
    }
    __syncthreads();
    int bins[kBinsPerThread], sum = 0;
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      const int bin = kHistogramBins - 1 - (static_cast<int>(threadIdx.x) * kBinsPerThread + j);
      bins[j] = static_cast<int>(scratch.histogram[bin]);
      sum += bins[j];
    }
    int above;
    BlockExclusiveSum<kThreads>(sum, scratch.warp_sums[0], &above);
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      if (above < remaining && above + bins[j] >= remaining) {
        scratch.found_bin =
            kHistogramBins - 1 - (static_cast<int>(threadIdx.x) * kBinsPerThread + j);
        scratch.found_above = above;
      }
      above += bins[j];
    }
    __syncthreads();
    const int bin = scratch.found_bin, found_above = scratch.found_above;
    __syncthreads();
    if (bin < 0) return {0, 0x7fffffff};  // everything, and the target is not reached
    remaining -= found_above;
    prefix = prefix << bits | static_cast<uint32_t>(bin);
  }
  return {prefix, remaining};
}

// Calls emit(i, take, index, before) for every i in [0, n): take, 0 to weight(i); index, how many
// items before i have take > 0; before, their takes' sum. Items of weight 0 are never taken.
// Returns how many items are taken, and in *total their sum. Ends with a barrier.
template <int kThreads, typename Key, typename Weight, typename Emit>
__device__ int OrderedTake(int n, Threshold threshold, const Key& key, const Weight& weight,
                           ThresholdScratch& scratch, const Emit& emit, int* total) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int per_warp = (n + kWarps * kWarp - 1) / (kWarps * kWarp) * kWarp;
  const int begin = min(n, warp * per_warp), end = min(n, begin + per_warp);
  int tied = 0;
  for (int i = begin + lane; i < end; i += kWarp) {
    if (key(i) == threshold.key) tied += weight(i);
  }
  tied = __shfl_sync(kFullMask, WarpInclusiveSum(tied), kWarp - 1);
  if (lane == 0) scratch.warp_sums[1][warp] = tied;
  __syncthreads();
  int tied_before = 0;
  for (int w = 0; w < warp; ++w) tied_before += scratch.warp_sums[1][w];

  int index_base = 0, sum_base = 0;
  // The first round counts, the second emits.
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
    int ties = tied_before, items = 0, sum = 0;
    for (int first = begin; first < end; first += kWarp) {
      const int i = first + lane;
      const int w = i < end ? weight(i) : 0;
      const uint32_t k = i < end ? key(i) : 0;
      const bool tie = i < end && k == threshold.key;
      const int tie_prefix = WarpInclusiveSum(tie ? w : 0);
      int take = 0;
      if (tie) {
        take = max(0, min(w, threshold.remaining - (ties + tie_prefix - w)));
      } else if (i < end && k > threshold.key) {
        take = w;
      }
      const int take_prefix = WarpInclusiveSum(take);
      const unsigned taken = __ballot_sync(kFullMask, take > 0);
      if (round == 1 && i < end) {
        emit(i, take, index_base + items + __popc(taken & ((1u << lane) - 1)),
             sum_base + sum + take_prefix - take);
      }
      ties += __shfl_sync(kFullMask, tie_prefix, kWarp - 1);
      items += __popc(taken);
      sum += __shfl_sync(kFullMask, take_prefix, kWarp - 1);
    }
    if (round == 1) break;
    if (lane == 0) {
      scratch.warp_sums[2][warp] = items;
      scratch.warp_sums[3][warp] = sum;
    }
    __syncthreads();
    for (int w = 0; w < warp; ++w) {
      index_base += scratch.warp_sums[2][w];
      sum_base += scratch.warp_sums[3][w];
    }
  }
  int count = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    count += scratch.warp_sums[2][w];
    *total += scratch.warp_sums[3][w];
  }
  __syncthreads();
  return count;
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_SELECT_THRESHOLD_CUH_
