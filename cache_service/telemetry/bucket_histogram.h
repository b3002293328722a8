// A histogram of durations with fixed buckets: what Prometheus wants, cheap enough for the hot
// path.
//
// Thread-safe and lock-free: Record is a short search and three relaxed additions. A snapshot taken
// while others record may miss the latest records, never count one twice.
#ifndef CLUSTERKV_CACHE_SERVICE_TELEMETRY_BUCKET_HISTOGRAM_H_
#define CLUSTERKV_CACHE_SERVICE_TELEMETRY_BUCKET_HISTOGRAM_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <iterator>

#include "absl/time/time.h"

namespace clusterkv::cache_service {

class BucketHistogram {
 public:
  // Upper bounds in nanoseconds, inclusive: gRPC's ladder (proposal A66), finer at the short end.
  static constexpr int64_t kBounds[] = {
      5'000,          10'000,         20'000,         50'000,        75'000,        100'000,
      150'000,        200'000,        300'000,        500'000,       750'000,       1'000'000,
      2'000'000,      3'000'000,      5'000'000,      10'000'000,    20'000'000,    50'000'000,
      100'000'000,    200'000'000,    500'000'000,    1'000'000'000, 2'000'000'000, 5'000'000'000,
      10'000'000'000, 30'000'000'000, 100'000'000'000};
  static constexpr int kBuckets = static_cast<int>(std::size(kBounds)) + 1;  // the last: above all

  struct Snapshot {
    std::array<uint64_t, kBuckets> counts{};  // not cumulative
    uint64_t count = 0;
    double sum_seconds = 0;
  };

  void Record(absl::Duration duration) {
    const int64_t ns = std::max<int64_t>(0, absl::ToInt64Nanoseconds(duration));
    const auto* bound = std::lower_bound(std::begin(kBounds), std::end(kBounds), ns);
    counts_[static_cast<size_t>(bound - std::begin(kBounds))].fetch_add(1,
                                                                        std::memory_order_relaxed);
    sum_ns_.fetch_add(static_cast<uint64_t>(ns), std::memory_order_relaxed);
  }

  Snapshot Take() const {
    Snapshot snapshot;
    for (int i = 0; i < kBuckets; ++i) {
      snapshot.counts[i] = counts_[i].load(std::memory_order_relaxed);
      snapshot.count += snapshot.counts[i];
    }
    snapshot.sum_seconds = static_cast<double>(sum_ns_.load(std::memory_order_relaxed)) * 1e-9;
    return snapshot;
  }

 private:
  std::array<std::atomic<uint64_t>, kBuckets> counts_{};
  std::atomic<uint64_t> sum_ns_{0};
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TELEMETRY_BUCKET_HISTOGRAM_H_
