#include "worker/client.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/error.h"
#include "tests/free_port.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::worker {
namespace {

const kernels::KvShape kShape = {1, 2, 16, kernels::ElementType::kFloat16};

TEST(ClientTest, LearnsWhatTheServerIs) {
  Service service;
  const auto client = service.Connect();
  EXPECT_EQ(client->server_info().boot_id(), service.server().shard().boot_id());
  EXPECT_NE(client->session_id(), 0u);
  EXPECT_EQ(service.server().shard().GetStats().sessions(), 1u);
}

TEST(ClientTest, WorksWithoutSockets) {
  Service service;
  auto client = Client::Connect(service.server().InProcessChannel());
  ASSERT_TRUE(client.ok()) << client.status();
  const std::vector<TraceLayer> layers = {MakeLayer(kShape, 70, 2, 1)};
  EXPECT_TRUE(Prefill(client->get(), OpenRequest("a", layers), layers).ok());
}

TEST(ClientTest, NoServerIsUnavailable) {
  ClientOptions options;
  options.call_timeout = absl::Milliseconds(200);
  const auto client = Client::Connect("127.0.0.1:1", options);
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnavailable) << client.status();
}

TEST(ClientTest, ErrorsCarryTheirReason) {
  const Service service;
  const auto client = service.Connect();
  v1::SequenceHandle handle;
  handle.set_name("nobody");
  EXPECT_EQ(ReasonOf(client->GetSequence(handle).status()), v1::SEQUENCE_NOT_FOUND);
  EXPECT_EQ(ReasonOf(client->OpenSequence(v1::OpenSequenceRequest()).status()), v1::INVALID_FIELD);
  EXPECT_TRUE(client->ReleaseSequence(handle).ok());
}

TEST(ClientTest, ListsEveryPage) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = {MakeLayer(kShape, 3, 1, 1)};
  for (int i = 0; i < 7; ++i) {
    ASSERT_TRUE(client->OpenSequence(OpenRequest(absl::StrCat("b", i), layers)).ok());
  }
  ASSERT_TRUE(client->OpenSequence(OpenRequest("a", layers)).ok());
  const auto sequences = client->ListSequences("b");
  ASSERT_TRUE(sequences.ok()) << sequences.status();
  ASSERT_EQ(sequences->size(), 7u);
  EXPECT_EQ((*sequences)[6].handle().name(), "b6");
}

TEST(ClientTest, SessionEndsWithTheClient) {
  Service service;
  auto client = service.Connect();
  const std::vector<TraceLayer> layers = {MakeLayer(kShape, 3, 1, 1)};
  v1::OpenSequenceRequest request = OpenRequest("a", layers);
  request.set_session_id(client->session_id());
  ASSERT_TRUE(client->OpenSequence(request).ok());
  client.reset();
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (service.server().shard().GetStats().sequences() > 0 && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  // It was being filled: it goes with its owner.
  EXPECT_EQ(service.server().shard().GetStats().sequences(), 0u);
}

TEST(ClientTest, SessionIsResumedAfterACut) {
  Service service;
  CuttingProxy proxy(service.target());
  auto client = Client::Connect(proxy.address());
  ASSERT_TRUE(client.ok()) << client.status();
  const uint64_t session = (*client)->session_id();
  proxy.CutOff();
  // Until the client knows, its old session passes for an open one.
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while ((*client)->session_id() != 0 && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  ASSERT_EQ((*client)->session_id(), 0u);
  v1::SequenceHandle handle;
  handle.set_name("nobody");
  EXPECT_EQ((*client)->GetSequence(handle).status().code(), absl::StatusCode::kUnavailable);
  proxy.Restore();
  bool restarted = true;
  ASSERT_TRUE((*client)->Reconnect(absl::Seconds(20), &restarted).ok());
  EXPECT_FALSE(restarted);
  EXPECT_EQ((*client)->session_id(), session);
  EXPECT_EQ(service.server().shard().GetStats().sessions(), 1u);
}

TEST(ClientTest, SilentSessionLivesByItsHeartbeats) {
  Service service(0, [](v1::ServerConfig& config) { config.set_session_ttl_ms(3000); });
  std::atomic<int> notices{0};
  ClientOptions options;
  options.on_notice = [&](const v1::SessionResponse::Notice&) { ++notices; };
  const auto client = service.Connect(options);
  const uint64_t session = client->session_id();
  absl::SleepFor(absl::Seconds(7));
  EXPECT_EQ(client->session_id(), session);
  EXPECT_EQ(notices, 0);
}

TEST(ClientTest, NoticesReachTheWorker) {
  Service service;
  std::atomic<int> draining{0};
  ClientOptions options;
  options.on_notice = [&](const v1::SessionResponse::Notice& notice) {
    draining += notice.kind() == v1::SessionResponse::Notice::DRAINING;
  };
  const auto client = service.Connect(options);
  service.server().BeginDrain();
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (draining == 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(5));
  EXPECT_EQ(draining, 1);
  const std::vector<TraceLayer> layers = {MakeLayer(kShape, 3, 1, 1)};
  EXPECT_EQ(ReasonOf(client->OpenSequence(OpenRequest("a", layers)).status()), v1::DRAINING);
}

TEST(ClientTest, RestartIsToldOnceAndAServerThatStaysAwayIsUnavailable) {
  const int port = FreePort();
  auto service = std::make_unique<Service>(port);
  const auto client = service->Connect();
  service.reset();
  EXPECT_EQ(client->Reconnect(absl::Milliseconds(300), nullptr).code(),
            absl::StatusCode::kUnavailable);
  service = std::make_unique<Service>(port);
  bool restarted = false;
  ASSERT_TRUE(client->Reconnect(absl::Seconds(20), &restarted).ok());
  EXPECT_TRUE(restarted);
  EXPECT_EQ(client->server_info().boot_id(), service->server().shard().boot_id());
  EXPECT_NE(client->session_id(), 0u);
  ASSERT_TRUE(client->Reconnect(absl::Seconds(20), &restarted).ok());
  EXPECT_FALSE(restarted);
}

}  // namespace
}  // namespace clusterkv::worker
