// The accept loop: limits, and what happens when file descriptors run out.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "cache_service/rpc/acceptor.h"
#include "tests/conformance/service_harness.h"

namespace clusterkv::cache_service::testing {
namespace {

// A bare TCP connection.
class Socket {
 public:
  explicit Socket(int port) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in name = {};
    name.sin_family = AF_INET;
    name.sin_port = htons(static_cast<uint16_t>(port));
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = connect(fd_.get(), reinterpret_cast<sockaddr*>(&name), sizeof(name)) == 0;
  }
  bool connected() const { return connected_; }
  // The other side has closed it, or does so within `limit`. gRPC speaks first, so bytes are no
  // end.
  bool ClosedWithin(absl::Duration limit) {
    const absl::Time until = absl::Now() + limit;
    while (absl::Now() < until) {
      pollfd polled = {fd_.get(), POLLIN, 0};
      if (poll(&polled, 1, 10) <= 0) continue;
      char buffer[4096];
      if (read(fd_.get(), buffer, sizeof(buffer)) <= 0) return true;
    }
    return false;
  }

 private:
  FileDescriptor fd_;
  bool connected_ = false;
};

bool Answers(ServiceHarness& harness) {
  v1::ServerInfo info;
  const auto context = MakeContext();
  context->set_wait_for_ready(true);
  return harness.cache().GetServerInfo(context.get(), {}, &info).ok();
}

TEST(ConnectionsTest, MoreThanTheLimitAreClosedAtOnceAndRoomIsUsedAgain) {
  ServiceHarness harness(Transport::kTcp, [](Config* config) { config->max_connections = 4; });
  ASSERT_TRUE(Answers(harness));  // the harness's own connection is the first
  {
    std::vector<std::unique_ptr<Socket>> held;
    for (int i = 0; i < 3; ++i) {
      held.push_back(std::make_unique<Socket>(harness.server().port()));
      ASSERT_TRUE(held.back()->connected());
      EXPECT_FALSE(held.back()->ClosedWithin(absl::Milliseconds(50)));
    }
    for (int i = 0; i < 5; ++i) {
      EXPECT_TRUE(Socket(harness.server().port()).ClosedWithin(absl::Seconds(10)));
    }
    EXPECT_TRUE(Answers(harness)) << "who is in is served";
  }
  const absl::Time limit = absl::Now() + absl::Seconds(10);
  bool admitted = false;
  while (!admitted && absl::Now() < limit) {
    admitted = !Socket(harness.server().port()).ClosedWithin(absl::Milliseconds(50));
  }
  EXPECT_TRUE(admitted);
}

TEST(ConnectionsTest, BothPortsAreFreeOnesWhenZeroWasAskedFor) {
  ServiceHarness one(Transport::kTcp), two(Transport::kTcp);
  EXPECT_NE(one.server().port(), 0);
  EXPECT_NE(one.server().port(), two.server().port());
  EXPECT_NE(one.server().port(), one.server().admin_port());
  EXPECT_EQ(one.server().address(), "127.0.0.1:" + std::to_string(one.server().port()));
}

TEST(ConnectionsTest, AnAddressThatIsTakenIsRefusedByName) {
  ServiceHarness harness(Transport::kTcp);
  v1::ServerConfig message;
  message.set_listen(harness.server().address());
  message.set_admin_listen("127.0.0.1:0");
  message.set_arena_bytes("1MiB");
  const auto second = Server::Start(ResolveConfig(message).value());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              ::testing::HasSubstr("cannot listen on " + harness.server().address()));
}

TEST(ConnectionsTest, HostsAreNamesOrAddressesOfEitherFamily) {
  EXPECT_TRUE(ListenSocket::Create("localhost:0").ok());
  EXPECT_TRUE(ListenSocket::Create("0.0.0.0:0").ok());
  EXPECT_FALSE(ListenSocket::Create("no.such.host.invalid:0").ok());
  EXPECT_FALSE(ListenSocket::Create("unix:" + std::string(200, 'x')).ok());
  const auto v6 = ListenSocket::Create("[::1]:0");
  if (!v6.ok()) GTEST_SKIP() << "this machine has no IPv6: " << v6.status();
  EXPECT_EQ(v6->address(), "[::1]:" + std::to_string(v6->port()));
}

}  // namespace
}  // namespace clusterkv::cache_service::testing
