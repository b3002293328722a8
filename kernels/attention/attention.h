// Sparse decode attention: the worker's exact attention over what it holds, merged with the
// service's attention state.
//
// Exact tokens come from raw rows (sinks, window) and from records (hot-cache slots). Merging with
// the state is by log-sum-exp, so that the result is the softmax over all tokens of both.
#ifndef CLUSTERKV_KERNELS_ATTENTION_ATTENTION_H_
#define CLUSTERKV_KERNELS_ATTENTION_ATTENTION_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/record_codec.h"

namespace clusterkv::kernels {

// A run of tokens of one KV head as the model made them. Host memory.
struct RawRun {
  const std::byte* keys = nullptr;  // row i at keys + i * key_stride_bytes, [head_dim] of the type
  const std::byte* values = nullptr;  // row i at values + i * value_stride_bytes
  int64_t key_stride_bytes = 0;
  int64_t value_stride_bytes = 0;
  int64_t tokens = 0;
};

// Tokens of one KV head as records at slot_base + slots[i] * record_bytes.
struct RecordRun {
  const RecordCodec* codec = nullptr;  // not null when there are tokens
  const std::byte* slot_base = nullptr;
  absl::Span<const int32_t> slots;  // [tokens]
  absl::Span<const uint32_t>
      head_masks;  // [tokens]: bit g: query head g attends to it; empty: all do
};

struct AttentionParams {
  int64_t group = 0;  // query heads of this KV head, 1 to 32
  int64_t head_dim = 0;
  ElementType element_type = ElementType::kBFloat16;
  float scale = 0;  // of the logits
};

// An attention state, per query head. Spans may be empty: no state.
struct AttentionState {
  absl::Span<const float> output;  // [group, head_dim]
  absl::Span<const float> lse;     // [group]; -infinity: nothing in it
};

// output [group, head_dim] = softmax over raw runs, records and state together, of their values.
// lse [group] out, may be empty: the log-sum-exp over all of it.
// queries [group, head_dim]. With nothing to attend to at all, output is 0 and lse -infinity.
// Errors: InvalidArgument when spans do not fit the shapes.
absl::Status SparseAttention(const AttentionParams& params, absl::Span<const float> queries,
                             absl::Span<const RawRun> raw, const RecordRun& records,
                             const AttentionState& state, absl::Span<float> output,
                             absl::Span<float> lse);
absl::Status SparseAttentionReference(const AttentionParams& params,
                                      absl::Span<const float> queries, absl::Span<const RawRun> raw,
                                      const RecordRun& records, const AttentionState& state,
                                      absl::Span<float> output, absl::Span<float> lse);

// Merges state b into state a (output_a, lse_a), per query head, by log-sum-exp.
void MergeStates(int64_t group, int64_t head_dim, absl::Span<float> output_a,
                 absl::Span<float> lse_a, absl::Span<const float> output_b,
                 absl::Span<const float> lse_b);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_ATTENTION_ATTENTION_H_
