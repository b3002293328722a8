#include "worker/ckv/histogram.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace clusterkv::worker::ckv {
namespace {

TEST(HistogramTest, AnEmptyOneAnswersZero) {
  const Histogram histogram;
  EXPECT_EQ(histogram.count(), 0);
  EXPECT_EQ(histogram.Quantile(0.5), 0);
  EXPECT_EQ(histogram.mean(), 0);
  EXPECT_TRUE(histogram.EqualBars(10).marks.empty());
}

TEST(HistogramTest, OneValueIsEveryQuantile) {
  Histogram histogram;
  histogram.Record(123'456'789);
  for (const double q : {0.0, 0.5, 0.999, 1.0}) EXPECT_EQ(histogram.Quantile(q), 123'456'789);
  EXPECT_EQ(histogram.mean(), 123'456'789);
}

TEST(HistogramTest, SmallValuesAreExact) {
  Histogram histogram;
  for (int64_t value = 1; value <= 63; ++value) histogram.Record(value);
  EXPECT_EQ(histogram.Quantile(1.0 / 63), 1);
  EXPECT_EQ(histogram.Quantile(0.5), 32);
  EXPECT_EQ(histogram.Quantile(1), 63);
}

TEST(HistogramTest, QuantilesAreWithinOnePartIn64OfTheSortedList) {
  const uint32_t seed = 20240711;
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  std::lognormal_distribution<double> latency(std::log(3e5), 2.0);
  Histogram histogram;
  std::vector<int64_t> values;
  for (int i = 0; i < 20011; ++i) {
    values.push_back(static_cast<int64_t>(latency(random)));
    histogram.Record(values.back());
  }
  std::sort(values.begin(), values.end());
  for (const double q : {0.01, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0}) {
    const int64_t exact = values[static_cast<size_t>(std::ceil(q * values.size())) - 1];
    const double difference = std::fabs(static_cast<double>(histogram.Quantile(q) - exact));
    EXPECT_FALSE(!(difference <= exact / 64.0)) << q << " " << exact;
  }
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / values.size();
  EXPECT_FALSE(!(std::fabs(histogram.mean() - mean) <= 1e-9 * mean));
}

TEST(HistogramTest, ExtremesFitAndNegativesCountAsZero) {
  Histogram histogram;
  histogram.Record(-5);
  histogram.Record(std::numeric_limits<int64_t>::max());
  EXPECT_EQ(histogram.min(), 0);
  EXPECT_EQ(histogram.max(), std::numeric_limits<int64_t>::max());
  EXPECT_EQ(histogram.Quantile(0.5), 0);
  EXPECT_EQ(histogram.Quantile(1), std::numeric_limits<int64_t>::max());
}

TEST(HistogramTest, MergingEqualsRecordingIntoOne) {
  Histogram a, b, both;
  for (int64_t i = 0; i < 1009; ++i) {
    const int64_t value = i * i * 37;
    (i % 3 == 0 ? a : b).Record(value);
    both.Record(value);
  }
  a.Merge(b);
  a.Merge(Histogram());
  EXPECT_EQ(a.count(), both.count());
  EXPECT_EQ(a.min(), both.min());
  EXPECT_EQ(a.max(), both.max());
  for (double q = 0; q <= 1; q += 0.05) EXPECT_EQ(a.Quantile(q), both.Quantile(q));
}

TEST(HistogramTest, BarsCountEveryValueOnce) {
  Histogram histogram;
  for (int64_t i = 0; i < 997; ++i) histogram.Record(1000 + 13 * i);
  const auto bars = histogram.EqualBars(10);
  ASSERT_EQ(bars.marks.size(), 11u);
  EXPECT_EQ(bars.marks.front(), histogram.min());
  EXPECT_EQ(bars.marks.back(), histogram.max());
  EXPECT_EQ(std::accumulate(bars.counts.begin(), bars.counts.end(), int64_t{0}), 997);
}

}  // namespace
}  // namespace clusterkv::worker::ckv
