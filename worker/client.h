// A worker's connection to one server: channel, session, typed errors, reconnect.
//
// Thread-safe. One Client per process and server is enough; PrefillWriter and DecodeSession share
// it.
//
// The session lives on a thread of the client: heartbeats, notices, and when its stream breaks,
// attempts to resume it until the client dies. A server that comes back with another boot id gets a
// new session; what belonged to the old one is gone there, and handles with the old boot id are
// refused with STALE_BOOT_ID. The typed errors are the only way a caller learns of it; nothing is
// retried here.
#ifndef CLUSTERKV_WORKER_CLIENT_H_
#define CLUSTERKV_WORKER_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "clusterkv/v1/cache_service.grpc.pb.h"
#include "clusterkv/v1/session_service.grpc.pb.h"
#include "proto/client_credentials.h"

namespace clusterkv::worker {

using TlsOptions = ClientTls;

struct ClientOptions {
  std::string worker_name = "worker";
  bool session = true;  // keep a liveness session; its loss is told by errors and on_notice
  absl::Duration call_timeout = absl::Seconds(30);
  absl::Duration connect_timeout = absl::ZeroDuration();  // of Connect; zero: call_timeout
  // Where the server knows of other shards: sequences are opened here all the same, whoever owns
  // them, and one that is not here counts as released. False: NOT_OWNER names the owner (Shards,
  // shards.h, goes there).
  bool open_here = true;
  TlsOptions tls;       // of channels that the client makes itself
  TlsOptions etcd_tls;  // of Shards that know each other by etcd
  std::function<void(const v1::SessionResponse::Notice&)> on_notice;  // may be null; must not block
};

class Client {
 public:
  // Connects (waits up to connect_timeout) and learns what the server is. target: "host:port" or
  // "unix:path". Errors: Unavailable; as MakeCredentials; DRAINING when it takes no new session.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const std::string& target,
                                                         const ClientOptions& options = {});
  // The same over a given channel, for servers in this process.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(std::shared_ptr<grpc::Channel> channel,
                                                         const ClientOptions& options = {});
  ~Client();

  v1::ServerInfo server_info() const;  // as of the last (re)connect
  uint64_t session_id() const;         // 0: none, or its stream is broken just now
  absl::Duration call_timeout() const;

  // After Unavailable or STALE_BOOT_ID: waits until the server answers and the session stands
  // again, a new one if the boot id changed. *restarted (may be null) says whether it changed since
  // the last (re)connect by anyone: then sequences and attachments are gone. Who shares a client
  // compares its handles' boot id with server_info() instead. Errors: Unavailable when the timeout
  // passes.
  absl::Status Reconnect(absl::Duration timeout, bool* restarted);

  v1::CacheService::StubInterface& cache();
  // A context with deadline, for calls on the stub.
  std::unique_ptr<grpc::ClientContext> MakeContext() const;

  // Unary calls with errors converted (proto/error.h: ReasonOf, MetadataOf).
  absl::StatusOr<v1::Sequence> OpenSequence(const v1::OpenSequenceRequest& request);
  absl::StatusOr<v1::Sequence> SealSequence(const v1::SequenceHandle& sequence,
                                            absl::Duration timeout);
  absl::StatusOr<v1::Sequence> GetSequence(const v1::SequenceHandle& sequence);
  absl::StatusOr<v1::Sequence> ForkSequence(const v1::ForkSequenceRequest& request);
  absl::StatusOr<std::vector<v1::Sequence>> ListSequences(const std::string& prefix);  // all pages
  absl::Status ReleaseSequence(const v1::SequenceHandle& sequence);
  absl::StatusOr<v1::SelectClustersResponse> SelectClusters(
      const v1::SelectClustersRequest& request);
  absl::StatusOr<v1::AppendKvResponse> AppendKv(const v1::AppendKvRequest& request);

 private:
  struct Impl;
  explicit Client(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_CLIENT_H_
