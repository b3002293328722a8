// The seed of a randomised test: printed, and set by the environment to repeat a failure.
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

}  // namespace clusterkv

#endif  // CLUSTERKV_TESTS_TEST_SEED_H_
