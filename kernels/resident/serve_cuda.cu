// The service's end: a block, or a thread-block cluster of blocks, takes pairs from a queue and
// answers one after the other. What does not depend on the queries is done before they come.
//
// Groups that are served together have a queue each. A cluster holds a ticket of every one, and is
// prepared for that which is first in its order; when another's queries are there before, it
// prepares anew. Nobody waits for another group, and all clusters work for whoever asks.
#include <limits>

#include "kernels/resident/directory.cuh"
#include "kernels/resident/lines.cuh"
#include "kernels/resident/resident_cuda.h"
#include "kernels/resident/windows.h"
#include "kernels/select/answer_pair.cuh"
#include "kernels/select/resident_clusters.h"
#ifdef CLUSTERKV_CUDA_EMULATOR
#include <map>
#include <mutex>
#include <vector>
#endif

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// Of one group.
struct GroupPlan {
  ServeParams params;
  resident::WindowLayout windows;
  AnswerPlan answer;
  int record_bytes;
};

// Of a kernel for one group, or for up to so many: a group alone has code and parameters without
// what several cost.
template <int kGroups>
struct ServePlan {
  int groups, blocks, clusters;  // clusters: of the grid, each answers a pair at a time
  bool large;                    // a group's plan is
  int own_offset;                // of Own in shared memory
  GroupPlan of[kGroups];
};
static_assert(sizeof(ServePlan<kMaxTogether>) <= 4096, "a kernel's parameters");

// A block's shared memory beside the answer's.
struct Own {
  DirectoryScratch directory;
  alignas(16) int32_t positions[resident::kMaxExact];  // of the exact tokens
  const unsigned char* records[resident::kMaxExact];   // theirs
  uint64_t tickets[kMaxTogether];                      // of each group
  // Groups that have a ticket: what is answered first where the queries of several are there.
  int order[kMaxTogether], held;
  float asked;                               // place in `order`; kNobody
  float came[kAnswerBlocks];                 // of the cluster's blocks: 1: its queries are there
  float queries[kAnswerHeads * kAnswerDim];  // of the block's quad
};
constexpr uint64_t kNoTicket = ~uint64_t{0};
constexpr int kNobody = -1;

struct Ticket {
  int layer, pair;
  uint32_t flag;
};

__device__ __forceinline__ Ticket TicketOf(const GroupPlan& group, uint64_t number) {
  const ResidentShape& s = group.params.shape;
  const uint64_t round = group.params.first_round + number / static_cast<uint64_t>(s.pairs);
  Ticket ticket;
  ticket.pair = static_cast<int>(number % static_cast<uint64_t>(s.pairs));
  ticket.flag = static_cast<uint32_t>(round);
  ticket.layer = static_cast<int>((round - 1) % static_cast<uint64_t>(s.layers));
  return ticket;
}

template <int kGroups>
__device__ __forceinline__ bool IsStopped(const ServePlan<kGroups>& plan) {
  return LoadVolatile(&plan.of[0].params.control->stop) != 0;
}

// Group g, whose last ticket is done, goes on with its round before others are asked, and behind
// them with the next one. By one thread.
__device__ void Reorder(const GroupPlan& group, int g, uint64_t next, Own& own) {
  const uint64_t pairs = static_cast<uint64_t>(group.params.shape.pairs), last = own.tickets[g];
  if (last != kNoTicket) {
    if (next != kNoTicket && next / pairs == last / pairs) return;
    --own.held;
    for (int i = 0; i < own.held; ++i) own.order[i] = own.order[i + 1];
  }
  if (next != kNoTicket) own.order[own.held++] = g;
}

// A group's workspace: a cluster's ticket each, then what an answer has in memory.
template <int kGroups>
__host__ __device__ int64_t TicketBytes(const ServePlan<kGroups>& plan) {
  return resident::RoundUp(int64_t{plan.clusters} * 8);
}
template <int kGroups>
__device__ void* FarOf(const ServePlan<kGroups>& plan, const GroupPlan& group, int cluster) {
  return static_cast<unsigned char*>(group.params.workspace) + TicketBytes(plan) +
         cluster * AnswerFarBytes(group.params.select);
}

// The next pair of group g's queue, the same for all blocks of the cluster: own.tickets[g],
// kNoTicket when the group is served no more.
template <int kGroups>
__device__ void TakeTicket(const ServePlan<kGroups>& plan, int g, int cluster, int rank, Own& own) {
  const ServeParams& p = plan.of[g].params;
  uint64_t* tickets = static_cast<uint64_t*>(p.workspace);
  uint64_t ticket = kNoTicket;
  __syncthreads();
  if (threadIdx.x == 0 && rank == 0) {
    // What the last pair's answer left in memory is for whoever takes a later one.
    __threadfence();
    const bool stop = IsStopped(plan);
    const uint64_t next =
        atomicAdd(reinterpret_cast<unsigned long long*>(&p.control->tickets), 1ull);
    const bool last = p.rounds > 0 && next >= p.rounds * static_cast<uint64_t>(p.shape.pairs);
    ticket = stop || last ? kNoTicket : next;
    tickets[cluster] = ticket;
    __threadfence();
  }
  ClusterSync(plan.blocks);
  if (threadIdx.x == 0) {
    if (rank != 0) ticket = *static_cast<const volatile uint64_t*>(tickets + cluster);
    if constexpr (kGroups > 1) Reorder(plan.of[g], g, ticket, own);
    own.tickets[g] = ticket;
  }
  __syncthreads();
}

// Asks for what an answer will read, into the second cache: the block's share of the centroids,
// then of the value means, as far as prefetch_bytes go.
__device__ void Prefetch(const GroupPlan& plan, const SelectCudaPair& pair, int rank) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)plan;
  (void)pair;
  (void)rank;
#else
  constexpr int kLine = 128, kLines = kAnswerRowBytes / kLine;
  int left = static_cast<int>(plan.params.prefetch_bytes / kAnswerRowBytes);  // rows of the pair
  const int blocks = plan.answer.blocks;
  const auto rows = [&](const DevicePagedView& view, uint32_t first, int count) {
    const int tiles = (count + kAnswerTile - 1) / kAnswerTile;
    const int begin = tiles * rank / blocks * kAnswerTile;
    const int end = min(count, tiles * (rank + 1) / blocks * kAnswerTile);
    const int wanted = min(end - begin, (left + blocks - 1) / blocks);
    for (int i = threadIdx.x; i < wanted * kLines; i += kThreads) {
      const unsigned char* line =
          view.At(first + static_cast<uint32_t>(begin + i / kLines)) + i % kLines * kLine;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
    left = max(0, left - count);
  };
  for (int what = 0; what < 2; ++what) {
    for (int k = 0; k < pair.part_count && left > 0; ++k) {
      const DeviceIndexPart& part = pair.parts[k];
      rows(what == 0 ? part.centroids : part.value_means,
           static_cast<uint32_t>(pair.kv_head) * static_cast<uint32_t>(part.clusters),
           part.clusters);
    }
  }
#endif
}

// Whether all blocks of the cluster say so: one that went on alone would meet nobody at the next
// barrier. Its own is the one that an answer wants after all have begun it.
__device__ bool Agree(bool mine, int blocks, int rank, Own& own) {
  if (blocks == 1) return mine;
  if (static_cast<int>(threadIdx.x) < blocks) {
    StoreToBlock(&own.came[rank], static_cast<int>(threadIdx.x), mine ? 1.0f : 0.0f);
  }
  ClusterSync(blocks);
  bool all = true;
  for (int i = 0; i < blocks; ++i) all = all && own.came[i] != 0;
  return all;
}

// Whether to wait no longer for queries of the group, after `since`.
template <int kGroups>
__device__ __forceinline__ bool GivesUp(const ServePlan<kGroups>& plan, const ServeParams& p,
                                        uint64_t since) {
  if (IsStopped(plan)) return true;
  if (p.idle_ns == 0 || DeviceNanoseconds() - since < p.idle_ns) return false;
  p.control->given_up = 1;
  return true;
}

// The first place in own.order whose queries are there; kNobody: the kernel is to end. By one warp.
template <int kGroups>
__device__ int FindAsked(const ServePlan<kGroups>& plan, const Own& own) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, held = own.held;
  const int g = lane < held ? own.order[lane] : own.order[0];
  const GroupPlan& group = plan.of[g];
  const Ticket ticket = TicketOf(group, own.tickets[g]);
  const uint4* lines = group.windows.Queries(group.params.requests, ticket.pair);
  const uint64_t since = DeviceNanoseconds();
  const auto has = [](const uint4* line, uint32_t flag) {
    uint32_t words[2];
    return LoadLine(line, flag, &words[0], &words[1]);
  };
  int found = kNobody;
  (void)Poll(
      [&] {
        uint32_t begun = __ballot_sync(kFullMask, lane < held && has(lines, ticket.flag));
        for (; begun != 0 && found == kNobody; begun &= begun - 1) {
          const int place = __ffs(static_cast<int>(begun)) - 1;
          const uint4* its = reinterpret_cast<const uint4*>(
              ShuffleAddress(reinterpret_cast<const unsigned char*>(lines), place));
          const uint32_t flag = __shfl_sync(kFullMask, ticket.flag, place);
          const int count = __shfl_sync(kFullMask, group.windows.query_lines, place);
          bool all = true;
          for (int i = lane; i < count; i += kWarp) all = has(its + i, flag) && all;
          if (__all_sync(kFullMask, all)) found = place;
        }
        return found != kNobody;
      },
      [&] { return __any_sync(kFullMask, lane < held && GivesUp(plan, group.params, since)); });
  return found;
}

// Waits for the queries of any group, which is the first in own.order then. False: the kernel is to
// end.
template <int kGroups>
__device__ bool AwaitGroup(const ServePlan<kGroups>& plan, int rank, Own& own) {
  const int lane = static_cast<int>(threadIdx.x);
  if (rank == 0 && lane < kWarp) {
    const int asked = FindAsked(plan, own);
    if (lane < plan.blocks) StoreToBlock(&own.asked, lane, static_cast<float>(asked));
  }
  ClusterSync(plan.blocks);
  const int asked = static_cast<int>(own.asked);
  if (asked <= 0) return asked == 0;
  if (threadIdx.x == 0) {
    const int g = own.order[asked];
    for (int i = asked; i > 0; --i) own.order[i] = own.order[i - 1];
    own.order[0] = g;
  }
  ClusterSync(plan.blocks);
  return true;
}

// Waits for the pair's queries, the block those of its heads, and leaves these as floats in
// own.queries. False: the kernel is to end.
template <int kGroups>
__device__ bool AwaitQueries(const ServePlan<kGroups>& plan, const GroupPlan& group,
                             const Ticket& ticket, int first_head, int heads, int rank, Own& own) {
  const ServeParams& p = group.params;
  const ResidentShape& s = p.shape;
  const int head_lines = group.windows.head_lines;
  const uint4* lines = group.windows.Queries(p.requests, ticket.pair) + first_head * head_lines;
  const uint64_t since = DeviceNanoseconds();
  bool came = true;
  for (int i = threadIdx.x; came && i < heads * head_lines; i += kThreads) {
    uint32_t word[2] = {0, 0};
    came = Poll([&] { return LoadLine(lines + i, ticket.flag, &word[0], &word[1]); },
                [&] { return GivesUp(plan, p, since); });
    for (int j = 0; j < 2; ++j) {
      if (s.query_type == ElementType::kFloat32) {
        own.queries[2 * i + j] = __uint_as_float(word[j]);
      } else {
        own.queries[4 * i + 2 * j] = BFloat16BitsToFloat(static_cast<uint16_t>(word[j]));
        own.queries[4 * i + 2 * j + 1] = BFloat16BitsToFloat(static_cast<uint16_t>(word[j] >> 16));
      }
    }
  }
  return Agree(__syncthreads_count(came) == kThreads, plan.blocks, rank, own);
}

// What becomes of an answer (PairAnswer::Answer).
template <typename Answer>
struct Sender {
  const GroupPlan& plan;
  const Ticket& ticket;
  const SelectCudaPair& pair;
  resident::DirectoryEntry before;  // the thread's entry of the directory
  Own& own;
  int missing = 0;  // exact tokens whose records Exact sends

  __device__ int64_t Row() const {
    return int64_t{ticket.layer} * plan.params.shape.pairs + ticket.pair;
  }

  __device__ uint2* Entries() const {
    return static_cast<uint2*>(plan.params.replies) +
           int64_t{ticket.pair} * plan.params.shape.max_exact;
  }

  // Resolves the directory, sends the slots of the records that the hot cache has, and begins to
  // send the records that it lacks.
  __device__ void Exact(Answer& answer) {
    const ServeParams& p = plan.params;
    const ResidentShape& s = p.shape;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int i = static_cast<int>(threadIdx.x);
    const int count = min(answer.ExactCount(), s.max_exact);
    if (i < count) {
      int slot;
      const DeviceIndexPart& part = answer.ExactToken(i, &slot);
      const uint32_t element =
          static_cast<uint32_t>(pair.kv_head) * static_cast<uint32_t>(part.tokens) +
          static_cast<uint32_t>(slot);
      own.records[i] = part.records.At(element);
      own.positions[i] = *part.positions.As<int32_t>(element);
    } else if (i < resident::kMaxExact) {
      own.positions[i] = -1;
    }
    __syncthreads();
    resident::DirectoryEntry* directory =
        static_cast<resident::DirectoryEntry*>(p.directory) + Row() * s.slots;
    missing = Resolve<kThreads>(before, s.slots, own.positions, count, directory, own.directory);
    if (i < s.max_exact && !own.directory.missed[i]) {
      StoreEntry(Entries() + i, i < count ? static_cast<uint32_t>(own.directory.slots[i]) : ~0u,
                 ticket.flag);
    }
    unsigned char* cache = static_cast<unsigned char*>(p.hot_cache) +
                           Row() * s.slots * static_cast<int64_t>(plan.record_bytes);
    const int pieces = plan.record_bytes / 8;
    for (int m = warp; m < missing; m += kWarps) {
      const int token = own.directory.missing[m];
      const uint2* from = reinterpret_cast<const uint2*>(own.records[token]);
      uint2* to = reinterpret_cast<uint2*>(
          cache + static_cast<int64_t>(own.directory.slots[token]) * plan.record_bytes);
      for (int j = lane; j < pieces; j += 2 * kWarp) {
        const bool two = j + kWarp < pieces;  // on their way at once
        const uint2 first = from[j], second = two ? from[j + kWarp] : uint2{};
        to[j] = first;
        if (two) to[j + kWarp] = second;
      }
    }
  }

  // The slots of the records that Exact sent: when they are there, which takes each warp that sent
  // some as long as the link.
  __device__ void Pushed(Answer&) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (warp >= missing) return;
    __threadfence_system();
    __syncwarp();
    for (int m = warp + lane * kWarps; m < missing; m += kThreads) {
      const int token = own.directory.missing[m];
      StoreEntry(Entries() + token, static_cast<uint32_t>(own.directory.slots[token]), ticket.flag);
    }
    if (threadIdx.x == 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&plan.params.control->pushed),
                static_cast<unsigned long long>(missing));
    }
  }

  __device__ void Selection(Answer& answer) const {
    const ServeParams& p = plan.params;
    const int count = min(answer.ExactCount(), p.shape.max_exact);
    if (p.positions != nullptr) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        p.positions[Row() * p.shape.max_exact + i] = own.positions[i];
      }
    }
    if (threadIdx.x != 0) return;
    if (p.exact_count != nullptr) p.exact_count[Row()] = count;
    atomicAdd(reinterpret_cast<unsigned long long*>(&p.control->served), 1ull);
  }

  // Two numbers per line; a block's share is even.
  __device__ void State(Answer& answer, bool any) const {
    const int numbers = plan.params.shape.group * kAnswerDim;
    uint4* lines = plan.windows.State(plan.params.replies, ticket.pair);
    const int i = 2 * static_cast<int>(threadIdx.x);
    if (i < answer.StateCount()) {
      StoreLine(lines + (answer.StateBegin() + i) / 2, __float_as_uint(answer.StateNumber(i, any)),
                __float_as_uint(answer.StateNumber(i + 1, any)), ticket.flag);
    }
    // Log-sum-exps, by a warp that has no numbers where there is one.
    const int head = 2 * (kThreads - 1 - static_cast<int>(threadIdx.x)), heads = answer.LseCount();
    if (head < heads) {
      StoreLine(lines + (numbers + answer.FirstHead() + head) / 2,
                __float_as_uint(answer.StateLse(head, any)),
                head + 1 < heads ? __float_as_uint(answer.StateLse(head + 1, any)) : 0u,
                ticket.flag);
    }
  }
};

// x, the same in all lanes, as the compiler then knows: what it is an index of comes by way of
// uniform registers, as with an index that is constant.
__device__ __forceinline__ int Uniform(int x) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return x;
#else
  return __reduce_max_sync(kFullMask, x);
#endif
}

// kLarge: plan.large.
template <int kGroups, bool kLarge>
__global__ void __launch_bounds__(kThreads, 1)
    ServeKernel(const __grid_constant__ ServePlan<kGroups> plan) {
  constexpr bool kTogether = kGroups > 1;
  Own& own = *reinterpret_cast<Own*>(SharedMemory() + plan.own_offset);
  const int blocks = plan.blocks;
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  const int rank = static_cast<int>(blockIdx.x) % blocks;
  if constexpr (kTogether) {
    if (threadIdx.x == 0) {
      own.held = 0;
      for (int g = 0; g < plan.groups; ++g) own.tickets[g] = kNoTicket;
    }
    for (int g = 0; g < plan.groups; ++g) TakeTicket(plan, g, cluster, rank, own);
  }
  for (bool takes = !kTogether;;) {  // whether the last ticket is done
    if (takes) TakeTicket(plan, kTogether ? own.order[0] : 0, cluster, rank, own);
    if (kTogether ? own.held == 0 : own.tickets[0] == kNoTicket) return;
    const int g = kTogether ? Uniform(own.order[0]) : 0;
    const GroupPlan& group = plan.of[g];
    const ServeParams& p = group.params;
    const Ticket ticket = TicketOf(group, own.tickets[g]);
    const int64_t row = int64_t{ticket.layer} * p.shape.pairs + ticket.pair;
    const SelectCudaPair& pair = p.pairs[row];
    using Answer = PairAnswer<kThreads, kLarge>;
    Answer answer(group.answer, 0, rank, FarOf(plan, group, cluster));
    answer.Begin(pair);
    Prefetch(group, pair, rank);
    if constexpr (kTogether) {
      if (!AwaitGroup(plan, rank, own)) return;
      if (own.order[0] != g) {
        answer.Abandon();
        takes = false;
        continue;
      }
    }
    if (!AwaitQueries(plan, group, ticket, answer.FirstHead(), answer.Heads(), rank, own)) return;
    resident::DirectoryEntry before = {-1, -1};
    if (rank == blocks - 1 && static_cast<int>(threadIdx.x) < p.shape.slots) {
      before = static_cast<const resident::DirectoryEntry*>(
          p.directory)[row * p.shape.slots + threadIdx.x];
    }
    Sender<Answer> sender = {group, ticket, pair, before, own};
    answer.PrepareQueries(own.queries);
    answer.Answer(sender);
    takes = true;
  }
}

__global__ void ForgetKernel(resident::DirectoryEntry* directory, int pairs, int slots, int first,
                             int count) {
  const int layer = static_cast<int>(blockIdx.x) / count;
  const int pair = first + static_cast<int>(blockIdx.x) % count;
  resident::DirectoryEntry* entries = directory + (int64_t{layer} * pairs + pair) * slots;
  for (int i = threadIdx.x; i < slots; i += blockDim.x) entries[i] = {-1, i};
}

template <int kGroups>
auto KernelOf(const ServePlan<kGroups>& plan) {
  return plan.large ? ServeKernel<kGroups, true> : ServeKernel<kGroups, false>;
}

// Clusters that the device can run at once: what is launched beyond them would only start when
// others end.
template <int kGroups>
int ServeClusters(const ServePlan<kGroups>& plan) {
  static KnownClusters known[2];
  return ResidentClusters(ReadLimits(), reinterpret_cast<const void*>(KernelOf(plan)), kThreads,
                          plan.blocks, known[plan.large]);
}

bool MakeGroupPlan(const ServeParams& p, GroupPlan* plan) {
  const ResidentShape& s = p.shape;
  const int blocks = p.select.blocks_per_pair;
  if (!resident::ValidShape(s) || s.query_type == ElementType::kFloat16 ||
      p.select.group != s.group || p.select.head_dim != s.head_dim || blocks < 1 || blocks > 16 ||
      p.blocks < blocks || ExactCapacity(p.select) > s.max_exact || p.first_round < 1) {
    return false;
  }
  constexpr int64_t kOwnBytes = (sizeof(Own) + 15) / 16 * 16;
  plan->params = p;
  plan->windows = resident::MakeWindowLayout(s);
  plan->record_bytes = resident::RecordBytes(s);
  const int64_t room = ReadLimits().shared_bytes - kOwnBytes;
  return MakeAnswerPlan(p.select, blocks, kThreads, room, false, &plan->answer) ||
         MakeAnswerPlan(p.select, blocks, kThreads, room, true, &plan->answer);
}

template <int kGroups>
bool MakeServePlan(const ServeParams* groups, int count, ServePlan<kGroups>* plan) {
  if (count < 1 || count > kGroups) return false;
  const ServeParams& first = groups[0];
  plan->groups = count;
  plan->blocks = first.select.blocks_per_pair;
  plan->clusters = std::numeric_limits<int>::max();
  for (int g = 0; g < count; ++g) {
    const ServeParams& p = groups[g];
    if (p.select.blocks_per_pair != plan->blocks || p.blocks != first.blocks ||
        p.idle_ns != first.idle_ns || !MakeGroupPlan(p, &plan->of[g])) {
      return false;
    }
    plan->large = plan->large || IsLarge(plan->of[g].answer);
    plan->clusters = min(plan->clusters, p.shape.layers * p.shape.pairs);
    plan->own_offset = max(plan->own_offset, (plan->of[g].answer.shared_bytes + 15) / 16 * 16);
  }
  plan->clusters = min(plan->clusters, min(first.blocks / plan->blocks, ServeClusters(*plan)));
  return plan->clusters > 0;
}

}  // namespace

int64_t DirectoryBytes(const ResidentShape& shape) {
  return resident::RoundUp(int64_t{shape.layers} * shape.pairs * shape.slots *
                           static_cast<int64_t>(sizeof(resident::DirectoryEntry)));
}

int64_t ServeWorkspaceBytes(const ServeParams& params, int32_t* pairs_at_once) {
  ServePlan<1> plan = {};
  const bool valid = MakeServePlan(&params, 1, &plan);
  if (pairs_at_once != nullptr) *pairs_at_once = valid ? plan.clusters : 0;
  if (!valid) return 0;
  return TicketBytes(plan) +
         (plan.of[0].answer.far ? plan.clusters * AnswerFarBytes(params.select) : 0);
}

int32_t MostServedClusters(ServeParams params) {
  int32_t most = 0, refused = std::numeric_limits<uint16_t>::max() + 1;
  while (refused - most > 1) {
    ServePlan<1> plan = {};
    params.select.max_clusters = most + (refused - most) / 2;
    (MakeServePlan(&params, 1, &plan) ? most : refused) = params.select.max_clusters;
  }
  return most;
}

namespace {

template <int kGroups>
cudaError_t LaunchGroups(const ServeParams* groups, int count, cudaStream_t stream) {
  ServePlan<kGroups> plan = {};
  if (!MakeServePlan(groups, count, &plan)) return cudaErrorInvalidValue;
  for (int g = 0; g < count; ++g) {
    uint64_t* const tickets = &groups[g].control->tickets;
    CKV_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(tickets, 0, sizeof(*tickets), stream));
  }
  return cuda::Launch(KernelOf(plan), dim3(static_cast<unsigned>(plan.clusters * plan.blocks)),
                      dim3(kThreads), static_cast<size_t>(plan.own_offset) + sizeof(Own),
                      plan.blocks, stream, plan);
}

cudaError_t Launch(const ServeParams* groups, int count, cudaStream_t stream) {
  return count == 1 ? LaunchGroups<1>(groups, count, stream)
                    : LaunchGroups<kMaxTogether>(groups, count, stream);
}

#ifdef CLUSTERKV_CUDA_EMULATOR
// Kernels that run until they are stopped, by what stops them. Here kernels run one after the
// other: these run for a round of each group that has asked (resident::ServeEmulated).
struct Emulated {
  std::mutex mutex;
  std::map<const ServeControl*, std::vector<ServeParams>> running;
};
Emulated& TheEmulated() {
  static Emulated emulated;
  return emulated;
}
#endif

}  // namespace

#ifdef CLUSTERKV_CUDA_EMULATOR
void resident::ServeEmulated() {
  Emulated& emulated = TheEmulated();
  const std::lock_guard<std::mutex> lock(emulated.mutex);
  for (auto& [first, groups] : emulated.running) {
    (void)first;
    for (ServeParams& p : groups) {
      p.first_round = p.control->served / static_cast<uint64_t>(p.shape.pairs) + 1;
      p.rounds = 1;
    }
    (void)Launch(groups.data(), static_cast<int>(groups.size()), nullptr);
  }
}
#endif

cudaError_t LaunchServe(const ServeParams* groups, int32_t count, cudaStream_t stream) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  if (count > 0 && groups[0].rounds == 0) {
    ServePlan<kMaxTogether> plan = {};
    if (!MakeServePlan(groups, count, &plan)) return cudaErrorInvalidValue;
    const std::lock_guard<std::mutex> lock(TheEmulated().mutex);
    TheEmulated().running[groups[0].control].assign(groups, groups + count);
    return cudaSuccess;
  }
#endif
  return Launch(groups, count, stream);
}

cudaError_t StopServe(ServeControl* control, cudaStream_t stream, cudaStream_t other) {
  CKV_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(&control->stop, 1, sizeof(control->stop), other));
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(other));
#ifdef CLUSTERKV_CUDA_EMULATOR
  const std::lock_guard<std::mutex> lock(TheEmulated().mutex);
  TheEmulated().running.erase(control);
#endif
  return cudaStreamSynchronize(stream);
}

cudaError_t LaunchForget(const ResidentShape& shape, void* directory, int32_t first, int32_t count,
                         cudaStream_t stream) {
  if (!resident::ValidShape(shape) || first < 0 || count < 0 || first > shape.pairs - count) {
    return cudaErrorInvalidValue;
  }
  return cuda::Launch(ForgetKernel, dim3(shape.layers * count), dim3(128), 0, 1, stream,
                      static_cast<resident::DirectoryEntry*>(directory), shape.pairs, shape.slots,
                      first, count);
}

}  // namespace clusterkv::kernels
