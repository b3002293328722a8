#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/attention/attention_validate.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {
namespace {

struct Token {
  std::vector<float> key, value;
  uint32_t heads = ~uint32_t{0};
};

std::vector<Token> CollectTokens(const AttentionParams& params, absl::Span<const RawRun> raw,
                                 const RecordRun& records) {
  std::vector<Token> tokens;
  const int64_t element_bytes = ElementBytes(params.element_type);
  for (const RawRun& run : raw) {
    for (int64_t i = 0; i < run.tokens; ++i) {
      Token token;
      for (int64_t j = 0; j < params.head_dim; ++j) {
        token.key.push_back(LoadElement(run.keys + i * run.key_stride_bytes + j * element_bytes,
                                        params.element_type));
        token.value.push_back(LoadElement(
            run.values + i * run.value_stride_bytes + j * element_bytes, params.element_type));
      }
      tokens.push_back(std::move(token));
    }
  }
  for (size_t i = 0; i < records.slots.size(); ++i) {
    Token token;
    token.key.resize(params.head_dim);
    token.value.resize(params.head_dim);
    const int64_t record_bytes = records.codec->RecordBytes(params.element_type, params.head_dim);
    records.codec->Decode(records.slot_base + records.slots[i] * record_bytes, params.element_type,
                          params.head_dim, token.key.data(), token.value.data());
    if (!records.head_masks.empty()) token.heads = records.head_masks[i];
    tokens.push_back(std::move(token));
  }
  return tokens;
}

}  // namespace

absl::Status SparseAttentionReference(const AttentionParams& params,
                                      absl::Span<const float> queries, absl::Span<const RawRun> raw,
                                      const RecordRun& records, const AttentionState& state,
                                      absl::Span<float> output, absl::Span<float> lse) {
  CKV_RETURN_IF_ERROR(ValidateSparseAttention(params, queries, raw, records, state, output, lse));
  const std::vector<Token> tokens = CollectTokens(params, raw, records);
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  for (int64_t g = 0; g < params.group; ++g) {
    const float* query = queries.data() + g * params.head_dim;
    std::vector<double> logits;
    double highest = state.lse.empty() ? kNothing : state.lse[g];
    for (const Token& token : tokens) {
      double dot = 0;
      for (int64_t j = 0; j < params.head_dim; ++j) dot += double{query[j]} * token.key[j];
      logits.push_back((token.heads >> g & 1) != 0 ? dot * params.scale : kNothing);
      highest = std::max(highest, logits.back());
    }
    std::vector<double> sum(params.head_dim, 0);
    double total = 0;
    const auto add = [&](double logit, const float* value) {
      if (logit == kNothing) return;
      const double weight = std::exp(logit - highest);
      total += weight;
      for (int64_t j = 0; j < params.head_dim; ++j) sum[j] += weight * value[j];
    };
    for (size_t t = 0; t < tokens.size(); ++t) add(logits[t], tokens[t].value.data());
    if (!state.lse.empty()) add(state.lse[g], state.output.data() + g * params.head_dim);
    for (int64_t j = 0; j < params.head_dim; ++j) {
      output[g * params.head_dim + j] = total > 0 ? static_cast<float>(sum[j] / total) : 0.0f;
    }
    if (!lse.empty()) {
      lse[g] = total > 0 ? static_cast<float>(highest + std::log(total))
                         : -std::numeric_limits<float>::infinity();
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
