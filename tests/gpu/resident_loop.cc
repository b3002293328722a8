// One process of two: an engine on a GPU whose steps a server's GPU answers by itself.
//
//   resident_loop --server=HOST:PORT --device=cuda:1 [--tokens=N] [--layers=N] [--sequences=N]
//                 [--steps=N] [--compare] [--forever]
//
// Fills sequences, joins them, and decodes: --compare holds every output against a DecodeSession's
// over gRPC on sequences of the same tokens; otherwise a step is captured in a CUDA graph, replayed
// and timed, and then timed once more one by one over gRPC. --forever replays until it is killed.
// Prints one JSON object. Exit status 1: something failed, 3: no group could be had.
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/runtime/device.h"
#include "tests/worker/worker_harness.h"
#include "worker/engine.h"

namespace clusterkv::worker {
namespace {

using kernels::DeviceBuffer;

constexpr int64_t kQueryHeads = 32, kKvHeads = 8, kHeadDim = 128;
constexpr int64_t kElements = kQueryHeads * kHeadDim, kRow = kKvHeads * kHeadDim;
constexpr uint32_t kWindow = 64;  // small, so that some become the service's meanwhile

struct Options {
  std::string server, device = "cuda:0";
  int64_t tokens = 2048, layers = 2, sequences = 1, steps = 100;
  bool compare = false, forever = false;
};

void Must(const absl::Status& status) { CKV_CHECK(status.ok()) << status; }
void Must(cudaError_t error) { CKV_CHECK(error == cudaSuccess) << cudaGetErrorString(error); }
template <typename T>
T Must(absl::StatusOr<T> value) {
  CKV_CHECK(value.ok()) << value.status();
  return *std::move(value);
}

class Loop {
 public:
  explicit Loop(const Options& options) : options_(options) {
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
    for (int64_t l = 0; l < options.layers; ++l) {
      layers_.push_back(
          MakeLayer({kKvHeads, kQueryHeads, kHeadDim, kernels::ElementType::kBFloat16},
                    options.tokens + kDecoded, kDecoded, static_cast<uint64_t>(l)));
    }
    for (int64_t s = 0; s < options.sequences; ++s) {
      batch_.push_back(Must(engine_->Attach(Fill(absl::StrCat("resident", s, "-", getpid())))));
    }
    stream_ = std::make_unique<kernels::Stream>(Must(kernels::Stream::Create(device_)));
    AllocateRows();
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

 private:
  static constexpr int64_t kDecoded = 200;  // tokens and queries that there are of each layer

  v1::SequenceHandle Fill(const std::string& name) {
    v1::OpenSequenceRequest request = OpenRequest(name, layers_);
    request.mutable_index()->set_window_tokens(kWindow);
    request.set_max_decode_tokens(options_.forever ? 1 << 15 : 2048);
    request.set_session_id(client_->session_id());
    return Must(Prefill(client_.get(), request, layers_)).handle();
  }

  void AllocateRows() {
    const int64_t sequences = options_.sequences;
    queries_ = Must(DeviceBuffer::Create(device_, options_.layers * sequences * kElements * 2));
    outputs_ = Must(DeviceBuffer::Create(device_, options_.layers * sequences * kElements * 2));
    rows_ = Must(DeviceBuffer::Create(device_, options_.layers * 2 * kRow * 2));
  }
  std::byte* Queries(int64_t l) { return queries_.data() + l * options_.sequences * kElements * 2; }
  std::byte* Outputs(int64_t l) { return outputs_.data() + l * options_.sequences * kElements * 2; }
  std::byte* Rows(int64_t l) { return rows_.data() + l * 2 * kRow * 2; }

  // Token and queries of a step, the same ones for every sequence, to where the GPU takes them.
  void Upload(int64_t step) {
    const int64_t i = step % kDecoded;
    for (int64_t l = 0; l < options_.layers; ++l) {
      const TraceLayer& layer = layers_[l];
      const auto copy = [](std::byte* to, absl::Span<const std::byte> from) {
        Must(cudaMemcpy(to, from.data(), from.size(), cudaMemcpyHostToDevice));
      };
      for (int64_t s = 0; s < options_.sequences; ++s) {
        copy(Queries(l) + s * kElements * 2, Query(layer, i));
      }
      const int64_t token = options_.tokens + i;
      copy(Rows(l), worker::Rows(layer, layer.keys, token, token + 1));
      copy(Rows(l) + kRow * 2, worker::Rows(layer, layer.values, token, token + 1));
    }
    // From pageable memory copies may still be on their way, and other streams do not wait for
    // them.
    Must(cudaStreamSynchronize(nullptr));
  }
  void Launch(bool append) {
    for (int64_t l = 0; l < options_.layers; ++l) {
      std::vector<EngineAppend> appends;
      std::vector<EngineStep> steps;
      for (int64_t s = 0; s < options_.sequences; ++s) {
        appends.push_back({batch_[s], {Rows(l), Rows(l) + kRow * 2, 0, 0}});
        steps.push_back(
            {batch_[s], Queries(l) + s * kElements * 2, Outputs(l) + s * kElements * 2, nullptr});
      }
      if (append) Must(engine_->Append(l, appends, stream_->get()));
      Must(engine_->Step(l, steps, stream_->get()));
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
  EngineOptions engine_options_;
  int device_ = 0;
  std::unique_ptr<Client> client_;
  std::vector<TraceLayer> layers_;
  std::unique_ptr<kernels::Stream> stream_;
  DeviceBuffer queries_, outputs_, rows_;  // outlive the engine
  std::unique_ptr<Engine> engine_;
  std::vector<EngineSequence*> batch_;
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
    Upload(step);
    Launch(/*append=*/true);
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

int Loop::Measure() {
  if (const int refused = Join(); refused != 0) return refused;
  Upload(0);
  Launch(/*append=*/true);
  Must(stream_->Synchronize());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replayed = nullptr;
  Must(cudaStreamBeginCapture(stream_->get(), cudaStreamCaptureModeThreadLocal));
  Launch(/*append=*/true);
  Must(cudaStreamEndCapture(stream_->get(), &graph));
  Must(cudaGraphInstantiate(&replayed, graph, 0));
  if (options_.forever) {
    std::printf("{\"running\": true}\n");
    std::fflush(stdout);
  }
  const auto replay = [&](int64_t i) {
    if (i % 100 == 99) Must(engine_->Settle(batch_[0], stream_->get()));
    Must(cudaGraphLaunch(replayed, stream_->get()));
  };
  do {
    (void)TimeLayer(100, replay);
  } while (options_.forever);
  const double resident = TimeLayer(options_.steps, replay);
  Must(cudaGraphExecDestroy(replayed));
  Must(cudaGraphDestroy(graph));
  Must(engine_->Leave(batch_[0], stream_->get()));
  const auto single = [&](int64_t) { Launch(/*append=*/false); };
  (void)TimeLayer(5, single);
  const double grpc = TimeLayer(std::min<int64_t>(options_.steps, 50), single);
  std::printf("{\"resident_us\": %.2f, \"%s_us\": %.2f}\n", resident,
              Engine::link(*batch_[0]).c_str(), grpc);
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
  clusterkv::worker::Loop loop(options);
  return options.compare ? loop.Compare() : loop.Measure();
}
