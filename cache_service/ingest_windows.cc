#include "cache_service/ingest_windows.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cache_service/sessions.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

uint64_t IngestWindows::Add(uint64_t session_id, std::shared_ptr<RowWindow> window) {
  const uint64_t id = RandomId();
  absl::MutexLock lock(&mutex_);
  windows_[id] = {session_id, std::move(window)};
  return id;
}

absl::StatusOr<std::shared_ptr<RowWindow>> IngestWindows::Find(uint64_t window_id) const {
  absl::MutexLock lock(&mutex_);
  const auto it = windows_.find(window_id);
  if (it != windows_.end()) return it->second.window;
  return Error(v1::WINDOW_NOT_FOUND,
               absl::StrCat("window_id: expected one that ConnectIngest gave and whose session "
                            "lives, got ",
                            window_id),
               {{"field", "window_id"}, {"got", absl::StrCat(window_id)}});
}

void IngestWindows::EndSession(uint64_t session_id) {
  std::vector<std::shared_ptr<RowWindow>> ended;
  absl::MutexLock lock(&mutex_);
  absl::erase_if(windows_, [&](const auto& entry) {
    if (entry.second.session_id != session_id) return false;
    ended.push_back(entry.second.window);
    return true;
  });
}

int64_t IngestWindows::size() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(windows_.size());
}

}  // namespace clusterkv::cache_service
