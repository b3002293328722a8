// A ParallelFor for tests and benchmarks: `threads` threads that live for one call and take indices
// in whatever order they come.
#ifndef CLUSTERKV_TESTS_SUPPORT_TEST_THREADS_H_
#define CLUSTERKV_TESTS_SUPPORT_TEST_THREADS_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace clusterkv::testing {

// Pass as a ParallelFor while it lives.
class TestThreads {
 public:
  explicit TestThreads(int threads) : threads_(threads) {}

  void operator()(int64_t count, absl::FunctionRef<void(int64_t index)> task) const {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i = next++; i < count; i = next++) task(i);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads_; ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  int threads_;
};

}  // namespace clusterkv::testing

#endif  // CLUSTERKV_TESTS_SUPPORT_TEST_THREADS_H_
