// Recall: records by name of tokens or clusters, pinned where they lie.
#ifndef CLUSTERKV_CACHE_SERVICE_RECALL_H_
#define CLUSTERKV_CACHE_SERVICE_RECALL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_service/sequence.h"
#include "cache_service/shard.h"

namespace clusterkv::cache_service {

// Keeps the pages of the records that one call reads in `recalling`, and their sequence from being
// evicted. Not thread-safe while records are taken; may die on any thread.
class RecordPins {
 public:
  RecordPins(SequenceRef sequence, std::shared_ptr<const LayerSnapshot> snapshot,
             bool verify_checksums);

  const LayerSnapshot& snapshot() const { return *snapshot_; }
  // Record `index` of part `part`, valid while this lives.
  // Errors: CHECKSUM_MISMATCH, if checksums are verified.
  absl::StatusOr<const std::byte*> Take(int32_t part, int64_t index);

 private:
  const CallCounter::Scope scope_;
  const SequenceRef sequence_;
  const std::shared_ptr<const LayerSnapshot> snapshot_;  // before pins_: it dies after them
  const bool verify_checksums_;
  std::vector<PageBlock::Pin> pins_;  // [parts], empty for those not taken from
  std::vector<bool> pinned_;          // [parts]
  absl::flat_hash_set<std::pair<int32_t, int64_t>> verified_;  // part, page
};

// The records that `request` names, by head. Everything is validated before anything is pinned.
// Errors: INVALID_FIELD for heads and clusters out of range; TOKENS_OUT_OF_RANGE for tokens that
// are not clustered; LIMIT_EXCEEDED for more records than the layer has; CHECKSUM_MISMATCH.
absl::StatusOr<Shard::RecallAnswer> RecallRecords(const SequenceRef& sequence,
                                                  std::shared_ptr<const LayerSnapshot> snapshot,
                                                  const v1::RecallClustersRequest& request,
                                                  bool verify_checksums);

// The layer's index in the shape of the API, heads ascending, parts in order.
std::vector<v1::IndexChunk> DescribeIndex(const SequenceParams& params,
                                          const LayerSnapshot& snapshot,
                                          const v1::GetIndexRequest& request);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RECALL_H_
