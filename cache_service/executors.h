// The shard's threads, and what queues for them.
//
// Two pools: `build` clusters prompts (long work, lowered priority), `select` answers queries and
// clusters windows of decoded tokens (short work). Big builds take their scratch memory out of one
// budget, so that resident memory stays bounded whatever is built at the same time.
//
// Thread-safe. Lock order: mutexes here are leaves.
#ifndef CLUSTERKV_CACHE_SERVICE_EXECUTORS_H_
#define CLUSTERKV_CACHE_SERVICE_EXECUTORS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/base/thread_pool.h"
#include "kernels/select/select.h"

namespace clusterkv::cache_service {

class Executors {
 public:
  // scratch_bytes: the budget of all builds that run at the same time. selects_give_way: select
  // threads take no CPU from a thread that runs, and have short slices.
  // Errors: as ThreadPool::Create.
  static absl::StatusOr<std::unique_ptr<Executors>> Create(int build_threads, int select_threads,
                                                           int64_t scratch_bytes,
                                                           bool selects_give_way = false);
  // Waits for what runs. REQUIRES: Stop was called, unless nothing was ever scheduled.
  ~Executors();

  kernels::ThreadPool& select_pool() { return *select_; }
  // Runs `build` with a pool's ParallelFor. Long work waits for scratch memory and is cut to as
  // many threads as the budget holds `task_scratch_bytes` each; short work (milliseconds, that
  // queries wait for) goes with the queries and takes none. When stopped, `build` is not run.
  using Build = std::function<void(kernels::ParallelFor)>;
  enum class BuildLength { kShort, kLong };
  void ScheduleBuild(BuildLength length, int64_t task_scratch_bytes, Build build);
  int64_t scratch_bytes() const { return scratch_bytes_; }

  // Work that starts from now on is given up.
  void Stop() { stopping_.store(true); }
  bool stopping() const { return stopping_.load(); }
  bool Idle() const;

  // Items between Select and their answer; builds between their queueing and their end.
  std::atomic<int64_t> queued_selects{0}, queued_builds{0};

  // A scratch of the select kernel, given back when it dies.
  class Scratch {
   public:
    explicit Scratch(Executors* executors)
        : executors_(executors), scratch_(executors->TakeScratch()) {}
    ~Scratch() { executors_->GiveScratch(std::move(scratch_)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    kernels::SelectScratch& operator*() { return *scratch_; }

   private:
    Executors* const executors_;
    std::unique_ptr<kernels::SelectScratch> scratch_;
  };

 private:
  explicit Executors(int64_t scratch_bytes)
      : scratch_bytes_(scratch_bytes), scratch_left_(scratch_bytes) {}
  std::unique_ptr<kernels::SelectScratch> TakeScratch();
  void GiveScratch(std::unique_ptr<kernels::SelectScratch> scratch);
  void RunLongBuild(int64_t task_scratch_bytes, const Build& build);

  const int64_t scratch_bytes_;
  std::atomic<bool> stopping_{false};
  absl::Mutex mutex_;
  std::vector<std::unique_ptr<kernels::SelectScratch>> scratches_ ABSL_GUARDED_BY(mutex_);
  int64_t scratch_left_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<kernels::ThreadPool> select_, build_;  // last: they end first
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_EXECUTORS_H_
