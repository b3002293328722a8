// The decode GPU's end: a block of 256 threads per pair.
//
//   1  queries leave, as lines             no wait for them: the flag is in the line
//   2  sinks and window are attended       while the service answers
//   3  slots come: their records
//   4  the warps' parts are merged; the state comes: each thread merges the channels of its lines
#include "kernels/attention/attention_tile.cuh"
#include "kernels/resident/lines.cuh"
#include "kernels/resident/resident_cuda.h"
#include "kernels/resident/windows.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;             // NOLINT: device helpers
using namespace cuda::attention;  // NOLINT

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct StepPlan {
  StepParams params;
  resident::WindowLayout windows;
  int layer, part;
  int steps, fragment_sets, channel_span, record_bytes;
  int slots_offset;  // of the slots in shared memory
};

// Words of a pair's queries as they travel.
__device__ __forceinline__ void Ask(const StepPlan& plan, int pair, uint32_t flag,
                                    const uint2* words) {
  uint4* lines = plan.windows.Queries(plan.params.requests, pair);
  for (int i = threadIdx.x; i < plan.windows.query_lines; i += kThreads) {
    const uint2 two = words[i];
    StoreLine(lines + i, two.x, two.y, flag);
  }
}

// Waits for the pair's slots. Leaves them in `slots`; returns how many, -1 after a timeout.
template <typename GiveUp>
__device__ int AwaitSlots(const StepPlan& plan, int pair, uint32_t flag, const GiveUp& give_up,
                          int32_t* slots) {
  const int most = plan.params.shape.max_exact;
  const uint2* entries = static_cast<const uint2*>(plan.params.replies) + int64_t{pair} * most;
  const bool stale = (plan.part & kStepStale) != 0;
  bool lost = false;
  for (int i = threadIdx.x; i < most; i += kThreads) {
    uint32_t word = 0;
    if (!Poll([&] { return LoadEntry(entries + i, flag, &word) || stale; }, give_up)) lost = true;
    slots[i] = static_cast<int32_t>(word);
  }
  // The records were written before their entries: reads of them stay behind.
  __threadfence_system();
  const bool any_lost = __syncthreads_count(lost) > 0;
  int count = 0;
  // Slots come first in the list, then what is not used.
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < most; i += kWarp) count += slots[i] >= 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    count += __shfl_xor_sync(kFullMask, count, offset);
  }
  return any_lost ? -1 : count;
}

template <typename T>
__device__ __forceinline__ void StoreOutput(void* output, int64_t at, float x);
template <>
__device__ __forceinline__ void StoreOutput<float>(void* output, int64_t at, float x) {
  static_cast<float*>(output)[at] = x;
}
template <>
__device__ __forceinline__ void StoreOutput<uint16_t>(void* output, int64_t at, float x) {
  static_cast<uint16_t*>(output)[at] = FloatToBFloat16Bits(x);
}

// Merges the state's lines, as they come, with the block's own part, and writes the output.
template <typename T, typename GiveUp>
__device__ void FinishStep(const StepPlan& plan, int pair, uint32_t flag, const GiveUp& give_up,
                           float* merged, bool lost_slots, void* output, float* lse) {
  const ResidentShape& s = plan.params.shape;
  const uint4* lines = plan.windows.State(plan.params.replies, pair);
  const int numbers = s.group * s.head_dim;
  const bool stale = (plan.part & kStepStale) != 0;
  bool lost = false;
  int known_head = -1;
  float known_lse = 0;
  for (int i = threadIdx.x; i < plan.windows.state_lines; i += kThreads) {
    uint32_t word[2] = {0, 0};
    if (!Poll([&] { return LoadLine(lines + i, flag, &word[0], &word[1]) || stale; }, give_up))
      lost = true;
    for (int j = 0; j < 2; ++j) {
      const int number = 2 * i + j;
      if (number >= plan.windows.state_floats) break;
      const int head = number < numbers ? number / s.head_dim : number - numbers;
      if (head != known_head) {
        const int at = numbers + head;
        uint32_t two[2] = {0, 0};
        if (!Poll([&] { return LoadLine(lines + at / 2, flag, &two[0], &two[1]) || stale; },
                  give_up)) {
          lost = true;
        }
        known_lse = __uint_as_float(two[at % 2]);
        known_head = head;
      }
      const StateMerge merge(PartialLargest(merged)[head], PartialSum(merged)[head], known_lse);
      const bool valid = !lost && !lost_slots;
      const int64_t row = int64_t{pair} * s.group + head;
      if (number < numbers) {
        const int channel = number % s.head_dim;
        const float x = merge.Output(PartialOutput(merged)[head * plan.channel_span + channel],
                                     merge.other > 0 ? __uint_as_float(word[j]) : 0.0f);
        StoreOutput<T>(output, row * s.head_dim + channel, valid ? x : plan.params.lost);
      } else if (lse != nullptr) {
        lse[row] = valid ? merge.Lse() : plan.params.lost;
      }
    }
  }
  if (lost) atomicOr(plan.params.status, static_cast<uint32_t>(kStepStateMissing));
}

template <Source kRaw, Source kRecord, typename T>
__global__ void __launch_bounds__(kThreads)
    StepKernel(const __grid_constant__ StepPlan plan, const void* queries, void* output,
               float* lse) {
  constexpr int kChunks = 2;
  const StepParams& p = plan.params;
  const ResidentShape& s = p.shape;
  const int pair = static_cast<int>(blockIdx.x);
  const uint32_t flag = static_cast<uint32_t>(*p.rounds) + static_cast<uint32_t>(plan.layer) + 1;
  const int dim = s.head_dim, numbers = s.group * dim;
  const T* mine = static_cast<const T*>(queries) + int64_t{pair} * numbers;
  if (plan.part & kStepAsk) Ask(plan, pair, flag, reinterpret_cast<const uint2*>(mine));
  if (!(plan.part & kStepAttend)) return;

  unsigned char* shared = SharedMemory();
  float* query = reinterpret_cast<float*>(shared + QueryOffset(plan.steps, plan.fragment_sets));
  int32_t* slots = reinterpret_cast<int32_t*>(shared + plan.slots_offset);
  for (int i = threadIdx.x; i < kHeads * dim; i += kThreads) {
    query[i] = i < numbers ? LoadAsFloat(mine, s.query_type, i) * p.scale * kLog2E : 0.0f;
  }
  __syncthreads();
  const BlockState b =
      PrepareBlock<kRaw, kRecord>(query, shared, dim, plan.steps, plan.fragment_sets, 0);
  Running<kChunks> run;
  Clear(run);
  const int warp = threadIdx.x / kWarp;
  const StepPair& step = p.pairs[int64_t{plan.layer} * s.pairs + pair];
  DeviceRawRun raw[2] = {step.sinks, step.window};
  if (step.window_tokens != nullptr) raw[1].tokens = min(raw[1].tokens, *step.window_tokens);
  int turn = 0;
  AttendRuns<kRaw>(raw, 2, b, warp, kWarps, &turn, run);

  const uint64_t until = p.timeout_ns == 0 ? ~uint64_t{0} : DeviceNanoseconds() + p.timeout_ns;
  const auto give_up = [&] { return DeviceNanoseconds() > until; };
  const int records = AwaitSlots(plan, pair, flag, give_up, slots);
  if (records < 0 && threadIdx.x == 0) {
    atomicOr(p.status, static_cast<uint32_t>(kStepSlotsMissing));
  }
  const unsigned char* cache = static_cast<const unsigned char*>(p.hot_cache) +
                               (int64_t{plan.layer} * s.pairs + pair) * s.slots * plan.record_bytes;
  AttendRecords<kRecord>(
      cache, plan.record_bytes, max(records, 0), [&](int i) { return slots[i]; },
      [](int) { return 0xffu; }, b, warp, kWarps, 0, run);

  float* partials = query;  // the query itself is not read any more
  const int64_t partial_floats = 2 * kHeads + kHeads * plan.channel_span;
  StorePartial(run, plan.channel_span, partials + warp * partial_floats);
  __syncthreads();
  MergePartials(partials, kWarps, partial_floats, plan.channel_span, partials);
  FinishStep<T>(plan, pair, flag, give_up, partials, records < 0, output, lse);
}

__global__ void EndStepKernel(uint64_t* rounds, int layers) {
  if (threadIdx.x == 0) *rounds += static_cast<uint64_t>(layers);
}

using Kernel = void (*)(StepPlan, const void*, void*, float*);

template <Source kRaw, typename T>
Kernel KernelOfFormat(RecordFormat format) {
  return format == RecordFormat::kK8V4 ? StepKernel<kRaw, Source::kK8V4, T>
                                       : StepKernel<kRaw, kRaw, T>;
}
template <typename T>
Kernel KernelOf(const ResidentShape& s) {
  return s.element_type == ElementType::kFloat32   ? KernelOfFormat<Source::kFloat32, T>(s.format)
         : s.element_type == ElementType::kFloat16 ? KernelOfFormat<Source::kFloat16, T>(s.format)
                                                   : KernelOfFormat<Source::kBFloat16, T>(s.format);
}

}  // namespace

int64_t RequestWindowBytes(const ResidentShape& shape) {
  return resident::RoundUp(int64_t{shape.pairs} * resident::MakeWindowLayout(shape).query_lines *
                           16);
}
int64_t ReplyWindowBytes(const ResidentShape& shape) {
  const resident::WindowLayout layout = resident::MakeWindowLayout(shape);
  return layout.entries_bytes + resident::RoundUp(int64_t{shape.pairs} * layout.state_lines * 16);
}
int64_t HotCacheBytes(const ResidentShape& shape) {
  return resident::RoundUp(int64_t{shape.layers} * shape.pairs * shape.slots *
                           resident::RecordBytes(shape));
}

cudaError_t LaunchStep(const StepParams& params, int32_t layer, StepPart part, const void* queries,
                       void* output, float* lse, cudaStream_t stream) {
  const ResidentShape& s = params.shape;
  if (!resident::ValidShape(s) || s.query_type == ElementType::kFloat16 || layer < 0 ||
      layer >= s.layers) {
    return cudaErrorInvalidValue;
  }
  StepPlan plan = {};
  plan.params = params;
  plan.windows = resident::MakeWindowLayout(s);
  plan.layer = layer;
  plan.part = part;
  plan.steps = (s.head_dim + 31) / 32;
  plan.channel_span = 2 * kSpan;
  plan.fragment_sets =
      s.format == RecordFormat::kK8V4 && s.element_type != ElementType::kFloat16 ? 2 : 1;
  plan.record_bytes = resident::RecordBytes(s);
  const int64_t rows = max(int64_t{kHeads} * s.head_dim,
                           int64_t{kWarps} * (2 * kHeads + kHeads * plan.channel_span));
  plan.slots_offset = QueryOffset(plan.steps, plan.fragment_sets) + static_cast<int>(rows) * 4;
  const int shared_bytes = plan.slots_offset + (s.max_exact + 3) / 4 * 16;
  const Kernel kernel =
      s.query_type == ElementType::kFloat32 ? KernelOf<float>(s) : KernelOf<uint16_t>(s);
  const auto launch = [&] {
    return cuda::Launch(kernel, dim3(s.pairs), dim3(kThreads), static_cast<size_t>(shared_bytes), 1,
                        stream, plan, queries, output, lse);
  };
#ifdef CLUSTERKV_CUDA_EMULATOR
  if (part == kStepWhole) {  // kernels run one after the other: the other end's between the halves
    plan.part = kStepAsk;
    CKV_RETURN_IF_CUDA_ERROR(launch());
    resident::ServeEmulated();
    plan.part = kStepAttend;
  }
#endif
  return launch();
}

cudaError_t LaunchEndStep(const ResidentShape& shape, uint64_t* rounds, cudaStream_t stream) {
  return cuda::Launch(EndStepKernel, dim3(1), dim3(32), 0, 1, stream, rounds, shape.layers);
}

}  // namespace clusterkv::kernels
