#include "kernels/select/select_common.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {
namespace {

absl::Status Invalid(const char* field, const char* expected, absl::AlphaNum got) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": expected ", expected, ", got ", got));
}

void CheckPart(const SelectInput& input, const IndexPartView& part) {
  const int64_t heads = input.shape.kv_heads;
  CKV_CHECK(part.tokens >= 1 && part.clusters >= 1) << part.tokens << " " << part.clusters;
  CKV_CHECK(part.centroids.size == heads * part.clusters) << part.centroids.size;
  CKV_CHECK(part.value_means.size == heads * part.clusters) << part.value_means.size;
  CKV_CHECK(part.cluster_begin.size == heads * (part.clusters + 1)) << part.cluster_begin.size;
  CKV_CHECK(part.positions.size == heads * part.tokens) << part.positions.size;
  CKV_CHECK(part.channels.size == heads) << part.channels.size;
  CKV_CHECK(input.codes.bits == 0 || part.codes.size == heads * part.tokens) << part.codes.size;
}

}  // namespace

absl::Status ValidateSelectParams(const SelectParams& params, const CodesParams& codes) {
  if (params.mode != SelectMode::kSharedPerKvHead && params.mode != SelectMode::kPerQueryHead) {
    return Invalid("mode", "a known mode", static_cast<int>(params.mode));
  }
  if (params.budget_tokens < 1) {
    return Invalid("budget_tokens", "at least 1", params.budget_tokens);
  }
  if (params.scored_tokens < 0) {
    return Invalid("scored_tokens", "at least 0", params.scored_tokens);
  }
  if (!(params.estimated_fraction >= 0 && params.estimated_fraction <= 1)) {
    return Invalid("estimated_fraction", "0 to 1", params.estimated_fraction);
  }
  if (params.scored_tokens > 0 && codes.bits == 0) {
    return Invalid("scored_tokens", "0, for the index has no codes", params.scored_tokens);
  }
  if (params.mode == SelectMode::kPerQueryHead) {
    if (params.scored_tokens > 0) {
      return Invalid("scored_tokens", "0 when each query head selects for itself",
                     params.scored_tokens);
    }
    if (params.estimated_fraction > 0) {
      return Invalid("estimated_fraction", "0 when each query head selects for itself",
                     params.estimated_fraction);
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateSelect(const SelectParams& params, const SelectInput& input) {
  CKV_RETURN_IF_ERROR(ValidateSelectParams(params, input.codes));
  const KvShape& shape = input.shape;
  CKV_CHECK(shape.kv_heads > 0 && shape.query_heads % shape.kv_heads == 0) << shape.kv_heads;
  CKV_CHECK(shape.head_dim > 0 && shape.head_dim % 16 == 0) << shape.head_dim;
  CKV_CHECK(input.kv_head >= 0 && input.kv_head < shape.kv_heads) << input.kv_head;
  CKV_CHECK(shape.group() >= 1 && shape.group() <= kMaxGroup) << shape.group();
  CKV_CHECK(input.sink_tokens == 0 || params.scored_tokens == 0 || input.sink_keys != nullptr);
  for (const IndexPartView& part : input.parts) CheckPart(input, part);
  const int64_t floats = shape.group() * shape.head_dim;
  if (static_cast<int64_t>(input.queries.size()) != floats) {
    return absl::InvalidArgumentError(absl::StrCat("queries: expected [", shape.group(), ", ",
                                                   shape.head_dim, "] floats, got ",
                                                   input.queries.size()));
  }
  int64_t bad = 0;
  if (!AllFinite(reinterpret_cast<const std::byte*>(input.queries.data()), ElementType::kFloat32,
                 floats, &bad)) {
    const int64_t head = input.kv_head * shape.group() + bad / shape.head_dim;
    return absl::InvalidArgumentError(
        absl::StrCat("queries: query head ", head, ", channel ", bad % shape.head_dim,
                     ": expected a finite number, got ", input.queries[bad]));
  }
  return absl::OkStatus();
}

absl::Status LogitsOverflow(int64_t query_head) {
  return absl::InvalidArgumentError(absl::StrCat(
      "queries: query head ", query_head, ": expected logits that fit a float, got an overflow"));
}

void ClearSelection(const SelectInput& input, HeadSelection* selection) {
  const int64_t group = input.shape.group();
  selection->positions.clear();
  selection->parts.clear();
  selection->slots.clear();
  selection->clusters.clear();
  selection->head_masks.clear();
  selection->scored_clusters.clear();
  selection->estimated_clusters.clear();
  selection->coded_tokens = 0;
  selection->state_output.assign(group * input.shape.head_dim, 0.0f);
  selection->state_lse.assign(group, -std::numeric_limits<float>::infinity());
}

}  // namespace clusterkv::kernels
