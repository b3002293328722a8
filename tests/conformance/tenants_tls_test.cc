// Tenants by certificate: what one has, another cannot name, list, use or infer.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <map>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "tests/conformance/certificates.h"
#include "tests/conformance/service_harness.h"

namespace clusterkv::cache_service::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// What one client of a server calls, over its own connection.
class TenantClient {
 public:
  TenantClient(const std::shared_ptr<grpc::Channel>& channel,
               const std::shared_ptr<grpc::Channel>& admin_channel)
      : cache(v1::CacheService::NewStub(channel)),
        session(v1::SessionService::NewStub(channel)),
        admin(v1::AdminService::NewStub(admin_channel)) {}

  absl::StatusOr<v1::Sequence> Open(const v1::OpenSequenceRequest& request) {
    return Call(&v1::CacheService::Stub::OpenSequence, request);
  }
  absl::StatusOr<v1::Sequence> Get(const v1::SequenceHandle& handle) {
    v1::GetSequenceRequest request;
    *request.mutable_sequence() = handle;
    return Call(&v1::CacheService::Stub::GetSequence, request);
  }
  absl::StatusOr<v1::AttachResponse> Attach(const v1::SequenceHandle& handle) {
    v1::AttachRequest request;
    *request.mutable_sequence() = handle;
    request.mutable_hot_cache()->set_capacity_tokens(128);
    return Call(&v1::CacheService::Stub::Attach, request);
  }
  std::vector<std::string> List(const std::string& prefix = "") {
    v1::ListSequencesRequest request;
    request.set_prefix(prefix);
    std::vector<std::string> names;
    const auto answer = Call(&v1::CacheService::Stub::ListSequences, request);
    EXPECT_TRUE(answer.ok()) << answer.status();
    for (const v1::Sequence& one : answer->sequences()) names.push_back(one.handle().name());
    return names;
  }
  absl::Status Put(const TestSequence& sequence) {
    v1::PutKvResponse response;
    const auto context = MakeContext();
    const auto writer = cache->PutKv(context.get(), &response);
    for (uint32_t layer = 0; layer < sequence.layers; ++layer) {
      if (!writer->Write(sequence.Chunk(layer, 0, sequence.tokens))) break;
    }
    writer->WritesDone();
    return FromGrpcStatus(writer->Finish());
  }
  v1::Sequence MakeReady(const TestSequence& sequence) {
    const auto opened = Open(sequence.OpenRequest());
    EXPECT_TRUE(opened.ok()) << opened.status();
    const absl::Status put = Put(sequence);
    EXPECT_TRUE(put.ok()) << put;
    v1::SealSequenceRequest seal;
    *seal.mutable_sequence() = opened->handle();
    const auto ready = Call(&v1::CacheService::Stub::SealSequence, seal);
    EXPECT_TRUE(ready.ok()) << ready.status();
    return ready.ok() ? *ready : v1::Sequence();
  }
  absl::StatusOr<v1::SelectClustersResponse> Select(const v1::SequenceHandle& handle,
                                                    const TestSequence& shape) {
    v1::SelectClustersRequest request;
    v1::SelectItem* item = request.add_items();
    *item->mutable_sequence() = handle;
    *item->mutable_queries() = shape.QueryVector(0);
    return Call(&v1::CacheService::Stub::SelectClusters, request);
  }
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::CacheService::Stub::*method)(grpc::ClientContext*,
                                                                               const Request&,
                                                                               Response*),
                                const Request& request) {
    Response response;
    const grpc::Status status = ((*cache).*method)(MakeContext().get(), request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  const std::unique_ptr<v1::CacheService::Stub> cache;
  const std::unique_ptr<v1::SessionService::Stub> session;
  const std::unique_ptr<v1::AdminService::Stub> admin;
};

class TenantsTest : public ::testing::Test {
 protected:
  void StartServer(const std::function<void(Config*)>& change = nullptr) {
    harness_ = std::make_unique<ServiceHarness>(Transport::kTcp, [&](Config* config) {
      folder_.Write(authority_.IssueServer());
      folder_.WriteCa(authority_.pem());
      config->tls = {folder_.certificate(), folder_.key(), folder_.ca(), false};
      config->tenants.resize(2);
      config->tenants[0].name = "red";
      config->tenants[0].identities = {"spiffe://cluster/red/*", "red-worker"};
      config->tenants[1].name = "blue";
      config->tenants[1].identities = {"spiffe://cluster/blue/worker"};
      config->admin_identities = {"operator"};
      if (change) change(config);
    });
  }
  TenantClient Connect(const std::string& common_name, const std::string& uri = "") {
    const IssuedCertificate own = authority_.Issue(
        {.common_name = common_name, .alternative_names = uri.empty() ? "" : "URI:" + uri});
    const auto channel = [&](const std::string& address) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      return grpc::CreateCustomChannel(
          address, grpc::SslCredentials({authority_.pem(), own.key, own.certificate}), arguments);
    };
    return {channel(harness_->server().address()), channel(harness_->server().admin_address())};
  }
  TenantClient Red() { return Connect("anyone", "spiffe://cluster/red/prefill"); }
  TenantClient Blue() { return Connect("anyone", "spiffe://cluster/blue/worker"); }

  TestAuthority authority_{"authority"};
  CertificateFolder folder_;
  std::unique_ptr<ServiceHarness> harness_;
};

// The same reason, and the same words but for what the caller named itself.
void ExpectAsUnknown(const absl::Status& theirs, const absl::Status& unknown) {
  EXPECT_FALSE(theirs.ok());
  EXPECT_EQ(theirs.code(), unknown.code()) << theirs << " / " << unknown;
  EXPECT_EQ(ReasonOf(theirs), ReasonOf(unknown));
  EXPECT_EQ(theirs.message().size(), unknown.message().size()) << theirs << " / " << unknown;
  EXPECT_THAT(std::string(theirs.message()), Not(HasSubstr("\x01")));
}

TEST_F(TenantsTest, AnIdentityIsATenantOrIsRefused) {
  StartServer();
  TestSequence sequence;
  Red().MakeReady(sequence);
  EXPECT_EQ(Connect("red-worker").List(), std::vector<std::string>{sequence.name});
  EXPECT_TRUE(Blue().List().empty());
  const auto refused = [&](TenantClient client) {
    const absl::Status status = client.Get(v1::SequenceHandle()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
    return ReasonOf(status) == v1::IDENTITY_REFUSED;
  };
  EXPECT_TRUE(refused(Connect("stranger")));
  EXPECT_TRUE(refused(Connect("red-worker", "spiffe://cluster/green/worker")))
      << "a common name counts for nothing beside a URI";
  EXPECT_TRUE(refused(Connect("x", "spiffe://cluster/blue/worker2")));
  TenantClient stranger = Connect("stranger");
  const auto context = MakeContext();
  const auto stream = stranger.session->Session(context.get());
  v1::SessionResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::PERMISSION_DENIED);
}

TEST_F(TenantsTest, NamesAreEachTenantsOwn) {
  StartServer();
  TenantClient red = Red(), blue = Blue();
  TestSequence of_red, of_blue;
  of_blue.seed = 7;
  const v1::Sequence red_one = red.MakeReady(of_red);
  EXPECT_EQ(ReasonOf(blue.Get(red_one.handle()).status()), v1::SEQUENCE_NOT_FOUND);
  const v1::Sequence blue_one = blue.MakeReady(of_blue);  // of the same name
  EXPECT_EQ(red_one.handle().name(), blue_one.handle().name());
  EXPECT_NE(red_one.handle().generation(), blue_one.handle().generation());
  const auto red_select = red.Select(red_one.handle(), of_red);
  const auto blue_select = blue.Select(blue_one.handle(), of_red);
  ASSERT_TRUE(red_select.ok() && blue_select.ok());
  EXPECT_NE(red_select->results(0).selection_digest(), blue_select->results(0).selection_digest());
  v1::ReleaseSequenceRequest release;
  release.mutable_sequence()->set_name(of_red.name);
  ASSERT_TRUE(blue.Call(&v1::CacheService::Stub::ReleaseSequence, release).ok());
  EXPECT_TRUE(red.Get(red_one.handle()).ok()) << "another's release is of another sequence";
  EXPECT_TRUE(blue.List().empty());
  EXPECT_EQ(harness_->LedgerProblems().find("not balanced"), std::string::npos);
}

TEST_F(TenantsTest, WhatIsAnothersIsAnsweredAsWhatDoesNotExist) {
  StartServer();
  TenantClient red = Red(), blue = Blue();
  TestSequence sequence;
  const v1::Sequence ready = red.MakeReady(sequence);
  v1::SequenceHandle theirs, unknown;
  theirs.set_name(sequence.name);
  unknown.set_name(std::string(sequence.name.size(), 'x'));
  const auto both = [&](const std::function<absl::Status(const v1::SequenceHandle&)>& call) {
    ExpectAsUnknown(call(theirs), call(unknown));
  };
  both([&](const auto& handle) { return blue.Get(handle).status(); });
  both([&](const auto& handle) { return blue.Attach(handle).status(); });
  both([&](const auto& handle) {
    v1::ForkSequenceRequest request;
    *request.mutable_source() = handle;
    request.set_name("fork");
    return blue.Call(&v1::CacheService::Stub::ForkSequence, request).status();
  });
  both([&](const auto& handle) {
    v1::SealSequenceRequest request;
    *request.mutable_sequence() = handle;
    return blue.Call(&v1::CacheService::Stub::SealSequence, request).status();
  });
  both([&](const auto& handle) {
    v1::AppendKvRequest request;
    *request.mutable_sequence() = handle;
    request.set_tokens(1);
    return blue.Call(&v1::CacheService::Stub::AppendKv, request).status();
  });
  both([&](const auto& handle) {
    v1::SelectClustersRequest request;
    request.set_sequence(handle.name());
    *request.mutable_queries() = sequence.QueryVector(0);
    return blue.Call(&v1::CacheService::Stub::SelectClusters, request).status();
  });
  both([&](const auto& handle) {
    v1::RecallClustersRequest request;
    *request.mutable_sequence() = handle;
    request.set_steady_zone(true);
    const auto context = MakeContext();
    const auto reader = blue.cache->RecallClusters(context.get(), request);
    v1::RecordChunk chunk;
    EXPECT_FALSE(reader->Read(&chunk));
    return FromGrpcStatus(reader->Finish());
  });
  both([&](const auto& handle) {
    v1::GetIndexRequest request;
    *request.mutable_sequence() = handle;
    const auto context = MakeContext();
    const auto reader = blue.cache->GetIndex(context.get(), request);
    v1::IndexChunk chunk;
    EXPECT_FALSE(reader->Read(&chunk));
    return FromGrpcStatus(reader->Finish());
  });
  both([&](const auto& handle) {
    TestSequence named = sequence;
    named.name = handle.name();
    return blue.Put(named);
  });
  v1::ReleaseSequenceRequest release;
  *release.mutable_sequence() = ready.handle();
  EXPECT_TRUE(blue.Call(&v1::CacheService::Stub::ReleaseSequence, release).ok());
  EXPECT_TRUE(red.Get(ready.handle()).ok());
}

TEST_F(TenantsTest, NamesThatLookLikeAnothersInsideAreNot) {
  StartServer();
  TenantClient red = Red(), blue = Blue();
  TestSequence sequence;
  red.MakeReady(sequence);
  for (const int index : {0, 1, 2}) {
    v1::SequenceHandle handle;
    handle.set_name(std::string("\x01") + "00" + static_cast<char>('0' + index) + sequence.name);
    EXPECT_EQ(ReasonOf(blue.Get(handle).status()), v1::SEQUENCE_NOT_FOUND);
    EXPECT_TRUE(blue.List(handle.name()).empty());
  }
  v1::OpenSequenceRequest longest = sequence.OpenRequest();
  longest.set_name(std::string(256, 'n'));
  EXPECT_TRUE(blue.Open(longest).ok());
  longest.set_name(std::string(257, 'n'));
  EXPECT_EQ(ReasonOf(blue.Open(longest).status()), v1::INVALID_FIELD);
  EXPECT_EQ(blue.List(), std::vector<std::string>{std::string(256, 'n')});
}

TEST_F(TenantsTest, AttachmentsAndSessionsOfAnotherDoNotExist) {
  StartServer();
  TenantClient red = Red(), blue = Blue();
  TestSequence sequence;
  const v1::Sequence ready = red.MakeReady(sequence);
  const auto attached = red.Attach(ready.handle());
  ASSERT_TRUE(attached.ok()) << attached.status();
  v1::DetachRequest detach;
  detach.set_attachment_id(attached->attachment_id());
  const absl::Status refused = blue.Call(&v1::CacheService::Stub::Detach, detach).status();
  EXPECT_EQ(ReasonOf(refused), v1::ATTACHMENT_NOT_FOUND);
  EXPECT_THAT(std::string(refused.message()), HasSubstr(std::to_string(attached->attachment_id())));
  v1::SelectAndRecallRequest recall;
  recall.add_items()->set_attachment_id(attached->attachment_id());
  *recall.mutable_items(0)->mutable_queries() = sequence.QueryVector(0);
  const auto first = [&](TenantClient& client) {
    const auto context = MakeContext();
    const auto reader = client.cache->SelectAndRecall(context.get(), recall);
    v1::SelectAndRecallResponse response;
    EXPECT_TRUE(reader->Read(&response));
    context->TryCancel();
    return response.selection().results(0);
  };
  EXPECT_EQ(first(blue).error().code(), static_cast<int>(grpc::NOT_FOUND));
  EXPECT_EQ(first(red).error().code(), 0);

  const auto context = MakeContext();
  const auto stream = red.session->Session(context.get());
  v1::SessionRequest hello;
  hello.mutable_hello()->set_worker("red");
  stream->Write(hello);
  v1::SessionResponse welcome;
  ASSERT_TRUE(stream->Read(&welcome));
  const uint64_t session_id = welcome.welcome().session_id();
  v1::OpenSequenceRequest open = sequence.OpenRequest();
  open.set_name("owned");
  open.set_session_id(session_id);
  EXPECT_EQ(ReasonOf(blue.Open(open).status()), v1::SESSION_NOT_FOUND);
  EXPECT_TRUE(red.Open(open).ok());
  const auto thief_context = MakeContext();
  const auto thief = blue.session->Session(thief_context.get());
  hello.mutable_hello()->set_session_id(session_id);
  thief->Write(hello);
  ASSERT_TRUE(thief->Read(&welcome));
  EXPECT_FALSE(welcome.welcome().resumed());
  thief_context->TryCancel();
  thief->Finish();
  stream->WritesDone();
  stream->Finish();
}

TEST_F(TenantsTest, OnlyWhoIsNamedAdministersAndHeNamesTheTenant) {
  StartServer();
  TestSequence sequence;
  TenantClient red = Red(), boss = Connect("operator");
  red.MakeReady(sequence);
  v1::Stats stats;
  EXPECT_EQ(red.admin->GetStats(MakeContext().get(), {}, &stats).error_code(),
            grpc::PERMISSION_DENIED);
  v1::DrainResponse drained;
  EXPECT_EQ(red.admin->Drain(MakeContext().get(), {}, &drained).error_code(),
            grpc::PERMISSION_DENIED);
  EXPECT_FALSE(harness_->server().shard().draining());
  ASSERT_TRUE(boss.admin->GetStats(MakeContext().get(), {}, &stats).ok());
  EXPECT_EQ(stats.sequences(), 1u);
  EXPECT_EQ(stats.tenants().at("red").sequences(), 1u);
  EXPECT_GT(stats.tenants().at("red").planned_bytes(), 0u);
  EXPECT_EQ(stats.tenants().at("blue").sequences(), 0u);
  EXPECT_GT(stats.tenants().at("red").ingested_bytes(), 0u);
  v1::EvictSequenceRequest evict;
  evict.mutable_sequence()->set_name(sequence.name);
  v1::EvictSequenceResponse evicted;
  const auto code = [&](const std::string& tenant) {
    evict.set_tenant(tenant);
    return boss.admin->EvictSequence(MakeContext().get(), evict, &evicted).error_code();
  };
  EXPECT_EQ(code("blue"), grpc::NOT_FOUND);
  EXPECT_EQ(code("nobody"), grpc::INVALID_ARGUMENT);
  EXPECT_EQ(code("red"), grpc::OK);
}

TEST_F(TenantsTest, AQuotaOfTheArenaIsRefusedByNameAndFreedByRelease) {
  TestSequence sequence;
  StartServer([&](Config* config) { config->tenants[0].arena_bytes = 3 << 20; });
  TenantClient red = Red(), blue = Blue();
  std::vector<v1::Sequence> opened;
  absl::Status refused;
  for (int i = 0; i < 64 && refused.ok(); ++i) {
    v1::OpenSequenceRequest request = sequence.OpenRequest();
    request.set_name("s" + std::to_string(i));
    const auto one = red.Open(request);
    refused = one.status();
    if (one.ok()) opened.push_back(*one);
  }
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(refused), v1::TENANT_QUOTA) << refused;
  ASSERT_GE(opened.size(), 1u);
  EXPECT_TRUE(blue.Open(sequence.OpenRequest()).ok()) << "another's quota is none of his";
  v1::ReleaseSequenceRequest release;
  *release.mutable_sequence() = opened.front().handle();
  ASSERT_TRUE(red.Call(&v1::CacheService::Stub::ReleaseSequence, release).ok());
  EXPECT_TRUE(red.Open(sequence.OpenRequest()).ok());
}

TEST_F(TenantsTest, AFullQuotaEvictsTheTenantsOwnThatNobodyIsAttachedTo) {
  const auto named = [](const std::string& name) {
    TestSequence sequence;
    sequence.name = name;
    return sequence;
  };
  const auto stats = [this] {
    v1::Stats stats;
    EXPECT_TRUE(Connect("operator").admin->GetStats(MakeContext().get(), {}, &stats).ok());
    return stats;
  };
  StartServer();
  Red().MakeReady(named("one"));
  const auto planned = static_cast<int64_t>(stats().tenants().at("red").planned_bytes());
  StartServer([&](Config* config) { config->tenants[0].arena_bytes = 2 * planned + planned / 2; });
  TenantClient red = Red(), blue = Blue();
  blue.MakeReady(named("oldest"));
  const v1::Sequence attached = red.MakeReady(named("attached"));
  ASSERT_TRUE(red.Attach(attached.handle()).ok());
  red.MakeReady(named("idle"));

  TestSequence large = named("large");
  large.tokens *= 3;
  EXPECT_EQ(ReasonOf(red.Open(large.OpenRequest()).status()), v1::TENANT_QUOTA);
  EXPECT_EQ(red.List().size(), 2u) << "nobody leaves for what does not fit anyway";
  const absl::Status exists = red.Open(named("attached").OpenRequest()).status();
  EXPECT_FALSE(exists.ok());
  EXPECT_EQ(red.List().size(), 2u) << "or is there already";
  // The server may still hold "idle" for an instant after its answer.
  absl::StatusOr<v1::Sequence> opened;
  do {
    opened = red.Open(named("new").OpenRequest());
  } while (ReasonOf(opened.status()) == v1::TENANT_QUOTA);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_THAT(red.List(), ::testing::ElementsAre("attached", "new"));
  EXPECT_THAT(blue.List(), ::testing::ElementsAre("oldest"));
  EXPECT_EQ(stats().evictions_by_reason().at("quota"), 1u);
  EXPECT_EQ(stats().evictions(), 1u);
  EXPECT_EQ(ReasonOf(red.Open(named("newer").OpenRequest()).status()), v1::TENANT_QUOTA)
      << "one is attached, the other is being filled";
}

TEST_F(TenantsTest, AForkDoesNotEvictItsSource) {
  TestSequence sequence;
  StartServer();
  TenantClient red = Red();
  red.MakeReady(sequence);
  v1::Stats stats;
  ASSERT_TRUE(Connect("operator").admin->GetStats(MakeContext().get(), {}, &stats).ok());
  const auto planned = static_cast<int64_t>(stats.tenants().at("red").planned_bytes());
  StartServer([&](Config* config) { config->tenants[0].arena_bytes = planned + planned / 2; });
  TenantClient again = Red();
  again.MakeReady(sequence);
  v1::ForkSequenceRequest fork;
  fork.mutable_source()->set_name(sequence.name);
  fork.set_name("fork");
  const absl::Status refused = again.Call(&v1::CacheService::Stub::ForkSequence, fork).status();
  EXPECT_EQ(ReasonOf(refused), v1::TENANT_QUOTA) << refused;
  EXPECT_THAT(again.List(), ::testing::ElementsAre(sequence.name));
}

TEST_F(TenantsTest, CallsAndBytesOverTheRateAreRefusedWithTheTimeToWait) {
  StartServer([](Config* config) {
    config->tenants[0].calls_per_second = 5;
    config->tenants[1].ingest_bytes_per_second = 1;
  });
  TenantClient red = Red(), blue = Blue();
  grpc::Status refused;
  for (int i = 0; i < 50 && refused.ok(); ++i) {
    v1::ServerInfo info;
    refused = red.cache->GetServerInfo(MakeContext().get(), {}, &info);
  }
  EXPECT_EQ(refused.error_code(), grpc::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ReasonOf(FromGrpcStatus(refused)), v1::RATE_LIMITED);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(refused.error_details()));
  ASSERT_EQ(details.details_size(), 2);
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(1).UnpackTo(&retry));
  EXPECT_GT(retry.retry_delay().nanos(), 0);
  v1::ServerInfo info;
  EXPECT_TRUE(blue.cache->GetServerInfo(MakeContext().get(), {}, &info).ok());
  TestSequence sequence;
  ASSERT_TRUE(blue.Open(sequence.OpenRequest()).ok());
  EXPECT_EQ(ReasonOf(blue.Put(sequence)), v1::RATE_LIMITED);
}

}  // namespace
}  // namespace clusterkv::cache_service::testing
