// Processes killed at random bytes of their traffic: no wrong byte, no leaked page, and workers
// recover by themselves with a typed error in between.
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "proto/error.h"
#include "tests/free_port.h"
#include "tests/integration/kill_job.h"
#include "tests/integration/process.h"
#include "tests/test_seed.h"
#include "tests/worker/worker_harness.h"
#include "worker/transport_failure.h"

namespace clusterkv::integration {
namespace {

using worker::Client;
using worker::CuttingProxy;

constexpr uint64_t kSeed = 41;

// How many workers are killed; a quarter as many servers. Fewer under a sanitizer, where each takes
// ten times as long; CLUSTERKV_TEST_KILLS says otherwise.
int Kills() {
#ifdef CLUSTERKV_SANITIZED
  constexpr int kDefault = 20;
#else
  constexpr int kDefault = 200;
#endif
  const char* text = std::getenv("CLUSTERKV_TEST_KILLS");
  return text != nullptr ? std::atoi(text) : kDefault;
}

// clusterkv-server as a process, on ports that stay the same when it is started again.
class ServerProcess {
 public:
  ServerProcess() : port_(FreePort()), admin_port_(FreePort()) { Start(); }
  ~ServerProcess() {
    if (!watched_) return;
    watched_ = false;
    Kill();
    watcher_.join();
  }

  std::string target() const { return absl::StrCat("127.0.0.1:", port_); }
  void Kill() { kill(pid_, SIGKILL); }
  // From now on it is started again whenever it ends.
  void Watch() {
    watched_ = true;
    watcher_ = std::thread([this] {
      while (true) {
        process_.Wait();
        if (!watched_) return;
        Start();
      }
    });
  }

  v1::Stats GetStats() const {
    v1::Stats stats;
    const grpc::Status status =
        Admin([&](auto& stub, auto* context) { return stub.GetStats(context, {}, &stats); });
    EXPECT_TRUE(status.ok()) << status.error_message();
    return stats;
  }
  // The ledger balances and every sealed page is what was sealed.
  void ExpectSound() const {
    v1::VerifyLedgerRequest request;
    request.set_checksums(true);
    v1::VerifyLedgerResponse ledger;
    const grpc::Status status = Admin(
        [&](auto& stub, auto* context) { return stub.VerifyLedger(context, request, &ledger); });
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_TRUE(ledger.balanced()) << ledger.ShortDebugString();
    EXPECT_EQ(ledger.problems_size(), 0) << ledger.ShortDebugString();
  }
  // Waits until sessions, attachments and sequences are as few, and as many pages are free.
  void ExpectReturnsTo(const v1::Stats& before) const {
    const absl::Time deadline = absl::Now() + absl::Seconds(60);
    v1::Stats now = GetStats();
    const auto back = [&] {
      return now.sequences() == before.sequences() && now.attachments() == before.attachments() &&
             now.sessions() == before.sessions() && now.pages().free() == before.pages().free() &&
             now.reserved_pages() == before.reserved_pages();
    };
    while (!back() && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(20));
      now = GetStats();
    }
    EXPECT_TRUE(back()) << "before: " << before.ShortDebugString()
                        << "\nnow: " << now.ShortDebugString();
  }

 private:
  void Start() {
    process_ = Process::Start({CLUSTERKV_SERVER, absl::StrCat("--listen=127.0.0.1:", port_),
                               absl::StrCat("--admin_listen=127.0.0.1:", admin_port_),
                               "--metrics_listen=", "--arena_bytes=256MiB", "--session_ttl_ms=2000",
                               "--build_threads=1", "--select_threads=1", "--log_level=error"});
    pid_ = process_.pid();
    std::string line;
    while (process_.ReadLine(&line) && !absl::StartsWith(line, "listening on")) {
    }
  }
  template <typename F>
  grpc::Status Admin(F call) const {
    const auto stub = v1::AdminService::NewStub(grpc::CreateChannel(
        absl::StrCat("127.0.0.1:", admin_port_), grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    return call(*stub, &context);
  }

  const int port_, admin_port_;
  Process process_;
  std::atomic<int> pid_{-1};
  std::atomic<bool> watched_{false};
  std::thread watcher_;
};

std::unique_ptr<Client> Connect(const std::string& target, bool session) {
  worker::ClientOptions options;
  options.session = session;
  auto client = Client::Connect(target, options);
  EXPECT_TRUE(client.ok()) << client.status();
  return client.ok() ? std::move(*client) : nullptr;
}

// Runs a worker behind the proxy and kills it after so many bytes (< 0: never). Its lines; whether
// it was killed.
std::vector<std::string> RunWorker(CuttingProxy& proxy, const std::string& mode,
                                   const std::string& name, int64_t bytes, bool* killed) {
  Process process = Process::Start({CLUSTERKV_KILL_WORKER, mode, proxy.address(), name});
  const int pid = process.pid();
  proxy.CutAfter(bytes, [pid] { kill(pid, SIGKILL); });
  std::vector<std::string> lines;
  std::string line;
  while (process.ReadLine(&line)) lines.push_back(line);
  const int status = process.Wait();
  proxy.CutAfter(-1);
  *killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
  EXPECT_TRUE(*killed || (WIFEXITED(status) && WEXITSTATUS(status) == 0))
      << "status " << status << (lines.empty() ? "" : ": " + lines.back());
  return lines;
}

TEST(KillTest, PrefillWriterKilledAtAnyByte) {
  std::mt19937_64 random(TestSeed(kSeed));
  const ServerProcess server;
  CuttingProxy proxy(server.target());
  const auto client = Connect(server.target(), /*session=*/false);
  ASSERT_NE(client, nullptr);
  const auto whole = worker::Prefill(client.get(), JobRequest("whole"), JobLayers());
  ASSERT_TRUE(whole.ok()) << whole.status();
  const std::string expected = "ready " + JobDigest(*whole);
  const v1::Stats before = server.GetStats();
  const int64_t bytes = 2 * kJobPrompt * 2 * 2 * 32 * 2;
  const int wanted = Kills();
  int kills = 0, finished = 0, refused = 0;
  for (int i = 0; kills < wanted && i < 2 * wanted && !HasFailure(); ++i) {
    const std::string name = absl::StrCat("sequence", i);
    bool killed = false;
    // Some bytes beyond those of KV: handshakes, the seal's answer.
    RunWorker(proxy, "prefill", name, static_cast<int64_t>(random() % (bytes + 4000)), &killed);
    kills += killed;
    if (killed && i % 20 != 0) continue;
    // Under the same name, after the session of the killed one: nothing of it is left.
    if (killed) {
      const auto lines = RunWorker(proxy, "prefill", name, -1, &killed);
      ASSERT_FALSE(lines.empty());
      EXPECT_EQ(lines.back(), expected);
      refused += static_cast<int>(lines.size()) - 1;
    }
    ++finished;
    v1::SequenceHandle handle;
    handle.set_name(name);
    ASSERT_TRUE(client->ReleaseSequence(handle).ok());
  }
  EXPECT_EQ(kills, wanted);
  std::cout << kills << " killed, " << finished << " finished, " << refused
            << " times SEQUENCE_EXISTS in between\n";
  server.ExpectReturnsTo(before);
  server.ExpectSound();
}

// Digests of all outputs by "step layer", from a worker that nobody kills.
std::map<std::string, std::string> ExpectedOutputs(Client* client,
                                                   const v1::SequenceHandle& sequence) {
  std::map<std::string, std::string> outputs;
  const absl::Status status =
      DecodeJob(client, sequence, 0, [&](int64_t step, int64_t layer, uint64_t digest) {
        outputs[absl::StrCat(step, " ", layer)] = absl::StrCat(absl::Hex(digest));
      });
  EXPECT_TRUE(status.ok()) << status;
  return outputs;
}

TEST(KillTest, DecodeWorkerKilledAtAnyByte) {
  std::mt19937_64 random(TestSeed(kSeed));
  const ServerProcess server;
  CuttingProxy proxy(server.target());
  const auto client = Connect(server.target(), /*session=*/false);
  ASSERT_NE(client, nullptr);
  const auto prompt = worker::Prefill(client.get(), JobRequest("prompt"), JobLayers());
  ASSERT_TRUE(prompt.ok()) << prompt.status();
  v1::ForkSequenceRequest fork;
  *fork.mutable_source() = prompt->handle();
  fork.set_max_decode_tokens(kJobSteps);
  const v1::Stats before = server.GetStats();
  fork.set_name("expected");
  auto forked = client->ForkSequence(fork);
  ASSERT_TRUE(forked.ok()) << forked.status();
  const auto expected = ExpectedOutputs(client.get(), forked->handle());
  ASSERT_EQ(static_cast<int64_t>(expected.size()), 2 * kJobSteps);
  ASSERT_TRUE(client->ReleaseSequence(forked->handle()).ok());
  const auto expect_right = [&](const std::vector<std::string>& lines) {
    for (const std::string& line : lines) {
      const size_t digest = line.rfind(' ');
      const auto found = expected.find(line.substr(0, digest));
      ASSERT_TRUE(found != expected.end()) << line;
      ASSERT_EQ(line.substr(digest + 1), found->second) << line;
    }
  };
  const int wanted = Kills();
  int kills = 0, taken_over = 0;
  for (int i = 0; kills < wanted && i < 2 * wanted && !HasFailure(); ++i) {
    fork.set_name(absl::StrCat("fork", i));
    forked = client->ForkSequence(fork);
    ASSERT_TRUE(forked.ok()) << forked.status();
    bool killed = false;
    expect_right(
        RunWorker(proxy, "decode", fork.name(), static_cast<int64_t>(random() % 120'000), &killed));
    kills += killed;
    if (killed && i % 5 == 0) {
      // Another worker goes on where that one was killed.
      const auto lines = RunWorker(proxy, "decode", fork.name(), -1, &killed);
      expect_right(lines);
      EXPECT_FALSE(killed);
      ++taken_over;
    }
    ASSERT_TRUE(client->ReleaseSequence(forked->handle()).ok());
  }
  EXPECT_EQ(kills, wanted);
  std::cout << kills << " killed, " << taken_over << " taken over\n";
  server.ExpectReturnsTo(before);
  server.ExpectSound();
}

// A worker's whole job, over and over while the server is killed: after each failure it learns why,
// reconnects, prefills again what is gone, and goes on with the step it was at.
class Replay {
 public:
  Replay(Client* client, const std::map<std::string, std::string>& expected)
      : client_(client), expected_(expected) {}

  // One attempt at job `name`; true when it is done. Nothing but the server's end may stop it.
  bool Attempt(const std::string& name, int64_t* next_step) {
    v1::OpenSequenceRequest request = JobRequest(name);
    request.set_session_id(client_->session_id());
    const auto sequence = worker::Prefill(client_, request, JobLayers(), {.chunk_bytes = 4096});
    absl::Status status = sequence.status();
    if (status.ok()) status = Decode(sequence->handle(), next_step);
    if (status.ok()) {
      const absl::Status released = client_->ReleaseSequence(sequence->handle());
      if (!released.ok()) ExpectServersEnd(released);
      return true;
    }
    ExpectServersEnd(status);
    const bool transport = worker::IsTransportFailure(status);
    ++reasons_[transport ? absl::StatusCodeToString(status.code())
                         : v1::ErrorReason_Name(ReasonOf(status))];
    const absl::Status back = client_->Reconnect(absl::Seconds(30), nullptr);
    EXPECT_TRUE(back.ok()) << back;
    return false;
  }

  void PrintReasons() const {
    for (const auto& [reason, count] : reasons_) std::cout << reason << ": " << count << "\n";
  }

 private:
  absl::Status Decode(const v1::SequenceHandle& sequence, int64_t* next_step) {
    return DecodeJob(client_, sequence, *next_step,
                     [&](int64_t step, int64_t layer, uint64_t digest) {
                       const std::string key = absl::StrCat(step, " ", layer);
                       EXPECT_EQ(absl::StrCat(absl::Hex(digest)), expected_.at(key)) << key;
                       if (layer == 1) *next_step = step + 1;
                     });
  }
  static void ExpectServersEnd(const absl::Status& status) {
    const v1::ErrorReason reason = ReasonOf(status);
    EXPECT_TRUE(worker::IsTransportFailure(status) || reason == v1::STALE_BOOT_ID ||
                reason == v1::SEQUENCE_NOT_FOUND || reason == v1::SESSION_NOT_FOUND)
        << status;
  }

  Client* const client_;
  const std::map<std::string, std::string>& expected_;
  std::map<std::string, int> reasons_;
};

TEST(KillTest, ServerKilledUnderReplay) {
  std::mt19937_64 random(TestSeed(kSeed));
  ServerProcess server;
  std::map<std::string, std::string> expected;
  {
    const auto client = Connect(server.target(), false);
    ASSERT_NE(client, nullptr);
    const auto prompt = worker::Prefill(client.get(), JobRequest("prompt"), JobLayers());
    ASSERT_TRUE(prompt.ok()) << prompt.status();
    expected = ExpectedOutputs(client.get(), prompt->handle());
  }
  std::atomic<int> kills{0};
  std::atomic<bool> armed{false};
  CuttingProxy proxy(server.target());
  const auto client = Connect(proxy.address(), true);
  ASSERT_NE(client, nullptr);
  server.Watch();
  Replay replay(client.get(), expected);
  int jobs = 0;
  int64_t next_step = 0;
  const int wanted = std::max(1, Kills() / 4), wanted_jobs = std::min(10, wanted);
  const absl::Time deadline = absl::Now() + absl::Seconds(400);
  while ((kills < wanted || jobs < wanted_jobs) && absl::Now() < deadline && !HasFailure()) {
    if (!armed && kills < wanted) {
      armed = true;
      proxy.CutAfter(static_cast<int64_t>(random() % 250'000), [&] {
        server.Kill();
        ++kills;
        armed = false;
      });
    }
    if (!replay.Attempt(absl::StrCat("job", jobs), &next_step)) continue;
    ++jobs;
    next_step = 0;
  }
  EXPECT_GE(kills, wanted);
  EXPECT_GE(jobs, wanted_jobs);
  replay.PrintReasons();
  std::cout << kills << " kills, " << jobs << " jobs done\n";
  proxy.CutAfter(-1);
  ASSERT_TRUE(client->Reconnect(absl::Seconds(30), nullptr).ok());
  const auto sequences = client->ListSequences("");
  ASSERT_TRUE(sequences.ok()) << sequences.status();
  for (const v1::Sequence& sequence : *sequences) {
    ASSERT_TRUE(client->ReleaseSequence(sequence.handle()).ok());
  }
  v1::Stats empty;
  empty.set_sessions(1);
  empty.mutable_pages()->set_free(server.GetStats().pages().total());
  server.ExpectReturnsTo(empty);
  server.ExpectSound();
}

}  // namespace
}  // namespace clusterkv::integration
