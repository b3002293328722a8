// Turns of tenants at the shard's select threads.
//
// At most `places` pieces of work run at a time. While there is a free place work starts at once;
// else it waits in its tenant's line, and places that become free go round the lines, each line
// getting as much work per round as its weight says (deficit round robin, so that large batches pay
// for their size). Who asks little waits at most for what runs, however much another one asks.
// Work of one line is started in the order in which it entered, one start at a time.
//
// Thread-safe; the mutex is a leaf. `start` runs without it, on the thread that entered or on one
// that left, and must not block.
#ifndef CLUSTERKV_CACHE_SERVICE_FAIR_QUEUE_H_
#define CLUSTERKV_CACHE_SERVICE_FAIR_QUEUE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace clusterkv::cache_service {

class FairQueue {
 public:
  // places: at least 1. max_waiting: pieces of work in one line.
  FairQueue(int64_t places, int64_t max_waiting) : places_(places), max_waiting_(max_waiting) {}

  // A line of its own; weight: at least 1. Before the first Enter.
  int AddLine(int64_t weight) ABSL_LOCKS_EXCLUDED(mutex_);

  // Calls start(at_once) now or later; each is followed by one Leave. cost: at least 1, in the same
  // unit for all. False: the line is full, and start is never called.
  using Start = std::function<void(bool at_once)>;
  bool Enter(int line, int64_t cost, Start start) ABSL_LOCKS_EXCLUDED(mutex_);
  void Leave() ABSL_LOCKS_EXCLUDED(mutex_);

  int64_t waiting(int line) const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Work {
    int64_t cost = 0;
    Start start;
  };
  struct Line {
    int64_t weight = 1;
    int64_t credit = 0;     // what it may still start in this round
    bool starting = false;  // some thread is in the start of its work
    std::deque<Work> waiting;
  };

  // Starts what waits as long as there are places.
  void Pump() ABSL_LOCKS_EXCLUDED(mutex_);
  // The line whose turn it is, with something that waits; -1: none.
  int NextLine() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int64_t places_;
  const int64_t max_waiting_;
  mutable absl::Mutex mutex_;
  std::vector<Line> lines_ ABSL_GUARDED_BY(mutex_);
  size_t turn_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t running_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_FAIR_QUEUE_H_
