#include "kernels/attention/attention_validate.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {
namespace {

absl::Status ExpectSize(const char* name, int64_t expected, size_t got) {
  if (static_cast<size_t>(expected) == got) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": expected ", expected, ", got ", got));
}

absl::Status ValidateRecords(const RecordRun& records) {
  if (!records.head_masks.empty()) {
    CKV_RETURN_IF_ERROR(ExpectSize("head_masks", records.slots.size(), records.head_masks.size()));
  }
  if (records.slots.empty()) return absl::OkStatus();
  if (records.codec == nullptr || records.slot_base == nullptr) {
    return absl::InvalidArgumentError("records: slots without codec or slot_base");
  }
  const auto lowest = std::min_element(records.slots.begin(), records.slots.end());
  if (*lowest < 0) {
    return absl::InvalidArgumentError(absl::StrCat("slots: at least 0, got ", *lowest));
  }
  return absl::OkStatus();
}

absl::Status ValidateParams(const AttentionParams& params, absl::Span<const float> queries) {
  if (params.group < 1 || params.group > kMaxAttentionGroup) {
    return absl::InvalidArgumentError(
        absl::StrCat("group: expected 1 to ", kMaxAttentionGroup, ", got ", params.group));
  }
  if (params.head_dim < 16 || params.head_dim > kMaxAttentionHeadDim || params.head_dim % 16 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("head_dim: expected a multiple of 16 up to ",
                                                   kMaxAttentionHeadDim, ", got ",
                                                   params.head_dim));
  }
  return ExpectSize("queries", params.group * params.head_dim, queries.size());
}

}  // namespace

absl::Status ValidateSparseAttention(const AttentionParams& params, absl::Span<const float> queries,
                                     absl::Span<const RawRun> raw, const RecordRun& records,
                                     const AttentionState& state, absl::Span<const float> output,
                                     absl::Span<const float> lse) {
  CKV_RETURN_IF_ERROR(ValidateParams(params, queries));
  const int64_t elements = params.group * params.head_dim;
  CKV_RETURN_IF_ERROR(ExpectSize("output", elements, output.size()));
  if (!lse.empty()) CKV_RETURN_IF_ERROR(ExpectSize("lse", params.group, lse.size()));
  if (!state.output.empty() || !state.lse.empty()) {
    CKV_RETURN_IF_ERROR(ExpectSize("state.output", elements, state.output.size()));
    CKV_RETURN_IF_ERROR(ExpectSize("state.lse", params.group, state.lse.size()));
  }
  for (const RawRun& run : raw) {
    if (run.tokens < 0 || (run.tokens > 0 && (run.keys == nullptr || run.values == nullptr))) {
      return absl::InvalidArgumentError(
          absl::StrCat("raw: a run of ", run.tokens, " tokens without keys or values"));
    }
  }
  return ValidateRecords(records);
}

absl::Status ValidateCorrection(const AttentionParams& params, absl::Span<const float> queries,
                                const RemainderRun& run) {
  CKV_RETURN_IF_ERROR(ValidateParams(params, queries));
  CKV_RETURN_IF_ERROR(ExpectSize("remainders", run.records.size(), run.remainders.size()));
  if (!run.head_masks.empty()) {
    CKV_RETURN_IF_ERROR(ExpectSize("head_masks", run.records.size(), run.head_masks.size()));
  }
  if (run.records.empty()) return absl::OkStatus();
  if (run.codec == nullptr || run.codec->RemainderBytes(params.element_type, params.head_dim) < 1) {
    return absl::InvalidArgumentError("records: expected a codec with remainders");
  }
  return absl::OkStatus();
}

absl::Status LogitOverflows(int64_t query_head) {
  return absl::InvalidArgumentError(
      absl::StrCat("queries: the logits of query head ", query_head, " of the group overflow"));
}

}  // namespace clusterkv::kernels
