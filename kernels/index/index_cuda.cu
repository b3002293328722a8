// Index build: metric, k-means, cluster order, value means, balances, then codes, records and
// remainders.
//
//   metric    sums of keys and of their squared differences by run of tokens and channel
//   k-means   kmeans_cuda.h, a problem per (head, segment), on rows weighted as they are read
//   arrange   positions, slots, cluster begins, centroids
//   means     a warp per cluster sums its values in order
//   balance   squares of residuals by run of slots and channel
//   encode    a unit of lanes (record_codec.cuh) per half of a token
#include <algorithm>

#include "kernels/base/cuda_util.cuh"
#include "kernels/codec/record_codec.cuh"
#include "kernels/index/index_cuda.h"
#include "kernels/kmeans/kmeans_cuda.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kThreads = 256;
constexpr int kRun = 128;  // tokens or slots that a block sums

// The build and its workspace, offsets in bytes. T tokens, C clusters, S segments, per head.
struct Plan {
  IndexCudaParams params;
  IndexCudaInput input;
  DeviceIndexPart part;
  KMeansCudaParams kmeans;
  int segment_tokens;
  int segments;
  int segment_clusters;  // of a whole segment
  int runs;              // ceil(T / kRun)
  int64_t problems;      // [heads, S] KMeansCudaProblem
  int64_t labels;        // [heads, T] of the segment's tokens
  int64_t order;         // [heads, T] tokens of the segment by cluster; of a slot its token
  int64_t begin;         // [heads, C + S]
  int64_t centroids;     // [heads, C, D] float
  int64_t sums;          // [heads, runs, 2, D] double
  int64_t means;         // [heads, D] double
  int64_t kmeans_space;
  int64_t bytes;

  template <typename T>
  __host__ __device__ T* At(unsigned char* workspace, int64_t offset, int64_t index) const {
    return reinterpret_cast<T*>(workspace + offset) + index;
  }
  __device__ __forceinline__ int RowBytes() const {
    return params.head_dim * DeviceElementBytes(params.element_type);
  }
  // The rows of token t of the part.
  __device__ __forceinline__ const unsigned char* Key(int head, int token) const {
    return input.keys.At(static_cast<uint32_t>(token)) + head * RowBytes();
  }
  __device__ __forceinline__ const unsigned char* Value(int head, int token) const {
    return input.values.At(static_cast<uint32_t>(token)) + head * RowBytes();
  }
  __device__ __forceinline__ float* Channels(int head) const {
    return part.channels.As<float>(static_cast<uint32_t>(head));
  }
  __device__ __forceinline__ uint32_t Cluster(int head, int cluster) const {
    return static_cast<uint32_t>(head) * part.clusters + cluster;
  }
  // The token, and its cluster of the part, that lies in `slot`.
  __device__ __forceinline__ int TokenOfSlot(unsigned char* workspace, int head, int slot) const {
    return slot / segment_tokens * segment_tokens +
           *At<int>(workspace, order, static_cast<int64_t>(head) * part.tokens + slot);
  }
  __device__ __forceinline__ int ClusterOfToken(unsigned char* workspace, int head,
                                                int token) const {
    return token / segment_tokens * segment_clusters +
           *At<int>(workspace, labels, static_cast<int64_t>(head) * part.tokens + token);
  }
};

// ---- metric
// ------------------------------------------------------------------------------------------

// Sums over a run of tokens, a thread per channel: of the keys, or (`squares`) of their squared
// differences from the mean. In two passes: a channel's offset may be large against its spread.
__global__ void SumKeysKernel(const __grid_constant__ Plan plan, bool squares,
                              unsigned char* workspace) {
  const int dim = plan.params.head_dim, head = static_cast<int>(blockIdx.y);
  const int begin = static_cast<int>(blockIdx.x) * kRun;
  const int count = min(plan.part.tokens - begin, kRun);
  const unsigned char** rows = reinterpret_cast<const unsigned char**>(SharedMemory());  // [kRun]
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) {
    rows[i] = plan.Key(head, begin + i);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < dim; j += static_cast<int>(blockDim.x)) {
    const double mean =
        squares ? *plan.At<double>(workspace, plan.means, static_cast<int64_t>(head) * dim + j) : 0;
    double sum = 0;
#pragma unroll 16
    for (int i = 0; i < count; ++i) {
      const double x = LoadAsFloat(rows[i], plan.params.element_type, j) - mean;
      sum += squares ? x * x : x;
    }
    *plan.At<double>(workspace, plan.sums,
                     (static_cast<int64_t>(head) * plan.runs + blockIdx.x) * 2 * dim + j) = sum;
  }
}

// Sum `which` of channel j over all runs, in order.
__device__ double SumRuns(const Plan& plan, unsigned char* workspace, int head, int which, int j) {
  const int64_t dim = plan.params.head_dim;
  double sum = 0;
#pragma unroll 8
  for (int run = 0; run < plan.runs; ++run) {
    sum += *plan.At<double>(workspace, plan.sums,
                            ((static_cast<int64_t>(head) * plan.runs + run) * 2 + which) * dim + j);
  }
  return sum;
}

__global__ void KeyMeansKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int dim = plan.params.head_dim, head = static_cast<int>(blockIdx.x);
  for (int j = threadIdx.x; j < dim; j += static_cast<int>(blockDim.x)) {
    *plan.At<double>(workspace, plan.means, static_cast<int64_t>(head) * dim + j) =
        SumRuns(plan, workspace, head, 0, j) / plan.part.tokens;
  }
}

// The head's channels: metric weight, and balances of 1 or as inherited.
__global__ void ChannelsKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int dim = plan.params.head_dim, head = static_cast<int>(blockIdx.x);
  float* channels = plan.Channels(head);
  for (int j = threadIdx.x; j < 3 * dim; j += static_cast<int>(blockDim.x)) {
    float x = 1.0f;
    if (plan.input.inherits_channels) {
      x = plan.input.inherited_channels.As<float>(static_cast<uint32_t>(head))[j];
    } else if (plan.input.query_rms != nullptr && j < dim) {
      const int tokens = plan.part.tokens;
      const double std =
          tokens > 1 ? sqrt(SumRuns(plan, workspace, head, 0, j) / (tokens - 1)) : 0.0;
      const double rms = plan.input.query_rms[static_cast<int64_t>(head) * dim + j];
      x = static_cast<float>(sqrt(fmax(rms, 1e-6) / fmax(std, 1e-6)));
    }
    channels[j] = x;
  }
}

// ---- clusters
// ----------------------------------------------------------------------------------------

__global__ void FillProblemsKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= plan.params.kv_heads * plan.segments) return;
  const int head = i / plan.segments, s = i % plan.segments;
  const int64_t tokens = plan.part.tokens, first = static_cast<int64_t>(s) * plan.segment_tokens;
  const int64_t token = head * tokens + first;
  const int64_t cluster = static_cast<int64_t>(head) * plan.part.clusters +
                          static_cast<int64_t>(s) * plan.segment_clusters;
  KMeansCudaProblem problem;
  problem.rows = plan.input.keys;
  problem.first_row = static_cast<uint32_t>(first);
  problem.row_offset = static_cast<uint32_t>(head * plan.RowBytes());
  problem.weights = plan.Channels(head);
  problem.row_count =
      static_cast<int32_t>(min(static_cast<int64_t>(plan.segment_tokens), tokens - first));
  problem.cluster_count = max(1, problem.row_count / plan.params.tokens_per_cluster);
  if (plan.input.initial_rows != nullptr) problem.initial_rows = plan.input.initial_rows + cluster;
  problem.labels = plan.At<int>(workspace, plan.labels, token);
  problem.order = plan.At<int>(workspace, plan.order, token);
  problem.centroids = plan.At<float>(workspace, plan.centroids, cluster * plan.params.head_dim);
  problem.begin = plan.At<int>(workspace, plan.begin, cluster + i);
  *plan.At<KMeansCudaProblem>(workspace, plan.problems, i) = problem;
}

// Four channels of a centroid or value mean as they are stored; `to` aligned to 8.
__device__ __forceinline__ void StoreHalves(float a, float b, float c, float d, uint16_t* to) {
  *reinterpret_cast<uint2*>(to) = make_uint2(PackHalvesSaturated(a, b), PackHalvesSaturated(c, d));
}

// Positions and slots by slot; cluster begins and centroids by cluster.
__global__ void __launch_bounds__(kThreads)
    ArrangeKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int head = static_cast<int>(blockIdx.y), tokens = plan.part.tokens;
  const int clusters = plan.part.clusters, dim = plan.params.head_dim;
  const int thread = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  const int threads = static_cast<int>(gridDim.x) * kThreads;
  const uint32_t base = static_cast<uint32_t>(head) * tokens;
  for (int slot = thread; slot < tokens; slot += threads) {
    const int token = plan.TokenOfSlot(workspace, head, slot);
    *plan.part.positions.As<int32_t>(base + slot) =
        static_cast<int32_t>(plan.part.first_token + token);
    *plan.part.slots.As<int32_t>(base + token) = slot;
  }
  const uint32_t first = static_cast<uint32_t>(head) * (clusters + 1);
  for (int c = thread; c <= clusters; c += threads) {
    const int s = min(c / plan.segment_clusters, plan.segments - 1);
    *plan.part.cluster_begin.As<int32_t>(first + c) =
        c == clusters
            ? tokens
            : s * plan.segment_tokens + *plan.At<int>(workspace, plan.begin,
                                                      static_cast<int64_t>(plan.Cluster(head, c)) +
                                                          head * plan.segments + s);
  }
  for (int i = thread; i < clusters * (dim / 4); i += threads) {
    const int c = i / (dim / 4), j = i % (dim / 4) * 4;
    const float4 x = *plan.At<float4>(workspace, plan.centroids,
                                      (static_cast<int64_t>(plan.Cluster(head, c)) * dim + j) / 4);
    StoreHalves(x.x, x.y, x.z, x.w, plan.part.centroids.As<uint16_t>(plan.Cluster(head, c)) + j);
  }
}

// A warp per cluster; its values in ascending order, in double, four in flight.
template <int kVectors>
__global__ void __launch_bounds__(kThreads)
    ValueMeansKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int head = static_cast<int>(blockIdx.y), dim = plan.params.head_dim;
  const int lane = threadIdx.x % kWarp;
  const int c = static_cast<int>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (c >= plan.part.clusters) return;
  const uint32_t at = static_cast<uint32_t>(head) * (plan.part.clusters + 1) + c;
  const int begin = *plan.part.cluster_begin.As<int32_t>(at);
  const int end = *plan.part.cluster_begin.As<int32_t>(at + 1);
  double sum[kVectors][4] = {};
  for (int first = begin; first < end; first += 4) {
    float x[4][kVectors][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int token = plan.TokenOfSlot(workspace, head, min(first + k, end - 1));
      const unsigned char* row = plan.Value(head, token);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 4 * (lane + v * kWarp) + i;
          x[k][v][i] = j < dim ? LoadAsFloat(row, plan.params.element_type, j) : 0.0f;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (first + k >= end) break;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[v][i] += static_cast<double>(x[k][v][i]);
      }
    }
  }
  uint16_t* to = plan.part.value_means.As<uint16_t>(plan.Cluster(head, c));
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float mean[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mean[i] = begin < end ? static_cast<float>(sum[v][i] / (end - begin)) : 0.0f;
    }
    const int j = 4 * (lane + v * kWarp);
    if (j < dim) StoreHalves(mean[0], mean[1], mean[2], mean[3], to + j);
  }
}

// ---- balances
// ----------------------------------------------------------------------------------------

// Where what a slot's residuals are made of lies.
struct SlotRows {
  const unsigned char* key;
  const unsigned char* value;
  const uint16_t* centroid;
  const uint16_t* mean;
};

// Squares of K and V residuals summed over a run of slots, a thread per channel.
__global__ void SumResidualsKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int dim = plan.params.head_dim, head = static_cast<int>(blockIdx.y);
  const int begin = static_cast<int>(blockIdx.x) * kRun;
  const int count = min(plan.part.tokens - begin, kRun);
  const ElementType type = plan.params.element_type;
  SlotRows* rows = reinterpret_cast<SlotRows*>(SharedMemory());  // [kRun]
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) {
    const int token = plan.TokenOfSlot(workspace, head, begin + i);
    const uint32_t cluster = plan.Cluster(head, plan.ClusterOfToken(workspace, head, token));
    rows[i] = {plan.Key(head, token), plan.Value(head, token),
               plan.part.centroids.As<uint16_t>(cluster),
               plan.part.value_means.As<uint16_t>(cluster)};
  }
  __syncthreads();
  for (int j = threadIdx.x; j < dim; j += static_cast<int>(blockDim.x)) {
    const float weight = plan.Channels(head)[j];
    double keys = 0, values = 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const SlotRows row = rows[i];
      const float key = __fmul_rn(LoadAsFloat(row.key, type, j), weight);
      const double k = __fsub_rn(key, HalfBitsToFloat(row.centroid[j]));
      const double v = __fsub_rn(LoadAsFloat(row.value, type, j), HalfBitsToFloat(row.mean[j]));
      keys += k * k;
      values += v * v;
    }
    double* to = plan.At<double>(
        workspace, plan.sums, (static_cast<int64_t>(head) * plan.runs + blockIdx.x) * 2 * dim + j);
    to[0] = keys;
    to[dim] = values;
  }
}

__global__ void BalanceKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const int dim = plan.params.head_dim, head = static_cast<int>(blockIdx.x);
  float* balance = plan.Channels(head) + dim;
  for (int i = threadIdx.x; i < 2 * dim; i += static_cast<int>(blockDim.x)) {
    const double rms = sqrt(SumRuns(plan, workspace, head, i / dim, i % dim) / plan.part.tokens);
    balance[i] = static_cast<float>(1.0 / sqrt(fmax(rms, 1e-9)));
  }
}

// ---- codes and records
// -------------------------------------------------------------------------------

// Codes of one half (0: K, 1: V) of a token: x [16] the unit's row, weighted; `base` its cluster's
// centroid or value mean. Lanes with `codes` null write nothing.
template <int kBits>
__device__ __forceinline__ void EncodeCodes(const Plan& plan, const UnitLane& at, int half,
                                            const unsigned char* base, const float* balance,
                                            float (&x)[kCodeBlock], unsigned char* codes) {
  const int dim = plan.params.head_dim;
  const CodesLayout layout = MakeCodesLayout(kBits, plan.params.group_channels, dim);
  RowBlock base_row;
  base_row.Load(base, ElementType::kFloat16, at.block);
  float of_cluster[kCodeBlock];
  base_row.ToFloats(ElementType::kFloat16, of_cluster);
#pragma unroll
  for (int i = 0; i < kCodeBlock; ++i) {
    x[i] = __fmul_rn(__fsub_rn(x[i], of_cluster[i]), balance[at.block * kCodeBlock + i]);
  }
  const int in_group = at.block % layout.group_blocks, group = at.block / layout.group_blocks;
  uint32_t packed[kCodeBlock];
  uint16_t scale, low;
  QuantizeLanes<kBits>(at.first + at.block - in_group, layout.group_blocks, x, packed, &scale,
                       &low);
  if (codes == nullptr) return;
  if (in_group == 0) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(codes + half * layout.ValueScales());
    halves[group] = scale;
    halves[layout.groups + group] = low;
  }
  StoreCodes<kBits>(packed, codes + (half == 0 ? layout.KeyBits() : layout.ValueBits()), dim,
                    at.block);
}

template <int kBits, RecordFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    EncodeSlotsKernel(const __grid_constant__ Plan plan, unsigned char* workspace) {
  const IndexCudaParams& p = plan.params;
  const UnitLane at(p.head_dim);
  const int head = static_cast<int>(blockIdx.y);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t unit = warp * at.per_warp + at.unit;
  // Idle lanes take part in what is collective, with slot 0.
  const bool works = at.unit < at.per_warp && unit < 2 * static_cast<int64_t>(plan.part.tokens);
  const int slot = works ? static_cast<int>(unit / 2) : 0, half = works ? unit & 1 : 0;
  const int token = plan.TokenOfSlot(workspace, head, slot);
  RowBlock row;
  row.Load(half == 0 ? plan.Key(head, token) : plan.Value(head, token), p.element_type, at.block);
  const uint32_t out = static_cast<uint32_t>(head) * plan.part.tokens + slot;
  if constexpr (kBits > 0) {
    const uint32_t cluster = plan.Cluster(head, plan.ClusterOfToken(workspace, head, token));
    const float* channels = plan.Channels(head);
    float x[kCodeBlock];
    row.ToFloats(p.element_type, x);
    if (half == 0) {
#pragma unroll
      for (int i = 0; i < kCodeBlock; ++i) {
        x[i] = __fmul_rn(x[i], channels[at.block * kCodeBlock + i]);
      }
    }
    EncodeCodes<kBits>(
        plan, at, half, (half == 0 ? plan.part.centroids : plan.part.value_means).At(cluster),
        channels + (1 + half) * p.head_dim, x, works ? plan.part.codes.At(out) : nullptr);
  }
  constexpr bool kRemains = kFormat == RecordFormat::kK8V4;
  EncodeRecordHalf<kFormat>(at, row, half, p.element_type, p.head_dim,
                            works ? plan.part.records.At(out) : nullptr,
                            works && kRemains ? plan.part.remainders.At(out) : nullptr);
}

// ---- host
// --------------------------------------------------------------------------------------------

bool Valid(const IndexCudaParams& p) {
  const bool codes =
      p.code_bits == 0 || (p.code_bits >= 2 && p.code_bits <= 4 && p.group_channels >= 16 &&
                           p.group_channels % 16 == 0 && p.head_dim % p.group_channels == 0);
  return p.kv_heads >= 1 && p.kv_heads <= 256 && p.head_dim >= 16 && p.head_dim <= 512 &&
         p.head_dim % 16 == 0 && p.tokens_per_cluster >= 1 && p.segment_tokens >= 0 &&
         p.iterations >= 1 && codes &&
         (p.format == RecordFormat::kRaw || p.format == RecordFormat::kK8V4);
}

int64_t SegmentTokens(const IndexCudaParams& p, int64_t tokens) {
  return p.segment_tokens > 0 ? std::min<int64_t>(p.segment_tokens, tokens) : tokens;
}
int64_t SegmentClusters(const IndexCudaParams& p, int64_t tokens) {
  return std::max<int64_t>(1, tokens / p.tokens_per_cluster);
}

Plan MakePlan(const IndexCudaParams& p, int64_t tokens) {
  Plan plan = {};
  plan.params = p;
  plan.segment_tokens = static_cast<int>(SegmentTokens(p, tokens));
  plan.segments = static_cast<int>((tokens + plan.segment_tokens - 1) / plan.segment_tokens);
  plan.segment_clusters = static_cast<int>(SegmentClusters(p, plan.segment_tokens));
  plan.runs = static_cast<int>((tokens + kRun - 1) / kRun);
  plan.kmeans.dim = p.head_dim;
  plan.kmeans.element_type = p.element_type;
  plan.kmeans.iterations = p.iterations;
  plan.kmeans.max_rows = plan.segment_tokens;
  plan.kmeans.max_clusters = plan.segment_clusters;
  const int64_t heads = p.kv_heads, clusters = IndexCudaClusters(p, tokens);
  const int64_t problems = heads * plan.segments;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += (bytes + 255) / 256 * 256;
    return offset;
  };
  plan.problems = take(problems * static_cast<int64_t>(sizeof(KMeansCudaProblem)));
  plan.labels = take(heads * tokens * 4);
  plan.order = take(heads * tokens * 4);
  plan.begin = take((heads * clusters + problems) * 4);
  plan.centroids = take(heads * clusters * p.head_dim * 4);
  plan.sums = take(heads * plan.runs * 2 * p.head_dim * 8);
  plan.means = take(heads * p.head_dim * 8);
  plan.kmeans_space =
      take(problems <= 65535 ? KMeansCudaWorkspaceBytes(plan.kmeans, static_cast<int32_t>(problems))
                             : 0);
  plan.bytes = at;
  return plan;
}

using PlanKernel = void (*)(Plan, unsigned char*);

template <int kBits>
PlanKernel EncodeKernelOf(RecordFormat format) {
  return format == RecordFormat::kRaw ? EncodeSlotsKernel<kBits, RecordFormat::kRaw>
                                      : EncodeSlotsKernel<kBits, RecordFormat::kK8V4>;
}

class Builder {
 public:
  Builder(const IndexCudaParams& params, const IndexCudaInput& input, const DeviceIndexPart& part,
          void* workspace, cudaStream_t stream)
      : plan_(MakePlan(params, part.tokens)),
        workspace_(static_cast<unsigned char*>(workspace)),
        stream_(stream),
        heads_(static_cast<unsigned>(params.kv_heads)) {
    plan_.input = input;
    plan_.part = part;
  }

  cudaError_t Build() const {
    const int problems = plan_.params.kv_heads * plan_.segments;
    CKV_RETURN_IF_CUDA_ERROR(Metric());
    CKV_RETURN_IF_CUDA_ERROR(
        Run(FillProblemsKernel, dim3((problems + kThreads - 1) / kThreads), kThreads));
    CKV_RETURN_IF_CUDA_ERROR(
        LaunchKMeans(plan_.kmeans, plan_.At<KMeansCudaProblem>(workspace_, plan_.problems, 0),
                     problems, workspace_ + plan_.kmeans_space, stream_));
    CKV_RETURN_IF_CUDA_ERROR(Run(
        ArrangeKernel, dim3(std::min(plan_.part.tokens / kThreads + 1, 128), heads_), kThreads));
    const auto means = plan_.params.head_dim <= 128   ? ValueMeansKernel<1>
                       : plan_.params.head_dim <= 256 ? ValueMeansKernel<2>
                                                      : ValueMeansKernel<4>;
    CKV_RETURN_IF_CUDA_ERROR(Run(means, dim3((plan_.part.clusters + 7) / 8, heads_), kThreads));
    if (plan_.params.code_bits != 0 && !plan_.input.inherits_channels) {
      CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(SumResidualsKernel, dim3(plan_.runs, heads_),
                                            dim3(ChannelThreads()), kRun * sizeof(SlotRows), 1,
                                            stream_, plan_, workspace_));
      CKV_RETURN_IF_CUDA_ERROR(Run(BalanceKernel, dim3(heads_), ChannelThreads()));
    }
    return Encode();
  }

  cudaError_t Encode() const {
    const int per_block = kWarp / (plan_.params.head_dim / kCodeBlock) * (kThreads / kWarp);
    const int64_t units = 2 * static_cast<int64_t>(plan_.part.tokens);
    const RecordFormat format = plan_.params.format;
    const PlanKernel kernel = plan_.params.code_bits == 0   ? EncodeKernelOf<0>(format)
                              : plan_.params.code_bits == 2 ? EncodeKernelOf<2>(format)
                              : plan_.params.code_bits == 3 ? EncodeKernelOf<3>(format)
                                                            : EncodeKernelOf<4>(format);
    return Run(kernel, dim3(static_cast<unsigned>((units + per_block - 1) / per_block), heads_),
               kThreads);
  }

 private:
  cudaError_t Metric() const {
    if (!plan_.input.inherits_channels && plan_.input.query_rms != nullptr) {
      const dim3 grid(plan_.runs, heads_), block(ChannelThreads());
      CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(SumKeysKernel, grid, block, kRun * sizeof(void*), 1,
                                            stream_, plan_, false, workspace_));
      CKV_RETURN_IF_CUDA_ERROR(Run(KeyMeansKernel, dim3(heads_), ChannelThreads()));
      CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(SumKeysKernel, grid, block, kRun * sizeof(void*), 1,
                                            stream_, plan_, true, workspace_));
    }
    return Run(ChannelsKernel, dim3(heads_), ChannelThreads());
  }

  int ChannelThreads() const { return (plan_.params.head_dim + kWarp - 1) / kWarp * kWarp; }
  cudaError_t Run(PlanKernel kernel, dim3 grid, int threads) const {
    return cuda::Launch(kernel, grid, dim3(threads), 0, 1, stream_, plan_, workspace_);
  }

  Plan plan_;
  unsigned char* workspace_;
  cudaStream_t stream_;
  unsigned heads_;
};

bool ValidPart(const IndexCudaParams& params, const DeviceIndexPart& part) {
  if (!Valid(params) || part.tokens < 1 ||
      part.clusters != IndexCudaClusters(params, part.tokens)) {
    return false;
  }
  const int64_t segment = SegmentTokens(params, part.tokens);
  return params.kv_heads * ((part.tokens + segment - 1) / segment) <= 65535;
}

}  // namespace

int64_t IndexCudaClusters(const IndexCudaParams& params, int64_t tokens) {
  if (!Valid(params) || tokens < 1) return 0;
  const int64_t segment = SegmentTokens(params, tokens), rest = tokens % segment;
  return tokens / segment * SegmentClusters(params, segment) +
         (rest > 0 ? SegmentClusters(params, rest) : 0);
}

int64_t IndexCudaWorkspaceBytes(const IndexCudaParams& params, int64_t tokens) {
  return Valid(params) && tokens >= 1 ? MakePlan(params, tokens).bytes : 0;
}

cudaError_t LaunchBuildIndexPart(const IndexCudaParams& params, const IndexCudaInput& input,
                                 const DeviceIndexPart& part, void* workspace,
                                 cudaStream_t stream) {
  if (!ValidPart(params, part)) return cudaErrorInvalidValue;
  return Builder(params, input, part, workspace, stream).Build();
}

cudaError_t LaunchEncodeIndexSlots(const IndexCudaParams& params, const IndexCudaInput& input,
                                   const DeviceIndexPart& part, void* workspace,
                                   cudaStream_t stream) {
  if (!ValidPart(params, part)) return cudaErrorInvalidValue;
  return Builder(params, input, part, workspace, stream).Encode();
}

}  // namespace clusterkv::kernels
