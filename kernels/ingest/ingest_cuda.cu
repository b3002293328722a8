#include <algorithm>

#include "kernels/base/cuda_util.cuh"
#include "kernels/ingest/ingest_cuda.h"
#include "kernels/ingest/rows_hash.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMostBlocks = 132 * 8;

using Atomic = unsigned long long;  // NOLINT(runtime/int): atomics' type

// What a piece at byte `at` of the chunk adds to its hash.
template <typename Piece>
__device__ uint64_t HashPiece(const Piece& piece, int64_t at) {
  constexpr int kWords = sizeof(Piece) / 2;
  uint16_t words[kWords];
  memcpy(words, &piece, sizeof(Piece));
  uint64_t hash = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) hash += MixWord(static_cast<uint64_t>(at / 2 + i), words[i]);
  return hash;
}

// Adds the sums of all lanes to *hash.
__device__ void AddHash(uint64_t sum, Atomic* hash) {
  auto total = static_cast<Atomic>(sum);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(kFullMask, total, offset);
  }
  if (threadIdx.x % kWarp == 0 && total != 0) atomicAdd(hash, total);
}

// Calls f(values, row) for each row of K, then of V, a warp per row in turns.
template <typename F>
__device__ void ForEachRow(int64_t rows, const F& f) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < 2 * rows;
       i += warps) {
    f(i >= rows, i >= rows ? i - rows : i);
  }
}

template <typename Piece>
__global__ void __launch_bounds__(kThreads) PackKernel(const PackRows rows) {
  const int lane = threadIdx.x % kWarp;
  const int per_head = rows.head_bytes / static_cast<int>(sizeof(Piece));
  const int pieces = rows.heads * per_head;
  const int64_t row_bytes = static_cast<int64_t>(rows.heads) * rows.head_bytes;
  uint64_t sum = 0;
  ForEachRow(rows.tokens, [&](bool is_value, int64_t token) {
    const int64_t token_stride =
        is_value ? rows.values.token_stride_bytes : rows.keys.token_stride_bytes;
    const int64_t head_stride =
        is_value ? rows.values.head_stride_bytes : rows.keys.head_stride_bytes;
    const unsigned char* const row =
        (is_value ? rows.values.data : rows.keys.data) + token * token_stride;
    auto* const to = reinterpret_cast<Piece*>((is_value ? rows.slot_values : rows.slot_keys) +
                                              token * row_bytes);
    const int64_t at = ((is_value ? rows.tokens : 0) + token) * row_bytes;
#pragma unroll 4
    for (int p = lane; p < pieces; p += kWarp) {
      const int head = p / per_head;
      const auto* const of_head = reinterpret_cast<const Piece*>(row + head * head_stride);
      const Piece piece = of_head[p - head * per_head];
      sum += HashPiece(piece, at + p * static_cast<int64_t>(sizeof(Piece)));
      to[p] = piece;
    }
  });
  AddHash(sum, rows.hash);
}

// The complement of the element's index (as RowsFound) if some element of the piece is NaN or
// infinite, else 0. `element`: of the piece's first one, in the chunk's keys or values.
template <typename Piece>
__device__ Atomic FirstBad(const Piece& piece, ElementType type, int64_t element) {
  // The bits that are all ones in infinities and NaNs, and only there.
  if (type == ElementType::kFloat32) {
    if constexpr (sizeof(Piece) >= 4) {
      uint32_t words[sizeof(Piece) / 4];
      memcpy(words, &piece, sizeof(Piece));
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Piece) / 4); ++i) {
        if ((words[i] & 0x7f800000u) == 0x7f800000u) return ~static_cast<Atomic>(element + i);
      }
    }
    return 0;
  }
  const uint16_t mask = type == ElementType::kFloat16 ? 0x7c00u : 0x7f80u;
  uint16_t words[sizeof(Piece) / 2];
  memcpy(words, &piece, sizeof(Piece));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Piece) / 2); ++i) {
    if ((words[i] & mask) == mask) return ~static_cast<Atomic>(element + i);
  }
  return 0;
}

template <typename Piece>
__global__ void __launch_bounds__(kThreads) TakeKernel(const TakeRows rows) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row_bytes = rows.keys.element_bytes;
  const int pieces = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Piece)));
  const int element_bytes = DeviceElementBytes(rows.type);
  uint64_t sum = 0;
  ForEachRow(rows.end - rows.begin, [&](bool is_value, int64_t i) {
    const int64_t row = rows.begin + i;
    const auto* const from = reinterpret_cast<const Piece*>(
        (is_value ? rows.slot_values : rows.slot_keys) + row * row_bytes);
    const DevicePagedView& pages = is_value ? rows.values : rows.keys;
    Piece* const to = pages.As<Piece>(rows.first + static_cast<uint32_t>(i));
    Atomic bad = 0;
#pragma unroll 4
    for (int p = lane; p < pieces; p += kWarp) {
      const Piece piece = from[p];
      const int64_t at = row * row_bytes + p * static_cast<int64_t>(sizeof(Piece));
      sum += HashPiece(piece, (is_value ? rows.rows * row_bytes : 0) + at);
      bad = max(bad, FirstBad(piece, rows.type, at / element_bytes));
      to[p] = piece;
    }
    if (bad != 0) {
      atomicMax(is_value ? &rows.found->not_first_bad_value : &rows.found->not_first_bad_key, bad);
    }
  });
  AddHash(sum, &rows.found->hash);
}

dim3 Blocks(int64_t rows) {
  return dim3(static_cast<unsigned>(std::min((2 * rows + kWarps - 1) / kWarps, kMostBlocks)));
}

// Launches the kernel whose pieces are the largest that divide all of `bits` or-ed together.
template <typename Rows>
cudaError_t LaunchByPiece(uint64_t bits, int64_t count, const Rows& rows, cudaStream_t stream,
                          void (*by16)(Rows), void (*by8)(Rows), void (*by4)(Rows),
                          void (*by2)(Rows)) {
  if (count == 0) return cudaSuccess;
  if (bits % 2 != 0) return cudaErrorInvalidValue;
  const auto kernel = bits % 16 == 0 ? by16 : bits % 8 == 0 ? by8 : bits % 4 == 0 ? by4 : by2;
  return cuda::Launch(kernel, Blocks(count), dim3(kThreads), 0, 1, stream, rows);
}

uint64_t BitsOf(const void* address) { return reinterpret_cast<uint64_t>(address); }

uint64_t BitsOf(const StridedRows& rows) {
  return BitsOf(rows.data) | static_cast<uint64_t>(rows.token_stride_bytes) |
         static_cast<uint64_t>(rows.head_stride_bytes);
}

}  // namespace

cudaError_t LaunchPackRows(const PackRows& rows, cudaStream_t stream) {
  if (rows.tokens < 0 || rows.heads <= 0 || rows.head_bytes <= 0) return cudaErrorInvalidValue;
  CKV_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(rows.hash, 0, sizeof(*rows.hash), stream));
  return LaunchByPiece(BitsOf(rows.keys) | BitsOf(rows.values) | BitsOf(rows.slot_keys) |
                           BitsOf(rows.slot_values) | static_cast<uint64_t>(rows.head_bytes),
                       rows.tokens, rows, stream, PackKernel<uint4>, PackKernel<uint2>,
                       PackKernel<uint32_t>, PackKernel<uint16_t>);
}

cudaError_t LaunchTakeRows(const TakeRows& rows, cudaStream_t stream) {
  const uint64_t row_bytes = rows.keys.element_bytes;
  if (rows.begin < 0 || rows.end < rows.begin || rows.rows < rows.end || row_bytes == 0 ||
      rows.values.element_bytes != row_bytes || row_bytes % ElementBytes(rows.type) != 0) {
    return cudaErrorInvalidValue;
  }
  return LaunchByPiece(row_bytes | BitsOf(rows.slot_keys) | BitsOf(rows.slot_values),
                       rows.end - rows.begin, rows, stream, TakeKernel<uint4>, TakeKernel<uint2>,
                       TakeKernel<uint32_t>, TakeKernel<uint16_t>);
}

}  // namespace clusterkv::kernels
