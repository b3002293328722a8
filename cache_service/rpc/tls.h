// The server's certificates: read from files, checked, and read again when the files change.
//
// Every handshake sees what the files hold at that moment: a certificate is changed by replacing
// its files, without a restart and without a moment in which a connection fails. What is not whole
// (a key that is not the certificate's, a file half written, a certificate out of its time) is
// never taken: the last good one stays in use, and is told in the log. Open connections live on.
//
// Sessions of clients that show certificates are not resumed: each connection shows one that is
// good now.
//
// Thread-safe. Files are read on the thread that accepts, only when one changed.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_TLS_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cache_service/config.h"

namespace clusterkv::cache_service {

class TlsFiles : public std::enable_shared_from_this<TlsFiles> {
 public:
  // What a handshake uses. Immutable.
  struct Material {
    std::string certificates, key, client_ca;  // PEM
    absl::Time expiry;                         // of the server's own certificate
    uint64_t version = 0;                      // counts what was taken, from 1
  };

  // Errors: InvalidArgument naming file and fault.
  static absl::StatusOr<std::shared_ptr<TlsFiles>> Load(const TlsOptions& options);

  // For one port of a gRPC server.
  std::shared_ptr<grpc::ServerCredentials> Credentials();

  // What the files hold now if it is good, else the last good.
  std::shared_ptr<const Material> Current() ABSL_LOCKS_EXCLUDED(mutex_);

  const TlsOptions& options() const { return options_; }
  struct Counts {
    uint64_t reloads = 0;   // changes that were taken
    uint64_t failures = 0;  // changes that were not
    absl::Time expiry;
  };
  Counts counts() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  explicit TlsFiles(const TlsOptions& options) : options_(options) {}
  // Of all files: changes when one of them is replaced or written.
  std::string Stamp() const;
  absl::StatusOr<Material> Read() const;
  void Refresh() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const TlsOptions options_;
  absl::Mutex mutex_;
  std::string stamp_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<const Material> material_ ABSL_GUARDED_BY(mutex_);
  uint64_t failures_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_TLS_H_
