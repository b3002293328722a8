#include "cache_service/server.h"

#include <google/protobuf/stubs/common.h>
#if GOOGLE_PROTOBUF_VERSION < 4022000
#include <google/protobuf/stubs/logging.h>
#endif
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include <atomic>
#include <utility>
#include <vector>

#include "absl/base/call_once.h"
#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "cache_service/rpc/acceptor.h"
#include "cache_service/rpc/admin_service_rpc.h"
#include "cache_service/rpc/cache_service_rpc.h"
#include "cache_service/rpc/reflection_rpc.h"
#include "cache_service/rpc/rpc_context.h"
#include "cache_service/rpc/session_service_rpc.h"
#include "cache_service/rpc/spinning_poll.h"
#include "cache_service/rpc/tls.h"
#include "cache_service/telemetry/log.h"
#include "cache_service/telemetry/server_metrics.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

// A message of max_chunk_bytes and more than any other fits, so that a chunk that is too large is
// refused by our own error, not by the library's.
constexpr int kMaxMessageBytes = (8 << 20) + (64 << 10);
constexpr int kMaxMetadataBytes = 16 << 10;
constexpr int kMaxConcurrentStreams = 256;  // of one connection
constexpr int kHandshakeTimeoutMs = 10'000;
// A worker that vanished without closing is noticed within 40 s; clients may ping every 10 s.
constexpr int kKeepaliveMs = 30'000, kKeepaliveTimeoutMs = 10'000, kMinPingIntervalMs = 10'000;

// A server that starts without a list would not know what is its own.
constexpr absl::Duration kEtcdTimeout = absl::Seconds(30);

constexpr absl::Duration kDrainPoll = absl::Milliseconds(5);

// One port: its gRPC server and where its connections come in.
struct Port {
  grpc::CallbackGenericService unknown;  // UNIMPLEMENTED for all that is not served
  std::vector<std::unique_ptr<grpc::Service>> reflection;  // outlives the server
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<Acceptor::Handler> handler;

  absl::Status Build(const std::vector<grpc::Service*>& services, std::vector<std::string> names,
                     bool with_reflection, std::shared_ptr<grpc::ServerCredentials> credentials);
  void SetHealth(const std::string& service, bool serving) {
    server->GetHealthCheckService()->SetServingStatus(service, serving);
  }
};

absl::Status Port::Build(const std::vector<grpc::Service*>& services,
                         std::vector<std::string> names, bool with_reflection,
                         std::shared_ptr<grpc::ServerCredentials> credentials) {
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxConcurrentStreams);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingIntervalMs);
  for (grpc::Service* service : services) builder.RegisterService(service);
  names.push_back("grpc.health.v1.Health");
  if (with_reflection) {
    names.push_back("grpc.reflection.v1.ServerReflection");
    names.push_back("grpc.reflection.v1alpha.ServerReflection");
    reflection = MakeReflectionServices(names);
    for (const auto& service : reflection) builder.RegisterService(service.get());
  }
  // A server of health alone has no method of the callback API, without which gRPC starts none.
  if (services.empty()) builder.RegisterCallbackGenericService(&unknown);
  handler = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
      std::move(credentials));
  server = builder.BuildAndStart();
  if (server == nullptr) return absl::UnavailableError("gRPC refused to start a server");
  for (const char* service : {"", "liveness", "readiness"}) SetHealth(service, true);
  return absl::OkStatus();
}

}  // namespace

struct Server::Impl {
  ~Impl() {
    Shutdown(absl::ZeroDuration());
    absl::MutexLock lock(&ports_mutex);
    ports_ended = true;
  }

  absl::Status Start(const Config& config, std::unique_ptr<ShardDevice> device);
  absl::Status BuildPorts(const Config& config);
  absl::Status Listen(const Config& config);
  // Those that have a server.
  std::vector<Port*> Ports();
  void NotServing();
  void DeviceFailed(const absl::Status& why);
  void BeginDrain();
  void Shutdown(absl::Duration grace);

  ServerMetrics metrics;
  RpcContext rpc;
  absl::Duration drain_delay, drain_timeout;
  std::string address, admin_address;
  int port = 0, admin_port = 0, health_port = 0;

  // The shard's device may fail while the server ends: these outlive it.
  absl::Mutex ports_mutex;
  bool ports_ended ABSL_GUARDED_BY(ports_mutex) = false;
  // The shard's last answers still go by the tenants' views of it: they end after it.
  std::unique_ptr<Tenants> tenants;
  // In the order of construction: what stands below uses what stands above.
  std::unique_ptr<ShardList> shards;  // null: there are no others
  std::unique_ptr<Shard> shard;
  std::unique_ptr<CacheServiceRpc> cache_service;
  std::unique_ptr<SessionServiceRpc> session_service;
  std::unique_ptr<AdminServiceRpc> admin_service;
  std::shared_ptr<TlsFiles> tls;  // null: no TLS
  Port data, admin;
  Port health;  // has no server unless it was asked for
  std::unique_ptr<Acceptor> acceptor;
  std::unique_ptr<MetricsEndpoint> metrics_endpoint;
  absl::once_flag shutdown_once;
};

absl::Status Server::Impl::Start(const Config& config, std::unique_ptr<ShardDevice> device) {
  static absl::once_flag process_once;
  absl::call_once(process_once, [] {
    RaiseOpenFileLimit();
    grpc::EnableDefaultHealthCheckService(true);
#if GOOGLE_PROTOBUF_VERSION < 4022000
    google::protobuf::SetLogHandler(nullptr);  // a line for every bad string of a client
#endif
  });
  SetPollSpin(config.spin);
  SetPromptPolls(!config.tenants.empty());  // a quiet tenant's call is known when it comes
  if (!config.shards_file.empty()) {
    CKV_ASSIGN_OR_RETURN(shards, ShardList::Load(config.shards_file, config.shard_name));
  } else if (!config.etcd.endpoints.empty()) {
    CKV_ASSIGN_OR_RETURN(shards, ShardList::Follow(config.etcd, config.shard_name,
                                                   config.etcd_lease_ttl, kEtcdTimeout));
  }
  const bool has_device = device != nullptr;
  if (has_device) device->OnFailure([this](const absl::Status& why) { DeviceFailed(why); });
  ShardOptions options = config.shard;
  options.selects_give_way = !config.tenants.empty();
  CKV_ASSIGN_OR_RETURN(shard, Shard::Create(options, std::move(device)));
  rpc.device = shard->device_name();
  drain_delay = config.drain_delay;
  drain_timeout = config.drain_timeout;
  rpc.shard = shard.get();
  if (!config.tenants.empty()) {
    tenants = std::make_unique<Tenants>(config.tenants, shard.get());
    rpc.tenants = tenants.get();
  }
  rpc.shards = shards.get();
  rpc.admin_identities = config.admin_identities;
  rpc.metrics = &metrics;
  rpc.version = CLUSTERKV_VERSION;
  rpc.max_chunk_bytes = config.max_chunk_bytes;
  rpc.max_batch_items = config.max_batch_items;
  rpc.default_deadline = config.default_deadline;
  rpc.drain_timeout = config.drain_timeout;

  cache_service = std::make_unique<CacheServiceRpc>(rpc);
  session_service = std::make_unique<SessionServiceRpc>(rpc);
  admin_service = std::make_unique<AdminServiceRpc>(rpc, [this] { BeginDrain(); });
  CKV_RETURN_IF_ERROR(BuildPorts(config));
  if (has_device) {
    for (Port* port : Ports()) port->SetHealth("device", true);
  }
  CKV_RETURN_IF_ERROR(Listen(config));
  if (shards != nullptr) {
    const std::string& given = config.advertise_address;
    shards->Enter(given.empty() ? address : given, shard->boot_id());
  }
  return absl::OkStatus();
}

absl::Status Server::Impl::BuildPorts(const Config& config) {
  if (config.tls.enabled()) {
    CKV_ASSIGN_OR_RETURN(tls, TlsFiles::Load(config.tls));
  }
  const auto credentials = [this] {
    return tls == nullptr ? grpc::InsecureServerCredentials() : tls->Credentials();
  };
  CKV_RETURN_IF_ERROR(data.Build({cache_service.get(), session_service.get()},
                                 {"clusterkv.v1.CacheService", "clusterkv.v1.SessionService"},
                                 config.reflection, credentials()));
  CKV_RETURN_IF_ERROR(admin.Build({admin_service.get()}, {"clusterkv.v1.AdminService"},
                                  config.reflection, credentials()));
  if (config.health_listen.empty()) return absl::OkStatus();
  return health.Build({}, {}, /*with_reflection=*/false, grpc::InsecureServerCredentials());
}

std::vector<Port*> Server::Impl::Ports() {
  std::vector<Port*> ports;
  for (Port* port : {&data, &admin, &health}) {
    if (port->server != nullptr) ports.push_back(port);
  }
  return ports;
}

absl::Status Server::Impl::Listen(const Config& config) {
  CKV_ASSIGN_OR_RETURN(ListenSocket data_socket, ListenSocket::Create(config.listen));
  CKV_ASSIGN_OR_RETURN(ListenSocket admin_socket, ListenSocket::Create(config.admin_listen));
  address = data_socket.address();
  admin_address = admin_socket.address();
  port = data_socket.port();
  admin_port = admin_socket.port();
  std::vector<Acceptor::Listener> listeners;
  listeners.push_back({std::move(data_socket), std::move(data.handler)});
  listeners.push_back({std::move(admin_socket), std::move(admin.handler)});
  if (health.server != nullptr) {
    CKV_ASSIGN_OR_RETURN(ListenSocket socket, ListenSocket::Create(config.health_listen));
    health_port = socket.port();
    listeners.push_back({std::move(socket), std::move(health.handler)});
  }
  CKV_ASSIGN_OR_RETURN(acceptor,
                       Acceptor::Start(std::move(listeners), config.max_connections, &metrics));
  if (config.metrics_listen.empty()) return absl::OkStatus();
  MetricsEndpoint::Source source;
  source.metrics = &metrics;
  source.stats = [this] { return rpc.Stats(); };
  source.connections = [this] { return acceptor->connections(); };
  CKV_ASSIGN_OR_RETURN(metrics_endpoint,
                       MetricsEndpoint::Start(config.metrics_listen, std::move(source)));
  return absl::OkStatus();
}

void Server::Impl::NotServing() {
  if (shards != nullptr) shards->SetDraining();
  for (Port* port : Ports()) {
    port->SetHealth("", false);
    port->SetHealth("readiness", false);
  }
}

void Server::Impl::DeviceFailed(const absl::Status& why) {
  Log(LogLevel::kError, "device failed, the host answers for it",
      {{"device", rpc.device}, {"reason", why.ToString()}});
  absl::MutexLock lock(&ports_mutex);
  if (ports_ended) return;
  for (Port* port : Ports()) port->SetHealth("device", false);
}

void Server::Impl::BeginDrain() {
  NotServing();
  shard->StartDrain();
}

void Server::Impl::Shutdown(absl::Duration grace) {
  absl::call_once(shutdown_once, [this, grace] {
    metrics_endpoint.reset();
    if (shards != nullptr) shards->Leave();
    if (acceptor != nullptr) acceptor->Stop();
    rpc.streams.EndAll(Error(v1::DRAINING, "server: shutting down; reconnect to another"));
    // gRPC's own shutdown cuts in-process streams at once: their reason must have left before.
    const absl::Time limit = absl::Now() + grace;
    rpc.streams.AwaitNone(grace);
    const auto deadline = absl::ToChronoTime(limit);
    for (Port* port : Ports()) port->server->Shutdown(deadline);
    // Work that calls left behind answers to reactors that are gone by then, or is dropped with the
    // shard.
    for (Port* port : Ports()) port->server->Wait();
  });
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() = default;

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Config& config) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<ShardDevice> device, MakeShardDevice(config.device));
  return Start(config, std::move(device));
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Config& config,
                                                      std::unique_ptr<ShardDevice> device) {
  auto impl = std::make_unique<Impl>();
  CKV_RETURN_IF_ERROR(impl->Start(config, std::move(device)));
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

const std::string& Server::address() const { return impl_->address; }
const std::string& Server::admin_address() const { return impl_->admin_address; }
int Server::port() const { return impl_->port; }
int Server::admin_port() const { return impl_->admin_port; }
int Server::metrics_port() const {
  return impl_->metrics_endpoint == nullptr ? 0 : impl_->metrics_endpoint->port();
}
int Server::health_port() const { return impl_->health_port; }
Shard& Server::shard() { return *impl_->shard; }

std::shared_ptr<grpc::Channel> Server::InProcessChannel() {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  return impl_->data.server->InProcessChannel(arguments);
}

std::shared_ptr<grpc::Channel> Server::InProcessAdminChannel() {
  return impl_->admin.server->InProcessChannel(grpc::ChannelArguments());
}

void Server::BeginDrain() { impl_->BeginDrain(); }

bool Server::Drain() {
  impl_->NotServing();
  absl::SleepFor(impl_->drain_delay);
  impl_->BeginDrain();
  const absl::Time limit = absl::Now() + impl_->drain_timeout;
  while (!impl_->shard->Idle() || impl_->shard->InUse()) {
    if (absl::Now() >= limit) return false;
    absl::SleepFor(kDrainPoll);
  }
  return true;
}

void Server::Shutdown(absl::Duration grace) { impl_->Shutdown(grace); }

std::string VersionText() {
  return std::string("clusterkv-server ") + CLUSTERKV_VERSION + "\ngRPC " + grpc::Version() +
         ", Protobuf " + std::to_string(GOOGLE_PROTOBUF_VERSION / 1000000) + "." +
         std::to_string(GOOGLE_PROTOBUF_VERSION / 1000 % 1000) + "." +
         std::to_string(GOOGLE_PROTOBUF_VERSION % 1000) + "\n";
}

}  // namespace clusterkv::cache_service
