// Select allocates nothing once its scratch and selection have grown. Counted by replacing operator
// new, which sanitizers replace themselves: under them the test is skipped.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels/select/select.h"
#include "tests/kernels/testing/select_fixture.h"

namespace {
std::atomic<int64_t> allocations{0};
}  // namespace

#ifndef CLUSTERKV_SANITIZED
void* operator new(size_t bytes) {
  ++allocations;
  void* memory = std::malloc(bytes);
  if (memory == nullptr) std::abort();
  return memory;
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace clusterkv::kernels {
namespace {

TEST(SelectAllocationTest, SteadyStateAllocatesNothing) {
#ifdef CLUSTERKV_SANITIZED
  GTEST_SKIP() << "a sanitizer owns operator new: allocations cannot be counted";
#endif
  using testing::SelectFixture;
  testing::TestPartSpec spec =
      testing::PlantedPart(testing::MakeShape(2, 4, 128), {2, 32}, 1201, 75, 3);
  spec.first_token = SelectFixture::kSinks;
  SelectFixture f({spec}, 3);
  SelectScratch scratch;
  HeadSelection selection;
  const SelectParams shared{SelectMode::kSharedPerKvHead, 64, 512, true, 0.25f};
  const SelectParams published{SelectMode::kPerQueryHead, 300, 0, false, 0.0f};
  const auto steps = [&] {
    for (int step = 0; step < 20; ++step) {
      f.input().kv_head = step % 2;
      for (const SelectParams& params : {shared, published}) {
        if (!Select(params, f.input(), scratch, &selection).ok()) std::abort();
      }
    }
  };
  steps();
  ASSERT_GT(allocations, 0) << "operator new is not the one that counts";
  const int64_t before = allocations;
  steps();
  EXPECT_EQ(allocations - before, 0);
}

}  // namespace
}  // namespace clusterkv::kernels
