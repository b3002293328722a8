// Select allocates nothing once its scratch and selection have grown.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "kernels/select/select.h"
#include "tests/kernels/testing/select_fixture.h"

namespace {
std::atomic<int64_t> allocations{0};
}  // namespace

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

namespace clusterkv::kernels {
namespace {

TEST(SelectAllocationTest, SteadyStateAllocatesNothing) {
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
  const int64_t before = allocations;
  steps();
  EXPECT_EQ(allocations - before, 0);
}

}  // namespace
}  // namespace clusterkv::kernels
