// A shard: one device's sequences, their memory and their work. The core of the service, without
// gRPC.
//
// RPC handlers parse, validate against limits, call a Shard, encode. All methods are thread-safe
// and none blocks on device work: what takes long runs on the shard's executors and answers by
// callback (on an executor thread; callbacks must not block). Deadlines and cancellation are
// checked when work is queued and again when it starts.
//
// Life of a sequence: OPEN -> FILLING -> CLUSTERING -> READY <-> APPENDING -> RELEASED
// (architecture). Layers become ready one by one: clustering of a layer runs on the build executor
// while later layers arrive. Per (sequence, layer), builds and selects are serialised in the order
// of their calls, so that a select after an acknowledged append sees that append.
//
// Every error is made by Error() (proto/error.h).
#ifndef CLUSTERKV_CACHE_SERVICE_SHARD_H_
#define CLUSTERKV_CACHE_SERVICE_SHARD_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "cache_service/arena.h"
#include "cache_service/call_context.h"
#include "cache_service/presets.h"
#include "cache_service/shard_device.h"
#include "clusterkv/v1/admin_service.pb.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "clusterkv/v1/session_service.pb.h"
#include "kernels/attention/correction.h"
#include "kernels/hot_cache/hot_cache.h"
#include "kernels/index/index.h"
#include "kernels/select/select.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

struct ShardOptions {
  int64_t arena_bytes = int64_t{1} << 30;
  int64_t page_bytes = 32 << 10;
  int build_threads = 1;
  int select_threads = 1;
  bool selects_give_way = false;  // to threads that read the network, where CPUs are few
  int64_t max_sequences = 4096;
  int64_t max_attachments = 1024;
  int64_t max_sequence_tokens = 4 << 20;
  int64_t residency_bytes = 64 << 20;
  int64_t max_queued_selects = 4096;
  absl::Duration session_ttl = absl::Seconds(30);
  absl::Duration attachment_ttl = absl::Minutes(5);
  bool verify_recalls = false;
};

struct KvChunkView {
  int64_t layer = 0, first_token = 0, tokens = 0;
  std::string_view keys, values;  // [tokens, kv_heads, head_dim]
  uint64_t checksum = 0;          // 0: not checked
};

// The same, in a worker's window.
struct WindowChunkView {
  int64_t layer = 0, first_token = 0, tokens = 0;
  RowWindow* window = nullptr;
  int64_t keys_offset = 0, values_offset = 0;
  uint64_t checksum = 0;  // RowsHash; 0: not checked
};

// One layer of one sequence, its queries already float.
struct SelectCall {
  v1::SequenceHandle sequence;  // unless attachment_id is set
  uint64_t attachment_id = 0;
  int64_t layer = 0;
  std::vector<float> queries;  // [query_heads, head_dim]
  v1::SelectConfig select;     // what differs
  // SelectAndRecall only:
  bool recall = false;
  uint64_t step = 0;
  bool reset_residency = false;
};

// The records that a head's selection needs and the worker lacks: pinned, not copied.
struct HeadRecall {
  std::vector<int32_t> positions;  // misses, ascending
  std::vector<const std::byte*>
      records;  // [positions], each record_bytes; valid while the call's pins live
};

struct SelectAnswer {
  absl::Status status;
  uint64_t generation = 0;
  int64_t layer = 0;
  int64_t window_begin = 0;
  std::vector<kernels::HeadSelection> heads;  // [kv_heads]
  std::vector<int64_t> estimated_tokens;      // [kv_heads]
  // [kv_heads], of the exact zones; empty: the codec has no remainders.
  std::vector<kernels::Correction> corrections;
  bool cluster_granular = false;  // the attachment's cache is by cluster: name the clusters
  int64_t record_bytes = 0;
  std::vector<HeadRecall> recalls;  // [kv_heads]; empty unless recall was asked for
  bool by_link = false;  // the records went over the attachment's link: recalls name none
  uint32_t link_generation = 0;
  int64_t hits = 0, misses = 0;
  std::shared_ptr<void> pins;  // keeps the parts' pages while records are read

  // False: coded and estimated zones are empty for every query head, there is no state to send.
  bool answers() const {
    return std::any_of(heads.begin(), heads.end(), [](const kernels::HeadSelection& head) {
      return std::any_of(head.state_lse.begin(), head.state_lse.end(),
                         [](float lse) { return std::isfinite(lse); });
    });
  }
};

struct SelectBatchAnswer {
  std::vector<SelectAnswer> items;
  absl::Duration queued, worked;
  absl::Duration refined;  // of the work, scoring tokens and choosing: threads' time, on the host
};

class Shard {
 public:
  // `device`, if there is one, is started here, and computes what it can.
  // Errors: InvalidArgument, ResourceExhausted as Arena::Create; as ShardDevice::Start.
  static absl::StatusOr<std::unique_ptr<Shard>> Create(
      const ShardOptions& options, std::unique_ptr<ShardDevice> device = nullptr);
  // Waits for running work; queued work is answered CANCELLED.
  // REQUIRES: no pins of an answer are alive.
  virtual ~Shard() = default;

  virtual uint64_t boot_id() const = 0;
  virtual const ShardOptions& options() const = 0;
  // "cpu", "cuda:0".
  virtual std::string device_name() const = 0;
  virtual int64_t page_bytes() const = 0;

  // --- sequences
  virtual absl::StatusOr<v1::Sequence> OpenSequence(const v1::OpenSequenceRequest& request) = 0;
  // Copies the chunk into the arena; starts the layer's clustering when it was the last.
  virtual absl::Status PutChunk(const v1::SequenceHandle& sequence, const KvChunkView& chunk) = 0;
  // Maps a window that belongs to the session. One that cannot be had is no error: the answer says
  // why. It may take the milliseconds that mapping memory takes. Errors: INVALID_FIELD,
  // SESSION_NOT_FOUND.
  virtual absl::StatusOr<v1::ConnectIngestResponse> ConnectIngest(
      const v1::ConnectIngestRequest& request) = 0;
  // Copies a chunk from a window to the device's arena; without statistics. Returns when it is
  // there: the time of the copy on the device. Errors: WINDOW_NOT_FOUND, INVALID_FIELD; as
  // PutChunk; DEVICE_LOST.
  virtual absl::Status PutWindow(const v1::PutWindowRequest& request) = 0;
  // query_rms [kv_heads, head_dim].
  virtual absl::Status PutStatistics(const v1::SequenceHandle& sequence, int64_t layer,
                                     absl::Span<const float> query_rms) = 0;
  virtual std::vector<uint32_t> CompleteLayers(const v1::SequenceHandle& sequence) = 0;
  // Answers when every layer is ready, or with CHUNKS_MISSING at once.
  virtual void Seal(const v1::SequenceHandle& sequence, const CallContext& context,
                    std::function<void(absl::StatusOr<v1::Sequence>)> done) = 0;
  virtual absl::StatusOr<v1::Sequence> GetSequence(const v1::SequenceHandle& sequence) = 0;
  // Names after `after` with `prefix`, in order, at most `limit`.
  virtual std::vector<v1::Sequence> ListSequences(std::string_view prefix, std::string_view after,
                                                  int64_t limit) = 0;
  virtual absl::StatusOr<v1::Sequence> Fork(const v1::ForkSequenceRequest& request) = 0;
  virtual absl::Status Release(const v1::SequenceHandle& sequence) = 0;
  virtual absl::Status Evict(const v1::SequenceHandle& sequence, bool force) = 0;
  // The names, beginning with `prefix`, of sequences that a full arena might evict now.
  virtual std::vector<std::string> Evictable(std::string_view prefix) = 0;
  // Evicts of these, `kept` left out, the one that would leave first. False: there is none.
  virtual bool EvictOne(std::string_view prefix, std::string_view kept) = 0;
  // Validates everything before it writes anything. Answers once the tokens are in and, where a
  // window is full, its clustering is queued before any later select of the layer.
  virtual absl::StatusOr<v1::AppendKvResponse> Append(const v1::AppendKvRequest& request) = 0;

  // --- decode
  virtual absl::StatusOr<v1::AttachResponse> Attach(const v1::AttachRequest& request) = 0;
  // Why this shard has no such link to a worker on `host` (HostId; empty: told by nobody); empty:
  // ConnectLink may set it up.
  virtual std::string WhyNoLink(v1::Link link, const std::string& host) const = 0;
  // A link that cannot be set up is no error: the answer says GRPC, and why. It may take the
  // milliseconds that mapping memory takes. Errors: ATTACHMENT_NOT_FOUND, INVALID_FIELD.
  virtual absl::StatusOr<v1::ConnectLinkResponse> ConnectLink(
      const v1::ConnectLinkRequest& request) = 0;
  // As ConnectLink: a group that cannot be had is no error. They may take the milliseconds that
  // mapping memory takes, and those of stopping and starting kernels. Errors: ATTACHMENT_NOT_FOUND,
  // INVALID_FIELD.
  virtual absl::StatusOr<v1::ConnectResidentResponse> ConnectResident(
      const v1::ConnectResidentRequest& request) = 0;
  virtual absl::StatusOr<v1::RenewResidentResponse> RenewResident(
      const v1::RenewResidentRequest& request) = 0;
  virtual void DisconnectResident(uint64_t resident_id) = 0;
  virtual absl::Status Detach(uint64_t attachment_id) = 0;
  // All items on the select executor, as one piece of work per (item, KV head). With `inline_ok`
  // and an idle executor the calling thread may do it itself. `done` is called exactly once.
  virtual void Select(std::vector<SelectCall> items, const CallContext& context, bool inline_ok,
                      std::function<void(SelectBatchAnswer)> done) = 0;
  // Records by token or cluster: validated first, then pinned.
  struct Recalled {
    int64_t kv_head = 0;
    std::vector<int32_t> positions;
    std::vector<const std::byte*> records;
  };
  struct RecallAnswer {
    int64_t record_bytes = 0;
    std::vector<Recalled> heads;
    std::shared_ptr<void> pins;
  };
  virtual absl::StatusOr<RecallAnswer> Recall(const v1::RecallClustersRequest& request) = 0;
  // Sinks and window of one layer, as they came: per KV head K and V of [positions], copied.
  struct SteadyZone {
    std::vector<int32_t> positions;
    std::vector<std::string> heads;  // [kv_heads] of [positions, 2, head_dim]
  };
  virtual absl::StatusOr<SteadyZone> GetSteadyZone(const v1::SequenceHandle& sequence,
                                                   int64_t layer) = 0;
  // One KV head's index, part by part, in the shape of the API.
  virtual absl::StatusOr<std::vector<v1::IndexChunk>> GetIndex(
      const v1::GetIndexRequest& request) = 0;

  // --- sessions
  // Called without any lock of the shard's. They may be called once more, on another thread, while
  // CloseSession returns: they own what they touch.
  struct SessionEvents {
    std::function<void(const v1::SessionResponse::Notice&)> notice;  // any thread; must not block
    std::function<void()> expired;  // over by its ttl, or by CloseSession(now) of anybody
  };
  // resume_id 0: a new one. Returns its id; *resumed says which.
  virtual absl::StatusOr<uint64_t> OpenSession(std::string_view worker, uint64_t resume_id,
                                               SessionEvents events, bool* resumed) = 0;
  virtual absl::Status Heartbeat(uint64_t session_id) = 0;
  // The stream broke: the session may be resumed within the ttl. `now`: it ends at once.
  virtual void CloseSession(uint64_t session_id, bool now) = 0;

  // --- operation
  // No new sequences, attachments or sessions from here on; sessions are told.
  virtual void StartDrain() = 0;
  virtual bool draining() const = 0;
  // Nothing queued or running any more.
  virtual bool Idle() const = 0;
  // A live session fills a sequence or is attached to one.
  virtual bool InUse() const = 0;
  virtual v1::Stats GetStats() = 0;
  virtual v1::VerifyLedgerResponse VerifyLedger(bool checksums) = 0;
  // Counts an error that left through an RPC, for stats and metrics.
  virtual void CountError(v1::ErrorReason reason) = 0;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SHARD_H_
