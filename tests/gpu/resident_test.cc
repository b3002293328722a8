#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/resident/resident_cuda.h"
#include "kernels/resident/windows.h"
#include "kernels/select/select_cuda.h"
#include "tests/gpu/gpu_test.h"
#include "tests/gpu/index_on_device.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::ElementType;
using kernels::ResidentShape;
using kernels::SelectCudaPair;
using kernels::ServeControl;
using kernels::ServeParams;
using kernels::StepPair;
using kernels::StepParams;

constexpr int kLayers = 2;
constexpr int kMaxWindow = 37;
constexpr uint64_t kPatience = 5'000'000'000;
// Of tokens last used in the same round any may go first: the cache may differ a little.
constexpr double kPushedTolerance = 0.03;

uint16_t BFloat16Of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
float OfBFloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

// What a select of the same queries gives (its own test compares it with the reference).
struct Selected {
  std::vector<std::vector<int32_t>> positions;  // by pair, ascending
  std::vector<float> state, lse;
};

// A service's and a decode GPU's end on one device. Every layer has the same index; each has slots
// of its own.
class ResidentCase {
 public:
  // max_clusters: what memory is laid out for; 0: as many as there are.
  ResidentCase(const std::string& name, ElementType query_type, int slots, int32_t max_clusters = 0)
      : name_(name),
        file_(CaseFile::Read(Registry::Get().cases + "/select_" + name + ".case")),
        sizes_(file_.Get<int64_t>("shape")),
        index_(file_, static_cast<int>(sizes_[7])),
        generator_(7) {
    shape_.layers = kLayers;
    shape_.pairs = static_cast<int32_t>(sizes_[0]);
    shape_.group = static_cast<int32_t>(sizes_[1]);
    shape_.head_dim = static_cast<int32_t>(sizes_[2]);
    shape_.query_type = query_type;
    select_ = SelectParamsOf(file_, index_);
    select_.max_clusters = std::max(select_.max_clusters, max_clusters);
    shape_.max_exact = kernels::ExactCapacity(select_);
    shape_.slots = slots;
    MakeRows();
  }

  // Steps of a random walk of queries from the case's own. `at_once`: both ends run at once, else
  // one after the other, as an emulator must.
  void Run(int blocks_per_pair, int blocks, int steps, bool at_once);

  struct Ends;
  std::unique_ptr<Ends> MakeEnds(int blocks_per_pair, int blocks, int steps);
  // All rounds; waits for their end.
  void RunRounds(int steps, bool at_once, Ends& ends) const;
  // A part of round i, counted from 0.
  void LaunchRound(int i, kernels::StepPart part, Ends& ends, cudaStream_t stream) const;
  std::vector<float> Floats(const DeviceArray<unsigned char>& output) const;
  void CompareOutput(const std::string& label, const std::vector<float>& want,
                     const DeviceArray<unsigned char>& output) const;

 private:
  int Numbers() const { return shape_.pairs * shape_.group * shape_.head_dim; }

  void MakeRows() {
    std::normal_distribution<float> normal;
    for (int t = 0; t < static_cast<int>(sizes_[7]); ++t) {
      const std::string part = "part" + std::to_string(t) + ".";
      part_first_.push_back(file_.Get<int64_t>(part + "meta")[0]);
      part_keys_.push_back(file_.Get<uint16_t>(part + "keys"));
      part_values_.push_back(file_.Get<uint16_t>(part + "values"));
    }
    sink_keys_ = file_.Get<uint16_t>("sinks");
    sink_values_.resize(sink_keys_.size());
    for (uint16_t& x : sink_values_) x = BFloat16Of(normal(generator_));
    const size_t row = static_cast<size_t>(shape_.pairs) * shape_.head_dim;
    window_keys_.resize(kMaxWindow * row);
    window_values_.resize(kMaxWindow * row);
    for (uint16_t& x : window_keys_) x = BFloat16Of(normal(generator_));
    for (uint16_t& x : window_values_) x = BFloat16Of(normal(generator_));
  }

  std::vector<float> NextQueries(const std::vector<float>& last) {
    std::normal_distribution<float> normal;
    std::vector<float> next = last;
    if (next.empty()) {
      next = file_.Get<float>("queries");
    } else {
      double size = 0;
      for (float x : next) size += double{x} * x;
      const float rms = static_cast<float>(std::sqrt(size / static_cast<double>(next.size())));
      for (float& x : next) x = 0.8f * x + 0.6f * rms * normal(generator_);
    }
    if (shape_.query_type == ElementType::kBFloat16) {
      for (float& x : next) x = OfBFloat16(BFloat16Of(x));
    }
    return next;
  }

  void MakePairs(int steps, Ends& ends) const;
  void MakeParams(int blocks_per_pair, int blocks, Ends& ends) const;
  void MakeQueries(int steps, Ends& ends);
  void CompareSelection(const std::string& label, int layer, const Selected& selected,
                        const Ends& ends) const;
  Selected Select(const std::vector<float>& queries);
  std::vector<float> Attend(const std::vector<float>& queries, const Selected& selected,
                            int64_t window_tokens) const;
  int64_t Misses(int layer, const Selected& selected);

  std::string name_;
  CaseFile file_;
  std::vector<int64_t> sizes_;
  IndexOnDevice index_;
  std::mt19937_64 generator_;
  ResidentShape shape_;
  kernels::SelectCudaParams select_;
  std::vector<int64_t> part_first_;
  std::vector<std::vector<uint16_t>> part_keys_, part_values_;
  std::vector<uint16_t> sink_keys_, sink_values_, window_keys_, window_values_;
  // The hot cache as it should be: by layer and pair, the last used first.
  std::vector<std::list<int32_t>> cached_;
};

Selected ResidentCase::Select(const std::vector<float>& queries) {
  DeviceArray<float> device_queries(queries);
  DeviceArray<uint16_t> sinks(sink_keys_);
  std::vector<SelectCudaPair> host(shape_.pairs);
  for (int h = 0; h < shape_.pairs; ++h) {
    host[h].parts = index_.parts->data();
    host[h].part_count = static_cast<int32_t>(sizes_[7]);
    host[h].clusters = index_.clusters;
    host[h].kv_head = h;
    host[h].sink_tokens = select_.max_sinks;
    host[h].queries = device_queries.data() + h * shape_.group * shape_.head_dim;
    host[h].sink_keys = reinterpret_cast<const unsigned char*>(sinks.data() + h * shape_.head_dim);
    host[h].sink_key_stride_bytes = 2 * shape_.pairs * shape_.head_dim;
  }
  DeviceArray<SelectCudaPair> pairs(host);
  DeviceArray<int32_t> count(shape_.pairs), positions(shape_.pairs * shape_.max_exact),
      parts(shape_.pairs * shape_.max_exact), slots(shape_.pairs * shape_.max_exact);
  DeviceArray<float> state(Numbers()), lse(shape_.pairs * shape_.group);
  kernels::SelectCudaOutput out;
  out.max_exact = shape_.max_exact;
  out.exact_count = count.data();
  out.positions = positions.data();
  out.parts = parts.data();
  out.slots = slots.data();
  out.state_output = state.data();
  out.state_lse = lse.data();
  DeviceArray<unsigned char> workspace(kernels::SelectCudaWorkspaceBytes(select_, shape_.pairs));
  GPU_OK(
      kernels::LaunchSelect(select_, pairs.data(), shape_.pairs, out, workspace.data(), nullptr));
  Selected selected;
  const auto counts = count.Host(), all = positions.Host();
  for (int h = 0; h < shape_.pairs; ++h) {
    const auto begin = all.begin() + h * shape_.max_exact;
    selected.positions.emplace_back(begin, begin + counts[h]);
  }
  selected.state = state.Host();
  selected.lse = lse.Host();
  return selected;
}

// The output in double: sinks, window, the exact tokens' keys and values as they came, the state.
std::vector<float> ResidentCase::Attend(const std::vector<float>& queries, const Selected& selected,
                                        int64_t window_tokens) const {
  const int dim = shape_.head_dim, pairs = shape_.pairs;
  std::vector<float> output(Numbers());
  for (int row = 0; row < pairs * shape_.group; ++row) {
    const int h = row / shape_.group;
    const float* query = queries.data() + static_cast<size_t>(row) * dim;
    std::vector<double> logits;
    std::vector<const uint16_t*> values;
    const auto add = [&](const std::vector<uint16_t>& keys, const std::vector<uint16_t>& of_values,
                         int64_t token) {
      const size_t at = (static_cast<size_t>(token) * pairs + h) * dim;
      double dot = 0;
      for (int j = 0; j < dim; ++j) dot += double{query[j]} * OfBFloat16(keys[at + j]);
      logits.push_back(dot * select_.scale);
      values.push_back(of_values.data() + at);
    };
    for (int i = 0; i < select_.max_sinks; ++i) add(sink_keys_, sink_values_, i);
    for (int i = 0; i < window_tokens; ++i) add(window_keys_, window_values_, i);
    for (const int32_t position : selected.positions[h]) {
      size_t part = part_first_.size() - 1;
      while (part_first_[part] > position) --part;
      add(part_keys_[part], part_values_[part], position - part_first_[part]);
    }
    const double state_lse = selected.lse[row];
    double largest = state_lse;
    for (double x : logits) largest = std::max(largest, x);
    double sum = std::exp(state_lse - largest);
    std::vector<double> out(dim);
    for (int j = 0; j < dim; ++j) {
      out[j] = sum * selected.state[static_cast<size_t>(row) * dim + j];
    }
    for (size_t i = 0; i < logits.size(); ++i) {
      const double weight = std::exp(logits[i] - largest);
      sum += weight;
      for (int j = 0; j < dim; ++j) out[j] += weight * OfBFloat16(values[i][j]);
    }
    for (int j = 0; j < dim; ++j) {
      output[static_cast<size_t>(row) * dim + j] = static_cast<float>(out[j] / sum);
    }
  }
  return output;
}

// How many records an exactly least recently used cache of `slots` lacks; it has them then.
int64_t ResidentCase::Misses(int layer, const Selected& selected) {
  int64_t misses = 0;
  for (int h = 0; h < shape_.pairs; ++h) {
    std::list<int32_t>& cached = cached_[layer * shape_.pairs + h];
    for (const int32_t position : selected.positions[h]) {
      const auto found = std::find(cached.begin(), cached.end(), position);
      if (found == cached.end()) {
        ++misses;
      } else {
        cached.erase(found);
      }
    }
    for (const int32_t position : selected.positions[h]) cached.push_front(position);
    while (static_cast<int>(cached.size()) > shape_.slots) cached.pop_back();
  }
  return misses;
}

// Their work has ended when they go.
class Streams {
 public:
  explicit Streams(int count) : streams_(static_cast<size_t>(count)) {
    for (cudaStream_t& stream : streams_) {
      GPU_OK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
    }
  }
  Streams(const Streams&) = delete;
  ~Streams() {
    GPU_OK(cudaDeviceSynchronize());
    for (cudaStream_t stream : streams_) GPU_OK(cudaStreamDestroy(stream));
  }
  cudaStream_t operator[](int i) const { return streams_[static_cast<size_t>(i)]; }

 private:
  std::vector<cudaStream_t> streams_;
};

// Memory of both ends on one device, for so many steps.
struct ResidentCase::Ends {
  DeviceArray<unsigned char> requests, replies, cache, directory;
  DeviceArray<ServeControl> control{std::vector<ServeControl>(1)};
  DeviceArray<uint16_t> sink_keys, sink_values, window_keys, window_values;
  std::vector<int64_t> tokens;  // of the window, by step
  DeviceArray<int64_t> window_tokens;
  DeviceArray<uint64_t> rounds{std::vector<uint64_t>(1)};
  DeviceArray<uint32_t> status{std::vector<uint32_t>(1)};
  DeviceArray<int32_t> exact_count, positions;
  std::unique_ptr<DeviceArray<SelectCudaPair>> serve_pairs;
  std::vector<DeviceArray<StepPair>> step_pairs;  // by step
  std::unique_ptr<DeviceArray<unsigned char>> workspace;
  ServeParams serve;
  StepParams step;
  std::vector<std::vector<float>> queries;  // by round
  std::vector<DeviceArray<unsigned char>> device_queries, outputs;

  Ends(const ResidentCase& c, int steps)
      : requests(kernels::RequestWindowBytes(c.shape_)),
        replies(kernels::ReplyWindowBytes(c.shape_)),
        cache(kernels::HotCacheBytes(c.shape_)),
        directory(kernels::DirectoryBytes(c.shape_)),
        sink_keys(c.sink_keys_),
        sink_values(c.sink_values_),
        window_keys(c.window_keys_),
        window_values(c.window_values_),
        tokens(WindowTokens(steps)),
        window_tokens(tokens),
        exact_count(kLayers * c.shape_.pairs),
        positions(static_cast<size_t>(kLayers) * c.shape_.pairs * c.shape_.max_exact) {
    GPU_OK(cudaMemset(requests.data(), 0, requests.size()));
    GPU_OK(cudaMemset(replies.data(), 0, replies.size()));
  }

  static std::vector<int64_t> WindowTokens(int steps) {
    std::vector<int64_t> tokens(steps);
    for (int i = 1; i < steps; ++i) tokens[i] = 1 + (17 * i) % kMaxWindow;
    return tokens;
  }
  // Exact tokens of the last rounds, ascending: [layers * pairs].
  std::vector<std::vector<int32_t>> Chosen() const {
    const auto counts = exact_count.Host(), all = positions.Host();
    std::vector<std::vector<int32_t>> chosen;
    for (size_t row = 0; row < counts.size(); ++row) {
      const auto begin = all.begin() + static_cast<int64_t>(row) * serve.shape.max_exact;
      chosen.emplace_back(begin, begin + counts[row]);
      std::sort(chosen.back().begin(), chosen.back().end());
    }
    return chosen;
  }
  // As they came in the last round.
  std::vector<unsigned char> StateLines() const {
    const auto layout = kernels::resident::MakeWindowLayout(serve.shape);
    const auto all = replies.Host();
    const auto begin = all.begin() + layout.entries_bytes;
    return {begin, begin + int64_t{16} * layout.state_lines * serve.shape.pairs};
  }
  bool GuardsHold() const {
    return requests.GuardsHold() && replies.GuardsHold() && cache.GuardsHold() &&
           directory.GuardsHold() && workspace->GuardsHold() && positions.GuardsHold();
  }
};

void ResidentCase::MakePairs(int steps, Ends& ends) const {
  const int pairs = shape_.pairs, dim = shape_.head_dim;
  const int64_t stride = 2 * pairs * dim;
  const auto run_of = [&](const DeviceArray<uint16_t>& keys, const DeviceArray<uint16_t>& values,
                          int h, int64_t count) {
    return kernels::DeviceRawRun{reinterpret_cast<unsigned char*>(keys.data() + h * dim),
                                 reinterpret_cast<unsigned char*>(values.data() + h * dim), stride,
                                 stride, count};
  };
  std::vector<SelectCudaPair> serve_pairs(kLayers * pairs);
  for (int i = 0; i < kLayers * pairs; ++i) {
    SelectCudaPair& pair = serve_pairs[i];
    pair.parts = index_.parts->data();
    pair.part_count = static_cast<int32_t>(sizes_[7]);
    pair.clusters = index_.clusters;
    pair.kv_head = i % pairs;
    pair.sink_tokens = select_.max_sinks;
    pair.sink_keys =
        reinterpret_cast<const unsigned char*>(ends.sink_keys.data() + pair.kv_head * dim);
    pair.sink_key_stride_bytes = stride;
  }
  ends.serve_pairs = std::make_unique<DeviceArray<SelectCudaPair>>(serve_pairs);
  for (int step = 0; step < steps; ++step) {
    std::vector<StepPair> step_pairs(kLayers * pairs);
    for (int i = 0; i < kLayers * pairs; ++i) {
      const int h = i % pairs;
      step_pairs[i].sinks = run_of(ends.sink_keys, ends.sink_values, h, select_.max_sinks);
      step_pairs[i].window = run_of(ends.window_keys, ends.window_values, h, kMaxWindow);
      step_pairs[i].window_tokens = ends.window_tokens.data() + step;
    }
    ends.step_pairs.emplace_back(step_pairs);
  }
}

void ResidentCase::MakeParams(int blocks_per_pair, int blocks, Ends& ends) const {
  ServeParams& serve = ends.serve;
  serve.shape = shape_;
  serve.select = select_;
  serve.select.blocks_per_pair = blocks_per_pair;
  serve.pairs = ends.serve_pairs->data();
  serve.blocks = blocks;
  serve.requests = ends.requests.data();
  serve.replies = ends.replies.data();
  serve.hot_cache = ends.cache.data();
  serve.directory = ends.directory.data();
  serve.control = ends.control.data();
  serve.exact_count = ends.exact_count.data();
  serve.positions = ends.positions.data();
  serve.idle_ns = kPatience;
  serve.prefetch_bytes = 1 << 16;
  ends.workspace =
      std::make_unique<DeviceArray<unsigned char>>(kernels::ServeWorkspaceBytes(serve));
  GPU_CHECK(ends.workspace->size() > 0) << name_ << " is refused\n";
  serve.workspace = ends.workspace->data();
  GPU_OK(kernels::LaunchForget(shape_, ends.directory.data(), 0, shape_.pairs, nullptr));
  StepParams& step = ends.step;
  step.shape = shape_;
  step.scale = select_.scale;
  step.requests = ends.requests.data();
  step.replies = ends.replies.data();
  step.hot_cache = ends.cache.data();
  step.rounds = ends.rounds.data();
  step.status = ends.status.data();
  step.timeout_ns = kPatience;
}

// One set of queries per round: the first step asks the same of both layers; the third asks what
// the second asked.
void ResidentCase::MakeQueries(int steps, Ends& ends) {
  std::vector<float> last;
  for (int i = 0; i < steps * kLayers; ++i) {
    if (i == 0 || (i >= kLayers && i / kLayers != 2)) last = NextQueries(last);
    ends.queries.push_back(i / kLayers == 2 ? ends.queries[i - kLayers] : last);
    std::vector<unsigned char> bytes;
    for (float x : ends.queries.back()) {
      const uint16_t half = BFloat16Of(x);
      const unsigned char* from = shape_.query_type == ElementType::kFloat32
                                      ? reinterpret_cast<const unsigned char*>(&x)
                                      : reinterpret_cast<const unsigned char*>(&half);
      bytes.insert(bytes.end(), from, from + kernels::ElementBytes(shape_.query_type));
    }
    ends.device_queries.emplace_back(bytes);
    ends.outputs.emplace_back(bytes.size());
  }
}

std::unique_ptr<ResidentCase::Ends> ResidentCase::MakeEnds(int blocks_per_pair, int blocks,
                                                           int steps) {
  auto ends = std::make_unique<Ends>(*this, steps);
  MakePairs(steps, *ends);
  MakeParams(blocks_per_pair, blocks, *ends);
  MakeQueries(steps, *ends);
  GPU_OK(cudaDeviceSynchronize());
  return ends;
}

void ResidentCase::LaunchRound(int i, kernels::StepPart part, Ends& ends,
                               cudaStream_t stream) const {
  const int layer = i % kLayers;
  ends.step.pairs = ends.step_pairs[i / kLayers].data();
  GPU_OK(kernels::LaunchStep(ends.step, layer, part, ends.device_queries[i].data(),
                             ends.outputs[i].data(), nullptr, stream));
  if ((part & kernels::kStepAttend) != 0 && layer == kLayers - 1) {
    GPU_OK(kernels::LaunchEndStep(shape_, ends.rounds.data(), stream));
  }
}

void ResidentCase::RunRounds(int steps, bool at_once, Ends& ends) const {
  Streams streams(2);
  ends.serve.rounds = at_once ? static_cast<uint64_t>(steps) * kLayers : 1;
  if (at_once) GPU_OK(kernels::LaunchServe(&ends.serve, 1, streams[1]));
  for (int i = 0; i < steps * kLayers; ++i) {
    if (at_once) {
      LaunchRound(i, kernels::kStepWhole, ends, streams[0]);
      continue;
    }
    LaunchRound(i, kernels::kStepAsk, ends, streams[0]);
    GPU_OK(cudaStreamSynchronize(streams[0]));
    ends.serve.first_round = static_cast<uint64_t>(i) + 1;
    GPU_OK(kernels::LaunchServe(&ends.serve, 1, streams[1]));
    GPU_OK(cudaStreamSynchronize(streams[1]));
    LaunchRound(i, kernels::kStepAttend, ends, streams[0]);
  }
}

std::vector<float> ResidentCase::Floats(const DeviceArray<unsigned char>& output) const {
  const auto bytes = output.Host();
  std::vector<float> floats(Numbers());
  for (size_t j = 0; j < floats.size(); ++j) {
    if (shape_.query_type == ElementType::kFloat32) {
      std::memcpy(&floats[j], bytes.data() + 4 * j, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, bytes.data() + 2 * j, 2);
      floats[j] = OfBFloat16(half);
    }
  }
  return floats;
}

void ResidentCase::CompareOutput(const std::string& label, const std::vector<float>& want,
                                 const DeviceArray<unsigned char>& output) const {
  const double error = RelativeError(Floats(output), want);
  // A bf16 output is rounded by up to 2^-9 of each number.
  const double allowed = shape_.query_type == ElementType::kFloat32 ? 2e-4 : 4e-3;
  GPU_CHECK(error <= allowed) << label << ": error " << error << "\n";
}

void ResidentCase::CompareSelection(const std::string& label, int layer, const Selected& selected,
                                    const Ends& ends) const {
  const auto chosen = ends.Chosen();
  for (int h = 0; h < shape_.pairs; ++h) {
    GPU_CHECK(chosen[static_cast<size_t>(layer) * shape_.pairs + h] == selected.positions[h])
        << label << " pair " << h << " chose otherwise\n";
  }
}

void ResidentCase::Run(int blocks_per_pair, int blocks, int steps, bool at_once) {
  const std::string label =
      name_ + " blocks " + std::to_string(blocks_per_pair) + (at_once ? " at once" : " in turn");
  cached_.assign(kLayers * shape_.pairs, {});
  const std::unique_ptr<Ends> made = MakeEnds(blocks_per_pair, blocks, steps);
  Ends& ends = *made;
  RunRounds(steps, at_once, ends);
  int64_t misses = 0;
  for (int i = 0; i < steps * kLayers; ++i) {
    const std::string round = label + " round " + std::to_string(i);
    const Selected selected = Select(ends.queries[i]);
    const int64_t missed = Misses(i % kLayers, selected);
    GPU_CHECK(i / kLayers != 2 || missed == 0) << round << ": the model forgets\n";
    misses += missed;
    CompareOutput(round, Attend(ends.queries[i], selected, ends.tokens[i / kLayers]),
                  ends.outputs[i]);
    if (i >= (steps - 1) * kLayers) CompareSelection(round, i % kLayers, selected, ends);
  }
  const ServeControl after = ends.control.Host()[0];
  GPU_CHECK(after.given_up == 0 && ends.status.Host()[0] == 0) << label << " gave up\n";
  GPU_CHECK(after.served == static_cast<uint64_t>(steps) * kLayers * shape_.pairs)
      << label << " served " << after.served << "\n";
  const double pushed = static_cast<double>(after.pushed);
  GPU_CHECK(std::abs(pushed - static_cast<double>(misses)) <=
            kPushedTolerance * static_cast<double>(misses))
      << label << " pushed " << pushed << " records, expected about " << misses << "\n";
  GPU_CHECK(ends.GuardsHold()) << label;
}

#ifdef CLUSTERKV_CUDA_EMULATOR
const std::vector<bool> kAtOnce = {false};
#else
const std::vector<bool> kAtOnce = {false, true};
#endif

void RunCase(const std::string& name, ElementType query_type, int slots, int steps,
             const std::vector<int>& blocks, const std::vector<bool>& both = kAtOnce,
             int32_t max_clusters = 0) {
  for (const bool at_once : both) {
    for (const int blocks_per_pair : blocks) {
      ResidentCase test(name, query_type, slots, max_clusters);
      // Room for three pairs at a time.
      test.Run(blocks_per_pair, blocks_per_pair * 3, steps, at_once);
    }
  }
}

GPU_TEST(ResidentLoopAnswersAsSelectAndAttentionDo) {
  RunCase("default", ElementType::kFloat32, 64, 4, {1, 3});
}
GPU_TEST(ResidentBFloat16QueriesAndALargerCache) {
  RunCase("default", ElementType::kBFloat16, 256, 3, {4});
}
GPU_TEST(ResidentEightHeads) { RunCase("eight_heads", ElementType::kBFloat16, 64, 3, {2, 6}); }
GPU_TEST(ResidentManyClusters) {
  RunCase("default", ElementType::kFloat32, 64, 2, {1, 2}, kAtOnce, 8192);
}
GPU_TEST(ResidentManyClustersOfEightHeads) {
  RunCase("eight_heads", ElementType::kFloat32, 64, 2, {2}, kAtOnce, 8192);
}
GPU_TEST(ResidentSevenHeads) { RunCase("seven_heads", ElementType::kFloat32, 128, 2, {4}); }

// Few, for tools that run kernels one after the other, and slowly.
GPU_TEST(ResidentRoundsInTurn) {
  for (const char* name : {"small", "small_eight"}) {
    RunCase(name, ElementType::kBFloat16, 32, 1, {2}, {false});
  }
}

GPU_TEST(ResidentTakesAsManyClustersAsItSays) {
  ServeParams serve;
  ResidentShape& shape = serve.shape;
  shape.layers = shape.pairs = 1;
  shape.group = serve.select.group = 4;
  shape.head_dim = serve.select.head_dim = 128;
  shape.max_exact = shape.slots = serve.select.budget_tokens = 64;
  serve.select.scored_tokens = 2048;
  serve.select.estimated_fraction = 0.25f;
  serve.select.blocks_per_pair = serve.blocks = 1;
  const int32_t most = kernels::MostServedClusters(serve);
  GPU_CHECK(most > 8192) << most << " clusters\n";  // 128k tokens by 16
  serve.select.max_clusters = most;
  GPU_CHECK(kernels::ServeWorkspaceBytes(serve) > 0) << most << "\n";
  serve.select.max_clusters = most + 1;
  GPU_CHECK(kernels::ServeWorkspaceBytes(serve) == 0) << most << "\n";
  shape.group = serve.select.group = 5;
  GPU_CHECK(kernels::MostServedClusters(serve) == 0) << "by a block for two quads\n";
  serve.select.blocks_per_pair = serve.blocks = 2;
  GPU_CHECK(kernels::MostServedClusters(serve) == most);
}

// Groups of one kernel.
class Together {
 public:
  Together(int blocks_per_pair, int blocks) : blocks_per_pair_(blocks_per_pair), blocks_(blocks) {}

  void Add(const char* name, ElementType query_type, int slots, int steps) {
    Member& member = members_.emplace_back();
    member.name = name;
    member.steps = steps;
    for (const bool alone : {true, false}) {
      // Of the same seed.
      ResidentCase& of =
          *member.cases.emplace_back(std::make_unique<ResidentCase>(name, query_type, slots));
      member.ends.push_back(of.MakeEnds(blocks_per_pair_, blocks_, steps));
      if (alone) of.RunRounds(steps, false, *member.ends.back());
    }
  }

  void Start() {
    std::vector<ServeParams> groups;
    for (Member& member : members_) {
      ServeParams& serve = member.ends[1]->serve;
      ServeControl control = {};
      GPU_OK(cudaMemcpy(&control, serve.control, sizeof(control), cudaMemcpyDeviceToHost));
      const uint64_t pairs = static_cast<uint64_t>(serve.shape.pairs);
      serve.first_round = control.served / pairs + 1;
      control.stop = 0;
      control.served = (serve.first_round - 1) * pairs;
      GPU_OK(cudaMemcpy(serve.control, &control, sizeof(control), cudaMemcpyHostToDevice));
      groups.push_back(serve);
    }
    GPU_OK(kernels::LaunchServe(groups.data(), static_cast<int32_t>(groups.size()), streams_[0]));
  }
  void Stop() {
    GPU_OK(kernels::StopServe(members_[0].ends[1]->serve.control, streams_[0], streams_[1]));
  }
  // Of the member; each has a stream of its own.
  void LaunchRound(int member, int i, kernels::StepPart part) {
    Member& of = members_[static_cast<size_t>(member)];
    of.cases[1]->LaunchRound(i, part, *of.ends[1], streams_[2 + member]);
  }

  void AwaitMembers() {
    for (int i = 0; i < static_cast<int>(members_.size()); ++i) {
      GPU_OK(cudaStreamSynchronize(streams_[2 + i]));
    }
  }

  // Stopped: `rounds` rounds of the member gave what a kernel of its own gave. The order of a
  // round's records is any: sums over them differ by rounding, what comes beside them does not.
  void ExpectAsAlone(int member, int rounds) const {
    const Member& of = members_[static_cast<size_t>(member)];
    const ResidentCase::Ends &alone = *of.ends[0], &ends = *of.ends[1];
    const ResidentCase& the_case = *of.cases[1];
    const std::string label = std::string(of.name) + " blocks " + std::to_string(blocks_per_pair_) +
                              " of " + std::to_string(blocks_);
    for (int i = 0; i < rounds; ++i) {
      the_case.CompareOutput(label + " round " + std::to_string(i),
                             the_case.Floats(alone.outputs[i]), ends.outputs[i]);
    }
    if (rounds == of.steps * kLayers) {
      GPU_CHECK(ends.StateLines() == alone.StateLines()) << label << " has another state\n";
      GPU_CHECK(ends.Chosen() == alone.Chosen()) << label << " chose otherwise\n";
      const double pushed = static_cast<double>(ends.control.Host()[0].pushed);
      const double expected = static_cast<double>(alone.control.Host()[0].pushed);
      GPU_CHECK(std::abs(pushed - expected) <= kPushedTolerance * expected)
          << label << " pushed " << pushed << " records, alone " << expected << "\n";
    }
    const ServeControl control = ends.control.Host()[0];
    GPU_CHECK(control.given_up == 0 && ends.status.Host()[0] == 0) << label << " gave up\n";
    GPU_CHECK(control.served == static_cast<uint64_t>(rounds * ends.serve.shape.pairs))
        << label << " served " << control.served << "\n";
    GPU_CHECK(ends.GuardsHold()) << label;
  }

 private:
  struct Member {
    const char* name;
    int steps;
    std::vector<std::unique_ptr<ResidentCase>> cases;  // alone, together
    std::vector<std::unique_ptr<ResidentCase::Ends>> ends;
  };
  const int blocks_per_pair_, blocks_;
  Streams streams_{5};  // the kernel's, another, and one for each of three members
  std::vector<Member> members_;
};

// One group asks twice as often as another, at the same time; a third never does. The kernel is
// stopped before it has answered what one has asked, and goes on.
void RunTogether(int blocks_per_pair, int blocks) {
  Together groups(blocks_per_pair, blocks);
  groups.Add("default", ElementType::kFloat32, 64, 4);
  groups.Add("no_codes", ElementType::kBFloat16, 256, 2);
  groups.Add("flat", ElementType::kFloat32, 64, 1);
  groups.Start();
  constexpr int kRounds = 4 * kLayers;
  for (int i = 0; i < kRounds; ++i) {
    if (i % 2 == 0) groups.LaunchRound(1, i / 2, kernels::kStepAsk);
    if (i == kRounds / 2) {
      groups.Stop();
      groups.Start();
    }
    groups.LaunchRound(0, i, kernels::kStepWhole);
    if (i % 2 == 1) groups.LaunchRound(1, i / 2, kernels::kStepAttend);
  }
  groups.AwaitMembers();
  groups.Stop();
  groups.ExpectAsAlone(0, kRounds);
  groups.ExpectAsAlone(1, kRounds / 2);
  groups.ExpectAsAlone(2, 0);
}

GPU_TEST(ResidentGroupsOfOneKernelGetWhatEachWouldAlone) {
  for (const int blocks_per_pair : {1, 2}) {
    for (const int clusters : {1, 2}) RunTogether(blocks_per_pair, blocks_per_pair * clusters);
  }
}

GPU_TEST(ResidentShapesOutOfRangeAreRefused) {
  ResidentShape shape;
  shape.layers = shape.pairs = 1;
  shape.group = 9;  // one too many
  shape.head_dim = 128;
  shape.slots = 64;
  GPU_CHECK(kernels::LaunchForget(shape, nullptr, 0, 1, nullptr) == cudaErrorInvalidValue);
  shape.group = 8;
  shape.slots = 48;  // no multiple of 32
  GPU_CHECK(kernels::LaunchForget(shape, nullptr, 0, 1, nullptr) == cudaErrorInvalidValue);
  shape.slots = 64;
  GPU_CHECK(kernels::LaunchForget(shape, nullptr, 1, 1, nullptr) == cudaErrorInvalidValue);
  const std::vector<ServeParams> groups(kernels::kMaxTogether + 1);
  for (const int count : {0, 1, kernels::kMaxTogether + 1}) {
    GPU_CHECK(kernels::LaunchServe(groups.data(), count, nullptr) == cudaErrorInvalidValue)
        << count << "\n";
  }
  StepParams step;
  step.shape = shape;
  GPU_CHECK(kernels::LaunchStep(step, 1, kernels::kStepAsk, nullptr, nullptr, nullptr, nullptr) ==
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
