// Hopper's own instructions: matrix products of four warps from shared memory, bulk copies, and the
// barriers that these complete. Compiled for sm_90a alone (CKV_HOPPER), and for the emulator.
#ifndef CLUSTERKV_KERNELS_BASE_HOPPER_CUH_
#define CLUSTERKV_KERNELS_BASE_HOPPER_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"

#if defined(CLUSTERKV_CUDA_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CKV_HOPPER 1
#else
#define CKV_HOPPER 0
#endif

namespace clusterkv::kernels::cuda {

// ---- barriers in shared memory
// ---------------------------------------------------------------------

// A phase ends when `count` arrivals came and all bytes they announced; phases alternate in parity,
// from 0. In the emulator bulk copies are done before they are waited for: bytes need no counting.
struct alignas(8) PhaseBarrier {
  uint64_t word;

#ifdef CLUSTERKV_CUDA_EMULATOR
  // Low 16 bits: arrivals wanted; next 16: still missing; above: phases ended.
  __device__ void Init(int count) {
    word = static_cast<uint64_t>(count) | static_cast<uint64_t>(count) << 16;
  }
  __device__ void Arrive() {
    word -= uint64_t{1} << 16;
    if ((word >> 16 & 0xffffu) == 0) {
      word += (word & 0xffffu) << 16;
      word += uint64_t{1} << 32;
    }
  }
  __device__ void ArriveAndExpect(int) { Arrive(); }
  __device__ void Wait(int parity) {
    while ((word >> 32 & 1u) == static_cast<uint64_t>(parity)) cuda_emulator::WaitForChange(&word);
  }
#elif CKV_HOPPER
  __device__ __forceinline__ uint32_t At() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&word));
  }
  __device__ __forceinline__ void Init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(At()), "r"(count) : "memory");
  }
  __device__ __forceinline__ void Arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(At()) : "memory");
  }
  __device__ __forceinline__ void ArriveAndExpect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(At()), "r"(bytes)
                 : "memory");
  }
  // Until the phase of that parity has ended.
  __device__ __forceinline__ void Wait(int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(At()),
        "r"(parity)
        : "memory");
  }
#endif
};

#if CKV_HOPPER

// Makes barriers that one thread has set up seen by copies; then __syncthreads for the rest.
__device__ __forceinline__ void FenceBarriers() {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

// Each thread that has read what a bulk copy will overwrite calls this before the arrival that lets
// the copy go: copies are not ordered behind the loads of an arrival's threads, nor of its own.
__device__ __forceinline__ void FenceBeforeCopies() {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// Copies `bytes`, a multiple of 16 like both addresses, and counts them to `barrier`. One thread.
__device__ __forceinline__ void CopyBulk(void* shared, const void* global, int bytes,
                                         PhaseBarrier* barrier) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)barrier;
  std::memcpy(shared, global, static_cast<size_t>(bytes));
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes), "r"(barrier->At())
      : "memory");
#endif
}

// ---- matrix products
// -------------------------------------------------------------------------------

// B [16 × 64] of one product in shared memory, by columns of eight 16-byte rows: column n's
// channels [8 k, 8 k + 8) at 16 n + kColumnBytes k.
#ifdef CLUSTERKV_CUDA_EMULATOR
struct MatrixB {
  const unsigned char* from;
  int k_bytes;
};
#else
using MatrixB = uint64_t;
#endif
template <int kKBytes>
__device__ __forceinline__ MatrixB MakeMatrixB(const void* shared) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return {static_cast<const unsigned char*>(shared), kKBytes};
#else
  // No swizzle. Leading: between the two groups of 8 channels; stride: between 8 columns.
  constexpr uint64_t kLeading = kKBytes / 16, kStride = 128 / 16;
  const uint64_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) >> 4 & 0x3fffu;
  return at | kLeading << 16 | kStride << 32;
#endif
}

// `b` as many bytes on, a multiple of 16.
__device__ __forceinline__ MatrixB MoveMatrixB(MatrixB b, int bytes) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return {b.from + bytes, b.k_bytes};
#else
  // The low half alone changes: addresses of shared memory are of 18 bits.
  return (b & ~uint64_t{0xffffffffu}) |
         (static_cast<uint32_t>(b) + static_cast<uint32_t>(bytes / 16));
#endif
}

__device__ __forceinline__ void WarpgroupFence() {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void WarpgroupCommit() {
#ifndef CLUSTERKV_CUDA_EMULATOR
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
// Until all products are done. `d` passes through, so that no use of it is moved before.
__device__ __forceinline__ void WarpgroupWait(float (&d)[32]) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)d;
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
#pragma unroll
  for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// d [64 × 64] (+)= a [64 × 16] · b [16 × 64], fp16 in, fp32 sums. Warp w of the four has rows 16
// w.., `a` and d[4 n .. 4 n + 3] as MmaHalf has them for columns [8 n, 8 n + 8). `add` false: d is
// overwritten. Asynchronous: fence before, commit and wait after.
__device__ __forceinline__ void WarpgroupMmaHalf(float (&d)[32], const uint32_t (&a)[4], MatrixB b,
                                                 bool add) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  const int r = cuda_emulator::current->lane / 4, t = cuda_emulator::current->lane % 4;
  for (int n = 0; n < 8; ++n) {
    uint32_t words[2];
    for (int k = 0; k < 2; ++k) {
      std::memcpy(&words[k], b.from + 16 * (8 * n + r) + k * b.k_bytes + 4 * t, 4);
    }
    float part[4];
    for (int i = 0; i < 4; ++i) part[i] = add ? d[4 * n + i] : 0.0f;
    MmaHalf(part, a, words[0], words[1]);
    for (int i = 0; i < 4; ++i) d[4 * n + i] = part[i];
  }
#else
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"
      "%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
#endif
}

#endif  // CKV_HOPPER

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_BASE_HOPPER_CUH_
