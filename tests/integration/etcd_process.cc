#include "tests/integration/etcd_process.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "absl/time/clock.h"
#include "kernels/base/check.h"
#include "tests/free_port.h"

namespace clusterkv::integration {
namespace {

std::string Loopback(int port) { return "127.0.0.1:" + std::to_string(port); }

std::filesystem::path NewFolder() {
  static std::atomic<int> count{0};
  return std::filesystem::temp_directory_path() /
         ("etcd-" + std::to_string(getpid()) + "-" + std::to_string(count++));
}

// A call that is tried until it succeeds: etcd may be electing.
template <typename Call>
void Do(const char* what, Call&& call) {
  std::string error;
  const bool done = Eventually([&] {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);  // gRPC connects while somebody waits
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    const grpc::Status status = call(&context);
    error = status.error_message();
    return status.ok();
  });
  CKV_CHECK(done) << what << ": " << error;
}

}  // namespace

bool Eventually(const std::function<bool()>& wanted) {
  const absl::Time limit = absl::Now() + kLongEnough;
  while (!wanted()) {
    if (absl::Now() >= limit) return false;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return true;
}

std::string EtcdProcess::Program() {
  if (const char* given = std::getenv("CKV_ETCD"); given != nullptr) return given;
  const char* const path = std::getenv("PATH");
  std::stringstream folders(path == nullptr ? "" : path);
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string program = folder + "/etcd";
    if (access(program.c_str(), X_OK) == 0) return program;
  }
  return "";
}

EtcdProcess::EtcdProcess(std::optional<ServerTls> tls, ClientTls client)
    : tls_(std::move(tls)), client_tls_(std::move(client)), folder_(NewFolder()) {
  endpoint_ = Loopback(FreePort());
  Start();
  CKV_CHECK(process_.pid() > 0) << "etcd does not start";
}

EtcdProcess::~EtcdProcess() {
  Stop();
  std::filesystem::remove_all(folder_);
}

void EtcdProcess::Stop() { process_ = Process(); }

void EtcdProcess::Start(bool hidden) {
  current_endpoint_ = hidden ? Loopback(FreePort()) : endpoint_;
  const std::string peer = "http://" + Loopback(FreePort());
  const std::string client = (tls_.has_value() ? "https://" : "http://") + current_endpoint_;
  std::vector<std::string> command = {Program(),
                                      "--data-dir=" + folder_.string(),
                                      "--listen-client-urls=" + client,
                                      "--advertise-client-urls=" + client,
                                      "--listen-peer-urls=" + peer,
                                      "--initial-advertise-peer-urls=" + peer,
                                      "--initial-cluster=default=" + peer,
                                      "--unsafe-no-fsync",
                                      "--logger=zap",
                                      "--log-level=panic"};
  if (tls_.has_value()) {
    command.push_back("--cert-file=" + tls_->certificate_file);
    command.push_back("--key-file=" + tls_->key_file);
    command.push_back("--trusted-ca-file=" + tls_->client_ca_file);
    command.emplace_back("--client-cert-auth");
  }
  process_ = Process::Start(command);
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  auto credentials = MakeCredentials(client_tls_, &arguments);
  CKV_CHECK(credentials.ok()) << credentials.status();
  channel_ = grpc::CreateCustomChannel(current_endpoint_, *credentials, arguments);
  if (!AwaitReady()) Stop();
}

bool EtcdProcess::AwaitReady() const {
  bool ended = false;
  const bool answered = Eventually([&] {
    siginfo_t end = {};  // it stays to be waited for
    waitid(P_PID, static_cast<id_t>(process_.pid()), &end, WEXITED | WNOHANG | WNOWAIT);
    ended = end.si_pid != 0;
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(1));
    etcdserverpb::RangeRequest request;
    request.set_key("ready");
    etcdserverpb::RangeResponse response;
    return ended || Kv()->Range(&context, request, &response).ok();
  });
  return answered && !ended;
}

void EtcdProcess::Freeze() const { process_.Kill(SIGSTOP); }
void EtcdProcess::Continue() const { process_.Kill(SIGCONT); }

std::unique_ptr<etcdserverpb::KV::Stub> EtcdProcess::Kv() const {
  return etcdserverpb::KV::NewStub(channel_);
}

void EtcdProcess::Put(const std::string& key, const std::string& value, int64_t lease) const {
  etcdserverpb::PutRequest request;
  request.set_key(key);
  request.set_value(value);
  request.set_lease(lease);
  Do("put", [&](grpc::ClientContext* context) {
    etcdserverpb::PutResponse response;
    return Kv()->Put(context, request, &response);
  });
}

void EtcdProcess::Delete(const std::string& key) const {
  etcdserverpb::DeleteRangeRequest request;
  request.set_key(key);
  Do("delete", [&](grpc::ClientContext* context) {
    etcdserverpb::DeleteRangeResponse response;
    return Kv()->DeleteRange(context, request, &response);
  });
}

std::unique_ptr<mvccpb::KeyValue> EtcdProcess::Get(const std::string& key) const {
  etcdserverpb::RangeRequest request;
  request.set_key(key);
  etcdserverpb::RangeResponse response;
  Do("get", [&](grpc::ClientContext* context) { return Kv()->Range(context, request, &response); });
  if (response.kvs_size() == 0) return nullptr;
  return std::make_unique<mvccpb::KeyValue>(response.kvs(0));
}

int64_t EtcdProcess::Grant(absl::Duration ttl) const {
  etcdserverpb::LeaseGrantRequest request;
  request.set_ttl(absl::ToInt64Seconds(ttl));
  etcdserverpb::LeaseGrantResponse response;
  Do("grant", [&](grpc::ClientContext* context) {
    return etcdserverpb::Lease::NewStub(channel_)->LeaseGrant(context, request, &response);
  });
  return response.id();
}

void EtcdProcess::Revoke(int64_t lease) const {
  etcdserverpb::LeaseRevokeRequest request;
  request.set_id(lease);
  Do("revoke", [&](grpc::ClientContext* context) {
    etcdserverpb::LeaseRevokeResponse response;
    return etcdserverpb::Lease::NewStub(channel_)->LeaseRevoke(context, request, &response);
  });
}

void EtcdProcess::Compact() const {
  etcdserverpb::RangeRequest look;
  look.set_key("ready");
  etcdserverpb::RangeResponse now;
  Do("get", [&](grpc::ClientContext* context) { return Kv()->Range(context, look, &now); });
  etcdserverpb::CompactionRequest request;
  request.set_revision(now.header().revision());
  request.set_physical(true);
  Do("compact", [&](grpc::ClientContext* context) {
    etcdserverpb::CompactionResponse response;
    const grpc::Status status = Kv()->Compact(context, request, &response);
    // Nothing happened since the last one.
    return status.error_code() == grpc::StatusCode::OUT_OF_RANGE ? grpc::Status::OK : status;
  });
}

}  // namespace clusterkv::integration
