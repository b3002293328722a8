// Raw K and V of one layer that a decode worker always attends to: sinks and window, per KV head.
//
// Positions are those of the sinks [0, sinks) followed by those of the window [window_begin,
// tokens). Not thread-safe.
#ifndef CLUSTERKV_WORKER_STEADY_ROWS_H_
#define CLUSTERKV_WORKER_STEADY_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "kernels/attention/attention.h"

namespace clusterkv::worker {

class SteadyRows {
 public:
  // row_bytes: of one token's K (or V) of one KV head. The layer has `tokens` tokens, of which
  // those below min(sink_tokens, tokens) are sinks.
  SteadyRows(int64_t kv_heads, int64_t row_bytes, int64_t sink_tokens, int64_t tokens,
             int64_t window_begin);

  // Rows from the service, in chunks by head, positions ascending.
  // Errors: DataLoss when they are not what is missing, or their checksum is off.
  absl::Status Add(const v1::RecordChunk& chunk);
  // Errors: DataLoss when a head lacks rows.
  absl::Status CheckComplete() const;

  // The next token's K and V of all heads [kv_heads, row_bytes].
  void Append(absl::Span<const std::byte> key, absl::Span<const std::byte> value);
  // Tokens before window_begin are clustered by now: their rows go, but for sinks.
  // Errors: Internal when the window would grow backwards or end before it begins.
  absl::Status MoveWindow(int64_t window_begin);

  // Sinks and window of one head. Valid until the next change.
  std::vector<kernels::RawRun> Runs(int64_t kv_head) const;

  int64_t sinks() const { return sinks_; }
  int64_t tokens() const { return tokens_; }
  int64_t window_begin() const { return window_begin_; }
  int64_t held_bytes() const { return kv_heads_ * 2 * row_bytes_ * held_tokens(); }

 private:
  int64_t held_tokens() const { return sinks_ + tokens_ - window_begin_; }
  int64_t PositionOf(int64_t row) const;

  int64_t kv_heads_, row_bytes_, sinks_;
  int64_t tokens_, window_begin_;
  // By head: K and V of each token in turn. Window rows that were dropped stay until they are many.
  std::vector<std::vector<std::byte>> rows_;
  int64_t dropped_ = 0;  // window rows at the window's front that are dropped
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_STEADY_ROWS_H_
