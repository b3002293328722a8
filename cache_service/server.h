// The server: a shard behind its ports.
//
// Data port: CacheService, SessionService. Admin port: AdminService. Both: grpc.health.v1 (services
// "", "liveness", "readiness", and "device" where there is one) and reflection. /metrics where
// asked for. With certificates both ports speak TLS; for probes, which cannot, there is a health
// port with grpc.health.v1 alone.
//
// A device that fails is no end of service: the host holds everything and answers everything, at a
// host's speed. Health "device" says NOT_SERVING from then on, the log why, once; whether it is
// worth the sequences' loss to restart the process, its operator decides.
//
//   state      health ""/readiness   new sequences, sessions   calls
//   serving    SERVING               taken                     answered
//   draining   NOT_SERVING           DRAINING                  answered
//   shut       -                     -                         refused; streams ended with DRAINING
//
// Thread-safe. gRPC and the metrics library stay out of this header.
#ifndef CLUSTERKV_CACHE_SERVICE_SERVER_H_
#define CLUSTERKV_CACHE_SERVICE_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "cache_service/config.h"
#include "cache_service/shard.h"

namespace grpc {
class Channel;
}

namespace clusterkv::cache_service {

class Server {
 public:
  // Allocates the arena, binds the ports, serves. When it returns calls are answered.
  // Errors: Unavailable when an address cannot be bound; InvalidArgument when a certificate is no
  // good; as Shard::Create.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Config& config);
  // The same with another device than config.device says; null: none.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const Config& config,
                                                       std::unique_ptr<ShardDevice> device);
  // Shuts down at once, if Shutdown was not called.
  ~Server();

  // As bound: with the real port where port 0 was asked for.
  const std::string& address() const;
  const std::string& admin_address() const;
  int port() const;
  int admin_port() const;
  int metrics_port() const;  // 0: no /metrics
  int health_port() const;   // 0: none, or a Unix socket

  // Channels to the data and the admin port of this very process, without sockets.
  std::shared_ptr<grpc::Channel> InProcessChannel();
  std::shared_ptr<grpc::Channel> InProcessAdminChannel();

  // Says NOT_SERVING, refuses new sequences, attachments and sessions, tells open sessions. Does
  // not block; idempotent.
  void BeginDrain();
  // The whole orderly end but Shutdown: NOT_SERVING, drain_delay, BeginDrain, then waits until
  // nothing is queued or running and no session uses a sequence (Shard::InUse), up to
  // drain_timeout. Returns whether it got there. Blocks.
  bool Drain();
  // Ends open streams with DRAINING, gives other calls `grace` to end, and closes everything.
  // Blocks; idempotent.
  void Shutdown(absl::Duration grace = absl::Milliseconds(500));

  Shard& shard();

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The project's version, and the libraries' that it was built with.
std::string VersionText();

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SERVER_H_
