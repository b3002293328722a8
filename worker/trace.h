// Traces: K, V and Q of one layer of a real model over a text, in safetensors files.
//
// A file holds k, v [tokens, kv_heads, head_dim] and q [queries, query_heads, head_dim], one
// element type (F32, F16, BF16), keys after RoPE, the queries those of the last tokens; and q_rms
// [kv_heads, head_dim] F32: the RMS of the prompt's queries per channel (absent: no balanced
// metric). Query i belongs to token tokens - queries + i, which attends to all tokens up to itself.
#ifndef CLUSTERKV_WORKER_TRACE_H_
#define CLUSTERKV_WORKER_TRACE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/index/index.h"

namespace clusterkv::worker {

struct TraceLayer {
  kernels::KvShape shape;
  int64_t tokens = 0;                   // prompt and decoded
  int64_t queries = 0;                  // decoded: the prompt has tokens - queries tokens
  std::vector<std::byte> keys, values;  // [tokens, kv_heads, head_dim] of shape.element_type
  std::vector<std::byte> q;             // [queries, query_heads, head_dim] of shape.element_type
  std::vector<float> query_rms;         // [kv_heads, head_dim], or empty
};

// Errors: NotFound; InvalidArgument naming the tensor, what was expected and what the file has
// (also for truncated files, headers beyond the file and overlapping or misaligned tensors).
absl::StatusOr<TraceLayer> ReadTraceLayer(const std::string& path);
absl::Status WriteTraceLayer(const TraceLayer& layer, const std::string& path);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_TRACE_H_
