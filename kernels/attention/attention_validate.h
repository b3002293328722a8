// The one validator of sparse attention, shared by all its versions.
#ifndef CLUSTERKV_KERNELS_ATTENTION_ATTENTION_VALIDATE_H_
#define CLUSTERKV_KERNELS_ATTENTION_ATTENTION_VALIDATE_H_

#include "kernels/attention/attention.h"

namespace clusterkv::kernels {

constexpr int64_t kMaxAttentionGroup = 32;
constexpr int64_t kMaxAttentionHeadDim = 512;

// Errors: InvalidArgument, as SparseAttention.
absl::Status ValidateSparseAttention(const AttentionParams& params, absl::Span<const float> queries,
                                     absl::Span<const RawRun> raw, const RecordRun& records,
                                     const AttentionState& state, absl::Span<const float> output,
                                     absl::Span<const float> lse);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_ATTENTION_ATTENTION_VALIDATE_H_
