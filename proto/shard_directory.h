// The shards of a service as an etcd v3 keeps them: who is there, and one's own entry among them.
//
//   key /PREFIX/NAME   value {"name":"kv-0","address":"kv-0.kv:7400","bootId":"9","draining":true}
//
// Reading: a thread lists the prefix and watches it from the revision after. Whatever ends the
// watch (a connection, etcd's leader, a compaction) is answered by listing anew, at the next
// endpoint, after a pause that grows. Until then the last list stays.
//
// The own entry hangs on a lease, which a second thread keeps alive. A lease that ended and an
// entry that was deleted are made anew; one that a younger process of the same name put is left to
// it.
//
//   after          entry
//   Open           none
//   Register       name, address, boot id, as soon as etcd takes it
//   SetDraining    the same, draining
//   Leave          none: at once where etcd answers, else when the lease ends
//
// Thread-safe. `log` is called from any thread, without a lock.
#ifndef CLUSTERKV_PROTO_SHARD_DIRECTORY_H_
#define CLUSTERKV_PROTO_SHARD_DIRECTORY_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "proto/client_credentials.h"

namespace clusterkv {

struct EtcdOptions {
  std::vector<std::string> endpoints;  // "host:port", at least one
  std::string prefix = "clusterkv";    // as IsEtcdPrefix has it
  ClientTls tls;
  // Told what happens; is_fault: somebody should look. May be null.
  std::function<void(bool is_fault, const std::string& event)> log;
};

// One or more words of a-z, A-Z, 0-9, '.', '-', '_', with a '/' between two.
bool IsEtcdPrefix(std::string_view prefix);
// "etcd://HOST:PORT,HOST:PORT/PREFIX"; without prefix the default. Errors: InvalidArgument.
absl::StatusOr<EtcdOptions> ParseEtcdTarget(std::string_view target);
bool IsEtcdTarget(std::string_view target);

class ShardDirectory {
 public:
  // Waits up to `timeout` for the first list, which may be empty. Errors: Unavailable when etcd
  // does not give one; InvalidArgument for options of wrong form; as MakeCredentials.
  static absl::StatusOr<std::unique_ptr<ShardDirectory>> Open(const EtcdOptions& options,
                                                              absl::Duration timeout);
  // Leaves.
  ~ShardDirectory();

  // By name, as last heard; from Register to Leave with the own one, whatever etcd says.
  std::vector<v1::Shard> Current() const;
  // Waits until `wanted` holds for the list. Returns whether it did.
  bool Await(const std::function<bool(const std::vector<v1::Shard>&)>& wanted,
             absl::Duration timeout) const;

  // Puts and keeps self's entry. lease_ttl: how long it outlives this process, whole seconds; etcd
  // takes no less than 2. Once.
  void Register(const v1::Shard& self, absl::Duration lease_ttl);
  void SetDraining();
  // Takes the entry back, waiting for etcd a second at most. Idempotent; the list is followed on.
  void Leave();

  struct State {
    bool connected = false;    // the list is watched
    bool registered = false;   // the own entry is there and its lease has not ended
    uint64_t reconnects = 0;   // watches that had to be begun anew
    uint64_t lost_leases = 0;  // that ended while the process lived
    absl::Time away_since;     // while not connected
    std::string error;         // the last one, while not connected
  };
  State state() const;

 private:
  struct Impl;
  explicit ShardDirectory(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv

#endif  // CLUSTERKV_PROTO_SHARD_DIRECTORY_H_
