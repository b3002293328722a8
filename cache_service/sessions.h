// Liveness of workers: one session per worker, kept alive by heartbeats.
//
//   operation \ state    live          broken (no stream)   over
//   Open(resume)         live again    live again           a new session
//   Heartbeat            stays         SESSION_NOT_FOUND    SESSION_NOT_FOUND
//   Close(now = false)   broken *      -                    -
//   Close(now = true)    over          over                 -
//   ttl without a beat   over          over                 -
//
// * A session that was resumed while its old stream was still there has two; it is broken when the
// last one is closed.
//
// Thread-safe; the mutex is a leaf and no callback runs under it. A session's events may run once
// more, on another thread, while Close returns: they must own what they touch.
#ifndef CLUSTERKV_CACHE_SERVICE_SESSIONS_H_
#define CLUSTERKV_CACHE_SERVICE_SESSIONS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cache_service/shard.h"

namespace clusterkv::cache_service {

// Ids that nobody guesses and no earlier process gave out. Thread-safe, never 0.
uint64_t RandomId();

class Sessions {
 public:
  explicit Sessions(absl::Duration ttl) : ttl_(ttl) {}

  uint64_t Open(std::string_view worker, uint64_t resume_id, Shard::SessionEvents events,
                bool* resumed);
  // Errors: SESSION_NOT_FOUND.
  absl::Status Heartbeat(uint64_t id);
  absl::Status CheckAlive(uint64_t id) const;
  // True if the session is over now: the caller ends what it owned.
  bool Close(uint64_t id, bool now);
  // Sessions that got no beat for the ttl; they are over, and were told.
  std::vector<uint64_t> TakeExpired();

  void Notify(uint64_t id, const v1::SessionResponse::Notice& notice);
  void NotifyAll(const v1::SessionResponse::Notice& notice);
  int64_t size() const;

 private:
  struct Session {
    std::string worker;
    int64_t last_beat_ns = 0;
    int streams = 0;
    Shard::SessionEvents events;
  };

  const absl::Duration ttl_;
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<uint64_t, Session> sessions_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SESSIONS_H_
