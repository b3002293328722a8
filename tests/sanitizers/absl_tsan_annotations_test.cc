// That ThreadSanitizer sees the order which Abseil's types make, and still sees a race where there
// is none. Every other test of the tsan preset relies on both.
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

namespace clusterkv {
namespace {

constexpr int kThreads = 4;
constexpr int kRounds = 1000;

template <typename F>
void OnThreads(F f) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(f);
  for (std::thread& thread : threads) thread.join();
}

TEST(AbslTsanAnnotationsTest, AMutexOrdersItsCriticalSections) {
  absl::Mutex mutex;
  int64_t count = 0;
  OnThreads([&] {
    for (int i = 0; i < kRounds; ++i) {
      absl::MutexLock lock(&mutex);
      ++count;
    }
  });
  EXPECT_EQ(count, kThreads * kRounds);
}

TEST(AbslTsanAnnotationsTest, ReadersAreOrderedWithWriters) {
  absl::Mutex mutex;
  int64_t count = 0;
  OnThreads([&] {
    for (int i = 0; i < kRounds; ++i) {
      {
        absl::ReaderMutexLock lock(&mutex);
        EXPECT_GE(count, 0);
      }
      if (mutex.TryLock()) {
        ++count;
        mutex.Unlock();
      }
    }
  });
}

TEST(AbslTsanAnnotationsTest, ConditionsMayReadWhatTheMutexGuards) {
  absl::Mutex mutex;
  int turn = 0;
  OnThreads([&] {
    for (int i = 0; i < kRounds / 10; ++i) {
      absl::MutexLock lock(&mutex);
      const int mine = turn;
      mutex.AwaitWithTimeout(absl::Condition(
                                 +[](int* t) { return *t % 2 == 0; }, &turn),
                             absl::Microseconds(50));
      turn = mine + 1;
    }
  });
}

TEST(AbslTsanAnnotationsTest, ACondVarHandsTheMutexOver) {
  absl::Mutex mutex;
  absl::CondVar changed;
  int items = 0;
  std::thread consumer([&] {
    absl::MutexLock lock(&mutex);
    while (items < kRounds) changed.Wait(&mutex);
  });
  for (int i = 0; i < kRounds; ++i) {
    absl::MutexLock lock(&mutex);
    ++items;
    changed.Signal();
  }
  consumer.join();
}

TEST(AbslTsanAnnotationsTest, ANotificationPublishesWhatCameBefore) {
  for (int i = 0; i < 100; ++i) {
    absl::Notification ready;
    int value = 0;
    std::thread producer([&] {
      value = 1;
      ready.Notify();
    });
    if (i % 2 == 0) {
      ready.WaitForNotification();
    } else {
      while (!ready.HasBeenNotified()) std::this_thread::yield();
    }
    EXPECT_EQ(value, 1);
    producer.join();
  }
}

TEST(AbslTsanAnnotationsTest, ABlockingCounterPublishesEveryThreadsWork) {
  std::vector<int> values(kThreads);
  absl::BlockingCounter done(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      values[i] = 1;
      done.DecrementCount();
    });
  }
  done.Wait();
  for (int value : values) EXPECT_EQ(value, 1);
  for (std::thread& thread : threads) thread.join();
}

TEST(AbslTsanAnnotationsDeathTest, ARaceIsStillFound) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      {
        int64_t count = 0;
        OnThreads([&] {
          for (int i = 0; i < kRounds; ++i) ++count;
        });
      },
      "data race");
}

}  // namespace
}  // namespace clusterkv
