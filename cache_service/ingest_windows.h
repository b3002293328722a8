// The windows of prefill workers that are mapped here, by the session that each belongs to.
//
// Thread-safe; the mutex is a leaf, and no window is closed under it. A window that ends while a
// call uses it is closed when that is over.
#ifndef CLUSTERKV_CACHE_SERVICE_INGEST_WINDOWS_H_
#define CLUSTERKV_CACHE_SERVICE_INGEST_WINDOWS_H_

#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/shard_device.h"

namespace clusterkv::cache_service {

class IngestWindows {
 public:
  // Its id, which nobody guesses.
  uint64_t Add(uint64_t session_id, std::shared_ptr<RowWindow> window);
  // Errors: WINDOW_NOT_FOUND.
  absl::StatusOr<std::shared_ptr<RowWindow>> Find(uint64_t window_id) const;
  // The session's windows are found no more.
  void EndSession(uint64_t session_id);
  int64_t size() const;

 private:
  struct Entry {
    uint64_t session_id = 0;
    std::shared_ptr<RowWindow> window;
  };
  mutable absl::Mutex mutex_;
  absl::flat_hash_map<uint64_t, Entry> windows_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_INGEST_WINDOWS_H_
