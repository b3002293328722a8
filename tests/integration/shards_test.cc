// Three servers as processes, one service: who owns a sequence, who says so, and what happens when
// shards are added, drain and die.
#include "worker/shards.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/error.h"
#include "proto/placement.h"
#include "tests/free_port.h"
#include "tests/integration/kill_job.h"
#include "tests/integration/shards_fixture.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::integration {
namespace {

using worker::Client;
using worker::PlacedSequence;
using worker::Shards;

// Servers that know each other by a file.
class ShardsTest : public ShardsFixture {
 protected:
  ShardsTest() : file_(std::filesystem::temp_directory_path() / absl::StrCat("shards-", getpid())) {
    for (int i = 0; i < 3; ++i) AddServer();
    WriteList();
    for (Server& server : servers_) StartServer(server);
  }
  ~ShardsTest() override { std::filesystem::remove(file_); }

  void AddServer() {
    Server& server = NameServer();
    server.address = absl::StrCat("127.0.0.1:", FreePort());
    server.admin_address = absl::StrCat("127.0.0.1:", FreePort());
  }
  void WriteList() const {
    const std::string fresh = absl::StrCat(file_.string(), ".new");
    std::ofstream out(fresh);
    out << "# the shards\n";
    for (const Server& server : servers_) out << server.name << " " << server.address << "\n";
    out.close();
    std::filesystem::rename(fresh, file_);
  }
  void StartServer(Server& server) const {
    Start(CLUSTERKV_SERVER,
          {absl::StrCat("--listen=", server.address),
           absl::StrCat("--admin_listen=", server.admin_address),
           absl::StrCat("--shards_file=", file_.string())},
          server);
  }
  static std::unique_ptr<Shards> Connect(const std::string& seeds, bool session = true) {
    return ShardsFixture::Connect(seeds, session);
  }

  // Prefills it through `shards`. Its shard's client and its handle.
  static PlacedSequence Prefill(Shards& shards, const std::string& name) {
    absl::StatusOr<PlacedSequence> opened = shards.OpenSequence(JobRequest(name));
    EXPECT_TRUE(opened.ok()) << opened.status();
    if (!opened.ok()) return {};
    auto writer = worker::PrefillWriter::Create(opened->client, opened->sequence);
    EXPECT_TRUE(writer.ok()) << writer.status();
    EXPECT_TRUE(worker::PutAll(writer->get(), JobLayers()).ok());
    const auto sealed = (*writer)->Finish();
    EXPECT_TRUE(sealed.ok()) << sealed.status();
    if (!sealed.ok()) return {};
    return {opened->client, *sealed};
  }
  static std::map<std::pair<int64_t, int64_t>, uint64_t> Decode(const PlacedSequence& placed) {
    std::map<std::pair<int64_t, int64_t>, uint64_t> outputs;
    const absl::Status status = DecodeJob(placed.client, placed.sequence.handle(), 0,
                                          [&](int64_t step, int64_t layer, uint64_t digest) {
                                            outputs[{step, layer}] = digest;
                                          });
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(outputs.size(), static_cast<size_t>(kJobSteps) * JobLayers().size());
    return outputs;
  }

  const std::filesystem::path file_;
};

std::string Metadata(const absl::Status& status, const std::string& key) {
  for (const auto& [name, value] : MetadataOf(status)) {
    if (name == key) return value;
  }
  return "";
}

TEST_F(ShardsTest, ASequenceIsOnItsOwnerAndAnswersAsOnOneServer) {
  const worker::Service alone;
  const auto alone_client = alone.Connect();
  const auto whole = worker::Prefill(alone_client.get(), JobRequest("whole"), JobLayers());
  ASSERT_TRUE(whole.ok()) << whole.status();
  const auto expected = Decode({alone_client.get(), *whole});

  const auto shards = Connect(servers_[1].address);  // one address is enough
  ASSERT_NE(shards, nullptr);
  EXPECT_EQ(shards->members().size(), 3u);
  for (int i = 0; i < 3; ++i) {
    const std::string name = NameOf(i);
    const PlacedSequence placed = Prefill(*shards, name);
    ASSERT_NE(placed.client, nullptr);
    EXPECT_EQ(placed.sequence.handle().boot_id(), BootId(i)) << name;
    EXPECT_EQ(JobDigest(placed.sequence), JobDigest(*whole));
    EXPECT_EQ(Decode(placed), expected) << name;
  }
  const auto listed = shards->ListSequences("");
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_EQ(listed->size(), 3u);
}

TEST_F(ShardsTest, WhoDoesNotOwnASequenceNamesTheOwner) {
  const std::string name = NameOf(2);
  const auto wrong = ConnectTo(0);
  v1::SelectClustersRequest select;
  select.set_sequence(name);
  for (int i = 0; i < 4 * 32; ++i) select.mutable_queries()->add_values(0.5);
  v1::AttachRequest attach;
  *attach.mutable_sequence() = Handle(name);
  v1::AttachResponse attached;
  const std::map<std::string, absl::Status> answers = {
      {"OpenSequence", wrong->OpenSequence(JobRequest(name)).status()},
      {"GetSequence", wrong->GetSequence(Handle(name)).status()},
      {"SealSequence", wrong->SealSequence(Handle(name), absl::Seconds(5)).status()},
      {"SelectClusters", wrong->SelectClusters(select).status()},
      {"ReleaseSequence", wrong->ReleaseSequence(Handle(name))},
  };
  for (const auto& [call, status] : answers) {
    EXPECT_EQ(ReasonOf(status), v1::NOT_OWNER) << call << ": " << status;
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << call;
    EXPECT_EQ(Metadata(status, "ownerShard"), "kv-2") << call;
    EXPECT_EQ(Metadata(status, "ownerAddress"), servers_[2].address) << call;
  }
  // An item of a batch, too.
  v1::SelectClustersRequest batch;
  *batch.add_items()->mutable_sequence() = Handle(name);
  *batch.mutable_items(0)->mutable_queries() = select.queries();
  const auto results = wrong->SelectClusters(batch);
  ASSERT_TRUE(results.ok()) << results.status();
  EXPECT_TRUE(absl::StrContains(results->results(0).error().message(), "kv-2"));
  // The owner itself knows that it is nowhere.
  const auto owner = ConnectTo(2);
  EXPECT_EQ(ReasonOf(owner->GetSequence(Handle(name)).status()), v1::SEQUENCE_NOT_FOUND);
  EXPECT_TRUE(owner->ReleaseSequence(Handle(name)).ok());
}

TEST_F(ShardsTest, AShardThatIsAddedTakesNewSequencesAndMovesNone) {
  const auto shards = Connect(servers_[0].address);
  ASSERT_NE(shards, nullptr);
  const auto old_client = Connect(servers_[0].address);
  ASSERT_NE(old_client, nullptr);
  // One that will belong to the new shard, and one that stays.
  AddServer();
  std::string moving, staying;
  while (moving.empty() || staying.empty()) {
    const std::string name = absl::StrCat("sequence", next_name_++);
    (Owner(name, 4) == 3 ? moving : staying) = name;
  }
  const PlacedSequence before = Prefill(*shards, moving);
  Prefill(*shards, staying);
  ASSERT_NE(before.client, nullptr);
  const auto outputs = Decode(before);

  StartServer(servers_[3]);
  WriteList();
  ASSERT_TRUE(shards->Refresh().ok());
  EXPECT_EQ(shards->members().size(), 4u);
  // Both are where they were, by name and by handle.
  for (const std::string& name : {moving, staying}) {
    const auto found = shards->FindSequence(Handle(name));
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(found->sequence.handle().boot_id(), BootId(Owner(name, 3))) << name;
    EXPECT_TRUE(shards->FindSequence(found->sequence.handle()).ok());
  }
  // A new one goes to the new shard, also by a client whose list is old: one refusal puts it right.
  EXPECT_EQ(old_client->members().size(), 3u);
  for (Shards* client : {shards.get(), old_client.get()}) {
    const std::string name = NameOf(3, 4);
    const PlacedSequence placed = Prefill(*client, name);
    ASSERT_NE(placed.client, nullptr);
    EXPECT_EQ(placed.sequence.handle().boot_id(), BootId(3));
    EXPECT_EQ(Decode(placed), outputs);
  }
  EXPECT_EQ(old_client->members().size(), 4u);
  // Released, it is nowhere, and its name begins anew on its new owner.
  ASSERT_TRUE(shards->ReleaseSequence(Handle(moving)).ok());
  const auto gone = shards->FindSequence(Handle(moving));
  EXPECT_EQ(ReasonOf(gone.status()), v1::SEQUENCE_NOT_FOUND) << gone.status();
  EXPECT_EQ(Prefill(*shards, moving).sequence.handle().boot_id(), BootId(3));
}

TEST_F(ShardsTest, ADrainingShardIsReadUntilItIsEmptyAndOthersTakeItsNewSequences) {
  const auto shards = Connect(absl::StrCat(servers_[0].address, ",", servers_[2].address));
  ASSERT_NE(shards, nullptr);
  const PlacedSequence kept = Prefill(*shards, NameOf(1));
  ASSERT_NE(kept.client, nullptr);
  const v1::DrainResponse drained = Drain(1);
  EXPECT_EQ(drained.sequences(), 1u);
  // Two clients: one knew the shard before, one sees it draining the first time.
  const auto late = Connect(servers_[0].address);
  ASSERT_NE(late, nullptr);
  for (Shards* client : {shards.get(), late.get()}) {
    const std::string name = NameOf(1);
    const PlacedSequence placed = Prefill(*client, name);
    ASSERT_NE(placed.client, nullptr);
    std::vector<v1::Shard> ranked = RankShards(name, client->members());
    EXPECT_EQ(ranked[0].name(), "kv-1");
    EXPECT_EQ(placed.sequence.handle().boot_id(), BootId(ranked[1].name().back() - '0'));
    const auto found = client->FindSequence(Handle(name));
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(found->sequence.handle().generation(), placed.sequence.handle().generation());
    const auto old = client->FindSequence(kept.sequence.handle());
    ASSERT_TRUE(old.ok()) << old.status();
    EXPECT_EQ(old->sequence.handle().boot_id(), kept.sequence.handle().boot_id());
  }
  // Emptied by its users, then it ends at once.
  ASSERT_TRUE(shards->ReleaseSequence(kept.sequence.handle()).ok());
  EXPECT_EQ(Drain(1).sequences(), 0u);
  servers_[1].process.Kill(SIGTERM);
  const int status = servers_[1].process.Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(ShardsTest, SigtermWaitsForWhoIsAttached) {
  const auto shards = Connect(servers_[0].address);
  ASSERT_NE(shards, nullptr);
  const PlacedSequence placed = Prefill(*shards, NameOf(0));
  ASSERT_NE(placed.client, nullptr);
  auto session = worker::DecodeSession::Attach(placed.client, placed.sequence.handle(), {});
  ASSERT_TRUE(session.ok()) << session.status();
  servers_[0].process.Kill(SIGTERM);
  // It drains, and the worker goes on: all its steps are answered.
  std::vector<float> output(4 * 32);
  while (!ConnectTo(0)->server_info().draining()) absl::SleepFor(absl::Milliseconds(5));
  absl::SleepFor(absl::Milliseconds(200));
  const worker::TraceLayer& layer = JobLayers()[0];
  output.resize(layer.shape.query_heads * layer.shape.head_dim);
  for (int i = 0; i < 3; ++i) {
    const absl::Status step =
        (*session)->Step(0, worker::Query(layer, i), absl::MakeSpan(output), nullptr);
    EXPECT_TRUE(step.ok()) << step;
  }
  session->reset();
  const int status = servers_[0].process.Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(ShardsTest, AKilledShardLosesItsSequencesAndNoOthers) {
  const auto shards = Connect(servers_[0].address);
  ASSERT_NE(shards, nullptr);
  std::vector<PlacedSequence> placed;
  for (int i = 0; i < 3; ++i) {
    placed.push_back(Prefill(*shards, NameOf(i)));
    ASSERT_NE(placed.back().client, nullptr);
  }
  const auto outputs = Decode(placed[1]);
  servers_[2].process.Kill(SIGKILL);
  servers_[2].process.Wait();
  EXPECT_EQ(Decode(placed[0]), outputs);
  EXPECT_EQ(shards->FindSequence(placed[2].sequence.handle()).status().code(),
            absl::StatusCode::kUnavailable);
  // What would be its own goes to the next in rank while it is away.
  const std::string name = NameOf(2);
  const PlacedSequence elsewhere = Prefill(*shards, name);
  ASSERT_NE(elsewhere.client, nullptr);
  EXPECT_EQ(Decode(elsewhere), outputs);

  StartServer(servers_[2]);
  const absl::Time limit = absl::Now() + kCallTimeout;
  absl::StatusOr<PlacedSequence> found;
  do {
    absl::SleepFor(absl::Milliseconds(50));
    found = shards->FindSequence(placed[2].sequence.handle());
  } while (found.status().code() == absl::StatusCode::kUnavailable && absl::Now() < limit);
  EXPECT_EQ(ReasonOf(found.status()), v1::STALE_BOOT_ID) << found.status();
  // What went elsewhere is found there, and new ones go to it again.
  found = shards->FindSequence(Handle(name));
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->sequence.handle().boot_id(), elsewhere.sequence.handle().boot_id());
  uint64_t boot_id = 0;
  do {
    boot_id = Prefill(*shards, NameOf(2)).sequence.handle().boot_id();
  } while (boot_id != BootId(2) && absl::Now() < limit);
  EXPECT_EQ(boot_id, BootId(2));
}

}  // namespace
}  // namespace clusterkv::integration
