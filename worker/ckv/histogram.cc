#include "worker/ckv/histogram.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace clusterkv::worker::ckv {
namespace {

constexpr int kValueBits = 63;

}  // namespace

// Values below 2^kSubBits have a bucket each; above, bucket (e, m) holds those whose leading bit is
// e and whose next kSubBits bits are m.
Histogram::Histogram() : buckets_((kValueBits - kSubBits + 1) << kSubBits) {}

int Histogram::IndexOf(int64_t value) {
  if (value < (int64_t{1} << kSubBits)) return static_cast<int>(value);
  const int exponent = std::bit_width(static_cast<uint64_t>(value)) - 1;
  const int shift = exponent - kSubBits;
  const int mantissa = static_cast<int>(value >> shift) - (1 << kSubBits);
  return ((shift + 1) << kSubBits) + mantissa;
}

int64_t Histogram::UpperOf(int index) {
  if (index < (1 << kSubBits)) return index;
  const int shift = (index >> kSubBits) - 1;
  const int64_t mantissa = (index & ((1 << kSubBits) - 1)) + (1 << kSubBits);
  return (mantissa << shift) + ((int64_t{1} << shift) - 1);
}

void Histogram::Record(int64_t value) {
  value = std::max<int64_t>(value, 0);
  ++buckets_[IndexOf(value)];
  min_ = count_ == 0 ? value : std::min(min_, value);
  max_ = std::max(max_, value);
  sum_ += static_cast<double>(value);
  ++count_;
}

void Histogram::Merge(const Histogram& other) {
  if (other.count_ == 0) return;
  for (size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
  min_ = count_ == 0 ? other.min_ : std::min(min_, other.min_);
  max_ = std::max(max_, other.max_);
  sum_ += other.sum_;
  count_ += other.count_;
}

int64_t Histogram::Quantile(double quantile) const {
  if (count_ == 0) return 0;
  const double clamped = std::clamp(quantile, 0.0, 1.0);
  const int64_t wanted = std::max<int64_t>(
      1, static_cast<int64_t>(std::ceil(clamped * static_cast<double>(count_) - 1e-9)));
  int64_t seen = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    seen += buckets_[i];
    if (seen >= wanted) return std::clamp(UpperOf(static_cast<int>(i)), min_, max_);
  }
  return max_;
}

Histogram::Bars Histogram::EqualBars(int bars) const {
  Bars result;
  if (count_ == 0) return result;
  for (int i = 0; i <= bars; ++i) {
    result.marks.push_back(
        min_ + static_cast<int64_t>(std::llround(static_cast<double>(max_ - min_) * i / bars)));
  }
  result.counts.resize(result.marks.size());
  for (size_t i = 0; i < buckets_.size(); ++i) {
    if (buckets_[i] == 0) continue;
    int64_t value = std::clamp(UpperOf(static_cast<int>(i)), min_, max_);
    if (static_cast<int>(i) == IndexOf(min_)) value = min_;  // the fastest has a bar, as in ghz
    const auto mark = std::lower_bound(result.marks.begin(), result.marks.end(), value);
    result.counts[mark - result.marks.begin()] += buckets_[i];
  }
  return result;
}

}  // namespace clusterkv::worker::ckv
