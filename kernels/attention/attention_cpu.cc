#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention/attention.h"
#include "kernels/attention/attention_validate.h"
#include "kernels/attention/block_softmax.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

}  // namespace

absl::Status SparseAttention(const AttentionParams& params, absl::Span<const float> queries,
                             absl::Span<const RawRun> raw, const RecordRun& records,
                             const AttentionState& state, absl::Span<float> output,
                             absl::Span<float> lse) {
  CKV_RETURN_IF_ERROR(ValidateSparseAttention(params, queries, raw, records, state, output, lse));
  BlockSoftmax softmax(params, queries.data(), output.data());
  for (const RawRun& run : raw) {
    for (int64_t i = 0; i < run.tokens; ++i) {
      ToFloat(run.keys + i * run.key_stride_bytes, params.element_type, params.head_dim,
              softmax.next_key());
      ToFloat(run.values + i * run.value_stride_bytes, params.element_type, params.head_dim,
              softmax.next_value());
      softmax.Add(~uint32_t{0});
    }
  }
  if (!records.slots.empty()) {
    const int64_t record_bytes = records.codec->RecordBytes(params.element_type, params.head_dim);
    for (size_t i = 0; i < records.slots.size(); ++i) {
      records.codec->Decode(records.slot_base + records.slots[i] * record_bytes,
                            params.element_type, params.head_dim, softmax.next_key(),
                            softmax.next_value());
      softmax.Add(records.head_masks.empty() ? ~uint32_t{0} : records.head_masks[i]);
    }
  }
  float exact_lse[kMaxAttentionGroup];
  softmax.Finish(exact_lse);
  const absl::Span<float> merged_lse(exact_lse, params.group);
  if (!state.lse.empty()) {
    MergeStates(params.group, params.head_dim, output, merged_lse, state.output, state.lse);
  }
  if (!lse.empty()) std::copy(merged_lse.begin(), merged_lse.end(), lse.begin());
  return absl::OkStatus();
}

void MergeStates(int64_t group, int64_t head_dim, absl::Span<float> output_a,
                 absl::Span<float> lse_a, absl::Span<const float> output_b,
                 absl::Span<const float> lse_b) {
  for (int64_t g = 0; g < group; ++g) {
    if (lse_b[g] == kNothing) continue;
    if (lse_a[g] == kNothing) {
      std::copy_n(output_b.data() + g * head_dim, head_dim, output_a.data() + g * head_dim);
      lse_a[g] = lse_b[g];
      continue;
    }
    const float highest = std::max(lse_a[g], lse_b[g]);
    const float weight_a = std::exp(lse_a[g] - highest);
    const float weight_b = std::exp(lse_b[g] - highest);
    const float total = weight_a + weight_b;
    const float share_a = weight_a / total, share_b = weight_b / total;
    float* a = output_a.data() + g * head_dim;
    const float* b = output_b.data() + g * head_dim;
    for (int64_t j = 0; j < head_dim; ++j) a[j] = share_a * a[j] + share_b * b[j];
    lse_a[g] = highest + std::log(total);
  }
}

}  // namespace clusterkv::kernels
