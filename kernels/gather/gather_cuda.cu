#include <algorithm>

#include "kernels/base/cuda_util.cuh"
#include "kernels/gather/gather_cuda.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPieces = 4;  // that a lane has in flight

// Copies `records` records of `pieces` pieces; where(i, &from, &to) says where record i lies. A
// warp takes as many records at a time as fill its lanes kPieces times.
template <typename Piece, typename Where>
__device__ void CopyRecords(int64_t records, int pieces, const Where& where) {
  const int lane = threadIdx.x % kWarp;
  const int64_t total = records * pieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * kWarp * kPieces;
  int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kWarp * kPieces;
  for (; first < total; first += step) {
    Piece held[kPieces];
    Piece* to[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int64_t at = first + k * kWarp + lane;
      to[k] = nullptr;
      if (at >= total) continue;
      const int64_t record = at / pieces;
      const int piece = static_cast<int>(at - record * pieces);
      const unsigned char* from;
      unsigned char* destination;
      where(record, &from, &destination);
      to[k] = reinterpret_cast<Piece*>(destination) + piece;
      held[k] = reinterpret_cast<const Piece*>(from)[piece];
    }
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (to[k] != nullptr) *to[k] = held[k];
    }
  }
}

template <typename Piece>
__global__ void __launch_bounds__(kThreads)
    GatherKernel(DevicePagedView records, const int32_t* indices, int64_t count,
                 unsigned char* packed) {
  CopyRecords<Piece>(count, static_cast<int>(records.element_bytes / sizeof(Piece)),
                     [&](int64_t i, const unsigned char** from, unsigned char** to) {
                       *from = records.At(static_cast<uint32_t>(indices[i]));
                       *to = packed + i * records.element_bytes;
                     });
}

template <typename Piece>
__global__ void __launch_bounds__(kThreads)
    MoveKernel(const DevicePagedView* views, const RecordMove* moves, const int32_t* count,
               int32_t max_count, int32_t record_bytes, unsigned char* destination) {
  const int records = count == nullptr ? max_count : min(*count, max_count);
  CopyRecords<Piece>(records, record_bytes / static_cast<int>(sizeof(Piece)),
                     [&](int64_t i, const unsigned char** from, unsigned char** to) {
                       const RecordMove move = moves[i];
                       *from = views[move.view].At(move.element);
                       *to = destination + move.destination;
                     });
}

int Blocks(int64_t records, int64_t record_bytes, int64_t piece_bytes) {
  const int64_t pieces = records * (record_bytes / piece_bytes);
  const int64_t per_block = kThreads * kPieces;
  return static_cast<int>(std::min<int64_t>((pieces + per_block - 1) / per_block, 132 * 16));
}

// The largest piece that divides all of `bits` or-ed together: 16, 8, 4, or 0.
int PieceBytes(uint64_t bits) {
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
}

}  // namespace

cudaError_t LaunchGatherRecords(const DevicePagedView& records, const int32_t* indices,
                                int64_t count, unsigned char* packed, cudaStream_t stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const int piece =
      PieceBytes(records.element_bytes | static_cast<uint64_t>(records.page_bytes) |
                 reinterpret_cast<uint64_t>(records.base) | reinterpret_cast<uint64_t>(packed));
  if (piece == 0) return cudaErrorInvalidValue;
  const auto kernel = piece == 16  ? GatherKernel<uint4>
                      : piece == 8 ? GatherKernel<uint2>
                                   : GatherKernel<uint32_t>;
  return cuda::Launch(kernel, dim3(Blocks(count, records.element_bytes, piece)), dim3(kThreads), 0,
                      1, stream, records, indices, count, packed);
}

cudaError_t LaunchMoveRecords(const DevicePagedView* views, const RecordMove* moves,
                              const int32_t* count, int32_t max_count, int32_t record_bytes,
                              unsigned char* destination, cudaStream_t stream) {
  if (max_count < 0 || record_bytes <= 0) return cudaErrorInvalidValue;
  if (max_count == 0) return cudaSuccess;
  // Pages are whole multiples of 16 and slots whole records apart, so the record's size decides.
  const int piece =
      PieceBytes(static_cast<uint64_t>(record_bytes) | reinterpret_cast<uint64_t>(destination));
  if (piece == 0) return cudaErrorInvalidValue;
  const auto kernel = piece == 16  ? MoveKernel<uint4>
                      : piece == 8 ? MoveKernel<uint2>
                                   : MoveKernel<uint32_t>;
  return cuda::Launch(kernel, dim3(Blocks(max_count, record_bytes, piece)), dim3(kThreads), 0, 1,
                      stream, views, moves, count, max_count, record_bytes, destination);
}

}  // namespace clusterkv::kernels
