// Servers as processes that are shards of one service.
#ifndef CLUSTERKV_TESTS_INTEGRATION_SHARDS_FIXTURE_H_
#define CLUSTERKV_TESTS_INTEGRATION_SHARDS_FIXTURE_H_

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "proto/placement.h"
#include "tests/integration/process.h"
#include "worker/client.h"
#include "worker/shards.h"

namespace clusterkv::integration {

// Servers kv-0, kv-1 … How they know each other is the derived fixture's business.
class ShardsFixture : public ::testing::Test {
 protected:
  struct Server {
    std::string name, address, admin_address;
    Process process;
  };

  Server& NameServer() {
    Server& server = servers_.emplace_back();
    server.name = absl::StrCat("kv-", servers_.size() - 1);
    return server;
  }
  // With `flags` added, --listen and --admin_listen among them. Its addresses are known after it.
  static void Start(const std::string& program, const std::vector<std::string>& flags,
                    Server& server) {
    std::vector<std::string> command = {program,
                                        "--arena_bytes=64MiB",
                                        "--build_threads=1",
                                        "--select_threads=1",
                                        "--log_level=error",
                                        absl::StrCat("--shard_name=", server.name)};
    command.insert(command.end(), flags.begin(), flags.end());
    server.process = Process::Start(command);
    constexpr std::string_view kBegin = "listening on ", kAdmin = ", admin on ";
    std::string line;
    while (server.process.ReadLine(&line)) {
      const size_t admin = line.find(kAdmin);
      if (!line.starts_with(kBegin) || admin == std::string::npos) continue;
      server.address = line.substr(kBegin.size(), admin - kBegin.size());
      server.admin_address = line.substr(admin + kAdmin.size());
      return;
    }
    ADD_FAILURE() << server.name << " did not start";
  }

  static std::unique_ptr<worker::Shards> Connect(const std::string& seeds, bool session) {
    worker::ClientOptions options;
    options.session = session;
    options.call_timeout = kCallTimeout;
    auto shards = worker::Shards::Connect(seeds, options);
    EXPECT_TRUE(shards.ok()) << shards.status();
    return shards.ok() ? *std::move(shards) : nullptr;
  }
  std::unique_ptr<worker::Client> ConnectTo(int i) const {
    worker::ClientOptions options;
    options.session = false;
    options.open_here = false;
    options.call_timeout = kCallTimeout;
    auto client = worker::Client::Connect(servers_[i].address, options);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }
  uint64_t BootId(int i) const { return ConnectTo(i)->server_info().boot_id(); }

  static std::unique_ptr<v1::AdminService::Stub> Admin(const Server& server) {
    return v1::AdminService::NewStub(
        grpc::CreateChannel(server.admin_address, grpc::InsecureChannelCredentials()));
  }
  static void Prepare(grpc::ClientContext& context) {
    context.set_wait_for_ready(true);
    context.set_deadline(absl::ToChronoTime(absl::Now() + kCallTimeout));
  }
  v1::DrainResponse Drain(int i) const {
    grpc::ClientContext context;
    Prepare(context);
    v1::DrainResponse response;
    const grpc::Status status = Admin(servers_[i])->Drain(&context, {}, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }

  int Owner(const std::string& sequence, int shards = 3) const {
    std::vector<v1::Shard> list(shards);
    for (int i = 0; i < shards; ++i) list[i].set_name(servers_[i].name);
    return RankShards(sequence, list).front().name().back() - '0';
  }
  // A name that server i owns among so many shards.
  std::string NameOf(int i, int shards = 3) {
    std::string name;
    do {
      name = absl::StrCat("sequence", next_name_++);
    } while (Owner(name, shards) != i);
    return name;
  }
  static v1::SequenceHandle Handle(const std::string& name) {
    v1::SequenceHandle handle;
    handle.set_name(name);
    return handle;
  }

  // Longer than a busy machine makes a call wait.
  static constexpr absl::Duration kCallTimeout = absl::Minutes(2);
  std::vector<Server> servers_;
  int next_name_ = 0;
};

}  // namespace clusterkv::integration

#endif  // CLUSTERKV_TESTS_INTEGRATION_SHARDS_FIXTURE_H_
