#include "cache_service/sessions.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/sequence_store.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

absl::Status NotFound(uint64_t id) {
  return Error(v1::SESSION_NOT_FOUND, absl::StrCat("no session has the id ", id),
               {{"sessionId", absl::StrCat(id)}});
}

}  // namespace

uint64_t RandomId() {
  static absl::Mutex mutex(absl::kConstInit);
  static std::random_device& device = *new std::random_device;
  absl::MutexLock lock(&mutex);
  uint64_t id = 0;
  while (id == 0) id = (uint64_t{device()} << 32) | device();
  return id;
}

uint64_t Sessions::Open(std::string_view worker, uint64_t resume_id, Shard::SessionEvents events,
                        bool* resumed) {
  absl::MutexLock lock(&mutex_);
  const auto it = sessions_.find(resume_id);
  *resumed = it != sessions_.end();
  const uint64_t id = *resumed ? resume_id : RandomId();
  Session& session = sessions_[id];
  session.worker = std::string(worker);
  session.last_beat_ns = SteadyNow();
  ++session.streams;
  session.events = std::move(events);
  return id;
}

absl::Status Sessions::Heartbeat(uint64_t id) {
  absl::MutexLock lock(&mutex_);
  const auto it = sessions_.find(id);
  if (it == sessions_.end() || it->second.streams == 0) return NotFound(id);
  it->second.last_beat_ns = SteadyNow();
  return absl::OkStatus();
}

absl::Status Sessions::CheckAlive(uint64_t id) const {
  absl::MutexLock lock(&mutex_);
  return sessions_.contains(id) ? absl::OkStatus() : NotFound(id);
}

bool Sessions::Close(uint64_t id, bool now) {
  Shard::SessionEvents events;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = sessions_.find(id);
    if (it == sessions_.end()) return false;
    Session& session = it->second;
    if (session.streams > 0) --session.streams;
    if (!now && session.streams > 0) return false;  // the old stream of one that was resumed
    events = std::exchange(session.events, {});
    if (!now) return false;
    sessions_.erase(it);
  }
  if (events.expired != nullptr) events.expired();
  return true;
}

std::vector<uint64_t> Sessions::TakeExpired() {
  std::vector<uint64_t> expired;
  std::vector<Shard::SessionEvents> events;
  {
    absl::MutexLock lock(&mutex_);
    const int64_t now = SteadyNow();
    for (auto it = sessions_.begin(); it != sessions_.end();) {
      const auto here = it++;
      if (absl::Nanoseconds(now - here->second.last_beat_ns) <= ttl_) continue;
      expired.push_back(here->first);
      events.push_back(std::move(here->second.events));
      sessions_.erase(here);
    }
  }
  for (const Shard::SessionEvents& event : events) {
    if (event.expired != nullptr) event.expired();
  }
  return expired;
}

void Sessions::Notify(uint64_t id, const v1::SessionResponse::Notice& notice) {
  Shard::SessionEvents events;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = sessions_.find(id);
    if (it == sessions_.end()) return;
    events = it->second.events;
  }
  if (events.notice != nullptr) events.notice(notice);
}

void Sessions::NotifyAll(const v1::SessionResponse::Notice& notice) {
  std::vector<Shard::SessionEvents> events;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [id, session] : sessions_) events.push_back(session.events);
  }
  for (const Shard::SessionEvents& event : events) {
    if (event.notice != nullptr) event.notice(notice);
  }
}

int64_t Sessions::size() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(sessions_.size());
}

}  // namespace clusterkv::cache_service
