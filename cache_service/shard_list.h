// The shards that sequences are spread over, from a file, and which of them owns a sequence.
//
// The file has a line "NAME HOST:PORT" for each shard; '#' begins a comment. It is read again when
// it has changed; while it is no good the last good list stays. Thread-safe.
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
#include "clusterkv/v1/cache_service.pb.h"

namespace clusterkv::cache_service {

class ShardList {
 public:
  // own_name: of this shard; empty: the host's name. Errors: InvalidArgument naming file, line and
  // fault.
  static absl::StatusOr<std::unique_ptr<ShardList>> Load(const std::string& file,
                                                         const std::string& own_name);

  const std::string& own_name() const { return own_name_; }
  // By name.
  std::vector<v1::Shard> Current() ABSL_LOCKS_EXCLUDED(mutex_);
  // The owner of the sequence among the shards that are not in `without`, unless that is this one
  // or there is none. A shard that is not in its own list owns nothing.
  std::optional<v1::Shard> OtherOwner(std::string_view sequence,
                                      const std::vector<std::string>& without = {})
      ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  ShardList(std::string file, std::string own_name)
      : file_(std::move(file)), own_name_(std::move(own_name)) {}
  // Changes when the file is replaced or written.
  std::string Stamp() const;
  absl::StatusOr<std::vector<v1::Shard>> Read() const;

  const std::string file_, own_name_;
  absl::Mutex mutex_;
  std::string stamp_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::Shard> shards_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SHARD_LIST_H_
