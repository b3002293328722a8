// Where things lie in the windows and in the directory (resident_cuda.h).
#ifndef CLUSTERKV_KERNELS_RESIDENT_WINDOWS_H_
#define CLUSTERKV_KERNELS_RESIDENT_WINDOWS_H_

#include <cstdint>

#include "kernels/resident/resident_cuda.h"

namespace clusterkv::kernels::resident {

constexpr int kMaxSlots = 512;
constexpr int kMaxExact = 128;

// One slot of the hot cache in a directory, which lists them from the last used to the longest
// unused.
struct alignas(8) DirectoryEntry {
  int32_t position;  // of the token whose record it holds; -1: none
  int32_t slot;
};

struct WindowLayout {
  int head_lines;    // of a query: its words, two per line
  int query_lines;   // of a pair
  int state_floats;  // of a pair: [group, head_dim], then log-sum-exp [group]
  int state_lines;
  int64_t entries_bytes;  // of all pairs: where the state's lines begin in the reply window

  // Lines and entries of a pair.
  __host__ __device__ const uint4* Queries(const void* requests, int pair) const {
    return static_cast<const uint4*>(requests) + int64_t{pair} * query_lines;
  }
  __host__ __device__ uint4* Queries(void* requests, int pair) const {
    return static_cast<uint4*>(requests) + int64_t{pair} * query_lines;
  }
  __host__ __device__ const uint4* State(const void* replies, int pair) const {
    return reinterpret_cast<const uint4*>(static_cast<const char*>(replies) + entries_bytes) +
           int64_t{pair} * state_lines;
  }
  __host__ __device__ uint4* State(void* replies, int pair) const {
    return reinterpret_cast<uint4*>(static_cast<char*>(replies) + entries_bytes) +
           int64_t{pair} * state_lines;
  }
};

__host__ __device__ inline int64_t RoundUp(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline WindowLayout MakeWindowLayout(const ResidentShape& s) {
  WindowLayout layout = {};
  const int words = s.head_dim * static_cast<int>(ElementBytes(s.query_type)) / 4;
  layout.head_lines = words / 2;
  layout.query_lines = s.group * layout.head_lines;
  layout.state_floats = s.group * (s.head_dim + 1);
  layout.state_lines = (layout.state_floats + 1) / 2;
  layout.entries_bytes = RoundUp(int64_t{s.pairs} * s.max_exact * 8);
  return layout;
}

inline int RecordBytes(const ResidentShape& s) {
  return static_cast<int>(RecordFormatBytes(s.format, s.element_type, s.head_dim));
}

inline bool ValidShape(const ResidentShape& s) {
  return s.layers >= 1 && s.pairs >= 1 && s.pairs <= 65535 && s.group >= 1 && s.group <= 8 &&
         s.head_dim >= 16 && s.head_dim <= 128 && s.head_dim % 16 == 0 && s.max_exact >= 0 &&
         s.slots >= 32 && s.slots <= kMaxSlots && s.slots % 32 == 0 && s.max_exact <= s.slots &&
         s.max_exact <= kMaxExact &&
         (s.format == RecordFormat::kRaw || s.format == RecordFormat::kK8V4);
}

#ifdef CLUSTERKV_CUDA_EMULATOR
// Lets every kernel that was launched to run until it is stopped answer one round.
void ServeEmulated();
#endif

}  // namespace clusterkv::kernels::resident

#endif  // CLUSTERKV_KERNELS_RESIDENT_WINDOWS_H_
