// Servers as processes that know each other by a real etcd: who comes, drains, leaves, dies, and
// what happens when etcd does.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "proto/error.h"
#include "proto/placement.h"
#include "tests/integration/etcd_process.h"
#include "tests/integration/kill_job.h"
#include "tests/integration/shards_fixture.h"
#include "worker/client.h"
#include "worker/shards.h"

namespace clusterkv::integration {
namespace {

using worker::Client;
using worker::PlacedSequence;
using worker::Shards;

class DiscoveryTest : public ShardsFixture {
 protected:
  // Longer than a busy machine lets a server wait.
  explicit DiscoveryTest(int lease_ttl_ms = 60'000) : lease_ttl_ms_(lease_ttl_ms) {}
  void SetUp() override {
    CKV_SKIP_WITHOUT_ETCD();
    etcd_ = std::make_unique<EtcdProcess>();
    for (int i = 0; i < 3; ++i) AddServer();
    ASSERT_TRUE(AllList({"kv-0", "kv-1", "kv-2"}));
  }

  void AddServer() { StartServer(NameServer()); }
  // On whatever ports are free: nobody else needs to know them.
  void StartServer(Server& server) const {
    Start(CLUSTERKV_SERVER,
          {"--listen=127.0.0.1:0", "--admin_listen=127.0.0.1:0",
           absl::StrCat("--etcd_endpoints=", etcd_->endpoint()), "--etcd_prefix=clusterkv/test",
           absl::StrCat("--etcd_lease_ttl_ms=", lease_ttl_ms_)},
          server);
  }

  std::string EtcdTarget() const {
    return absl::StrCat("etcd://", etcd_->endpoint(), "/clusterkv/test");
  }
  static std::unique_ptr<Shards> Connect(const std::string& seeds) {
    return ShardsFixture::Connect(seeds, /*session=*/false);
  }
  // Names as server i tells them; '*' after one that drains.
  std::vector<std::string> ListOf(int i) const {
    std::vector<std::string> names;
    const auto client = ConnectTo(i);
    if (client == nullptr) return names;
    const v1::ServerInfo info = client->server_info();
    for (const v1::Shard& shard : info.shards()) {
      names.push_back(shard.name() + (shard.draining() ? "*" : ""));
    }
    return names;
  }
  bool Lists(int i, const std::vector<std::string>& names) const {
    return Eventually([&] { return ListOf(i) == names; });
  }
  // Every server that runs.
  bool AllList(const std::vector<std::string>& names) const {
    for (size_t i = 0; i < servers_.size(); ++i) {
      if (servers_[i].process.pid() > 0 && !Lists(static_cast<int>(i), names)) return false;
    }
    return true;
  }
  // Every server that runs is connected to etcd and entered, or knows that etcd is away.
  bool AllSay(bool connected) const {
    return Eventually([&] {
      return std::all_of(servers_.begin(), servers_.end(), [&](const Server& server) {
        if (server.process.pid() <= 0) return true;
        const v1::EtcdStats etcd = StatsOf(server).etcd();
        return etcd.connected() == connected && (etcd.registered() || !connected) &&
               etcd.error().empty() == connected;
      });
    });
  }

  static v1::Stats StatsOf(const Server& server) {
    grpc::ClientContext context;
    Prepare(context);
    v1::Stats stats;
    const grpc::Status status = Admin(server)->GetStats(&context, {}, &stats);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return stats;
  }
  // Where a new sequence is, by its boot id; 0: nobody takes it.
  static uint64_t Open(Shards& shards, const std::string& name) {
    const absl::StatusOr<PlacedSequence> opened = shards.OpenSequence(JobRequest(name));
    EXPECT_TRUE(opened.ok()) << opened.status();
    return opened.ok() ? opened->sequence.handle().boot_id() : 0;
  }

  const int lease_ttl_ms_;
  std::unique_ptr<EtcdProcess> etcd_;
};

// Where a test waits for a lease to end.
class ShortLeaseTest : public DiscoveryTest {
 protected:
  ShortLeaseTest() : DiscoveryTest(5'000) {}
};

TEST_F(DiscoveryTest, SequencesGoToTheirOwnersWhoeverIsAsked) {
  EXPECT_TRUE(AllSay(/*connected=*/true));
  const auto by_shard = Connect(servers_[1].address), by_etcd = Connect(EtcdTarget());
  for (Shards* shards : {by_shard.get(), by_etcd.get()}) {
    EXPECT_EQ(shards->members().size(), 3u);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(Open(*shards, NameOf(i)), BootId(i));
  }
  const std::string name = NameOf(2);
  const absl::Status refused = ConnectTo(0)->OpenSequence(JobRequest(name)).status();
  EXPECT_EQ(ReasonOf(refused), v1::NOT_OWNER) << refused;
  EXPECT_TRUE(absl::StrContains(refused.message(), servers_[2].address)) << refused;
  const auto listed = by_etcd->ListSequences("");
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_EQ(listed->size(), 6u);
}

TEST_F(DiscoveryTest, AServerThatIsAddedTakesNewSequencesAndMovesNone) {
  const auto shards = Connect(EtcdTarget());
  std::string moving, staying;
  while (moving.empty() || staying.empty()) {
    const std::string name = absl::StrCat("sequence", next_name_++);
    std::vector<v1::Shard> four(4);
    for (int i = 0; i < 4; ++i) four[i].set_name(absl::StrCat("kv-", i));
    (RankShards(name, four).front().name() == "kv-3" ? moving : staying) = name;
  }
  for (const std::string& name : {moving, staying}) {
    EXPECT_EQ(Open(*shards, name), BootId(Owner(name))) << name;
  }
  AddServer();
  ASSERT_TRUE(AllList({"kv-0", "kv-1", "kv-2", "kv-3"}));
  ASSERT_TRUE(Eventually([&] { return shards->members().size() == 4; }));
  for (const std::string& name : {moving, staying}) {
    const auto found = shards->FindSequence(Handle(name));
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_EQ(found->sequence.handle().boot_id(), BootId(Owner(name))) << name;
  }
  EXPECT_EQ(Open(*shards, NameOf(3, 4)), BootId(3));
}

TEST_F(DiscoveryTest, AServerThatDrainsIsLeftOutAndReadUntilItEnds) {
  const auto shards = Connect(EtcdTarget());
  const auto kept = shards->OpenSequence(JobRequest(NameOf(1)));
  ASSERT_TRUE(kept.ok()) << kept.status();
  Drain(1);
  ASSERT_TRUE(AllList({"kv-0", "kv-1*", "kv-2"}));
  ASSERT_TRUE(Eventually([&] {
    const auto members = shards->members();
    return members.size() == 3 && members[1].draining();
  }));
  // Its names go to the next in rank, which takes them also from who knows nothing of the drain.
  const std::string name = NameOf(1);
  const std::string next = RankShards(name, shards->members())[1].name();
  const uint64_t next_boot_id = BootId(next.back() - '0');
  EXPECT_EQ(Open(*shards, name), next_boot_id);
  const std::string other = [&] {
    while (true) {
      std::string candidate = NameOf(1);
      if (RankShards(candidate, shards->members())[1].name() == next) return candidate;
    }
  }();
  EXPECT_TRUE(ConnectTo(next.back() - '0')->OpenSequence(JobRequest(other)).ok());
  const auto found = shards->FindSequence(kept->sequence.handle());
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->sequence.handle().boot_id(), kept->sequence.handle().boot_id());
  // It ends, and is gone from the list at once, not with its lease.
  ASSERT_TRUE(shards->ReleaseSequence(kept->sequence.handle()).ok());
  servers_[1].process.Kill(SIGTERM);
  const int status = servers_[1].process.Wait();
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(etcd_->Get("/clusterkv/test/kv-1"), nullptr);
  EXPECT_TRUE(AllList({"kv-0", "kv-2"}));
}

TEST_F(ShortLeaseTest, AKilledServerIsListedUntilItsLeaseEndsAndComesBackAsAnother) {
  const auto shards = Connect(EtcdTarget());
  const auto lost = shards->OpenSequence(JobRequest(NameOf(2)));
  ASSERT_TRUE(lost.ok()) << lost.status();
  servers_[2].process.Kill(SIGKILL);
  servers_[2].process.Wait();
  ASSERT_TRUE(AllList({"kv-0", "kv-1"}));
  ASSERT_TRUE(Eventually([&] { return shards->members().size() == 2; }));
  const std::string name = NameOf(2);
  EXPECT_EQ(Open(*shards, name), BootId(Owner(name, 2)));
  StartServer(servers_[2]);
  ASSERT_TRUE(AllList({"kv-0", "kv-1", "kv-2"}));
  ASSERT_TRUE(Eventually([&] { return shards->members().size() == 3; }));
  const auto stale = shards->FindSequence(lost->sequence.handle());
  EXPECT_FALSE(stale.ok());
  const std::string fresh = NameOf(2);
  EXPECT_EQ(Open(*shards, fresh), BootId(2));
}

TEST_F(ShortLeaseTest, ServersGoOnWhileEtcdIsAwayAndSaySo) {
  const auto shards = Connect(EtcdTarget());
  ASSERT_TRUE(AllSay(/*connected=*/true));
  etcd_->Stop();
  ASSERT_TRUE(AllSay(/*connected=*/false));
  // Longer than a lease would have lasted, by what the servers themselves say.
  ASSERT_TRUE(Eventually([&] { return StatsOf(servers_[0]).etcd().away_ms() > 6'000; }));
  EXPECT_TRUE(AllList({"kv-0", "kv-1", "kv-2"}));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Open(*shards, NameOf(i)), BootId(i));
  // One drains meanwhile, another dies, a third is added: the first two are seen when etcd is back,
  // the third waits for it.
  Drain(1);
  servers_[2].process.Kill(SIGKILL);
  servers_[2].process.Wait();
  etcd_->Start();
  EXPECT_TRUE(AllSay(/*connected=*/true));
  EXPECT_TRUE(AllList({"kv-0", "kv-1*"}));
  EXPECT_GE(StatsOf(servers_[0]).etcd().reconnects(), 1u);
  AddServer();
  EXPECT_TRUE(AllList({"kv-0", "kv-1*", "kv-3"}));
}

TEST_F(DiscoveryTest, ACompactionInBetweenLosesNothing) {
  const auto shards = Connect(EtcdTarget());
  etcd_->Compact();
  AddServer();
  etcd_->Compact();
  servers_[0].process.Kill(SIGTERM);
  servers_[0].process.Wait();
  etcd_->Compact();
  EXPECT_TRUE(AllList({"kv-1", "kv-2", "kv-3"}));
  etcd_->Stop();
  etcd_->Start();
  etcd_->Compact();
  EXPECT_TRUE(AllSay(/*connected=*/true));
  AddServer();
  EXPECT_TRUE(AllList({"kv-1", "kv-2", "kv-3", "kv-4"}));
  EXPECT_TRUE(Eventually([&] { return shards->members().size() == 4; }));
}

TEST_F(ShortLeaseTest, AFrozenEtcdIsAnAbsentOne) {
  ASSERT_TRUE(AllSay(/*connected=*/true));
  etcd_->Freeze();
  EXPECT_TRUE(Eventually([&] {  // no answer to a ping, without a closed connection
    return !StatsOf(servers_[0]).etcd().connected();
  }));
  EXPECT_EQ(ListOf(0).size(), 3u);
  etcd_->Continue();
  EXPECT_TRUE(AllSay(/*connected=*/true));
  EXPECT_TRUE(AllList({"kv-0", "kv-1", "kv-2"}));
}

}  // namespace
}  // namespace clusterkv::integration
