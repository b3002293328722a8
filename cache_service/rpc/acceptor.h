// The server's own accept loop: sockets are bound, accepted and counted here, and handed to gRPC.
//
// gRPC 1.51's listener goes deaf for good once accept4 fails for want of file descriptors, and
// knows no limit on connections (CVE-2023-4785). Here a connection over the limit is closed at
// once, and when descriptors run out a reserved one is spent to take the connection and close it.
//
// Thread-safe. One thread polls all listeners.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_ACCEPTOR_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_ACCEPTOR_H_

#include <grpcpp/server_builder.h>
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/telemetry/server_metrics.h"

namespace clusterkv::cache_service {

// A file descriptor; closes it.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor() { Reset(); }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  int Release();
  void Reset();

 private:
  int fd_ = -1;
};

// A bound, listening socket.
class ListenSocket {
 public:
  // address: host:port (IPv4, [IPv6] or a name; port 0: any free one) or unix:path.
  // Errors: Unavailable when it cannot be bound.
  static absl::StatusOr<ListenSocket> Create(const std::string& address);
  ListenSocket(ListenSocket&&) = default;
  ListenSocket& operator=(ListenSocket&&) = default;
  int fd() const { return fd_.get(); }
  int port() const { return port_; }                       // 0 for unix:path
  const std::string& address() const { return address_; }  // with the real port

 private:
  ListenSocket() = default;
  FileDescriptor fd_;
  int port_ = 0;
  std::string address_;
};

// Raises the limit of open files to the hard one. Best effort.
void RaiseOpenFileLimit();

class Acceptor {
 public:
  using Handler = grpc::experimental::ExternalConnectionAcceptor;

  // Where the connections of a socket go.
  struct Listener {
    ListenSocket socket;
    std::unique_ptr<Handler> handler;
  };

  // max_connections: of all listeners together. `metrics` outlives the acceptor.
  static absl::StatusOr<std::unique_ptr<Acceptor>> Start(std::vector<Listener> listeners,
                                                         int64_t max_connections,
                                                         ServerMetrics* metrics);
  ~Acceptor();

  // No connection is taken any more; listening sockets are closed. Open ones stay. Idempotent.
  void Stop();
  // Open connections now.
  int64_t connections() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  // An accepted socket that belongs to gRPC now: known by descriptor, device and inode, so that a
  // number that was closed and used again is not mistaken for it.
  struct Connection {
    int fd;
    dev_t device;
    ino_t inode;
  };

  Acceptor(std::vector<Listener> listeners, int64_t max_connections, ServerMetrics* metrics);
  void Loop();
  // False: nothing more to accept for now.
  bool AcceptOne(Listener& listener);
  void RefuseForWantOfDescriptors(Listener& listener);
  bool Admit(int fd) ABSL_LOCKS_EXCLUDED(mutex_);
  void ForgetClosed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::vector<Listener> listeners_;
  const int64_t max_connections_;
  ServerMetrics* const metrics_;
  FileDescriptor wake_;     // an eventfd: Stop
  FileDescriptor reserve_;  // spent when descriptors run out
  absl::Mutex mutex_;
  std::vector<Connection> connections_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_ACCEPTOR_H_
