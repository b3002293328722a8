// The validators of attention and of corrections, shared by all their versions.
#ifndef CLUSTERKV_KERNELS_ATTENTION_ATTENTION_VALIDATE_H_
#define CLUSTERKV_KERNELS_ATTENTION_ATTENTION_VALIDATE_H_

#include "kernels/attention/attention.h"
#include "kernels/attention/correction.h"

namespace clusterkv::kernels {

constexpr int64_t kMaxAttentionGroup = 32;
constexpr int64_t kMaxAttentionHeadDim = 512;

// Errors: InvalidArgument, as SparseAttention.
absl::Status ValidateSparseAttention(const AttentionParams& params, absl::Span<const float> queries,
                                     absl::Span<const RawRun> raw, const RecordRun& records,
                                     const AttentionState& state, absl::Span<const float> output,
                                     absl::Span<const float> lse);

// Errors: InvalidArgument, as ComputeCorrection, overflows left out.
absl::Status ValidateCorrection(const AttentionParams& params, absl::Span<const float> queries,
                                const RemainderRun& run);
absl::Status LogitOverflows(int64_t query_head);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_ATTENTION_ATTENTION_VALIDATE_H_
