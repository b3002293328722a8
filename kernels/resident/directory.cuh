// The hot cache's directory of one (layer, pair), resolved by one block: which exact tokens have a
// slot, and which slots the others take.
//
// Exactly the least recently used: the entries are kept in the order of their last use, so that one
// stable partition is both the lookup and the eviction.
#ifndef CLUSTERKV_KERNELS_RESIDENT_DIRECTORY_CUH_
#define CLUSTERKV_KERNELS_RESIDENT_DIRECTORY_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"
#include "kernels/resident/windows.h"

namespace clusterkv::kernels::cuda {

// Shared memory of Resolve.
struct DirectoryScratch {
  int sums[2][kWarp];
  int32_t victims[resident::kMaxExact];
  int32_t missing[resident::kMaxExact];  // out: exact tokens without a slot before, ascending
  int32_t slots[resident::kMaxExact];    // out: of every exact token
  bool missed[resident::kMaxExact];      // out: by exact token, false beyond them
};

// Sum of x over the threads before this one; *total over all kThreads.
template <int kThreads>
__device__ __forceinline__ int ExclusiveSum(int x, int* sums, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int inclusive = WarpInclusiveSum(x);
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < warp ? sums[w] : 0;
    all += sums[w];
  }
  *total = all;
  return before + inclusive - x;
}

// `own`: the directory's entry threadIdx.x as it was before (any value from `slots` on); positions
// [count] in shared memory, 16-byte aligned, of distinct tokens, count <= slots and kMaxExact,
// which its size is; a barrier since they were written. Writes the entries in their new order to
// `directory` and fills scratch.slots and scratch.missing. Returns how many are missing. By all
// kThreads threads, kThreads >= slots; ends with a barrier.
template <int kThreads>
__device__ int Resolve(resident::DirectoryEntry own, int slots, const int* positions, int count,
                       resident::DirectoryEntry* directory, DirectoryScratch& scratch) {
  static_assert(kThreads >= resident::kMaxSlots);
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) scratch.slots[i] = -1;
  __syncthreads();
  bool other = i < slots;
  if (other && own.position >= 0) {
    const uint32_t position = static_cast<uint32_t>(own.position);
    int hit = -1;
    for (int j = 0; j < count; j += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(positions + j);
      if (four.x == position) hit = j;
      if (four.y == position) hit = j + 1;
      if (four.z == position) hit = j + 2;
      if (four.w == position) hit = j + 3;
    }
    other = hit < 0;
    if (!other) scratch.slots[hit] = own.slot;
  }
  int others;
  const int place = ExclusiveSum<kThreads>(other ? 1 : 0, scratch.sums[0], &others);
  // The last of those not hit give their slots away.
  const int kept = slots - count;
  if (other && place >= kept) scratch.victims[place - kept] = own.slot;
  if (other && place < kept) directory[count + place] = own;
  const bool missed = i < count && scratch.slots[i] < 0;
  int missing;
  const int turn = ExclusiveSum<kThreads>(missed ? 1 : 0, scratch.sums[1], &missing);
  if (i < resident::kMaxExact) scratch.missed[i] = missed;
  if (missed) {
    scratch.slots[i] = scratch.victims[turn];
    scratch.missing[turn] = i;
  }
  if (i < count) directory[i] = {positions[i], scratch.slots[i]};
  __syncthreads();
  return missing;
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_RESIDENT_DIRECTORY_CUH_
