// All shards of a service as one: a sequence is opened on the shard that owns its name, and found
// where it is.
//
//   seeds ─▶ GetServerInfo of one that answers, or etcd ─▶ names and addresses of all shards
//                ─▶ a Client each, made when it is first needed
//
// Placement is proto/placement.h's. What a caller opened or found it uses through the shard's own
// Client (PrefillWriter, DecodeSession), which lives as long as this object. Thread-safe.
#ifndef CLUSTERKV_WORKER_SHARDS_H_
#define CLUSTERKV_WORKER_SHARDS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/client.h"

namespace clusterkv::worker {

// A sequence and the shard that has it.
struct PlacedSequence {
  Client* client = nullptr;
  v1::Sequence sequence;
};

class Shards {
 public:
  // seeds: addresses of some shards or all, "host:port" or "unix:path", comma-separated; of a host
  // name with several addresses (a headless service) each is one. Where the servers know of no
  // shards the seeds themselves are the shards, by these names: then name all, the same to every
  // client. Or "etcd://HOST:PORT,…/PREFIX" (proto/shard_directory.h): the shards that are there are
  // known at any time, without asking one. Waits up to options.call_timeout for one that answers.
  // Errors: Unavailable when none does; InvalidArgument for seeds of wrong form; as
  // Client::Connect.
  static absl::StatusOr<std::unique_ptr<Shards>> Connect(const std::string& seeds,
                                                         const ClientOptions& options = {});
  ~Shards();

  // By name, as of the last look; with etcd as of now.
  std::vector<v1::Shard> members() const;
  // Asks the shards who they are anew; nothing to do with etcd. Errors: Unavailable when none
  // answers; the list stays then.
  absl::Status Refresh();

  // On the sequence's owner; where that drains or is away, on the next one in rank. session_id is
  // set to the shard's session, if the options keep one. After an answer that was lost on the way
  // the shard that did not answer may hold the sequence too: it ends with the session.
  // Errors: the owner's; Unavailable when no shard takes it.
  absl::StatusOr<PlacedSequence> OpenSequence(v1::OpenSequenceRequest request);
  // By name alone, or with what else the handle says; the shards are asked in order of rank.
  // Errors: SEQUENCE_NOT_FOUND, STALE_GENERATION; STALE_BOOT_ID when no live process gave the
  // handle out; Unavailable when it was not found, and not every shard answered.
  absl::StatusOr<PlacedSequence> FindSequence(const v1::SequenceHandle& handle);
  // Wherever it is; OK if it is nowhere. Errors: Unavailable as FindSequence.
  absl::Status ReleaseSequence(const v1::SequenceHandle& handle);
  // Of all shards, by name. Errors: the first shard's that does not answer.
  absl::StatusOr<std::vector<v1::Sequence>> ListSequences(const std::string& prefix);

 private:
  struct Impl;
  explicit Shards(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_SHARDS_H_
