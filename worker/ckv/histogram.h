// A log-linear histogram of latencies, as HdrHistogram's: each power of two is cut into 64 equal
// buckets, so that a quantile is off by at most 1/64 of itself. Fixed memory, no allocation on
// Record.
//
// Not thread-safe: one per thread, merged at the end.
#ifndef CLUSTERKV_WORKER_CKV_HISTOGRAM_H_
#define CLUSTERKV_WORKER_CKV_HISTOGRAM_H_

#include <cstdint>
#include <vector>

namespace clusterkv::worker::ckv {

class Histogram {
 public:
  Histogram();

  // value >= 0 (nanoseconds, by habit); negative ones count as 0.
  void Record(int64_t value);
  void Merge(const Histogram& other);

  int64_t count() const { return count_; }
  int64_t min() const { return count_ == 0 ? 0 : min_; }
  int64_t max() const { return max_; }
  double mean() const { return count_ == 0 ? 0 : sum_ / static_cast<double>(count_); }
  // The smallest recorded value (up to the bucket's width, never beyond max) that at least
  // `quantile` of all values do not exceed. 0 without values.
  int64_t Quantile(double quantile) const;

  // Counts over `bars` equal intervals from min to max, as ghz draws them: counts[i] are the values
  // in (mark[i - 1], mark[i]], mark[0] = min.
  struct Bars {
    std::vector<int64_t> marks;
    std::vector<int64_t> counts;
  };
  Bars EqualBars(int bars) const;

 private:
  static constexpr int kSubBits = 6;
  static int IndexOf(int64_t value);
  static int64_t UpperOf(int index);  // the largest value of the bucket

  std::vector<int64_t> buckets_;
  int64_t count_ = 0;
  int64_t min_ = 0;
  int64_t max_ = 0;
  double sum_ = 0;
};

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_HISTOGRAM_H_
