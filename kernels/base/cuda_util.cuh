// What the CUDA kernels share: launching, warp and block collectives, matrix instructions.
//
// Everything that is more than C++ is wrapped here, so that the kernels also compile against
// tests/gpu/emulator and run on a CPU. Collectives are called by all threads of the warp or block.
#ifndef CLUSTERKV_KERNELS_BASE_CUDA_UTIL_CUH_
#define CLUSTERKV_KERNELS_BASE_CUDA_UTIL_CUH_

#include <cuda_runtime.h>

#ifndef CLUSTERKV_CUDA_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

#include "kernels/base/element_type.h"

namespace clusterkv::kernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- launching
// -----------------------------------------------------------------------------------

// Launches `kernel` on `stream`; clusters of `cluster_blocks` blocks along x when more than 1
// (compute capability 9.0). Raises the kernel's dynamic shared memory limit where needed.
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   int cluster_blocks, cudaStream_t stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)stream;
  std::tuple<Params...> bound(static_cast<Params>(args)...);
  return cuda_emulator::Launch(grid, block, shared_bytes, cluster_blocks,
                               [&] { std::apply(kernel, bound); });
#else
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (cluster_blocks > 1) {
    if (cluster_blocks > 8) {
      const cudaError_t error = cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) return error;
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster_blocks;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
#endif
}

#define CKV_RETURN_IF_CUDA_ERROR(expr)                                    \
  do {                                                                    \
    if (const cudaError_t ckv_error = (expr); ckv_error != cudaSuccess) { \
      return ckv_error;                                                   \
    }                                                                     \
  } while (false)

#if defined(__CUDACC__) || defined(CLUSTERKV_CUDA_EMULATOR)

// ---- shared memory, clusters
// -----------------------------------------------------------------------

__device__ __forceinline__ unsigned char* SharedMemory() {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return cuda_emulator::SharedMemory();
#else
  extern __shared__ __align__(1024) unsigned char ckv_shared_memory[];
  return ckv_shared_memory;
#endif
}

// Barrier over all threads of the cluster; global and shared writes before it are seen after it.
// With clusters of one block: __syncthreads.
__device__ __forceinline__ void ClusterSync(int cluster_blocks) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  if (cluster_blocks > 1) {
    cuda_emulator::SyncCluster();
  } else {
    __syncthreads();
  }
#else
  if (cluster_blocks > 1) {
#if __CUDA_ARCH__ >= 900
    __threadfence();
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
            : "memory");
#endif
  } else {
    __syncthreads();
  }
#endif
}

// The same in two halves, for shared memory alone: what a thread did before Arrive is seen after
// Wait. With clusters of one block Arrive does nothing and Wait is __syncthreads.
__device__ __forceinline__ void ClusterArrive(int cluster_blocks) {
#if !defined(CLUSTERKV_CUDA_EMULATOR) && __CUDA_ARCH__ >= 900
  if (cluster_blocks > 1) asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#else
  (void)cluster_blocks;
#endif
}
// Where there is nothing to be seen: the others have begun, that is all.
__device__ __forceinline__ void ClusterArriveRelaxed(int cluster_blocks) {
#if !defined(CLUSTERKV_CUDA_EMULATOR) && __CUDA_ARCH__ >= 900
  if (cluster_blocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;\n");
#else
  (void)cluster_blocks;
#endif
}
__device__ __forceinline__ void ClusterWait(int cluster_blocks) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  ClusterSync(cluster_blocks);
#else
  if (cluster_blocks > 1) {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
  } else {
    __syncthreads();
  }
#endif
}

// Stores at the place that `at` has in this block's shared memory, in that of block `rank` of the
// cluster.
__device__ __forceinline__ void StoreToBlock(float4* at, int rank, float4 value) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  *reinterpret_cast<float4*>(cuda_emulator::SharedMemoryOf(rank) +
                             (reinterpret_cast<unsigned char*>(at) - SharedMemory())) = value;
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 to;\nmapa.shared::cluster.u32 to, %0, %1;\n"
      "st.shared::cluster.v4.f32 [to], {%2, %3, %4, %5};\n}\n" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(at))),
      "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
#else
  *at = value;  // no clusters: of one block
#endif
}
__device__ __forceinline__ void StoreToBlock(float* at, int rank, float value) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  *reinterpret_cast<float*>(cuda_emulator::SharedMemoryOf(rank) +
                            (reinterpret_cast<unsigned char*>(at) - SharedMemory())) = value;
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 to;\nmapa.shared::cluster.u32 to, %0, %1;\n"
      "st.shared::cluster.f32 [to], %2;\n}\n" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(at))),
      "r"(rank), "f"(value)
      : "memory");
#else
  *at = value;
#endif
}

// Asks for the line of `at` in the second cache level.
__device__ __forceinline__ void PrefetchL2(const void* at) {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(at));
#else
  (void)at;
#endif
}

// ---- numbers
// -------------------------------------------------------------------------------------------

// 2^x; 2^-infinity is 0. Relative error below 2^-22.
__device__ __forceinline__ float Exp2(float x) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x), within 2^-21 near 1 and relatively elsewhere; -infinity of 0 and of subnormals.
__device__ __forceinline__ float Log2(float x) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return std::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float HalfBitsToFloat(uint16_t half) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return HalfToFloat(half);
#else
  return __half2float(__ushort_as_half(half));
#endif
}

__device__ __forceinline__ uint16_t FloatToHalfBits(float value) {  // nearest even
#ifdef CLUSTERKV_CUDA_EMULATOR
  return FloatToHalf(value);
#else
  return __half_as_ushort(__float2half_rn(value));
#endif
}

// Beyond the largest half: that one, as FloatToHalfSaturated. NaN stays NaN.
__device__ __forceinline__ float ClampToHalf(float value) {
  if (value > kLargestHalf) value = kLargestHalf;
  if (value < -kLargestHalf) value = -kLargestHalf;
  return value;
}
__device__ __forceinline__ uint16_t FloatToHalfBitsSaturated(float value) {
  return FloatToHalfBits(ClampToHalf(value));
}

__device__ __forceinline__ float BFloat16BitsToFloat(uint16_t value) {
  return __uint_as_float(static_cast<uint32_t>(value) << 16);
}

__device__ __forceinline__ uint32_t PackHalves(float low, float high) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return static_cast<uint32_t>(FloatToHalfBits(low)) | static_cast<uint32_t>(FloatToHalfBits(high))
                                                           << 16;
#else
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#endif
}

// FloatToHalfBitsSaturated of both.
__device__ __forceinline__ uint32_t PackHalvesSaturated(float low, float high) {
  return PackHalves(ClampToHalf(low), ClampToHalf(high));
}

// Splits a and b in halves that sum to them within 2^-22 of their size: hi and lo each hold a's in
// the low 16 bits and b's in the high ones.
__device__ __forceinline__ void SplitHalves(float a, float b, uint32_t* hi, uint32_t* lo) {
  *hi = PackHalves(a, b);
  *lo = PackHalves(a - HalfBitsToFloat(static_cast<uint16_t>(*hi)),
                   b - HalfBitsToFloat(static_cast<uint16_t>(*hi >> 16)));
}

// ElementBytes, on the device.
__device__ __forceinline__ int DeviceElementBytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ float LoadAsFloat(const void* row, ElementType type, int index) {
  if (type == ElementType::kFloat32) return static_cast<const float*>(row)[index];
  const uint16_t bits = static_cast<const uint16_t*>(row)[index];
  return type == ElementType::kFloat16 ? HalfBitsToFloat(bits) : BFloat16BitsToFloat(bits);
}

__device__ __forceinline__ uint16_t FloatToBFloat16Bits(float value) {  // nearest even
#ifdef CLUSTERKV_CUDA_EMULATOR
  return FloatToBFloat16(value);
#else
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#endif
}

// As SplitHalves, in bf16: within 2^-16.
__device__ __forceinline__ void SplitBFloat16(float a, float b, uint32_t* hi, uint32_t* lo) {
  const uint16_t a_hi = FloatToBFloat16Bits(a), b_hi = FloatToBFloat16Bits(b);
  *hi = static_cast<uint32_t>(a_hi) | static_cast<uint32_t>(b_hi) << 16;
  *lo = static_cast<uint32_t>(FloatToBFloat16Bits(a - BFloat16BitsToFloat(a_hi))) |
        static_cast<uint32_t>(FloatToBFloat16Bits(b - BFloat16BitsToFloat(b_hi))) << 16;
}

// Two bytes (the low ones of each half of `codes`) as halves; two numbers below 16, likewise, as
// bf16.
__device__ __forceinline__ uint32_t BytesToHalves(uint32_t codes) {
  const uint32_t shifted = codes | 0x64006400u;  // 1024 + code
#ifdef CLUSTERKV_CUDA_EMULATOR
  return static_cast<uint32_t>(FloatToHalf(HalfToFloat(static_cast<uint16_t>(shifted)) - 1024)) |
         static_cast<uint32_t>(
             FloatToHalf(HalfToFloat(static_cast<uint16_t>(shifted >> 16)) - 1024))
             << 16;
#else
  uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(shifted), "r"(0x64006400u));
  return result;
#endif
}
__device__ __forceinline__ uint32_t NibblesToBFloat16(uint32_t codes) {
  const uint32_t shifted = codes | 0x43004300u;  // 128 + code
#ifdef CLUSTERKV_CUDA_EMULATOR
  return static_cast<uint32_t>(
             FloatToBFloat16(BFloat16ToFloat(static_cast<uint16_t>(shifted)) - 128)) |
         static_cast<uint32_t>(
             FloatToBFloat16(BFloat16ToFloat(static_cast<uint16_t>(shifted >> 16)) - 128))
             << 16;
#else
  uint32_t result;  // 1 · shifted - 128: exact, and there since sm_80
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(shifted), "r"(0x3f803f80u), "r"(0xc300c300u));
  return result;
#endif
}

// ---- matrix instructions
// -------------------------------------------------------------------------------

// d [16 × 8] += a [16 × 16] · b [16 × 8], fp16 in, fp32 sums, in the fragments of mma.m16n8k16:
// with r = lane / 4 and t = lane % 4, a[0..3] are (row, columns) (r, 2t..), (r + 8, 2t..), (r, 2t
// + 8..), (r + 8, 2t + 8..); b[0..1] are (rows 2t.., column r), (rows 2t + 8.., column r); d[0..3]
// are (r, 2t), (r, 2t + 1), (r + 8, 2t), (r + 8, 2t + 1).
#ifdef CLUSTERKV_CUDA_EMULATOR
// Adds as a matrix unit does: the products and d are aligned to the largest exponent among them and
// cut off kMmaBits below it. A product's exponent is the sum of its factors', where a subnormal's
// is that of the smallest normal number: its leading zeros cost bits of the sum. With 25 bits the
// error of a select over subnormal codes was 3.12e-4 here and 3.18e-4 on an H200.
constexpr int kMmaBits = 25;
inline int ExponentOf(uint32_t field, int bias) {
  return std::max(static_cast<int>(field), 1) - bias;
}
template <typename ToFloat, typename ToExponent>
void EmulateMma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                const ToFloat& to_float, const ToExponent& to_exponent) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  uint32_t all[32][8];
  cuda_emulator::Exchange(kFullMask, words, 6, all);
  const int r = cuda_emulator::current->lane / 4, t = cuda_emulator::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = r + (i / 2) * 8, column = 2 * t + i % 2;
    double terms[17] = {d[i]};
    int largest = ExponentOf(__float_as_uint(d[i]) >> 23 & 0xffu, 127);
    for (int k = 0; k < 16; ++k) {
      const int a_lane = row % 8 * 4 + k % 8 / 2, b_lane = column * 4 + k % 8 / 2;
      const uint32_t a_word = all[a_lane][(row / 8) + (k / 8) * 2];
      const uint32_t b_word = all[b_lane][4 + k / 8];
      const uint16_t a_bits = static_cast<uint16_t>(a_word >> (k % 2 * 16));
      const uint16_t b_bits = static_cast<uint16_t>(b_word >> (k % 2 * 16));
      terms[k + 1] = static_cast<double>(to_float(a_bits)) * to_float(b_bits);
      if (terms[k + 1] != 0) {
        largest = std::max(largest, to_exponent(a_bits) + to_exponent(b_bits));
      }
    }
    const double scale = std::ldexp(1.0, kMmaBits - largest);
    double sum = 0;
    for (double term : terms) sum += std::trunc(term * scale);
    d[i] = static_cast<float>(sum / scale);
  }
}
inline int HalfExponent(uint16_t bits) { return ExponentOf(bits >> 10 & 0x1fu, 15); }
inline int BFloat16Exponent(uint16_t bits) { return ExponentOf(bits >> 7 & 0xffu, 127); }
#endif

__device__ __forceinline__ void MmaHalf(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  EmulateMma(d, a, b0, b1, HalfToFloat, HalfExponent);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// As MmaHalf, in bf16.
__device__ __forceinline__ void MmaBFloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  EmulateMma(d, a, b0, b1, BFloat16ToFloat, BFloat16Exponent);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 × 8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8
// of matrix i / 8 (16 bytes, aligned) and gets, of each matrix, elements 2 (lane % 4).. of row lane
// / 4.
__device__ __forceinline__ void LoadMatrices(uint32_t (&out)[4], const void* row) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  uint32_t words[2], all[32][8];
  std::memcpy(words, &row, sizeof(row));
  cuda_emulator::Exchange(kFullMask, words, 2, all);
  const int lane = cuda_emulator::current->lane;
  for (int m = 0; m < 4; ++m) {
    const char* from;
    std::memcpy(&from, all[m * 8 + lane / 4], sizeof(from));
    std::memcpy(&out[m], from + lane % 4 * 4, 4);
  }
#else
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
#endif
}

// ---- asynchronous copies into shared memory
// ------------------------------------------------------------

__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  std::memcpy(shared, global, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
#endif
}
// The same where what lies beside it in its line of 128 bytes will be read too.
__device__ __forceinline__ void CopyAsync16OfLine(void* shared, const void* global) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  CopyAsync16(shared, global);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(to), "l"(global)
               : "memory");
#endif
}
__device__ __forceinline__ void CopyAsyncCommit() {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// The same for a number that is known when it runs, up to 7.
__device__ __forceinline__ void CopyAsyncWaitAtMost(int pending) {
  switch (pending) {
    case 7:
      return CopyAsyncWait<7>();
    case 6:
      return CopyAsyncWait<6>();
    case 5:
      return CopyAsyncWait<5>();
    case 4:
      return CopyAsyncWait<4>();
    case 3:
      return CopyAsyncWait<3>();
    case 2:
      return CopyAsyncWait<2>();
    case 1:
      return CopyAsyncWait<1>();
    default:
      return CopyAsyncWait<0>();
  }
}

// ---- warp and block collectives
// ------------------------------------------------------------------------

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  }
  return x;
}
__device__ __forceinline__ uint32_t WarpMaxUnsigned(uint32_t x) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  for (int offset = 16; offset > 0; offset /= 2) {
    x = std::max(x, __shfl_xor_sync(kFullMask, x, offset));
  }
  return x;
#else
  return __reduce_max_sync(kFullMask, x);
#endif
}
__device__ __forceinline__ double WarpSumDouble(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

template <bool kSum>
__device__ __forceinline__ float Join(float a, float b) {
  return kSum ? a + b : fmaxf(a, b);
}
// The sum or largest over the lanes of each of four numbers: in lane l that of number l / 8.
template <bool kSum>
__device__ __forceinline__ float WarpJoin4(float4 x) {
  const bool high = threadIdx.x % kWarp >= 16, odd = threadIdx.x / 8 % 2 == 1;
  float keep0 = high ? x.z : x.x, keep1 = high ? x.w : x.y;
  const float give0 = high ? x.x : x.z, give1 = high ? x.y : x.w;
  keep0 = Join<kSum>(keep0, __shfl_xor_sync(kFullMask, give0, 16));
  keep1 = Join<kSum>(keep1, __shfl_xor_sync(kFullMask, give1, 16));
  const float give = odd ? keep0 : keep1;
  float keep = Join<kSum>(odd ? keep1 : keep0, __shfl_xor_sync(kFullMask, give, 8));
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) {
    keep = Join<kSum>(keep, __shfl_xor_sync(kFullMask, keep, offset));
  }
  return keep;
}
// The four numbers that lanes 0, step, … have; WarpJoin4 leaves them 8 apart.
__device__ __forceinline__ float4 Spread4(float x, int step) {
  return make_float4(__shfl_sync(kFullMask, x, 0), __shfl_sync(kFullMask, x, step),
                     __shfl_sync(kFullMask, x, 2 * step), __shfl_sync(kFullMask, x, 3 * step));
}
// An address that lane `from` has.
__device__ __forceinline__ const unsigned char* ShuffleAddress(const unsigned char* mine,
                                                               int from) {
  using Address = unsigned long long;  // NOLINT(runtime/int): what shuffles take
  return reinterpret_cast<const unsigned char*>(
      __shfl_sync(kFullMask, reinterpret_cast<Address>(mine), from));
}

// Sum over the lanes up to and with this one.
__device__ __forceinline__ int WarpInclusiveSum(int x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int y = __shfl_up_sync(kFullMask, x, offset);
    if (lane >= offset) x += y;
  }
  return x;
}

// Sums 32 values of each lane over the lanes: lane i ends with the sum of values[i]. A fixed order.
template <int kHalf = 16>
__device__ __forceinline__ float WarpTransposeSum(float (&values)[32]) {
  if constexpr (kHalf == 0) {
    return values[0];
  } else {
    const bool upper = (threadIdx.x & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? values[i + kHalf] : values[i];
      const float give = upper ? values[i] : values[i + kHalf];
      values[i] = keep + __shfl_xor_sync(kFullMask, give, kHalf);
    }
    return WarpTransposeSum<kHalf / 2>(values);
  }
}

#endif  // __CUDACC__ || CLUSTERKV_CUDA_EMULATOR

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_BASE_CUDA_UTIL_CUH_
