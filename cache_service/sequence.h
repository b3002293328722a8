// One sequence: its layers, how their bytes come in, are clustered, and are read.
//
//   state         meaning                                      leaves it
//   OPEN          no byte yet                                  first accepted chunk
//   FILLING       some bytes are in                            last chunk of the last layer
//   CLUSTERING    all bytes are in; clustering, or not sealed  last layer clustered and sealed
//   READY         may be attached, appended, forked, evicted   a full window: APPENDING; release
//   APPENDING     READY, windows are being clustered           last window clustered: READY
//   RELEASED      every call answers SEQUENCE_RELEASED         -
//
// A layer is FILLING, CLUSTERING or READY by itself. What readers see of a layer is a
// LayerSnapshot: immutable, replaced whole when a part joins. Builds of a layer run one after the
// other in the order they were queued; WhenBuilt waits for those queued before it.
//
// Thread-safe. Lock order: append_mutex_ before the store's mutex before mutex_ before the memory
// account's. Callbacks run without any lock. Bytes are checked, compared and copied outside mutex_:
// a claim on a range of tokens keeps two chunks from writing the same rows.
#ifndef CLUSTERKV_CACHE_SERVICE_SEQUENCE_H_
#define CLUSTERKV_CACHE_SERVICE_SEQUENCE_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cache_service/call_counter.h"
#include "cache_service/executors.h"
#include "cache_service/index_part.h"
#include "cache_service/memory_account.h"
#include "cache_service/paged_rows.h"
#include "cache_service/presets.h"
#include "cache_service/shard.h"
#include "cache_service/shard_counters.h"
#include "cache_service/token_ranges.h"

namespace clusterkv::cache_service {

// What readers see of a layer. Immutable; owns what its views point into.
struct LayerSnapshot {
  std::vector<std::shared_ptr<const IndexPart>> parts;  // in token order
  std::vector<kernels::IndexPartView> views;            // of the parts
  std::vector<int64_t> first_cluster;                   // [parts + 1], counted over the parts
  std::shared_ptr<const PagedRows> sinks;               // null without sinks
  int64_t sink_tokens = 0;
  int64_t window_begin = 0;  // tokens from here on are not clustered
};

// Makes room in the arena by evicting what nobody uses.
class RoomMaker {
 public:
  virtual ~RoomMaker() = default;
  // True if something was evicted: try again. Takes the store's mutex.
  virtual bool EvictOne() = 0;
};

// What a sequence works with; outlives it.
struct SequenceServices {
  Arena* arena = nullptr;
  Executors* executors = nullptr;
  RoomMaker* room = nullptr;
  ShardCounters* counters = nullptr;
  CallCounter* calls = nullptr;
  ShardDevice* device = nullptr;  // null: the host's processors
};

struct SequenceIdentity {
  std::string name;
  uint64_t generation = 0;
  uint64_t boot_id = 0;
};

class Sequence : public std::enable_shared_from_this<Sequence> {
 public:
  // An empty sequence, with all of `account` its own.
  Sequence(SequenceIdentity identity, SequenceParams params, SequenceServices services,
           std::shared_ptr<MemoryAccount> account);
  ~Sequence();

  const SequenceIdentity& identity() const { return identity_; }
  const SequenceParams& params() const { return params_; }
  CallCounter* calls() const { return services_.calls; }
  int64_t sink_tokens() const { return std::min(params_.sink_tokens, params_.prompt_tokens); }

  // --- ingest (sequence_ingest.cc), as in Shard
  absl::Status PutChunk(const KvChunkView& chunk);
  // From a window (sequence_window.cc). Errors beside PutChunk's: INVALID_FIELD for a chunk beyond
  // the window; DEVICE_LOST.
  absl::Status PutWindow(const WindowChunkView& chunk);
  absl::Status PutStatistics(int64_t layer, absl::Span<const float> query_rms);
  std::vector<uint32_t> CompleteLayers() const;
  void Seal(const CallContext& context, std::function<void(absl::StatusOr<v1::Sequence>)> done);
  // Answers Seals whose deadline passed or whose client left.
  void SweepWaiters();

  // --- decode (sequence_append.cc)
  absl::StatusOr<v1::AppendKvResponse> Append(const v1::AppendKvRequest& request);
  absl::StatusOr<Shard::SteadyZone> SteadyZone(int64_t layer) const;
  // What a fork that may append `decode_tokens` starts from: this sequence as it is now, whatever
  // is appended to it afterwards. Errors: SEQUENCE_NOT_READY, SEQUENCE_RELEASED.
  struct ForkPlan;
  absl::StatusOr<ForkPlan> PlanFork(int64_t decode_tokens) const;
  // A sequence that shares all parts and copies the window. `account` holds the plan's memory.
  // Errors: ARENA_FULL.
  absl::StatusOr<std::shared_ptr<Sequence>> Fork(SequenceIdentity identity, ForkPlan plan,
                                                 std::shared_ptr<MemoryAccount> account) const;

  // --- reading
  using SnapshotOr = absl::StatusOr<std::shared_ptr<const LayerSnapshot>>;
  // The layer as it is now. Errors: LAYER_OUT_OF_RANGE, LAYER_NOT_READY, SEQUENCE_RELEASED.
  SnapshotOr Snapshot(int64_t layer) const;
  // The layer when every build that was queued before this call is done: `then` is called once, by
  // this call or by an executor thread. Errors: as Snapshot.
  void WhenBuilt(int64_t layer, std::function<void(SnapshotOr)> then);
  // OK if READY or APPENDING. Errors: SEQUENCE_NOT_READY, SEQUENCE_RELEASED.
  absl::Status CheckReady() const;
  v1::SequenceState state() const;
  v1::Sequence ToProto(bool with_layers) const;

  // --- life
  // RELEASED: frees what no call under way reads, answers what waits with `reason`.
  void End(const absl::Status& reason);
  // True from End on; for calls under way to ask without the lock.
  bool ended() const { return ended_.load(); }
  // Tokens of the layer that has fewest.
  int64_t tokens() const;
  // Pages that it holds, shared ones too, by block; promised pages not counted.
  struct Holdings {
    std::vector<std::shared_ptr<const IndexPart>> parts;
    std::vector<std::shared_ptr<const PagedRows>> rows;
  };
  Holdings holdings() const;
  int64_t held_pages() const;
  int64_t reserved_pages() const { return account_->reserved_pages(); }
  // No build queued or running, no Seal waiting.
  bool quiet() const;

  // --- what the store keeps of it
  std::atomic<uint64_t> session_id{0};  // owner; 0: none
  absl::Duration ttl;                   // 0: until evicted; set before it is shared
  std::atomic<uint64_t> last_use{0};    // of the store's counter of uses
  std::atomic<int64_t> last_use_ns{0};  // of the steady clock
  std::atomic<int64_t> references{0};   // calls under way and attachments
  std::atomic<int64_t> attachments{0};

 private:
  friend class SequenceTestPeer;

  // Of the bytes of an accepted chunk: XXH3 of those that came by PutKv, RowsHash of those that
  // came by a window.
  struct ChunkHash {
    uint64_t hash = 0;
    bool by_window = false;
  };
  // Hashes of accepted chunks, to tell a duplicate from a conflict when the bytes are no longer
  // there as they came. Bounded: it forgets the lowest tokens first, and what it forgot cannot be
  // compared.
  class ChunkLog {
   public:
    void Add(TokenSpan span, ChunkHash hash);
    std::optional<ChunkHash> Find(TokenSpan span) const;

   private:
    static constexpr size_t kMaxEntries = 4096;
    std::map<std::pair<int64_t, int64_t>, ChunkHash> hashes_;
  };

  struct Waiter {
    int64_t build = 0;  // waits until so many builds are done
    std::function<void(SnapshotOr)> then;
  };

  // A run of decoded tokens: being filled (the last one), or full and queued for clustering.
  struct Window {
    int64_t first_token = 0;
    std::shared_ptr<PagedRows> rows;
    std::shared_ptr<IndexPart> part;  // allocated when it is full
  };

  struct Layer {
    TokenRanges received;           // of the prompt
    std::vector<TokenSpan> claims;  // being compared and written now
    ChunkLog log;
    std::vector<float> query_rms;  // empty: none came
    std::shared_ptr<PagedRows> sinks;
    std::shared_ptr<PagedRows> staging;  // of the prompt without sinks; null once clustered
    bool on_device = false;  // rows of sinks and staging lie in the device's pages, not the host's
    int64_t end_token = 0;   // prompt and appended tokens, once the prompt is in
    std::deque<Window> windows;  // in token order; the last may be filling
    int64_t builds_queued = 0, builds_done = 0;
    std::deque<Waiter> waiters;
    absl::Status failure;                           // of a build
    std::shared_ptr<const LayerSnapshot> snapshot;  // null until the prompt is clustered
    // The prompt is, and its staging is free.
    bool clustered() const { return snapshot != nullptr && builds_done > 0; }
  };

  struct SealWaiter {
    CallContext context;
    std::function<void(absl::StatusOr<v1::Sequence>)> done;
  };

  // Rows of the caller's that are compared with what is stored.
  struct PackedRows {
    TokenSpan span;
    const char* keys = nullptr;
    const char* values = nullptr;
    PackedRows Sub(TokenSpan sub, int64_t row_bytes) const;
  };
  // Where a layer's tokens lie, to be read without the lock.
  struct StoredRows {
    std::shared_ptr<PagedRows> sinks, staging;
    bool on_device = false;  // of sinks and staging
    std::vector<Window> windows;
    std::shared_ptr<const LayerSnapshot> snapshot;
  };
  // What a chunk may do that has claimed its tokens.
  struct Claim {
    StoredRows stored;
    std::vector<TokenSpan> present, missing;
    std::optional<ChunkHash> logged;  // of these very tokens, all present
  };
  // Rows of a chunk that lie one after the other in `rows`.
  struct RowsRun {
    PagedRows* rows = nullptr;
    TokenSpan span;
    int64_t first = 0;  // row of span.begin
    PagedRun paged() const;
  };

  // XXH3-64 of keys, then values.
  static uint64_t HashRows(std::string_view keys, std::string_view values);

  int64_t row_bytes() const { return RowBytes(params_.shape); }
  TokenSpan prompt() const { return {0, params_.prompt_tokens}; }

  absl::Status CheckTokens(int64_t first_token, int64_t tokens) const;
  absl::Status CheckRows(int64_t layer, TokenSpan span, std::string_view keys,
                         std::string_view values) const;
  absl::Status CheckFinite(int64_t layer, TokenSpan span, std::string_view rows,
                           std::string_view field) const;
  // NON_FINITE_KEY of element `bad` of the span's rows.
  absl::Status NonFinite(int64_t layer, TokenSpan span, std::string_view field, int64_t bad) const;
  absl::StatusOr<PageBlock> AllocateEvicting(MemoryUse use, int64_t pages) const;
  absl::Status EnsureStaging(int64_t layer);
  // by_window: the first chunk of a layer decides by it where the layer's rows lie.
  absl::StatusOr<Claim> ClaimChunk(int64_t layer, TokenSpan span, bool by_window);
  // Ends the claim. hash: the chunk is in, and had it; nullopt: it is not.
  void CommitChunk(int64_t layer, TokenSpan span, std::optional<ChunkHash> hash);
  WindowChunk WindowChunkOf(const WindowChunkView& chunk) const;
  // Whether rows whose XXH3 is `hash` are those that were logged.
  bool SameBytes(const ChunkHash& logged, uint64_t hash, const PackedRows& rows) const;
  absl::Status TakeWindow(const WindowChunkView& chunk, TokenSpan span, const StoredRows& stored,
                          ChunkHash* hash) const;
  absl::Status CompareStored(int64_t layer, const StoredRows& stored, const PackedRows& rows) const;
  absl::Status CompareRecords(int64_t layer, const IndexPart& part, const PackedRows& rows) const;
  // In sinks and staging; the first of `rows` that differs, or -1. Errors: DEVICE_LOST.
  absl::StatusOr<int64_t> FirstDifference(const StoredRows& stored, const RowsRun& run,
                                          const PackedRows& rows) const;
  // Errors: DEVICE_LOST.
  absl::Status WriteRows(const StoredRows& stored, const PackedRows& rows) const;
  // Where the span's rows lie in sinks and staging, what is not there left out.
  std::vector<RowsRun> RunsOf(const StoredRows& stored, TokenSpan span) const;

  bool released() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !end_reason_.ok(); }
  v1::SequenceState StateLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckLayer(int64_t layer) const;
  absl::Status CheckReadyLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckLayerIn(int64_t layer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  StoredRows StoredLocked(const Layer& layer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status MissingChunks() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int64_t WindowBegin(const Layer& layer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int64_t TokensLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  void QueuePromptBuild(int64_t layer);
  void BuildPrompt(int64_t layer, kernels::ParallelFor parallel_for);
  // Brings the sinks to where the other one (host, device) has them too. Errors: DEVICE_LOST.
  absl::Status SealSinks(const StoredRows& stored);
  absl::StatusOr<std::shared_ptr<const IndexPart>> ClusterPrompt(const StoredRows& stored,
                                                                 absl::Span<const float> query_rms,
                                                                 kernels::ParallelFor parallel_for);
  void QueueWindowBuild(int64_t layer);
  void BuildWindow(int64_t layer, kernels::ParallelFor parallel_for);
  // Adds a part (or none, for a prompt that is all sinks) to what readers see and wakes who waits.
  // In two steps: a build counts as done once what it replaced is free.
  void PublishBuild(int64_t layer, absl::StatusOr<std::shared_ptr<const IndexPart>> part,
                    bool is_window);
  // False: released meanwhile.
  bool TakeBuild(int64_t layer, absl::StatusOr<std::shared_ptr<const IndexPart>> part,
                 bool is_window);
  void CountBuild(int64_t layer);
  // Waiters of a layer whose builds are done, taken out.
  std::vector<Waiter> TakeWaiters(Layer& layer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Seal waiters, if all is built or some layer failed, taken out.
  std::vector<SealWaiter> TakeSealWaiters(absl::Status* status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  struct AppendPlan;
  absl::Status PlanAppend(const v1::AppendKvRequest& request, std::vector<AppendPlan>* plans);
  absl::Status AllocateAppend(std::vector<AppendPlan>& plans) const;
  void WriteAppend(const std::vector<AppendPlan>& plans) const;
  absl::Status PublishAppend(std::vector<AppendPlan>& plans, v1::AppendKvResponse* response);
  // Makes `window` rows of its own, copied from those that it has.
  absl::Status CopyWindow(Window& window, int64_t end_token) const;

  const SequenceIdentity identity_;
  const SequenceParams params_;
  const SequenceServices services_;
  const std::shared_ptr<MemoryAccount> account_;
  std::atomic<bool> ended_{false};

  absl::Mutex append_mutex_;  // appends of one sequence run one after the other
  mutable absl::Mutex mutex_;
  std::vector<Layer> layers_ ABSL_GUARDED_BY(mutex_);
  bool sealed_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<SealWaiter> seal_waiters_ ABSL_GUARDED_BY(mutex_);
  absl::Status end_reason_ ABSL_GUARDED_BY(mutex_);  // not OK: RELEASED
};

struct Sequence::ForkPlan {
  SequenceParams params;
  MemoryPlan memory;
  std::vector<Layer> layers;  // keep their pages
};

// A call's or an attachment's hold on a sequence: while one lives, the sequence is not evicted.
class SequenceRef {
 public:
  SequenceRef() = default;
  // REQUIRES: the store's mutex is held, or another reference is.
  explicit SequenceRef(std::shared_ptr<Sequence> sequence) : sequence_(std::move(sequence)) {
    if (sequence_ != nullptr) sequence_->references.fetch_add(1);
  }
  SequenceRef(const SequenceRef& other) : SequenceRef(other.sequence_) {}
  SequenceRef(SequenceRef&& other) noexcept = default;
  SequenceRef& operator=(SequenceRef other) noexcept {
    std::swap(sequence_, other.sequence_);
    return *this;
  }
  ~SequenceRef() {
    if (sequence_ != nullptr) sequence_->references.fetch_sub(1);
  }
  Sequence* operator->() const { return sequence_.get(); }
  Sequence& operator*() const { return *sequence_; }
  const std::shared_ptr<Sequence>& get() const { return sequence_; }
  explicit operator bool() const { return sequence_ != nullptr; }

 private:
  std::shared_ptr<Sequence> sequence_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SEQUENCE_H_
