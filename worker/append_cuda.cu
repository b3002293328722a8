#include "kernels/base/cuda_util.cuh"
#include "worker/append_cuda.h"

namespace clusterkv::worker {
namespace {

constexpr int kThreads = 256;

// A block per sequence.
__global__ void AppendKernel(const __grid_constant__ AppendCudaParams p) {
  const int sequence = static_cast<int>(blockIdx.x);
  const AppendCudaParams::Token& token = p.tokens[sequence];
  const int64_t count = p.counts[sequence];
  __syncthreads();  // all have read it
  if (count >= p.capacity) {
    if (threadIdx.x == 0) atomicOr(p.status, kWindowFull);
    return;
  }
  const int pieces = p.row_bytes / 16;
  unsigned char* const to =
      p.rows + sequence * p.sequence_bytes + (p.first_row + count) * p.kv_heads * 2 * p.row_bytes;
  for (int i = static_cast<int>(threadIdx.x); i < p.kv_heads * 2 * pieces; i += kThreads) {
    const int head = i / (2 * pieces), piece = i % pieces;
    const unsigned char* const from = i / pieces % 2 == 0 ? token.key : token.value;
    reinterpret_cast<uint4*>(to)[i] =
        reinterpret_cast<const uint4*>(from + head * token.head_stride_bytes)[piece];
  }
  if (threadIdx.x == 0) p.counts[sequence] = count + 1;
}

}  // namespace

cudaError_t LaunchAppend(const AppendCudaParams& params, cudaStream_t stream) {
  if (params.sequences < 1 || params.sequences > kMaxAppended) return cudaErrorInvalidValue;
  return kernels::cuda::Launch(AppendKernel, dim3(static_cast<unsigned>(params.sequences)),
                               dim3(kThreads), 0, 1, stream, params);
}

}  // namespace clusterkv::worker
