// Selection and answer of one (sequence, KV head) pair by one block or one thread-block cluster.
//
// For the usual shapes: up to 8 query heads of 128 channels per KV head, codes of 2 bits in groups
// of 32 channels or none in use. select_cuda.cu launches it for a batch; a resident kernel may call
// it too. Other shapes: select_cuda.cu. More than 4 heads are two quads, each answered by half of
// the cluster's blocks, which are what "all blocks" below says; in 2 and 4 the quads give each
// other their shares of the ranks, which is all that either needs of the other. Where shared memory
// has no room for all clusters' logits these are in memory.
//
//   1  logits of the centroids            each block its share, on the matrix unit; to all blocks
//      -- barrier of the cluster
//   2  softmax, rank, clusters to score   every block all of it: cheaper than to share
//   3  logits of their tokens by codes    each block its share; to all blocks. Meanwhile estimated
//      -- barrier                         clusters' value means; value codes on their way
//   4  softmax, exact zone                every block all of it
//   5  coded and estimated state          each block its share; each channel to its owner
//      -- barrier
//   6  sum of the blocks' states          each block its channels; the last one wrote the selection
//
// Each place is a multiprocessor's latency: what is short of it is threads in step, not memory. So
// blocks exchange logits by shared memory, what many threads read is read by 16 bytes, and
// centroids and codes come into shared memory by themselves, a ring for each warp, a phase before
// they are used: registers would have no room for them. Logits are kept in units of log2, so that
// exp2 does.
#ifndef CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_CUH_
#define CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_CUH_

#include <algorithm>
#include <cstdint>

#include "kernels/base/cuda_util.cuh"
#include "kernels/codec/code_packing.cuh"
#include "kernels/select/select_cuda.h"
#include "kernels/select/threshold.cuh"

namespace clusterkv::kernels::cuda {

constexpr int kAnswerHeads = kQuadHeads;
constexpr int kAnswerQuads = 2;    // of a pair at most: one or two
constexpr int kAnswerDim = 128;    // channels
constexpr int kAnswerTile = 16;    // rows of one matrix product
constexpr int kAnswerParts = 8;    // parts that are copied into shared memory
constexpr int kAnswerBlocks = 16;  // of a pair at most, as of a quad
constexpr int kAnswerMaxWarps = 16;
constexpr int kAnswerGroups = 4;                 // scale groups of a token's codes
constexpr int kAnswerSideBytes = 48;             // of a token's key codes; of its value codes
constexpr int kAnswerRowBytes = 2 * kAnswerDim;  // of a centroid, of a value mean: halves
// Centroids come in slices of a tile: 64 channels of 16 rows.
constexpr int kAnswerSliceRow = 128, kAnswerSliceBytes = kAnswerTile * kAnswerSliceRow;
constexpr int kAnswerSlices = kAnswerRowBytes / kAnswerSliceRow;
// Places of a warp's rings at most.
constexpr int kCentroidStages = 2, kCodeStages = 8;
constexpr float kSumUnit = 8.0f;            // what sum_query was divided by beside code_unit
constexpr float kWeightUnit = 4096.0f;      // by which weights of tokens are halves
constexpr float kMeanUnit = 16384.0f;       // by which weights of clusters are, over their largest
constexpr int kAnswerRow = kAnswerDim + 8;  // of partial states: spreads banks

// What a launch works out once; by value into a kernel.
struct AnswerPlan {
  SelectCudaParams params;
  int blocks;              // of the cluster that answers a pair: block b is of quad b % quads
  int quads, quad_blocks;  // of the pair's heads; of a quad: the blocks that share its work
  uint32_t block_inverse;  // 2^20 / quad_blocks, rounded up
  int room;                // tokens to take clusters for, at most
  int max_listed;          // clusters that are touched at most
  // Of each warp: slices of centroids and tiles of codes on their way.
  int centroid_stages, code_stages;
  bool refine;         // score by codes
  bool far;            // clusters' logits are in memory
  float touched_unit;  // kMeanUnit over the most that a touched cluster weighs
  // Offsets of arrays in shared memory, bytes.
  int cluster_logits, sizes, slots, centroids, codes, token_logits, keys, kinds;
  int listed, listed_start, listed_slot, estimated, token_entry, exact, exact_token, exact_position,
      sinks;
  int shared_bytes;
};

// What has a fixed size in shared memory.
struct AnswerShared {
  DeviceIndexPart parts[kAnswerParts];
  ThresholdScratch threshold;  // its histogram: tokens per range of ranks
  alignas(16) int bin_counts[kHistogramBins];
  // Operands of products with centroids, with codes; and what these were divided by, per head.
  alignas(16) uint2 centroid_query[kAnswerDim / 16][kWarp];
  alignas(16) uint2 code_query[kAnswerDim / kCodeBlock][kWarp];
  alignas(16) float4 centroid_unit;
  alignas(16) float code_unit[kAnswerHeads];
  alignas(16) uint32_t sum_query[kWarp];                 // that of products with scales and lows
  alignas(16) float query[kAnswerHeads][kAnswerDim];     // weighted, times scale and log2 e
  alignas(16) float balanced[kAnswerHeads][kAnswerDim];  // that over the K balance
  alignas(16) float raw[kAnswerHeads][kAnswerDim];       // as it came, times scale and log2 e
  alignas(16) float inverse_v[kAnswerDim];               // 1 / V balance
  // Per warp, [kWarp][4 heads]: of the running softmax, of estimated and of coded logits, and the
  // state's weights.
  alignas(16) float warp_max[kWarp * 4], warp_sum[kWarp * 4], warp_estimated[kWarp * 4],
      warp_coded[kWarp * 4], warp_weights[kWarp * 4];
  alignas(16) float4 block_weights[kAnswerBlocks];  // of each block, from each block
  float state_parts[kAnswerHeads * kAnswerDim + kAnswerBlocks * kAnswerBlocks];  // from each block
  int2 scan[kWarp];
  int found_bin, found_tokens, found_count, candidates;  // where touched clusters or exact end
  int found_bin2, found_count2, candidates2;             // where estimated clusters end
  int touched, exact_count;
  int places[kThresholdCandidates];  // of clusters near where the touched ones end, in rank
};

inline int AnswerAlign(int64_t bytes) { return static_cast<int>((bytes + 15) / 16 * 16); }

// How many places of `bytes` from offset `from` on each warp of a block has for what is on its way,
// of `wanted` of the block; 0: not one within `limit`. Raises *end to where the places end.
inline int RingStages(int64_t wanted, int64_t most, int threads, int64_t bytes, int64_t from,
                      int64_t limit, int64_t* end) {
  const int64_t warps = threads / kWarp, fit = (limit - from) / (bytes * warps);
  const int64_t stages = std::clamp<int64_t>(std::min(fit, (wanted + warps - 1) / warps), 0, most);
  *end = std::max(*end, from + stages * bytes * warps);
  return static_cast<int>(stages);
}

// Bytes of memory for the clusters' logits of a pair.
__host__ __device__ inline int64_t AnswerFarBytes(const SelectCudaParams& p) {
  return int64_t{QuadsOf(p.group)} * p.max_clusters * static_cast<int64_t>(sizeof(float4));
}

// Fills `plan` for pairs answered by `blocks` blocks of `threads` threads each; far: with clusters'
// logits in memory. False: another shape, or its arrays do not fit in shared_limit bytes of shared
// memory.
inline bool MakeAnswerPlan(const SelectCudaParams& p, int blocks, int threads, int64_t shared_limit,
                           bool far, AnswerPlan* plan) {
  const bool refine = p.code_bits > 0 && p.scored_tokens > 0;
  const bool codes = !refine || (p.code_bits == 2 && p.group_channels == 32);
  const int quads = QuadsOf(p.group);
  if (quads > kAnswerQuads || blocks % quads != 0 || p.head_dim != kAnswerDim || !codes ||
      p.max_clusters > 16384) {
    return false;
  }
  *plan = {};
  plan->params = p;
  const int quad_blocks = blocks / quads;
  plan->blocks = blocks;
  plan->quads = quads;
  plan->quad_blocks = quad_blocks;
  plan->block_inverse =
      ((1u << 20) + static_cast<uint32_t>(quad_blocks) - 1) / static_cast<uint32_t>(quad_blocks);
  plan->refine = refine;
  plan->far = far;
  plan->room = p.budget_tokens > p.scored_tokens ? p.budget_tokens : p.scored_tokens;
  plan->max_listed = p.max_clusters < plan->room ? p.max_clusters : plan->room;
  plan->touched_unit = kMeanUnit;
  for (int64_t most = 1; most < plan->room; most *= 2) plan->touched_unit /= 2;
  const int64_t clusters = p.max_clusters + 4, room = plan->room, listed = plan->max_listed + 4;
  const int64_t partial = int64_t{16} * kAnswerHeads * kAnswerRow * 4;
  int64_t at = AnswerAlign(sizeof(AnswerShared));
  const auto take = [&at](int64_t bytes) {
    const int64_t here = at;
    at = here + AnswerAlign(bytes);
    return static_cast<int>(here < (int64_t{1} << 30) ? here : int64_t{1} << 30);
  };
  // Partial states lie where these two were.
  plan->cluster_logits = take(far ? 0 : 16 * clusters);
  plan->sizes = take(4 * clusters);
  if (at < plan->cluster_logits + partial) at = plan->cluster_logits + AnswerAlign(partial);
  plan->sinks = take(16 * int64_t{p.max_sinks});
  plan->token_logits = take(refine ? 16 * room : 0);
  plan->keys = take(4 * (clusters > room ? clusters : room));
  plan->kinds = take(clusters);
  plan->listed = take(2 * listed);
  plan->listed_start = take(2 * listed);
  plan->listed_slot = take(4 * listed);
  plan->estimated = take(2 * static_cast<int64_t>(p.estimated_fraction * p.max_clusters) + 8);
  plan->token_entry = take(2 * room);
  plan->exact = take(room);
  plan->exact_token = take(4 * int64_t{p.budget_tokens});
  plan->exact_position = take(4 * int64_t{p.budget_tokens});
  // Centroids on their way lie from token_logits on, which the choice of clusters does not use; the
  // slots behind them; codes on their way behind all else, where the slots were too.
  const int64_t slot_bytes = AnswerAlign(4 * clusters);
  const auto own = [quad_blocks](int64_t rows) {
    return ((rows + kAnswerTile - 1) / kAnswerTile + quad_blocks - 1) / quad_blocks;
  };
  plan->centroids = plan->token_logits;
  plan->codes = take(0);
  int64_t end = at;
  plan->centroid_stages =
      RingStages(kAnswerSlices * own(p.max_clusters), kCentroidStages, threads, kAnswerSliceBytes,
                 plan->centroids, shared_limit - slot_bytes, &end);
  plan->slots = static_cast<int>(end);
  end += slot_bytes;
  plan->code_stages =
      refine ? RingStages(own(room), kCodeStages, threads, kAnswerTile * kAnswerSideBytes,
                          plan->codes, shared_limit, &end)
             : 0;
  if (plan->centroid_stages == 0 || (refine && plan->code_stages == 0) || end > shared_limit) {
    return false;
  }
  plan->shared_bytes = static_cast<int>(end);
  return true;
}

inline bool IsLarge(const AnswerPlan& plan) { return plan.quads > 1 || plan.far; }

// ---- numbers of four heads
// ----------------------------------------------------------------------

__device__ __forceinline__ float4 Max4(float4 a, float4 b) {
  return make_float4(fmaxf(a.x, b.x), fmaxf(a.y, b.y), fmaxf(a.z, b.z), fmaxf(a.w, b.w));
}
__device__ __forceinline__ float4 Add4(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 Filled4(float x) { return make_float4(x, x, x, x); }
// a += w · b
__device__ __forceinline__ void AddScaled4(float4& a, float w, float4 b) {
  a = make_float4(a.x + w * b.x, a.y + w * b.y, a.z + w * b.z, a.w + w * b.w);
}
constexpr float kAnswerNegativeInfinity = -__builtin_huge_valf();
__device__ __forceinline__ float ZeroIfNone(float x) {
  return x == kAnswerNegativeInfinity ? 0.0f : x;
}
__device__ __forceinline__ float4 ZeroIfNone4(float4 x) {
  return make_float4(ZeroIfNone(x.x), ZeroIfNone(x.y), ZeroIfNone(x.z), ZeroIfNone(x.w));
}
__device__ __forceinline__ float4 Mul4(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
// 2^(x - shift)
__device__ __forceinline__ float4 Exp2Of4(float4 x, float4 shift) {
  return make_float4(Exp2(x.x - shift.x), Exp2(x.y - shift.y), Exp2(x.z - shift.z),
                     Exp2(x.w - shift.w));
}

// What other blocks of the cluster may have written before its last barrier: not from a first
// cache.
template <typename T>
__device__ __forceinline__ T LoadFar(const T* at) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  return *at;
#else
  return __ldcg(at);
#endif
}

// ---- a pair
// -------------------------------------------------------------------------------------

// One object per thread; all threads of all blocks of the pair's cluster construct it and call
// Begin, PrepareQueries, then Finish, together. After all have begun and before one finishes there
// is a barrier of the cluster, the caller's. `offset`: where in dynamic shared memory
// (SharedMemory()) are plan.shared_bytes for it, the same in each block, a multiple of 16; free
// again when Finish returns. `far`: where plan.far, the pair's memory of AnswerFarBytes, the same
// for all its blocks. kThreads: of a block. kLarge: for any plan, else for plans that are not
// IsLarge, which are spared what the others cost.
template <int kThreads, bool kLarge>
class PairAnswer {
  static constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kAnswerMaxWarps && kThreads % kAnswerDim == 0);

 public:
  __device__ __forceinline__ PairAnswer(const AnswerPlan& plan, int offset, int rank, void* far)
      : plan_(plan),
        offset_(offset),
        s_(*reinterpret_cast<AnswerShared*>(SharedMemory() + offset)),
        quad_(rank & (Quads() - 1)),
        rank_(rank >> (Quads() - 1)),
        far_(static_cast<float4*>(far) + quad_ * plan.params.max_clusters),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarp),
        warp_(thread_ / kWarp) {}

  // Everything that the queries are not needed for: asks for the first centroids, reads sizes. A
  // resident kernel calls it before the queries are there.
  __device__ __forceinline__ void Begin(const SelectCudaPair& pair);
  // Instead of all that follows: another object may begin.
  __device__ __forceinline__ void Abandon() const { CopyAsyncWait<0>(); }
  // The block's query heads: Heads() from FirstHead() on. Theirs: [Heads(), 128].
  __device__ __forceinline__ int FirstHead() const { return quad_ * kAnswerHeads; }
  __device__ __forceinline__ int Heads() const {
    return min(kAnswerHeads, plan_.params.group - FirstHead());
  }
  __device__ __forceinline__ void PrepareQueries(const float* queries);
  // Answers: row `row` of `out`. The results are written when all threads of all blocks have
  // returned; a fence is the caller's.
  __device__ __forceinline__ void Finish(const SelectCudaOutput& out, int row);
  // As Finish, for a caller that takes the results where they are, with all threads of a block:
  //   taker.Exact(answer)       of the last block, when the exact zone is known and the state is
  //                             not; may have barriers of the block
  //   taker.Pushed(answer)      of the last block, when what Exact began may have ended
  //   taker.Selection(answer)   of the last block
  //   taker.State(answer, any)  of every block; any: the state is not empty
  template <typename Taker>
  __device__ __forceinline__ void Answer(Taker& taker);
  // For takers. Exact token i, counted from 0: its part and its head-local slot there.
  __device__ __forceinline__ int ExactCount() const { return s_.exact_count; }
  __device__ __forceinline__ const DeviceIndexPart& ExactToken(int i, int* slot) {
    const int token = Array<int>(plan_.exact_token)[i];
    *slot = SlotOf(token);
    return PartOf(Listed()[TokenEntry()[token]]);
  }
  // The block has StateCount() numbers, an even count, of the state [group, 128] from StateBegin()
  // on: number i of them; and the log-sum-exps of LseCount() of its heads: that of head i.
  __device__ __forceinline__ int StateBegin() const {
    return FirstHead() * kAnswerDim + rank_ * StateShare();
  }
  __device__ __forceinline__ int StateCount() const {
    return max(0, min(StateShare(), Heads() * kAnswerDim - rank_ * StateShare()));
  }
  __device__ __forceinline__ float StateNumber(int i, bool any) const;
  __device__ __forceinline__ int LseCount() const { return rank_ == 0 ? Heads() : 0; }
  __device__ __forceinline__ float StateLse(int i, bool any) const;

 private:
  template <typename T>
  __device__ __forceinline__ T* Array(int offset) const {
    return reinterpret_cast<T*>(SharedMemory() + offset_ + offset);
  }
  __device__ __forceinline__ bool IsFar() const { return kLarge && plan_.far; }
  __device__ __forceinline__ float4 ClusterLogits(int cluster) {
    return IsFar() ? LoadFar(far_ + cluster) : Array<float4>(plan_.cluster_logits)[cluster];
  }
  __device__ __forceinline__ float4* TokenLogits() { return Array<float4>(plan_.token_logits); }
  __device__ __forceinline__ int* Sizes() { return Array<int>(plan_.sizes); }
  __device__ __forceinline__ uint32_t* Keys() { return Array<uint32_t>(plan_.keys); }
  // Of clusters: 0 out, 1 touched, 2 estimated.
  __device__ __forceinline__ unsigned char* Kinds() { return Array<unsigned char>(plan_.kinds); }
  __device__ __forceinline__ unsigned char* Exact() { return Array<unsigned char>(plan_.exact); }
  __device__ __forceinline__ uint16_t* Listed() { return Array<uint16_t>(plan_.listed); }
  __device__ __forceinline__ uint16_t* ListedStart() { return Array<uint16_t>(plan_.listed_start); }
  __device__ __forceinline__ int* ListedSlot() { return Array<int>(plan_.listed_slot); }
  __device__ __forceinline__ uint16_t* Estimated() { return Array<uint16_t>(plan_.estimated); }
  __device__ __forceinline__ uint16_t* TokenEntry() { return Array<uint16_t>(plan_.token_entry); }
  __device__ __forceinline__ float* Partial() { return Array<float>(plan_.cluster_logits); }

  __device__ __forceinline__ const DeviceIndexPart& PartOf(int cluster, int* part_index) const {
    int k = part_count_ - 1;
    while (k > 0 && parts_[k].first_cluster > cluster) --k;
    *part_index = k;
    return parts_[k];
  }
  __device__ __forceinline__ const DeviceIndexPart& PartOf(int cluster) const {
    int k;
    return PartOf(cluster, &k);
  }
  // Element of a view [kv_heads, rows of a head].
  __device__ __forceinline__ const unsigned char* Element(const DevicePagedView& view, int rows,
                                                          int row) const {
    return view.At(static_cast<uint32_t>(kv_head_) * static_cast<uint32_t>(rows) +
                   static_cast<uint32_t>(row));
  }
  __device__ __forceinline__ const unsigned char* ValueMean(int cluster) const {
    const DeviceIndexPart& part = PartOf(cluster);
    return Element(part.value_means, part.clusters, cluster - part.first_cluster);
  }
  __device__ __forceinline__ int SlotOf(int token) {
    const int entry = TokenEntry()[token];
    return ListedSlot()[entry] + token - ListedStart()[entry];
  }
  __device__ __forceinline__ const unsigned char* CodesOf(int token) {
    const DeviceIndexPart& part = PartOf(Listed()[TokenEntry()[token]]);
    return Element(part.codes, part.tokens, SlotOf(token));
  }
  // x / quad_blocks, for multiples of quad_blocks below 2^20 exact.
  __device__ __forceinline__ int ShareOf(int x) const {
    return static_cast<int>(static_cast<uint64_t>(x) * plan_.block_inverse >> 20);
  }
  __device__ __forceinline__ int Quads() const { return !kLarge ? 1 : plan_.quads; }
  // Which of the cluster's blocks is block k of this one's quad.
  __device__ __forceinline__ int BlockOf(int k) const { return k * Quads() + quad_; }
  // Of the cluster's blocks: writes the selection.
  __device__ __forceinline__ bool IsLast() const { return BlockOf(rank_) == plan_.blocks - 1; }
  // The other quad's block of this one's rank; -1: there is none.
  __device__ __forceinline__ int Peer() const { return Quads() == 1 ? -1 : BlockOf(rank_) ^ 1; }
  // Of the quad's numbers: what a block has of the state at most.
  __device__ __forceinline__ int StateShare() const {
    return (kAnswerHeads * kAnswerDim / 2 + plan_.quad_blocks - 1) / plan_.quad_blocks * 2;
  }
  // The block's share of tiles of 16 rows.
  __device__ __forceinline__ void Share(int rows, int* begin, int* end) const {
    const int tiles = (rows + kAnswerTile - 1) / kAnswerTile;
    *begin = ShareOf(tiles * rank_);
    *end = ShareOf(tiles * (rank_ + 1));
  }

  // answer_pair-inl.cuh, in the order of their use.
  __device__ __forceinline__ void CopyParts(const SelectCudaPair& pair);
  __device__ __forceinline__ void PrefetchPages();
  __device__ __forceinline__ void LoadSizes();
  __device__ __forceinline__ const unsigned char* CentroidOfTile(int tile) const;
  __device__ __forceinline__ unsigned char* CentroidRing(int turn) const;
  __device__ __forceinline__ void FetchCentroids(int turn);
  __device__ __forceinline__ void MultiplySlice(int slice, int turn, float (&sums)[4][4]);
  template <typename Channel>
  __device__ __forceinline__ float MakeOperands(const float* query, int head,
                                                uint2 (*operands)[kWarp], const Channel& channel);
  __device__ __forceinline__ void PrepareCodeSums(int head, float inverse);
  __device__ __forceinline__ float4 TileRow(float (&sum)[4]) const;
  __device__ __forceinline__ void Publish(float4* row, float4 logits);
  __device__ __forceinline__ void ScoreCentroids();
  __device__ __forceinline__ void ScoreSinks();
  __device__ __forceinline__ void ChooseClusters();
  __device__ __forceinline__ void ChooseEstimated(int wanted);
  __device__ __forceinline__ void ListClusters();
  __device__ __forceinline__ void ListTokens();
  __device__ __forceinline__ float4 CombineWarps(const float* of_warps) const;
  __device__ __forceinline__ const unsigned char* CodesOfTile(int tile);
  __device__ __forceinline__ unsigned char* CodeRing(int turn) const;
  template <bool kValues>
  __device__ __forceinline__ void CopyCodes(const unsigned char* mine, int turn);
  template <bool kValues>
  __device__ __forceinline__ void FillRing();
  template <bool kValues, typename Use>
  __device__ __forceinline__ void ForTiles(const Use& use);
  template <typename Done>
  __device__ __forceinline__ void ScoreTile(int tile, const unsigned char* rows, const Done& done);
  __device__ __forceinline__ void ScoreTokens();
  __device__ __forceinline__ void PrefetchMeans(const uint16_t* list, int count);
  template <typename Weigh>
  __device__ __forceinline__ void SumMeans(const uint16_t* list, int count, float unit,
                                           const Weigh& weigh, float (&joined)[4][4]);
  __device__ __forceinline__ void JoinMeans(const float (&sums)[8][4], float inverse,
                                            float (&joined)[4][4]) const;
  __device__ __forceinline__ float* PartialOf(int block_pair, int i);
  __device__ __forceinline__ void SumEstimated();
  __device__ __forceinline__ void ChooseExact();
  __device__ __forceinline__ void WeighTokens();
  __device__ __forceinline__ void SumTouched();
  __device__ __forceinline__ int LargestScale(const unsigned char* rows) const;
  struct CodeSums;
  template <typename Done>
  __device__ __forceinline__ void AddTile(int tile, const unsigned char* rows, const Done& done,
                                          CodeSums& sums);
  __device__ __forceinline__ void AddCodes(const CodeSums& sums);
  __device__ __forceinline__ void SumCodes();
  __device__ __forceinline__ void WeighState(bool coded);
  __device__ __forceinline__ void SumState(bool coded);
  __device__ __forceinline__ int ExactPosition(int i);
  __device__ __forceinline__ void WriteSelection(const SelectCudaOutput& out, int row);
  __device__ __forceinline__ void WriteState(const SelectCudaOutput& out, int row, bool any);
  __device__ __forceinline__ float StateWeight(int head) const;

  struct Writer {
    const SelectCudaOutput& out;
    int row;
    int position = 0;  // of exact token threadIdx.x: asked for early

    __device__ __forceinline__ void Exact(PairAnswer& answer) {
      const int i = answer.thread_, exact = answer.ExactCount();
      if (i < exact) position = answer.ExactPosition(i);
    }
    __device__ __forceinline__ void Pushed(PairAnswer& answer) const {
      const int exact = answer.ExactCount();
      for (int i = answer.thread_; i < exact; i += kThreads) {
        answer.template Array<int>(answer.plan_.exact_position)[i] =
            i < kThreads ? position : answer.ExactPosition(i);
      }
    }
    __device__ __forceinline__ void Selection(PairAnswer& answer) const {
      answer.WriteSelection(out, row);
    }
    __device__ __forceinline__ void State(PairAnswer& answer, bool any) const {
      answer.WriteState(out, row, any);
    }
  };

  const AnswerPlan& plan_;
  const int offset_;
  AnswerShared& s_;
  const int quad_, rank_;  // rank_: of the quad's blocks
  float4* const far_;      // the quad's clusters' logits, where they are in memory
  const int thread_, lane_, warp_;

  int part_count_ = 0, clusters_ = 0, kv_head_ = 0, sinks_ = 0;
  const DeviceIndexPart* parts_ = nullptr;
  const unsigned char* sink_keys_ = nullptr;
  int64_t sink_stride_ = 0;
  int tile_end_ = 0, tile_ = 0, slice_ = 0;              // of the warp's next slice of centroids
  const unsigned char* centroid_[kAnswerTile / 4] = {};  // where its rows lane / 8 + 4 i are
  float weight_ = 0, balance_ = 0;                       // of channel thread_ % 128
  int listed_count_ = 0, token_count_ = 0, estimated_count_ = 0;
  float state_[4][4];  // the warp's part of the estimated zone: what PartialOf(i, j) names
  float weights_ = 0;  // of head lane / 4 % 4: the lane's part of the weights' sum
  float4 estimated_max_, state_max_;
};

}  // namespace clusterkv::kernels::cuda

#include "kernels/select/answer_pair-inl.cuh"

#endif  // CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_CUH_
