#include "worker/ckv/full_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/attention/attention.h"
#include "worker/ckv/synthetic.h"

namespace clusterkv::worker::ckv {
namespace {

std::vector<float> Floats(const TraceLayer& layer) {
  std::vector<float> rows(layer.queries * layer.shape.query_heads * layer.shape.head_dim);
  kernels::ToFloat(layer.q.data(), layer.shape.element_type, static_cast<int64_t>(rows.size()),
                   rows.data());
  return rows;
}

// Query i over its tokens by the kernels' plain reference.
void ReferenceOf(const TraceLayer& layer, const std::vector<float>& queries, int64_t i,
                 int64_t kv_head, std::vector<float>* output, std::vector<float>* lse) {
  const kernels::KvShape& shape = layer.shape;
  const int64_t row_bytes = shape.head_dim * kernels::ElementBytes(shape.element_type);
  const kernels::RawRun run{layer.keys.data() + kv_head * row_bytes,
                            layer.values.data() + kv_head * row_bytes, shape.kv_heads * row_bytes,
                            shape.kv_heads * row_bytes, layer.tokens - layer.queries + i + 1};
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.head_dim)));
  output->assign(shape.group() * shape.head_dim, 0);
  lse->assign(shape.group(), 0);
  const int64_t at = (i * shape.query_heads + kv_head * shape.group()) * shape.head_dim;
  ASSERT_TRUE(kernels::SparseAttentionReference(
                  {shape.group(), shape.head_dim, shape.element_type, scale},
                  absl::MakeConstSpan(queries).subspan(at, shape.group() * shape.head_dim),
                  absl::MakeConstSpan(&run, 1), {}, {}, absl::MakeSpan(*output),
                  absl::MakeSpan(*lse))
                  .ok());
}

struct Case {
  int64_t kv_heads, query_heads, head_dim, tokens, queries;
  kernels::ElementType type;
};

class FullAttentionTest : public ::testing::TestWithParam<Case> {};

TEST_P(FullAttentionTest, EqualsTheKernelsReference) {
  const Case& c = GetParam();
  const TraceLayer layer =
      MakeSyntheticLayer({c.kv_heads, c.query_heads, c.head_dim, c.type}, c.tokens, c.queries, 7);
  const std::vector<float> queries = Floats(layer);
  const FloatKv kv = MakeFloatKv(layer.shape, c.tokens, layer.keys, layer.values);
  const FullAttention full = ComputeFullAttention(kv, queries, c.tokens - c.queries, 2);
  const kernels::KvShape& shape = layer.shape;
  for (int64_t i = 0; i < c.queries; ++i) {
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      std::vector<float> output, lse;
      ReferenceOf(layer, queries, i, h, &output, &lse);
      const int64_t head = i * shape.query_heads + h * shape.group();
      for (int64_t k = 0; k < shape.group() * shape.head_dim; ++k) {
        const float got = full.output[head * shape.head_dim + k];
        ASSERT_FALSE(!(std::fabs(got - output[k]) <= 2e-5f)) << i << " " << h << " " << k;
      }
      for (int64_t g = 0; g < shape.group(); ++g) {
        ASSERT_FALSE(!(std::fabs(full.lse[head + g] - lse[g]) <= 2e-5f)) << i << " " << h;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, FullAttentionTest,
    ::testing::Values(Case{1, 1, 16, 1, 1, kernels::ElementType::kFloat32},
                      Case{1, 5, 16, 63, 7, kernels::ElementType::kFloat32},
                      Case{2, 4, 64, 64, 3, kernels::ElementType::kBFloat16},
                      Case{2, 8, 128, 131, 17, kernels::ElementType::kBFloat16},
                      Case{3, 3, 48, 129, 33, kernels::ElementType::kFloat16},
                      Case{1, 7, 80, 257, 19, kernels::ElementType::kFloat32}));

TEST(FullAttentionTest, TheBitsDoNotDependOnTheThreads) {
  const TraceLayer layer =
      MakeSyntheticLayer({2, 8, 64, kernels::ElementType::kBFloat16}, 300, 37, 11);
  const std::vector<float> queries = Floats(layer);
  const FloatKv kv = MakeFloatKv(layer.shape, layer.tokens, layer.keys, layer.values);
  const FullAttention one = ComputeFullAttention(kv, queries, 263, 1);
  const FullAttention three = ComputeFullAttention(kv, queries, 263, 3);
  EXPECT_EQ(std::memcmp(one.output.data(), three.output.data(), one.output.size() * sizeof(float)),
            0);
}

TEST(FullAttentionTest, HugeLogitsStayFinite) {
  const kernels::KvShape shape{1, 1, 16, kernels::ElementType::kFloat32};
  std::vector<float> numbers(100 * 16);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = i % 32 < 16 ? 300.0f : -300.0f;
  const auto bytes = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(numbers.data()),
                                         numbers.size() * sizeof(float));
  const FloatKv kv = MakeFloatKv(shape, 100, bytes, bytes);
  const std::vector<float> query(16, 300.0f);
  const FullAttention full = ComputeFullAttention(kv, query, 99, 1);
  for (const float value : full.output) EXPECT_FALSE(!(std::fabs(value - 300.0f) <= 1e-3f));
}

TEST(FullAttentionTest, WeightsOfAllTokensAddUpToOne) {
  const TraceLayer layer =
      MakeSyntheticLayer({2, 6, 64, kernels::ElementType::kFloat16}, 211, 5, 13);
  const std::vector<float> queries = Floats(layer);
  const FloatKv kv = MakeFloatKv(layer.shape, layer.tokens, layer.keys, layer.values);
  const FullAttention full = ComputeFullAttention(kv, queries, 206, 1);
  for (int64_t i = 0; i < 5; ++i) {
    std::vector<int32_t> all(206 + i + 1);
    std::iota(all.begin(), all.end(), 0);
    for (int64_t q = 0; q < 6; ++q) {
      const double weight =
          AttentionWeight(kv, q / 3, queries.data() + (i * 6 + q) * 64, full.lse[i * 6 + q], all);
      EXPECT_FALSE(!(std::fabs(weight - 1) <= 1e-4)) << i << " " << q;
    }
  }
}

TEST(SyntheticTest, TheSameSeedGivesTheSameBytesAndAnotherSeedOthers) {
  const kernels::KvShape shape{2, 4, 32, kernels::ElementType::kBFloat16};
  const TraceLayer a = MakeSyntheticLayer(shape, 97, 3, 5);
  const TraceLayer b = MakeSyntheticLayer(shape, 97, 3, 5);
  const TraceLayer c = MakeSyntheticLayer(shape, 97, 3, 6);
  EXPECT_EQ(a.keys, b.keys);
  EXPECT_EQ(a.values, b.values);
  EXPECT_EQ(a.q, b.q);
  EXPECT_NE(a.keys, c.keys);
  EXPECT_EQ(a.query_rms.size(), 2u * 32u);
}

TEST(SyntheticTest, QueriesLookAtFewTokens) {
  // A tenth of the tokens holds most of the weight: there is something to select.
  const TraceLayer layer =
      MakeSyntheticLayer({1, 2, 64, kernels::ElementType::kBFloat16}, 1024, 16, 3);
  const std::vector<float> queries = Floats(layer);
  const FloatKv kv = MakeFloatKv(layer.shape, layer.tokens, layer.keys, layer.values);
  const FullAttention full = ComputeFullAttention(kv, queries, 1008, 1);
  double top = 0;
  for (int64_t i = 0; i < 16; ++i) {
    std::vector<double> weights;
    for (int32_t t = 0; t <= 1008 + i; ++t) {
      weights.push_back(AttentionWeight(kv, 0, queries.data() + i * 128, full.lse[i * 2], {&t, 1}));
    }
    std::sort(weights.rbegin(), weights.rend());
    top += std::accumulate(weights.begin(), weights.begin() + 102, 0.0) / 16;
  }
  EXPECT_GT(top, 0.8);
}

}  // namespace
}  // namespace clusterkv::worker::ckv
