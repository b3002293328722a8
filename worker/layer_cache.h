// What a decode worker keeps of one layer's earlier recalls: per KV head a hot cache and its slots.
//
// A step: Begin with the service's selection, Receive its records, Complete. The caches mirror the
// service's residency; a step that does not complete leaves them useless: Clear, and tell the
// service to reset. Not thread-safe.
#ifndef CLUSTERKV_WORKER_LAYER_CACHE_H_
#define CLUSTERKV_WORKER_LAYER_CACHE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "kernels/attention/attention.h"
#include "kernels/hot_cache/hot_cache.h"
#include "worker/record_window.h"

namespace clusterkv::worker {

class LayerCache {
 public:
  // codec and record_bytes: of the sequence. Errors: as HotCache::Create.
  static absl::StatusOr<LayerCache> Create(int64_t kv_heads, const kernels::HotCacheParams& params,
                                           const kernels::RecordCodec* codec, int64_t record_bytes);

  // Takes the selection of every head: its exact positions lie in [first, end).
  // Errors: INTERNAL_ERROR when it is none that the service may answer.
  absl::Status Begin(const v1::SelectResult& result, int64_t first, int64_t end);
  // Takes records of the step's misses; a head's come in the order of their positions. Of a chunk
  // by_link only the positions come: linked() says which records are to be had elsewhere.
  // Errors: CHECKSUM_MISMATCH when they are other tokens' or other bytes than the service sent.
  absl::Status Receive(const v1::RecordChunk& chunk);
  // The step's records whose chunks were by_link, in their order.
  const std::vector<LinkedRecord>& linked() const { return linked_; }
  int64_t slot_count() const { return heads_.empty() ? 0 : heads_[0].cache.slot_count(); }
  // Errors: CHECKSUM_MISMATCH when a miss was not received.
  absl::Status Complete() const;
  void Clear();

  // Of the last step. A run is valid until the next Begin or Clear.
  kernels::RecordRun Run(int64_t kv_head) const;
  const std::vector<std::vector<int32_t>>& positions() const { return positions_; }
  const std::vector<std::vector<uint32_t>>& head_masks() const { return head_masks_; }
  int64_t exact_tokens() const;
  int64_t hits() const { return exact_tokens() - misses(); }
  int64_t misses() const;
  // Calls f(record) for each record of the step's misses, heads and positions ascending.
  template <typename F>
  void ForEachMiss(F f) const {
    for (size_t h = 0; h < heads_.size(); ++h) {
      for (const Miss& miss : heads_[h].misses) f(Slot(heads_[h], miss.slot));
    }
  }
  // Calls f(kv_head, slot, record) for each of them whose record came with its chunk, not by link.
  template <typename F>
  void ForEachReceivedSlot(F f) const {
    for (size_t h = 0; h < heads_.size(); ++h) {
      for (const Miss& miss : heads_[h].misses) {
        if (!miss.by_link) f(h, miss.slot, Slot(heads_[h], miss.slot));
      }
    }
  }
  // Bytes of the slots that were ever used.
  int64_t held_bytes() const;

 private:
  struct Miss {
    int32_t position, slot;
    bool by_link = false;
  };
  struct Head {
    kernels::HotCache cache;
    std::unique_ptr<std::byte[]> slots;  // [slot_count, record_bytes]
    int64_t used_slots = 0;
    std::vector<int32_t> step_slots;  // [positions]
    std::vector<uint8_t> step_hits;   // [positions]
    std::vector<int32_t> clusters;    // [positions], or empty
    std::vector<Miss> misses;
    size_t received = 0;  // of the misses
  };

  LayerCache() = default;
  absl::Status BeginHead(const v1::HeadSelection& selection, int64_t h, int64_t first, int64_t end);
  std::byte* Slot(const Head& head, int32_t slot) const {
    return head.slots.get() + slot * record_bytes_;
  }

  kernels::HotCachePolicy policy_ = kernels::HotCachePolicy::kTokenLru;
  const kernels::RecordCodec* codec_ = nullptr;
  int64_t record_bytes_ = 0;
  std::vector<Head> heads_;
  std::vector<LinkedRecord> linked_;
  std::vector<std::vector<int32_t>> positions_;
  std::vector<std::vector<uint32_t>> head_masks_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_LAYER_CACHE_H_
