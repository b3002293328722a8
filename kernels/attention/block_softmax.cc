#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/block_softmax.cc"
#include "kernels/attention/block_softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/aligned_allocator.h"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

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

constexpr float kNothing = -std::numeric_limits<float>::infinity();

}  // namespace

BlockSoftmax::BlockSoftmax(const AttentionParams& params, const float* queries, float* sums)
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
  std::fill(overflowed_, overflowed_ + params.group, false);
}

void BlockSoftmax::Finish(float* lse) {
  Flush();
  for (int64_t g = 0; g < params_.group; ++g) {
    lse[g] = kNothing;
    if (!(totals_[g] > 0)) continue;
    lse[g] = highest_[g] + std::log(totals_[g]);
    const float factor = 1.0f / totals_[g];
    float* sum = sums_ + g * params_.head_dim;
    for (int64_t j = 0; j < params_.head_dim; ++j) sum[j] *= factor;
  }
}

void BlockSoftmax::Flush() {
  if (tokens_ == 0) return;
  for (int64_t t = 0; t < tokens_; ++t) {
    HWY_DYNAMIC_DISPATCH(Dots)
    (queries_, params_.group, params_.head_dim, keys_ + t * params_.head_dim, params_.scale,
     logits_ + t, kBlockTokens);
  }
  for (int64_t g = 0; g < params_.group; ++g) FlushHead(g, logits_ + g * kBlockTokens);
  tokens_ = 0;
}

void BlockSoftmax::FlushHead(int64_t g, float* logits) {
  float highest = highest_[g];
  for (int64_t t = 0; t < tokens_; ++t) {
    if ((masks_[t] >> g & 1) == 0) logits[t] = kNothing;
    overflowed_[g] |= !(logits[t] < -kNothing);
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

}  // namespace clusterkv::kernels

#endif  // HWY_ONCE
