#include "worker/ckv/connection.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <utility>

#include "proto/grpc_status.h"
#include "worker/ckv/exit_code.h"

namespace clusterkv::worker::ckv {
namespace {

std::unique_ptr<grpc::ClientContext> Context(absl::Duration timeout) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout));
  return context;
}

}  // namespace

void RegisterTls(FlagSet& flags, TlsOptions* tls) {
  flags.String("tls_ca", "FILE", &tls->ca_file,
               "who signed the server's certificate, PEM; without it there is no TLS");
  flags.String("tls_cert", "FILE", &tls->certificate_file, "the certificate to show, PEM");
  flags.String("tls_key", "FILE", &tls->key_file, "its private key, PEM");
  flags.String("tls_server_name", "NAME", &tls->server_name,
               "the name in the server's certificate, where it is not the address's");
}

void ServerFlags::Register(FlagSet& flags) {
  RegisterTls(flags, &tls);
  flags.String("server", "HOST:PORT", &server, "the server's data port");
  flags.Duration("connect_timeout", &connect_timeout, "how long to wait for a connection");
}

void PlaceFlags::Register(FlagSet& flags) {
  ServerFlags::Register(flags);
  flags.String("servers", "HOST:PORT,…", &servers,
               "instead: shards, a name of all, or etcd://HOST:PORT/PREFIX; each sequence goes to "
               "the one that owns it");
  flags.String("etcd_ca", "FILE", &etcd_tls.ca_file,
               "who signed etcd's certificate, PEM; without it there is no TLS to etcd");
  flags.String("etcd_cert", "FILE", &etcd_tls.certificate_file,
               "the certificate to show etcd, PEM");
  flags.String("etcd_key", "FILE", &etcd_tls.key_file, "its private key, PEM");
}

void AdminFlags::Register(FlagSet& flags, bool required, const ServerFlags* server) {
  server_ = server;
  if (server == nullptr) RegisterTls(flags, &own_tls_);
  if (required) admin = "127.0.0.1:7401";
  flags.String("admin", "HOST:PORT", &admin,
               required ? "the server's admin port" : "the server's admin port, for more figures");
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& target,
                                                           const TlsOptions& tls,
                                                           absl::Duration timeout) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  auto credentials = MakeCredentials(tls, &arguments);
  if (!credentials.ok()) return ConnectError(target, credentials.status());
  auto channel = grpc::CreateCustomChannel(target, *credentials, arguments);
  const auto deadline = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout);
  if (!channel->WaitForConnected(deadline)) {
    return ConnectError(
        target, absl::UnavailableError("no answer within " + absl::FormatDuration(timeout)));
  }
  return channel;
}

absl::StatusOr<std::unique_ptr<Client>> ConnectClient(const ServerFlags& flags, bool session) {
  auto channel = OpenChannel(flags.server, flags.tls, flags.connect_timeout);
  if (!channel.ok()) return channel.status();
  ClientOptions options;
  options.worker_name = "ckv";
  options.session = session;
  auto client = Client::Connect(*std::move(channel), options);
  if (!client.ok()) return ConnectError(flags.server, client.status());
  return client;
}

absl::StatusOr<std::unique_ptr<Places>> Places::Connect(const PlaceFlags& flags, bool session) {
  std::unique_ptr<Places> places(new Places());
  if (flags.servers.empty()) {
    auto client = ConnectClient(flags, session);
    if (!client.ok()) return client.status();
    places->own_client_ = *std::move(client);
    places->client_ = places->own_client_.get();
    return places;
  }
  ClientOptions options;
  options.worker_name = "ckv";
  options.session = session;
  options.tls = flags.tls;
  options.etcd_tls = flags.etcd_tls;
  options.connect_timeout = flags.connect_timeout;
  auto shards = Shards::Connect(flags.servers, options);
  if (!shards.ok()) return ConnectError(flags.servers, shards.status());
  places->shards_ = *std::move(shards);
  return places;
}

absl::StatusOr<PlacedSequence> Places::OpenSequence(v1::OpenSequenceRequest request) {
  if (shards_ != nullptr) return shards_->OpenSequence(std::move(request));
  request.set_session_id(client_->session_id());
  auto opened = client_->OpenSequence(request);
  if (!opened.ok()) return opened.status();
  return PlacedSequence{client_, *std::move(opened)};
}

absl::Status Places::ReleaseSequence(const v1::SequenceHandle& sequence) {
  return shards_ != nullptr ? shards_->ReleaseSequence(sequence)
                            : client_->ReleaseSequence(sequence);
}

absl::StatusOr<std::vector<v1::Sequence>> Places::ListSequences(const std::string& prefix) {
  return shards_ != nullptr ? shards_->ListSequences(prefix) : client_->ListSequences(prefix);
}

absl::StatusOr<std::vector<PlacedSequence>> Places::ListPlaced(const std::string& prefix) {
  auto sequences = ListSequences(prefix);
  if (!sequences.ok()) return sequences.status();
  std::vector<PlacedSequence> placed;
  placed.reserve(sequences->size());
  for (v1::Sequence& sequence : *sequences) {
    if (shards_ == nullptr) {
      placed.push_back({client_, std::move(sequence)});
      continue;
    }
    auto found = shards_->FindSequence(sequence.handle());
    if (found.ok()) {
      placed.push_back(*std::move(found));
    } else if (found.status().code() != absl::StatusCode::kNotFound &&
               found.status().code() != absl::StatusCode::kFailedPrecondition) {
      return found.status();
    }
  }
  return placed;
}

AdminClient::AdminClient(std::shared_ptr<grpc::Channel> channel)
    : channel_(std::move(channel)), stub_(v1::AdminService::NewStub(channel_)) {}

absl::StatusOr<std::unique_ptr<AdminClient>> AdminClient::Connect(const AdminFlags& flags) {
  auto channel = OpenChannel(flags.admin, flags.tls(), flags.connect_timeout);
  if (!channel.ok()) return channel.status();
  return std::unique_ptr<AdminClient>(new AdminClient(*std::move(channel)));
}

absl::StatusOr<v1::Stats> AdminClient::GetStats() {
  v1::Stats stats;
  const auto context = Context(absl::Seconds(10));
  const grpc::Status status = stub_->GetStats(context.get(), v1::GetStatsRequest(), &stats);
  if (!status.ok()) return FromGrpcStatus(status);
  return stats;
}

absl::StatusOr<v1::DrainResponse> AdminClient::Drain(absl::Duration timeout) {
  v1::DrainResponse response;
  const auto context = Context(timeout);
  const grpc::Status status = stub_->Drain(context.get(), v1::DrainRequest(), &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

absl::StatusOr<v1::VerifyLedgerResponse> AdminClient::VerifyLedger(bool checksums) {
  v1::VerifyLedgerRequest request;
  request.set_checksums(checksums);
  v1::VerifyLedgerResponse response;
  const auto context = Context(absl::Minutes(5));
  const grpc::Status status = stub_->VerifyLedger(context.get(), request, &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

std::string StateName(v1::SequenceState state) {
  const std::string name = v1::SequenceState_Name(state);
  constexpr char kPrefix[] = "SEQUENCE_STATE_";
  return name.rfind(kPrefix, 0) == 0 ? name.substr(sizeof(kPrefix) - 1) : name;
}

SequenceGuard::~SequenceGuard() { Release().IgnoreError(); }

absl::Status SequenceGuard::Release() {
  if (client_ == nullptr) return absl::OkStatus();
  return std::exchange(client_, nullptr)->ReleaseSequence(handle_);
}

}  // namespace clusterkv::worker::ckv
