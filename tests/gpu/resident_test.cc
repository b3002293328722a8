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
  ResidentCase(const std::string& name, ElementType query_type, int slots)
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
    shape_.max_exact = kernels::ExactCapacity(select_);
    shape_.slots = slots;
    MakeRows();
  }

  // Steps of a random walk of queries from the case's own. `together`: both ends run at once, else
  // one after the other, as an emulator must.
  void Run(int blocks_per_pair, int blocks, int steps, bool together);

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

  struct Ends;
  void MakePairs(int steps, Ends& ends) const;
  void MakeParams(int blocks_per_pair, int blocks, Ends& ends) const;
  void MakeQueries(int steps, Ends& ends);
  void RunRounds(int steps, bool together, Ends& ends) const;
  void CompareOutput(const std::string& label, const std::vector<float>& want,
                     const DeviceArray<unsigned char>& output) const;
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

// All rounds; waits for their end.
void ResidentCase::RunRounds(int steps, bool together, Ends& ends) const {
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) {
    GPU_OK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
  }
  GPU_OK(cudaDeviceSynchronize());
  ends.serve.rounds = together ? static_cast<uint64_t>(steps) * kLayers : 1;
  if (together) GPU_OK(kernels::LaunchServe(ends.serve, streams[1]));
  for (int i = 0; i < steps * kLayers; ++i) {
    ends.step.pairs = ends.step_pairs[i / kLayers].data();
    const int layer = i % kLayers;
    const auto launch = [&](kernels::StepPart part) {
      GPU_OK(kernels::LaunchStep(ends.step, layer, part, ends.device_queries[i].data(),
                                 ends.outputs[i].data(), nullptr, streams[0]));
    };
    if (together) {
      launch(kernels::kStepWhole);
    } else {
      launch(kernels::kStepAsk);
      GPU_OK(cudaStreamSynchronize(streams[0]));
      ends.serve.first_round = static_cast<uint64_t>(i) + 1;
      GPU_OK(kernels::LaunchServe(ends.serve, streams[1]));
      GPU_OK(cudaStreamSynchronize(streams[1]));
      launch(kernels::kStepAttend);
    }
    if (layer == kLayers - 1) {
      GPU_OK(kernels::LaunchEndStep(shape_, ends.rounds.data(), streams[0]));
    }
  }
  GPU_OK(cudaDeviceSynchronize());
  for (cudaStream_t stream : streams) GPU_OK(cudaStreamDestroy(stream));
}

void ResidentCase::CompareOutput(const std::string& label, const std::vector<float>& want,
                                 const DeviceArray<unsigned char>& output) const {
  const auto bytes = output.Host();
  std::vector<float> got(want.size());
  for (size_t j = 0; j < got.size(); ++j) {
    if (shape_.query_type == ElementType::kFloat32) {
      std::memcpy(&got[j], bytes.data() + 4 * j, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, bytes.data() + 2 * j, 2);
      got[j] = OfBFloat16(half);
    }
  }
  const double error = RelativeError(got, want);
  // A bf16 output is rounded by up to 2^-9 of each number.
  const double allowed = shape_.query_type == ElementType::kFloat32 ? 2e-4 : 4e-3;
  GPU_CHECK(error <= allowed) << label << ": error " << error << "\n";
}

void ResidentCase::CompareSelection(const std::string& label, int layer, const Selected& selected,
                                    const Ends& ends) const {
  const auto counts = ends.exact_count.Host(), all = ends.positions.Host();
  for (int h = 0; h < shape_.pairs; ++h) {
    const size_t row = static_cast<size_t>(layer) * shape_.pairs + h;
    const auto begin = all.begin() + static_cast<int64_t>(row) * shape_.max_exact;
    std::vector<int32_t> chosen(begin, begin + counts[row]);
    std::sort(chosen.begin(), chosen.end());
    GPU_CHECK(chosen == selected.positions[h]) << label << " pair " << h << " chose otherwise\n";
  }
}

void ResidentCase::Run(int blocks_per_pair, int blocks, int steps, bool together) {
  const std::string label =
      name_ + " blocks " + std::to_string(blocks_per_pair) + (together ? " together" : " in turn");
  cached_.assign(kLayers * shape_.pairs, {});
  Ends ends(*this, steps);
  MakePairs(steps, ends);
  MakeParams(blocks_per_pair, blocks, ends);
  MakeQueries(steps, ends);
  RunRounds(steps, together, ends);
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
  // Of tokens last used in the same round any may go first: the cache may differ a little.
  const double pushed = static_cast<double>(after.pushed);
  GPU_CHECK(std::abs(pushed - static_cast<double>(misses)) <= 0.03 * static_cast<double>(misses))
      << label << " pushed " << pushed << " records, expected about " << misses << "\n";
  GPU_CHECK(ends.GuardsHold()) << label;
}

#ifdef CLUSTERKV_CUDA_EMULATOR
const std::vector<bool> kTogether = {false};
#else
const std::vector<bool> kTogether = {false, true};
#endif

void RunCase(ElementType query_type, int slots, int steps, const std::vector<int>& blocks,
             const std::vector<bool>& both = kTogether) {
  for (const bool together : both) {
    for (const int blocks_per_pair : blocks) {
      ResidentCase test("default", query_type, slots);
      // Room for three pairs at a time.
      test.Run(blocks_per_pair, blocks_per_pair * 3, steps, together);
    }
  }
}

GPU_TEST(ResidentLoopAnswersAsSelectAndAttentionDo) {
  RunCase(ElementType::kFloat32, 64, 4, {1, 3});
}
GPU_TEST(ResidentBFloat16QueriesAndALargerCache) { RunCase(ElementType::kBFloat16, 256, 3, {4}); }

// Few, for tools that run kernels one after the other, and slowly.
GPU_TEST(ResidentRoundsInTurn) { RunCase(ElementType::kBFloat16, 64, 1, {2}, {false}); }

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
  GPU_CHECK(most > 2048) << most << " clusters\n";  // 32k tokens by 16
  serve.select.max_clusters = most;
  GPU_CHECK(kernels::ServeWorkspaceBytes(serve) > 0) << most << "\n";
  serve.select.max_clusters = most + 1;
  GPU_CHECK(kernels::ServeWorkspaceBytes(serve) == 0) << most << "\n";
  shape.group = serve.select.group = 5;
  GPU_CHECK(kernels::MostServedClusters(serve) == 0);
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
  StepParams step;
  step.shape = shape;
  GPU_CHECK(kernels::LaunchStep(step, 1, kernels::kStepAsk, nullptr, nullptr, nullptr, nullptr) ==
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
