// Full causal attention in float over a trace: what a replay's answers are compared with.
#ifndef CLUSTERKV_WORKER_CKV_FULL_ATTENTION_H_
#define CLUSTERKV_WORKER_CKV_FULL_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/index/index.h"

namespace clusterkv::worker::ckv {

// K and V of one layer as float, each KV head contiguous: [kv_heads, tokens, head_dim].
struct FloatKv {
  kernels::KvShape shape;
  int64_t tokens = 0;
  std::vector<float> keys, values;

  const float* Key(int64_t kv_head, int64_t token) const {
    return keys.data() + (kv_head * tokens + token) * shape.head_dim;
  }
};

// keys, values [tokens, kv_heads, head_dim] of shape.element_type, host memory.
FloatKv MakeFloatKv(const kernels::KvShape& shape, int64_t tokens, absl::Span<const std::byte> keys,
                    absl::Span<const std::byte> values);

struct FullAttention {
  std::vector<float> output;  // [queries, query_heads, head_dim]
  std::vector<float> lse;     // [queries, query_heads]
};

// Query i attends to tokens [0, first_position + i]. queries [n, query_heads, head_dim], host
// memory. Runs on `threads` threads of its own; the same bits for any number. REQUIRES: 0 <=
// first_position, first_position + n <= kv.tokens.
FullAttention ComputeFullAttention(const FloatKv& kv, absl::Span<const float> queries,
                                   int64_t first_position, int threads);

// The weight that full attention gives to `positions` for one query [head_dim] of the KV head with
// the log-sum-exp `lse`: sum of exp(scale * q · k - lse).
double AttentionWeight(const FloatKv& kv, int64_t kv_head, const float* query, float lse,
                       absl::Span<const int32_t> positions);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_FULL_ATTENTION_H_
