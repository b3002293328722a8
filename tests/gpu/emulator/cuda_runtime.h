// A stand-in for CUDA's runtime header: runs kernels on the CPU, one fiber per thread.
//
// For tests on machines without a GPU: a .cu file is compiled as plain C++ with this folder first
// on the include path, and its launchers then run here. Blocks of a thread-block cluster run
// together, other blocks one after the other; __syncthreads, warp shuffles, votes and atomics
// behave as on the device. Dynamic shared memory is poisoned before each block, and the order in
// which threads run changes with each launch, so that a missing barrier shows; threads that meet at
// barriers or shuffles of different lines, which a device may hang at, stop it. It says nothing
// about speed, memory ordering between blocks, alignment faults or bank conflicts.
//
// Launches from several threads run one after the other. Streams and events do nothing: all is done
// when its call returns, or never, once a test has let the device fail (cuda_emulator::Fail).
#ifndef CLUSTERKV_TESTS_GPU_EMULATOR_CUDA_RUNTIME_H_
#define CLUSTERKV_TESTS_GPU_EMULATOR_CUDA_RUNTIME_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define CLUSTERKV_CUDA_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_in = 1, unsigned y_in = 1, unsigned z_in = 1)
      : x(x_in), y(y_in), z(z_in) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotReady = 600,
  cudaErrorNotSupported = 801
};
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

namespace cuda_emulator {

// Lets the device fail for good, as a fault in a kernel does. What is queued from now on is taken
// and never done, until a call looks at what was done: that one and all later ones return the
// error.
void Fail();
// For calls that queue work: false if it is not to be done; *error is what the call returns.
bool Queue(cudaError_t* error);
// For calls that look at work.
cudaError_t Look();

// Does f, as work that is queued.
template <typename F>
cudaError_t Queued(F f) {
  cudaError_t error = cudaSuccess;
  if (Queue(&error)) f();
  return error;
}

}  // namespace cuda_emulator

inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
template <typename T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = nullptr;
  if (const cudaError_t error = cuda_emulator::Look(); error != cudaSuccess) return error;
  // Not a byte more, so that AddressSanitizer sees what lies behind.
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes) != 0) return cudaErrorMemoryAllocation;
  *p = static_cast<T*>(memory);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  return cuda_emulator::Queued([=] {
    if (n) std::memcpy(to, from, n);
  });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind k) {
  const cudaError_t error = cudaMemcpyAsync(to, from, n, k);
  return error == cudaSuccess ? cuda_emulator::Look() : error;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind,
                                     cudaStream_t = nullptr) {
  if (to_pitch < width || from_pitch < width) return cudaErrorInvalidValue;
  return cuda_emulator::Queued([=] {
    for (size_t i = 0; i < height; ++i) {
      std::memcpy(static_cast<char*>(to) + i * to_pitch,
                  static_cast<const char*>(from) + i * from_pitch, width);
    }
  });
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*f)(void*), void* data) {
  return cuda_emulator::Queued([=] { f(data); });
}
inline cudaError_t cudaMemsetAsync(void* to, int v, size_t n, cudaStream_t = nullptr) {
  return cuda_emulator::Queued([=] {
    if (n) std::memset(to, v, n);
  });
}
inline cudaError_t cudaMemset(void* to, int v, size_t n) { return cudaMemsetAsync(to, v, n); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cuda_emulator::Look(); }
inline cudaError_t cudaDeviceSynchronize() { return cuda_emulator::Look(); }

constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2,
                   cudaHostAllocPortable = 1;
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(uintptr_t{1});
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cuda_emulator::Look(); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(uintptr_t{1});
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cuda_emulator::Look(); }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cuda_emulator::Look(); }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 0;
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }

// Memory handles: the same process alone.
struct cudaIpcMemHandle_t {
  char reserved[64];
};
constexpr unsigned cudaIpcMemLazyEnablePeerAccess = 1;
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* p) {
  std::memset(handle, 0, sizeof(*handle));
  std::memcpy(handle->reserved, &p, sizeof(p));
  return cudaSuccess;
}
inline cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t handle, unsigned) {
  std::memcpy(p, handle.reserved, sizeof(*p));
  return *p == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }

namespace cuda_emulator {

struct Thread {
  dim3 thread_idx, block_idx;
  int lane = 0, warp = 0, block_in_cluster = 0;
};
// The thread, block and launch that is running now.
extern Thread* current;
extern dim3 block_dim, grid_dim;
extern int cluster_blocks;

// The last parameters of barriers and exchanges: where in the source they are called. Threads that
// meet must have come by the same place, or the program stops.
#define CKV_EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CKV_EMULATOR_SAME_SITE file, line

unsigned char* SharedMemory();
// That of block `rank` of the running thread's cluster.
unsigned char* SharedMemoryOf(int rank);
void SyncThreads(CKV_EMULATOR_SITE);
int SyncThreadsCount(bool vote, CKV_EMULATOR_SITE);
void SyncCluster(CKV_EMULATOR_SITE);
// All lanes of `mask` meet, each with `count` (at most 8) 32-bit words: returns those of every lane
// that came, [32][8], until the thread's next meeting.
const uint32_t (*Meet(uint32_t mask, const uint32_t* words, int count, CKV_EMULATOR_SITE))[8];
// The same for the whole warp, into the caller's memory.
inline void Exchange(uint32_t mask, const uint32_t* words, int count, uint32_t (*out)[8],
                     CKV_EMULATOR_SITE) {
  std::copy_n(&Meet(mask, words, count, CKV_EMULATOR_SAME_SITE)[0][0], 32 * 8, &out[0][0]);
}
// Lets others run until *word is no longer what it is.
void WaitForChange(const uint64_t* word);
cudaError_t Launch(dim3 grid, dim3 block, size_t shared_bytes, int cluster,
                   const std::function<void()>& body);

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::current->thread_idx)
#define blockIdx (::cuda_emulator::current->block_idx)
#define blockDim (::cuda_emulator::block_dim)
#define gridDim (::cuda_emulator::grid_dim)

inline void __syncthreads(CKV_EMULATOR_SITE) { cuda_emulator::SyncThreads(CKV_EMULATOR_SAME_SITE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CKV_EMULATOR_SITE) {
  cuda_emulator::Meet(mask, nullptr, 0, CKV_EMULATOR_SAME_SITE);
}
inline void __threadfence() {}
inline void __threadfence_system() {}

template <typename T>
T EmulatorShuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 8);
  uint32_t words[2];
  std::memcpy(words, &value, sizeof(T));
  const auto* all = cuda_emulator::Meet(mask, words, sizeof(T) / 4, file, line);
  const int from = source & 31;
  T result;
  std::memcpy(&result, mask >> from & 1u ? all[from] : words, sizeof(T));
  return result;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, CKV_EMULATOR_SITE) {
  return EmulatorShuffle(mask, value, source, CKV_EMULATOR_SAME_SITE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int x, CKV_EMULATOR_SITE) {
  return EmulatorShuffle(mask, value, cuda_emulator::current->lane ^ x, CKV_EMULATOR_SAME_SITE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int d, CKV_EMULATOR_SITE) {
  const int lane = cuda_emulator::current->lane;
  return EmulatorShuffle(mask, value, lane < d ? lane : lane - d, CKV_EMULATOR_SAME_SITE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int d, CKV_EMULATOR_SITE) {
  const int lane = cuda_emulator::current->lane;
  return EmulatorShuffle(mask, value, lane + d > 31 ? lane : lane + d, CKV_EMULATOR_SAME_SITE);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, CKV_EMULATOR_SITE) {
  const uint32_t word = predicate;
  const auto* all = cuda_emulator::Meet(mask, &word, 1, CKV_EMULATOR_SAME_SITE);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) && all[i][0]) ballot |= 1u << i;
  }
  return ballot;
}
inline bool __any_sync(unsigned mask, bool p, CKV_EMULATOR_SITE) {
  return __ballot_sync(mask, p, CKV_EMULATOR_SAME_SITE) != 0;
}
inline bool __all_sync(unsigned mask, bool p, CKV_EMULATOR_SITE) {
  return __ballot_sync(mask, p, CKV_EMULATOR_SAME_SITE) == mask;
}
inline int __syncthreads_count(bool p, CKV_EMULATOR_SITE) {
  return cuda_emulator::SyncThreadsCount(p, CKV_EMULATOR_SAME_SITE);
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CKV_EMULATOR_SITE) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const auto* all = cuda_emulator::Meet(mask, &word, 1, CKV_EMULATOR_SAME_SITE);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) && all[i][0] == word) same |= 1u << i;
  }
  return same;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i)
    r |= static_cast<unsigned>(both >> (8 * (s >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
inline unsigned __float_as_uint(float x) {
  unsigned r;
  std::memcpy(&r, &x, 4);
  return r;
}
inline float __uint_as_float(unsigned x) {
  float r;
  std::memcpy(&r, &x, 4);
  return r;
}
inline int __float_as_int(float x) {
  int r;
  std::memcpy(&r, &x, 4);
  return r;
}
inline float __int_as_float(int x) {
  float r;
  std::memcpy(&r, &x, 4);
  return r;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
template <typename T, typename U>
T atomicAdd(T* p, U v) {
  T old = *p;
  *p = static_cast<T>(old + v);
  return old;
}
template <typename T, typename U>
T atomicMax(T* p, U v) {
  T old = *p;
  *p = std::max<T>(old, v);
  return old;
}
template <typename T, typename U>
T atomicMin(T* p, U v) {
  T old = *p;
  *p = std::min<T>(old, v);
  return old;
}
template <typename T, typename U>
T atomicOr(T* p, U v) {
  T old = *p;
  *p = old | v;
  return old;
}
template <typename T, typename U>
T atomicExch(T* p, U v) {
  T old = *p;
  *p = v;
  return old;
}
template <typename T, typename U, typename V>
T atomicCAS(T* p, U c, V v) {
  T old = *p;
  if (old == static_cast<T>(c)) *p = v;
  return old;
}
using std::max;
using std::min;

#endif  // CLUSTERKV_TESTS_GPU_EMULATOR_CUDA_RUNTIME_H_
