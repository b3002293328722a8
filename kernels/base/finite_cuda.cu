#include <algorithm>

#include "kernels/base/cuda_util.cuh"
#include "kernels/base/finite_cuda.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kThreads = 256;

// A warp per row, in turns.
__global__ void __launch_bounds__(kThreads)
    FindNonFiniteKernel(const DevicePagedView rows, uint32_t first_row, int64_t row_count,
                        int64_t row_elements, ElementType type, int64_t* first_bad) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t chunks = row_elements * DeviceElementBytes(type) / 16;
  // The bits that are all ones in infinities and NaNs, and only there.
  const bool wide = type == ElementType::kFloat32;
  const uint32_t mask = wide ? 0x7f800000u : type == ElementType::kFloat16 ? 0x7c00u : 0x7f80u;
  const int per_word = wide ? 1 : 2;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       i < row_count; i += warps) {
    const uint4* row = rows.As<const uint4>(first_row + static_cast<uint32_t>(i));
#pragma unroll 4
    for (int64_t c = lane; c < chunks; c += kWarp) {
      const uint4 x = row[c];
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int w = 3; w >= 0; --w) {
        const bool high = !wide && (words[w] >> 16 & mask) == mask;
        const bool low = (words[w] & mask) == mask;
        if (!low && !high) continue;
        const int64_t j = (4 * c + w) * per_word + (low ? 0 : 1);
        atomicMin(reinterpret_cast<long long*>(first_bad),        // NOLINT(runtime/int): its type
                  static_cast<long long>(i * row_elements + j));  // NOLINT(runtime/int)
      }
    }
  }
}

}  // namespace

cudaError_t LaunchFindNonFinite(const DevicePagedView& rows, uint32_t first_row, int64_t row_count,
                                int64_t row_elements, ElementType type, int64_t* first_bad,
                                cudaStream_t stream) {
  if (row_count < 0 || row_elements < 0 || row_elements * ElementBytes(type) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  CKV_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(first_bad, 0x7f, sizeof(*first_bad), stream));
  const int64_t blocks = (row_count + kThreads / kWarp - 1) / (kThreads / kWarp);
  return cuda::Launch(FindNonFiniteKernel,
                      dim3(static_cast<unsigned>(std::min<int64_t>(blocks, 1056))), dim3(kThreads),
                      0, 1, stream, rows, first_row, row_count, row_elements, type, first_bad);
}

}  // namespace clusterkv::kernels
