#include "worker/client.h"

#include <grpcpp/create_channel.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/grpc_status.h"
#include "worker/session_stream.h"
#include "worker/transport_failure.h"

namespace clusterkv::worker {
namespace {

// How long one attempt of Reconnect waits before it asks again.
constexpr absl::Duration kAttempt = absl::Seconds(2);
constexpr absl::Duration kPause = absl::Milliseconds(10);

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& target,
                                                           const TlsOptions& tls) {
  grpc::ChannelArguments arguments;
  // A connection of its own, which comes back as soon as the server does.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 20);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 500);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  CKV_ASSIGN_OR_RETURN(const auto credentials, MakeCredentials(tls, &arguments));
  return grpc::CreateCustomChannel(target, credentials, arguments);
}

std::unique_ptr<grpc::ClientContext> ContextWithTimeout(absl::Duration timeout) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  return context;
}

}  // namespace

struct Client::Impl {
  ClientOptions options;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::CacheService::StubInterface> cache;
  std::unique_ptr<SessionStream> session;  // null: none was asked for
  mutable std::mutex mutex;
  v1::ServerInfo server_info;  // guarded by mutex

  // One unary call of the cache service.
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::CacheService::StubInterface::*method)(
                                    grpc::ClientContext*, const Request&, Response*),
                                const Request& request, absl::Duration timeout,
                                bool wait_for_ready = false) {
    const auto context = ContextWithTimeout(timeout);
    context->set_wait_for_ready(wait_for_ready);
    Response response;
    CKV_RETURN_IF_ERROR(FromGrpcStatus((cache.get()->*method)(context.get(), request, &response)));
    return response;
  }

  absl::StatusOr<v1::ServerInfo> WaitForServer(absl::Time deadline);
};

absl::StatusOr<v1::ServerInfo> Client::Impl::WaitForServer(absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - absl::Now();
    absl::StatusOr<v1::ServerInfo> info =
        Call(&v1::CacheService::StubInterface::GetServerInfo, v1::GetServerInfoRequest(),
             std::min(left, kAttempt), /*wait_for_ready=*/true);
    if (info.ok()) return info;
    if (!IsTransportFailure(info.status())) return info.status();
    if (absl::Now() + kPause >= deadline) {
      return absl::UnavailableError(absl::StrCat("no server: ", info.status().message()));
    }
    absl::SleepFor(kPause);
  }
}

Client::Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Client::~Client() = default;

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const std::string& target,
                                                        const ClientOptions& options) {
  CKV_ASSIGN_OR_RETURN(const auto channel, MakeChannel(target, options.tls));
  return Connect(channel, options);
}

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(std::shared_ptr<grpc::Channel> channel,
                                                        const ClientOptions& options) {
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->channel = channel;
  impl->cache = v1::CacheService::NewStub(channel);
  const bool as_calls = options.connect_timeout == absl::ZeroDuration();
  const absl::Time deadline =
      absl::Now() + (as_calls ? options.call_timeout : options.connect_timeout);
  CKV_ASSIGN_OR_RETURN(impl->server_info, impl->WaitForServer(deadline));
  if (options.session && impl->server_info.draining()) {
    return Error(v1::DRAINING, "the server is draining and takes no new sessions");
  }
  if (options.session) {
    impl->session =
        std::make_unique<SessionStream>(channel, options.worker_name, options.on_notice);
    CKV_RETURN_IF_ERROR(impl->session->WaitUntilOpen(0, deadline - absl::Now()));
  }
  return std::unique_ptr<Client>(new Client(std::move(impl)));
}

v1::ServerInfo Client::server_info() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->server_info;
}

uint64_t Client::session_id() const {
  return impl_->session == nullptr ? 0 : impl_->session->session_id();
}

absl::Duration Client::call_timeout() const { return impl_->options.call_timeout; }

absl::Status Client::Reconnect(absl::Duration timeout, bool* restarted) {
  const absl::Time deadline = absl::Now() + timeout;
  CKV_ASSIGN_OR_RETURN(v1::ServerInfo info, impl_->WaitForServer(deadline));
  if (impl_->session != nullptr) {
    CKV_RETURN_IF_ERROR(impl_->session->WaitUntilOpen(info.boot_id(), deadline - absl::Now()));
  }
  std::lock_guard lock(impl_->mutex);
  if (restarted != nullptr) *restarted = info.boot_id() != impl_->server_info.boot_id();
  impl_->server_info = std::move(info);
  return absl::OkStatus();
}

v1::CacheService::StubInterface& Client::cache() { return *impl_->cache; }

std::unique_ptr<grpc::ClientContext> Client::MakeContext() const {
  return ContextWithTimeout(impl_->options.call_timeout);
}

absl::StatusOr<v1::Sequence> Client::OpenSequence(const v1::OpenSequenceRequest& request) {
  if (!impl_->options.open_here || request.without_shards_size() > 0) {
    return impl_->Call(&v1::CacheService::StubInterface::OpenSequence, request, call_timeout());
  }
  v1::OpenSequenceRequest here = request;
  const v1::ServerInfo info = server_info();
  for (const v1::Shard& shard : info.shards()) {
    if (shard.name() != info.shard()) here.add_without_shards(shard.name());
  }
  return impl_->Call(&v1::CacheService::StubInterface::OpenSequence, here, call_timeout());
}

absl::StatusOr<v1::Sequence> Client::SealSequence(const v1::SequenceHandle& sequence,
                                                  absl::Duration timeout) {
  v1::SealSequenceRequest request;
  *request.mutable_sequence() = sequence;
  return impl_->Call(&v1::CacheService::StubInterface::SealSequence, request, timeout);
}

absl::StatusOr<v1::Sequence> Client::GetSequence(const v1::SequenceHandle& sequence) {
  v1::GetSequenceRequest request;
  *request.mutable_sequence() = sequence;
  return impl_->Call(&v1::CacheService::StubInterface::GetSequence, request, call_timeout());
}

absl::StatusOr<v1::Sequence> Client::ForkSequence(const v1::ForkSequenceRequest& request) {
  return impl_->Call(&v1::CacheService::StubInterface::ForkSequence, request, call_timeout());
}

absl::StatusOr<std::vector<v1::Sequence>> Client::ListSequences(const std::string& prefix) {
  std::vector<v1::Sequence> sequences;
  v1::ListSequencesRequest request;
  request.set_prefix(prefix);
  request.set_page_size(1000);
  do {
    CKV_ASSIGN_OR_RETURN(
        v1::ListSequencesResponse page,
        impl_->Call(&v1::CacheService::StubInterface::ListSequences, request, call_timeout()));
    for (v1::Sequence& sequence : *page.mutable_sequences()) {
      sequences.push_back(std::move(sequence));
    }
    if (page.next_page_token() == request.page_token() && !page.next_page_token().empty()) {
      return absl::InternalError("ListSequences: the server's pages do not advance");
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return sequences;
}

absl::Status Client::ReleaseSequence(const v1::SequenceHandle& sequence) {
  v1::ReleaseSequenceRequest request;
  *request.mutable_sequence() = sequence;
  absl::Status status =
      impl_->Call(&v1::CacheService::StubInterface::ReleaseSequence, request, call_timeout())
          .status();
  // It is not here, whoever would own it.
  if (impl_->options.open_here && ReasonOf(status) == v1::NOT_OWNER) return absl::OkStatus();
  return status;
}

absl::StatusOr<v1::SelectClustersResponse> Client::SelectClusters(
    const v1::SelectClustersRequest& request) {
  return impl_->Call(&v1::CacheService::StubInterface::SelectClusters, request, call_timeout());
}

absl::StatusOr<v1::AppendKvResponse> Client::AppendKv(const v1::AppendKvRequest& request) {
  return impl_->Call(&v1::CacheService::StubInterface::AppendKv, request, call_timeout());
}

}  // namespace clusterkv::worker
