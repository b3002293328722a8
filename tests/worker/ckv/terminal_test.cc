#include "worker/ckv/terminal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>

namespace clusterkv::worker::ckv {
namespace {

TEST(TerminalTest, QuantitiesAreReadable) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(812), "812 B");
  EXPECT_EQ(HumanBytes(3481.6), "3.4 KiB");
  EXPECT_EQ(HumanBytes(1.5 * 1024 * 1024 * 1024), "1.5 GiB");
  EXPECT_EQ(HumanDuration(absl::Nanoseconds(0)), "0 ns");
  EXPECT_EQ(HumanDuration(absl::Microseconds(12)), "12.0 µs");
  EXPECT_EQ(HumanDuration(absl::Milliseconds(1210)), "1.21 s");
  EXPECT_EQ(HumanDuration(absl::Seconds(200)), "3 m 20 s");
  EXPECT_EQ(HumanDuration(absl::Hours(26)), "26 h 0 m");
  EXPECT_EQ(HumanCount(0), "0");
  EXPECT_EQ(HumanCount(999), "999");
  EXPECT_EQ(HumanCount(1234567), "1,234,567");
  EXPECT_EQ(HumanCount(-1234), "-1,234");
}

TEST(TerminalTest, SignificantDigitsAreKept) {
  EXPECT_EQ(Significant(0, 3), "0");
  EXPECT_EQ(Significant(0.018812, 3), "0.0188");
  EXPECT_EQ(Significant(1490.6, 4), "1491");
  EXPECT_EQ(Significant(12.34, 3), "12.3");
  EXPECT_EQ(Significant(std::numeric_limits<double>::quiet_NaN(), 3), "–");
}

TEST(TerminalTest, TablesAlignByWhatIsShownNotByBytes) {
  Table table({"name", "µs"});
  table.AddRow({"a", "12"});
  table.AddRow({"größer", "1"});
  EXPECT_EQ(table.Text(), "name    µs\na       12\ngrößer   1\n");
}

TEST(TerminalTest, MarkdownTablesHaveARuleAndAsManyCellsInEachRow) {
  Table table({"name", "n"});
  table.AddRow({"a"});  // a missing cell is an empty one
  EXPECT_EQ(table.Markdown(), "| name | n |\n|:-----|--:|\n| a    |   |\n");
}

TEST(TerminalTest, BarsAreClamped) {
  EXPECT_EQ(Bar(0.5, 4), "██░░");
  EXPECT_EQ(Bar(-1, 2), "░░");
  EXPECT_EQ(Bar(7, 2), "██");
  EXPECT_EQ(Bar(std::numeric_limits<double>::quiet_NaN(), 2), "░░");
}

TEST(TerminalTest, NoColourOffATerminal) {
  // Standard output of a test is a pipe or a file; -1 is no terminal anywhere.
  EXPECT_EQ(Colored("text", Color::kRed, -1), "text");
}

}  // namespace
}  // namespace clusterkv::worker::ckv
