// A prompt from a GPU into a server on the same host: by window and by PutKv, in one run.
//
// Usage: ingest_bench [--server=PROGRAM] [--json=FILE] [--layers=N] [--tokens=N] [--kills=N]
// Starts the server (default: clusterkv-server beside this program) on cuda:0; the prompt lies on
// the last GPU, or the first of two. Prints a table, and what the server says it copied; writes
// rows as gpu.json's. With --kills the worker is killed so many times with slots in flight, and the
// server must take a whole prompt after that.
#include <cuda_runtime.h>
#include <grpcpp/create_channel.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "kernels/base/check.h"
#include "kernels/runtime/device.h"
#include "proto/error.h"
#include "tests/worker/ckv/processes.h"
#include "worker/cuda_ingest_ring.h"
#include "worker/engine.h"

namespace clusterkv::worker {
namespace {

constexpr int64_t kKvHeads = 8, kQueryHeads = 32, kHeadDim = 128, kRow = kHeadDim * 2;  // bfloat16

struct Options {
  std::string server, json, victim_of;
  int64_t layers = 8, tokens = 32768, kills = 0;
};

int WorkerGpu() { return std::min(kernels::DeviceCount() - 1, 1); }

// One layer's K and V [tokens, kv_heads, head_dim], finite, on the worker's GPU. All layers are
// the same, for their bytes take the same time.
class Prompt {
 public:
  explicit Prompt(int64_t tokens)
      : bytes_(tokens * kKvHeads * kRow),
        gpu_(kernels::DeviceBuffer::Create(WorkerGpu(), 2 * bytes_).value()) {
    std::mt19937 random(1);
    std::vector<uint16_t> rows(static_cast<size_t>(bytes_));  // K and V, 2 bytes each
    for (uint16_t& number : rows) number = static_cast<uint16_t>(0x3f00 | (random() & 0x80ff));
    CKV_CHECK(cudaSetDevice(WorkerGpu()) == cudaSuccess);
    CKV_CHECK(cudaMemcpy(gpu_.data(), rows.data(), 2 * static_cast<size_t>(bytes_),
                         cudaMemcpyHostToDevice) == cudaSuccess);
    CKV_CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess);  // no other stream waits for the copy
  }
  int64_t bytes() const { return 2 * bytes_; }
  EngineKv kv() const { return {gpu_.data(), gpu_.data() + bytes_, 0, 0}; }

 private:
  int64_t bytes_;
  kernels::DeviceBuffer gpu_;
};

// A sequence that ends with the session, if its prompt is not whole by then.
v1::OpenSequenceRequest Request(const Options& options, const std::string& way,
                                uint64_t session_id) {
  static int64_t count = 0;
  v1::OpenSequenceRequest request;
  request.set_name(absl::StrCat(way, "-", getpid(), "-", ++count));
  request.set_session_id(session_id);
  request.mutable_shape()->set_layers(static_cast<uint32_t>(options.layers));
  request.mutable_shape()->set_kv_heads(kKvHeads);
  request.mutable_shape()->set_query_heads(kQueryHeads);
  request.mutable_shape()->set_head_dim(kHeadDim);
  request.set_prompt_tokens(static_cast<uint32_t>(options.tokens));
  return request;
}

struct Result {
  std::string way;
  double in_seconds = 0, sealed_seconds = 0;  // all tokens are in; and clustered
  int64_t bytes = 0;
  IngestCounts counts = {};
  std::vector<uint64_t> digests = {};
};

// When every token of the sequence is in.
void AwaitTokens(Client* client, const v1::Sequence& sequence) {
  while (true) {
    const auto now = client->GetSequence(sequence.handle());
    CKV_CHECK(now.ok()) << now.status();
    if (now->tokens() >= sequence.prompt_tokens()) return;
    std::this_thread::yield();
  }
}

void Finish(Client* client, const v1::Sequence& sealed, absl::Time start, Result* result) {
  result->sealed_seconds = absl::ToDoubleSeconds(absl::Now() - start);
  for (const v1::LayerInfo& layer : sealed.layers())
    result->digests.push_back(layer.index_digest());
  CKV_CHECK(client->ReleaseSequence(sealed.handle()).ok());
}

// Through slots, waiting for them as the Python worker does.
Result ByWindow(const Options& options, const std::string& target, const Prompt& prompt) {
  auto client = Client::Connect(target).value();
  WindowWriter writer(client.get(), [] {
    const IngestRingOptions ring;
    return MakeCudaIngestRing(WorkerGpu(), ring.slots, ring.slot_bytes);
  });
  writer.Connect();
  const v1::Sequence sequence =
      client->OpenSequence(Request(options, "window", client->session_id())).value();
  auto otherwise = PrefillWriter::Create(client.get(), sequence).value();
  auto stream = kernels::Stream::Create(WorkerGpu()).value();
  Result result{"window"};
  std::mutex mutex;
  std::condition_variable changed;
  int64_t pending = 0;
  const absl::Time start = absl::Now();
  for (int64_t layer = 0; layer < options.layers; ++layer) {
    WindowWriter::Rows rows;
    rows.sequence = &sequence.handle();
    rows.layer = layer;
    rows.keys = {prompt.kv().keys, options.tokens, kKvHeads, kRow, kKvHeads * kRow, kRow};
    rows.values = {prompt.kv().values, options.tokens, kKvHeads, kRow, kKvHeads * kRow, kRow};
    rows.otherwise = otherwise.get();
    while (rows.keys.tokens > 0) {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        ++pending;
      }
      const auto taken = writer.Put(rows, stream.get(), /*wait=*/true, [&](const absl::Status& s) {
        CKV_CHECK(s.ok()) << s;
        const std::lock_guard<std::mutex> lock(mutex);
        if (--pending == 0) changed.notify_all();
      });
      CKV_CHECK(taken.ok() && *taken > 0) << taken.status();
      rows.Skip(*taken);
      result.bytes += *taken * 2 * kKvHeads * kRow;
    }
  }
  {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return pending == 0; });
  }
  result.in_seconds = absl::ToDoubleSeconds(absl::Now() - start);
  const auto sealed = otherwise->Finish();
  CKV_CHECK(sealed.ok()) << sealed.status();
  Finish(client.get(), *sealed, start, &result);
  result.counts = writer.counts();
  return result;
}

// As an engine without a ring: through pinned memory and gRPC.
Result ByPutKv(const Options& options, const std::string& target, const Prompt& prompt) {
  EngineOptions engine_options;
  engine_options.target = target;
  engine_options.device = absl::StrCat("cuda:", WorkerGpu());
  engine_options.ingest_ring.slots = 0;
  auto engine = Engine::Open(engine_options).value();
  auto client = Client::Connect(target).value();
  EngineSequence* const sequence = engine->Create(Request(options, "chunks", 0)).value();
  auto stream = kernels::Stream::Create(WorkerGpu()).value();
  Result result{"PutKv"};
  const absl::Time start = absl::Now();
  for (int64_t layer = 0; layer < options.layers; ++layer) {
    absl::Status put;
    do {
      put = engine->Ingest(sequence, layer, 0, options.tokens, prompt.kv(), {}, stream.get());
      std::this_thread::yield();
    } while (ReasonOf(put) == v1::LIMIT_EXCEEDED);
    CKV_CHECK(put.ok()) << put;
    result.bytes += prompt.bytes();
  }
  AwaitTokens(client.get(), Engine::sequence(*sequence));
  result.in_seconds = absl::ToDoubleSeconds(absl::Now() - start);
  const absl::Status sealed = engine->Seal(sequence);
  CKV_CHECK(sealed.ok()) << sealed;
  const v1::Sequence ready = Engine::sequence(*sequence);
  CKV_CHECK(engine->Close(sequence).ok());
  Finish(client.get(), ready, start, &result);
  result.counts.host_bytes = result.bytes;
  return result;
}

v1::Stats StatsOf(const std::string& admin) {
  const auto stub =
      v1::AdminService::NewStub(grpc::CreateChannel(admin, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::Stats stats;
  CKV_CHECK(stub->GetStats(&context, {}, &stats).ok());
  return stats;
}

// Starts this program as a worker of `server` and kills it while it puts a prompt.
void KillAWorker(const ckv::ServerProcess& server) {
  const std::string self = std::filesystem::canonical("/proc/self/exe");
  const std::string victim = absl::StrCat("--victim_of=", server.target());
  std::vector<char*> arguments = {const_cast<char*>(self.c_str()),
                                  const_cast<char*>(victim.c_str()), nullptr};
  const uint64_t before = StatsOf(server.admin()).window_bytes();
  pid_t pid = -1;
  CKV_CHECK(posix_spawn(&pid, self.c_str(), nullptr, nullptr, arguments.data(), environ) == 0);
  while (StatsOf(server.admin()).window_bytes() == before) std::this_thread::yield();
  kill(pid, SIGKILL);
  int status = 0;
  waitpid(pid, &status, 0);
  while (StatsOf(server.admin()).ingest_windows() > 0) std::this_thread::yield();
}

struct Measured {
  Result result;
  uint64_t uploaded = 0, fetched = 0;  // by the server, while it came in and was clustered
};

Measured Measure(const ckv::ServerProcess& server, const std::function<Result()>& run) {
  const v1::Stats before = StatsOf(server.admin());
  Measured measured;
  measured.result = run();
  const v1::Stats after = StatsOf(server.admin());
  measured.uploaded = after.device_uploaded_bytes() - before.device_uploaded_bytes();
  measured.fetched = after.device_fetched_bytes() - before.device_fetched_bytes();
  return measured;
}

double GigabytesPerSecond(const Result& result) {
  return static_cast<double>(result.bytes) / result.in_seconds * 1e-9;
}

void Print(const Measured& m) {
  std::printf(
      "%-7s %8.2f GB/s in %7.3f s, sealed after %7.3f s; %lld bytes by window, %lld "
      "through the host; the server copied %llu bytes to its GPU, %llu back\n",
      m.result.way.c_str(), GigabytesPerSecond(m.result), m.result.in_seconds,
      m.result.sealed_seconds, static_cast<long long>(m.result.counts.window_bytes),
      static_cast<long long>(m.result.counts.host_bytes),
      static_cast<unsigned long long>(m.uploaded), static_cast<unsigned long long>(m.fetched));
}

int Run(const Options& options) {
  const auto server = ckv::ServerProcess::Start(
      options.server, {"--device=cuda:0", "--arena_bytes=8GiB", "--session_ttl_ms=1000"});
  if (server == nullptr) return 1;
  const Prompt prompt(options.tokens);
  Options warm_up = options;
  warm_up.layers = 1;
  ByWindow(warm_up, server->target(), prompt);
  ByPutKv(warm_up, server->target(), prompt);
  const auto window = [&] { return ByWindow(options, server->target(), prompt); };
  const Measured by_window = Measure(*server, window);
  const Measured by_chunks =
      Measure(*server, [&] { return ByPutKv(options, server->target(), prompt); });
  const Measured again = Measure(*server, window);
  for (const Measured* m : {&by_window, &by_chunks, &again}) Print(*m);
  int failures = 0;
  const auto expect = [&failures](bool holds, const char* what) {
    if (!holds) std::printf("FAILED: %s\n", what);
    failures += holds ? 0 : 1;
  };
  for (const Measured* m : {&by_window, &by_chunks, &again}) {
    const std::vector<uint64_t>& digests = m->result.digests;
    const bool same = std::equal(digests.begin() + 1, digests.end(), digests.begin());
    expect(same, absl::StrCat("the same index of every layer by ", m->result.way).c_str());
  }
  expect(by_window.result.digests == again.result.digests, "the same index by window twice");
  expect(by_window.result.digests == by_chunks.result.digests, "the same index both ways");
  expect(by_window.uploaded == 0 && again.uploaded == 0, "nothing is copied to the GPU by window");
  expect(by_window.result.counts.host_bytes == 0, "no bytes through the host by window");
  for (int64_t i = 0; i < options.kills; ++i) KillAWorker(*server);
  if (options.kills > 0) {
    const Measured after = Measure(*server, window);
    expect(after.result.digests == by_chunks.result.digests, "the same index after the kills");
    std::printf("%lld workers killed; then %.2f GB/s\n", static_cast<long long>(options.kills),
                GigabytesPerSecond(after.result));
  }
  expect(server->Terminate() == 0, "the server ends well");
  const double gbps = GigabytesPerSecond(again.result), peer = GigabytesPerSecond(by_chunks.result);
  const nlohmann::json rows = {
      {{"name", absl::StrCat("ingest from a GPU, ", options.layers, " layers of ", options.tokens)},
       {"value", gbps},
       {"unit", "GB/s"},
       {"peer", "PutKv, same run"},
       {"peer_value", peer},
       {"ratio", gbps / peer},
       {"target", nullptr}},
      {{"name", "copied to the GPU by the server while ingesting by window"},
       {"value", by_window.uploaded + again.uploaded},
       {"unit", "bytes"},
       {"peer", "PutKv, same run"},
       {"peer_value", by_chunks.uploaded},
       {"ratio", nullptr},
       {"target", 0}}};
  if (!options.json.empty()) {
    std::ofstream(options.json) << nlohmann::json{{"rows", rows}}.dump(1) << "\n";
  }
  return failures == 0 ? 0 : 1;
}

int Main(int argc, char** argv) {
  Options options;
  options.server = std::filesystem::canonical("/proc/self/exe").parent_path() / "clusterkv-server";
  const std::map<std::string, std::string*> texts = {{"--server", &options.server},
                                                     {"--json", &options.json},
                                                     {"--victim_of", &options.victim_of}};
  const std::map<std::string, int64_t*> numbers = {
      {"--layers", &options.layers}, {"--tokens", &options.tokens}, {"--kills", &options.kills}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = std::min(argument.find('='), argument.size() - 1);
    const std::string name = argument.substr(0, equals), value = argument.substr(equals + 1);
    if (const auto text = texts.find(name); text != texts.end()) {
      *text->second = value;
    } else if (const auto number = numbers.find(name);
               number == numbers.end() || !absl::SimpleAtoi(value, number->second)) {
      std::cerr << "ingest_bench: " << argument << "?\n";
      return 2;
    }
  }
  if (options.victim_of.empty()) return Run(options);
  const Prompt prompt(options.tokens);
  while (true) ByWindow(options, options.victim_of, prompt);
}

}  // namespace
}  // namespace clusterkv::worker

int main(int argc, char** argv) { return clusterkv::worker::Main(argc, argv); }
