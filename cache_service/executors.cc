#include "cache_service/executors.h"

#include <algorithm>
#include <utility>

#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

// Builds give way to queries.
constexpr int kBuildNice = 5;

}  // namespace

absl::StatusOr<std::unique_ptr<Executors>> Executors::Create(int build_threads, int select_threads,
                                                             int64_t scratch_bytes,
                                                             bool selects_give_way) {
  auto executors = std::unique_ptr<Executors>(new Executors(scratch_bytes));
  CKV_ASSIGN_OR_RETURN(executors->build_,
                       kernels::ThreadPool::Create(build_threads, "build", {.nice = kBuildNice}));
  CKV_ASSIGN_OR_RETURN(
      executors->select_,
      kernels::ThreadPool::Create(select_threads, "select",
                                  {.short_slices = selects_give_way, .batch = selects_give_way}));
  return executors;
}

Executors::~Executors() = default;

bool Executors::Idle() const {
  return queued_selects.load() == 0 && queued_builds.load() == 0 && select_->Idle() &&
         build_->Idle();
}

void Executors::ScheduleBuild(BuildLength length, int64_t task_scratch_bytes, Build build) {
  queued_builds.fetch_add(1);
  if (length == BuildLength::kShort) {
    select_->Schedule([this, build = std::move(build)] {
      if (!stopping()) {
        build([this](int64_t count, absl::FunctionRef<void(int64_t)> task) {
          select_->For(count, task);
        });
      }
      queued_builds.fetch_sub(1);
    });
    return;
  }
  build_->Schedule([this, task_scratch_bytes, build = std::move(build)] {
    if (!stopping()) RunLongBuild(task_scratch_bytes, build);
    queued_builds.fetch_sub(1);
  });
}

void Executors::RunLongBuild(int64_t task_scratch_bytes, const Build& build) {
  const int64_t per_task = std::clamp<int64_t>(task_scratch_bytes, 1, scratch_bytes_);
  const int64_t lanes = std::min<int64_t>(build_->threads(), scratch_bytes_ / per_task);
  const int64_t taken = lanes * per_task;
  // Waiting here cannot deadlock: who holds scratch needs no thread but its own to end.
  const auto fits = [this, taken]()
                        ABSL_NO_THREAD_SAFETY_ANALYSIS { return scratch_left_ >= taken; };
  mutex_.LockWhen(absl::Condition(&fits));
  scratch_left_ -= taken;
  mutex_.Unlock();
  build([&](int64_t count, absl::FunctionRef<void(int64_t)> task) {
    if (lanes >= build_->threads()) return build_->For(count, task);
    std::atomic<int64_t> next{0};
    build_->For(std::min(lanes, count), [&](int64_t) {
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
    });
  });
  absl::MutexLock lock(&mutex_);
  scratch_left_ += taken;
}

std::unique_ptr<kernels::SelectScratch> Executors::TakeScratch() {
  absl::MutexLock lock(&mutex_);
  if (scratches_.empty()) return std::make_unique<kernels::SelectScratch>();
  std::unique_ptr<kernels::SelectScratch> scratch = std::move(scratches_.back());
  scratches_.pop_back();
  return scratch;
}

void Executors::GiveScratch(std::unique_ptr<kernels::SelectScratch> scratch) {
  absl::MutexLock lock(&mutex_);
  scratches_.push_back(std::move(scratch));
}

}  // namespace clusterkv::cache_service
