// One process of two: an engine on a GPU whose steps a server's GPU answers by itself.
//
//   resident_loop --server=HOST:PORT --device=cuda:1 [--tokens=N] [--layers=N] [--sequences=N]
//                 [--steps=N] [--cluster=N] [--compare | --forever | --products | --busy_us=N]
//                 [--loops=2]
//
// Fills sequences, with --cluster tokens per cluster, joins them, and decodes. --compare holds
// every output against a DecodeSession's over gRPC on sequences of the same tokens; otherwise steps
// are captured in CUDA graphs, replayed and timed, and then timed once more one by one over gRPC.
// --products times them beside a model's matrix products, --busy_us beside work that takes as long
// and leaves the GPU to others: so with --loops=2, two engines that decode alone, then at once.
// --forever replays until it is killed.
// Prints one JSON object. Exit status 1: something failed, 3: no group could be had.
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/runtime/device.h"
#include "tests/gpu/layer_work.h"
#include "tests/worker/worker_harness.h"
#include "worker/engine.h"

namespace clusterkv::worker {
namespace {

using kernels::DeviceBuffer;

constexpr int64_t kQueryHeads = 32, kKvHeads = 8, kHeadDim = 128;
constexpr int64_t kElements = kQueryHeads * kHeadDim, kRow = kKvHeads * kHeadDim;
// Small where it matters that some become the service's meanwhile; else a part of few clusters each
// time would be what is timed.
constexpr uint32_t kComparedWindow = 64, kTimedWindow = 256;
constexpr int64_t kDecoded = 200;  // tokens and queries that there are of each layer
constexpr int64_t kTurns = 8;      // steps that are captured, each with queries of its own

struct Options {
  std::string server, device = "cuda:0";
  int64_t tokens = 2048, layers = 2, sequences = 1, steps = 100, cluster = 16, busy_us = 0;
  int64_t loops = 1;
  bool compare = false, forever = false, products = false;
};
using Layers = std::vector<TraceLayer>;

void Must(const absl::Status& status) { CKV_CHECK(status.ok()) << status; }
void Must(cudaError_t error) { CKV_CHECK(error == cudaSuccess) << cudaGetErrorString(error); }
template <typename T>
T Must(absl::StatusOr<T> value) {
  CKV_CHECK(value.ok()) << value.status();
  return *std::move(value);
}

Layers MakeLayers(const Options& options) {
  std::vector<std::future<TraceLayer>> made;
  for (int64_t l = 0; l < options.layers; ++l) {
    made.push_back(std::async(std::launch::async, [&options, l] {
      return MakeLayer({kKvHeads, kQueryHeads, kHeadDim, kernels::ElementType::kBFloat16},
                       options.tokens + kDecoded, kDecoded, static_cast<uint64_t>(l));
    }));
  }
  Layers layers;
  for (auto& layer : made) layers.push_back(layer.get());
  return layers;
}

// A captured step.
class Graph {
 public:
  template <typename F>
  Graph(cudaStream_t stream, const F& launch) : stream_(stream) {
    cudaGraph_t graph = nullptr;
    Must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch();
    Must(cudaStreamEndCapture(stream, &graph));
    Must(cudaGraphInstantiate(&graph_, graph, 0));
    Must(cudaGraphDestroy(graph));
  }
  Graph(Graph&& other) noexcept
      : stream_(other.stream_), graph_(std::exchange(other.graph_, nullptr)) {}
  Graph& operator=(Graph&&) = delete;
  ~Graph() {
    if (graph_ != nullptr) Must(cudaGraphExecDestroy(graph_));
  }
  void Replay() const { Must(cudaGraphLaunch(graph_, stream_)); }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

class Loop {
 public:
  Loop(const Options& options, const Layers& layers, int64_t number)
      : options_(options), layers_(layers) {
    engine_options_.target = options.server;
    engine_options_.device = options.device;
    engine_options_.output_type = v1::ELEMENT_TYPE_BFLOAT16;
    engine_options_.decode.hot_cache.set_capacity_tokens(256);
    engine_options_.decode.state_type = v1::ELEMENT_TYPE_FLOAT32;
    engine_options_.decode.append_batch_tokens = 1;
    engine_options_.step_timeout = absl::Seconds(5);
    const size_t colon = options.device.find(':');
    if (colon != std::string::npos) device_ = std::atoi(options.device.c_str() + colon + 1);
    Must(cudaSetDevice(device_));
    client_ = Must(Client::Connect(options.server));
    engine_ = Must(Engine::Open(engine_options_));
    for (int64_t s = 0; s < options.sequences; ++s) {
      const std::string name = absl::StrCat("resident", number, ".", s, "-", getpid());
      batch_.push_back(Must(engine_->Attach(Fill(name))));
    }
    stream_ = std::make_unique<kernels::Stream>(Must(kernels::Stream::Create(device_)));
    AllocateRows();
    if (options.products) {
      work_ = MakeMatrixProducts(options.layers, options.sequences);
      CKV_CHECK(work_ != nullptr) << "no cuBLAS";
    } else if (options.busy_us > 0) {
      work_ = MakeBusy(options.busy_us * 1000);
    }
  }

  // 0, or 3 with the reason.
  int Join() {
    const absl::Status joined = engine_->Join(batch_);
    if (joined.ok()) return 0;
    std::fprintf(stderr, "no group: %s\n", std::string(joined.message()).c_str());
    return absl::IsUnavailable(joined) ? 3 : 1;
  }
  int Compare();
  int Measure();
  // Of a group: microseconds of a layer with what lies between two layers, the median of so many
  // steps; goes on until `others` says that they have measured, too.
  double Decode(const std::vector<Graph>& steps, std::atomic<int>* others);
  // Every turn's step. After Join.
  std::vector<Graph> CaptureSteps(bool with_work);
  void Leave() { Must(engine_->Leave(batch_[0], stream_->get())); }

 private:
  v1::SequenceHandle Fill(const std::string& name) {
    v1::OpenSequenceRequest request = OpenRequest(name, layers_);
    request.mutable_index()->set_window_tokens(options_.compare ? kComparedWindow : kTimedWindow);
    request.mutable_index()->set_tokens_per_cluster(static_cast<uint32_t>(options_.cluster));
    request.set_max_decode_tokens(options_.forever ? 1 << 15 : 1 << 12);
    request.set_session_id(client_->session_id());
    PrefillWriterOptions options;
    options.max_in_flight_bytes = 1 << 30;  // a layer is put as a whole
    return Must(Prefill(client_.get(), request, layers_, options)).handle();
  }

  void AllocateRows() {
    Must(cudaSetDevice(device_));
    const int64_t bytes = options_.layers * options_.sequences * kElements * 2;
    queries_ = Must(DeviceBuffer::Create(device_, kTurns * bytes));
    outputs_ = Must(DeviceBuffer::Create(device_, bytes));
    rows_ = Must(DeviceBuffer::Create(device_, options_.layers * 2 * kRow * 2));
  }
  std::byte* Queries(int64_t turn, int64_t l) {
    return queries_.data() + (turn * options_.layers + l) * options_.sequences * kElements * 2;
  }
  std::byte* Outputs(int64_t l) { return outputs_.data() + l * options_.sequences * kElements * 2; }
  std::byte* Rows(int64_t l) { return rows_.data() + l * 2 * kRow * 2; }

  // Token and queries of a step, the same ones for every sequence, to where the GPU takes those of
  // a turn.
  void Upload(int64_t step, int64_t turn) {
    const int64_t i = step % kDecoded;
    for (int64_t l = 0; l < options_.layers; ++l) {
      const TraceLayer& layer = layers_[l];
      const auto copy = [](std::byte* to, absl::Span<const std::byte> from) {
        Must(cudaMemcpy(to, from.data(), from.size(), cudaMemcpyHostToDevice));
      };
      for (int64_t s = 0; s < options_.sequences; ++s) {
        copy(Queries(turn, l) + s * kElements * 2, Query(layer, i));
      }
      const int64_t token = options_.tokens + i;
      copy(Rows(l), worker::Rows(layer, layer.keys, token, token + 1));
      copy(Rows(l) + kRow * 2, worker::Rows(layer, layer.values, token, token + 1));
    }
    // From pageable memory copies may still be on their way, and other streams do not wait for
    // them.
    Must(cudaStreamSynchronize(nullptr));
  }
  void Launch(int64_t turn, bool append, bool with_work) {
    for (int64_t l = 0; l < options_.layers; ++l) {
      std::vector<EngineAppend> appends;
      std::vector<EngineStep> steps;
      for (int64_t s = 0; s < options_.sequences; ++s) {
        appends.push_back({batch_[s], {Rows(l), Rows(l) + kRow * 2, 0, 0}});
        steps.push_back({batch_[s], Queries(turn, l) + s * kElements * 2,
                         Outputs(l) + s * kElements * 2, nullptr});
      }
      if (append) Must(engine_->Append(l, appends, stream_->get()));
      Must(engine_->Step(l, steps, stream_->get()));
      if (with_work) work_->Launch(l, stream_->get());
    }
  }
  // Microseconds of a layer: the median of so many steps.
  template <typename F>
  double TimeLayer(int64_t steps, const F& step) {
    std::vector<double> times;
    for (int64_t i = 0; i < steps; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      step(i);
      Must(stream_->Synchronize());
      const std::chrono::duration<double, std::micro> spent =
          std::chrono::steady_clock::now() - begin;
      times.push_back(spent.count() / static_cast<double>(options_.layers));
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  const Options options_;
  const Layers& layers_;
  EngineOptions engine_options_;
  int device_ = 0;
  std::unique_ptr<Client> client_;
  std::unique_ptr<kernels::Stream> stream_;
  DeviceBuffer queries_, outputs_, rows_;  // outlive the engine
  std::unique_ptr<Engine> engine_;
  std::vector<EngineSequence*> batch_;
  std::unique_ptr<LayerWork> work_;  // null: none
};

// Largest difference of any output to that over gRPC, in units of the outputs' root mean square.
int Loop::Compare() {
  if (const int refused = Join(); refused != 0) return refused;
  const auto mirror = Must(DecodeSession::Attach(
      client_.get(), Fill(absl::StrCat("mirror", getpid())), engine_options_.decode));
  double worst = 0, squares = 0, numbers = 0;
  std::vector<std::byte> bytes(kElements * 2);
  std::vector<float> got(kElements), want(kElements);
  for (int64_t step = 0; step < std::min(options_.steps, kDecoded); ++step) {
    Upload(step, /*turn=*/0);
    Launch(/*turn=*/0, /*append=*/true, /*with_work=*/false);
    Must(stream_->Synchronize());
    for (int64_t l = 0; l < options_.layers; ++l) {
      const TraceLayer& layer = layers_[l];
      const int64_t token = options_.tokens + step;
      Must(mirror->Append(l, worker::Rows(layer, layer.keys, token, token + 1),
                          worker::Rows(layer, layer.values, token, token + 1)));
      Must(mirror->Step(l, Query(layer, step), absl::MakeSpan(want), nullptr));
      for (const float x : want) squares += double{x} * x;
      numbers += static_cast<double>(want.size());
      for (int64_t s = 0; s < options_.sequences; ++s) {
        Must(cudaMemcpy(bytes.data(), Outputs(l) + s * kElements * 2, bytes.size(),
                        cudaMemcpyDeviceToHost));
        kernels::ToFloat(bytes.data(), kernels::ElementType::kBFloat16, kElements, got.data());
        for (int64_t j = 0; j < kElements; ++j) {
          const double off = std::abs(double{got[j]} - want[j]);
          if (!(off <= worst)) worst = off;  // NaN stays
        }
      }
    }
    // The mirror's select waits for what is clustered; so does the group.
    for (EngineSequence* of : batch_) {
      Must(engine_->Settle(of, stream_->get()));
      while (Must(client_->GetSequence(Engine::sequence(*of).handle())).state() !=
             v1::SEQUENCE_STATE_READY) {
      }
    }
    Must(engine_->Settle(batch_[0], stream_->get()));
  }
  const double error = worst / std::sqrt(squares / numbers);
  Must(engine_->Leave(batch_[0], stream_->get()));
  std::printf("{\"largest_error\": %.6f, \"clustered\": %lld}\n", error,
              static_cast<long long>(mirror->window_begin(0) - options_.tokens));
  return error <= 0.02 ? 0 : 1;
}

std::vector<Graph> Loop::CaptureSteps(bool with_work) {
  for (int64_t turn = 0; turn < kTurns; ++turn) Upload(turn, turn);
  Launch(/*turn=*/0, /*append=*/true, with_work);
  Must(stream_->Synchronize());
  std::vector<Graph> steps;
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    steps.emplace_back(stream_->get(), [&] { Launch(turn, /*append=*/true, with_work); });
  }
  return steps;
}

double Loop::Decode(const std::vector<Graph>& steps, std::atomic<int>* others) {
  int64_t done = 0;
  const auto replay = [&](int64_t) {
    if (++done % 100 == 0) Must(engine_->Settle(batch_[0], stream_->get()));
    steps[done % kTurns].Replay();
  };
  (void)TimeLayer(100, replay);  // the hot cache fills
  const double taken = TimeLayer(options_.steps, replay);
  if (others != nullptr) others->fetch_sub(1);
  while (others != nullptr && others->load() > 0) (void)TimeLayer(10, replay);
  Must(engine_->Settle(batch_[0], stream_->get()));
  return taken;
}

int Loop::Measure() {
  if (const int refused = Join(); refused != 0) return refused;
  const std::vector<Graph> steps = CaptureSteps(/*with_work=*/false);
  if (options_.forever) {
    std::printf("{\"running\": true}\n");
    std::fflush(stdout);
    while (true) (void)Decode(steps, nullptr);
  }
  const double resident = Decode(steps, nullptr);
  double work = 0, beside_work = 0;
  if (work_ != nullptr) {
    const auto all_work = [this] {
      for (int64_t l = 0; l < options_.layers; ++l) work_->Launch(l, stream_->get());
    };
    const Graph alone(stream_->get(), all_work);
    (void)TimeLayer(10, [&](int64_t) { alone.Replay(); });
    work = TimeLayer(options_.steps, [&](int64_t) { alone.Replay(); });
    beside_work = Decode(CaptureSteps(/*with_work=*/true), nullptr);
  }
  Leave();
  const auto single = [&](int64_t i) { Launch(i % kTurns, /*append=*/false, /*with_work=*/false); };
  (void)TimeLayer(5, single);
  const double grpc = TimeLayer(std::min<int64_t>(options_.steps, 50), single);
  std::printf(
      "{\"resident_us\": %.2f, \"work_us\": %.2f, \"beside_work_us\": %.2f, \"%s_us\": %.2f}\n",
      resident, work, beside_work, Engine::link(*batch_[0]).c_str(), grpc);
  return 0;
}

// Two loops, each alone and then both at once.
int MeasureTogether(const Options& options, const Layers& layers) {
  std::vector<std::unique_ptr<Loop>> loops;
  for (int64_t i = 0; i < options.loops; ++i) {
    loops.push_back(std::make_unique<Loop>(options, layers, i));
  }
  std::string alone, together;
  for (auto& loop : loops) {
    if (const int refused = loop->Join(); refused != 0) return refused;
    absl::StrAppend(&alone, alone.empty() ? "" : ", ",
                    loop->Decode(loop->CaptureSteps(options.busy_us > 0), nullptr));
    loop->Leave();
  }
  std::vector<std::vector<Graph>> steps;
  for (auto& loop : loops) {
    if (const int refused = loop->Join(); refused != 0) return refused;
    steps.push_back(loop->CaptureSteps(options.busy_us > 0));
  }
  std::atomic<int> measuring{static_cast<int>(loops.size())};
  std::vector<double> taken(loops.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < loops.size(); ++i) {
    threads.emplace_back([&, i] { taken[i] = loops[i]->Decode(steps[i], &measuring); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double each : taken) {
    absl::StrAppend(&together, together.empty() ? "" : ", ", each);
  }
  steps.clear();
  for (auto& loop : loops) loop->Leave();
  std::printf("{\"alone_us\": [%s], \"together_us\": [%s]}\n", alone.c_str(), together.c_str());
  return 0;
}

bool Parse(int argc, char** argv, Options* options) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string_view name = argument.substr(0, equals);
    const std::string value(equals == argument.npos ? "" : argument.substr(equals + 1));
    if (name == "--server") {
      options->server = value;
    } else if (name == "--device") {
      options->device = value;
    } else if (name == "--tokens") {
      options->tokens = std::atoll(value.c_str());
    } else if (name == "--layers") {
      options->layers = std::atoll(value.c_str());
    } else if (name == "--sequences") {
      options->sequences = std::atoll(value.c_str());
    } else if (name == "--steps") {
      options->steps = std::atoll(value.c_str());
    } else if (name == "--cluster") {
      options->cluster = std::atoll(value.c_str());
    } else if (name == "--busy_us") {
      options->busy_us = std::atoll(value.c_str());
    } else if (name == "--loops") {
      options->loops = std::atoll(value.c_str());
    } else if (name == "--products") {
      options->products = true;
    } else if (name == "--compare") {
      options->compare = true;
    } else if (name == "--forever") {
      options->forever = true;
    } else {
      return false;
    }
  }
  return !options->server.empty();
}

}  // namespace
}  // namespace clusterkv::worker

int main(int argc, char** argv) {
  clusterkv::worker::Options options;
  if (!clusterkv::worker::Parse(argc, argv, &options)) {
    std::fprintf(stderr, "Usage: see the head of tests/gpu/resident_loop.cc\n");
    return 2;
  }
  const clusterkv::worker::Layers layers = clusterkv::worker::MakeLayers(options);
  if (options.loops > 1) return clusterkv::worker::MeasureTogether(options, layers);
  clusterkv::worker::Loop loop(options, layers, 0);
  return options.compare ? loop.Compare() : loop.Measure();
}
