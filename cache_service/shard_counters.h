// What a shard counts since its start. All functions are thread-safe and never block.
#ifndef CLUSTERKV_CACHE_SERVICE_SHARD_COUNTERS_H_
#define CLUSTERKV_CACHE_SERVICE_SHARD_COUNTERS_H_

#include <array>
#include <atomic>
#include <cstdint>

#include "absl/time/time.h"
#include "clusterkv/v1/admin_service.pb.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "clusterkv/v1/errors.pb.h"

namespace clusterkv::cache_service {

// Durations in buckets an eighth wide: quantiles to 12.5 % upwards, in 2 KiB.
class LatencyHistogram {
 public:
  void Record(absl::Duration duration);
  // The upper end, in microseconds, of the bucket that holds the quantile; 0 without records.
  uint32_t QuantileUs(double quantile) const;

 private:
  static constexpr int kPerOctave = 8, kOctaves = 32;
  static int BucketOf(uint64_t us);
  std::array<std::atomic<uint64_t>, kPerOctave * kOctaves> counts_{};
};

struct ShardCounters {
  std::atomic<uint64_t> selects{0}, recalled_tokens{0}, recalled_bytes{0}, state_bytes{0};
  std::atomic<uint64_t> hits{0}, misses{0}, ingested_bytes{0};
  std::atomic<uint64_t> window_bytes{0};  // of the ingested ones
  // Sequences that were ended for room, for their tenant's quota, because their ttl was over, by an
  // administrator.
  std::atomic<uint64_t> evicted_for_room{0}, evicted_for_quota{0}, evicted_by_ttl{0},
      evicted_by_admin{0};
  // Answered by the device; meant for it and answered by the host.
  std::atomic<uint64_t> device_selects{0}, device_fallbacks{0};
  std::atomic<uint64_t> link_bytes{0};      // of records, over other links than gRPC
  std::atomic<uint64_t> link_fallbacks{0};  // to grpc, for want of a better link
  std::array<std::atomic<uint64_t>, v1::Link_ARRAYSIZE>
      link_failovers{};                            // by the link that failed
  std::array<std::atomic<uint64_t>, 64> errors{};  // by reason
  LatencyHistogram select_latency;

  void CountError(v1::ErrorReason reason);
  // Fills in all that is counted here.
  void AddTo(v1::Stats& stats) const;
};

// "grpc", "peer", "nccl".
const char* LinkName(v1::Link link);

// Resident memory of this process; 0 where the system does not tell.
uint64_t ResidentBytes();

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SHARD_COUNTERS_H_
