#include "kernels/base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace clusterkv::kernels {
namespace {

// One For call. Helpers that start late may outlive the call: they share the state, find no index
// left and never touch `task`.
struct ForState {
  ForState(int64_t count, absl::FunctionRef<void(int64_t)> task) : count(count), task(task) {}

  // Runs indices until none is left to start.
  void Work() {
    int64_t done_here = 0;
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      task(i);
      ++done_here;
    }
    if (done_here == 0) return;
    absl::MutexLock lock(&mutex);
    done += done_here;
  }
  void WaitAllDone() { absl::MutexLock lock(&mutex, absl::Condition(this, &ForState::AllDone)); }
  bool AllDone() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) { return done == count; }

  const int64_t count;
  const absl::FunctionRef<void(int64_t)> task;
  std::atomic<int64_t> next{0};
  absl::Mutex mutex;
  int64_t done ABSL_GUARDED_BY(mutex) = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ThreadPool>> ThreadPool::Create(int threads, std::string_view name,
                                                               const ThreadScheduling& scheduling) {
  if (threads < 1 || threads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("threads: ", threads, ", expected 1 to 1024"));
  }
  if (scheduling.nice < 0 || scheduling.nice > 19) {
    return absl::InvalidArgumentError(
        absl::StrCat("nice: ", scheduling.nice, ", expected 0 to 19"));
  }
  std::unique_ptr<ThreadPool> pool(new ThreadPool(name, scheduling));
  if (absl::Status status = pool->StartThreads(threads); !status.ok()) return status;
  return pool;
}

absl::Status ThreadPool::StartThreads(int threads) {
  struct Start {
    ThreadPool* pool;
    int index;
  };
  threads_.reserve(threads);
  for (int i = 0; i < threads; ++i) {
    auto start = std::make_unique<Start>(Start{this, i});
    pthread_t thread;
    // Not std::thread: its constructor tells of a full system by an exception.
    const int error = pthread_create(
        &thread, nullptr,
        [](void* argument) -> void* {
          std::unique_ptr<Start> start(static_cast<Start*>(argument));
          start->pool->Work(start->index);
          return nullptr;
        },
        start.get());
    if (error != 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("thread ", i, " of ", threads, ": ", std::strerror(error)));
    }
    (void)start.release();  // the thread owns it now
    threads_.push_back(thread);
  }
  return absl::OkStatus();
}

ThreadPool::~ThreadPool() {
  {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
  }
  for (pthread_t thread : threads_) pthread_join(thread, nullptr);
}

void ThreadPool::Work(int index) {
  const std::string name = absl::StrCat(std::string(name_), "-", index).substr(0, 15);
  pthread_setname_np(pthread_self(), name.c_str());
  ScheduleThisThread(scheduling_);
  while (true) {
    std::function<void()> task;
    {
      absl::MutexLock lock(&mutex_, absl::Condition(this, &ThreadPool::HasWorkOrEnds));
      if (queue_.empty()) return;
      task = std::move(queue_.front());
      queue_.pop_front();
      ++running_;
    }
    task();
    task = nullptr;  // what it captured is gone before it counts as done
    absl::MutexLock lock(&mutex_);
    --running_;
  }
}

void ThreadPool::Schedule(std::function<void()> task) {
  absl::MutexLock lock(&mutex_);
  queue_.push_back(std::move(task));
}

void ThreadPool::For(int64_t count, absl::FunctionRef<void(int64_t index)> task) {
  const int64_t helpers = std::min<int64_t>(threads(), count - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto state = std::make_shared<ForState>(count, task);
  {
    absl::MutexLock lock(&mutex_);
    for (int64_t i = 0; i < helpers; ++i) queue_.push_front([state] { state->Work(); });
  }
  state->Work();
  state->WaitAllDone();
}

bool ThreadPool::Idle() const {
  absl::MutexLock lock(&mutex_);
  return IdleLocked();
}

void ThreadPool::WaitIdle() const {
  absl::MutexLock lock(&mutex_, absl::Condition(this, &ThreadPool::IdleLocked));
}

}  // namespace clusterkv::kernels
