// What two GPUs tell each other while their kernels run: words that carry their own flag.
//
// A *line* is 16 bytes, two words of data each beside a flag; an *entry* is 8 bytes, one word and a
// flag. Flags are the round's number, which changes with every round: who sees it in a line has
// seen the line's data too, so that neither side needs a fence or a message of its own. Lines are
// written and read whole, past the nearer caches.
#ifndef CLUSTERKV_KERNELS_RESIDENT_LINES_CUH_
#define CLUSTERKV_KERNELS_RESIDENT_LINES_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"

namespace clusterkv::kernels::cuda {

// Nanoseconds of a clock that all multiprocessors of a device share. 0 in the emulator.
__device__ __forceinline__ uint64_t DeviceNanoseconds() {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return 0;
#else
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
#endif
}

__device__ __forceinline__ void StoreLine(uint4* line, uint32_t a, uint32_t b, uint32_t flag) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  *line = {a, flag, b, flag};
#else
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(line), "r"(a), "r"(flag),
               "r"(b)
               : "memory");
#endif
}
// False: not of that round yet.
__device__ __forceinline__ bool LoadLine(const uint4* line, uint32_t flag, uint32_t* a,
                                         uint32_t* b) {
  uint32_t first, second;
#ifdef CLUSTERKV_CUDA_EMULATOR
  *a = line->x;
  first = line->y;
  *b = line->z;
  second = line->w;
#else
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(*a), "=r"(first), "=r"(*b), "=r"(second)
               : "l"(line)
               : "memory");
#endif
  return first == flag && second == flag;
}

__device__ __forceinline__ void StoreEntry(uint2* entry, uint32_t word, uint32_t flag) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  *entry = {word, flag};
#else
  asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(entry), "r"(word), "r"(flag)
               : "memory");
#endif
}
__device__ __forceinline__ bool LoadEntry(const uint2* entry, uint32_t flag, uint32_t* word) {
  uint32_t seen;
#ifdef CLUSTERKV_CUDA_EMULATOR
  *word = entry->x;
  seen = entry->y;
#else
  asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(*word), "=r"(seen)
               : "l"(entry)
               : "memory");
#endif
  return seen == flag;
}

__device__ __forceinline__ uint32_t LoadVolatile(const uint32_t* word) {
  return *static_cast<const volatile uint32_t*>(word);
}

// Polls until `seen` is true. False: `give_up` said so first; it is asked every 256th time.
template <typename Seen, typename GiveUp>
__device__ __forceinline__ bool Poll(const Seen& seen, const GiveUp& give_up) {
  for (uint32_t polls = 1;; ++polls) {
    if (seen()) return true;
    if (polls % 256 == 0 && give_up()) return false;
#ifdef CLUSTERKV_CUDA_EMULATOR
    if (polls == 256) return false;  // kernels run one after the other: it will never come
#endif
  }
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_RESIDENT_LINES_CUH_
