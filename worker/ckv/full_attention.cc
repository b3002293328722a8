#include "worker/ckv/full_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/ckv/full_attention.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::worker::ckv::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int64_t kTile = 64;  // tokens whose logits are made at once
constexpr int64_t kRows = 4;   // query rows per register block

// logits[r * kTile + t] = scale * rows[r] · keys[t] for 4 rows and `tokens` <= kTile tokens.
void TileLogits(const float* rows, const float* keys, int64_t tokens, int64_t head_dim, float scale,
                float* logits) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t t = 0; t < tokens; t += 2) {
    const float* k0 = keys + t * head_dim;
    const float* k1 = t + 1 < tokens ? k0 + head_dim : k0;
    auto a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (int64_t j = 0; j < head_dim; j += lanes) {
      const auto x0 = hn::LoadU(d, k0 + j), x1 = hn::LoadU(d, k1 + j);
      const auto q0 = hn::LoadU(d, rows + j), q1 = hn::LoadU(d, rows + head_dim + j);
      const auto q2 = hn::LoadU(d, rows + 2 * head_dim + j);
      const auto q3 = hn::LoadU(d, rows + 3 * head_dim + j);
      a0 = hn::MulAdd(q0, x0, a0);
      a1 = hn::MulAdd(q1, x0, a1);
      a2 = hn::MulAdd(q2, x0, a2);
      a3 = hn::MulAdd(q3, x0, a3);
      b0 = hn::MulAdd(q0, x1, b0);
      b1 = hn::MulAdd(q1, x1, b1);
      b2 = hn::MulAdd(q2, x1, b2);
      b3 = hn::MulAdd(q3, x1, b3);
    }
    logits[t] = scale * hn::GetLane(hn::SumOfLanes(d, a0));
    logits[kTile + t] = scale * hn::GetLane(hn::SumOfLanes(d, a1));
    logits[2 * kTile + t] = scale * hn::GetLane(hn::SumOfLanes(d, a2));
    logits[3 * kTile + t] = scale * hn::GetLane(hn::SumOfLanes(d, a3));
    if (t + 1 == tokens) break;
    logits[t + 1] = scale * hn::GetLane(hn::SumOfLanes(d, b0));
    logits[kTile + t + 1] = scale * hn::GetLane(hn::SumOfLanes(d, b1));
    logits[2 * kTile + t + 1] = scale * hn::GetLane(hn::SumOfLanes(d, b2));
    logits[3 * kTile + t + 1] = scale * hn::GetLane(hn::SumOfLanes(d, b3));
  }
}

// Online softmax of one row's tile of `live` logits: they become weights relative to the new
// maximum, and 0 behind `live`. Answers the factor by which what the row has so far shrinks.
float TileSoftmax(float* logits, int64_t live, float* row_max, double* row_sum) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = hn::Lanes(d);
  float tile_max = *row_max;
  for (int64_t t = 0; t < live; ++t) tile_max = std::max(tile_max, logits[t]);
  for (int64_t t = live; t < kTile; ++t) logits[t] = -std::numeric_limits<float>::infinity();
  if (live <= 0) {
    std::fill_n(logits, kTile, 0.0f);
    return 1;
  }
  const float shrink = std::exp(*row_max - tile_max);
  auto sum = hn::Zero(d);
  for (int64_t t = 0; t < kTile; t += lanes) {
    // Exp flushes what is far below to 0, minus infinity too.
    const auto x =
        hn::Max(hn::Sub(hn::LoadU(d, logits + t), hn::Set(d, tile_max)), hn::Set(d, -200.0f));
    const auto weight = hn::Exp(d, x);
    hn::StoreU(weight, d, logits + t);
    sum = hn::Add(sum, weight);
  }
  *row_sum = *row_sum * shrink + hn::GetLane(hn::SumOfLanes(d, sum));
  *row_max = tile_max;
  return shrink;
}

// out[r] = shrink[r] * out[r] + sum over t of weights[r * kTile + t] * values[t], for 4 rows.
void TileValues(const float* weights, const float* values, int64_t tokens, int64_t head_dim,
                const float* shrink, float* out) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t j = 0; j < head_dim; j += lanes) {
    const auto load = [&](int64_t r) {
      return hn::Mul(hn::Set(d, shrink[r]), hn::LoadU(d, out + r * head_dim + j));
    };
    auto o0 = load(0), o1 = load(1), o2 = load(2), o3 = load(3);
    for (int64_t t = 0; t < tokens; ++t) {
      const auto v = hn::LoadU(d, values + t * head_dim + j);
      o0 = hn::MulAdd(hn::Set(d, weights[t]), v, o0);
      o1 = hn::MulAdd(hn::Set(d, weights[kTile + t]), v, o1);
      o2 = hn::MulAdd(hn::Set(d, weights[2 * kTile + t]), v, o2);
      o3 = hn::MulAdd(hn::Set(d, weights[3 * kTile + t]), v, o3);
    }
    hn::StoreU(o0, d, out + j);
    hn::StoreU(o1, d, out + head_dim + j);
    hn::StoreU(o2, d, out + 2 * head_dim + j);
    hn::StoreU(o3, d, out + 3 * head_dim + j);
  }
}

// Full attention of `count` rows [count rounded up to 4, head_dim] of one KV head; row r attends to
// the first limits[r] tokens. output like rows, lse [count rounded up to 4].
void AttendRows(const float* keys, const float* values, const float* rows, const int64_t* limits,
                int64_t count, int64_t head_dim, float scale, float* output, float* lse) {
  HWY_ALIGN float weights[kRows * kTile];
  for (int64_t first = 0; first < count; first += kRows) {
    float row_max[kRows], shrink[kRows];
    double row_sum[kRows] = {};
    std::fill_n(row_max, kRows, -std::numeric_limits<float>::infinity());
    float* out = output + first * head_dim;
    std::fill_n(out, kRows * head_dim, 0.0f);
    const int64_t longest = *std::max_element(limits + first, limits + first + kRows);
    for (int64_t begin = 0; begin < longest; begin += kTile) {
      const int64_t tokens = std::min(kTile, longest - begin);
      TileLogits(rows + first * head_dim, keys + begin * head_dim, tokens, head_dim, scale,
                 weights);
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t live = std::clamp<int64_t>(limits[first + r] - begin, 0, tokens);
        shrink[r] = TileSoftmax(weights + r * kTile, live, row_max + r, row_sum + r);
      }
      TileValues(weights, values + begin * head_dim, tokens, head_dim, shrink, out);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const float inverse = row_sum[r] > 0 ? static_cast<float>(1 / row_sum[r]) : 0.0f;
      for (int64_t j = 0; j < head_dim; ++j) out[r * head_dim + j] *= inverse;
      lse[first + r] = row_max[r] + static_cast<float>(std::log(row_sum[r]));
    }
  }
}

double WeightOfTokens(const float* keys, const float* query, const int32_t* positions,
                      int64_t count, int64_t head_dim, float scale, float lse) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = hn::Lanes(d);
  double weight = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* key = keys + positions[i] * head_dim;
    auto sum = hn::Zero(d);
    for (int64_t j = 0; j < head_dim; j += lanes) {
      sum = hn::MulAdd(hn::LoadU(d, query + j), hn::LoadU(d, key + j), sum);
    }
    weight += std::exp(scale * hn::GetLane(hn::SumOfLanes(d, sum)) - lse);
  }
  return weight;
}

}  // namespace clusterkv::worker::ckv::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <atomic>
#include <thread>

#include "kernels/base/check.h"

namespace clusterkv::worker::ckv {
namespace {

HWY_EXPORT(AttendRows);
HWY_EXPORT(WeightOfTokens);

// Steps that share one pass over a head's keys: their rows stay in the first-level cache.
constexpr int64_t kBlockSteps = 16;

float ScaleOf(const kernels::KvShape& shape) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
}

// One unit of work: the block's queries of one KV head, gathered to rows and scattered back.
void AttendBlock(const FloatKv& kv, absl::Span<const float> queries, int64_t first_position,
                 int64_t kv_head, int64_t begin, int64_t end, FullAttention* result) {
  const int64_t group = kv.shape.group(), dim = kv.shape.head_dim;
  const int64_t count = (end - begin) * group;
  const int64_t padded = (count + 3) / 4 * 4;
  std::vector<float> rows(padded * dim), output(padded * dim), lse(padded);
  std::vector<int64_t> limits(padded, 0);
  const auto row_of = [&](int64_t r) {
    return (begin + r / group) * kv.shape.query_heads + kv_head * group + r % group;
  };
  for (int64_t r = 0; r < count; ++r) {
    std::copy_n(queries.data() + row_of(r) * dim, dim, rows.data() + r * dim);
    limits[r] = first_position + begin + r / group + 1;
  }
  HWY_DYNAMIC_DISPATCH(AttendRows)
  (kv.Key(kv_head, 0), kv.values.data() + kv_head * kv.tokens * dim, rows.data(), limits.data(),
   count, dim, ScaleOf(kv.shape), output.data(), lse.data());
  for (int64_t r = 0; r < count; ++r) {
    std::copy_n(output.data() + r * dim, dim, result->output.data() + row_of(r) * dim);
    result->lse[row_of(r)] = lse[r];
  }
}

}  // namespace

FloatKv MakeFloatKv(const kernels::KvShape& shape, int64_t tokens, absl::Span<const std::byte> keys,
                    absl::Span<const std::byte> values) {
  const int64_t dim = shape.head_dim;
  const int64_t row_bytes = dim * kernels::ElementBytes(shape.element_type);
  const int64_t rows = tokens * shape.kv_heads;
  CKV_CHECK(static_cast<int64_t>(keys.size()) == rows * row_bytes && keys.size() == values.size())
      << "keys and values must be [" << tokens << ", " << shape.kv_heads << ", " << dim << "]";
  FloatKv kv{shape, tokens, std::vector<float>(rows * dim), std::vector<float>(rows * dim)};
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      const int64_t from = (t * shape.kv_heads + h) * row_bytes;
      const int64_t to = (h * tokens + t) * dim;
      kernels::ToFloat(keys.data() + from, shape.element_type, dim, kv.keys.data() + to);
      kernels::ToFloat(values.data() + from, shape.element_type, dim, kv.values.data() + to);
    }
  }
  return kv;
}

FullAttention ComputeFullAttention(const FloatKv& kv, absl::Span<const float> queries,
                                   int64_t first_position, int threads) {
  const kernels::KvShape& shape = kv.shape;
  const int64_t row = shape.query_heads * shape.head_dim;
  const int64_t steps = static_cast<int64_t>(queries.size()) / row;
  CKV_CHECK(first_position >= 0 && first_position + steps <= kv.tokens)
      << steps << " queries from token " << first_position << " of " << kv.tokens;
  FullAttention result{std::vector<float>(steps * row),
                       std::vector<float>(steps * shape.query_heads)};
  const int64_t blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t unit; (unit = next.fetch_add(1)) < blocks * shape.kv_heads;) {
      const int64_t begin = unit / shape.kv_heads * kBlockSteps;
      AttendBlock(kv, queries, first_position, unit % shape.kv_heads, begin,
                  std::min(begin + kBlockSteps, steps), &result);
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  return result;
}

double AttentionWeight(const FloatKv& kv, int64_t kv_head, const float* query, float lse,
                       absl::Span<const int32_t> positions) {
  return HWY_DYNAMIC_DISPATCH(WeightOfTokens)(kv.Key(kv_head, 0), query, positions.data(),
                                              static_cast<int64_t>(positions.size()),
                                              kv.shape.head_dim, ScaleOf(kv.shape), lse);
}

}  // namespace clusterkv::worker::ckv
#endif  // HWY_ONCE
