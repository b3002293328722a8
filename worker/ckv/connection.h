// How the commands reach a server: --server (data port) and --admin (admin port).
#ifndef CLUSTERKV_WORKER_CKV_CONNECTION_H_
#define CLUSTERKV_WORKER_CKV_CONNECTION_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/ckv/flags.h"
#include "worker/client.h"
#include "worker/shards.h"

namespace clusterkv::worker::ckv {

// --tls_ca and the other ones: of the data and the admin port alike.
void RegisterTls(FlagSet& flags, TlsOptions* tls);

// The flags that every command with a server has.
struct ServerFlags {
  std::string server = "127.0.0.1:7400";
  TlsOptions tls;
  absl::Duration connect_timeout = absl::Seconds(5);
  void Register(FlagSet& flags);
};

// For commands whose sequences may be spread over shards.
struct PlaceFlags : ServerFlags {
  std::string servers;  // empty: --server alone
  TlsOptions etcd_tls;  // where `servers` is etcd's
  void Register(FlagSet& flags);
};

struct AdminFlags {
  std::string admin;  // empty: none is asked
  absl::Duration connect_timeout = absl::Seconds(5);
  // `server`: of the same command, whose TLS it shares and which outlives the flags; null: it has
  // its own.
  void Register(FlagSet& flags, bool required, const ServerFlags* server = nullptr);
  const TlsOptions& tls() const { return server_ == nullptr ? own_tls_ : server_->tls; }

 private:
  const ServerFlags* server_ = nullptr;
  TlsOptions own_tls_;
};

// A channel that is connected. Errors: ConnectError when no server answers within the timeout; as
// MakeCredentials.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& target,
                                                           const TlsOptions& tls,
                                                           absl::Duration timeout);

// `session`: keep a liveness session; what the client opens and does not seal then ends with it.
absl::StatusOr<std::unique_ptr<Client>> ConnectClient(const ServerFlags& flags, bool session);

// The admin port.
class AdminClient {
 public:
  static absl::StatusOr<std::unique_ptr<AdminClient>> Connect(const AdminFlags& flags);

  absl::StatusOr<v1::Stats> GetStats();
  // Waits at most `timeout` until work in flight is over.
  absl::StatusOr<v1::DrainResponse> Drain(absl::Duration timeout);
  absl::StatusOr<v1::VerifyLedgerResponse> VerifyLedger(bool checksums);

 private:
  explicit AdminClient(std::shared_ptr<grpc::Channel> channel);
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::AdminService::Stub> stub_;
};

// "READY", "FILLING" …
std::string StateName(v1::SequenceState state);

// Where a command's sequences are: on --server, or on the shards that --servers names.
class Places {
 public:
  // `session` as ConnectClient.
  static absl::StatusOr<std::unique_ptr<Places>> Connect(const PlaceFlags& flags, bool session);
  // A client's server, which outlives this.
  explicit Places(Client* client) : client_(client) {}
  // With the session's id, if there is one. Errors: the service's.
  absl::StatusOr<PlacedSequence> OpenSequence(v1::OpenSequenceRequest request);
  absl::Status ReleaseSequence(const v1::SequenceHandle& sequence);
  absl::StatusOr<std::vector<v1::Sequence>> ListSequences(const std::string& prefix);
  // The same, each with its server; without those that were released meanwhile.
  absl::StatusOr<std::vector<PlacedSequence>> ListPlaced(const std::string& prefix);
  Shards* shards() { return shards_.get(); }  // null: one server

 private:
  Places() = default;

  std::unique_ptr<Client> own_client_;
  Client* client_ = nullptr;  // or
  std::unique_ptr<Shards> shards_;
};

// Releases a sequence when it goes out of scope, best effort.
class SequenceGuard {
 public:
  SequenceGuard(Client* client, v1::SequenceHandle handle)
      : client_(client), handle_(std::move(handle)) {}
  ~SequenceGuard();
  SequenceGuard(const SequenceGuard&) = delete;
  SequenceGuard& operator=(const SequenceGuard&) = delete;
  // Releases now. Errors: the service's.
  absl::Status Release();
  // Keeps the sequence.
  void Dismiss() { client_ = nullptr; }

 private:
  Client* client_;
  v1::SequenceHandle handle_;
};

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_CONNECTION_H_
