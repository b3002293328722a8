#include "kernels/select/answer_cuda.h"
#include "kernels/select/answer_pair.cuh"
#include "kernels/select/resident_clusters.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

// A block per multiprocessor, or where there are more pairs than those, two smaller ones.
constexpr int kThreads = 512, kSmallThreads = 256;

template <int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads, kThreads / kBlockThreads)
    AnswerKernel(const __grid_constant__ AnswerPlan plan, const SelectCudaPair* pairs,
                 const __grid_constant__ SelectCudaOutput out) {
  const int index = static_cast<int>(blockIdx.x) / plan.blocks;
  const int rank = static_cast<int>(blockIdx.x) % plan.blocks;
  PairAnswer<kBlockThreads> answer(plan, 0, rank);
  const float* queries = pairs[index].queries;
  constexpr int kLine = 32;  // floats
  if (threadIdx.x * kLine < static_cast<unsigned>(plan.params.group * kAnswerDim)) {
    PrefetchL2(queries + threadIdx.x * kLine);
  }
  ClusterArriveRelaxed(plan.blocks);
  answer.Begin(pairs[index]);
  answer.PrepareQueries(queries);
  ClusterWait(plan.blocks);
  answer.Finish(out, index);
}

// Blocks per pair: as many as let all pairs run at once.
int ChooseBlocks(const DeviceLimits& limits, int32_t pairs) {
  static KnownClusters known;
  if (!limits.clusters) return 1;
  const auto kernel = AnswerKernel<kThreads>;
  int blocks = 8;
  while (blocks > 1 && pairs > ResidentClusters(limits, reinterpret_cast<const void*>(kernel),
                                                kThreads, blocks, known)) {
    --blocks;
  }
  return blocks;
}

}  // namespace

bool LaunchAnswer(const SelectCudaParams& params, const SelectCudaPair* pairs, int32_t pair_count,
                  const SelectCudaOutput& output, cudaStream_t stream, cudaError_t* error) {
  AnswerPlan plan;
  const DeviceLimits limits = ReadLimits();
  if (params.general || !MakeAnswerPlan(params, 1, kThreads, limits.shared_bytes, &plan))
    return false;
  const int blocks =
      params.blocks_per_pair > 0 ? params.blocks_per_pair : ChooseBlocks(limits, pair_count);
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  const int64_t half = (limits.shared_bytes + kReserved) / 2 - kReserved;
  const bool small = pair_count > limits.multiprocessors &&
                     MakeAnswerPlan(params, blocks, kSmallThreads, half, &plan);
  if (!small && !MakeAnswerPlan(params, blocks, kThreads, limits.shared_bytes, &plan)) return false;
  *error =
      cuda::Launch(small ? AnswerKernel<kSmallThreads> : AnswerKernel<kThreads>,
                   dim3(static_cast<unsigned>(pair_count * blocks)),
                   dim3(static_cast<unsigned>(small ? kSmallThreads : kThreads)),
                   static_cast<size_t>(plan.shared_bytes), blocks, stream, plan, pairs, output);
  return true;
}

}  // namespace clusterkv::kernels
