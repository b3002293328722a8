#include "kernels/base/cuda_util.cuh"
#include "worker/stream_cuda.h"
#ifdef CLUSTERKV_CUDA_EMULATOR
#include <chrono>
#include <thread>
#endif

namespace clusterkv::worker {
namespace {

using namespace kernels::cuda;  // NOLINT: device helpers

constexpr int kThreads = 256, kBlocks = 32;

__device__ __forceinline__ uint64_t Nanoseconds() {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
#else
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
#endif
}

// What another processor writes, and after it what that one wrote before.
__device__ __forceinline__ uint64_t LoadAcquire(const uint64_t* at) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#else
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
#endif
}
__device__ __forceinline__ void StoreRelease(uint64_t* at, uint64_t value) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ void Pause() {
#ifdef CLUSTERKV_CUDA_EMULATOR
  std::this_thread::yield();
#else
  __nanosleep(100);
#endif
}

// Whether it was published in time.
__device__ __forceinline__ bool Await(const StreamPackage* package, uint64_t step,
                                      uint64_t timeout_ns) {
  const uint64_t begin = Nanoseconds();
  while (LoadAcquire(&package->published) < step) {
    if (Nanoseconds() - begin > timeout_ns) return false;
    Pause();
  }
  return true;
}

__global__ void AwaitKernel(const __grid_constant__ StreamTake take, uint64_t step,
                            uint64_t timeout_ns) {
  if (threadIdx.x != 0) return;
  if (!Await(take.package, step, timeout_ns)) {
    take.state[0] = 1;
    take.state[1] = 0;
    StoreRelease(&take.package->gave_up, step);
    return;
  }
  take.state[0] = take.package->failed;
  take.state[1] = 1;
}

__device__ __forceinline__ void Move(const StreamMoves& moves, int pieces) {
  const int words = moves.bytes / 8;
  const int64_t all = static_cast<int64_t>(pieces) * words;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    auto* to = reinterpret_cast<uint64_t*>(moves.base + moves.to[i / words]);
    to[i % words] = reinterpret_cast<const uint64_t*>(moves.from)[i];
  }
}

__global__ void TakeKernel(const __grid_constant__ StreamTake take) {
  if (take.state[1] == 0) return;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < take.small_bytes / 8; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    reinterpret_cast<uint64_t*>(take.small_copy)[i] =
        reinterpret_cast<const uint64_t*>(take.small)[i];
  }
  Move(take.records, take.package->records);
  Move(take.rows, take.package->rows);
}

__global__ void GiveKernel(const __grid_constant__ StreamGive give, void* output) {
  const int head = static_cast<int>(blockIdx.x);
  const bool failed = give.state[0] != 0;
  float scale = 0;
  if (give.codes != nullptr && give.log_scales[head] > -__builtin_huge_valf()) {
    scale = expf(give.log_scales[head] - give.lse[head]);
  }
  for (int j = static_cast<int>(threadIdx.x); j < give.head_dim; j += kThreads) {
    const int i = head * give.head_dim + j;
    float x = failed ? 0.0f : give.attended[i];
    if (!failed && scale != 0) x += scale * static_cast<float>(give.codes[i]);
    if (give.output_type == kernels::ElementType::kFloat32) {
      static_cast<float*>(output)[i] = x;
    } else {
      static_cast<uint16_t*>(output)[i] = give.output_type == kernels::ElementType::kFloat16
                                              ? FloatToHalfBits(x)
                                              : FloatToBFloat16Bits(x);
    }
  }
}

}  // namespace

cudaError_t LaunchTake(const StreamTake& take, uint64_t step, uint64_t timeout_ns,
                       cudaStream_t stream) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  // There kernels run one after the other: one that waits would keep the service's from running.
  CKV_RETURN_IF_CUDA_ERROR(
      cuda_emulator::Queued([&] { (void)Await(take.package, step, timeout_ns); }));
#endif
  CKV_RETURN_IF_CUDA_ERROR(
      Launch(AwaitKernel, dim3(1), dim3(32), 0, 1, stream, take, step, timeout_ns));
  return Launch(TakeKernel, dim3(kBlocks), dim3(kThreads), 0, 1, stream, take);
}

cudaError_t LaunchGive(const StreamGive& give, void* output, cudaStream_t stream) {
  return Launch(GiveKernel, dim3(static_cast<unsigned>(give.heads)), dim3(kThreads), 0, 1, stream,
                give, output);
}

}  // namespace clusterkv::worker
