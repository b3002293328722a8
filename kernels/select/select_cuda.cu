// The fused select kernel: one thread-block cluster of `blocks` blocks per (sequence, KV head)
// pair.
//
//   1  scores of the centroids            each block its share of the clusters
//      -- barrier of the cluster
//   2  softmax, rank, clusters to score   every block all of it: cheaper than to share
//   3  scores of their tokens by codes    each block its share of the tokens, on the matrix unit
//      -- barrier
//   4  softmax, exact zone                every block all of it; block 0 writes it out
//   5  coded and estimated state          each block its share
//      -- barrier
//   6  sum of the blocks' states
//
// Logits are kept in units of log2, so that exp2 does.
#include <algorithm>

#include "kernels/base/cuda_util.cuh"
#include "kernels/codec/code_packing.cuh"
#include "kernels/select/answer_cuda.h"
#include "kernels/select/resident_clusters.h"
#include "kernels/select/select_cuda.h"
#include "kernels/select/threshold.cuh"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kChunk = 128;  // channels that a warp's accumulators hold at a time
constexpr int kPartCopies = 4;
constexpr int kTile = 16;  // tokens of one matrix product
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// What the launcher works out from SelectCudaParams.
struct Plan {
  SelectCudaParams params;
  CodesLayout codes;
  int blocks;        // per pair
  int head_blocks;   // ceil(group / 8)
  int room;          // tokens to take clusters for
  int exact_room;    // exact tokens besides sinks when refining: budget (sinks are subtracted per
                     // pair)
  bool refine;       // score by codes
  bool usual_codes;  // 2 bits, 128 channels, groups of 32: three loads of 16 bytes per token
  int max_listed;    // touched clusters at most: min(max_clusters, room)
  int max_estimated;
  int max_exact;  // capacity of the exact list
  int64_t shared_bytes;
  // Workspace, offsets in bytes.
  int64_t pair_bytes, block_bytes;
  int64_t cluster_scores, sink_scores, token_scores, states;  // in the pair's part
};

__host__ __device__ constexpr int64_t Align(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// ---- a block's arrays
// ------------------------------------------------------------------------------

// Hands out arrays from shared memory while it lasts, then from the block's part of the workspace.
// Every thread of every block makes the same calls, so all agree. On the host: counts.
struct Bump {
  unsigned char* shared;
  unsigned char* spill;
  int64_t shared_left;
  int64_t spilled;
  int64_t used;

  template <typename T>
  __host__ __device__ T* Take(int64_t count) {
    const int64_t bytes = Align(count * static_cast<int64_t>(sizeof(T)));
    if (bytes <= shared_left) {
      shared_left -= bytes;
      used += bytes;
      T* at = reinterpret_cast<T*>(shared);
      shared += bytes;
      return at;
    }
    T* at = reinterpret_cast<T*>(spill);
    spill += bytes;
    spilled += bytes;
    return at;
  }
};

struct Arrays {
  ThresholdScratch* threshold;
  float* reduce;       // [kWarps, 4]
  int* flags;          // [8]: small shared words
  uint4* query_hi_lo;  // [head_blocks, D / 16, 32]: fragments of the balanced query, hi (x, y), lo
                       // (z, w)
  float* query;        // [group, D]: weighted query, times scale and log2 e
  float* query_sums;   // [head_blocks * 8, groups]: of the balanced query over each scale group
  float* inverse_v;    // [D]: 1 / V balance
  float* query_unit;   // [head_blocks * 8]: what hi and lo were divided by
  float* head_max;     // [group]
  float* head_sum;     // [group]; of a softmax whose ranks are wanted: its log2-sum-exp2
  uint32_t* cluster_keys;      // [max_clusters]: RankKey
  int* cluster_sizes;          // [max_clusters]
  int* cluster_slots;          // [max_clusters]: the first of each
  float* cluster_scores;       // [group, max_clusters]: logits in units of log2
  int* listed;                 // [max_listed]: touched clusters, ascending
  int* listed_start;           // [max_listed + 1]: first of its tokens among the scored tokens
  int* listed_slot;            // [max_listed]: its first slot
  uint16_t* listed_part;       // [max_listed]
  uint16_t* token_entry;       // [room]: index into listed
  uint32_t* token_keys;        // [room]; where cluster_keys were
  int* exact_token;            // [max_exact]
  int* exact_position;         // [max_exact]
  unsigned char* token_exact;  // [room]
  int* estimated;              // [max_estimated]
  float* token_weights;        // [group, room]: logits, then weights
  float* listed_weights;       // [group, max_listed]
  float* estimated_weights;    // [group, max_estimated]
  float* partial;              // [kWarps, group, D]
  float* partial_low;          // [kWarps, 8, groups]
};

__host__ __device__ Arrays MakeArrays(const Plan& plan, Bump& bump) {
  const SelectCudaParams& p = plan.params;
  const int64_t heads = plan.head_blocks * 8;
  const int64_t groups = plan.codes.groups;
  Arrays a;
  a.threshold = bump.Take<ThresholdScratch>(1);
  a.reduce = bump.Take<float>(kWarps * 4);
  a.flags = bump.Take<int>(8);
  a.head_max = bump.Take<float>(p.group);
  a.head_sum = bump.Take<float>(p.group);
  a.query_unit = bump.Take<float>(heads);
  a.inverse_v = bump.Take<float>(p.head_dim);
  a.query = bump.Take<float>(static_cast<int64_t>(p.group) * p.head_dim);
  a.query_sums = bump.Take<float>(heads * groups);
  a.query_hi_lo = bump.Take<uint4>(plan.refine ? plan.head_blocks * (p.head_dim / 16) * 32 : 0);
  a.cluster_keys = a.token_keys = bump.Take<uint32_t>(max(p.max_clusters, plan.room));
  a.cluster_sizes = bump.Take<int>(p.max_clusters);
  a.cluster_slots = bump.Take<int>(p.max_clusters);
  a.listed = bump.Take<int>(plan.max_listed);
  a.listed_start = bump.Take<int>(plan.max_listed + 1);
  a.listed_slot = bump.Take<int>(plan.max_listed);
  a.listed_part = bump.Take<uint16_t>(plan.max_listed);
  a.token_entry = bump.Take<uint16_t>(plan.room);
  a.exact_token = bump.Take<int>(plan.max_exact);
  a.exact_position = bump.Take<int>(plan.max_exact);
  a.token_exact = bump.Take<unsigned char>(plan.room);
  a.estimated = bump.Take<int>(plan.max_estimated);
  a.cluster_scores = bump.Take<float>(static_cast<int64_t>(p.group) * p.max_clusters);
  a.partial_low = bump.Take<float>(plan.refine ? kWarps * 8 * groups : 0);
  a.partial = bump.Take<float>(static_cast<int64_t>(kWarps) * p.group * p.head_dim);
  a.token_weights = bump.Take<float>(plan.refine ? static_cast<int64_t>(p.group) * plan.room : 0);
  a.listed_weights =
      bump.Take<float>(plan.refine ? static_cast<int64_t>(p.group) * plan.max_listed : 0);
  a.estimated_weights = bump.Take<float>(static_cast<int64_t>(p.group) * plan.max_estimated);
  return a;
}

// What all threads of a block know; in shared memory, so that it takes no registers. Written by
// thread 0, a barrier before others read.
struct Context {
  Plan plan;
  SelectCudaPair pair;
  int pair_index, rank;  // rank: of the block in its cluster
  Arrays a;
  const DeviceIndexPart* parts;  // part_copies where they have room
  DeviceIndexPart part_copies[kPartCopies];
  // Where the blocks of a pair give each other their shares of what a.cluster_scores and
  // a.token_weights then hold; with one block the same memory.
  float* cluster_scores;  // [group, max_clusters]
  float* sink_scores;     // [group, max_sinks]
  float* token_scores;    // [group, room]
  float* states;          // [blocks, group, D]
  int listed_count, token_count, estimated_count, exact_count;

  __device__ const SelectCudaParams& params() const { return plan.params; }
  __device__ const DeviceIndexPart& PartOf(int cluster, int* part_index) const {
    int low = 0, high = pair.part_count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (parts[middle].first_cluster <= cluster) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    *part_index = low;
    return parts[low];
  }
};

// Of four numbers of each thread, over the block: their largest, or their sum in a fixed order.
template <bool kSum>
__device__ void BlockReduce(float (&x)[4], float* reduce) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = kSum ? WarpSum(x[i]) : WarpMax(x[i]);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    *reinterpret_cast<float4*>(reduce + threadIdx.x / kWarp * 4) =
        make_float4(x[0], x[1], x[2], x[3]);
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float4 y = *reinterpret_cast<const float4*>(reduce + w * 4);
    const float of[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = w == 0 ? of[i] : kSum ? x[i] + of[i] : fmaxf(x[i], of[i]);
  }
}

// ---- phase 0: queries
// ---------------------------------------------------------------------------------

// The weighted query; for the codes also balanced, split in halves and laid out as matrix
// fragments.
__device__ void PrepareQueries(Context& c) {
  const SelectCudaParams& p = c.params();
  const int dim = p.head_dim;
  const float* channels = c.parts[0].channels.As<float>(c.pair.kv_head);  // [3, D]
  float* balanced = c.a.partial;  // [group, D], until the state needs it
  for (int i = threadIdx.x; i < p.group * dim; i += kThreads) {
    const float query = c.pair.queries[i], weight = channels[i % dim];
    const float balance = channels[dim + i % dim];
    c.a.query[i] = query * p.scale * kLog2E / weight;
    if (c.plan.refine) balanced[i] = c.a.query[i] / balance;
  }
  for (int j = threadIdx.x; j < dim; j += kThreads) c.a.inverse_v[j] = 1.0f / channels[2 * dim + j];
  __syncthreads();
  if (!c.plan.refine) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Sums over scale groups, a few lanes each; and a power of two that brings the head's largest
  // channel to [2^11, 2^12).
  for (int h = warp; h < c.plan.head_blocks * 8; h += kWarps) {
    float largest = 0;
    for (int j = lane; j < dim && h < p.group; j += kWarp) {
      largest = fmaxf(largest, fabsf(balanced[h * dim + j]));
    }
    largest = WarpMax(largest);
    const int exponent = largest > 0 ? static_cast<int>(__float_as_uint(largest) >> 23) - 127 : 0;
    if (lane == 0) c.a.query_unit[h] = exp2f(static_cast<float>(exponent - 11));
    for (int g = 0; g < c.plan.codes.groups; ++g) {
      float sum = 0;
      for (int j = lane; j < p.group_channels && h < p.group; j += kWarp) {
        sum += balanced[h * dim + g * p.group_channels + j];
      }
      sum = WarpSum(sum);
      if (lane == 0) c.a.query_sums[h * c.plan.codes.groups + g] = sum;
    }
  }
  __syncthreads();
  const int blocks = dim / kCodeBlock;
  for (int i = threadIdx.x; i < c.plan.head_blocks * blocks * kWarp; i += kThreads) {
    const int l = i % kWarp, block = i / kWarp % blocks, h = i / (kWarp * blocks) * 8 + l / 4;
    const int t = l % 4;
    uint4 fragment = make_uint4(0, 0, 0, 0);
    if (h < p.group) {
      const float inverse = 1.0f / c.a.query_unit[h];
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int channel = block * kCodeBlock + ChannelOfIndex(2 * t + j % 2 + j / 2 * 8);
        x[j] = balanced[h * dim + channel] * inverse;
      }
      SplitHalves(x[0], x[1], &fragment.x, &fragment.z);
      SplitHalves(x[2], x[3], &fragment.y, &fragment.w);
    }
    c.a.query_hi_lo[i] = fragment;
  }
}

// ---- phase 1: centroids
// --------------------------------------------------------------------------------

__device__ void LoadSizes(Context& c) {
  for (int k = 0; k < c.pair.part_count; ++k) {
    const DeviceIndexPart& part = c.parts[k];
    const uint32_t base = static_cast<uint32_t>(c.pair.kv_head) * (part.clusters + 1);
#pragma unroll 4
    for (int i = threadIdx.x; i < part.clusters; i += kThreads) {
      const int begin = *part.cluster_begin.As<int32_t>(base + i);
      const int end = *part.cluster_begin.As<int32_t>(base + i + 1);
      c.a.cluster_sizes[part.first_cluster + i] = end - begin;
      c.a.cluster_slots[part.first_cluster + i] = begin;
    }
  }
}

// Rows [head_dim] of halves of eight clusters, 4 kVectors channels per lane and row, all in flight
// at once.
template <int kVectors>
struct EightRows {
  float4 row[8][kVectors];

  __device__ __forceinline__ void Load(const unsigned char* mine, int dim) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned char* at = reinterpret_cast<const unsigned char*>(
          __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(mine), i));
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int channel = 4 * (lane + v * kWarp);
        const uint2 halves =
            channel < dim ? *reinterpret_cast<const uint2*>(at + 2 * channel) : make_uint2(0, 0);
        row[i][v] = make_float4(HalfBitsToFloat(static_cast<uint16_t>(halves.x)),
                                HalfBitsToFloat(static_cast<uint16_t>(halves.x >> 16)),
                                HalfBitsToFloat(static_cast<uint16_t>(halves.y)),
                                HalfBitsToFloat(static_cast<uint16_t>(halves.y >> 16)));
      }
    }
  }
};

template <int kVectors>
__device__ void ScoreCentroids(Context& c) {
  const SelectCudaParams& p = c.params();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, dim = p.head_dim;
  const int share = (c.pair.clusters + c.plan.blocks * 8 - 1) / (c.plan.blocks * 8) * 8;
  const int begin = c.rank * share, end = min(c.pair.clusters, begin + share);
  const auto fetch = [&](int first, EightRows<kVectors>* rows) {
    const int mine = min(first + lane % 8, end - 1);
    int part_index;
    const DeviceIndexPart& part = c.PartOf(mine, &part_index);
    rows->Load(part.centroids.At(static_cast<uint32_t>(c.pair.kv_head) * part.clusters +
                                 static_cast<uint32_t>(mine - part.first_cluster)),
               dim);
  };
  EightRows<kVectors> rows;
  for (int first = begin + warp * 8; first < end; first += kWarps * 8) {
    fetch(first, &rows);
    for (int h4 = 0; h4 < p.group; h4 += 4) {
      float sums[32];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        float4 q[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int channel = 4 * (lane + v * kWarp);
          q[v] = channel < dim && h4 + h < p.group
                     ? *reinterpret_cast<const float4*>(c.a.query + (h4 + h) * dim + channel)
                     : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float sum = 0;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const float4 x = rows.row[i][v];
            sum += x.x * q[v].x + x.y * q[v].y + x.z * q[v].z + x.w * q[v].w;
          }
          sums[i * 4 + h] = sum;
        }
      }
      const float sum = WarpTransposeSum(sums);
      const int cluster = first + lane / 4, head = h4 + lane % 4;
      if (cluster < end && head < p.group) {
        c.cluster_scores[static_cast<int64_t>(head) * p.max_clusters + cluster] =
            c.a.cluster_sizes[cluster] > 0 ? sum : kNegativeInfinity;
      }
    }
  }
}

// Sinks' scores by their keys as they came.
__device__ void ScoreSinks(Context& c) {
  const SelectCudaParams& p = c.params();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = c.rank * kWarps + warp; i < c.pair.sink_tokens * p.group;
       i += c.plan.blocks * kWarps) {
    const int sink = i % c.pair.sink_tokens, head = i / c.pair.sink_tokens;
    const unsigned char* key = c.pair.sink_keys + sink * c.pair.sink_key_stride_bytes;
    float sum = 0;
    for (int j = lane; j < p.head_dim; j += kWarp) {
      sum += c.pair.queries[head * p.head_dim + j] * LoadAsFloat(key, p.element_type, j);
    }
    sum = WarpSum(sum);
    if (lane == 0) c.sink_scores[head * p.max_sinks + sink] = sum * p.scale * kLog2E;
  }
}

// ---- phase 2: clusters
// ---------------------------------------------------------------------------------

// Brings scores [group, stride], the first n of each head, that the blocks gave each other, into
// this block's memory. Each thread what SoftmaxKeys has it read.
__device__ void GatherScores(const Context& c, const float* from, int stride, int n, float* to) {
  if (from == to) return;
  for (int h = 0; h < c.params().group; ++h) {
    const int64_t row = static_cast<int64_t>(h) * stride;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kThreads) to[row + i] = from[row + i];
  }
}

// keys[i] = RankKey of the sum over the heads of the softmax of scores [group, stride] over i < n
// (and over extra [group, extra_stride], whose own ranks are not wanted). Logarithms, so that
// nothing underflows.
__device__ void SoftmaxKeys(Context& c, const float* scores, int stride, int n, const float* extra,
                            int extra_stride, int extra_count, uint32_t* keys) {
  const int group = c.params().group;
  for (int h4 = 0; h4 < group; h4 += 4) {
    const int heads = min(4, group - h4);
    float largest[4], sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      largest[h] = kNegativeInfinity;
      if (h >= heads) continue;
      const float* row = scores + static_cast<int64_t>(h4 + h) * stride;
#pragma unroll 4
      for (int i = threadIdx.x; i < n; i += kThreads) largest[h] = fmaxf(largest[h], row[i]);
      for (int i = threadIdx.x; i < extra_count; i += kThreads) {
        largest[h] = fmaxf(largest[h], extra[(h4 + h) * extra_stride + i]);
      }
    }
    BlockReduce<false>(largest, c.a.reduce);
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      if (largest[h] == kNegativeInfinity) largest[h] = 0;
      if (h >= heads) continue;
      const float* row = scores + static_cast<int64_t>(h4 + h) * stride;
#pragma unroll 4
      for (int i = threadIdx.x; i < n; i += kThreads) sum[h] += Exp2(row[i] - largest[h]);
      for (int i = threadIdx.x; i < extra_count; i += kThreads) {
        sum[h] += Exp2(extra[(h4 + h) * extra_stride + i] - largest[h]);
      }
    }
    BlockReduce<true>(sum, c.a.reduce);
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      if (static_cast<int>(threadIdx.x) == h && h < heads) {
        c.a.head_sum[h4 + h] = largest[h] + log2f(sum[h]);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    float largest = kNegativeInfinity;
    for (int h = 0; h < group; ++h) {
      largest = fmaxf(largest, scores[static_cast<int64_t>(h) * stride + i] - c.a.head_sum[h]);
    }
    if (largest == kNegativeInfinity) largest = 0;  // an empty cluster: its weight keeps it out
    float sum = 0;
    for (int h = 0; h < group; ++h) {
      sum += Exp2(scores[static_cast<int64_t>(h) * stride + i] - c.a.head_sum[h] - largest);
    }
    keys[i] = RankKey(largest + log2f(sum));
  }
  __syncthreads();
}

// The clusters to score and the estimated ones.
__device__ void ChooseClusters(Context& c) {
  const Arrays& a = c.a;
  const int n = c.pair.clusters;
  const int stride = c.params().max_clusters;
  GatherScores(c, c.cluster_scores, stride, n, a.cluster_scores);
  SoftmaxKeys(c, a.cluster_scores, stride, n, nullptr, 0, 0, a.cluster_keys);
  const auto key = [&](int i) { return a.cluster_keys[i]; };
  const auto size = [&](int i) { return a.cluster_sizes[i]; };
  const int room =
      max(c.params().scored_tokens, max(0, c.params().budget_tokens - c.pair.sink_tokens));
  const Threshold threshold = WeightedThreshold<kThreads>(n, room, key, size, *a.threshold);
  // A cluster that is touched leaves the ranking: its size becomes 0 for the estimated zone.
  int tokens;
  const int listed = OrderedTake<kThreads>(
      n, threshold, key, size, *a.threshold,
      [&](int i, int take, int index, int before) {
        if (take == 0) return;
        a.listed[index] = i;
        a.listed_start[index] = before;
      },
      &tokens);
  if (threadIdx.x == 0) {
    a.listed_start[listed] = tokens;
    c.listed_count = listed;
    c.token_count = tokens;
    c.estimated_count = 0;
  }
  for (int e = threadIdx.x; e < listed; e += kThreads) {
    int part_index;
    c.PartOf(a.listed[e], &part_index);
    a.listed_part[e] = static_cast<uint16_t>(part_index);
    a.listed_slot[e] = a.cluster_slots[a.listed[e]];
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int e = warp; e < listed; e += kWarps) {
    const int end = e + 1 < listed ? a.listed_start[e + 1] : tokens;
    for (int t = a.listed_start[e] + lane; t < end; t += kWarp) {
      a.token_entry[t] = static_cast<uint16_t>(e);
    }
  }
  __syncthreads();
  const int wanted = static_cast<int>(static_cast<double>(c.params().estimated_fraction) * n);
  if (wanted > 0) {
    for (int e = threadIdx.x; e < listed; e += kThreads) a.cluster_sizes[a.listed[e]] = 0;
    __syncthreads();
    const auto one = [&](int i) { return a.cluster_sizes[i] > 0 ? 1 : 0; };
    const Threshold last = WeightedThreshold<kThreads>(n, wanted, key, one, *a.threshold);
    int total;
    const int estimated = OrderedTake<kThreads>(
        n, last, key, one, *a.threshold,
        [&](int i, int take, int index, int) {
          if (take > 0) a.estimated[index] = i;
        },
        &total);
    if (threadIdx.x == 0) c.estimated_count = estimated;
  }
  __syncthreads();
}

// ---- phase 3: tokens
// -----------------------------------------------------------------------------------

__device__ __forceinline__ const unsigned char* CodesOf(const Context& c, int token) {
  const int entry = c.a.token_entry[token];
  const DeviceIndexPart& part = c.parts[c.a.listed_part[entry]];
  const int slot = c.a.listed_slot[entry] + token - c.a.listed_start[entry];
  return part.codes.At(static_cast<uint32_t>(c.pair.kv_head) * part.tokens + slot);
}

__device__ __forceinline__ void TileRange(const Context& c, int* begin, int* end) {
  const int tiles = (c.token_count + kTile - 1) / kTile;
  *begin = static_cast<int>(static_cast<int64_t>(tiles) * c.rank / c.plan.blocks);
  *end = static_cast<int>(static_cast<int64_t>(tiles) * (c.rank + 1) / c.plan.blocks);
}

// Logits of the block's share of the scored tokens: codes [16 tokens × 16 channels] times query
// [16 channels × 8 heads], twice, for the query's high and low halves.
template <int kBits>
__device__ void ScoreTokens(Context& c) {
  const SelectCudaParams& p = c.params();
  const CodesLayout& layout = c.plan.codes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  const int blocks = p.head_dim / kCodeBlock;
  int begin, end;
  TileRange(c, &begin, &end);
  for (int tile = begin + warp; tile < end; tile += kWarps) {
    const int token[2] = {tile * kTile + r, tile * kTile + r + 8};
    const unsigned char* row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) row[i] = CodesOf(c, min(token[i], c.token_count - 1));
    for (int hb = 0; hb < c.plan.head_blocks; ++hb) {
      float logit[4] = {0, 0, 0, 0}, sum[4] = {0, 0, 0, 0};
      float unit[2], query_sum[2];
      for (int chunk = 0; chunk < blocks; chunk += kChunk / kCodeBlock) {
        CodeBlock<kBits> codes[2][kChunk / kCodeBlock];
#pragma unroll
        for (int b = 0; b < kChunk / kCodeBlock; ++b) {
          if (chunk + b >= blocks) break;
          codes[0][b].Load(row[0] + layout.KeyBits(), p.head_dim, chunk + b);
          codes[1][b].Load(row[1] + layout.KeyBits(), p.head_dim, chunk + b);
        }
#pragma unroll
        for (int b = 0; b < kChunk / kCodeBlock; ++b) {
          const int block = chunk + b;
          if (block >= blocks) break;
          const uint4 q = c.a.query_hi_lo[(hb * blocks + block) * kWarp + lane];
          uint32_t operand[4];
          codes[0][b].ChannelPairs(t, &operand[0], &operand[2]);
          codes[1][b].ChannelPairs(t, &operand[1], &operand[3]);
          MmaHalf(sum, operand, q.x, q.y);
          MmaHalf(sum, operand, q.z, q.w);
          if ((block + 1) % layout.group_blocks != 0) continue;
          const int g = block / layout.group_blocks;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            unit[i] = c.a.query_unit[hb * 8 + 2 * t + i];
            query_sum[i] = c.a.query_sums[(hb * 8 + 2 * t + i) * layout.groups + g];
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint16_t* halves = reinterpret_cast<const uint16_t*>(row[i]);
            const float scale = HalfBitsToFloat(halves[g]);
            const float low = HalfBitsToFloat(halves[layout.groups + g]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              logit[2 * i + j] += scale * (sum[2 * i + j] * unit[j]) + low * query_sum[j];
              sum[2 * i + j] = 0;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = hb * 8 + 2 * t + i % 2, at = token[i / 2];
        if (head >= p.group || at >= c.token_count) continue;
        const int cluster = c.a.listed[c.a.token_entry[at]];
        c.token_scores[static_cast<int64_t>(head) * c.plan.room + at] =
            logit[i] + c.a.cluster_scores[static_cast<int64_t>(head) * p.max_clusters + cluster];
      }
    }
  }
}

// The codes of one token, 2 bits in groups of 32 of 128 channels (Plan::usual_codes): K scales and
// lows, V scales and lows, then 32 bytes of K's bits and 32 of V's. Aligned to 16.
struct UsualCodes {
  const uint4* row;

  __device__ __forceinline__ uint4 KeyMeta() const { return row[0]; }
  __device__ __forceinline__ uint4 ValueMeta() const { return row[1]; }
  __device__ __forceinline__ void KeyBits(uint4 (&bits)[2]) const {
    bits[0] = row[2];
    bits[1] = row[3];
  }
  __device__ __forceinline__ uint4 ValueBits(int half) const { return row[4 + half]; }
};
// Half i of the four in two words; word i. With constant i no instruction or one.
__device__ __forceinline__ float HalfOf(uint32_t low, uint32_t high, int i) {
  return HalfBitsToFloat(static_cast<uint16_t>((i < 2 ? low : high) >> (i % 2 * 16)));
}
__device__ __forceinline__ uint32_t WordOf(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// As ScoreTokens for usual codes; the next tile is fetched while this one is scored. Leaves in
// flags[0] the bits of the largest V scale of the block's tokens.
__device__ void ScoreUsualTokens(Context& c) {
  constexpr int kGroups = 4, kBlocks = 8;
  const SelectCudaParams& p = c.params();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  int begin, end;
  TileRange(c, &begin, &end);
  uint4 next_meta[2], next_bits[2][2];
  int largest_scale = 0;
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = min(tile * kTile + r + 8 * i, c.token_count - 1);
      const UsualCodes codes = {reinterpret_cast<const uint4*>(CodesOf(c, token))};
      next_meta[i] = codes.KeyMeta();
      codes.KeyBits(next_bits[i]);
      const uint4 value = codes.ValueMeta();
      const uint32_t word = t < 2 ? value.x : value.y;
      largest_scale = max(largest_scale, static_cast<int>(word >> (t % 2 * 16) & 0xffffu));
    }
  };
  if (begin + warp < end) fetch(begin + warp);
  for (int tile = begin + warp; tile < end; tile += kWarps) {
    const uint4 meta[2] = {next_meta[0], next_meta[1]};
    const uint4 bits[2][2] = {{next_bits[0][0], next_bits[0][1]},
                              {next_bits[1][0], next_bits[1][1]}};
    if (tile + kWarps < end) fetch(tile + kWarps);
    for (int hb = 0; hb < c.plan.head_blocks; ++hb) {
      float logit[4] = {0, 0, 0, 0};
      const float unit[2] = {c.a.query_unit[hb * 8 + 2 * t], c.a.query_unit[hb * 8 + 2 * t + 1]};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int block = 2 * g; block < 2 * g + 2; ++block) {
          const uint4 q = c.a.query_hi_lo[(hb * kBlocks + block) * kWarp + lane];
          uint32_t operand[4];
          CodeBlock<2>{WordOf(bits[0][block / 4], block % 4), 0}.ChannelPairs(t, &operand[0],
                                                                              &operand[2]);
          CodeBlock<2>{WordOf(bits[1][block / 4], block % 4), 0}.ChannelPairs(t, &operand[1],
                                                                              &operand[3]);
          MmaHalf(sum, operand, q.x, q.y);
          MmaHalf(sum, operand, q.z, q.w);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale = HalfOf(meta[i].x, meta[i].y, g);
          const float low = HalfOf(meta[i].z, meta[i].w, g);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float query_sum = c.a.query_sums[(hb * 8 + 2 * t + j) * kGroups + g];
            logit[2 * i + j] += scale * (sum[2 * i + j] * unit[j]) + low * query_sum;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = hb * 8 + 2 * t + i % 2, at = tile * kTile + r + i / 2 * 8;
        if (head >= p.group || at >= c.token_count) continue;
        const int cluster = c.a.listed[c.a.token_entry[at]];
        c.token_scores[static_cast<int64_t>(head) * c.plan.room + at] =
            logit[i] + c.a.cluster_scores[static_cast<int64_t>(head) * p.max_clusters + cluster];
      }
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest_scale = max(largest_scale, __shfl_xor_sync(kFullMask, largest_scale, offset));
  }
  if (lane == 0) atomicMax(&c.a.flags[0], largest_scale);
}

// ---- phase 4: the exact zone
// ---------------------------------------------------------------------------

__device__ void ChooseExact(Context& c) {
  const Arrays& a = c.a;
  const SelectCudaParams& p = c.params();
  const int n = c.token_count;
  const int wanted = min(n, max(0, p.budget_tokens - c.pair.sink_tokens));
  if (!c.plan.refine) {
    for (int t = threadIdx.x; t < n; t += kThreads) {
      a.exact_token[t] = t;
      a.token_exact[t] = 1;
    }
    if (threadIdx.x == 0) c.exact_count = n;
  } else {
    GatherScores(c, c.token_scores, c.plan.room, n, a.token_weights);
    SoftmaxKeys(c, a.token_weights, c.plan.room, n, c.sink_scores, p.max_sinks, c.pair.sink_tokens,
                a.token_keys);
    const auto key = [&](int i) { return a.token_keys[i]; };
    const auto one = [](int) { return 1; };
    const Threshold threshold = WeightedThreshold<kThreads>(n, wanted, key, one, *a.threshold);
    int total;
    const int exact = OrderedTake<kThreads>(
        n, threshold, key, one, *a.threshold,
        [&](int i, int take, int index, int) {
          a.token_exact[i] = take > 0;
          if (take > 0) a.exact_token[index] = i;
        },
        &total);
    if (threadIdx.x == 0) c.exact_count = exact;
  }
  __syncthreads();
}

__device__ int SlotOf(const Context& c, int token) {
  const int entry = c.a.token_entry[token];
  return c.a.listed_slot[entry] + token - c.a.listed_start[entry];
}

// Writes the exact zone by ascending position: each token's place is the number of smaller
// positions.
__device__ void WriteSelection(Context& c, const SelectCudaOutput& out) {
  const Arrays& a = c.a;
  const int64_t row = static_cast<int64_t>(c.pair_index) * out.max_exact;
  for (int i = threadIdx.x; i < c.exact_count; i += kThreads) {
    const int token = a.exact_token[i];
    const DeviceIndexPart& part = c.parts[a.listed_part[a.token_entry[token]]];
    a.exact_position[i] = *part.positions.As<int32_t>(
        static_cast<uint32_t>(c.pair.kv_head) * part.tokens + SlotOf(c, token));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < c.exact_count; i += kThreads) {
    const int position = a.exact_position[i];
    int place = 0;
    for (int j = 0; j < c.exact_count; ++j) place += a.exact_position[j] < position;
    const int token = a.exact_token[i], entry = a.token_entry[token];
    out.positions[row + place] = position;
    out.parts[row + place] = a.listed_part[entry];
    out.slots[row + place] = SlotOf(c, token);
    if (out.clusters != nullptr) out.clusters[row + place] = a.listed[entry];
  }
  const int64_t listed_row = static_cast<int64_t>(c.pair_index) * out.max_listed;
  if (out.scored_clusters != nullptr) {
    for (int i = threadIdx.x; i < min(c.listed_count, out.max_listed); i += kThreads) {
      out.scored_clusters[listed_row + i] = a.listed[i];
    }
  }
  if (out.estimated_clusters != nullptr) {
    for (int i = threadIdx.x; i < min(c.estimated_count, out.max_listed); i += kThreads) {
      out.estimated_clusters[listed_row + i] = a.estimated[i];
    }
  }
  if (threadIdx.x == 0) {
    out.exact_count[c.pair_index] = c.exact_count;
    if (out.scored_count != nullptr) out.scored_count[c.pair_index] = c.listed_count;
    if (out.estimated_count != nullptr) out.estimated_count[c.pair_index] = c.estimated_count;
    if (out.coded_tokens != nullptr) {
      out.coded_tokens[c.pair_index] =
          c.plan.refine && c.params().answer_scored ? c.token_count - c.exact_count : 0;
    }
  }
}

// ---- phase 5: the state
// --------------------------------------------------------------------------------

// Weights of coded tokens, of their clusters and of estimated clusters, relative to the head's
// largest logit; leaves that logit in head_max and the weights' sum in head_sum.
__device__ void StateWeights(Context& c) {
  const Arrays& a = c.a;
  const SelectCudaParams& p = c.params();
  const bool coded = c.plan.refine && p.answer_scored;
  const int tokens = coded ? c.token_count : 0, estimated = c.estimated_count;
  for (int h4 = 0; h4 < p.group; h4 += 4) {
    const int heads = min(4, p.group - h4);
    float largest[4], shift[4], sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      largest[h] = kNegativeInfinity;
      if (h >= heads) continue;
      const float* scores = a.token_weights + static_cast<int64_t>(h4 + h) * c.plan.room;
      const float* clusters = a.cluster_scores + static_cast<int64_t>(h4 + h) * p.max_clusters;
      float* logits = a.estimated_weights + static_cast<int64_t>(h4 + h) * c.plan.max_estimated;
#pragma unroll 4
      for (int t = threadIdx.x; t < tokens; t += kThreads) {
        if (!a.token_exact[t]) largest[h] = fmaxf(largest[h], scores[t]);
      }
      for (int i = threadIdx.x; i < estimated; i += kThreads) {
        const int cluster = a.estimated[i];
        logits[i] = clusters[cluster] + log2f(static_cast<float>(a.cluster_sizes[cluster]));
        largest[h] = fmaxf(largest[h], logits[i]);
      }
    }
    BlockReduce<false>(largest, a.reduce);
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      shift[h] = largest[h] == kNegativeInfinity ? 0.0f : largest[h];
      if (h >= heads) continue;
      float* scores = a.token_weights + static_cast<int64_t>(h4 + h) * c.plan.room;
      float* logits = a.estimated_weights + static_cast<int64_t>(h4 + h) * c.plan.max_estimated;
#pragma unroll 4
      for (int t = threadIdx.x; t < tokens; t += kThreads) {
        const float weight = a.token_exact[t] ? 0.0f : Exp2(scores[t] - shift[h]);
        scores[t] = weight;
        sum[h] += weight;
      }
      for (int i = threadIdx.x; i < estimated; i += kThreads) {
        const float weight = Exp2(logits[i] - shift[h]);
        logits[i] = weight;
        sum[h] += weight;
      }
    }
    BlockReduce<true>(sum, a.reduce);
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      if (static_cast<int>(threadIdx.x) != h || h >= heads) continue;
      a.head_max[h4 + h] = largest[h];
      a.head_sum[h4 + h] = sum[h];
    }
  }
  __syncthreads();
  const int pairs = coded ? c.listed_count * p.group : 0;
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const int h = i / c.listed_count, e = i % c.listed_count;
    const float* weights = a.token_weights + static_cast<int64_t>(h) * c.plan.room;
    float total = 0;
    for (int t = a.listed_start[e]; t < a.listed_start[e + 1]; ++t) total += weights[t];
    a.listed_weights[static_cast<int64_t>(h) * c.plan.max_listed + e] = total;
  }
  __syncthreads();
}

// Eight tokens' V codes of a warp's 16-token tile as this lane's share of the operand: of tokens
// 2t, 2t+1, 2t+8, 2t+9.
template <int kBits>
struct TileRows {
  const unsigned char* row[4];
  float weight[4];

  __device__ __forceinline__ void Load(const Context& c, int tile, int head) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * kTile + 2 * t + i % 2 + i / 2 * 8;
      row[i] = CodesOf(c, min(token, c.token_count - 1));
      weight[i] = token < c.token_count && head < c.params().group
                      ? c.a.token_weights[static_cast<int64_t>(head) * c.plan.room + token]
                      : 0.0f;
    }
  }
  // Operand of `weight` times factor[i]: rows 0-7 the heads' high halves, rows 8-15 their low
  // halves.
  __device__ __forceinline__ void Weights(const float (&factor)[4], uint32_t (&operand)[4]) const {
    SplitHalves(weight[0] * factor[0], weight[1] * factor[1], &operand[0], &operand[1]);
    SplitHalves(weight[2] * factor[2], weight[3] * factor[3], &operand[2], &operand[3]);
  }
};

// Adds up weight × lows over the block's tiles: partial_low [warp, 8 heads, groups].
template <int kBits>
__device__ void SumLows(Context& c, int hb) {
  const CodesLayout& layout = c.plan.codes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  const float ones[4] = {1, 1, 1, 1};
  int begin, end;
  TileRange(c, &begin, &end);
  for (int first = 0; first < layout.groups; first += 8) {
    float sum[4] = {0, 0, 0, 0};
    for (int tile = begin + warp; tile < end; tile += kWarps) {
      TileRows<kBits> rows;
      rows.Load(c, tile, hb * 8 + r);
      uint32_t operand[4], lows[4];
      rows.Weights(ones, operand);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        lows[i] =
            first + r < layout.groups
                ? reinterpret_cast<const uint16_t*>(rows.row[i] + layout.ValueLows())[first + r]
                : 0u;
      }
      MmaHalf(sum, operand, lows[0] | lows[1] << 16, lows[2] | lows[3] << 16);
    }
    float* to = c.a.partial_low + (warp * 8 + r) * layout.groups + first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + 2 * t + i < layout.groups) to[2 * t + i] = sum[i] + sum[i + 2];
    }
  }
  __syncwarp();
}

// The exponent that brings a half of those bits under 2^14: its field e stands for [2^(e - 15),
// 2^(e - 14)).
__device__ __forceinline__ int ExponentUnder(int half_bits) { return 27 - (half_bits >> 10); }

// That of the largest V scale of the block's tokens, so that weight × scale is a half.
template <int kBits>
__device__ int ValueScaleExponent(Context& c) {
  int begin, end;
  TileRange(c, &begin, &end);
  if (threadIdx.x == 0) c.a.flags[0] = 0;
  __syncthreads();
  int largest = 0;
  const int last = min(end * kTile, c.token_count);
  for (int t = begin * kTile + threadIdx.x; t < last; t += kThreads) {
    const uint16_t* scales =
        reinterpret_cast<const uint16_t*>(CodesOf(c, t) + c.plan.codes.ValueScales());
    for (int g = 0; g < c.plan.codes.groups; ++g)
      largest = max(largest, static_cast<int>(scales[g]));
  }
  atomicMax(&c.a.flags[0], largest);
  __syncthreads();
  return ExponentUnder(c.a.flags[0]);
}

// partial [warp, heads of block hb, D] = the residual part of the state, over the warp's tiles.
template <int kBits>
__device__ void SumCodes(Context& c, int hb, int exponent) {
  const SelectCudaParams& p = c.params();
  const CodesLayout& layout = c.plan.codes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  const int blocks = p.head_dim / kCodeBlock;
  const float up = exp2f(static_cast<float>(exponent));
  const float down = 1.0f / up;
  int begin, end;
  TileRange(c, &begin, &end);
  for (int chunk = 0; chunk < blocks; chunk += kChunk / kCodeBlock) {
    float sum[kChunk / 8][4];
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
    for (int tile = begin + warp; tile < end; tile += kWarps) {
      TileRows<kBits> rows;
      rows.Load(c, tile, hb * 8 + r);
      uint32_t operand[4] = {};
      int operand_group = -1;
#pragma unroll
      for (int b = 0; b < kChunk / kCodeBlock; ++b) {
        const int block = chunk + b;
        if (block >= blocks) break;
        const int g = block / layout.group_blocks;
        if (g != operand_group) {
          float factor[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            factor[i] = up * HalfBitsToFloat(reinterpret_cast<const uint16_t*>(
                                 rows.row[i] + layout.ValueScales())[g]);
          }
          rows.Weights(factor, operand);
          operand_group = g;
        }
        CodeBlock<kBits> codes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          codes[i].Load(rows.row[i] + layout.ValueBits(), p.head_dim, block);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          MmaHalf(sum[2 * b + half], operand, TokenPair<kBits>(codes[0], codes[1], half, r),
                  TokenPair<kBits>(codes[2], codes[3], half, r));
        }
      }
    }
    if (hb * 8 + r < p.group) {
      float* to = c.a.partial + (static_cast<int64_t>(warp) * p.group + hb * 8 + r) * p.head_dim;
      const float* low = c.a.partial_low + (warp * 8 + r) * layout.groups;
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        const int block = chunk + n / 2;
        if (block >= blocks) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int channel = block * kCodeBlock + HalfChannel<kBits>(n % 2, 2 * t + i);
          to[channel] = ((sum[n][i] + sum[n][i + 2]) * down + low[block / layout.group_blocks]) *
                        c.a.inverse_v[channel];
        }
      }
    }
  }
  __syncwarp();
}

// As SumLows and SumCodes for usual codes: 64 channels at a time, for registers are short.
__device__ void SumUsualCodes(Context& c, int hb, int exponent) {
  constexpr int kGroups = 4, kBlocks = 4;  // kBlocks: of the 64 channels
  const SelectCudaParams& p = c.params();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  const float up = exp2f(static_cast<float>(exponent)), down = 1.0f / up;
  const float ones[4] = {1, 1, 1, 1};
  float* low_to = c.a.partial_low + (warp * 8 + r) * kGroups;
  int begin, end;
  TileRange(c, &begin, &end);
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    float low_sum[4] = {0, 0, 0, 0}, sum[2 * kBlocks][4];
#pragma unroll
    for (int n = 0; n < 2 * kBlocks; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll 1
    for (int tile = begin + warp; tile < end; tile += kWarps) {
      TileRows<2> rows;
      rows.Load(c, tile, hb * 8 + r);
      uint4 meta[4], bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const UsualCodes codes = {reinterpret_cast<const uint4*>(rows.row[i])};
        meta[i] = codes.ValueMeta();
        bits[i] = codes.ValueBits(part);
      }
      uint32_t operand[4], lows[4];
      rows.Weights(ones, operand);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // column r: the low of group r
        const uint32_t word = r < 2 ? meta[i].z : meta[i].w;
        lows[i] = r < kGroups ? word >> (r % 2 * 16) & 0xffffu : 0u;
      }
      MmaHalf(low_sum, operand, lows[0] | lows[1] << 16, lows[2] | lows[3] << 16);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float factor[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          factor[i] = up * HalfOf(part == 0 ? meta[i].x : meta[i].y, 0, g);
        }
        rows.Weights(factor, operand);
#pragma unroll
        for (int block = 2 * g; block < 2 * g + 2; ++block) {
          CodeBlock<2> codes[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) codes[i] = {WordOf(bits[i], block), 0};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            MmaHalf(sum[2 * block + half], operand, TokenPair<2>(codes[0], codes[1], half, r),
                    TokenPair<2>(codes[2], codes[3], half, r));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * t + i < kGroups) low_to[2 * t + i] = low_sum[i] + low_sum[i + 2];
    }
    __syncwarp();
    if (hb * 8 + r < p.group) {
      float* to = c.a.partial + (static_cast<int64_t>(warp) * p.group + hb * 8 + r) * p.head_dim;
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int channel =
              (part * kBlocks + n / 2) * kCodeBlock + HalfChannel<2>(n % 2, 2 * t + i);
          to[channel] = ((sum[n][i] + sum[n][i + 2]) * down + low_to[part * 2 + n / 4]) *
                        c.a.inverse_v[channel];
        }
      }
    }
    __syncwarp();
  }
}

// Adds the value means' part to partial, over the warp's clusters.
template <int kVectors>
__device__ void SumMeans(Context& c, bool coded) {
  const SelectCudaParams& p = c.params();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, dim = p.head_dim;
  const int listed = coded ? c.listed_count : 0;
  const int entries = listed + c.estimated_count;
  for (int h4 = 0; h4 < p.group; h4 += 4) {
    float4 sum[4][kVectors];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) sum[h][v] = make_float4(0, 0, 0, 0);
    }
    for (int first = (c.rank * kWarps + warp) * 8; first < entries;
         first += c.plan.blocks * kWarps * 8) {
      const int mine = min(first + lane % 8, entries - 1);
      const int cluster = mine < listed ? c.a.listed[mine] : c.a.estimated[mine - listed];
      int part_index;
      const DeviceIndexPart& part = c.PartOf(cluster, &part_index);
      // Lane 8 h + i has head h's weight of entry i.
      const int head = h4 + lane / 8;
      float weight = 0;
      if (head < p.group && first + lane % 8 < entries) {
        weight = mine < listed
                     ? c.a.listed_weights[static_cast<int64_t>(head) * c.plan.max_listed + mine]
                     : c.a.estimated_weights[static_cast<int64_t>(head) * c.plan.max_estimated +
                                             mine - listed];
      }
      EightRows<kVectors> rows;
      rows.Load(part.value_means.At(static_cast<uint32_t>(c.pair.kv_head) * part.clusters +
                                    static_cast<uint32_t>(cluster - part.first_cluster)),
                dim);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const float w = __shfl_sync(kFullMask, weight, 8 * h + i);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            sum[h][v].x += w * rows.row[i][v].x;
            sum[h][v].y += w * rows.row[i][v].y;
            sum[h][v].z += w * rows.row[i][v].z;
            sum[h][v].w += w * rows.row[i][v].w;
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int channel = 4 * (lane + v * kWarp);
        if (h4 + h >= p.group || channel >= dim) continue;
        float4* to = reinterpret_cast<float4*>(
            c.a.partial + (static_cast<int64_t>(warp) * p.group + h4 + h) * dim + channel);
        float4 x = coded ? *to : make_float4(0, 0, 0, 0);
        x.x += sum[h][v].x;
        x.y += sum[h][v].y;
        x.z += sum[h][v].z;
        x.w += sum[h][v].w;
        *to = x;
      }
    }
  }
}

template <int kBits, int kVectors>
__device__ void SumState(Context& c) {
  const SelectCudaParams& p = c.params();
  const bool coded = c.plan.refine && p.answer_scored;
  if constexpr (kBits > 0) {
    if (coded) {
      bool done = false;
      if constexpr (kBits == 2 && kVectors == 1) {
        done = c.plan.usual_codes;
        for (int hb = 0; done && hb < c.plan.head_blocks; ++hb) {
          SumUsualCodes(c, hb, ExponentUnder(c.a.flags[0]));
        }
      }
      if (!done) {
        const int exponent = ValueScaleExponent<kBits>(c);
        for (int hb = 0; hb < c.plan.head_blocks; ++hb) {
          SumLows<kBits>(c, hb);
          SumCodes<kBits>(c, hb, exponent);
        }
      }
    }
  }
  SumMeans<kVectors>(c, coded);
  __syncthreads();
  const int size = p.group * p.head_dim;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += c.a.partial[static_cast<int64_t>(w) * size + i];
    c.states[static_cast<int64_t>(c.rank) * size + i] = sum;
  }
}

__device__ void WriteState(Context& c, const SelectCudaOutput& out) {
  const SelectCudaParams& p = c.params();
  const int size = p.group * p.head_dim;
  for (int i = c.rank * kThreads + threadIdx.x; i < size; i += c.plan.blocks * kThreads) {
    float sum = 0;
    for (int k = 0; k < c.plan.blocks; ++k) sum += c.states[static_cast<int64_t>(k) * size + i];
    const float total = c.a.head_sum[i / p.head_dim];
    out.state_output[static_cast<int64_t>(c.pair_index) * size + i] =
        total > 0 ? sum / total : 0.0f;
  }
  if (c.rank != 0) return;
  for (int h = threadIdx.x; h < p.group; h += kThreads) {
    const float total = c.a.head_sum[h];
    out.state_lse[static_cast<int64_t>(c.pair_index) * p.group + h] =
        total > 0 ? (c.a.head_max[h] + log2f(total)) * kLn2 : kNegativeInfinity;
  }
}

// ---- the kernel
// ----------------------------------------------------------------------------------------

template <int kBits, int kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    SelectKernel(const __grid_constant__ Plan plan, const SelectCudaPair* pairs,
                 const __grid_constant__ SelectCudaOutput out, unsigned char* workspace) {
  Context& c = *reinterpret_cast<Context*>(SharedMemory());
  const SelectCudaPair& pair = pairs[blockIdx.x / static_cast<unsigned>(plan.blocks)];
  const DeviceIndexPart* parts = pair.parts;
  const bool copies = pair.part_count <= kPartCopies;
  if (copies) {
    // By other warps than the first thread's, which has its own work.
    constexpr int kWords = sizeof(DeviceIndexPart) / 8;
    static_assert(sizeof(DeviceIndexPart) % 8 == 0);
    for (int i = static_cast<int>(threadIdx.x) - kWarp; i < pair.part_count * kWords;
         i += kThreads - kWarp) {
      if (i < 0) break;
      reinterpret_cast<uint64_t*>(c.part_copies)[i] = reinterpret_cast<const uint64_t*>(parts)[i];
    }
  }
  if (threadIdx.x == 0) {
    c.plan = plan;
    c.pair_index = static_cast<int>(blockIdx.x) / plan.blocks;
    c.rank = static_cast<int>(blockIdx.x) % plan.blocks;
    c.pair = pairs[c.pair_index];
    unsigned char* mine = workspace + c.pair_index * plan.pair_bytes;
    c.cluster_scores = reinterpret_cast<float*>(mine + plan.cluster_scores);
    c.sink_scores = reinterpret_cast<float*>(mine + plan.sink_scores);
    c.token_scores = reinterpret_cast<float*>(mine + plan.token_scores);
    c.states = reinterpret_cast<float*>(mine + plan.states);
    const int pair_count = static_cast<int>(gridDim.x) / plan.blocks;
    Bump bump = {SharedMemory() + Align(sizeof(Context)),
                 workspace + pair_count * plan.pair_bytes + blockIdx.x * plan.block_bytes,
                 plan.shared_bytes - Align(sizeof(Context)), 0, 0};
    c.a = MakeArrays(plan, bump);
    c.a.flags[0] = 0;
    c.parts = copies ? c.part_copies : parts;
    if (plan.blocks == 1) {
      c.cluster_scores = c.a.cluster_scores;
      c.token_scores = c.a.token_weights;
    }
    c.listed_count = c.token_count = c.estimated_count = c.exact_count = 0;
  }
  __syncthreads();
  ScoreSinks(c);
  LoadSizes(c);
  PrepareQueries(c);
  __syncthreads();
  ScoreCentroids<kVectors>(c);
  ClusterSync(plan.blocks);
  ChooseClusters(c);
  if constexpr (kBits > 0) {
    if (plan.refine) {
      bool done = false;
      if constexpr (kBits == 2 && kVectors == 1) {
        done = plan.usual_codes;
        if (done) ScoreUsualTokens(c);
      }
      if (!done) ScoreTokens<kBits>(c);
      ClusterSync(plan.blocks);
    }
  }
  ChooseExact(c);
  if (c.rank == 0) WriteSelection(c, out);
  StateWeights(c);
  SumState<kBits, kVectors>(c);
  ClusterSync(plan.blocks);
  WriteState(c, out);
}

bool Valid(const SelectCudaParams& p) {
  const bool shape = p.group >= 1 && p.group <= 32 && p.head_dim >= 16 && p.head_dim <= 512 &&
                     p.head_dim % 16 == 0 && p.max_clusters >= 0 && p.max_sinks >= 0;
  const bool codes =
      p.code_bits == 0 || (p.code_bits >= 2 && p.code_bits <= 4 && p.group_channels >= 16 &&
                           p.group_channels % 16 == 0 && p.head_dim % p.group_channels == 0);
  const bool zones = p.budget_tokens >= 1 && p.budget_tokens <= 65535 && p.scored_tokens >= 0 &&
                     p.scored_tokens <= 65535 && (p.code_bits > 0 || p.scored_tokens == 0) &&
                     p.estimated_fraction >= 0 && p.estimated_fraction <= 1;
  const int b = p.blocks_per_pair;
  return shape && codes && zones && ((b >= 0 && b <= 8) || b == 16);
}

Plan MakePlan(const SelectCudaParams& p, int32_t pairs) {
  const DeviceLimits limits = ReadLimits();
  Plan plan = {};
  plan.params = p;
  plan.refine = p.code_bits > 0 && p.scored_tokens > 0;
  plan.codes = p.code_bits > 0 ? MakeCodesLayout(p.code_bits, p.group_channels, p.head_dim)
                               : CodesLayout{0, 1, 0};
  plan.usual_codes = p.code_bits == 2 && p.head_dim == 128 && p.group_channels == 32;
  plan.head_blocks = (p.group + 7) / 8;
  plan.room = max(p.budget_tokens, p.scored_tokens);
  plan.max_listed = min(p.max_clusters, plan.room);
  plan.max_estimated = static_cast<int>(static_cast<double>(p.estimated_fraction) * p.max_clusters);
  plan.max_exact = ExactCapacity(p);
  plan.blocks = p.blocks_per_pair;
  if (plan.blocks == 0) {
    const auto kernel = SelectKernel<2, 1>;
    static KnownClusters known;
    plan.blocks = 1;
    while (limits.clusters && plan.blocks < 8 &&
           pairs <= ResidentClusters(limits, reinterpret_cast<const void*>(kernel), kThreads,
                                     plan.blocks * 2, known)) {
      plan.blocks *= 2;
    }
  }
  Bump bump = {nullptr, nullptr, limits.shared_bytes - Align(sizeof(Context)), 0, 0};
  MakeArrays(plan, bump);
  plan.shared_bytes = bump.used + Align(sizeof(Context));
  plan.block_bytes = Align(bump.spilled);
  const int64_t group = p.group;
  plan.cluster_scores = 0;
  plan.sink_scores = Align(4 * group * p.max_clusters);
  plan.token_scores = plan.sink_scores + Align(4 * group * p.max_sinks);
  plan.states = plan.token_scores + Align(4 * group * plan.room);
  plan.pair_bytes = plan.states + Align(4 * group * p.head_dim * plan.blocks);
  return plan;
}

using Kernel = void (*)(Plan, const SelectCudaPair*, SelectCudaOutput, unsigned char*);

template <int kVectors>
Kernel KernelOfBits(int bits) {
  switch (bits) {
    case 0:
      return SelectKernel<0, kVectors>;
    case 2:
      return SelectKernel<2, kVectors>;
    case 3:
      return SelectKernel<3, kVectors>;
    default:
      return SelectKernel<4, kVectors>;
  }
}

}  // namespace

int32_t ExactCapacity(const SelectCudaParams& params) { return params.budget_tokens; }

int64_t SelectCudaWorkspaceBytes(const SelectCudaParams& params, int32_t pairs) {
  if (!Valid(params) || pairs <= 0) return 0;
  const Plan plan = MakePlan(params, pairs);
  return max(pairs * (plan.pair_bytes + plan.blocks * plan.block_bytes),
             AnswerWorkspaceBytes(params, pairs));
}

cudaError_t LaunchSelect(const SelectCudaParams& params, const SelectCudaPair* pairs,
                         int32_t pair_count, const SelectCudaOutput& output, void* workspace,
                         cudaStream_t stream) {
  if (!Valid(params) || pair_count < 0 || output.max_exact < ExactCapacity(params)) {
    return cudaErrorInvalidValue;
  }
  if (pair_count == 0) return cudaSuccess;
  if (cudaError_t error;
      LaunchAnswer(params, pairs, pair_count, output, workspace, stream, &error)) {
    return error;
  }
  const Plan plan = MakePlan(params, pair_count);
  const Kernel kernel = params.head_dim <= 128   ? KernelOfBits<1>(params.code_bits)
                        : params.head_dim <= 256 ? KernelOfBits<2>(params.code_bits)
                                                 : KernelOfBits<4>(params.code_bits);
  return cuda::Launch(kernel, dim3(pair_count * plan.blocks), dim3(kThreads),
                      static_cast<size_t>(plan.shared_bytes), plan.blocks, stream, plan, pairs,
                      output, static_cast<unsigned char*>(workspace));
}

}  // namespace clusterkv::kernels
