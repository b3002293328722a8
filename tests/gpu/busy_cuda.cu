#include "kernels/base/cuda_util.cuh"
#include "kernels/resident/lines.cuh"
#include "tests/gpu/layer_work.h"

namespace clusterkv {
namespace {

__global__ void BusyKernel(uint64_t nanoseconds) {
  const uint64_t since = kernels::cuda::DeviceNanoseconds();
  while (kernels::cuda::DeviceNanoseconds() - since < nanoseconds) {
  }
}

}  // namespace

cudaError_t LaunchBusy(int64_t nanoseconds, cudaStream_t stream) {
  return kernels::cuda::Launch(BusyKernel, dim3(1), dim3(32), 0, 1, stream,
                               static_cast<uint64_t>(nanoseconds));
}

}  // namespace clusterkv
