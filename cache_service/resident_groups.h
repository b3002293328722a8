// Groups: batches of attachments whose steps a kernel of the device answers by itself
// (DeviceResident).
//
//   state     leaves it
//   running   the first of its attachments is gone, or joins another group; Disconnect; a failed
//             Renew: ended
//   ended     its worker knows (Disconnect) or is gone (its session is over; without one, the
//             attachments' ttl): forgotten
//
// A group holds the layers that its kernel reads, so that their pages are neither moved nor freed.
// Thread-safe. Lock order: a group's mutex is held while the device stops and starts the kernel,
// and nothing of the shard's is taken under it.
#ifndef CLUSTERKV_CACHE_SERVICE_RESIDENT_GROUPS_H_
#define CLUSTERKV_CACHE_SERVICE_RESIDENT_GROUPS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cache_service/attachments.h"
#include "cache_service/sequence.h"
#include "cache_service/shard_device.h"
#include "clusterkv/v1/cache_service.pb.h"

namespace clusterkv::cache_service {

class ResidentGroup {
 public:
  ResidentGroup(uint64_t id, uint64_t session_id) : id(id), session_id(session_id) {}
  const uint64_t id;
  const uint64_t session_id;  // of its worker; 0: none

  // Once. Returns window_begin [layers, members]. Errors: as ShardDevice::StartResident and
  // Sequence::Snapshot.
  absl::StatusOr<std::vector<uint32_t>> Start(ShardDevice* device,
                                              std::vector<std::shared_ptr<Sequence>> members,
                                              const kernels::SelectParams& select,
                                              const ResidentSetup& setup);
  // Takes over what was built since. Errors: as DeviceResident::Change; FailedPrecondition when it
  // has ended.
  absl::StatusOr<std::vector<uint32_t>> Renew(uint64_t rounds);
  // The kernel has ended when it returns. Idempotent.
  void End();
  v1::PeerWindow requests() const;
  bool running() const { return running_.load(); }
  int64_t ended_ns() const { return ended_ns_.load(); }  // of the steady clock; 0: it has not

 private:
  using Snapshots = std::vector<std::shared_ptr<const LayerSnapshot>>;  // [layers, members]

  // The layers as they are now. Errors: as Sequence::Snapshot; Unavailable for what is not on the
  // device.
  absl::StatusOr<Snapshots> TakeSnapshots() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<DeviceSelectItem> ItemsOf(const Snapshots& snapshots) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  std::atomic<bool> running_{false};
  std::atomic<int64_t> ended_ns_{0};
  mutable absl::Mutex mutex_;
  std::vector<std::shared_ptr<Sequence>> members_ ABSL_GUARDED_BY(mutex_);
  kernels::SelectParams select_ ABSL_GUARDED_BY(mutex_);
  int64_t layers_ ABSL_GUARDED_BY(mutex_) = 0;
  Snapshots snapshots_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<DeviceResident> kernel_ ABSL_GUARDED_BY(mutex_);  // null: never started
};

class ResidentGroups {
 public:
  // device may be null: then Connect is told why not.
  ResidentGroups(ShardDevice* device, Attachments* attachments, absl::Duration ttl)
      : device_(device), attachments_(*attachments), ttl_(ttl) {}

  // What cannot be had is no error: the answer says why. why_not: what speaks against the worker's
  // memory (Shard::WhyNoLink), or empty. Errors: ATTACHMENT_NOT_FOUND, INVALID_FIELD.
  absl::StatusOr<v1::ConnectResidentResponse> Connect(const v1::ConnectResidentRequest& request,
                                                      const std::string& why_not);
  // Errors: ATTACHMENT_NOT_FOUND when it has ended; INVALID_FIELD for the rounds.
  absl::StatusOr<v1::RenewResidentResponse> Renew(const v1::RenewResidentRequest& request);
  void Disconnect(uint64_t id);
  void EndSession(uint64_t session_id);
  // Forgets what ended more than the ttl ago and has no session.
  void Expire();
  int64_t attachments() const;  // of groups that run

 private:
  // The attachments of a request. Errors: ATTACHMENT_NOT_FOUND, INVALID_FIELD.
  absl::StatusOr<std::vector<std::shared_ptr<Attachment>>> Find(
      const v1::ConnectResidentRequest& request) const;
  // Ends those and forgets them.
  void Forget(const std::function<bool(const ResidentGroup&)>& leaves);

  ShardDevice* const device_;
  Attachments& attachments_;
  const absl::Duration ttl_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<uint64_t, std::shared_ptr<ResidentGroup>> groups_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RESIDENT_GROUPS_H_
