#include "worker/ckv/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "worker/ckv/exit_code.h"

namespace clusterkv::worker::ckv {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FlagsTest : public ::testing::Test {
 protected:
  FlagsTest() {
    flags_.Bool("compare", &compare_, "compare");
    flags_.Int("steps", "N", &steps_, 0, 100, "steps");
    flags_.OptionalInt("budget", "N", &budget_, 0, 1 << 20, "budget");
    flags_.Double("rps", "N", &rps_, 0, 1e6, "calls per second");
    flags_.String("json", "FILE", &json_, "where");
    flags_.Strings("trace", "FILE", &traces_, "which");
    flags_.Choice("preset", {"recall", "default"}, &preset_, "how");
    flags_.Duration("wait", &wait_, "how long");
  }

  std::string ErrorOf(const std::vector<std::string>& arguments) {
    const absl::Status status = flags_.Parse(arguments);
    EXPECT_EQ(ExitCodeOf(status), kExitUsage);
    return std::string(status.message());
  }

  FlagSet flags_;
  bool compare_ = false;
  int64_t steps_ = 7;
  std::optional<int64_t> budget_;
  double rps_ = 0.5;
  std::string json_, preset_ = "default";
  std::vector<std::string> traces_, files_;
  absl::Duration wait_ = absl::Seconds(5);
};

TEST_F(FlagsTest, DefaultsStayWithoutFlags) {
  ASSERT_TRUE(flags_.Parse({}).ok());
  EXPECT_EQ(steps_, 7);
  EXPECT_FALSE(budget_.has_value());
  EXPECT_EQ(preset_, "default");
}

TEST_F(FlagsTest, ValuesComeWithEqualsSignOrAsTheNextArgument) {
  ASSERT_TRUE(flags_.Parse({"--steps=3", "--json", "out.json", "--budget=0"}).ok());
  EXPECT_EQ(steps_, 3);
  EXPECT_EQ(json_, "out.json");
  EXPECT_EQ(budget_, 0);
}

TEST_F(FlagsTest, EveryTypeIsParsed) {
  ASSERT_TRUE(flags_.Parse({"--compare", "--rps=2.5", "--preset=recall", "--wait=1m30s"}).ok());
  EXPECT_TRUE(compare_);
  EXPECT_EQ(rps_, 2.5);
  EXPECT_EQ(preset_, "recall");
  EXPECT_EQ(wait_, absl::Seconds(90));
}

TEST_F(FlagsTest, BooleansCanBeTurnedOff) {
  compare_ = true;
  ASSERT_TRUE(flags_.Parse({"--nocompare"}).ok());
  EXPECT_FALSE(compare_);
}

TEST_F(FlagsTest, RepeatedFlagsAndCommasCollect) {
  ASSERT_TRUE(flags_.Parse({"--trace=a,b", "--trace=c"}).ok());
  EXPECT_THAT(traces_, ElementsAre("a", "b", "c"));
}

TEST_F(FlagsTest, PositionalArgumentsMixWithFlagsAndFollowTwoDashes) {
  flags_.Positional("FILE…", 1, &files_, "files");
  ASSERT_TRUE(flags_.Parse({"a", "--steps=1", "-", "--", "--b"}).ok());
  EXPECT_THAT(files_, ElementsAre("a", "-", "--b"));
}

TEST_F(FlagsTest, MissingPositionalArgumentsAreNamed) {
  flags_.Positional("FILE…", 1, &files_, "files to read");
  EXPECT_THAT(ErrorOf({}), HasSubstr("FILE…: files to read"));
}

TEST_F(FlagsTest, UnknownFlagsNameTheNearestKnownOne) {
  EXPECT_EQ(ErrorOf({"--bugdet=3"}), "unknown flag --bugdet; did you mean --budget?");
  EXPECT_EQ(ErrorOf({"--zzzzzzzzz"}), "unknown flag --zzzzzzzzz");
}

TEST_F(FlagsTest, WrongValuesNameFlagExpectedAndGot) {
  EXPECT_EQ(ErrorOf({"--steps=101"}),
            "--steps: expected a whole number from 0 to 100, got \"101\"");
  for (const char* bad : {"", "3x", "0x3", " 3", "1e1", "99999999999999999999", "-1"}) {
    FlagSet fresh;
    fresh.Int("steps", "N", &steps_, 0, 100, "steps");
    EXPECT_FALSE(fresh.Parse({std::string("--steps=") + bad}).ok()) << bad;
  }
  EXPECT_THAT(ErrorOf({"--preset=best"}), HasSubstr("one of recall, default, got \"best\""));
  EXPECT_THAT(ErrorOf({"--wait=0s"}), HasSubstr("a duration above 0"));
  EXPECT_THAT(ErrorOf({"--rps=nan"}), HasSubstr("a number"));
  EXPECT_THAT(ErrorOf({"--compare=yes"}), HasSubstr("true or false"));
}

TEST_F(FlagsTest, MissingValuesRepetitionsAndStrayArgumentsAreRefused) {
  EXPECT_EQ(ErrorOf({"--json"}), "--json needs a value: --json=FILE");
  EXPECT_EQ(ErrorOf({"--steps=1", "--steps=2"}), "--steps is given twice");
  EXPECT_EQ(ErrorOf({"stray"}), "unexpected argument \"stray\"");
  EXPECT_THAT(ErrorOf({"-v"}), HasSubstr("unknown flag -v"));
}

TEST_F(FlagsTest, RequiredFlagsAreAskedFor) {
  std::string name;
  flags_.String("sequence", "NAME", &name, "which one").required = true;
  EXPECT_EQ(ErrorOf({}), "--sequence=NAME is required: which one");
  EXPECT_TRUE(flags_.Parse({"--sequence=x"}).ok());
}

TEST_F(FlagsTest, HelpShowsEveryFlagWithItsDefault) {
  const std::string help = flags_.HelpText();
  EXPECT_THAT(help, HasSubstr("--steps=N"));
  EXPECT_THAT(help, HasSubstr("(default 7)"));
  EXPECT_THAT(help, HasSubstr("(default 0.5)"));
  EXPECT_THAT(help, HasSubstr("--preset=recall|default"));
  EXPECT_THAT(help, HasSubstr("(default 5s)"));
}

TEST(NearestTest, OnlyNearWordsAreSuggested) {
  EXPECT_EQ(Nearest("staus", {"status", "seed"}), "status");
  EXPECT_EQ(Nearest("frobnicate", {"status", "seed"}), "");
  EXPECT_EQ(Nearest("", {}), "");
}

TEST(ExitCodeTest, EachKindOfFailureHasItsCode) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("x")), 1);
  EXPECT_EQ(ExitCodeOf(UsageError("x")), 2);
  EXPECT_EQ(ExitCodeOf(ConnectError("h:1", absl::UnavailableError("x"))), 3);
}

}  // namespace
}  // namespace clusterkv::worker::ckv
