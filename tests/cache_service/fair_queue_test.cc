#include "cache_service/fair_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

namespace clusterkv::cache_service {
namespace {

// Notes in which order work started.
class Notes {
 public:
  FairQueue::Start Start(char name) {
    return [this, name](bool) { text_.push_back(name); };
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

TEST(FairQueueTest, StartsAtOnceWhileThereIsAPlace) {
  FairQueue queue(2, 10);
  const int line = queue.AddLine(1);
  std::vector<bool> at_once;
  const auto start = [&](bool now) { at_once.push_back(now); };
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(queue.Enter(line, 1, start));
  EXPECT_EQ(at_once, (std::vector<bool>{true, true}));
  EXPECT_EQ(queue.waiting(line), 1);
  queue.Leave();
  EXPECT_EQ(at_once, (std::vector<bool>{true, true, false}));
  queue.Leave();
  queue.Leave();
  EXPECT_TRUE(queue.Enter(line, 1, start));
  EXPECT_TRUE(at_once.back()) << "all places are free again";
}

TEST(FairQueueTest, AQuietLineWaitsForOneTurnHoweverLongTheOtherIs) {
  FairQueue queue(1, 1000);
  const int loud = queue.AddLine(1), quiet = queue.AddLine(1);
  Notes notes;
  for (int i = 0; i < 100; ++i) queue.Enter(loud, 1, notes.Start('l'));
  queue.Enter(quiet, 1, notes.Start('q'));
  for (int i = 0; i < 3; ++i) queue.Leave();
  EXPECT_EQ(notes.text().find('q'), 1u) << notes.text();
}

TEST(FairQueueTest, TurnsFollowWeightAndCost) {
  FairQueue queue(1, 1000);
  const int a = queue.AddLine(3), b = queue.AddLine(1), c = queue.AddLine(1);
  Notes notes;
  queue.Enter(a, 1, notes.Start('-'));
  for (int i = 0; i < 40; ++i) {
    queue.Enter(a, 1, notes.Start('a'));
    queue.Enter(b, 1, notes.Start('b'));
    queue.Enter(c, 4, notes.Start('c'));  // batches
  }
  for (int i = 0; i < 40; ++i) queue.Leave();
  const auto count = [&](char name) {
    return std::count(notes.text().begin(), notes.text().end(), name);
  };
  EXPECT_NEAR(static_cast<double>(count('a')), 40 * 3 / 4.25, 3) << notes.text();
  EXPECT_NEAR(static_cast<double>(count('b')), 40 * 1 / 4.25, 2) << notes.text();
  EXPECT_NEAR(static_cast<double>(count('c')), 40 * 0.25 / 4.25, 2) << notes.text();
}

TEST(FairQueueTest, AFullLineRefusesAndTheOtherDoesNot) {
  FairQueue queue(1, 2);
  const int a = queue.AddLine(1), b = queue.AddLine(1);
  Notes notes;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(queue.Enter(a, 1, notes.Start('a')));
  EXPECT_FALSE(queue.Enter(a, 1, notes.Start('x')));
  EXPECT_TRUE(queue.Enter(b, 1, notes.Start('b')));
}

TEST(FairQueueTest, WorkThatEndsInItsOwnStartIsNoDeepStack) {
  constexpr int kMany = 200'000;
  FairQueue queue(1, kMany);
  const int line = queue.AddLine(1);
  int started = 0;
  queue.Enter(line, 1, [](bool) {});
  for (int i = 0; i < kMany; ++i) {
    queue.Enter(line, 1, [&](bool) {
      ++started;
      queue.Leave();
    });
  }
  queue.Leave();
  EXPECT_EQ(started, kMany);
}

TEST(FairQueueTest, ManyThreadsLoseNothingAndKeepEachLinesOrder) {
  constexpr int kThreads = 4, kEach = 5000;
  FairQueue queue(3, kEach);
  std::vector<int> lines;
  for (int i = 0; i < kThreads; ++i) lines.push_back(queue.AddLine(1));
  std::atomic<int64_t> started{0}, running{0}, most{0};
  std::vector<std::vector<int>> order(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        const bool entered = queue.Enter(lines[static_cast<size_t>(t)], 1 + i % 3, [&, t, i](bool) {
          const int64_t now = running.fetch_add(1) + 1;
          int64_t seen = most.load();
          while (seen < now && !most.compare_exchange_weak(seen, now)) {
          }
          order[static_cast<size_t>(t)].push_back(i);
          started.fetch_add(1);
          running.fetch_sub(1);
          queue.Leave();
        });
        EXPECT_TRUE(entered);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(started.load(), kThreads * kEach);
  EXPECT_LE(most.load(), 3);
  for (const auto& one : order) EXPECT_TRUE(std::is_sorted(one.begin(), one.end()));
}

}  // namespace
}  // namespace clusterkv::cache_service
