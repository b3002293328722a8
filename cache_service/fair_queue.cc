#include "cache_service/fair_queue.h"

#include <utility>

namespace clusterkv::cache_service {

int FairQueue::AddLine(int64_t weight) {
  absl::MutexLock lock(&mutex_);
  lines_.emplace_back();
  lines_.back().weight = weight;
  return static_cast<int>(lines_.size()) - 1;
}

bool FairQueue::Enter(int line, int64_t cost, Start start) {
  {
    absl::MutexLock lock(&mutex_);
    Line& mine = lines_[static_cast<size_t>(line)];
    if (running_ >= places_ || mine.starting || !mine.waiting.empty()) {
      if (static_cast<int64_t>(mine.waiting.size()) >= max_waiting_) return false;
      mine.waiting.push_back({cost, std::move(start)});
      return true;
    }
    ++running_;
  }
  start(/*at_once=*/true);
  return true;
}

int FairQueue::NextLine() {
  const auto can_start = [](const Line& line) { return !line.waiting.empty() && !line.starting; };
  bool any = false;
  for (const Line& line : lines_) any = any || can_start(line);
  if (!any) return -1;
  while (true) {
    Line& line = lines_[turn_];
    if (can_start(line) && line.credit > 0) return static_cast<int>(turn_);
    if (line.waiting.empty()) line.credit = 0;  // turns are not saved up
    turn_ = (turn_ + 1) % lines_.size();
    Line& next = lines_[turn_];
    if (can_start(next)) next.credit += next.weight;
  }
}

void FairQueue::Pump() {
  int line = -1;
  while (true) {
    Work work;
    {
      absl::MutexLock lock(&mutex_);
      if (line >= 0) lines_[static_cast<size_t>(line)].starting = false;
      line = running_ < places_ ? NextLine() : -1;
      if (line < 0) return;
      Line& next = lines_[static_cast<size_t>(line)];
      work = std::move(next.waiting.front());
      next.waiting.pop_front();
      next.credit -= work.cost;
      next.starting = true;
      ++running_;
    }
    work.start(/*at_once=*/false);
  }
}

void FairQueue::Leave() {
  {
    absl::MutexLock lock(&mutex_);
    --running_;
  }
  // Work that ends within its own start leaves from inside of Pump, which goes on by itself: else a
  // long line of such work would be as deep a stack.
  static thread_local FairQueue* pumping = nullptr;
  if (pumping == this) return;
  FairQueue* const outer = std::exchange(pumping, this);
  Pump();
  pumping = outer;
}

int64_t FairQueue::waiting(int line) const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(lines_[static_cast<size_t>(line)].waiting.size());
}

}  // namespace clusterkv::cache_service
