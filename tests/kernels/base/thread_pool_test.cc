#include "kernels/base/thread_pool.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "absl/synchronization/barrier.h"
#include "absl/synchronization/notification.h"
#include "kernels/base/parallel.h"

namespace clusterkv::kernels {
namespace {

std::unique_ptr<ThreadPool> MakePool(int threads, int nice = 0) {
  return ThreadPool::Create(threads, "test", {.nice = nice}).value();
}

TEST(ThreadPoolTest, RefusesImpossibleSizesAndPriorities) {
  EXPECT_EQ(ThreadPool::Create(0, "test").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ThreadPool::Create(1025, "test").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ThreadPool::Create(1, "test", {.nice = -1}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ThreadPool::Create(1, "test", {.nice = 20}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ThreadPoolTest, ForRunsEveryIndexOnceForAnyNumberOfThreads) {
  for (int threads : {1, 2, 5}) {
    auto pool = MakePool(threads);
    for (int64_t count : {0, 1, 2, 3, 97, 1000}) {
      std::vector<std::atomic<int>> calls(count);
      pool->For(count, [&](int64_t i) { calls[i].fetch_add(1); });
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(calls[i].load(), 1) << i;
    }
  }
}

TEST(ThreadPoolTest, ForIsAParallelFor) {
  auto pool = MakePool(2);
  const auto sum = [](ParallelFor parallel_for) {
    std::atomic<int64_t> total{0};
    parallel_for(100, [&](int64_t i) { total += i; });
    return total.load();
  };
  EXPECT_EQ(sum(SerialFor), 4950);
  EXPECT_EQ(
      sum([&](int64_t count, absl::FunctionRef<void(int64_t)> task) { pool->For(count, task); }),
      4950);
}

TEST(ThreadPoolTest, NestedForsFromTasksOfTheSamePoolFinish) {
  auto pool = MakePool(2);
  std::atomic<int> leaves{0};
  pool->For(7, [&](int64_t) {
    pool->For(5, [&](int64_t) { pool->For(3, [&](int64_t) { ++leaves; }); });
  });
  EXPECT_EQ(leaves.load(), 7 * 5 * 3);
}

TEST(ThreadPoolTest, ForFinishesWhileEveryPoolThreadIsBusy) {
  auto pool = MakePool(2);
  absl::Notification release;
  for (int i = 0; i < 2; ++i) pool->Schedule([&] { release.WaitForNotification(); });
  std::atomic<int> calls{0};
  pool->For(10, [&](int64_t) { ++calls; });
  EXPECT_EQ(calls.load(), 10);
  EXPECT_FALSE(pool->Idle());
  release.Notify();
  pool->WaitIdle();
  EXPECT_TRUE(pool->Idle());
}

TEST(ThreadPoolTest, ForUsesThePoolsThreads) {
  auto pool = MakePool(2);
  // Three indices that wait for each other need three threads: two of the pool and the caller's.
  absl::Barrier* barrier = new absl::Barrier(3);
  pool->For(3, [&](int64_t) {
    if (barrier->Block()) delete barrier;
  });
}

TEST(ThreadPoolTest, ForsFromManyTasksAtOnceFinish) {
  auto pool = MakePool(3);
  std::atomic<int64_t> total{0};
  for (int i = 0; i < 50; ++i) {
    pool->Schedule([&] { pool->For(20, [&](int64_t index) { total += index; }); });
  }
  pool->WaitIdle();
  EXPECT_EQ(total.load(), 50 * 190);
}

TEST(ThreadPoolTest, OneThreadRunsScheduledTasksInOrder) {
  auto pool = MakePool(1);
  std::vector<int> order;
  for (int i = 0; i < 100; ++i) pool->Schedule([&order, i] { order.push_back(i); });
  pool->WaitIdle();
  ASSERT_EQ(order.size(), 100u);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

TEST(ThreadPoolTest, DestructionRunsWhatIsQueuedAndWhatThatSchedules) {
  std::atomic<int> runs{0};
  {
    auto pool = MakePool(2);
    absl::Notification started;
    pool->Schedule([&] { started.WaitForNotification(); });
    for (int i = 0; i < 100; ++i) {
      pool->Schedule([&, raw = pool.get()] {
        ++runs;
        raw->Schedule([&] { ++runs; });
      });
    }
    started.Notify();
  }
  EXPECT_EQ(runs.load(), 200);
}

TEST(ThreadPoolTest, AFinishedTaskHasReleasedWhatItCaptured) {
  auto pool = MakePool(1);
  auto owned = std::make_shared<int>(1);
  pool->Schedule([owned] { EXPECT_EQ(*owned, 1); });
  pool->WaitIdle();
  EXPECT_EQ(owned.use_count(), 1);
}

TEST(ThreadPoolTest, ThreadsCarryTheirNameAndPriority) {
  auto pool = MakePool(1, /*nice=*/5);
  char name[16] = {};
  int priority = -1;
  pool->Schedule([&] {
    pthread_getname_np(pthread_self(), name, sizeof(name));
    priority = getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)));
  });
  pool->WaitIdle();
  EXPECT_STREQ(name, "test-0");
  EXPECT_GE(priority, 5);
}

TEST(ThreadPoolTest, BatchThreadsTakeNoCpuFromThoseThatRun) {
  auto pool = ThreadPool::Create(1, "test", {.nice = 3, .short_slices = true, .batch = true});
  ASSERT_TRUE(pool.ok()) << pool.status();
  int policy = -1, priority = -1;
  (*pool)->Schedule([&] {
    policy = sched_getscheduler(0);
    priority = getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)));
  });
  (*pool)->WaitIdle();
  EXPECT_EQ(policy, SCHED_BATCH);
  EXPECT_GE(priority, 3);
  EXPECT_EQ(sched_getscheduler(0), SCHED_OTHER);
}

}  // namespace
}  // namespace clusterkv::kernels
