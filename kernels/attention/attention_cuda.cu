// Sparse decode attention: the tiles of a pair (attention_tile.cuh) spread over the warps of
// `splits` blocks.
#include <algorithm>

#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_tile.cuh"
#include "kernels/base/cuda_util.cuh"

namespace clusterkv::kernels {
namespace {

using namespace cuda;             // NOLINT: device helpers
using namespace cuda::attention;  // NOLINT

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxSplits = 64;

struct Plan {
  AttentionCudaParams params;
  int head_blocks, channel_blocks, channel_span;  // a block's channels of the output
  int steps;                                      // of 32 channels
  int fragment_sets;  // of the query: 2 where records want another element type than raw keys
  int splits;
  int record_bytes;
  int64_t partial_floats;  // of one (pair, head block, channel block, split)
  int64_t counters;        // offset in the workspace, bytes
};

// Output and log-sum-exp of a merged partial and the pair's attention state.
__device__ void Finish(const AttentionCudaPair& pair, const AttentionCudaParams& p, int head_block,
                       int first_channel, int span, float* merged) {
  for (int i = threadIdx.x; i < kHeads * span; i += kThreads) {
    const int head = head_block * kHeads + i / span, channel = first_channel + i % span;
    if (head >= p.group || channel >= p.head_dim) continue;
    const StateMerge merge(PartialLargest(merged)[i / span], PartialSum(merged)[i / span],
                           pair.state_lse == nullptr ? kNegativeInfinity : pair.state_lse[head]);
    const float state = merge.other > 0 ? pair.state_output[head * p.head_dim + channel] : 0.0f;
    pair.output[head * p.head_dim + channel] = merge.Output(PartialOutput(merged)[i], state);
    if (channel == 0 && pair.lse != nullptr) pair.lse[head] = merge.Lse();
  }
}

template <Source kRaw, Source kRecord, int kChunks>
__global__ void __launch_bounds__(kThreads)
    AttentionKernel(const __grid_constant__ Plan plan, const AttentionCudaPair* pairs,
                    unsigned char* workspace) {
  const AttentionCudaParams& p = plan.params;
  const AttentionCudaPair pair = pairs[blockIdx.z];
  const int split = static_cast<int>(blockIdx.x);
  const int head_block = static_cast<int>(blockIdx.y) % plan.head_blocks;
  const int first_channel = static_cast<int>(blockIdx.y) / plan.head_blocks * plan.channel_span;
  const int span = plan.channel_span, dim = p.head_dim, steps = plan.steps;
  const int warp = threadIdx.x / kWarp;

  unsigned char* shared = SharedMemory();
  int* ticket = reinterpret_cast<int*>(shared + kTicketOffset);
  float* query = reinterpret_cast<float*>(shared + QueryOffset(steps, plan.fragment_sets));
  for (int i = threadIdx.x; i < kHeads * dim; i += kThreads) {
    const int head = head_block * kHeads + i / dim;
    query[i] = head < p.group ? pair.queries[head * dim + i % dim] * p.scale * kLog2E : 0.0f;
  }
  __syncthreads();
  const BlockState b =
      PrepareBlock<kRaw, kRecord>(query, shared, dim, steps, plan.fragment_sets, first_channel);
  Running<kChunks> run;
  Clear(run);
  const int worker = split * kWarps + warp, workers = plan.splits * kWarps;
  int turn = 0;
  AttendRuns<kRaw>(pair.raw, pair.raw_runs, b, worker, workers, &turn, run);
  const int records = pair.record_count == nullptr ? pair.record_tokens
                                                   : min(*pair.record_count, pair.record_tokens);
  AttendRecords<kRecord>(
      pair.slot_base, plan.record_bytes, records, [&](int i) { return pair.slots[i]; },
      [&](int i) {
        return pair.head_masks == nullptr ? 0xffu : pair.head_masks[i] >> (head_block * 8);
      },
      b, worker, workers, turn, run);

  float* partials = query;  // the query itself is not read any more
  const int64_t partial_floats = plan.partial_floats;
  StorePartial(run, span, partials + warp * partial_floats);
  __syncthreads();
  MergePartials(partials, kWarps, partial_floats, span, partials);
  if (plan.splits > 1) {
    const int64_t group = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    float* all = reinterpret_cast<float*>(workspace) + group * plan.splits * partial_floats;
    for (int i = threadIdx.x; i < 2 * kHeads + kHeads * span; i += kThreads) {
      all[split * partial_floats + i] = partials[i];
    }
    __threadfence();
    __syncthreads();
    int* counter = reinterpret_cast<int*>(workspace + plan.counters) + group;
    if (threadIdx.x == 0) *ticket = atomicAdd(counter, 1);
    __syncthreads();
    if (*ticket != plan.splits - 1) return;
    __threadfence();
    MergePartials(all, plan.splits, partial_floats, span, partials);
    if (threadIdx.x == 0) *counter = 0;
  }
  Finish(pair, p, head_block, first_channel, span, partials);
}

bool Valid(const AttentionCudaParams& p) {
  return p.group >= 1 && p.group <= 32 && p.head_dim >= 16 && p.head_dim <= 512 &&
         p.head_dim % 16 == 0 && p.splits >= 0 && p.splits <= kMaxSplits && p.max_tokens >= 0;
}

Plan MakePlan(const AttentionCudaParams& p, int32_t pairs) {
  Plan plan = {};
  plan.params = p;
  plan.head_blocks = (p.group + kHeads - 1) / kHeads;
  plan.channel_span = std::min((p.head_dim + kSpan - 1) / kSpan * kSpan, 4 * kSpan);
  plan.channel_blocks = (p.head_dim + plan.channel_span - 1) / plan.channel_span;
  plan.record_bytes = p.format == RecordFormat::kK8V4
                          ? 8 + p.head_dim + p.head_dim / 2
                          : 2 * p.head_dim * ElementBytes(p.element_type);
  plan.steps = (p.head_dim + 31) / 32;
  plan.fragment_sets =
      p.format == RecordFormat::kK8V4 && p.element_type != ElementType::kFloat16 ? 2 : 1;
  plan.partial_floats = 2 * kHeads + kHeads * plan.channel_span;
  plan.splits = p.splits;
  const int64_t blocks = static_cast<int64_t>(pairs) * plan.head_blocks * plan.channel_blocks;
  if (plan.splits == 0) {
    // Enough blocks to fill the device twice, as long as each warp has a tile.
    const int64_t tiles = (p.max_tokens + kTile - 1) / kTile;
    plan.splits = static_cast<int>(std::clamp<int64_t>(
        std::min(2 * 132 / std::max<int64_t>(1, blocks), tiles / kWarps), 1, 32));
  }
  plan.counters = (blocks * plan.splits * plan.partial_floats * 4 + 255) / 256 * 256;
  return plan;
}

using Kernel = void (*)(Plan, const AttentionCudaPair*, unsigned char*);

template <Source kRaw, Source kRecord>
Kernel KernelOfSpan(int span) {
  return span <= 64    ? AttentionKernel<kRaw, kRecord, 1>
         : span <= 128 ? AttentionKernel<kRaw, kRecord, 2>
                       : AttentionKernel<kRaw, kRecord, 4>;
}

template <Source kRaw>
Kernel KernelOfFormat(RecordFormat format, int span) {
  return format == RecordFormat::kK8V4 ? KernelOfSpan<kRaw, Source::kK8V4>(span)
                                       : KernelOfSpan<kRaw, kRaw>(span);
}

}  // namespace

int64_t AttentionCudaWorkspaceBytes(const AttentionCudaParams& params, int32_t pairs) {
  if (!Valid(params) || pairs <= 0) return 0;
  const Plan plan = MakePlan(params, pairs);
  return plan.counters + int64_t{pairs} * plan.head_blocks * plan.channel_blocks * 4;
}

cudaError_t LaunchSparseAttention(const AttentionCudaParams& params, const AttentionCudaPair* pairs,
                                  int32_t pair_count, void* workspace, cudaStream_t stream) {
  if (!Valid(params) || pair_count < 0 || pair_count > 65535) return cudaErrorInvalidValue;
  if (pair_count == 0) return cudaSuccess;
  const Plan plan = MakePlan(params, pair_count);
  const int64_t rows =
      std::max<int64_t>(int64_t{kHeads} * params.head_dim, kWarps * plan.partial_floats);
  const int64_t shared_bytes = QueryOffset(plan.steps, plan.fragment_sets) + rows * 4;
  const Kernel kernel = params.element_type == ElementType::kFloat32
                            ? KernelOfFormat<Source::kFloat32>(params.format, plan.channel_span)
                        : params.element_type == ElementType::kFloat16
                            ? KernelOfFormat<Source::kFloat16>(params.format, plan.channel_span)
                            : KernelOfFormat<Source::kBFloat16>(params.format, plan.channel_span);
  return cuda::Launch(kernel, dim3(plan.splits, plan.head_blocks * plan.channel_blocks, pair_count),
                      dim3(kThreads), static_cast<size_t>(shared_bytes), 1, stream, plan, pairs,
                      static_cast<unsigned char*>(workspace));
}

}  // namespace clusterkv::kernels
