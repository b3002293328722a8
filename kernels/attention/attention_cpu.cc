// Blocks of tokens are decoded to float once and serve all query heads of the group; softmax is
// online: one pass over the tokens, running maximum and sum per query head.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/attention_cpu.cc"
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "hwy/aligned_allocator.h"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_validate.h"
#include "kernels/base/status_macros.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// head_dim is a multiple of 16, so that whole vectors of at most 16 lanes cover it.
using Floats = HWY_CAPPED(float, 16);

// logits[g * stride] = scale * (queries[g] · key) for all g. Four query heads at a time share the
// loads of the key.
void Dots(const float* HWY_RESTRICT queries, int64_t group, int64_t head_dim,
          const float* HWY_RESTRICT key, float scale, float* HWY_RESTRICT logits, int64_t stride) {
  const Floats d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t g = 0;
  for (; g + 4 <= group; g += 4) {
    const float* q = queries + g * head_dim;
    auto sum0 = hn::Zero(d), sum1 = hn::Zero(d), sum2 = hn::Zero(d), sum3 = hn::Zero(d);
    for (int64_t j = 0; j < head_dim; j += lanes) {
      const auto k = hn::LoadU(d, key + j);
      sum0 = hn::MulAdd(k, hn::LoadU(d, q + j), sum0);
      sum1 = hn::MulAdd(k, hn::LoadU(d, q + head_dim + j), sum1);
      sum2 = hn::MulAdd(k, hn::LoadU(d, q + 2 * head_dim + j), sum2);
      sum3 = hn::MulAdd(k, hn::LoadU(d, q + 3 * head_dim + j), sum3);
    }
    logits[g * stride] = scale * hn::GetLane(hn::SumOfLanes(d, sum0));
    logits[(g + 1) * stride] = scale * hn::GetLane(hn::SumOfLanes(d, sum1));
    logits[(g + 2) * stride] = scale * hn::GetLane(hn::SumOfLanes(d, sum2));
    logits[(g + 3) * stride] = scale * hn::GetLane(hn::SumOfLanes(d, sum3));
  }
  for (; g < group; ++g) {
    auto sum = hn::Zero(d);
    for (int64_t j = 0; j < head_dim; j += lanes) {
      sum = hn::MulAdd(hn::LoadU(d, key + j), hn::LoadU(d, queries + g * head_dim + j), sum);
    }
    logits[g * stride] = scale * hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

// sum[j] = factor * sum[j] + Σ_t weights[t] * values[t, j], the weights in order of t.
void Accumulate(const float* HWY_RESTRICT values, const float* HWY_RESTRICT weights, int64_t tokens,
                int64_t head_dim, float factor, float* HWY_RESTRICT sum) {
  const Floats d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  int64_t j = 0;
  for (; j + 4 * lanes <= head_dim; j += 4 * lanes) {
    auto sum0 = hn::Mul(f, hn::LoadU(d, sum + j));
    auto sum1 = hn::Mul(f, hn::LoadU(d, sum + j + lanes));
    auto sum2 = hn::Mul(f, hn::LoadU(d, sum + j + 2 * lanes));
    auto sum3 = hn::Mul(f, hn::LoadU(d, sum + j + 3 * lanes));
    for (int64_t t = 0; t < tokens; ++t) {
      const auto w = hn::Set(d, weights[t]);
      const float* v = values + t * head_dim + j;
      sum0 = hn::MulAdd(w, hn::LoadU(d, v), sum0);
      sum1 = hn::MulAdd(w, hn::LoadU(d, v + lanes), sum1);
      sum2 = hn::MulAdd(w, hn::LoadU(d, v + 2 * lanes), sum2);
      sum3 = hn::MulAdd(w, hn::LoadU(d, v + 3 * lanes), sum3);
    }
    hn::StoreU(sum0, d, sum + j);
    hn::StoreU(sum1, d, sum + j + lanes);
    hn::StoreU(sum2, d, sum + j + 2 * lanes);
    hn::StoreU(sum3, d, sum + j + 3 * lanes);
  }
  for (; j < head_dim; j += lanes) {
    auto total = hn::Mul(f, hn::LoadU(d, sum + j));
    for (int64_t t = 0; t < tokens; ++t) {
      total = hn::MulAdd(hn::Set(d, weights[t]), hn::LoadU(d, values + t * head_dim + j), total);
    }
    hn::StoreU(total, d, sum + j);
  }
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace clusterkv::kernels {
namespace {

HWY_EXPORT(Dots);
HWY_EXPORT(Accumulate);

constexpr int64_t kBlockTokens = 32;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Online softmax over blocks of tokens, all query heads of one KV head.
class BlockSoftmax {
 public:
  // Memory comes from the thread and is reused by the next call on it.
  BlockSoftmax(const AttentionParams& params, const float* queries, float* sums)
      : params_(params), queries_(queries), sums_(sums) {
    const size_t floats = 2 * kBlockTokens * params.head_dim + params.group * kBlockTokens;
    thread_local hwy::AlignedFreeUniquePtr<float[]> memory;
    thread_local size_t memory_floats = 0;
    if (memory_floats < floats) {
      memory = hwy::AllocateAligned<float>(floats);
      memory_floats = floats;
    }
    keys_ = memory.get();
    values_ = keys_ + kBlockTokens * params.head_dim;
    logits_ = values_ + kBlockTokens * params.head_dim;
    std::fill(sums, sums + params.group * params.head_dim, 0.0f);
    std::fill(highest_, highest_ + params.group, kNothing);
    std::fill(totals_, totals_ + params.group, 0.0f);
  }

  float* next_key() { return keys_ + tokens_ * params_.head_dim; }
  float* next_value() { return values_ + tokens_ * params_.head_dim; }
  // What was written to next_key and next_value is a token of these query heads.
  void Add(uint32_t heads) {
    masks_[tokens_] = heads;
    if (++tokens_ == kBlockTokens) Flush();
  }

  // Normalises the sums; lse_out [group].
  void Finish(float* lse_out) {
    Flush();
    for (int64_t g = 0; g < params_.group; ++g) {
      lse_out[g] = kNothing;
      if (!(totals_[g] > 0)) continue;
      lse_out[g] = highest_[g] + std::log(totals_[g]);
      const float factor = 1.0f / totals_[g];
      float* sum = sums_ + g * params_.head_dim;
      for (int64_t j = 0; j < params_.head_dim; ++j) sum[j] *= factor;
    }
  }

 private:
  void Flush() {
    if (tokens_ == 0) return;
    for (int64_t t = 0; t < tokens_; ++t) {
      HWY_DYNAMIC_DISPATCH(Dots)
      (queries_, params_.group, params_.head_dim, keys_ + t * params_.head_dim, params_.scale,
       logits_ + t, kBlockTokens);
    }
    for (int64_t g = 0; g < params_.group; ++g) FlushHead(g, logits_ + g * kBlockTokens);
    tokens_ = 0;
  }

  void FlushHead(int64_t g, float* logits) {
    float highest = highest_[g];
    for (int64_t t = 0; t < tokens_; ++t) {
      if ((masks_[t] >> g & 1) == 0) logits[t] = kNothing;
      highest = std::max(highest, logits[t]);
    }
    if (highest == kNothing) return;  // nothing yet: exp(-inf - -inf) would be NaN
    const float factor = std::exp(highest_[g] - highest);
    float total = factor * totals_[g];
    for (int64_t t = 0; t < tokens_; ++t) {
      logits[t] = std::exp(logits[t] - highest);
      total += logits[t];
    }
    HWY_DYNAMIC_DISPATCH(Accumulate)
    (values_, logits, tokens_, params_.head_dim, factor, sums_ + g * params_.head_dim);
    highest_[g] = highest;
    totals_[g] = total;
  }

  const AttentionParams& params_;
  const float* queries_;
  float* sums_;    // [group, head_dim], of exp(logit - highest) * value
  float* keys_;    // [kBlockTokens, head_dim]
  float* values_;  // [kBlockTokens, head_dim]
  float* logits_;  // [group, kBlockTokens]
  int64_t tokens_ = 0;
  uint32_t masks_[kBlockTokens];
  float highest_[kMaxAttentionGroup];
  float totals_[kMaxAttentionGroup];
};

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

#endif  // HWY_ONCE
