// Replay: prefill a trace through a server, decode its queries, and compare with full attention.
//
// The files of a trace are the layers of one sequence. Every figure is defined at its field; tokens
// and bytes per step are means per KV head over the steps from the third on (over all, if there are
// fewer), without sinks.
#ifndef CLUSTERKV_WORKER_CKV_REPLAY_H_
#define CLUSTERKV_WORKER_CKV_REPLAY_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/full_attention.h"
#include "worker/trace.h"

namespace clusterkv::worker::ckv {

struct ReplayOptions {
  std::string sequence_name;  // empty: one of this process's own
  std::string preset = "default";
  std::optional<int64_t> budget;        // B; absent: the preset's
  std::optional<int64_t> coded_tokens;  // W
  std::optional<int64_t> code_bits;     // with code_group
  int64_t code_group = 0;
  v1::Metric metric = v1::METRIC_UNSPECIFIED;
  std::string codec = "raw";
  int64_t hot_tokens = 1024;  // of the hot cache, per KV head
  v1::HotCachePolicy hot_policy = v1::HOT_CACHE_POLICY_TOKEN_LRU;
  int64_t window_tokens = 0;  // decoded tokens that are clustered together; 0: never
  int64_t steps = 0;          // decoded; 0: all queries of the trace
  v1::ElementType state_type = v1::ELEMENT_TYPE_FLOAT16;
  std::vector<v1::Link> links;  // acceptable, best first; empty: the server's choice
  std::string device = "cpu";   // of the worker: DecodeOptions::device
  std::string selections_file;  // empty: none; a line per step, layer and KV head: its positions
};

// A trace in memory, with full attention of its first `steps` queries.
struct ReplayTrace {
  std::vector<TraceLayer> layers;
  std::vector<std::string> names;           // of the files, without folder and ending
  std::vector<FloatKv> kv;                  // [layers]
  std::vector<std::vector<float>> queries;  // [layers][steps, query_heads, head_dim]
  std::vector<FullAttention> full;          // [layers]
  int64_t steps = 0;

  const kernels::KvShape& shape() const { return layers[0].shape; }
  int64_t prompt_tokens() const { return layers[0].tokens - layers[0].queries; }
};

// steps: 0: all. Errors: the reader's; InvalidArgument when the files are not layers of one
// sequence.
absl::StatusOr<ReplayTrace> LoadReplayTrace(const std::vector<std::string>& paths, int64_t steps,
                                            int threads);
absl::StatusOr<ReplayTrace> MakeReplayTrace(std::vector<TraceLayer> layers,
                                            std::vector<std::string> names, int64_t steps,
                                            int threads);

struct Percentiles {
  double p50 = 0, p99 = 0;  // over all steps
};

struct LayerFigures {
  int64_t layer = 0;
  std::string trace;   // the file's name
  std::string preset;  // "full": full attention itself
  int64_t budget = 0;  // B, sinks included
  std::string codec;
  double mass = 0;          // full attention's weight on what is attended exactly: sinks, exact
                            // zone and window, mean over query heads and queries
  double output_error = 0;  // |output - full| / |full|, Frobenius, all heads and queries
  double exact_tokens_per_step = 0;  // the exact zone
  double recalled_tokens_per_step = 0;
  double recalled_bytes_per_step = 0;
  double state_bytes_per_step = 0;       // states and corrections
  double correction_bytes_per_step = 0;  // of these, corrections
  double hit_rate = 0;                   // of the exact tokens, the share that the hot cache had
  double held_fraction = 0;              // KV bytes that the decode side held at the end / all KV
  Percentiles select_us, recall_us;
  std::string index_digest, selection_digest, state_digest, correction_digest,
      recalled_digest;  // 16 hex digits
};

struct ReplayResult {
  std::vector<LayerFigures> layers;
  int64_t prompt_tokens = 0, steps = 0;
  int64_t record_bytes = 0;   // one token's K and V of one KV head
  double ingest_seconds = 0;  // first byte until READY
  double decode_seconds = 0;  // all steps, comparison left out
  std::string link, link_reason;
};

// Called as the work goes on: what is being done, and how much of it.
using ReplayProgress = std::function<void(std::string_view stage, int64_t done, int64_t total)>;

// One run. The sequence is released at the end, also after an error. `progress` may be null.
// Errors: the service's; InvalidArgument when the trace does not fit the options.
absl::StatusOr<ReplayResult> Replay(Places* places, const ReplayTrace& trace,
                                    const ReplayOptions& options, const ReplayProgress& progress);

// What full attention itself would show in the same table: everything held, nothing received.
ReplayResult FullAttentionResult(const ReplayTrace& trace);

// Mean and percentile of a list, 0 when it is empty; nearest rank.
Percentiles PercentilesOf(std::vector<double> values);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_REPLAY_H_
