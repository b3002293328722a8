// A fixed set of threads: the executor of the service's builds and selects, and a kernel's
// ParallelFor.
//
// Thread-safe. No thread is made after Create, and none blocks on another's work: a For finishes on
// its caller alone if every pool thread is busy, so that nested calls, and calls from tasks of the
// same pool, cannot deadlock. Schedule's tasks start in the order of their calls; helpers of a
// running For go first.
#ifndef CLUSTERKV_KERNELS_BASE_THREAD_POOL_H_
#define CLUSTERKV_KERNELS_BASE_THREAD_POOL_H_

#include <pthread.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/base/thread_scheduling.h"

namespace clusterkv::kernels {

class ThreadPool {
 public:
  // Starts `threads` threads named `name`-0, `name`-1, … (cut to the 15 bytes that Linux shows),
  // each scheduled so. Errors: InvalidArgument unless 1 <= threads <= 1024 and 0 <= nice <= 19;
  // ResourceExhausted when the system gives no more threads.
  static absl::StatusOr<std::unique_ptr<ThreadPool>> Create(
      int threads, std::string_view name, const ThreadScheduling& scheduling = {});
  // Runs all that was scheduled, also by tasks while it waits, then ends the threads. Never from a
  // task.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(threads_.size()); }

  // Runs `task` once on one of the threads. Never blocks.
  void Schedule(std::function<void()> task);

  // Calls task(i) once for every i in [0, count), on the calling thread and on pool threads that
  // are free, and returns when all are done. A ParallelFor:
  //   [&](int64_t count, auto task) { pool->For(count, task); }
  void For(int64_t count, absl::FunctionRef<void(int64_t index)> task);

  // True when nothing is queued or running.
  bool Idle() const;
  // Returns when nothing is queued or running. Never from a task.
  void WaitIdle() const;

 private:
  ThreadPool(std::string_view name, const ThreadScheduling& scheduling)
      : name_(name), scheduling_(scheduling) {}

  absl::Status StartThreads(int threads);
  void Work(int index);
  bool HasWorkOrEnds() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !queue_.empty() || ending_;
  }
  bool IdleLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return queue_.empty() && running_ == 0;
  }

  const std::string name_;
  const ThreadScheduling scheduling_;
  mutable absl::Mutex mutex_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
  int running_ ABSL_GUARDED_BY(mutex_) = 0;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<pthread_t> threads_;  // written by Create and the destructor alone
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_THREAD_POOL_H_
