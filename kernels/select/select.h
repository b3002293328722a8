// Select: queries -> clusters -> tokens by zone, and the attention state of what is not sent.
//
// One call answers one KV head of one layer for one decode step: it ranks the clusters, takes the
// best of them until enough tokens are scored, scores those by their codes, keeps the best as the
// *exact zone* (to be sent as records), and answers the *coded zone* (scored, not exact) and the
// *estimated zone* (the next clusters by rank) as one attention state per query head. Each token is
// in one zone at most. Sinks (the worker holds them) always count into the budget and into softmax
// normalisation.
//
// Deterministic: ties go to the lower cluster, then the lower position; sums have a fixed order.
// Sources: ClusterKV (arXiv 2412.03213) for ranking and trimming, RetroInfer (arXiv 2505.02922) for
// ranking once per KV head and the estimation zone.
#ifndef CLUSTERKV_KERNELS_SELECT_SELECT_H_
#define CLUSTERKV_KERNELS_SELECT_SELECT_H_

#include <chrono>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/index/index.h"

namespace clusterkv::kernels {

enum class SelectMode : uint8_t {
  kSharedPerKvHead = 1,  // rank once: sum over the group of the softmax over centroids
  kPerQueryHead =
      2,  // as published: each query head ranks by q · centroid and has tokens of its own
};

struct SelectParams {
  SelectMode mode = SelectMode::kSharedPerKvHead;
  // B: exact tokens per KV head (per query head in kPerQueryHead), sinks included. More than the
  // context means all of it.
  int64_t budget_tokens = 64;
  // Tokens that are scored by codes, W: clusters are taken by rank until so many tokens (the last
  // cluster cut, its highest positions left out); never fewer than the budget's own. 0: none are,
  // and the budget's tokens are the first of the ranking (the published method).
  int64_t scored_tokens = 2048;
  // Scored tokens that are not exact: true: they enter the state by their codes; false: they drop
  // out.
  bool answer_scored = true;
  // Of all clusters (empty ones counted), the share that enters the state by centroid, size and
  // value mean: the floor(fraction * clusters) next by rank after those touched. 0 to 1.
  float estimated_fraction = 0.25f;

  bool operator==(const SelectParams&) const = default;
};

// Errors: InvalidArgument naming the field: budget_tokens < 1, scored_tokens < 0, fraction out of
// [0, 1] or NaN, scored tokens without codes, kPerQueryHead with scored_tokens or an estimated
// fraction.
absl::Status ValidateSelectParams(const SelectParams& params, const CodesParams& codes);

struct SelectInput {
  KvShape shape;
  CodesParams codes;
  int64_t kv_head = 0;
  float scale = 0;                  // of the logits; 1 / sqrt(head_dim)
  absl::Span<const float> queries;  // [group, head_dim], as the model has them (not weighted)
  absl::Span<const IndexPartView>
      parts;  // of the layer, in token order; all with the same `channels`
  // Sinks' keys of this head: [sink_tokens, head_dim] of shape.element_type, rows key_stride_bytes
  // apart.
  const std::byte* sink_keys = nullptr;
  int64_t sink_key_stride_bytes = 0;
  int64_t sink_tokens = 0;
};

struct HeadSelection {
  // The exact zone without sinks, by ascending position. In kPerQueryHead the union over the group,
  // and head_masks says whose: bit g for query head g of the group; otherwise head_masks is empty.
  std::vector<int32_t> positions;
  std::vector<int32_t> parts;  // of the token, index into SelectInput::parts
  std::vector<int32_t>
      slots;  // of the token in its part, head-local: record kv_head * tokens + slot
  std::vector<int32_t> clusters;  // of the token, counted over the parts in order
  std::vector<uint32_t> head_masks;

  std::vector<int32_t> scored_clusters;     // whole or cut, by rank (shared mode)
  std::vector<int32_t> estimated_clusters;  // by rank
  int64_t coded_tokens = 0;                 // tokens in the state by their codes

  // The attention state: softmax over coded and estimated zone of their values, and its
  // log-sum-exp. lse = -infinity and output 0 when both zones are empty.
  std::vector<float> state_output;  // [group, head_dim]
  std::vector<float> state_lse;     // [group]
};

// Reusable memory of a Select; one per thread. Grows to the largest call and then allocates
// nothing.
class SelectScratch {
 public:
  SelectScratch();
  ~SelectScratch();
  SelectScratch(SelectScratch&&) noexcept;
  SelectScratch& operator=(SelectScratch&&) noexcept;
  // How long the last Select scored tokens by their codes and chose the exact ones.
  std::chrono::nanoseconds refine_time() const;
  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  Impl* impl_;
};

// Fills `selection` (its vectors are reused). Cost: C dot products, W coded dot products and
// values. Errors: InvalidArgument when the queries' shape is off or a query is not finite (the
// message names the query head and channel).
absl::Status Select(const SelectParams& params, const SelectInput& input, SelectScratch& scratch,
                    HeadSelection* selection);
absl::Status SelectReference(const SelectParams& params, const SelectInput& input,
                             HeadSelection* selection);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_SELECT_SELECT_H_
