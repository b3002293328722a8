#include "cache_service/shard_counters.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>

namespace clusterkv::cache_service {

int LatencyHistogram::BucketOf(uint64_t us) {
  if (us < kPerOctave) return static_cast<int>(us);
  // The three bits below the highest one tell the eighth of the octave.
  const int octave = std::bit_width(us) - 1;
  const int eighth = static_cast<int>((us >> (octave - 3)) & 7);
  return std::min((octave - 2) * kPerOctave + eighth, kPerOctave * kOctaves - 1);
}

void LatencyHistogram::Record(absl::Duration duration) {
  const int64_t us = std::max<int64_t>(absl::ToInt64Microseconds(duration), 0);
  counts_[static_cast<size_t>(BucketOf(static_cast<uint64_t>(us)))].fetch_add(
      1, std::memory_order_relaxed);
}

uint32_t LatencyHistogram::QuantileUs(double quantile) const {
  uint64_t total = 0;
  for (const auto& count : counts_) total += count.load(std::memory_order_relaxed);
  if (total == 0) return 0;
  const double rank = quantile * static_cast<double>(total);
  uint64_t seen = 0;
  size_t bucket = 0;
  for (; bucket + 1 < counts_.size(); ++bucket) {
    seen += counts_[bucket].load(std::memory_order_relaxed);
    if (static_cast<double>(seen) >= rank && seen > 0) break;
  }
  if (bucket < kPerOctave) return static_cast<uint32_t>(bucket);
  const uint64_t octave = bucket / kPerOctave + 2, eighth = bucket % kPerOctave;
  const uint64_t end = (uint64_t{8} + eighth + 1) << (octave - 3);
  return static_cast<uint32_t>(std::min<uint64_t>(end, UINT32_MAX));
}

void ShardCounters::CountError(v1::ErrorReason reason) {
  const size_t index = static_cast<size_t>(reason);
  if (index < errors.size()) errors[index].fetch_add(1, std::memory_order_relaxed);
}

void ShardCounters::AddTo(v1::Stats& stats) const {
  stats.set_selects(selects);
  stats.set_recalled_tokens(recalled_tokens);
  stats.set_recalled_bytes(recalled_bytes);
  stats.set_state_bytes(state_bytes);
  stats.set_hits(hits);
  stats.set_misses(misses);
  stats.set_ingested_bytes(ingested_bytes);
  stats.set_window_bytes(window_bytes);
  stats.set_evictions(evicted_for_room + evicted_for_quota + evicted_by_admin);
  (*stats.mutable_evictions_by_reason())["room"] = evicted_for_room;
  (*stats.mutable_evictions_by_reason())["quota"] = evicted_for_quota;
  (*stats.mutable_evictions_by_reason())["ttl"] = evicted_by_ttl;
  (*stats.mutable_evictions_by_reason())["admin"] = evicted_by_admin;
  for (size_t i = 0; i < errors.size(); ++i) {
    const uint64_t count = errors[i];
    if (count == 0) continue;
    (*stats.mutable_errors())[v1::ErrorReason_Name(static_cast<v1::ErrorReason>(i))] = count;
  }
  stats.set_device_selects(device_selects.load());
  stats.set_device_fallbacks(device_fallbacks.load());
  stats.set_link_bytes(link_bytes.load());
  if (link_fallbacks > 0) (*stats.mutable_link_fallbacks())["NOT_BUILT_IN"] = link_fallbacks;
  for (const v1::Link link : {v1::LINK_PEER, v1::LINK_NCCL}) {
    (*stats.mutable_link_failovers())[LinkName(link)] = link_failovers[link];
  }
  stats.set_select_p50_us(select_latency.QuantileUs(0.5));
  stats.set_select_p99_us(select_latency.QuantileUs(0.99));
}

const char* LinkName(v1::Link link) {
  return link == v1::LINK_PEER ? "peer" : link == v1::LINK_NCCL ? "nccl" : "grpc";
}

uint64_t ResidentBytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr) return 0;
  unsigned long long size = 0, resident = 0;
  const int fields = std::fscanf(file, "%llu %llu", &size, &resident);
  std::fclose(file);
  return fields == 2 ? resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE)) : 0;
}

}  // namespace clusterkv::cache_service
