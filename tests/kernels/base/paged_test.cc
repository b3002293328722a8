#include "kernels/base/paged.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace clusterkv::kernels {
namespace {

TEST(PagedTest, PagesForRoundsUpAndNeverSplitsAnElement) {
  EXPECT_EQ(PagesFor(0, 512, 4096), 0);
  EXPECT_EQ(PagesFor(1, 512, 4096), 1);
  EXPECT_EQ(PagesFor(8, 512, 4096), 1);
  EXPECT_EQ(PagesFor(9, 512, 4096), 2);
  EXPECT_EQ(PagesFor(4, 1366, 4096), 2);  // two a page, 1364 bytes unused
  EXPECT_EQ(PagesFor(7, 4096, 4096), 7);
}

TEST(PagedTest, ElementsLieWhereThePageListSays) {
  std::vector<std::byte> arena(4 * 100);
  const std::vector<uint32_t> pages = {3, 0, 2};
  const MutablePagedView view = MakePagedView(arena.data(), pages.data(), 100, 30, 8);
  EXPECT_EQ(view.elements_per_page, 3);
  EXPECT_EQ(view.At(0), arena.data() + 300);
  EXPECT_EQ(view.At(2), arena.data() + 360);
  EXPECT_EQ(view.At(3), arena.data());
  EXPECT_EQ(view.At(7), arena.data() + 230);
  const PagedView read_only = view;
  EXPECT_EQ(read_only.At(7), view.At(7));
}

TEST(PagedTest, PagesBeyondFourGibibytesAreAddressedIn64Bits) {
  // Nothing is read: a view computes addresses alone.
  auto* base = reinterpret_cast<std::byte*>(uintptr_t{1} << 40);
  const std::vector<uint32_t> pages = {3'000'000'000u};
  const MutablePagedView view = MakePagedView(base, pages.data(), 32768, 512, 64);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view.At(1)) - reinterpret_cast<uintptr_t>(base),
            uint64_t{3'000'000'000} * 32768 + 512);
}

TEST(PagedTest, RunsCoverARangeInOrderAndStayInsidePages) {
  std::vector<std::byte> arena(8 * 64);
  const std::vector<uint32_t> pages = {5, 1, 7, 0};
  const PagedView view = MakePagedView<const std::byte>(arena.data(), pages.data(), 64, 16, 15);
  for (int64_t begin = 0; begin <= 15; ++begin) {
    for (int64_t end = begin; end <= 15; ++end) {
      int64_t next = begin;
      ForEachRun(view, begin, end, [&](const std::byte* run, int64_t first, int64_t count) {
        EXPECT_EQ(first, next);
        EXPECT_GT(count, 0);
        for (int64_t i = 0; i < count; ++i) EXPECT_EQ(run + 16 * i, view.At(first + i));
        next += count;
      });
      EXPECT_EQ(next, end);
    }
  }
}

TEST(PagedDeathTest, AnElementLargerThanAPageIsAProgrammersError) {
  EXPECT_DEATH(PagesFor(1, 65, 64), "CHECK failed");
  EXPECT_DEATH(PagesFor(1, 0, 64), "CHECK failed");
}

}  // namespace
}  // namespace clusterkv::kernels
