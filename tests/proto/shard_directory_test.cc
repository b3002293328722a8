// The shards in a real etcd; and what an etcd says once in a long while, by one that says it at
// once.
#include "proto/shard_directory.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "etcd/rpc.grpc.pb.h"
#include "tests/conformance/certificates.h"
#include "tests/integration/etcd_process.h"

namespace clusterkv {
namespace {

using integration::EtcdProcess;
using integration::Eventually;
using integration::kLongEnough;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

v1::Shard MakeShard(const std::string& name, uint64_t boot_id = 1) {
  v1::Shard shard;
  shard.set_name(name);
  shard.set_address(name + ".example:7400");
  shard.set_boot_id(boot_id);
  return shard;
}

std::string Json(const v1::Shard& shard) {
  std::string text;
  EXPECT_TRUE(google::protobuf::util::MessageToJsonString(shard, &text).ok());
  return text;
}

std::vector<std::string> Names(const std::vector<v1::Shard>& shards) {
  std::vector<std::string> names;
  for (const v1::Shard& shard : shards) names.push_back(shard.name());
  return names;
}

EtcdOptions At(const std::string& endpoint) {
  EtcdOptions options;
  options.endpoints = {endpoint};
  options.prefix = "clusterkv/test";
  return options;
}

std::unique_ptr<ShardDirectory> Open(const EtcdOptions& options) {
  auto directory = ShardDirectory::Open(options, kLongEnough);
  EXPECT_TRUE(directory.ok()) << directory.status();
  return directory.ok() ? *std::move(directory) : nullptr;
}

testing::AssertionResult Lists(const ShardDirectory& directory, std::vector<std::string> names) {
  const bool listed = directory.Await(
      [&](const std::vector<v1::Shard>& shards) { return Names(shards) == names; }, kLongEnough);
  if (listed) return testing::AssertionSuccess();
  return testing::AssertionFailure() << testing::PrintToString(Names(directory.Current()));
}

// Waits for the shard with that process, draining or not.
bool Shows(const ShardDirectory& directory, const std::string& name, uint64_t boot_id,
           bool draining = false) {
  return directory.Await(
      [&](const std::vector<v1::Shard>& shards) {
        for (const v1::Shard& shard : shards) {
          if (shard.name() == name) {
            return shard.boot_id() == boot_id && shard.draining() == draining;
          }
        }
        return false;
      },
      kLongEnough);
}

bool IsRegistered(const ShardDirectory& directory) {
  return Eventually([&] { return directory.state().registered; });
}

bool IsConnected(const ShardDirectory& directory, bool connected) {
  return Eventually([&] { return directory.state().connected == connected; });
}

constexpr char kKey[] = "/clusterkv/test/";
constexpr absl::Duration kTtl = absl::Seconds(60), kShortTtl = absl::Seconds(2);

TEST(EtcdTargetTest, IsReadAndRefused) {
  const auto target = ParseEtcdTarget("etcd://a:1,[::1]:2/kv/one");
  ASSERT_TRUE(target.ok()) << target.status();
  EXPECT_THAT(target->endpoints, ElementsAre("a:1", "[::1]:2"));
  EXPECT_EQ(target->prefix, "kv/one");
  EXPECT_EQ(ParseEtcdTarget("etcd://a:1")->prefix, "clusterkv");
  EXPECT_EQ(ParseEtcdTarget("etcd://a:1/")->prefix, "clusterkv");
  EXPECT_EQ(ParseEtcdTarget("etcd://a:1/kv/")->prefix, "kv");
  for (const char* wrong : {"a:1/kv", "etcd://", "etcd:///kv", "etcd://a/kv", "etcd://a:1,/kv",
                            "etcd://a:1/k v", "etcd://a:1//kv", "http://a:1"}) {
    EXPECT_EQ(ParseEtcdTarget(wrong).status().code(), absl::StatusCode::kInvalidArgument) << wrong;
  }
}

TEST(ShardDirectoryTest, WithoutEtcdThereIsNoListAndTheErrorSaysWhere) {
  const auto directory =
      ShardDirectory::Open(At("127.0.0.1:1"), /*timeout=*/absl::Milliseconds(300));
  EXPECT_EQ(directory.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(directory.status().message()), HasSubstr("127.0.0.1:1"));
}

class EtcdTest : public ::testing::Test {
 protected:
  void SetUp() override {
    CKV_SKIP_WITHOUT_ETCD();
    etcd_ = std::make_unique<EtcdProcess>();
    options_ = At(etcd_->endpoint());
  }
  std::unique_ptr<EtcdProcess> etcd_;
  EtcdOptions options_;
};

TEST_F(EtcdTest, AnEntryIsSeenUntilItsProcessLeaves) {
  const auto watcher = Open(options_);
  EXPECT_TRUE(watcher->Current().empty());
  const auto a = Open(options_), b = Open(options_);
  a->Register(MakeShard("a", 7), kTtl);
  EXPECT_THAT(Names(a->Current()), ElementsAre("a")) << "at once, to itself";
  b->Register(MakeShard("b"), kTtl);
  for (const auto* directory : {watcher.get(), a.get(), b.get()}) {
    EXPECT_TRUE(Lists(*directory, {"a", "b"}));
  }
  EXPECT_EQ(watcher->Current()[0].address(), "a.example:7400");
  EXPECT_EQ(watcher->Current()[0].boot_id(), 7u);
  EXPECT_TRUE(IsRegistered(*a));
  // Who comes later sees the same.
  EXPECT_THAT(Names(Open(options_)->Current()), ElementsAre("a", "b"));
  a->Leave();
  EXPECT_TRUE(Lists(*watcher, {"b"}));
  EXPECT_TRUE(Lists(*a, {"b"})) << "who left goes on looking";
  EXPECT_FALSE(a->state().registered);
}

TEST_F(EtcdTest, PrefixesAreApart) {
  EtcdOptions longer = options_;
  longer.prefix += "/more";
  EtcdOptions next = options_;
  next.prefix += "0";
  const auto a = Open(options_), b = Open(longer), c = Open(next);
  b->Register(MakeShard("b"), kTtl);
  c->Register(MakeShard("c"), kTtl);
  ASSERT_TRUE(IsRegistered(*b) && IsRegistered(*c));
  a->Register(MakeShard("a"), kTtl);
  ASSERT_TRUE(IsRegistered(*a));
  EXPECT_TRUE(Lists(*Open(options_), {"a"}));
}

TEST_F(EtcdTest, DrainingIsSeen) {
  const auto watcher = Open(options_), a = Open(options_);
  a->Register(MakeShard("a"), kTtl);
  EXPECT_TRUE(Shows(*watcher, "a", 1, /*draining=*/false));
  a->SetDraining();
  EXPECT_TRUE(a->Current()[0].draining()) << "at once, to itself";
  EXPECT_TRUE(Shows(*watcher, "a", 1, /*draining=*/true));
}

TEST_F(EtcdTest, AnEntryEndsWithItsLease) {
  const auto watcher = Open(options_);
  const std::string key = std::string(kKey) + "dead", entry = Json(MakeShard("dead"));
  etcd_->Put(key, entry, etcd_->Grant(kTtl));
  EXPECT_TRUE(Lists(*watcher, {"dead"}));
  etcd_->Put(key, entry, etcd_->Grant(kShortTtl));  // seen before, however short it is
  EXPECT_TRUE(Lists(*watcher, {}));
}

TEST_F(EtcdTest, AnEntryOutlivesItsLeaseTimeWhileItsProcessLives) {
  const auto a = Open(options_);
  constexpr absl::Duration kLiving = absl::Seconds(3);
  a->Register(MakeShard("a"), kLiving);
  ASSERT_TRUE(IsRegistered(*a));
  const std::string key = std::string(kKey) + "dead", entry = Json(MakeShard("dead"));
  etcd_->Put(key, entry, etcd_->Grant(kTtl));
  EXPECT_TRUE(Lists(*a, {"a", "dead"}));
  // A lease that is granted now and kept by nobody ends after several of a's beats.
  etcd_->Put(key, entry, etcd_->Grant(2 * kLiving));
  EXPECT_TRUE(Lists(*a, {"a"}));
  EXPECT_NE(etcd_->Get(std::string(kKey) + "a"), nullptr);
}

TEST_F(EtcdTest, ALostLeaseAndADeletedEntryAreMadeAnew) {
  const auto watcher = Open(options_), a = Open(options_);
  a->Register(MakeShard("a"), kTtl);
  ASSERT_TRUE(Lists(*watcher, {"a"}));
  const std::string key = std::string(kKey) + "a";
  const int64_t lease = etcd_->Get(key)->lease();
  etcd_->Revoke(lease);
  EXPECT_TRUE(Eventually([&] {
    const auto entry = etcd_->Get(key);
    return entry != nullptr && entry->lease() != lease;
  }));
  EXPECT_GE(a->state().lost_leases, 1u);
  etcd_->Delete(key);
  EXPECT_TRUE(Eventually([&] { return etcd_->Get(key) != nullptr; }));
  EXPECT_TRUE(Shows(*watcher, "a", 1));
}

TEST_F(EtcdTest, AYoungerProcessOfTheSameNameHasIt) {
  const auto watcher = Open(options_), older = Open(options_);
  older->Register(MakeShard("a", 1), kTtl);
  ASSERT_TRUE(Shows(*watcher, "a", 1));
  auto younger = Open(options_);
  younger->Register(MakeShard("a", 2), kTtl);
  EXPECT_TRUE(Shows(*older, "a", 2));
  EXPECT_TRUE(Eventually([&] { return !older->state().registered; }));
  older->SetDraining();  // its business alone
  EXPECT_TRUE(Shows(*watcher, "a", 2, /*draining=*/false));
  younger.reset();
  EXPECT_TRUE(Shows(*watcher, "a", 1, /*draining=*/true)) << "the older one is alone again";
}

TEST_F(EtcdTest, EntriesOfAnotherFormAreNotTaken) {
  std::mutex mutex;
  std::vector<std::string> told;
  options_.log = [&](bool is_fault, const std::string& event) {
    std::lock_guard lock(mutex);
    if (is_fault) told.push_back(event);
  };
  etcd_->Put(std::string(kKey) + "no-json", "kv-0:7400");
  const auto watcher = Open(options_);
  etcd_->Put(std::string(kKey) + "other-name", Json(MakeShard("a")));
  v1::Shard homeless = MakeShard("homeless");
  homeless.set_address("nowhere");
  etcd_->Put(std::string(kKey) + "homeless", Json(homeless));
  etcd_->Put(std::string(kKey) + "newer",
             R"({"name": "newer", "address": "n:1", "fieldOfTomorrow": [1]})");
  EXPECT_TRUE(Lists(*watcher, {"newer"}));
  std::lock_guard lock(mutex);
  ASSERT_EQ(told.size(), 3u);
  for (const std::string& event : told) EXPECT_THAT(event, HasSubstr("not taken"));
}

TEST_F(EtcdTest, TheListStaysWhileEtcdIsAway) {
  const auto a = Open(options_), b = Open(options_);
  a->Register(MakeShard("a"), kTtl);
  b->Register(MakeShard("b"), kTtl);
  ASSERT_TRUE(Lists(*a, {"a", "b"}));
  ASSERT_TRUE(IsConnected(*a, true) && IsRegistered(*a) && IsRegistered(*b));
  etcd_->Stop();
  ASSERT_TRUE(IsConnected(*a, false));
  EXPECT_FALSE(a->state().error.empty());
  EXPECT_THAT(Names(a->Current()), ElementsAre("a", "b"));
  a->SetDraining();  // written when etcd is back
  etcd_->Start();
  ASSERT_TRUE(IsConnected(*a, true) && IsConnected(*b, true));
  EXPECT_GE(a->state().reconnects, 1u);
  EXPECT_TRUE(Shows(*b, "a", 1, /*draining=*/true));
  EXPECT_TRUE(IsRegistered(*a) && IsRegistered(*b));
}

TEST_F(EtcdTest, WhatHappenedWhileItWasAwayAndWasCompactedIsSeen) {
  etcd_->Put(std::string(kKey) + "old", Json(MakeShard("old")));
  etcd_->Put(std::string(kKey) + "kept", Json(MakeShard("kept")));
  const auto watcher = Open(options_);
  ASSERT_TRUE(Lists(*watcher, {"kept", "old"}));
  ASSERT_TRUE(IsConnected(*watcher, true));
  etcd_->Stop();
  ASSERT_TRUE(IsConnected(*watcher, false));
  etcd_->Start(/*hidden=*/true);
  etcd_->Delete(std::string(kKey) + "old");
  etcd_->Put(std::string(kKey) + "new", Json(MakeShard("new")));
  etcd_->Compact();
  etcd_->Stop();
  etcd_->Start();
  EXPECT_TRUE(Lists(*watcher, {"kept", "new"}));
}

TEST_F(EtcdTest, AnotherEndpointIsAskedWhereOneIsAway) {
  options_.endpoints.insert(options_.endpoints.begin(), "127.0.0.1:1");
  const auto a = Open(options_);
  a->Register(MakeShard("a"), kTtl);
  EXPECT_TRUE(IsRegistered(*a));
}

TEST(EtcdTlsTest, ShardsAreKnownByTheirCertificates) {
  CKV_SKIP_WITHOUT_ETCD();
  namespace certificates = cache_service::testing;
  const certificates::TestAuthority authority("authority");
  const certificates::CertificateFolder server, client;
  server.Write(authority.IssueServer());
  server.WriteCa(authority.pem());
  client.Write(authority.Issue({.common_name = "kv"}));
  client.WriteCa(authority.pem());
  const ClientTls tls = {client.ca(), client.certificate(), client.key(), ""};
  // It lets nobody in who shows no certificate of the authority's.
  EtcdProcess etcd(EtcdProcess::ServerTls{server.certificate(), server.key(), server.ca()}, tls);
  EtcdOptions options = At(etcd.endpoint());
  options.tls = tls;
  const auto a = Open(options);
  a->Register(MakeShard("a"), kTtl);
  EXPECT_TRUE(IsRegistered(*a));
}

// Says what is put into it.
class SayingEtcd final : public etcdserverpb::KV::Service, public etcdserverpb::Watch::Service {
 public:
  SayingEtcd() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(static_cast<etcdserverpb::KV::Service*>(this));
    builder.RegisterService(static_cast<etcdserverpb::Watch::Service*>(this));
    server_ = builder.BuildAndStart();
  }
  ~SayingEtcd() override { server_->Shutdown(std::chrono::system_clock::now()); }
  std::string endpoint() const { return "127.0.0.1:" + std::to_string(port_); }

  grpc::Status Range(grpc::ServerContext*, const etcdserverpb::RangeRequest*,
                     etcdserverpb::RangeResponse* response) override {
    const v1::Shard shard = MakeShard("list-" + std::to_string(++lists));
    mvccpb::KeyValue& entry = *response->add_kvs();
    entry.set_key(kKey + shard.name());
    entry.set_value(Json(shard));
    response->mutable_header()->set_revision(10 * lists);
    return grpc::Status::OK;
  }
  grpc::Status Watch(grpc::ServerContext* context,
                     grpc::ServerReaderWriter<etcdserverpb::WatchResponse,
                                              etcdserverpb::WatchRequest>* stream) override {
    etcdserverpb::WatchRequest request;
    if (!stream->Read(&request)) return grpc::Status::OK;
    EXPECT_EQ(request.create_request().start_revision(), 10 * lists + 1);
    etcdserverpb::WatchResponse created;
    created.set_created(true);
    stream->Write(created);
    if (lists == 1) {  // as where history was compacted between list and watch
      etcdserverpb::WatchResponse compacted;
      compacted.set_canceled(true);
      compacted.set_compact_revision(100);
      stream->Write(compacted);
    } else if (lists == 2) {
      etcdserverpb::WatchResponse cancelled;
      cancelled.set_canceled(true);
      cancelled.set_cancel_reason("etcdserver: mvcc: database corrupted");
      stream->Write(cancelled);
    } else if (lists == 3) {  // as a member that lost its leader
      const auto& metadata = context->client_metadata();
      EXPECT_NE(metadata.find("hasleader"), metadata.end());
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "etcdserver: no leader");
    } else if (lists == 4) {
      return grpc::Status::OK;  // ended without a word
    }
    // Until the other side goes.
    while (stream->Read(&request)) {
    }
    return grpc::Status::OK;
  }

  std::atomic<int> lists{0};

 private:
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

TEST(ShardDirectoryTest, WhateverEndsAWatchIsAnsweredByANewList) {
  SayingEtcd etcd;
  const auto directory = Open(At(etcd.endpoint()));
  EXPECT_TRUE(Lists(*directory, {"list-5"}));
  EXPECT_TRUE(IsConnected(*directory, true));
  EXPECT_EQ(directory->state().reconnects, 3u) << "a compaction is no absence";
  EXPECT_EQ(etcd.lists, 5);
}

}  // namespace
}  // namespace clusterkv
