// The shards that sequences are spread over, and which of them owns a sequence. Thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_SHARD_LIST_H_
#define CLUSTERKV_CACHE_SERVICE_SHARD_LIST_H_

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "clusterkv/v1/admin_service.pb.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "proto/shard_directory.h"

namespace clusterkv::cache_service {

class ShardList {
 public:
  // From a file with a line "NAME HOST:PORT" for each shard; '#' begins a comment. It is read again
  // when it has changed; while it is no good the last good list stays.
  // own_name: of this shard; empty: the host's name. Errors: InvalidArgument naming file, line and
  // fault.
  static absl::StatusOr<std::unique_ptr<ShardList>> Load(const std::string& file,
                                                         const std::string& own_name);
  // From etcd (proto/shard_directory.h), where this shard enters itself when it serves. Waits up to
  // `timeout` for the first list. Errors: InvalidArgument; Unavailable when etcd does not answer.
  static absl::StatusOr<std::unique_ptr<ShardList>> Follow(EtcdOptions options,
                                                           const std::string& own_name,
                                                           absl::Duration lease_ttl,
                                                           absl::Duration timeout);
  virtual ~ShardList() = default;

  const std::string& own_name() const { return own_name_; }
  // By name.
  virtual std::vector<v1::Shard> Current() = 0;

  // This shard's life, for the others to see; a file does not care.
  virtual void Enter(const std::string& address, uint64_t boot_id);
  virtual void SetDraining() {}
  virtual void Leave() {}
  // Where the list comes from and how that is.
  virtual void AddTo(v1::Stats* stats);

  // The owner of the sequence, unless that is this one or there is none. A shard that is not in its
  // own list owns nothing.
  std::optional<v1::Shard> OtherOwner(std::string_view sequence);
  // Who takes it when it is opened: the first in rank of those that are not in `without` and do not
  // drain, unless that is this one, whether it drains or not.
  std::optional<v1::Shard> OtherTaker(std::string_view sequence,
                                      const std::vector<std::string>& without);

 protected:
  explicit ShardList(std::string own_name) : own_name_(std::move(own_name)) {}

 private:
  const std::string own_name_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SHARD_LIST_H_
