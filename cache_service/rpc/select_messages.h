// Select and recall on the wire: requests into the shard's calls, answers into messages.
//
// A batch's items fail one by one: what is wrong with one item is answered in its result, and the
// others go to the shard. Only what is wrong with the request as a whole is an error of the RPC.
//
// Not thread-safe: one owner at a time.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_SELECT_MESSAGES_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_SELECT_MESSAGES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_service/rpc/rpc_context.h"
#include "cache_service/shard.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "kernels/base/element_type.h"

namespace clusterkv::cache_service {

// Records of one message, at most: a message stays well under gRPC's limit, and a slow reader holds
// little.
constexpr int64_t kMaxRecordBytesPerMessage = 1 << 20;

// What of an answer is encoded, and how.
struct SelectEncoding {
  bool want_state = false;
  bool want_zones = false;
  kernels::ElementType state_type = kernels::ElementType::kFloat16;
};

// A parsed request. statuses[i] says what is wrong with item i; items that are fine are in `calls`,
// in order.
struct ParsedSelect {
  std::vector<absl::Status> statuses;  // [items]
  std::vector<SelectCall> calls;       // [items whose status is OK]
  SelectEncoding encoding;
  bool shorthand = false;  // one item by the request's own fields
};

// Errors: INVALID_FIELD (no item), LIMIT_EXCEEDED (more than max_batch_items), DTYPE_MISMATCH
// (state_type).
absl::Status ParseSelect(const RpcContext& rpc, const v1::SelectClustersRequest& request,
                         ParsedSelect* parsed);
absl::Status ParseSelect(const RpcContext& rpc, const v1::SelectAndRecallRequest& request,
                         ParsedSelect* parsed);

// The selection part of an answer: results in the order of the request's items. Counts items'
// errors and the bytes of states.
void EncodeSelection(const RpcContext& rpc, Method method, const ParsedSelect& parsed,
                     const SelectBatchAnswer& answer, v1::SelectClustersResponse* response);

// Copies records out of the pinned arena into chunks, head by head, message by message.
class RecordPacker {
 public:
  struct Run {
    uint32_t item = 0, layer = 0, kv_head = 0;
    const std::vector<int32_t>* positions = nullptr;
    const std::vector<const std::byte*>* records = nullptr;  // [positions]
    int64_t record_bytes = 0;
    bool by_link = false;  // the records went another way: their positions alone are told
  };

  void Clear() {
    runs_.clear();
    run_ = 0;
    next_ = 0;
  }
  // `run`'s arrays must outlive the packing. Empty runs are left out.
  void Add(const Run& run) {
    if (!run.positions->empty()) runs_.push_back(run);
  }
  bool done() const { return run_ == runs_.size(); }
  // The next records of one head, at most `max_bytes` of them (but at least one). Returns their
  // bytes. REQUIRES: !done().
  int64_t Next(int64_t max_bytes, v1::RecordChunk* chunk);

 private:
  std::vector<Run> runs_;
  size_t run_ = 0, next_ = 0;
};

// The misses of a batch's items, in the order of items and heads.
void AddRecalls(const ParsedSelect& parsed, const SelectBatchAnswer& answer, RecordPacker* packer);

// XXH3-64, as RecordChunk.checksum tells it.
uint64_t RecordsChecksum(const std::string& records);

// XXH3-64 of exact positions (int32) then masks (uint32), head after head, as the response tells
// it.
uint64_t SelectionDigest(const std::vector<kernels::HeadSelection>& heads);

// Splits what GetIndex answers so that no message has more than about max_bytes: by runs of
// clusters.
void SplitIndexChunk(v1::IndexChunk chunk, int64_t max_bytes, std::vector<v1::IndexChunk>* out);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_SELECT_MESSAGES_H_
