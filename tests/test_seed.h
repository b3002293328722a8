// Randomised tests: their seed, printed, and set by the environment to repeat a failure; and how
// many operations those with a model make.
#ifndef CLUSTERKV_TESTS_TEST_SEED_H_
#define CLUSTERKV_TESTS_TEST_SEED_H_

#include <cstdint>
#include <cstdlib>
#include <iostream>

namespace clusterkv {

// CLUSTERKV_TEST_SEED where it is set, else `otherwise`.
inline uint64_t TestSeed(uint64_t otherwise) {
  const char* text = std::getenv("CLUSTERKV_TEST_SEED");
  const uint64_t seed = text != nullptr ? std::strtoull(text, nullptr, 0) : otherwise;
  std::cout << "CLUSTERKV_TEST_SEED=" << seed << std::endl;
  return seed;
}

#ifdef CLUSTERKV_SANITIZED
inline constexpr int64_t kFuzzOperations = 100'000;  // ten to thirty times slower there
#else
inline constexpr int64_t kFuzzOperations = 1'000'000;
#endif

}  // namespace clusterkv

#endif  // CLUSTERKV_TESTS_TEST_SEED_H_
