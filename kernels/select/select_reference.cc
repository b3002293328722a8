// The dullest Select: everything in double, full sorts, one token at a time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/select/select.h"
#include "kernels/select/select_common.h"

namespace clusterkv::kernels {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

struct Cluster {
  int32_t id = 0;  // counted over the parts
  int32_t part = 0;
  int64_t begin = 0, end = 0;     // head-local slots
  std::vector<double> logits;     // [group]: q_m · centroid * scale
  std::vector<float> value_mean;  // [head_dim]

  int64_t size() const { return end - begin; }
};

struct Token {
  const Cluster* cluster = nullptr;
  int64_t slot = 0;
  int32_t position = 0;
  std::vector<double> logits;  // [group], by codes
  uint32_t heads = 0;          // that attend to it exactly
};

double Dot(const std::vector<double>& a, const float* b) {
  double sum = 0;
  for (size_t j = 0; j < a.size(); ++j) sum += a[j] * b[j];
  return sum;
}

// log of sum of exp.
double LogSumExp(const std::vector<double>& x) {
  const double max = x.empty() ? kMinusInfinity : *std::max_element(x.begin(), x.end());
  if (max == kMinusInfinity) return max;
  double sum = 0;
  for (double v : x) sum += std::exp(v - max);
  return max + std::log(sum);
}

class Selector {
 public:
  Selector(const SelectParams& params, const SelectInput& input, HeadSelection* selection)
      : params_(params),
        input_(input),
        group_(input.shape.group()),
        head_dim_(input.shape.head_dim),
        selection_(*selection) {}

  absl::Status Run() {
    ClearSelection(input_, &selection_);
    if (input_.parts.empty()) return absl::OkStatus();
    CKV_RETURN_IF_ERROR(LoadClusters());
    if (params_.mode == SelectMode::kPerQueryHead) {
      SelectPerQueryHead();
      return absl::OkStatus();
    }
    const std::vector<const Cluster*> ranked = RankShared();
    std::vector<Token> tokens = Take(ranked, TakenTokens(params_, input_));
    for (const Token& token : tokens) {
      if (selection_.scored_clusters.empty() ||
          selection_.scored_clusters.back() != token.cluster->id) {
        selection_.scored_clusters.push_back(token.cluster->id);
      }
    }
    if (params_.scored_tokens > 0) CKV_RETURN_IF_ERROR(Score(&tokens));
    const int64_t exact = ChooseExact(&tokens);
    Emit({tokens.begin(), tokens.begin() + exact});
    std::vector<const Cluster*> rest(ranked.begin() + selection_.scored_clusters.size(),
                                     ranked.end());
    const int64_t estimated = EstimatedClusters(params_, TotalClusters(input_));
    rest.resize(std::min<int64_t>(estimated, rest.size()));
    tokens.erase(tokens.begin(), tokens.begin() + exact);
    if (!params_.answer_scored) tokens.clear();
    FillState(tokens, rest);
    return absl::OkStatus();
  }

 private:
  // Element `row`, [head_dim] half.
  std::vector<float> Row(const PagedView& halves, int64_t row) const {
    std::vector<float> floats;
    for (int64_t j = 0; j < head_dim_; ++j) {
      floats.push_back(HalfToFloat(halves.As<uint16_t>(row)[j]));
    }
    return floats;
  }

  absl::Status LoadClusters() {
    const float* weight = Channels(input_);
    queries_.assign(group_, std::vector<double>(head_dim_));
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t j = 0; j < head_dim_; ++j) {
        queries_[g][j] = static_cast<double>(input_.queries[g * head_dim_ + j]) / weight[j];
      }
    }
    for (size_t p = 0; p < input_.parts.size(); ++p) {
      const IndexPartView& part = input_.parts[p];
      for (int64_t c = 0; c < part.clusters; ++c) {
        const int64_t row = input_.kv_head * part.clusters + c;
        const int64_t begin_row = input_.kv_head * (part.clusters + 1) + c;
        Cluster cluster;
        cluster.id = static_cast<int32_t>(clusters_.size());
        cluster.part = static_cast<int32_t>(p);
        cluster.begin = *part.cluster_begin.As<int32_t>(begin_row);
        cluster.end = *part.cluster_begin.As<int32_t>(begin_row + 1);
        const std::vector<float> centroid = Row(part.centroids, row);
        cluster.value_mean = Row(part.value_means, row);
        for (int64_t g = 0; g < group_; ++g) {
          cluster.logits.push_back(Dot(queries_[g], centroid.data()) * input_.scale);
          CKV_RETURN_IF_ERROR(CheckLogit(g, cluster.logits.back()));
        }
        clusters_.push_back(std::move(cluster));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckLogit(int64_t g, double logit) const {
    if (std::abs(logit) <= std::numeric_limits<float>::max()) return absl::OkStatus();
    return LogitsOverflow(input_.kv_head * group_ + g);
  }

  // Clusters with tokens, by descending key; ties keep the lower cluster first.
  template <typename Key>
  std::vector<const Cluster*> Rank(Key key) const {
    std::vector<std::pair<double, const Cluster*>> keyed;
    for (const Cluster& cluster : clusters_) {
      if (cluster.size() > 0) keyed.emplace_back(key(cluster), &cluster);
    }
    std::stable_sort(keyed.begin(), keyed.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<const Cluster*> ranked;
    ranked.reserve(keyed.size());
    for (const auto& [unused, cluster] : keyed) ranked.push_back(cluster);
    return ranked;
  }

  // By the sum over the group of the softmax over clusters; its logarithm has the same order and
  // does not underflow.
  std::vector<const Cluster*> RankShared() const {
    std::vector<double> lse(group_);
    for (int64_t g = 0; g < group_; ++g) {
      std::vector<double> logits;
      for (const Cluster& cluster : clusters_) {
        if (cluster.size() > 0) logits.push_back(cluster.logits[g]);
      }
      lse[g] = LogSumExp(logits);
    }
    return Rank([&](const Cluster& cluster) {
      std::vector<double> log_weights(group_);
      for (int64_t g = 0; g < group_; ++g) log_weights[g] = cluster.logits[g] - lse[g];
      return LogSumExp(log_weights);
    });
  }

  // The first `count` tokens of the ranking; of the last cluster the lowest positions.
  std::vector<Token> Take(const std::vector<const Cluster*>& ranked, int64_t count) const {
    std::vector<Token> tokens;
    for (const Cluster* cluster : ranked) {
      const IndexPartView& part = input_.parts[cluster->part];
      for (int64_t slot = cluster->begin; slot < cluster->end; ++slot) {
        if (static_cast<int64_t>(tokens.size()) == count) return tokens;
        Token token;
        token.cluster = cluster;
        token.slot = slot;
        token.position = *part.positions.As<int32_t>(input_.kv_head * part.tokens + slot);
        tokens.push_back(std::move(token));
      }
    }
    return tokens;
  }

  void SelectPerQueryHead() {
    std::vector<Token> all;
    for (int64_t g = 0; g < group_; ++g) {
      const auto ranked = Rank([&](const Cluster& cluster) { return cluster.logits[g]; });
      for (Token& token : Take(ranked, ExactTokens(params_, input_))) {
        token.heads = 1u << g;
        all.push_back(std::move(token));
      }
    }
    std::stable_sort(all.begin(), all.end(),
                     [](const Token& a, const Token& b) { return a.position < b.position; });
    std::vector<Token> merged;
    for (Token& token : all) {
      if (!merged.empty() && merged.back().position == token.position) {
        merged.back().heads |= token.heads;
      } else {
        merged.push_back(std::move(token));
      }
    }
    Emit(merged);
    for (const Token& token : merged) selection_.head_masks.push_back(token.heads);
  }

  const std::byte* CodesOf(const Token& token) const {
    const IndexPartView& part = input_.parts[token.cluster->part];
    return part.codes.At(input_.kv_head * part.tokens + token.slot);
  }

  absl::Status Score(std::vector<Token>* tokens) const {
    const float* channels = Channels(input_);
    std::vector<float> residual(head_dim_);
    for (Token& token : *tokens) {
      DecodeResiduals(input_.codes, head_dim_, CodesOf(token), channels + head_dim_,
                      channels + 2 * head_dim_, residual.data(), nullptr);
      for (int64_t g = 0; g < group_; ++g) {
        const double logit =
            token.cluster->logits[g] + Dot(queries_[g], residual.data()) * input_.scale;
        CKV_RETURN_IF_ERROR(CheckLogit(g, logit));
        token.logits.push_back(logit);
      }
    }
    return absl::OkStatus();
  }

  std::vector<double> SinkLogits(int64_t g) const {
    const int64_t element_bytes = ElementBytes(input_.shape.element_type);
    std::vector<double> logits(input_.sink_tokens, 0.0);
    for (int64_t t = 0; t < input_.sink_tokens; ++t) {
      const std::byte* key = input_.sink_keys + t * input_.sink_key_stride_bytes;
      for (int64_t j = 0; j < head_dim_; ++j) {
        logits[t] += static_cast<double>(input_.queries[g * head_dim_ + j]) *
                     LoadElement(key + j * element_bytes, input_.shape.element_type);
      }
      logits[t] *= input_.scale;
    }
    return logits;
  }

  // Puts the exact zone's tokens first and says how many they are.
  int64_t ChooseExact(std::vector<Token>* tokens) const {
    const int64_t count =
        std::min<int64_t>(ExactTokens(params_, input_), static_cast<int64_t>(tokens->size()));
    if (params_.scored_tokens == 0) return count;
    std::vector<double> lse(group_);
    for (int64_t g = 0; g < group_; ++g) {
      std::vector<double> logits = SinkLogits(g);
      for (const Token& token : *tokens) logits.push_back(token.logits[g]);
      lse[g] = LogSumExp(logits);
    }
    const auto key = [&](const Token& token) {
      std::vector<double> log_weights(group_);
      for (int64_t g = 0; g < group_; ++g) log_weights[g] = token.logits[g] - lse[g];
      return LogSumExp(log_weights);
    };
    std::vector<std::pair<double, size_t>> keyed;
    for (size_t i = 0; i < tokens->size(); ++i) keyed.emplace_back(key((*tokens)[i]), i);
    std::sort(keyed.begin(), keyed.end(), [&](const auto& a, const auto& b) {
      if (a.first != b.first) return a.first > b.first;
      return (*tokens)[a.second].position < (*tokens)[b.second].position;
    });
    std::vector<Token> sorted;
    sorted.reserve(keyed.size());
    for (const auto& [unused, i] : keyed) sorted.push_back((*tokens)[i]);
    *tokens = std::move(sorted);
    return count;
  }

  void Emit(std::vector<Token> tokens) {
    std::sort(tokens.begin(), tokens.end(),
              [](const Token& a, const Token& b) { return a.position < b.position; });
    for (const Token& token : tokens) {
      selection_.positions.push_back(token.position);
      selection_.parts.push_back(token.cluster->part);
      selection_.slots.push_back(static_cast<int32_t>(token.slot));
      selection_.clusters.push_back(token.cluster->id);
    }
  }

  void FillState(const std::vector<Token>& coded, const std::vector<const Cluster*>& estimated) {
    for (const Cluster* cluster : estimated) selection_.estimated_clusters.push_back(cluster->id);
    selection_.coded_tokens = static_cast<int64_t>(coded.size());
    if (coded.empty() && estimated.empty()) return;
    std::vector<float> values;  // of the coded tokens, then of the clusters, [head_dim] each
    const float* channels = Channels(input_);
    std::vector<float> residual(head_dim_);
    for (const Token& token : coded) {
      DecodeResiduals(input_.codes, head_dim_, CodesOf(token), channels + head_dim_,
                      channels + 2 * head_dim_, nullptr, residual.data());
      for (int64_t j = 0; j < head_dim_; ++j) {
        values.push_back(token.cluster->value_mean[j] + residual[j]);
      }
    }
    for (const Cluster* cluster : estimated) {
      values.insert(values.end(), cluster->value_mean.begin(), cluster->value_mean.end());
    }
    for (int64_t g = 0; g < group_; ++g) {
      std::vector<double> logits;
      logits.reserve(coded.size() + estimated.size());
      for (const Token& token : coded) logits.push_back(token.logits[g]);
      for (const Cluster* cluster : estimated) {
        logits.push_back(cluster->logits[g] + std::log(static_cast<double>(cluster->size())));
      }
      const double lse = LogSumExp(logits);
      std::vector<double> output(head_dim_, 0.0);
      for (size_t i = 0; i < logits.size(); ++i) {
        const double share = std::exp(logits[i] - lse);
        for (int64_t j = 0; j < head_dim_; ++j) output[j] += share * values[i * head_dim_ + j];
      }
      for (int64_t j = 0; j < head_dim_; ++j) {
        selection_.state_output[g * head_dim_ + j] = static_cast<float>(output[j]);
      }
      selection_.state_lse[g] = static_cast<float>(lse);
    }
  }

  const SelectParams& params_;
  const SelectInput& input_;
  const int64_t group_;
  const int64_t head_dim_;
  HeadSelection& selection_;
  std::vector<std::vector<double>> queries_;  // [group][head_dim], divided by the metric weight
  std::vector<Cluster> clusters_;
};

}  // namespace

absl::Status SelectReference(const SelectParams& params, const SelectInput& input,
                             HeadSelection* selection) {
  CKV_RETURN_IF_ERROR(ValidateSelect(params, input));
  return Selector(params, input, selection).Run();
}

}  // namespace clusterkv::kernels
