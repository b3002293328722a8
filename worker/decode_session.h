// A decode worker's use of one sequence: attach, and per step and layer the attention output.
//
// Step selects and recalls over one stream, keeps the hot cache, and merges exact attention over
// sinks, window and recalled tokens with the service's state. Not thread-safe.
#ifndef CLUSTERKV_WORKER_DECODE_SESSION_H_
#define CLUSTERKV_WORKER_DECODE_SESSION_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "worker/client.h"
#include "worker/layer_cache.h"
#include "worker/record_window.h"
#include "worker/steady_rows.h"

namespace clusterkv::worker {

// "grpc", "peer" or "nccl".
const char* LinkName(v1::Link link);

struct DecodeOptions {
  v1::HotCacheConfig hot_cache;  // capacity_tokens: 1,024 by habit
  v1::SelectConfig select;       // what differs from the sequence's
  v1::ElementType state_type = v1::ELEMENT_TYPE_FLOAT16;
  bool append_to_service = true;  // AppendKv of decoded tokens; false: the window stays here alone
  // Decoded tokens go to the service this many at a time, all layers in one call. Until then they
  // are in this worker's window alone.
  int64_t append_batch_tokens = 16;
  bool digests = false;         // keep digests of selections, states and recalled bytes
  std::vector<v1::Link> links;  // that this worker can use, best first; empty: GRPC
  // "cpu", "cuda" or "cuda:N": whose memory the hot cache's slots are in, for links that bring
  // records there.
  std::string device = "cpu";
  // Makes the memory where links put records, for a caller that attends to them there: they are
  // nowhere else then, so that Step, Attend and digests, which read the host's, are not for such a
  // session. Called by Attach alone. Null: `device` says where, and the host has them too.
  RecordWindowMaker make_window;
  // How long Step polls for an answer before it sleeps: a core for microseconds of latency.
  absl::Duration spin = absl::ZeroDuration();
};

// What one Step of one layer did, summed over its KV heads.
struct StepFigures {
  int64_t exact_tokens = 0;     // named by the selection, sinks and window left out
  int64_t recalled_tokens = 0;  // records received
  int64_t recalled_bytes = 0;
  int64_t state_bytes = 0;       // all that was answered for tokens: states and corrections
  int64_t correction_bytes = 0;  // of these, corrections
  int64_t hits = 0;
  double select_us = 0;  // request sent until the selection was here
  double recall_us = 0;  // from then until the last record was here
};

struct LayerDigests {
  uint64_t selection = 0, state = 0, correction = 0, recalled = 0;  // running XXH3 over all steps
};

class DecodeSession {
 public:
  // Attaches and fetches the steady zone. The sequence must be READY. `client` outlives the
  // session.
  static absl::StatusOr<std::unique_ptr<DecodeSession>> Attach(Client* client,
                                                               const v1::SequenceHandle& sequence,
                                                               const DecodeOptions& options);
  ~DecodeSession();  // flushes and detaches, best effort

  const v1::Sequence& sequence() const;
  // The link in use, and why not a better one (empty: it is the best asked for). One that breaks is
  // given up for gRPC.
  v1::Link link() const;
  const std::string& link_reason() const;

  // The decoded token's own K and V of a layer [kv_heads, head_dim], before the Step that attends
  // to it. Sends the tokens before it when they are append_batch_tokens; on an error of that they
  // stay to be sent, and this one is not appended.
  absl::Status Append(int64_t layer, absl::Span<const std::byte> key,
                      absl::Span<const std::byte> value);
  // Sends what was appended and not yet sent: for another reader of the sequence, or a fork.
  absl::Status Flush();
  // output [query_heads, head_dim] = attention of queries [query_heads, head_dim] of the sequence's
  // element type over all tokens. figures may be null.
  // Errors: as the service's. After RESIDENCY_STALE, records other than those missed or with a
  // wrong checksum, or a broken stream it resets the layer's residency and tries once more; a lost
  // attachment is made anew. After a restart of the server it answers FailedPrecondition
  // STALE_BOOT_ID: the sequence is gone and must be prefilled again. `output` is written on success
  // only.
  absl::Status Step(int64_t layer, absl::Span<const std::byte> queries, absl::Span<float> output,
                    StepFigures* figures);

  // Step in two, for callers that attend themselves (engine.h): what the service answers, and
  // attention to it on the host. Errors of Recall: as Step's; Attend, before the session's next
  // call, only ends in INTERNAL_ERROR.
  absl::Status Recall(int64_t layer, absl::Span<const std::byte> queries, StepFigures* figures);
  absl::Status Attend(int64_t layer, absl::Span<const std::byte> queries, absl::Span<float> output);

  // What the layer's last Recall brought, and what is held besides. Valid until the next call.
  struct Recalled {
    const SteadyRows* steady = nullptr;               // sinks and window
    const LayerCache* cache = nullptr;                // records of the exact tokens
    absl::Span<const float> state_output, state_lse;  // [query_heads, head_dim], [query_heads]
    absl::Span<const int8_t> correction_codes;        // [query_heads, head_dim], or empty
    absl::Span<const float> correction_log_scales;    // [query_heads], or empty
  };
  Recalled recalled(int64_t layer) const;
  // Where records that came by link are; null: none ever come so. As long as the session.
  const RecordWindow* window() const;
  // For who has the steps answered in another way (resident_link.h): the layer's tokens before
  // window_begin are clustered by now. Errors: as SteadyRows::MoveWindow.
  absl::Status MoveWindow(int64_t layer, int64_t window_begin);
  // Nothing of the hot cache is held any more: the next step of a layer recalls all that it needs.
  void ForgetRecords();
  uint64_t attachment_id() const;
  Client* client() const;

  int64_t max_exact_tokens() const;  // that a selection may name per KV head, 1 or more

  // The exact tokens of the layer's last Step: positions per KV head (sinks and window left out).
  const std::vector<std::vector<int32_t>>& last_positions(int64_t layer) const;
  const std::vector<std::vector<uint32_t>>& last_head_masks(int64_t layer) const;
  // Tokens from here on were attended to as the window in the layer's last Step.
  int64_t window_begin(int64_t layer) const;
  LayerDigests digests(int64_t layer) const;
  // Bytes of KV that this worker holds: sinks, window, hot-cache slots.
  int64_t held_bytes() const;

 private:
  struct Impl;
  explicit DecodeSession(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_DECODE_SESSION_H_
