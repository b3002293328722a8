#include "worker/ckv/svg.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/ckv/well_formed.h"

namespace clusterkv::worker::ckv {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(SvgTest, APictureOfEverythingIsWellFormed) {
  Svg svg(300, 200, "a <title> & \"more\"");
  svg.Line({0, 0}, {10, 10}, "ink");
  svg.Polyline({{0, 0}, {1, 2.5}, {3, 4}}, "c0");
  svg.Rectangle({1, 2}, 3, 4, "c1", "3 < 4");
  svg.Cell({1, 2}, 3, 4, "c1", 0.5);
  for (const auto marker : {Svg::Marker::kCircle, Svg::Marker::kSquare, Svg::Marker::kTriangle,
                            Svg::Marker::kDiamond}) {
    svg.Mark({5, 5}, marker, "c2", "tip & tip");
  }
  svg.Text({1, 1}, "<script>alert('x')</script> & µs", Svg::Anchor::kEnd, 12, "ink", -90);
  const std::string text = svg.Finish();
  EXPECT_EQ(WellFormedError(text), "");
  EXPECT_THAT(text, Not(HasSubstr("<script")));
  EXPECT_THAT(text, HasSubstr("viewBox=\"0 0 300 200\""));
}

TEST(SvgTest, PicturesAreSelfContained) {
  const std::string text = Svg(10, 10, "empty").Finish();
  EXPECT_EQ(WellFormedError(text), "");
  EXPECT_THAT(text, Not(HasSubstr("href")));
  EXPECT_THAT(text, Not(HasSubstr("url(")));
}

TEST(SvgTest, ControlCharactersNeverReachTheFile) {
  EXPECT_EQ(XmlEscaped(std::string_view("a\0b\x1b<", 5)), "a b &lt;");
}

TEST(WellFormedTest, TheCheckItselfFindsFaults) {
  EXPECT_NE(WellFormedError("<a><b></a></b>"), "");
  EXPECT_NE(WellFormedError("<a"), "");
  EXPECT_NE(WellFormedError("<a>& </a>"), "");
  EXPECT_NE(WellFormedError("<a x=1/>"), "");
  EXPECT_NE(WellFormedError("<a/><b/>"), "");
  EXPECT_EQ(WellFormedError("<a x=\"1\"><b/>&amp;</a>\n"), "");
}

TEST(LogTicksTest, TicksAreRoundAndInside) {
  EXPECT_THAT(LogTicks(0.9, 11), ElementsAre(1, 2, 5, 10));
  EXPECT_THAT(LogTicks(1, 1e4), ElementsAre(1, 10, 100, 1000, 10000));
}

TEST(LogTicksTest, BytesGoByPowersOfFour) {
  EXPECT_THAT(ByteTicks(1024, 70000), ElementsAre(1024, 4096, 16384, 65536));
}

TEST(WriteFileTest, AFolderThatIsNotThereIsNamed) {
  const absl::Status status = WriteFile("/no/such/folder/x.svg", "x");
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr("/no/such/folder/x.svg"));
}

}  // namespace
}  // namespace clusterkv::worker::ckv
