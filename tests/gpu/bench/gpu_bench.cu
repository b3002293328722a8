// What bench.py times: each kernel set up on synthetic data of a real shape, behind a C interface.
//
// ckv_NAME_create(…) -> handle, ckv_NAME_run(handle, layer, stream) -> cudaError_t, and where there
// is one ckv_NAME_peer(handle, layer, stream). `layers` independent copies of the data lie in
// memory, so that timing over them does not measure the L2 cache. Handles live as long as the
// process.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/attention/attention_cuda.h"
#include "kernels/gather/gather_cuda.h"
#include "kernels/index/index_cuda.h"
#include "kernels/kmeans/kmeans_cuda.h"
#include "kernels/resident/resident_cuda.h"
#include "kernels/select/select_cuda.h"
#include "tests/gpu/bench/bench_ok.h"

namespace clusterkv::kernels {
namespace {

std::mt19937_64 generator(11);
constexpr int64_t kPageBytes = 1 << 16;

struct Memory {
  void* data;
  int64_t bytes;
};
std::vector<Memory> allocated;  // all that ckv_free frees
std::vector<Memory> results;    // of kernels: what ckv_digest reads

template <typename T>
T* Allocate(int64_t count) {
  T* data;
  BENCH_OK(cudaMalloc(&data, std::max<int64_t>(1, count) * sizeof(T)));
  allocated.push_back({data, count * static_cast<int64_t>(sizeof(T))});
  return data;
}
template <typename T>
T* AllocateResult(int64_t count) {
  T* data = Allocate<T>(count);
  results.push_back(allocated.back());
  return data;
}
template <typename T>
T* Upload(const std::vector<T>& host) {
  T* data = Allocate<T>(static_cast<int64_t>(host.size()));
  BENCH_OK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

__device__ float HashUniform(uint64_t x) {  // [-1, 1)
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  x ^= x >> 33;
  return static_cast<float>(x >> 40) * (2.0f / 16777216.0f) - 1.0f;
}
__global__ void FillFloats(float* to, int64_t count, uint64_t seed, float size) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = HashUniform(i + seed * 0x9e3779b97f4a7c15ull) * size;
  }
}
__global__ void FillHalves(uint16_t* to, int64_t count, uint64_t seed, float size) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = __half_as_ushort(__float2half_rn(HashUniform(i + seed * 0x9e3779b97f4a7c15ull) * size));
  }
}
__global__ void FillBFloat16(uint16_t* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] =
        static_cast<uint16_t>(__float_as_uint(HashUniform(i + seed * 0x9e3779b97f4a7c15ull)) >> 16);
  }
}
// Codes of 2 bits in groups of 32 at head_dim 128: 16 scales and lows, then 64 bytes of bits.
__global__ void FillCodes(uint16_t* to, int64_t tokens, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < tokens * 48;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int at = static_cast<int>(i % 48);
    const float x = HashUniform(i + seed * 0x9e3779b97f4a7c15ull);
    uint16_t bits = static_cast<uint16_t>(__float_as_uint(x));
    if (at < 16) bits = at / 4 % 2 == 0 ? 0x3800 : 0xb800;  // scale .5, low -.5
    to[i] = bits;
  }
}

using Digest = unsigned long long;  // NOLINT(runtime/int): what atomicAdd takes
// Adds a sum over the words that tells of each one and of its place.
__global__ void AddDigest(const uint32_t* words, int64_t count, uint64_t seed, Digest* sum) {
  uint64_t mine = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = (static_cast<uint64_t>(words[i]) + seed) * 0x9e3779b97f4a7c15ull + i;
    x = (x ^ x >> 31) * 0xbf58476d1ce4e5b9ull;
    mine += x ^ x >> 29;
  }
  atomicAdd(sum, static_cast<Digest>(mine));
}

// Space for `count` elements in scattered pages.
DevicePagedView MakePaged(int64_t element_bytes, int64_t count, unsigned char** memory) {
  const int64_t per_page = kPageBytes / element_bytes;
  const int64_t pages = (count + per_page - 1) / per_page;
  *memory = Allocate<unsigned char>(pages * kPageBytes);
  std::vector<uint32_t> list(pages);
  std::iota(list.begin(), list.end(), 0u);
  std::shuffle(list.begin(), list.end(), generator);
  return MakeDevicePagedView(*memory, Upload(list), kPageBytes, element_bytes);
}

DevicePagedView MakeResult(int64_t element_bytes, int64_t count, unsigned char** memory) {
  const DevicePagedView view = MakePaged(element_bytes, count, memory);
  results.push_back(*(allocated.end() - 2));  // before the list of its pages
  return view;
}

// ---- select and answer
// -----------------------------------------------------------------------------

constexpr int kDim = 128, kHeads = 8, kGroup = 4;
constexpr int kRowBytes = 2 * kDim;  // of a centroid, of a value mean

struct SelectBench {
  SelectCudaParams params;
  int pairs = 0;
  std::vector<SelectCudaPair*> device_pairs;  // per layer
  std::vector<SelectCudaOutput> outputs;
  std::vector<void*> workspaces;
  std::vector<DeviceIndexPart*> parts;
  float* sink = nullptr;  // of the peer
};

// One part per sequence: `clusters` clusters of 16 tokens for each of 8 KV heads.
DeviceIndexPart MakePart(int clusters, uint64_t seed) {
  DeviceIndexPart part;
  part.tokens = clusters * 16;
  part.clusters = clusters;
  unsigned char* memory;
  const int64_t rows = int64_t{kHeads} * clusters, tokens = int64_t{kHeads} * part.tokens;
  part.centroids = MakePaged(kRowBytes, rows, &memory);
  FillHalves<<<1024, 256>>>(reinterpret_cast<uint16_t*>(memory), rows * kDim, seed, 1.5f);
  part.value_means = MakePaged(kRowBytes, rows, &memory);
  FillHalves<<<1024, 256>>>(reinterpret_cast<uint16_t*>(memory), rows * kDim, seed + 1, 1.0f);
  // Small arrays: in one page each.
  std::vector<int32_t> begin, positions;
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c <= clusters; ++c) begin.push_back(16 * c);
    std::vector<int32_t> order(part.tokens);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    positions.insert(positions.end(), order.begin(), order.end());
  }
  uint32_t* const zero = Upload(std::vector<uint32_t>{0});
  part.cluster_begin =
      MakeDevicePagedView(Upload(begin), zero, static_cast<int64_t>(begin.size()) * 4, 4);
  part.positions =
      MakeDevicePagedView(Upload(positions), zero, static_cast<int64_t>(positions.size()) * 4, 4);
  part.codes = MakePaged(96, tokens, &memory);
  const int64_t code_pages = (tokens + kPageBytes / 96 - 1) / (kPageBytes / 96);
  for (int64_t p = 0; p < code_pages; ++p) {
    FillCodes<<<64, 256>>>(reinterpret_cast<uint16_t*>(memory + p * kPageBytes), kPageBytes / 96,
                           seed * 977 + p);
  }
  part.records = MakePaged(4 * kDim, tokens, &memory);  // of whatever numbers
  part.channels = MakeDevicePagedView(Upload(std::vector<float>(kHeads * 3 * kDim, 1.0f)), zero,
                                      kHeads * 3 * kDim * 4, 3 * kDim * 4);
  BENCH_OK(cudaGetLastError());
  BENCH_OK(cudaDeviceSynchronize());
  return part;
}

// Reads what an answer must read, in any order it likes: every centroid, the codes of the scored
// clusters and their value means, the estimated clusters' value means.
__global__ void __launch_bounds__(512)
    ReadKernel(const SelectCudaPair* pairs, SelectCudaOutput out, int blocks, float* sink) {
  const int index = static_cast<int>(blockIdx.x) / blocks,
            rank = static_cast<int>(blockIdx.x) % blocks;
  const SelectCudaPair pair = pairs[index];
  const DeviceIndexPart& part = pair.parts[0];
  const int lane = threadIdx.x % 32, warp = rank * 16 + threadIdx.x / 32, warps = blocks * 16;
  uint32_t sum = 0;
  const uint32_t base = static_cast<uint32_t>(pair.kv_head) * part.clusters;
  // Rows of two clusters: half a warp each.
  const auto read = [&](const DevicePagedView& view, int a, int b) {
    const unsigned char* row = view.At(base + (lane < 16 ? a : b));
    const uint4 x = reinterpret_cast<const uint4*>(row)[lane % 16];
    sum += x.x ^ x.y ^ x.z ^ x.w;
  };
  const auto next = [](int i, int count) { return min(i + 1, count - 1); };
#pragma unroll 8
  for (int c = 2 * warp; c < part.clusters; c += 2 * warps) {
    read(part.centroids, c, next(c, part.clusters));
  }
  const int scored = out.scored_count[index], estimated = out.estimated_count[index];
  const int32_t* scored_clusters =
      out.scored_clusters + static_cast<int64_t>(index) * out.max_listed;
  for (int i = 2 * warp; i < scored; i += 2 * warps) {
    read(part.value_means, scored_clusters[i], scored_clusters[next(i, scored)]);
  }
  for (int i = warp; i < scored; i += warps) {
    const int c = scored_clusters[i];
    // 16 tokens of 96 bytes: three rounds of 512 bytes.
    const uint32_t first = static_cast<uint32_t>(pair.kv_head) * part.tokens + 16 * c;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int piece = k * 32 + lane;
      const uint4 x = reinterpret_cast<const uint4*>(part.codes.At(first + piece / 6))[piece % 6];
      sum += x.x ^ x.y ^ x.z ^ x.w;
    }
  }
  const int32_t* estimated_clusters =
      out.estimated_clusters + static_cast<int64_t>(index) * out.max_listed;
#pragma unroll 4
  for (int i = 2 * warp; i < estimated; i += 2 * warps) {
    read(part.value_means, estimated_clusters[i], estimated_clusters[next(i, estimated)]);
  }
  if (sum == 0x12345678u) *sink = 1;
}

__global__ void EmptyKernel() {}

}  // namespace

extern "C" {

// The device memory of all that was created, which is used no more.
void ckv_free() {
  for (const Memory& memory : allocated) BENCH_OK(cudaFree(memory.data));
  allocated.clear();
  results.clear();
}

// Of all results of what was created, after what `stream` was given before.
uint64_t ckv_digest(cudaStream_t stream) {
  static Digest* const sum = [] {
    Digest* data;
    BENCH_OK(cudaMalloc(&data, sizeof *data));
    return data;
  }();
  BENCH_OK(cudaMemsetAsync(sum, 0, sizeof *sum, stream));
  for (size_t i = 0; i < results.size(); ++i) {
    AddDigest<<<1024, 256, 0, stream>>>(static_cast<const uint32_t*>(results[i].data),
                                        results[i].bytes / 4, i, sum);
  }
  Digest host;
  BENCH_OK(cudaMemcpyAsync(&host, sum, sizeof host, cudaMemcpyDeviceToHost, stream));
  BENCH_OK(cudaStreamSynchronize(stream));
  return host;
}

int ckv_empty_run(void*, int, cudaStream_t stream) {
  EmptyKernel<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}

void* ckv_select_create(int sequences, int clusters, int scored_tokens, float estimated, int layers,
                        int blocks_per_pair, int group) {
  auto* bench = new SelectBench;
  SelectCudaParams& p = bench->params;
  p.group = group;
  p.head_dim = kDim;
  p.scale = 0.0883883f;
  p.scored_tokens = scored_tokens;
  p.budget_tokens = 64;
  p.estimated_fraction = estimated;
  p.max_clusters = clusters;
  p.max_sinks = 16;
  p.blocks_per_pair = blocks_per_pair;
  const int pairs = bench->pairs = sequences * kHeads;
  bench->sink = Allocate<float>(1);
  uint16_t* sinks = Allocate<uint16_t>(16 * kDim);
  FillBFloat16<<<16, 256>>>(sinks, 16 * kDim, 5);
  for (int layer = 0; layer < layers; ++layer) {
    std::vector<DeviceIndexPart> parts;
    for (int s = 0; s < sequences; ++s) {
      parts.push_back(MakePart(clusters, 1000 * (layer + 1) + 2 * s));
    }
    DeviceIndexPart* device_parts = Upload(parts);
    float* queries = Allocate<float>(int64_t{pairs} * group * kDim);
    FillFloats<<<256, 256>>>(queries, int64_t{pairs} * group * kDim, 77 + layer, 2.0f);
    std::vector<SelectCudaPair> host(pairs);
    for (int i = 0; i < pairs; ++i) {
      host[i].parts = device_parts + i / kHeads;
      host[i].part_count = 1;
      host[i].clusters = clusters;
      host[i].kv_head = i % kHeads;
      host[i].sink_tokens = 16;
      host[i].queries = queries + int64_t{i} * group * kDim;
      host[i].sink_keys = reinterpret_cast<const unsigned char*>(sinks);
      host[i].sink_key_stride_bytes = 2 * kDim;
    }
    bench->device_pairs.push_back(Upload(host));
    SelectCudaOutput out;
    out.max_exact = ExactCapacity(p);
    out.max_listed = clusters;
    out.exact_count = AllocateResult<int32_t>(pairs);
    out.positions = AllocateResult<int32_t>(int64_t{pairs} * out.max_exact);
    out.parts = AllocateResult<int32_t>(int64_t{pairs} * out.max_exact);
    out.slots = AllocateResult<int32_t>(int64_t{pairs} * out.max_exact);
    out.scored_count = AllocateResult<int32_t>(pairs);
    out.scored_clusters = AllocateResult<int32_t>(int64_t{pairs} * clusters);
    out.estimated_count = AllocateResult<int32_t>(pairs);
    out.estimated_clusters = AllocateResult<int32_t>(int64_t{pairs} * clusters);
    out.state_output = AllocateResult<float>(int64_t{pairs} * group * kDim);
    out.state_lse = AllocateResult<float>(int64_t{pairs} * group);
    bench->outputs.push_back(out);
    bench->workspaces.push_back(Allocate<unsigned char>(SelectCudaWorkspaceBytes(p, pairs)));
  }
  BENCH_OK(cudaDeviceSynchronize());
  return bench;
}
int ckv_select_run(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<SelectBench*>(handle);
  return LaunchSelect(b->params, b->device_pairs[layer], b->pairs, b->outputs[layer],
                      b->workspaces[layer], stream);
}
// By the kernel for every shape.
int ckv_select_general(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<SelectBench*>(handle);
  SelectCudaParams params = b->params;
  params.general = true;
  return LaunchSelect(params, b->device_pairs[layer], b->pairs, b->outputs[layer],
                      b->workspaces[layer], stream);
}
// Reads the bytes of the last run's answer.
int ckv_select_peer(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<SelectBench*>(handle);
  int blocks = 1;
  while (blocks < 8 && blocks * 2 * b->pairs <= 132) blocks *= 2;
  ReadKernel<<<b->pairs * blocks, 512, 0, stream>>>(b->device_pairs[layer], b->outputs[layer],
                                                    blocks, b->sink);
  return cudaGetLastError();
}

// ---- a round of the resident kernel
// ----------------------------------------------------------------

struct RoundBench {
  std::vector<ServeParams> serves;  // per layer
};

// Rounds over the data of ckv_select_create: one a launch, with queries that are there already.
void* ckv_round_create(void* of, int blocks_per_pair) {
  const auto& select = *static_cast<SelectBench*>(of);
  auto* bench = new RoundBench;
  ServeParams serve;
  ResidentShape& s = serve.shape;
  s.layers = static_cast<int32_t>(select.device_pairs.size());
  s.pairs = select.pairs;
  s.group = select.params.group;
  s.head_dim = kDim;
  s.max_exact = select.params.budget_tokens;
  s.slots = 256;
  serve.select = select.params;
  serve.select.blocks_per_pair = blocks_per_pair;
  serve.blocks = 128;
  serve.rounds = 1;
  const auto zeros = [](int64_t bytes) {
    unsigned char* memory = Allocate<unsigned char>(bytes);
    BENCH_OK(cudaMemset(memory, 0, bytes));
    return memory;
  };
  std::vector<SelectCudaPair> pairs(int64_t{s.layers} * s.pairs);
  for (int layer = 0; layer < s.layers; ++layer) {
    BENCH_OK(cudaMemcpy(&pairs[int64_t{layer} * s.pairs], select.device_pairs[layer],
                        s.pairs * sizeof(SelectCudaPair), cudaMemcpyDeviceToHost));
  }
  serve.pairs = Upload(pairs);
  serve.replies = zeros(ReplyWindowBytes(s));
  serve.hot_cache = zeros(HotCacheBytes(s));
  serve.directory = zeros(DirectoryBytes(s));
  serve.control = reinterpret_cast<ServeControl*>(zeros(sizeof(ServeControl)));
  serve.workspace = zeros(ServeWorkspaceBytes(serve));
  BENCH_OK(LaunchForget(s, serve.directory, 0, s.pairs, nullptr));
  StepParams ask;
  ask.shape = s;
  ask.scale = select.params.scale;
  ask.pairs = reinterpret_cast<const StepPair*>(
      zeros(int64_t{s.layers} * s.pairs * static_cast<int64_t>(sizeof(StepPair))));
  ask.replies = serve.replies;
  ask.hot_cache = serve.hot_cache;
  ask.rounds = reinterpret_cast<const uint64_t*>(zeros(8));
  ask.status = reinterpret_cast<uint32_t*>(zeros(4));
  const int64_t numbers = int64_t{s.pairs} * s.group * kDim;
  uint16_t* queries = Allocate<uint16_t>(numbers);
  for (int layer = 0; layer < s.layers; ++layer) {
    FillBFloat16<<<256, 256>>>(queries, numbers, 77 + layer);
    ask.requests = zeros(RequestWindowBytes(s));
    BENCH_OK(LaunchStep(ask, layer, kStepAsk, queries, queries, nullptr, nullptr));
    serve.requests = ask.requests;
    serve.first_round = static_cast<uint64_t>(layer) + 1;
    bench->serves.push_back(serve);
    BENCH_OK(cudaDeviceSynchronize());
  }
  return bench;
}
int ckv_round_run(void* handle, int layer, cudaStream_t stream) {
  return LaunchServe(&static_cast<RoundBench*>(handle)->serves[layer], 1, stream);
}

// ---- attention
// --------------------------------------------------------------------------------------

struct AttentionBench {
  AttentionCudaParams params;
  int pairs;
  std::vector<AttentionCudaPair*> scattered, contiguous;  // per layer
  void* workspace;
};

void* ckv_attention_create(int pairs, int tokens, int k8v4, int layers) {
  auto* bench = new AttentionBench;
  AttentionCudaParams& p = bench->params;
  p.group = kGroup;
  p.head_dim = kDim;
  p.format = k8v4 ? RecordFormat::kK8V4 : RecordFormat::kRaw;
  p.scale = 0.0883883f;
  p.max_tokens = tokens;
  bench->pairs = pairs;
  const int64_t record_bytes = k8v4 ? 200 : 512;
  for (int layer = 0; layer < layers; ++layer) {
    // All pairs share one pool of slots twice their size; each has its own random ones, or a run.
    const int64_t slots = int64_t{pairs} * tokens;
    unsigned char* pool = Allocate<unsigned char>(slots * record_bytes);
    FillBFloat16<<<4096, 256>>>(reinterpret_cast<uint16_t*>(pool), slots * record_bytes / 2, layer);
    std::vector<int32_t> order(slots);
    std::iota(order.begin(), order.end(), 0);
    const int32_t* straight = Upload(order);
    std::shuffle(order.begin(), order.end(), generator);
    const int32_t* shuffled = Upload(order);
    float* queries = Allocate<float>(int64_t{pairs} * kGroup * kDim);
    FillFloats<<<256, 256>>>(queries, int64_t{pairs} * kGroup * kDim, 99, 1.0f);
    float* output = AllocateResult<float>(int64_t{pairs} * kGroup * kDim);
    for (int scattered = 0; scattered < 2; ++scattered) {
      std::vector<AttentionCudaPair> host(pairs);
      for (int i = 0; i < pairs; ++i) {
        host[i].queries = queries + int64_t{i} * kGroup * kDim;
        host[i].record_tokens = tokens;
        host[i].slot_base = pool;
        host[i].slots = (scattered ? shuffled : straight) + int64_t{i} * tokens;
        host[i].output = output + int64_t{i} * kGroup * kDim;
      }
      (scattered ? bench->scattered : bench->contiguous).push_back(Upload(host));
    }
  }
  const int64_t bytes = AttentionCudaWorkspaceBytes(p, pairs);
  bench->workspace = Allocate<unsigned char>(bytes);
  BENCH_OK(cudaMemset(bench->workspace, 0, bytes));
  BENCH_OK(cudaDeviceSynchronize());
  return bench;
}
int ckv_attention_run(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<AttentionBench*>(handle);
  return LaunchSparseAttention(b->params, b->scattered[layer], b->pairs, b->workspace, stream);
}
int ckv_attention_peer(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<AttentionBench*>(handle);
  return LaunchSparseAttention(b->params, b->contiguous[layer], b->pairs, b->workspace, stream);
}

struct KMeansBench {
  KMeansCudaParams params;
  int problems;
  KMeansCudaProblem* device_problems;
  void* workspace;
};

// rows: bf16 [problems, rows_per_problem, 128] in device memory.
void* ckv_kmeans_create(void* rows, int problems, int rows_per_problem, int clusters,
                        int iterations) {
  auto* bench = new KMeansBench;
  bench->params.dim = kDim;
  bench->params.iterations = iterations;
  bench->params.max_rows = rows_per_problem;
  bench->params.max_clusters = clusters;
  bench->problems = problems;
  const int64_t all = int64_t{problems} * rows_per_problem;
  // One page per problem.
  std::vector<uint32_t> pages(problems);
  std::iota(pages.begin(), pages.end(), 0u);
  const DevicePagedView view =
      MakeDevicePagedView(rows, Upload(pages), int64_t{rows_per_problem} * kDim * 2, kDim * 2);
  int32_t* labels = AllocateResult<int32_t>(all);
  int32_t* order = AllocateResult<int32_t>(all);
  float* centroids = AllocateResult<float>(int64_t{problems} * clusters * kDim);
  int32_t* begin = AllocateResult<int32_t>(int64_t{problems} * (clusters + 1));
  std::vector<KMeansCudaProblem> host(problems);
  for (int i = 0; i < problems; ++i) {
    host[i].rows = view;
    host[i].first_row = static_cast<uint32_t>(int64_t{i} * rows_per_problem);
    host[i].row_count = rows_per_problem;
    host[i].cluster_count = clusters;
    host[i].labels = labels + int64_t{i} * rows_per_problem;
    host[i].order = order + int64_t{i} * rows_per_problem;
    host[i].centroids = centroids + int64_t{i} * clusters * kDim;
    host[i].begin = begin + int64_t{i} * (clusters + 1);
  }
  bench->device_problems = Upload(host);
  bench->workspace = Allocate<unsigned char>(KMeansCudaWorkspaceBytes(bench->params, problems));
  BENCH_OK(
      LaunchKMeans(bench->params, bench->device_problems, problems, bench->workspace, nullptr));
  BENCH_OK(cudaDeviceSynchronize());
  return bench;
}
int ckv_kmeans_run(void* handle, int, cudaStream_t stream) {
  auto* b = static_cast<KMeansBench*>(handle);
  return LaunchKMeans(b->params, b->device_problems, b->problems, b->workspace, stream);
}
int ckv_kmeans_assign(void* handle, int, cudaStream_t stream) {
  auto* b = static_cast<KMeansBench*>(handle);
  return LaunchAssignRows(b->params, b->device_problems, b->problems, b->workspace, stream);
}

struct IndexBench {
  IndexCudaParams params;
  std::vector<IndexCudaInput> inputs;  // per layer
  std::vector<DeviceIndexPart> parts;
  void* workspace;
  std::vector<unsigned char*> from, to;  // of the peer: as many bytes as K and V
  int64_t bytes;
};

// `tokens` tokens of 8 KV heads; 2-bit codes, or none.
void* ckv_index_create(int tokens, int code_bits, int k8v4, int layers) {
  auto* bench = new IndexBench;
  IndexCudaParams& p = bench->params;
  p.kv_heads = kHeads;
  p.head_dim = kDim;
  p.code_bits = code_bits;
  p.format = k8v4 ? RecordFormat::kK8V4 : RecordFormat::kRaw;
  bench->bytes = int64_t{tokens} * kHeads * kDim * 4;
  bench->workspace = Allocate<unsigned char>(IndexCudaWorkspaceBytes(p, tokens));
  const int64_t row_bytes = kHeads * kDim * 2, clusters = IndexCudaClusters(p, tokens);
  std::vector<float> rms(kHeads * kDim, 1.0f);
  for (int layer = 0; layer < layers; ++layer) {
    unsigned char* memory;
    IndexCudaInput input;
    input.keys = MakePaged(row_bytes, tokens, &memory);
    FillBFloat16<<<4096, 256>>>(reinterpret_cast<uint16_t*>(memory), tokens * row_bytes / 2,
                                2 * layer);
    input.values = MakePaged(row_bytes, tokens, &memory);
    FillBFloat16<<<4096, 256>>>(reinterpret_cast<uint16_t*>(memory), tokens * row_bytes / 2,
                                2 * layer + 1);
    input.query_rms = Upload(rms);
    DeviceIndexPart part;
    part.tokens = tokens;
    part.clusters = static_cast<int32_t>(clusters);
    part.centroids = MakeResult(kRowBytes, kHeads * clusters, &memory);
    part.value_means = MakeResult(kRowBytes, kHeads * clusters, &memory);
    part.cluster_begin = MakeResult(4, kHeads * (clusters + 1), &memory);
    part.positions = MakeResult(4, int64_t{kHeads} * tokens, &memory);
    part.slots = MakeResult(4, int64_t{kHeads} * tokens, &memory);
    part.codes = MakeResult(96, int64_t{kHeads} * tokens, &memory);
    part.records = MakeResult(RecordFormatBytes(p.format, p.element_type, kDim),
                              int64_t{kHeads} * tokens, &memory);
    part.channels = MakeResult(12 * kDim, kHeads, &memory);
    if (const int64_t remainder_bytes = RemainderFormatBytes(p.format, kDim); remainder_bytes > 0) {
      part.remainders = MakeResult(remainder_bytes, int64_t{kHeads} * tokens, &memory);
    }
    bench->inputs.push_back(input);
    bench->parts.push_back(part);
    bench->from.push_back(Allocate<unsigned char>(bench->bytes));
    bench->to.push_back(Allocate<unsigned char>(bench->bytes));
  }
  BENCH_OK(cudaDeviceSynchronize());
  return bench;
}
int ckv_index_build(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<IndexBench*>(handle);
  return LaunchBuildIndexPart(b->params, b->inputs[layer], b->parts[layer], b->workspace, stream);
}
// After a build of the same layer; the workspace may be of another: any order serves.
int ckv_index_encode(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<IndexBench*>(handle);
  return LaunchEncodeIndexSlots(b->params, b->inputs[layer], b->parts[layer], b->workspace, stream);
}
int ckv_index_peer(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<IndexBench*>(handle);
  return cudaMemcpyAsync(b->to[layer], b->from[layer], b->bytes, cudaMemcpyDeviceToDevice, stream);
}

struct MoveBench {
  std::vector<DevicePagedView*> views;
  std::vector<RecordMove*> moves;
  std::vector<unsigned char*> destinations, sources;
  int count;
  int record_bytes;
};

// `count` records of `record_bytes`, from all over 1 GB to all over slots of 4 times their size.
void* ckv_move_create(int count, int record_bytes, int layers) {
  auto* bench = new MoveBench;
  bench->count = count;
  bench->record_bytes = record_bytes;
  const int64_t all = (int64_t{1} << 30) / record_bytes;
  unsigned char* memory;
  const DevicePagedView view = MakePaged(record_bytes, all, &memory);
  for (int layer = 0; layer < layers; ++layer) {
    std::vector<RecordMove> moves(count);
    for (int i = 0; i < count; ++i) {
      moves[i].element = static_cast<uint32_t>(generator() % static_cast<uint64_t>(all));
      moves[i].destination =
          (int64_t{4} * i + static_cast<int64_t>(generator() % 4)) * record_bytes;
    }
    bench->views.push_back(Upload(std::vector<DevicePagedView>{view}));
    bench->moves.push_back(Upload(moves));
    bench->destinations.push_back(Allocate<unsigned char>(int64_t{4} * count * record_bytes));
    bench->sources.push_back(Allocate<unsigned char>(int64_t{count} * record_bytes));
  }
  return bench;
}
int ckv_move_run(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<MoveBench*>(handle);
  return LaunchMoveRecords(b->views[layer], b->moves[layer], nullptr, b->count, b->record_bytes,
                           b->destinations[layer], stream);
}
int ckv_move_peer(void* handle, int layer, cudaStream_t stream) {
  auto* b = static_cast<MoveBench*>(handle);
  return cudaMemcpyAsync(b->destinations[layer], b->sources[layer],
                         int64_t{b->count} * b->record_bytes, cudaMemcpyDeviceToDevice, stream);
}

}  // extern "C"

}  // namespace clusterkv::kernels
