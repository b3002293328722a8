#include "kernels/select/answer_cuda.h"
#include "kernels/select/answer_pair.cuh"
#include "kernels/select/resident_clusters.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

// A block per multiprocessor, or where there are more pairs than those, two smaller ones.
constexpr int kThreads = 512, kSmallThreads = 256;

template <int kBlockThreads, bool kLarge>
__global__ void __launch_bounds__(kBlockThreads, kThreads / kBlockThreads)
    AnswerKernel(const __grid_constant__ AnswerPlan plan, const SelectCudaPair* pairs,
                 const __grid_constant__ SelectCudaOutput out, unsigned char* far) {
  const int index = static_cast<int>(blockIdx.x) / plan.blocks;
  const int rank = static_cast<int>(blockIdx.x) % plan.blocks;
  PairAnswer<kBlockThreads, kLarge> answer(plan, 0, rank,
                                           far + index * AnswerFarBytes(plan.params));
  const float* queries = pairs[index].queries + answer.FirstHead() * kAnswerDim;
  constexpr int kLine = 32;  // floats
  if (threadIdx.x * kLine < static_cast<unsigned>(answer.Heads() * kAnswerDim)) {
    PrefetchL2(queries + threadIdx.x * kLine);
  }
  ClusterArriveRelaxed(plan.blocks);
  answer.Begin(pairs[index]);
  answer.PrepareQueries(queries);
  ClusterWait(plan.blocks);
  answer.Finish(out, index);
}

using Kernel = void (*)(AnswerPlan, const SelectCudaPair*, SelectCudaOutput, unsigned char*);
Kernel KernelOf(int threads, bool large) {
  if (threads == kThreads) {
    return large ? AnswerKernel<kThreads, true> : AnswerKernel<kThreads, false>;
  }
  return large ? AnswerKernel<kSmallThreads, true> : AnswerKernel<kSmallThreads, false>;
}

// Blocks per pair, a multiple of `quads`: as many as let all pairs run at once.
int ChooseBlocks(const DeviceLimits& limits, int32_t pairs, int quads) {
  static KnownClusters known;
  if (!limits.clusters) return 1;
  const void* kernel = reinterpret_cast<const void*>(KernelOf(kThreads, false));
  int blocks = 8;
  while (blocks > quads && pairs > ResidentClusters(limits, kernel, kThreads, blocks, known)) {
    blocks -= quads;
  }
  return blocks;
}

// The plan, and its blocks' threads; 0: there is none.
int ChoosePlan(const SelectCudaParams& params, int32_t pairs, AnswerPlan* plan) {
  const DeviceLimits limits = ReadLimits();
  const int quads = QuadsOf(params.group);
  const int blocks =
      params.blocks_per_pair > 0 ? params.blocks_per_pair : ChooseBlocks(limits, pairs, quads);
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  const int64_t half = (limits.shared_bytes + kReserved) / 2 - kReserved;
  for (const bool far : {false, true}) {
    if (pairs * blocks > limits.multiprocessors &&
        MakeAnswerPlan(params, blocks, kSmallThreads, half, far, plan)) {
      return kSmallThreads;
    }
    if (MakeAnswerPlan(params, blocks, kThreads, limits.shared_bytes, far, plan)) return kThreads;
  }
  return 0;
}

}  // namespace

int64_t AnswerWorkspaceBytes(const SelectCudaParams& params, int32_t pairs) {
  return pairs * AnswerFarBytes(params);
}

bool LaunchAnswer(const SelectCudaParams& params, const SelectCudaPair* pairs, int32_t pair_count,
                  const SelectCudaOutput& output, void* workspace, cudaStream_t stream,
                  cudaError_t* error) {
  AnswerPlan plan;
  const int threads = params.general ? 0 : ChoosePlan(params, pair_count, &plan);
  if (threads == 0) return false;
  *error = cuda::Launch(
      KernelOf(threads, IsLarge(plan)), dim3(static_cast<unsigned>(pair_count * plan.blocks)),
      dim3(static_cast<unsigned>(threads)), static_cast<size_t>(plan.shared_bytes), plan.blocks,
      stream, plan, pairs, output, static_cast<unsigned char*>(workspace));
  return true;
}

}  // namespace clusterkv::kernels
