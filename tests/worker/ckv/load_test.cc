#include "worker/ckv/load.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>

#include "absl/time/clock.h"

namespace clusterkv::worker::ckv {
namespace {

using ::testing::HasSubstr;

TEST(LoadTest, AnOpenLoopMakesEveryCallThatIsDue) {
  std::atomic<int> calls{0};
  const LoadCall call = [&] {
    ++calls;
    return absl::OkStatus();
  };
  LoadOptions options{.rps = 500, .duration = absl::Milliseconds(200), .concurrency = 3};
  const LoadResult result = RunLoad(options, {call, call, call}, nullptr);
  EXPECT_EQ(result.count(), 100);
  EXPECT_EQ(calls.load(), 100);
  EXPECT_EQ(result.failed(), 0);
}

TEST(LoadTest, AStallIsChargedToTheCallsThatItKeptWaiting) {
  // One thread, a call every 10 ms, the first one takes 100 ms: the next nine are late by 90, 80 …
  // ms.
  std::atomic<int> calls{0};
  const LoadCall call = [&] {
    if (calls.fetch_add(1) == 0) absl::SleepFor(absl::Milliseconds(100));
    return absl::OkStatus();
  };
  LoadOptions options{.rps = 100, .duration = absl::Milliseconds(200), .concurrency = 1};
  const LoadResult result = RunLoad(options, {call}, nullptr);
  EXPECT_EQ(result.count(), 20);
  // Half of the calls waited; measured from when they were sent, only one would show.
  EXPECT_GE(result.latencies_ns.Quantile(0.75), absl::ToInt64Nanoseconds(absl::Milliseconds(30)));
}

TEST(LoadTest, FailuresAreCountedByCodeAndLeftOutOfTheLatencies) {
  std::atomic<int> calls{0};
  const LoadCall call = [&] {
    return calls.fetch_add(1) % 2 == 0 ? absl::OkStatus() : absl::UnavailableError("draining");
  };
  LoadOptions options{.rps = 100, .duration = absl::Milliseconds(100), .concurrency = 1};
  const LoadResult result = RunLoad(options, {call}, nullptr);
  EXPECT_EQ(result.status_codes.at("OK"), 5);
  EXPECT_EQ(result.status_codes.at("Unavailable"), 5);
  EXPECT_EQ(result.latencies_ns.count(), 5);
  EXPECT_EQ(result.failed(), 5);
  const auto json = nlohmann::json::parse(LoadJson(result));
  EXPECT_EQ(json["errorDistribution"]["rpc error: code = Unavailable desc = draining"], 5);
}

TEST(LoadTest, JsonHasTheKeysOfGhz) {
  LoadResult result;
  result.total = absl::Seconds(2);
  for (int i = 1; i <= 100; ++i) result.latencies_ns.Record(i * 1'000'000);
  result.status_codes["OK"] = 100;
  const auto json = nlohmann::json::parse(LoadJson(result));
  for (const char* key :
       {"count", "total", "average", "fastest", "slowest", "rps", "errorDistribution",
        "statusCodeDistribution", "latencyDistribution", "histogram"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["count"], 100);
  EXPECT_EQ(json["total"], 2'000'000'000);
  EXPECT_EQ(json["rps"], 50.0);
  EXPECT_EQ(json["fastest"], 1'000'000);
  EXPECT_EQ(json["latencyDistribution"][2]["percentage"], 50);
  const int64_t median = json["latencyDistribution"][2]["latency"];
  EXPECT_LE(std::abs(median - 50'000'000), 50'000'000 / 64);
  int64_t counted = 0;
  for (const auto& bar : json["histogram"]) counted += bar["count"].get<int64_t>();
  EXPECT_EQ(counted, 100);
}

TEST(LoadTest, TheSummaryReadsAsGhz) {
  LoadResult result;
  result.total = absl::Seconds(1);
  result.latencies_ns.Record(2'000'000);
  result.status_codes["OK"] = 1;
  const std::string text = LoadSummary(result);
  for (const char* part : {"Summary:", "Requests/sec:", "Response time histogram:",
                           "Latency distribution:", "50 % in 2.00 ms", "[OK]   1 responses"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
  LoadResult none;
  none.total = absl::Seconds(1);
  EXPECT_THAT(LoadSummary(none), HasSubstr("Count:        0"));
}

}  // namespace
}  // namespace clusterkv::worker::ckv
