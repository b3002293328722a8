// TLS: who gets in, who does not, and certificates that change under load.
#include "cache_service/rpc/tls.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/time/clock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/conformance/certificates.h"
#include "tests/conformance/service_harness.h"
#include "worker/client.h"

namespace clusterkv::cache_service::testing {
namespace {

using ::testing::HasSubstr;

enum class Clients { kNone, kRequired, kOptional };

// A server with certificates of its own authority.
class TlsServer {
 public:
  explicit TlsServer(Clients clients)
      : harness_(Transport::kTcp, [&](Config* config) {
          folder_.Write(authority_.IssueServer("server-0"));
          folder_.WriteCa(authority_.pem());
          config->health_listen = "127.0.0.1:0";
          config->tls.certificate_file = folder_.certificate();
          config->tls.key_file = folder_.key();
          if (clients != Clients::kNone) config->tls.client_ca_file = folder_.ca();
          config->tls.client_certificate_optional = clients == Clients::kOptional;
        }) {}

  // Of a client who shows `own` and trusts `ca`.
  static std::shared_ptr<grpc::ChannelCredentials> Credentials(const std::string& ca,
                                                               const IssuedCertificate& own) {
    return grpc::SslCredentials({ca, own.key, own.certificate});
  }

  // One call on a connection of its own. peer: the common name that the server showed.
  grpc::Status Call(const std::shared_ptr<grpc::ChannelCredentials>& credentials,
                    std::string* peer = nullptr) {
    grpc::Status status;
    do {
      const auto stub =
          v1::CacheService::NewStub(Channel(harness_.server().address(), credentials));
      status = CallOn(*stub, peer);
    } while (IsOfAnotherErrno(status));
    return status;
  }
  static grpc::Status CallOn(v1::CacheService::Stub& stub, std::string* peer) {
    v1::ServerInfo info;
    const auto context = MakeContext();
    const grpc::Status status = stub.GetServerInfo(context.get(), {}, &info);
    if (status.ok() && peer != nullptr) {
      const auto names = context->auth_context()->FindPropertyValues(GRPC_X509_CN_PROPERTY_NAME);
      if (!names.empty()) *peer = std::string(names[0].data(), names[0].size());
    }
    return status;
  }
  static std::shared_ptr<grpc::Channel> Channel(
      const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel(address, credentials, arguments);
  }

  ServiceHarness& harness() { return harness_; }
  const TestAuthority& authority() const { return authority_; }
  const CertificateFolder& folder() const { return folder_; }

 private:
  // gRPC 1.51 looks at the errno of connect() after other calls. Under ThreadSanitizer it has been
  // ENOENT, which no connect() of TCP gives.
  static bool IsOfAnotherErrno(const grpc::Status& status) {
    return status.error_code() == grpc::UNAVAILABLE &&
           status.error_message().find("No such file or directory") != std::string::npos;
  }

  TestAuthority authority_{"authority"};
  CertificateFolder folder_;
  ServiceHarness harness_;
};

TEST(TlsTest, AServerWithACertificateSpeaksToWhoTrustsItAndToNobodyInPlainText) {
  TlsServer server(Clients::kNone);
  std::string peer;
  EXPECT_TRUE(server.Call(TlsServer::Credentials(server.authority().pem(), {}), &peer).ok());
  EXPECT_EQ(peer, "server-0");
  EXPECT_EQ(server.Call(grpc::InsecureChannelCredentials()).error_code(), grpc::UNAVAILABLE);
  const TestAuthority other("authority");
  EXPECT_EQ(server.Call(TlsServer::Credentials(other.pem(), {})).error_code(), grpc::UNAVAILABLE);
}

TEST(TlsTest, OnlyACertificateThatIsGoodNowAndOfTheAuthorityGetsIn) {
  TlsServer server(Clients::kRequired);
  const TestAuthority& ours = server.authority();
  const TestAuthority foreign("authority");  // of the same name
  const auto call = [&](const IssuedCertificate& own) {
    return server.Call(TlsServer::Credentials(ours.pem(), own)).error_code();
  };
  EXPECT_EQ(call(ours.Issue({})), grpc::OK);
  EXPECT_EQ(call({}), grpc::UNAVAILABLE);
  EXPECT_EQ(call(foreign.Issue({})), grpc::UNAVAILABLE);
  EXPECT_EQ(call(ours.Issue({.begin = -absl::Hours(2), .end = -absl::Seconds(1)})),
            grpc::UNAVAILABLE);
  EXPECT_EQ(call(ours.Issue({.begin = absl::Minutes(5), .end = absl::Hours(1)})),
            grpc::UNAVAILABLE);
  EXPECT_EQ(call(ours.Issue({})), grpc::OK) << "who is good gets in after all of these";
}

TEST(TlsTest, ACertificateThatIsOptionalIsCheckedWhenItIsShown) {
  TlsServer server(Clients::kOptional);
  const TestAuthority foreign("foreign");
  const std::string ca = server.authority().pem();
  EXPECT_TRUE(server.Call(TlsServer::Credentials(ca, {})).ok());
  EXPECT_TRUE(server.Call(TlsServer::Credentials(ca, server.authority().Issue({}))).ok());
  EXPECT_FALSE(server.Call(TlsServer::Credentials(ca, foreign.Issue({}))).ok());
}

TEST(TlsTest, TheAdminPortAsksForTheSameAndTheHealthPortForNothing) {
  TlsServer server(Clients::kRequired);
  const auto stats = [&](const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
    const auto stub = v1::AdminService::NewStub(
        TlsServer::Channel(server.harness().server().admin_address(), credentials));
    v1::Stats answer;
    return stub->GetStats(MakeContext().get(), {}, &answer).ok();
  };
  const std::string ca = server.authority().pem();
  EXPECT_TRUE(stats(TlsServer::Credentials(ca, server.authority().Issue({}))));
  EXPECT_FALSE(stats(TlsServer::Credentials(ca, {})));
  EXPECT_FALSE(stats(grpc::InsecureChannelCredentials()));
  const std::string address =
      "127.0.0.1:" + std::to_string(server.harness().server().health_port());
  const auto channel = TlsServer::Channel(address, grpc::InsecureChannelCredentials());
  const auto health = grpc::health::v1::Health::NewStub(channel);
  for (const char* service : {"", "liveness", "readiness"}) {
    grpc::health::v1::HealthCheckRequest request;
    grpc::health::v1::HealthCheckResponse response;
    request.set_service(service);
    ASSERT_TRUE(health->Check(MakeContext().get(), request, &response).ok());
    EXPECT_EQ(response.status(), grpc::health::v1::HealthCheckResponse::SERVING);
  }
  v1::Stats answer;
  EXPECT_EQ(
      v1::AdminService::NewStub(channel)->GetStats(MakeContext().get(), {}, &answer).error_code(),
      grpc::UNIMPLEMENTED);
}

TEST(TlsTest, CertificatesChangeAHundredTimesUnderLoadWithoutAFailedCall) {
  constexpr int kRotations = 100;
  TlsServer server(Clients::kRequired);
  const auto credentials =
      TlsServer::Credentials(server.authority().pem(), server.authority().Issue({}));
  std::atomic<bool> over{false};
  std::atomic<int64_t> calls{0}, connections{0}, failures{0};
  const auto count = [&](const grpc::Status& status) {
    calls.fetch_add(1);
    if (status.ok()) return;
    failures.fetch_add(1);
    ADD_FAILURE() << status.error_code() << " " << status.error_message();
  };
  std::thread steady([&] {  // one connection through it all
    const auto stub = v1::CacheService::NewStub(
        TlsServer::Channel(server.harness().server().address(), credentials));
    while (!over.load()) count(TlsServer::CallOn(*stub, nullptr));
  });
  std::thread fresh([&] {  // a connection for each call
    while (!over.load()) {
      count(server.Call(credentials));
      connections.fetch_add(1);
    }
  });
  std::string peer;
  for (int i = 1; i <= kRotations; ++i) {
    const std::string name = "server-" + std::to_string(i);
    server.folder().Write(server.authority().IssueServer(name));
    count(server.Call(credentials, &peer));
    EXPECT_EQ(peer, name) << "a connection after the change sees it";
    if (peer != name) break;
  }
  over.store(true);
  steady.join();
  fresh.join();
  EXPECT_EQ(failures.load(), 0);
  std::printf("%d rotations, %ld calls, %ld connections\n", kRotations,
              static_cast<long>(calls.load()), static_cast<long>(connections.load()));
}

TEST(TlsTest, FilesThatAreNotWholeAreNotTaken) {
  TlsServer server(Clients::kRequired);
  const TestAuthority& ours = server.authority();
  const auto credentials = TlsServer::Credentials(ours.pem(), ours.Issue({}));
  const auto expect_the_first = [&](const char* what) {
    std::string peer;
    EXPECT_TRUE(server.Call(credentials, &peer).ok()) << what;
    EXPECT_EQ(peer, "server-0") << what;
  };
  const IssuedCertificate one = ours.IssueServer("one"), two = ours.IssueServer("two");
  server.folder().Write({one.certificate, two.key});
  expect_the_first("the key of another certificate");
  server.folder().Write({one.certificate.substr(0, one.certificate.size() / 2), one.key});
  expect_the_first("half a certificate");
  server.folder().Write({"", ""});
  expect_the_first("empty files");
  server.folder().Write(ours.Issue({.common_name = "late",
                                    .alternative_names = "DNS:localhost,IP:127.0.0.1",
                                    .begin = -absl::Hours(2),
                                    .end = -absl::Hours(1)}));
  expect_the_first("a certificate that has ended");
  server.folder().Write(two);
  server.folder().WriteCa("no authority");
  expect_the_first("no authority");
  server.folder().WriteCa(ours.pem());
  std::string peer;
  EXPECT_TRUE(server.Call(credentials, &peer).ok());
  EXPECT_EQ(peer, "two") << "what is whole again is taken";
}

TEST(TlsTest, AnotherAuthorityOfTheClientsIsObeyedAtOnce) {
  TlsServer server(Clients::kRequired);
  const TestAuthority next("next");
  const std::string ca = server.authority().pem();
  const IssuedCertificate old_one = server.authority().Issue({}), new_one = next.Issue({});
  EXPECT_FALSE(server.Call(TlsServer::Credentials(ca, new_one)).ok());
  server.folder().WriteCa(ca + next.pem());
  EXPECT_TRUE(server.Call(TlsServer::Credentials(ca, new_one)).ok());
  EXPECT_TRUE(server.Call(TlsServer::Credentials(ca, old_one)).ok());
  server.folder().WriteCa(next.pem());
  EXPECT_TRUE(server.Call(TlsServer::Credentials(ca, new_one)).ok());
  EXPECT_FALSE(server.Call(TlsServer::Credentials(ca, old_one)).ok());
}

TEST(TlsTest, AServerWithBadFilesDoesNotStart) {
  const TestAuthority authority("authority");
  CertificateFolder folder;
  folder.Write(authority.IssueServer());
  const auto fault = [](const TlsOptions& options) {
    return std::string(TlsFiles::Load(options).status().message());
  };
  EXPECT_EQ(fault({folder.certificate(), folder.key(), "", false}), "");
  EXPECT_THAT(fault({folder.key(), folder.key(), "", false}), HasSubstr("certificates in PEM"));
  EXPECT_THAT(fault({folder.certificate(), folder.certificate(), "", false}),
              HasSubstr("private key in PEM"));
  EXPECT_THAT(fault({folder.certificate(), "/no/such/file", "", false}),
              HasSubstr("/no/such/file: No such file"));
  EXPECT_THAT(fault({folder.certificate(), folder.key(), "/no/such/file", false}),
              HasSubstr("/no/such/file: No such file"));
}

TEST(TlsTest, TheWorkersClientTakesItsFilesAndHoldsASession) {
  TlsServer server(Clients::kRequired);
  CertificateFolder own;
  own.Write(server.authority().Issue({.common_name = "worker"}));
  own.WriteCa(server.authority().pem());
  worker::ClientOptions options;
  options.call_timeout = absl::Seconds(20);
  options.tls = {own.ca(), own.certificate(), own.key(), ""};
  const auto client = worker::Client::Connect(server.harness().server().address(), options);
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_NE((*client)->session_id(), 0u);
  options.tls.server_name = "localhost";
  EXPECT_TRUE(worker::Client::Connect(server.harness().server().address(), options).ok());
  options.call_timeout = absl::Milliseconds(500);
  options.tls.server_name = "somebody.else";
  EXPECT_FALSE(worker::Client::Connect(server.harness().server().address(), options).ok());
  options.tls.certificate_file.clear();
  EXPECT_EQ(worker::Client::Connect(server.harness().server().address(), options).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace clusterkv::cache_service::testing
