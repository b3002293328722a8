// How much of something a tenant may do per second, with one second's worth saved up.
//
// Thread-safe; the mutex is a leaf.
#ifndef CLUSTERKV_CACHE_SERVICE_TOKEN_BUCKET_H_
#define CLUSTERKV_CACHE_SERVICE_TOKEN_BUCKET_H_

#include <algorithm>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace clusterkv::cache_service {

class TokenBucket {
 public:
  // per_second 0: no limit.
  explicit TokenBucket(double per_second) : per_second_(per_second), tokens_(per_second) {}

  // Takes `tokens` if anything is left, and lets the bucket go below zero for it: one piece may be
  // larger than a second's worth. Zero: taken; else how long until it is worth to ask again.
  absl::Duration Take(double tokens, absl::Time now) ABSL_LOCKS_EXCLUDED(mutex_) {
    if (per_second_ <= 0) return absl::ZeroDuration();
    absl::MutexLock lock(&mutex_);
    const double gained = per_second_ * absl::ToDoubleSeconds(now - last_);
    if (gained > 0) tokens_ = std::min(per_second_, tokens_ + gained);
    last_ = now;
    const double wanted = std::min(tokens, 1.0);
    if (tokens_ < wanted) return absl::Seconds((wanted - tokens_) / per_second_);
    tokens_ -= tokens;
    return absl::ZeroDuration();
  }

 private:
  const double per_second_;
  absl::Mutex mutex_;
  double tokens_ ABSL_GUARDED_BY(mutex_);
  absl::Time last_ ABSL_GUARDED_BY(mutex_) = absl::UnixEpoch();
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TOKEN_BUCKET_H_
