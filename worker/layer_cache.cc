#include "worker/layer_cache.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"

namespace clusterkv::worker {

absl::StatusOr<LayerCache> LayerCache::Create(int64_t kv_heads,
                                              const kernels::HotCacheParams& params,
                                              const kernels::RecordCodec* codec,
                                              int64_t record_bytes) {
  LayerCache layer;
  layer.policy_ = params.policy;
  layer.codec_ = codec;
  layer.record_bytes_ = record_bytes;
  layer.positions_.resize(kv_heads);
  layer.head_masks_.resize(kv_heads);
  for (int64_t h = 0; h < kv_heads; ++h) {
    CKV_ASSIGN_OR_RETURN(kernels::HotCache cache, kernels::HotCache::Create(params));
    // Not zeroed: slots that are never used take no memory.
    auto slots = std::make_unique_for_overwrite<std::byte[]>(
        static_cast<size_t>(cache.slot_count() * record_bytes));
    layer.heads_.push_back({std::move(cache), std::move(slots), 0, {}, {}, {}, {}, 0});
  }
  return layer;
}

absl::Status LayerCache::Begin(const v1::SelectResult& result, int64_t first, int64_t end) {
  if (result.heads_size() != static_cast<int>(heads_.size())) {
    return Error(v1::INTERNAL_ERROR, absl::StrCat("selection: expected ", heads_.size(),
                                                  " KV heads, got ", result.heads_size()));
  }
  linked_.clear();
  for (int h = 0; h < result.heads_size(); ++h) {
    CKV_RETURN_IF_ERROR(BeginHead(result.heads(h), h, first, end));
  }
  return absl::OkStatus();
}

absl::Status LayerCache::BeginHead(const v1::HeadSelection& selection, int64_t h, int64_t first,
                                   int64_t end) {
  Head& head = heads_[h];
  std::vector<int32_t>& positions = positions_[h];
  positions.assign(selection.exact_positions().begin(), selection.exact_positions().end());
  head_masks_[h].assign(selection.head_masks().begin(), selection.head_masks().end());
  const size_t n = positions.size();
  const bool ascending = std::adjacent_find(positions.begin(), positions.end(),
                                            std::greater_equal<int32_t>()) == positions.end();
  if (!ascending || (n > 0 && (positions.front() < first || positions.back() >= end)) ||
      (!head_masks_[h].empty() && head_masks_[h].size() != n)) {
    return Error(v1::INTERNAL_ERROR,
                 absl::StrCat("selection of KV head ", h, ": expected ascending positions in [",
                              first, ", ", end, ") and a mask for each or none"));
  }
  head.clusters.clear();
  if (policy_ == kernels::HotCachePolicy::kClusterLru) {
    head.clusters.assign(selection.exact_clusters().begin(), selection.exact_clusters().end());
  }
  head.step_slots.resize(n);
  head.step_hits.resize(n);
  head.misses.clear();
  head.received = 0;
  if (absl::Status status =
          head.cache.Resolve(positions, head.clusters, absl::MakeSpan(head.step_slots),
                             absl::MakeSpan(head.step_hits));
      !status.ok()) {
    return Error(v1::INTERNAL_ERROR,
                 absl::StrCat("selection of KV head ", h, ": ", status.message()));
  }
  for (size_t i = 0; i < n; ++i) {
    if (head.step_hits[i]) continue;
    head.misses.push_back({positions[i], head.step_slots[i]});
    head.used_slots = std::max<int64_t>(head.used_slots, head.step_slots[i] + 1);
  }
  return absl::OkStatus();
}

absl::Status LayerCache::Receive(const v1::RecordChunk& chunk) {
  const std::string& records = chunk.records();
  const bool whole =
      chunk.by_link()
          ? records.empty()
          : records.size() == static_cast<size_t>(chunk.positions_size() * record_bytes_) &&
                XXH3_64bits(records.data(), records.size()) == chunk.checksum();
  if (chunk.kv_head() >= heads_.size() || !whole) {
    return Error(
        v1::CHECKSUM_MISMATCH,
        absl::StrCat("records of KV head ", chunk.kv_head(), ": ", records.size(), " bytes of ",
                     chunk.positions_size(), " tokens are not what their size and checksum say"));
  }
  Head& head = heads_[chunk.kv_head()];
  for (int i = 0; i < chunk.positions_size(); ++i) {
    if (head.received >= head.misses.size() ||
        head.misses[head.received].position != static_cast<int32_t>(chunk.positions(i))) {
      return Error(v1::CHECKSUM_MISMATCH,
                   absl::StrCat("records of KV head ", chunk.kv_head(), ": token ",
                                chunk.positions(i), " is not the one that is missing next"));
    }
    Miss& miss = head.misses[head.received];
    miss.by_link = chunk.by_link();
    const int32_t slot = miss.slot;
    if (chunk.by_link()) {
      linked_.push_back({chunk.kv_head(), slot, Slot(head, slot)});
    } else {
      std::memcpy(Slot(head, slot), records.data() + i * record_bytes_,
                  static_cast<size_t>(record_bytes_));
    }
    ++head.received;
  }
  return absl::OkStatus();
}

absl::Status LayerCache::Complete() const {
  for (size_t h = 0; h < heads_.size(); ++h) {
    if (heads_[h].received != heads_[h].misses.size()) {
      return Error(v1::CHECKSUM_MISMATCH,
                   absl::StrCat("records of KV head ", h, ": expected ", heads_[h].misses.size(),
                                ", got ", heads_[h].received));
    }
  }
  return absl::OkStatus();
}

void LayerCache::Clear() {
  for (size_t h = 0; h < heads_.size(); ++h) {
    heads_[h].cache.Clear();
    heads_[h].misses.clear();
    heads_[h].step_slots.clear();
    heads_[h].received = 0;
    linked_.clear();
    positions_[h].clear();
    head_masks_[h].clear();
  }
}

kernels::RecordRun LayerCache::Run(int64_t kv_head) const {
  const Head& head = heads_[kv_head];
  return {codec_, head.slots.get(), head.step_slots, head_masks_[kv_head]};
}

int64_t LayerCache::exact_tokens() const {
  int64_t tokens = 0;
  for (const std::vector<int32_t>& positions : positions_) {
    tokens += static_cast<int64_t>(positions.size());
  }
  return tokens;
}

int64_t LayerCache::misses() const {
  int64_t misses = 0;
  for (const Head& head : heads_) misses += static_cast<int64_t>(head.misses.size());
  return misses;
}

int64_t LayerCache::held_bytes() const {
  int64_t slots = 0;
  for (const Head& head : heads_) slots += head.used_slots;
  return slots * record_bytes_;
}

}  // namespace clusterkv::worker
