// What every implementation of Select shares: validation, and where things lie in the parts.
#ifndef CLUSTERKV_KERNELS_SELECT_SELECT_COMMON_H_
#define CLUSTERKV_KERNELS_SELECT_SELECT_COMMON_H_

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/select/select.h"

namespace clusterkv::kernels {

// head_masks has a bit per query head.
constexpr int64_t kMaxGroup = 32;

// Errors: InvalidArgument, naming the field, when params or queries are bad. What only a programmer
// can get wrong (kv_head, shapes of the parts) is a CHECK.
absl::Status ValidateSelect(const SelectParams& params, const SelectInput& input);

// InvalidArgument for queries so large that a logit of theirs is not a finite float.
absl::Status LogitsOverflow(int64_t query_head);

inline int64_t TotalClusters(const SelectInput& input) {
  int64_t clusters = 0;
  for (const IndexPartView& part : input.parts) clusters += part.clusters;
  return clusters;
}

// Tokens of the exact zone (per query head in kPerQueryHead) if the context has so many.
inline int64_t ExactTokens(const SelectParams& params, const SelectInput& input) {
  return std::max<int64_t>(0, params.budget_tokens - input.sink_tokens);
}

// Tokens to take from the clusters by rank.
inline int64_t TakenTokens(const SelectParams& params, const SelectInput& input) {
  return std::max(params.scored_tokens, ExactTokens(params, input));
}

// Clusters of the estimation zone if there are so many.
inline int64_t EstimatedClusters(const SelectParams& params, int64_t clusters) {
  return static_cast<int64_t>(static_cast<double>(params.estimated_fraction) *
                              static_cast<double>(clusters));
}

// Channels of the head: [3, head_dim] metric weight, K balance, V balance. REQUIRES: a part.
inline const float* Channels(const SelectInput& input) {
  return input.parts[0].channels.As<float>(input.kv_head);
}

// Empties everything; the vectors keep their memory. The state becomes that of empty zones.
void ClearSelection(const SelectInput& input, HeadSelection* selection);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_SELECT_SELECT_COMMON_H_
