// What decode_loop.py drives: the KV cache of a model's shape on one GPU as an index, and on the
// other as it is; a resident kernel between them; attention over either. And what together.py
// drives: several groups of one GPU that ask at once. Behind a C interface; functions return a
// cudaError_t unless said otherwise. One cache and one set of ends at a time, but for those kept.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels/attention/attention_cuda.h"
#include "kernels/base/cuda_util.cuh"
#include "kernels/index/index_cuda.h"
#include "kernels/resident/lines.cuh"
#include "kernels/resident/resident_cuda.h"
#include "kernels/resident/windows.h"
#include "tests/gpu/bench/bench_ok.h"

namespace clusterkv::kernels {
namespace {

constexpr int kDim = 128, kHeads = 8, kGroup = 4, kSinks = 16;
constexpr int64_t kPageBytes = 1 << 16;
constexpr int64_t kRow = kHeads * kDim;  // numbers of a token's keys
constexpr float kScale = 0.08838834764f;

// ---- data: the same number wherever it is asked for
// -----------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t Mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}
// About normal, of variance 1: four uniform numbers of 16 bits.
__device__ __forceinline__ float Bell(uint64_t x) {
  const uint64_t h = Mix(x * 0x9e3779b97f4a7c15ull + 0x1234567);
  const float sum = static_cast<float>(h & 0xffff) + static_cast<float>(h >> 16 & 0xffff) +
                    static_cast<float>(h >> 32 & 0xffff) + static_cast<float>(h >> 48);
  return (sum - 131070.0f) * (1.7320508f / 65536.0f);
}
// Keys (what 0) and values (1) of a token: around one of tokens / 20 centers, those of neighbours
// often the same.
__device__ __forceinline__ float Number(uint64_t cache, int what, int head, int token, int channel,
                                        int tokens) {
  const uint64_t of_head = (cache * 2 * kHeads + what * kHeads + head) << 40;
  const uint64_t run = Mix((cache * kHeads + head) * 7919 + token / 8);
  const uint64_t pick = Mix(run + (token % 8 < 6 ? 0 : token));
  const uint64_t center = pick % static_cast<uint64_t>(max(1, tokens / 20));
  return 0.9f * Bell(of_head + (1ull << 39) + center * kDim + channel) +
         0.3f * Bell(of_head + static_cast<uint64_t>(token) * kDim + channel);
}
// kTokenMajor: [tokens, heads, dim]; else [heads, tokens, dim].
template <bool kTokenMajor>
__global__ void FillRows(uint16_t* to, uint64_t cache, int what, int tokens) {
  const int64_t all = int64_t{tokens} * kRow;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < all;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int channel = static_cast<int>(i % kDim);
    const int head = static_cast<int>(kTokenMajor ? i / kDim % kHeads : i / kDim / tokens);
    const int token = static_cast<int>(kTokenMajor ? i / kRow : i / kDim % tokens);
    to[i] = cuda::FloatToBFloat16Bits(Number(cache, what, head, token, channel, tokens));
  }
}
// Queries [steps, layers, pairs, group, dim]: each looks at three of its head's centers; one of
// them changes after every `hold` steps or so, and each step adds noise of its own.
// `first`: sequence of the first pair.
__global__ void FillQueries(uint16_t* to, int steps, int layers, int pairs, int first, int tokens,
                            float size, int hold) {
  constexpr float kNoise = 0.25f;
  const int64_t width = int64_t{layers} * pairs * kGroup * kDim;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int channel = static_cast<int>(i % kDim), group = static_cast<int>(i / kDim % kGroup);
    const int pair = static_cast<int>(i / kDim / kGroup % pairs);
    const int layer = static_cast<int>(i / kDim / kGroup / pairs);
    const uint64_t cache = static_cast<uint64_t>(layer) * 64 + first + pair / kHeads;
    const uint64_t of_head = (cache * 2 * kHeads + pair % kHeads) << 40;
    const uint64_t of_query = (cache * kHeads + pair % kHeads) * kGroup + group;
    for (int step = 0; step < steps; ++step) {
      float x = kNoise * Bell((static_cast<uint64_t>(i) << 12) + step + (7ull << 60));
      for (int k = 0; k < 3; ++k) {
        // Changes of the twelve are spread over the steps.
        const uint64_t turn = (step * 3 + k * hold + static_cast<int>(Mix(of_query) % 64)) /
                              (3 * static_cast<uint64_t>(hold));
        const uint64_t center =
            Mix(of_query * 977 + turn * 31 + k) % static_cast<uint64_t>(max(1, tokens / 20));
        x += 0.57735f * Bell(of_head + (1ull << 39) + center * kDim + channel);
      }
      to[step * width + i] = cuda::FloatToBFloat16Bits(size * x);
    }
  }
}
__global__ void FillSmall(uint16_t* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = cuda::FloatToBFloat16Bits(Bell(seed + i));
  }
}

// What an engine does between its projection and attention: this step's queries (here from the
// walk), and the new token's key and value, from the projection [batch, 6144], into the window.
__global__ void TakeTurnKernel(const uint16_t* walk, const uint64_t* rounds, int layers, int layer,
                               int steps, const uint16_t* projected, uint16_t* queries,
                               float* wide_queries, uint16_t* window_keys, uint16_t* window_values,
                               int window) {
  const int pair = static_cast<int>(blockIdx.x), pairs = static_cast<int>(gridDim.x);
  const uint64_t step = *rounds / static_cast<uint64_t>(layers);
  const int64_t width = int64_t{pairs} * kGroup * kDim;
  const uint16_t* from =
      walk + (static_cast<int64_t>(step % static_cast<uint64_t>(steps)) * layers + layer) * width;
  for (int i = threadIdx.x; i < kGroup * kDim; i += blockDim.x) {
    const int64_t at = int64_t{pair} * kGroup * kDim + i;
    queries[at] = from[at];
    wide_queries[at] = cuda::BFloat16BitsToFloat(from[at]);
  }
  const uint16_t* row = projected + int64_t{pair / kHeads} * 6144 + 4096 + pair % kHeads * kDim;
  const int64_t to =
      (int64_t{pair} * window + static_cast<int64_t>(step % static_cast<uint64_t>(window))) * kDim;
  for (int i = threadIdx.x; i < kDim; i += blockDim.x) {
    window_keys[to + i] = row[i];
    window_values[to + i] = row[1024 + i];
  }
}
__global__ void NarrowKernel(const float* from, uint16_t* to, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = cuda::FloatToBFloat16Bits(from[i]);
}

// A group's worker, by one block: other work for about busy_ns before each layer's queries leave,
// then the wait for the last state. It asks the rounds from `first` on, layers in turn.
struct Client {
  ResidentShape shape;
  resident::WindowLayout windows;
  void* requests;
  const void* replies;
  const uint16_t* walk;  // queries [steps, layers, pairs, group, dim]
  uint64_t first, rounds, busy_ns;
  int steps, blocks_per_pair;
  int64_t* layer_ns;  // [rounds]: from the end of the one before
  uint32_t* gave_up;
};
constexpr int kClientThreads = 1024;
constexpr uint64_t kClientPatience = 1'000'000'000;

__global__ void __launch_bounds__(kClientThreads, 1)
    ClientKernel(const __grid_constant__ Client client) {
  using cuda::DeviceNanoseconds;
  const ResidentShape& s = client.shape;
  const int words = client.windows.query_lines, blocks = client.blocks_per_pair;
  // Numbers of the state that a block of a pair sends, two in a line.
  const int share = (s.group * s.head_dim / 2 + blocks - 1) / blocks * 2;
  uint64_t last = DeviceNanoseconds();
  for (uint64_t round = client.first; round < client.first + client.rounds; ++round) {
    // A tenth more or less, so that two of them do not keep step.
    const uint64_t tenth = client.busy_ns / 10;
    const uint64_t busy = client.busy_ns - tenth + Mix(round + (client.first << 32)) % (2 * tenth);
    while (DeviceNanoseconds() - last < busy) {
    }
    const int layer = static_cast<int>((round - 1) % static_cast<uint64_t>(s.layers));
    const uint64_t step = (round - 1) / static_cast<uint64_t>(s.layers);
    const uint2* queries =
        reinterpret_cast<const uint2*>(client.walk) +
        (static_cast<int64_t>(step % client.steps) * s.layers + layer) * s.pairs * words;
    const uint32_t flag = static_cast<uint32_t>(round);
    uint4* lines = client.windows.Queries(client.requests, 0);
    for (int i = threadIdx.x; i < s.pairs * words; i += kClientThreads) {
      cuda::StoreLine(lines + i, queries[i].x, queries[i].y, flag);
    }
    bool lost = false;
    for (int i = threadIdx.x; i < s.pairs * blocks; i += kClientThreads) {
      const uint4* line = client.windows.State(client.replies, i / blocks) + i % blocks * share / 2;
      uint32_t two[2];
      lost |= !cuda::Poll([&] { return cuda::LoadLine(line, flag, &two[0], &two[1]); },
                          [&] { return DeviceNanoseconds() - last > kClientPatience; });
    }
    if (__syncthreads_count(lost) > 0) {
      if (threadIdx.x == 0) *client.gave_up = 1;
      return;
    }
    const uint64_t now = DeviceNanoseconds();
    if (threadIdx.x == 0) client.layer_ns[round - client.first] = static_cast<int64_t>(now - last);
    last = now;
  }
}

// ---- memory: one block per device for what a cache needs, one for what a set of ends needs
// -----------------------------------------------------------------------------------

struct Arena {
  int device = 0;
  unsigned char* base = nullptr;
  int64_t bytes = 0, used = 0;

  void Create(int of_device, int64_t of_bytes) {
    if (base != nullptr && device == of_device && bytes >= of_bytes) {
      used = 0;
      return;
    }
    Destroy();
    device = of_device;
    bytes = of_bytes;
    BENCH_OK(cudaSetDevice(device));
    BENCH_OK(cudaMalloc(&base, bytes));
    used = 0;
  }
  void Destroy() {
    if (base == nullptr) return;
    BENCH_OK(cudaSetDevice(device));
    BENCH_OK(cudaFree(base));
    base = nullptr;
  }
  template <typename T>
  T* Take(int64_t count) {
    T* at = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 511) / 512 * 512;
    if (used > bytes) {
      std::fprintf(stderr, "an arena of %lld bytes is too small\n", static_cast<long long>(bytes));
      std::abort();
    }
    return at;
  }
  template <typename T>
  T* Upload(const std::vector<T>& host) {
    BENCH_OK(cudaSetDevice(device));
    T* at = Take<T>(static_cast<int64_t>(host.size()));
    BENCH_OK(cudaMemcpy(at, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return at;
  }
  template <typename T>
  T* Zeros(int64_t count) {
    T* at = Take<T>(count);
    BENCH_OK(cudaSetDevice(device));
    BENCH_OK(cudaMemset(at, 0, count * sizeof(T)));
    return at;
  }
};

struct Loop {
  int service = 1, decode = 0;
  int sequences = 0, layers = 0, tokens = 0;  // of the cache
  Arena index, dense, service_ends, decode_ends;
  std::vector<DeviceIndexPart> parts;  // [layers, sequences]
  DeviceIndexPart* device_parts = nullptr;
  uint16_t *keys = nullptr, *values = nullptr;  // dense: [layers, sequences, heads, tokens, dim]
  uint16_t* sink_keys = nullptr;                // service
  // One set of ends, of `batch` sequences from `first` on.
  int first = 0;
  int batch = 0, window = 0, steps = 0, pairs_at_once = 0;
  ServeParams serve;
  StepParams step;
  std::vector<AttentionCudaPair*> dense_pairs;  // per layer
  AttentionCudaParams dense_params;
  void* dense_workspace = nullptr;
  uint16_t *walk = nullptr, *queries = nullptr, *window_keys = nullptr, *window_values = nullptr;
  float *wide_queries = nullptr, *wide_output = nullptr;
  uint64_t *rounds = nullptr, *other_rounds = nullptr;
  cudaStream_t serve_stream = nullptr, control_stream = nullptr;
  uint32_t* host_stop = nullptr;
};
Loop loop;

// Ends that were set aside.
struct Kept {
  ServeParams serve;
  const uint16_t* walk = nullptr;
  Arena service_ends, decode_ends;
};
std::vector<Kept> kept;
std::mt19937_64 generator(5);

DevicePagedView MakePaged(int64_t element_bytes, int64_t count) {
  const int64_t per_page = kPageBytes / element_bytes, pages = (count + per_page - 1) / per_page;
  std::vector<uint32_t> list(pages);
  std::iota(list.begin(), list.end(), 0u);
  std::shuffle(list.begin(), list.end(), generator);
  const uint32_t* device_list = loop.index.Upload(list);
  return MakeDevicePagedView(loop.index.Take<unsigned char>(pages * kPageBytes), device_list,
                             kPageBytes, element_bytes);
}

IndexCudaParams IndexParamsOfLoop(int tokens_per_cluster) {
  IndexCudaParams params;
  params.tokens_per_cluster = tokens_per_cluster;
  params.kv_heads = kHeads;
  params.head_dim = kDim;
  return params;
}

// What the decode GPU has beside its windows: queries, sinks and windows, and both attentions'
// pairs.
void MakeDecodeData(int pairs, int layers, int steps, float size, int hold) {
  Arena& arena = loop.decode_ends;
  const int window = loop.window;
  const int64_t numbers = int64_t{pairs} * kGroup * kDim;
  const int64_t window_numbers = int64_t{pairs} * window * kDim;
  loop.walk = arena.Take<uint16_t>(steps * layers * numbers);
  loop.queries = arena.Take<uint16_t>(numbers);
  loop.wide_queries = arena.Take<float>(numbers);
  loop.wide_output = arena.Take<float>(numbers);
  loop.window_keys = arena.Take<uint16_t>(layers * window_numbers);
  loop.window_values = arena.Take<uint16_t>(layers * window_numbers);
  // The sinks' keys are those that the service has; their values are their own.
  uint16_t* sink_keys = arena.Take<uint16_t>(kSinks * kRow);
  uint16_t* sink_values = arena.Take<uint16_t>(kSinks * kRow);
  BENCH_OK(cudaSetDevice(loop.decode));
  FillSmall<<<64, 256>>>(sink_keys, kSinks * kRow, 99);
  FillSmall<<<64, 256>>>(sink_values, kSinks * kRow, 199);
  FillSmall<<<512, 256>>>(loop.window_keys, layers * window_numbers, 299);
  FillSmall<<<512, 256>>>(loop.window_values, layers * window_numbers, uint64_t{1} << 33);
  FillQueries<<<4096, 256>>>(loop.walk, steps, layers, pairs, loop.first, loop.tokens, size, hold);
  std::vector<StepPair> step_pairs;
  loop.dense_pairs.clear();
  const auto bytes_of = [](const uint16_t* at) {
    return reinterpret_cast<const unsigned char*>(at);
  };
  for (int layer = 0; layer < layers; ++layer) {
    std::vector<AttentionCudaPair> dense(pairs);
    std::vector<DeviceRawRun> runs;
    for (int pair = 0; pair < pairs; ++pair) {
      StepPair p;
      const int head = pair % kHeads;
      p.sinks = {bytes_of(sink_keys + head * kDim), bytes_of(sink_values + head * kDim), kRow * 2,
                 kRow * 2, kSinks};
      const int64_t at = (int64_t{layer} * pairs + pair) * window * kDim;
      p.window = {bytes_of(loop.window_keys + at), bytes_of(loop.window_values + at), kDim * 2,
                  kDim * 2, window};
      step_pairs.push_back(p);
      runs.push_back(p.sinks);
      runs.push_back(p.window);
      if (loop.keys == nullptr) continue;
      const int64_t row =
          ((int64_t{layer} * loop.sequences + pair / kHeads) * kHeads + head) * loop.tokens * kDim;
      runs.push_back({bytes_of(loop.keys + row), bytes_of(loop.values + row), kDim * 2, kDim * 2,
                      loop.tokens});
    }
    if (loop.keys == nullptr) continue;
    const DeviceRawRun* device_runs = arena.Upload(runs);
    for (int pair = 0; pair < pairs; ++pair) {
      dense[pair].queries = loop.wide_queries + int64_t{pair} * kGroup * kDim;
      dense[pair].raw = device_runs + 3 * pair;
      dense[pair].raw_runs = 3;
      dense[pair].output = loop.wide_output + int64_t{pair} * kGroup * kDim;
    }
    loop.dense_pairs.push_back(arena.Upload(dense));
  }
  loop.step.pairs = arena.Upload(step_pairs);
}
void MakeDensePeer(int pairs) {
  Arena& arena = loop.decode_ends;
  loop.dense_params = AttentionCudaParams();
  loop.dense_params.group = kGroup;
  loop.dense_params.head_dim = kDim;
  loop.dense_params.scale = kScale;
  loop.dense_params.max_tokens = loop.tokens;
  const int64_t dense_bytes = AttentionCudaWorkspaceBytes(loop.dense_params, pairs);
  loop.dense_workspace = arena.Zeros<unsigned char>(dense_bytes);
}

}  // namespace

extern "C" {

// The cache of `sequences` sequences of `tokens` tokens: index on `service`, keys and values as
// they are on `decode` where `dense`.
int ckv_loop_cache(int service, int decode, int sequences, int layers, int tokens, int dense,
                   int tokens_per_cluster) {
  loop.service = service;
  loop.decode = decode;
  loop.sequences = sequences;
  loop.layers = layers;
  loop.tokens = tokens;
  for (const auto& [from, to] : {std::pair(service, decode), std::pair(decode, service)}) {
    if (from == to) continue;
    BENCH_OK(cudaSetDevice(from));
    const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
    if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled) return error;
    (void)cudaGetLastError();
  }
  const IndexCudaParams params = IndexParamsOfLoop(tokens_per_cluster);
  const int64_t clusters = IndexCudaClusters(params, tokens);
  const int64_t caches = int64_t{sequences} * layers;
  const int64_t per_cache =
      tokens * kHeads * (512 + 96 + 8) + clusters * kHeads * (4 * kDim + 6) + (int64_t{2} << 20);
  const int64_t raw_bytes = int64_t{tokens} * kRow * 2;
  loop.index.Create(service, caches * per_cache + 2 * raw_bytes +
                                 IndexCudaWorkspaceBytes(params, tokens) + (int64_t{64} << 20));
  uint16_t* raw[2];
  IndexCudaInput input;
  for (int what = 0; what < 2; ++what) {
    raw[what] = loop.index.Take<uint16_t>(int64_t{tokens} * kRow);
    (what == 0 ? input.keys : input.values) = MakeDevicePagedView(
        raw[what], loop.index.Upload(std::vector<uint32_t>{0}), raw_bytes, kRow * 2);
  }
  if (raw_bytes >= int64_t{1} << 31) return cudaErrorInvalidValue;
  input.query_rms = loop.index.Upload(std::vector<float>(kRow, 1.0f));
  void* workspace = loop.index.Take<unsigned char>(IndexCudaWorkspaceBytes(params, tokens));
  loop.sink_keys = loop.index.Take<uint16_t>(kSinks * kRow);
  BENCH_OK(cudaSetDevice(service));
  FillSmall<<<64, 256>>>(loop.sink_keys, kSinks * kRow, 99);
  loop.parts.clear();
  for (int64_t cache = 0; cache < caches; ++cache) {
    DeviceIndexPart part;
    part.first_token = kSinks;
    part.tokens = tokens;
    part.clusters = static_cast<int32_t>(clusters);
    part.centroids = MakePaged(2 * kDim, kHeads * clusters);
    part.value_means = MakePaged(2 * kDim, kHeads * clusters);
    part.cluster_begin = MakePaged(4, kHeads * (clusters + 1));
    part.positions = MakePaged(4, int64_t{kHeads} * tokens);
    part.slots = MakePaged(4, int64_t{kHeads} * tokens);
    part.codes = MakePaged(96, int64_t{kHeads} * tokens);
    part.records = MakePaged(512, int64_t{kHeads} * tokens);
    part.channels = MakePaged(12 * kDim, kHeads);
    // As FillQueries numbers them.
    const uint64_t number = static_cast<uint64_t>(cache / sequences * 64 + cache % sequences);
    for (int what = 0; what < 2; ++what) {
      FillRows<true><<<2048, 256>>>(raw[what], number, what, tokens);
    }
    const cudaError_t error = LaunchBuildIndexPart(params, input, part, workspace, nullptr);
    if (error != cudaSuccess) return error;
    loop.parts.push_back(part);
  }
  loop.device_parts = loop.index.Upload(loop.parts);
  BENCH_OK(cudaDeviceSynchronize());
  if (!dense) return cudaSuccess;
  loop.dense.Create(decode, 2 * caches * raw_bytes + (int64_t{1} << 20));
  loop.keys = loop.dense.Take<uint16_t>(caches * tokens * kRow);
  loop.values = loop.dense.Take<uint16_t>(caches * tokens * kRow);
  BENCH_OK(cudaSetDevice(decode));
  for (int64_t cache = 0; cache < caches; ++cache) {
    const uint64_t number = static_cast<uint64_t>(cache / sequences * 64 + cache % sequences);
    for (int what = 0; what < 2; ++what) {
      FillRows<false><<<4096, 256>>>((what == 0 ? loop.keys : loop.values) + cache * tokens * kRow,
                                     number, what, tokens);
    }
  }
  BENCH_OK(cudaDeviceSynchronize());
  return cudaGetLastError();
}
const void* ckv_loop_keys(int layer) {
  return loop.keys + int64_t{layer} * loop.sequences * loop.tokens * kRow;
}
const void* ckv_loop_values(int layer) {
  return loop.values + int64_t{layer} * loop.sequences * loop.tokens * kRow;
}

// Both ends for `batch` sequences: the first ones behind those of kept ends. size and hold: of the
// queries' walk.
int ckv_loop_ends(int batch, int window, int slots, int budget, int blocks_per_pair, int pool,
                  int steps, float size, int hold, int prefetch_mb) {
  const int pairs = batch * kHeads, layers = loop.layers;
  loop.first = 0;
  for (const Kept& ends : kept) loop.first += ends.serve.shape.pairs / kHeads;
  if (loop.first + batch > loop.sequences) return cudaErrorInvalidValue;
  loop.batch = batch;
  loop.window = window;
  loop.steps = steps;
  ServeParams& serve = loop.serve = ServeParams();
  StepParams& step = loop.step = StepParams();
  ResidentShape& s = serve.shape;
  s.layers = layers;
  s.pairs = pairs;
  s.group = kGroup;
  s.head_dim = kDim;
  s.slots = slots;
  SelectCudaParams& select = serve.select;
  select.group = kGroup;
  select.head_dim = kDim;
  select.scale = kScale;
  select.budget_tokens = budget;
  select.max_clusters = loop.parts[0].clusters;
  select.max_sinks = kSinks;
  select.blocks_per_pair = blocks_per_pair;
  s.max_exact = budget;
  serve.blocks = pool;
  serve.prefetch_bytes = (int64_t{prefetch_mb} << 20) / pairs;
  serve.idle_ns = 30'000'000'000;
  loop.service_ends.Create(loop.service, int64_t{1} << 30);
  loop.decode_ends.Create(loop.decode, int64_t{6} << 30);
  std::vector<SelectCudaPair> serve_pairs;
  for (int layer = 0; layer < layers; ++layer) {
    for (int pair = 0; pair < pairs; ++pair) {
      SelectCudaPair p;
      p.parts = loop.device_parts + layer * loop.sequences + loop.first + pair / kHeads;
      p.part_count = 1;
      p.clusters = loop.parts[0].clusters;
      p.kv_head = pair % kHeads;
      p.sink_tokens = kSinks;
      p.sink_keys = reinterpret_cast<const unsigned char*>(loop.sink_keys + p.kv_head * kDim);
      p.sink_key_stride_bytes = kRow * 2;
      serve_pairs.push_back(p);
    }
  }
  serve.pairs = loop.service_ends.Upload(serve_pairs);
  serve.requests = loop.service_ends.Zeros<unsigned char>(RequestWindowBytes(s));
  serve.directory = loop.service_ends.Zeros<unsigned char>(DirectoryBytes(s));
  serve.control = loop.service_ends.Zeros<ServeControl>(1);
  BENCH_OK(cudaSetDevice(loop.service));
  int32_t at_once = 0;
  const int64_t workspace_bytes = ServeWorkspaceBytes(serve, &at_once);
  if (workspace_bytes == 0) return cudaErrorInvalidValue;
  loop.pairs_at_once = at_once;
  serve.workspace = loop.service_ends.Zeros<unsigned char>(workspace_bytes);
  Arena& arena = loop.decode_ends;
  serve.replies = arena.Zeros<unsigned char>(ReplyWindowBytes(s));
  serve.hot_cache = arena.Zeros<unsigned char>(HotCacheBytes(s));
  step.shape = s;
  step.scale = kScale;
  step.requests = const_cast<void*>(serve.requests);
  step.replies = serve.replies;
  step.hot_cache = serve.hot_cache;
  loop.rounds = arena.Zeros<uint64_t>(1);
  loop.other_rounds = arena.Zeros<uint64_t>(1);
  step.rounds = loop.rounds;
  step.status = arena.Zeros<uint32_t>(1);
  step.timeout_ns = 2'000'000'000;
  MakeDecodeData(pairs, layers, steps, size, hold);
  MakeDensePeer(pairs);
  BENCH_OK(cudaDeviceSynchronize());
  BENCH_OK(cudaSetDevice(loop.service));
  if (loop.serve_stream == nullptr) {
    BENCH_OK(cudaStreamCreateWithFlags(&loop.serve_stream, cudaStreamNonBlocking));
    BENCH_OK(cudaStreamCreateWithFlags(&loop.control_stream, cudaStreamNonBlocking));
    BENCH_OK(cudaHostAlloc(reinterpret_cast<void**>(&loop.host_stop), 64, cudaHostAllocPortable));
  }
  const cudaError_t error = LaunchForget(s, serve.directory, 0, pairs, nullptr);
  BENCH_OK(cudaDeviceSynchronize());
  BENCH_OK(cudaSetDevice(loop.decode));
  return error;
}
const void* ckv_loop_queries() { return loop.queries; }
int ckv_loop_pairs_at_once() { return loop.pairs_at_once; }

// Starts the resident kernel; it answers until ckv_loop_stop.
int ckv_loop_start() {
  uint64_t rounds = 0;
  BENCH_OK(cudaMemcpy(&rounds, loop.rounds, 8, cudaMemcpyDeviceToHost));
  BENCH_OK(cudaSetDevice(loop.service));
  BENCH_OK(cudaMemset(loop.serve.control, 0, sizeof(ServeControl)));
  BENCH_OK(cudaDeviceSynchronize());
  loop.serve.first_round = rounds + 1;
  const cudaError_t error = LaunchServe(&loop.serve, 1, loop.serve_stream);
  BENCH_OK(cudaSetDevice(loop.decode));
  return error;
}
// numbers: pushed, served, given_up, the steps' status.
int ckv_loop_stop(uint64_t* numbers) {
  BENCH_OK(cudaSetDevice(loop.decode));
  BENCH_OK(cudaDeviceSynchronize());
  BENCH_OK(cudaSetDevice(loop.service));
  *loop.host_stop = 1;
  BENCH_OK(cudaMemcpyAsync(&loop.serve.control->stop, loop.host_stop, 4, cudaMemcpyHostToDevice,
                           loop.control_stream));
  BENCH_OK(cudaStreamSynchronize(loop.control_stream));
  BENCH_OK(cudaStreamSynchronize(loop.serve_stream));
  ServeControl control;
  BENCH_OK(cudaMemcpy(&control, loop.serve.control, sizeof(control), cudaMemcpyDeviceToHost));
  uint32_t status;
  BENCH_OK(cudaMemcpy(&status, loop.step.status, 4, cudaMemcpyDeviceToHost));
  numbers[0] = control.pushed;
  numbers[1] = control.served;
  numbers[2] = control.given_up;
  numbers[3] = status;
  BENCH_OK(cudaSetDevice(loop.decode));
  return cudaSuccess;
}

// `sparse`: the rounds are the resident kernel's; else of the peer's own counting.
int ckv_loop_turn(int layer, int sparse, const void* projected, cudaStream_t stream) {
  const int pairs = loop.batch * kHeads;
  const int64_t at = int64_t{layer} * pairs * loop.window * kDim;
  TakeTurnKernel<<<pairs, 128, 0, stream>>>(
      loop.walk, sparse ? loop.rounds : loop.other_rounds, loop.layers, layer, loop.steps,
      static_cast<const uint16_t*>(projected), loop.queries, loop.wide_queries,
      loop.window_keys + at, loop.window_values + at, loop.window);
  return cudaGetLastError();
}
int ckv_loop_sparse(int layer, int part, void* output, cudaStream_t stream) {
  return LaunchStep(loop.step, layer, static_cast<StepPart>(part), loop.queries, output, nullptr,
                    stream);
}
int ckv_loop_dense(int layer, void* output, cudaStream_t stream) {
  const int pairs = loop.batch * kHeads, count = pairs * kGroup * kDim;
  const cudaError_t error = LaunchSparseAttention(loop.dense_params, loop.dense_pairs[layer], pairs,
                                                  loop.dense_workspace, stream);
  if (error != cudaSuccess) return error;
  NarrowKernel<<<(count + 255) / 256, 256, 0, stream>>>(loop.wide_output,
                                                        static_cast<uint16_t*>(output), count);
  return cudaGetLastError();
}
int ckv_loop_end_step(int sparse, cudaStream_t stream) {
  return LaunchEndStep(loop.step.shape, sparse ? loop.rounds : loop.other_rounds, stream);
}
// Sets the ends aside for ckv_loop_together.
void ckv_loop_keep() {
  Kept& ends = kept.emplace_back();
  ends.serve = loop.serve;
  ends.walk = loop.walk;
  ends.service_ends = std::exchange(loop.service_ends, Arena());
  ends.decode_ends = std::exchange(loop.decode_ends, Arena());
}
void ckv_loop_drop() {
  for (Kept& ends : kept) {
    ends.service_ends.Destroy();
    ends.decode_ends.Destroy();
  }
  kept.clear();
}

// The first `count` kept ends as groups that ask `rounds` rounds each, all at once and beside
// busy_ns of other work: served by `kernels` kernels of `blocks` blocks. layer_ns: [count, rounds].
// Service and decode device are the same.
int ckv_loop_together(int count, int kernels, int blocks, int blocks_per_pair, int rounds,
                      int busy_ns, int64_t* layer_ns) {
  BENCH_OK(cudaSetDevice(loop.service));
  int64_t* device_ns = nullptr;
  uint32_t* gave_up = nullptr;
  BENCH_OK(cudaMalloc(&device_ns, sizeof(int64_t) * count * rounds));
  BENCH_OK(cudaMalloc(&gave_up, sizeof(uint32_t)));
  BENCH_OK(cudaMemset(gave_up, 0, sizeof(uint32_t)));
  std::vector<cudaStream_t> streams(count + kernels);
  for (cudaStream_t& stream : streams) {
    BENCH_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  std::vector<std::vector<ServeParams>> of_kernel(kernels);
  for (int g = 0; g < count; ++g) {
    ServeParams& serve = kept[g].serve;
    serve.blocks = blocks;
    serve.select.blocks_per_pair = blocks_per_pair;
    serve.rounds = rounds;
    serve.idle_ns = kClientPatience;
    BENCH_OK(cudaMemset(serve.control, 0, sizeof(ServeControl)));
    of_kernel[g % kernels].push_back(serve);
  }
  BENCH_OK(cudaDeviceSynchronize());
  cudaError_t error = cudaSuccess;
  for (int k = 0; k < kernels && error == cudaSuccess; ++k) {
    error =
        LaunchServe(of_kernel[k].data(), static_cast<int>(of_kernel[k].size()), streams[count + k]);
  }
  for (int g = 0; g < count && error == cudaSuccess; ++g) {
    ServeParams& serve = kept[g].serve;
    const Client client = {.shape = serve.shape,
                           .windows = resident::MakeWindowLayout(serve.shape),
                           .requests = const_cast<void*>(serve.requests),
                           .replies = serve.replies,
                           .walk = kept[g].walk,
                           .first = serve.first_round,
                           .rounds = serve.rounds,
                           .busy_ns = static_cast<uint64_t>(busy_ns),
                           .steps = loop.steps,
                           .blocks_per_pair = blocks_per_pair,
                           .layer_ns = device_ns + int64_t{g} * rounds,
                           .gave_up = gave_up};
    ClientKernel<<<1, kClientThreads, 0, streams[g]>>>(client);
    error = cudaGetLastError();
    serve.first_round += rounds;
  }
  BENCH_OK(cudaDeviceSynchronize());
  uint32_t lost = 0;
  BENCH_OK(cudaMemcpy(&lost, gave_up, sizeof(lost), cudaMemcpyDeviceToHost));
  BENCH_OK(
      cudaMemcpy(layer_ns, device_ns, sizeof(int64_t) * count * rounds, cudaMemcpyDeviceToHost));
  for (cudaStream_t stream : streams) BENCH_OK(cudaStreamDestroy(stream));
  BENCH_OK(cudaFree(device_ns));
  BENCH_OK(cudaFree(gave_up));
  return lost != 0 && error == cudaSuccess ? cudaErrorTimeout : error;
}

int64_t ckv_loop_decode_kv_bytes() {
  const int64_t tokens = int64_t{loop.step.shape.slots} + loop.window + kSinks;
  return tokens * loop.layers * loop.batch * kHeads * 4 * kDim;
}

}  // extern "C"

}  // namespace clusterkv::kernels
