// Select for CPUs: the same steps as the reference, on flat arrays, with the vector work in
// select_simd and linear-time selection in place of sorting.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/base/status_macros.h"
#include "kernels/select/radix.h"
#include "kernels/select/select.h"
#include "kernels/select/select_common.h"
#include "kernels/select/select_simd.h"

namespace clusterkv::kernels {
namespace {

int64_t Padded(int64_t count) {
  return (count + select_simd::kLogitPadding - 1) / select_simd::kLogitPadding *
         select_simd::kLogitPadding;
}

// Per query head one row of floats, rows padded for the vector code.
struct HeadRows {
  std::vector<float> floats;
  int64_t stride = 0;

  void Resize(int64_t group, int64_t count) {
    stride = Padded(count);
    floats.resize(group * stride);
  }
  float* Row(int64_t g) { return floats.data() + g * stride; }
};

}  // namespace

struct SelectScratch::Impl {
  // Queries [group, head_dim]: over the metric weight and times the scale; the same over the K
  // balance.
  std::vector<float> queries, code_queries;

  // Clusters, counted over the parts.
  HeadRows cluster_logits, cluster_exps;
  std::vector<int32_t> cluster_begin, cluster_size, cluster_part, part_first_cluster;
  std::vector<uint32_t> cluster_keys;
  std::vector<uint32_t> ranked;  // clusters with tokens, best first

  // Tokens taken, cluster by cluster in rank order. taken[i] of the tokens are from ranked[i].
  std::vector<int32_t> taken;
  std::vector<int32_t> token_slot, token_position, token_cluster;
  std::vector<const std::byte*> token_codes;
  HeadRows token_logits, token_exps;
  std::vector<uint32_t> token_keys, token_mask;
  std::vector<uint8_t> token_exact;
  std::vector<uint32_t> exact;  // indices of the exact zone's tokens

  std::vector<float> sink_keys, head_max, head_inverse_sum;
  HeadRows sink_logits;

  // The state: logits, then weights, of coded tokens, and of the clusters whose value means count.
  HeadRows coded_weights, row_weights;
  std::vector<const uint16_t*> rows;
  std::vector<int32_t> row_sizes;
  std::vector<float> code_sums, row_sums;

  RadixScratch radix;
  std::chrono::nanoseconds refine_time{0};
};

SelectScratch::SelectScratch() : impl_(new Impl) {}
SelectScratch::~SelectScratch() { delete impl_; }
std::chrono::nanoseconds SelectScratch::refine_time() const { return impl_->refine_time; }
SelectScratch::SelectScratch(SelectScratch&& other) noexcept
    : impl_(std::exchange(other.impl_, nullptr)) {}
SelectScratch& SelectScratch::operator=(SelectScratch&& other) noexcept {
  std::swap(impl_, other.impl_);
  return *this;
}

namespace {

class Selector {
 public:
  Selector(const SelectParams& params, const SelectInput& input, SelectScratch::Impl& scratch,
           HeadSelection* selection)
      : params_(params),
        input_(input),
        head_(input.kv_head),
        group_(input.shape.group()),
        head_dim_(input.shape.head_dim),
        clusters_(TotalClusters(input)),
        s_(scratch),
        selection_(*selection) {}

  absl::Status Run() {
    ClearSelection(input_, &selection_);
    s_.refine_time = std::chrono::nanoseconds(0);
    if (input_.parts.empty()) return absl::OkStatus();
    PrepareQueries();
    CKV_RETURN_IF_ERROR(ScoreClusters());
    LoadSizes();
    if (params_.mode == SelectMode::kPerQueryHead) {
      SelectPerQueryHead();
      return absl::OkStatus();
    }
    RankShared();
    Take(TakenTokens(params_, input_));
    for (size_t i = 0; i < s_.taken.size(); ++i) {
      selection_.scored_clusters.push_back(static_cast<int32_t>(s_.ranked[i]));
    }
    const int64_t tokens = static_cast<int64_t>(s_.token_slot.size());
    const int64_t exact = std::min(ExactTokens(params_, input_), tokens);
    if (exact == tokens) {
      for (int64_t t = 0; t < tokens; ++t) s_.exact.push_back(static_cast<uint32_t>(t));
    } else {
      const auto start = std::chrono::steady_clock::now();
      CKV_RETURN_IF_ERROR(ScoreTokens());
      ChooseExact(exact);
      s_.refine_time = std::chrono::steady_clock::now() - start;
    }
    EmitExact();
    const bool coded = params_.answer_scored && exact < tokens;
    if (coded) RemoveExactTokens();
    FillState(coded);
    return absl::OkStatus();
  }

 private:
  void PrepareQueries() {
    const float* weight = Channels(input_);
    const float* key_balance = weight + head_dim_;
    s_.queries.resize(group_ * head_dim_);
    s_.code_queries.resize(group_ * head_dim_);
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t j = 0; j < head_dim_; ++j) {
        const int64_t i = g * head_dim_ + j;
        s_.queries[i] = input_.queries[i] / weight[j] * input_.scale;
        s_.code_queries[i] = s_.queries[i] / key_balance[j];
      }
    }
  }

  absl::Status CheckLogits(HeadRows& logits, int64_t count) {
    for (int64_t g = 0; g < group_; ++g) {
      if (!AllFinite(reinterpret_cast<const std::byte*>(logits.Row(g)), ElementType::kFloat32,
                     count, nullptr)) {
        return LogitsOverflow(head_ * group_ + g);
      }
    }
    return absl::OkStatus();
  }

  absl::Status ScoreClusters() {
    s_.cluster_logits.Resize(group_, clusters_);
    int64_t offset = 0;
    for (const IndexPartView& part : input_.parts) {
      const int64_t begin = head_ * part.clusters;
      ForEachRun(part.centroids, begin, begin + part.clusters,
                 [&](const std::byte* centroids, int64_t first, int64_t count) {
                   select_simd::DotHalfRows(reinterpret_cast<const uint16_t*>(centroids), count,
                                            head_dim_, s_.queries.data(), group_,
                                            s_.cluster_logits.Row(0) + offset + first - begin,
                                            s_.cluster_logits.stride);
                 });
      offset += part.clusters;
    }
    return CheckLogits(s_.cluster_logits, clusters_);
  }

  // Sizes and places of the clusters; logits of empty ones and of the padding become -infinity.
  void LoadSizes() {
    s_.cluster_begin.resize(clusters_);
    s_.cluster_size.resize(clusters_);
    s_.cluster_part.resize(clusters_);
    s_.part_first_cluster.resize(input_.parts.size());
    constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
    int64_t offset = 0;
    for (size_t p = 0; p < input_.parts.size(); ++p) {
      const IndexPartView& part = input_.parts[p];
      const int64_t begin = head_ * (part.clusters + 1);
      int32_t* begins = s_.cluster_begin.data() + offset;
      s_.part_first_cluster[p] = static_cast<int32_t>(offset);
      ForEachRun(part.cluster_begin, begin, begin + part.clusters,
                 [&](const std::byte* run, int64_t first, int64_t count) {
                   std::memcpy(begins + (first - begin), run, count * sizeof(int32_t));
                 });
      const int32_t end = *part.cluster_begin.As<int32_t>(begin + part.clusters);
      for (int64_t c = 0; c < part.clusters; ++c) {
        const int32_t size = (c + 1 < part.clusters ? begins[c + 1] : end) - begins[c];
        s_.cluster_size[offset + c] = size;
        s_.cluster_part[offset + c] = static_cast<int32_t>(p);
        if (size > 0) continue;
        for (int64_t g = 0; g < group_; ++g) {
          s_.cluster_logits.Row(g)[offset + c] = kMinusInfinity;
        }
      }
      offset += part.clusters;
    }
    for (int64_t g = 0; g < group_; ++g) {
      float* logits = s_.cluster_logits.Row(g);
      std::fill(logits + clusters_, logits + s_.cluster_logits.stride, kMinusInfinity);
    }
  }

  // ranked = clusters with tokens by ascending cluster_keys.
  void RankByKeys() {
    s_.ranked.clear();
    for (int64_t c = 0; c < clusters_; ++c) {
      if (s_.cluster_size[c] > 0) s_.ranked.push_back(static_cast<uint32_t>(c));
    }
    SortByKey(s_.cluster_keys.data(), s_.radix, &s_.ranked);
  }

  // Keys by the sum over the group of the softmax over `count` entries of logits (and the sinks').
  void SharedKeys(HeadRows& logits, HeadRows& exps, int64_t count, HeadRows* sinks,
                  std::vector<uint32_t>* keys) {
    exps.Resize(group_, count);
    s_.head_max.resize(group_);
    s_.head_inverse_sum.resize(group_);
    for (int64_t g = 0; g < group_; ++g) {
      float max = select_simd::MaxOf(logits.Row(g), count);
      float sink_sum = 0;
      if (sinks != nullptr) {
        max = std::max(max, select_simd::MaxOf(sinks->Row(g), input_.sink_tokens));
        sink_sum = select_simd::ExpAndSum(sinks->Row(g), input_.sink_tokens, max, sinks->Row(g));
      }
      const float sum = select_simd::ExpAndSum(logits.Row(g), count, max, exps.Row(g));
      s_.head_max[g] = max;
      s_.head_inverse_sum[g] = 1.0f / (sum + sink_sum);
    }
    keys->resize(exps.stride);
    select_simd::MassKeys(logits.floats.data(), exps.floats.data(), exps.stride, count, group_,
                          s_.head_max.data(), s_.head_inverse_sum.data(), keys->data());
  }

  void RankShared() {
    SharedKeys(s_.cluster_logits, s_.cluster_exps, clusters_, nullptr, &s_.cluster_keys);
    RankByKeys();
  }

  void ClearTokens() {
    s_.taken.clear();
    s_.token_slot.clear();
    s_.token_position.clear();
    s_.token_cluster.clear();
    s_.token_codes.clear();
    s_.exact.clear();
  }

  // Appends the first `count` tokens of the ranking; of the last cluster the lowest positions.
  void Take(int64_t count) {
    ClearTokens();
    for (size_t i = 0; i < s_.ranked.size() && count > 0; ++i) {
      const int32_t cluster = static_cast<int32_t>(s_.ranked[i]);
      const int64_t size = std::min<int64_t>(s_.cluster_size[cluster], count);
      TakeCluster(cluster, size);
      s_.taken.push_back(static_cast<int32_t>(size));
      count -= size;
    }
  }

  void TakeCluster(int32_t cluster, int64_t size) {
    const IndexPartView& part = input_.parts[s_.cluster_part[cluster]];
    const int32_t slot = s_.cluster_begin[cluster];
    const int64_t row = head_ * part.tokens + slot;
    ForEachRun(part.positions, row, row + size,
               [&](const std::byte* run, int64_t first, int64_t count) {
                 const int32_t* positions = reinterpret_cast<const int32_t*>(run);
                 s_.token_position.insert(s_.token_position.end(), positions, positions + count);
                 for (int64_t i = 0; i < count; ++i) {
                   s_.token_slot.push_back(slot + static_cast<int32_t>(first - row + i));
                 }
               });
    s_.token_cluster.insert(s_.token_cluster.end(), size, cluster);
    if (params_.scored_tokens == 0) return;
    ForEachRun(part.codes, row, row + size, [&](const std::byte* run, int64_t, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        s_.token_codes.push_back(run + i * part.codes.element_bytes);
      }
    });
  }

  // Each head takes its own tokens; the union by position, with a mask of the heads.
  void SelectPerQueryHead() {
    s_.cluster_keys.resize(s_.cluster_logits.stride);
    ClearTokens();
    std::vector<uint32_t>& mask = s_.token_mask;
    mask.clear();
    for (int64_t g = 0; g < group_; ++g) {
      select_simd::DescendingKeys(s_.cluster_logits.Row(g), clusters_, s_.cluster_keys.data());
      RankByKeys();
      int64_t count = ExactTokens(params_, input_);
      for (size_t i = 0; i < s_.ranked.size() && count > 0; ++i) {
        const int32_t cluster = static_cast<int32_t>(s_.ranked[i]);
        const int64_t size = std::min<int64_t>(s_.cluster_size[cluster], count);
        TakeCluster(cluster, size);
        count -= size;
      }
      mask.resize(s_.token_slot.size(), 1u << g);
    }
    for (size_t t = 0; t < s_.token_slot.size(); ++t) s_.exact.push_back(static_cast<uint32_t>(t));
    SortByKey(reinterpret_cast<const uint32_t*>(s_.token_position.data()), s_.radix, &s_.exact);
    size_t kept = 0;
    for (size_t i = 0; i < s_.exact.size(); ++i) {
      const uint32_t token = s_.exact[i];
      if (kept > 0 && s_.token_position[s_.exact[kept - 1]] == s_.token_position[token]) {
        mask[s_.exact[kept - 1]] |= mask[token];
      } else {
        s_.exact[kept++] = token;
      }
    }
    s_.exact.resize(kept);
    EmitSorted();
    for (const uint32_t token : s_.exact) selection_.head_masks.push_back(mask[token]);
  }

  // token_logits by codes: the cluster's logit and what the residual adds. And the sinks' logits.
  absl::Status ScoreTokens() {
    const int64_t tokens = static_cast<int64_t>(s_.token_slot.size());
    s_.token_logits.Resize(group_, tokens);
    for (int64_t g = 0; g < group_; ++g) {
      float* logits = s_.token_logits.Row(g);
      for (size_t i = 0; i < s_.taken.size(); ++i) {
        logits = std::fill_n(logits, s_.taken[i], s_.cluster_logits.Row(g)[s_.ranked[i]]);
      }
    }
    select_simd::AddCodeDots(input_.codes, head_dim_, s_.token_codes.data(), tokens,
                             s_.code_queries.data(), group_, s_.token_logits.Row(0),
                             s_.token_logits.stride);
    CKV_RETURN_IF_ERROR(CheckLogits(s_.token_logits, tokens));
    return ScoreSinks();
  }

  absl::Status ScoreSinks() {
    const int64_t sinks = input_.sink_tokens;
    s_.sink_logits.Resize(group_, std::max<int64_t>(sinks, 1));
    s_.sink_keys.resize(sinks * head_dim_);
    for (int64_t t = 0; t < sinks; ++t) {
      ToFloat(input_.sink_keys + t * input_.sink_key_stride_bytes, input_.shape.element_type,
              head_dim_, s_.sink_keys.data() + t * head_dim_);
    }
    select_simd::DotRows(s_.sink_keys.data(), sinks, head_dim_, input_.queries.data(), group_,
                         s_.sink_logits.Row(0), s_.sink_logits.stride);
    for (float& logit : s_.sink_logits.floats) logit *= input_.scale;
    return CheckLogits(s_.sink_logits, sinks);
  }

  // exact = the `count` tokens of the largest mass, of equal ones those of the lower position.
  void ChooseExact(int64_t count) {
    if (count == 0) return;
    const int64_t tokens = static_cast<int64_t>(s_.token_slot.size());
    SharedKeys(s_.token_logits, s_.token_exps, tokens, &s_.sink_logits, &s_.token_keys);
    const uint32_t last = KthSmallest(s_.token_keys.data(), tokens, count, s_.radix);
    for (int64_t t = 0; t < tokens; ++t) {
      if (s_.token_keys[t] < last) s_.exact.push_back(static_cast<uint32_t>(t));
    }
    // Of those that tie for the last places, the lowest positions.
    const size_t sure = s_.exact.size();
    for (int64_t t = 0; t < tokens; ++t) {
      if (s_.token_keys[t] == last) s_.exact.push_back(static_cast<uint32_t>(t));
    }
    std::sort(s_.exact.begin() + sure, s_.exact.end(),
              [&](uint32_t a, uint32_t b) { return s_.token_position[a] < s_.token_position[b]; });
    s_.exact.resize(count);
  }

  void EmitExact() {
    SortByKey(reinterpret_cast<const uint32_t*>(s_.token_position.data()), s_.radix, &s_.exact);
    EmitSorted();
  }

  void EmitSorted() {
    for (const uint32_t token : s_.exact) {
      const int32_t cluster = s_.token_cluster[token];
      selection_.positions.push_back(s_.token_position[token]);
      selection_.parts.push_back(s_.cluster_part[cluster]);
      selection_.slots.push_back(s_.token_slot[token]);
      selection_.clusters.push_back(cluster);
    }
  }

  // Leaves the coded zone in token_logits, token_codes and taken.
  void RemoveExactTokens() {
    s_.token_exact.assign(s_.token_slot.size(), 0);
    for (const uint32_t token : s_.exact) s_.token_exact[token] = 1;
    int64_t kept = 0, t = 0;
    for (int32_t& taken : s_.taken) {
      const int64_t kept_before = kept;
      for (const int64_t end = t + taken; t < end; ++t) {
        if (s_.token_exact[t] != 0) continue;
        s_.token_codes[kept] = s_.token_codes[t];
        for (int64_t g = 0; g < group_; ++g) {
          s_.token_logits.Row(g)[kept] = s_.token_logits.Row(g)[t];
        }
        ++kept;
      }
      taken = static_cast<int32_t>(kept - kept_before);
    }
    s_.token_codes.resize(kept);
  }

  const uint16_t* ValueMean(int32_t cluster) const {
    const IndexPartView& part = input_.parts[s_.cluster_part[cluster]];
    const int64_t of_part = cluster - s_.part_first_cluster[s_.cluster_part[cluster]];
    return part.value_means.As<uint16_t>(head_ * part.clusters + of_part);
  }

  // The value means that enter the state: of the estimated clusters, then of the coded tokens'
  // ones.
  void CollectRows(bool coded) {
    s_.rows.clear();
    s_.row_sizes.clear();
    const size_t touched = s_.taken.size();
    const size_t estimated =
        std::min<size_t>(EstimatedClusters(params_, clusters_), s_.ranked.size() - touched);
    for (size_t i = touched; i < touched + estimated; ++i) {
      const int32_t cluster = static_cast<int32_t>(s_.ranked[i]);
      selection_.estimated_clusters.push_back(cluster);
      s_.rows.push_back(ValueMean(cluster));
      s_.row_sizes.push_back(s_.cluster_size[cluster]);
    }
    for (size_t i = 0; coded && i < touched; ++i) {
      s_.rows.push_back(ValueMean(static_cast<int32_t>(s_.ranked[i])));
    }
    s_.row_sizes.resize(Padded(static_cast<int64_t>(s_.row_sizes.size())), 1);
  }

  // Weights of head g's coded tokens and value means, relative to their maximum, which is returned
  // with their sum.
  void Weigh(int64_t g, int64_t coded, int64_t estimated, float* max, float* sum) {
    float* rows = s_.row_weights.Row(g);
    for (int64_t i = 0; i < estimated; ++i) {
      const int32_t cluster = selection_.estimated_clusters[i];
      rows[i] = s_.cluster_logits.Row(g)[cluster];
    }
    select_simd::AddLogs(s_.row_sizes.data(), estimated, rows);
    *max = select_simd::MaxOf(rows, estimated);
    if (coded > 0) *max = std::max(*max, select_simd::MaxOf(s_.token_logits.Row(g), coded));
    *sum = select_simd::ExpAndSum(rows, estimated, *max, rows);
    if (coded == 0) return;
    const float* weights = s_.coded_weights.Row(g);
    *sum += select_simd::ExpAndSum(s_.token_logits.Row(g), coded, *max, s_.coded_weights.Row(g));
    float* row = rows + estimated;
    for (const int32_t taken : s_.taken) {
      float of_cluster = 0;
      for (int32_t i = 0; i < taken; ++i) of_cluster += *weights++;
      *row++ = of_cluster;
    }
  }

  void FillState(bool answer_coded) {
    CollectRows(answer_coded);
    const int64_t coded = answer_coded ? static_cast<int64_t>(s_.token_codes.size()) : 0;
    const int64_t estimated = static_cast<int64_t>(selection_.estimated_clusters.size());
    const int64_t rows = static_cast<int64_t>(s_.rows.size());
    selection_.coded_tokens = coded;
    if (coded + estimated == 0) return;
    s_.coded_weights.Resize(group_, coded);
    s_.row_weights.Resize(group_, rows);
    s_.head_inverse_sum.resize(group_);
    for (int64_t g = 0; g < group_; ++g) {
      float max, sum;
      Weigh(g, coded, estimated, &max, &sum);
      selection_.state_lse[g] = max + std::log(sum);
      s_.head_inverse_sum[g] = 1.0f / sum;
    }
    s_.code_sums.assign(group_ * head_dim_, 0.0f);
    s_.row_sums.assign(group_ * head_dim_, 0.0f);
    if (coded > 0) {
      select_simd::AddWeightedCodes(input_.codes, head_dim_, s_.token_codes.data(), coded,
                                    s_.coded_weights.Row(0), s_.coded_weights.stride, group_,
                                    s_.code_sums.data());
    }
    select_simd::AddWeightedHalfRows(s_.rows.data(), rows, head_dim_, s_.row_weights.Row(0),
                                     s_.row_weights.stride, group_, s_.row_sums.data());
    const float* value_balance = Channels(input_) + 2 * head_dim_;
    for (int64_t i = 0; i < group_ * head_dim_; ++i) {
      selection_.state_output[i] =
          (s_.code_sums[i] / value_balance[i % head_dim_] + s_.row_sums[i]) *
          s_.head_inverse_sum[i / head_dim_];
    }
  }

  const SelectParams& params_;
  const SelectInput& input_;
  const int64_t head_;
  const int64_t group_;
  const int64_t head_dim_;
  const int64_t clusters_;
  SelectScratch::Impl& s_;
  HeadSelection& selection_;
};

}  // namespace

absl::Status Select(const SelectParams& params, const SelectInput& input, SelectScratch& scratch,
                    HeadSelection* selection) {
  CKV_RETURN_IF_ERROR(ValidateSelect(params, input));
  return Selector(params, input, scratch.impl(), selection).Run();
}

}  // namespace clusterkv::kernels
