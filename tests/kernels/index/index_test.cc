#include "kernels/index/index.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/thread_pool.h"
#include "tests/kernels/index/built_part.h"
#include "tests/test_seed.h"

namespace clusterkv::kernels {
namespace {

using ::testing::HasSubstr;

uint32_t Seed() {
  static const auto seed = static_cast<uint32_t>(TestSeed(20241105));
  return seed;
}

// Keys near `directions` axes that take turns, with an offset per channel, and values that follow
// them.
struct Data {
  std::vector<float> keys, values;  // [tokens, kv_heads, head_dim]
  std::vector<float> query_rms;     // [kv_heads, head_dim]
};

Data MakeData(const KvShape& shape, int64_t tokens, int64_t directions, float noise,
              uint32_t salt = 0, int64_t run = 1) {
  std::mt19937 random(Seed() + salt);
  std::normal_distribution<float> normal;
  Data data;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      const int64_t direction = (t / run * 7 + h) % directions;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        const bool on = d == direction % shape.head_dim;
        data.keys.push_back((on ? 4.0f : 0.0f) + noise * normal(random));
        data.values.push_back(static_cast<float>(direction % 5) - 2 + normal(random));
      }
    }
  }
  for (int64_t i = 0; i < shape.kv_heads * shape.head_dim; ++i) {
    data.query_rms.push_back(0.5f + 0.25f * static_cast<float>(i % 7));
  }
  return data;
}

struct Case {
  KvShape shape{
      .kv_heads = 2, .query_heads = 8, .head_dim = 32, .element_type = ElementType::kBFloat16};
  IndexParams params{
      .tokens_per_cluster = 8, .segment_tokens = 0, .codes = {.bits = 2, .group_channels = 16}};
  std::string codec = "raw";
  int64_t tokens = 200;
  int64_t first_token = 16;
  bool balanced = true;
  const PagedView* inherited = nullptr;
  int threads = 1;  // the caller's included
  int64_t page_bytes = 8192;
  uint32_t placement = 1;
  bool reference = false;
};

std::unique_ptr<TestPart> Build(const Case& c, const Data& data) {
  const RecordCodec& codec = *FindRecordCodec(c.codec);
  auto part = std::make_unique<TestPart>(c.shape, c.params, codec, c.first_token, c.tokens,
                                         c.page_bytes, Seed() + c.placement);
  const TestRows keys(c.shape, data.keys, 7, c.placement);
  const TestRows values(c.shape, data.values, 5, c.placement + 1);
  IndexInput input{.keys = keys.view(),
                   .values = values.view(),
                   .query_rms = {},
                   .inherited_channels = c.inherited};
  if (c.balanced) input.query_rms = data.query_rms;
  absl::Status status;
  if (c.reference) {
    status = BuildIndexPartReference(c.shape, c.params, codec, input, part->view());
  } else if (c.threads == 1) {
    status = BuildIndexPart(c.shape, c.params, codec, input, part->view(), SerialFor);
  } else {
    auto pool = ThreadPool::Create(c.threads - 1, "test").value();
    status = BuildIndexPart(
        c.shape, c.params, codec, input, part->view(),
        [&](int64_t count, absl::FunctionRef<void(int64_t)> task) { pool->For(count, task); });
  }
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(part->OnlyElementsWereWritten());
  return part;
}

// All arrays, or all but records and remainders.
void ExpectEqualParts(const TestPart& a, const TestPart& b, bool records = true) {
  const char* names[] = {"centroids", "value_means", "cluster_begin", "positions", "slots",
                         "codes",     "records",     "channels",      "remainders"};
  for (int i = 0; i < kIndexArrays; ++i) {
    if ((i == 6 || i == 8) && !records) continue;
    EXPECT_TRUE(Bytes(a.arrays()[i]) == Bytes(b.arrays()[i])) << names[i];
  }
}

std::vector<float> Rounded(const KvShape& shape, const std::vector<float>& rows) {
  std::vector<float> rounded(rows.size());
  std::byte element[4];
  for (size_t i = 0; i < rows.size(); ++i) {
    StoreElement(rows[i], element, shape.element_type);
    rounded[i] = LoadElement(element, shape.element_type);
  }
  return rounded;
}

// A mean as it is stored.
uint16_t HalfOf(double mean) { return FloatToHalfSaturated(static_cast<float>(mean)); }

// Everything that index.h promises of one head, recomputed from the labels that the part shows.
void ExpectHeadHolds(const Case& c, const Data& data, const IndexPartView& part, int64_t head) {
  const int64_t dim = c.shape.head_dim, row = c.shape.kv_heads * dim;
  const std::vector<float> keys = Rounded(c.shape, data.keys);
  const std::vector<float> values = Rounded(c.shape, data.values);
  const float* channels = part.channels.As<float>(head);
  const int64_t first = head * part.tokens;
  const auto begin = [&](int64_t cluster) {
    return *part.cluster_begin.As<int32_t>(head * (part.clusters + 1) + cluster);
  };
  ASSERT_EQ(begin(0), 0);
  ASSERT_EQ(begin(part.clusters), part.tokens);
  std::set<int32_t> seen;
  for (int64_t cluster = 0; cluster < part.clusters; ++cluster) {
    ASSERT_LE(begin(cluster), begin(cluster + 1));
    const int32_t size = begin(cluster + 1) - begin(cluster);
    std::vector<double> key_sum(dim, 0.0), value_sum(dim, 0.0);
    for (int32_t slot = begin(cluster); slot < begin(cluster + 1); ++slot) {
      const int32_t position = *part.positions.As<int32_t>(first + slot);
      const int64_t token = position - c.first_token;
      ASSERT_GE(token, 0);
      ASSERT_LT(token, part.tokens);
      ASSERT_TRUE(seen.insert(position).second);
      ASSERT_EQ(*part.slots.As<int32_t>(first + token), slot);
      if (slot > begin(cluster)) {
        ASSERT_GT(position, *part.positions.As<int32_t>(first + slot - 1));
      }
      for (int64_t d = 0; d < dim; ++d) {
        key_sum[d] += keys[token * row + head * dim + d] * channels[d];
        value_sum[d] += values[token * row + head * dim + d];
      }
    }
    for (int64_t d = 0; d < dim; ++d) {
      const uint16_t mean = part.value_means.As<uint16_t>(head * part.clusters + cluster)[d];
      ASSERT_EQ(mean, size > 0 ? HalfOf(value_sum[d] / size) : 0);
      if (size == 0) continue;
      ASSERT_EQ(part.centroids.As<uint16_t>(head * part.clusters + cluster)[d],
                HalfOf(key_sum[d] / size));
    }
  }
  ASSERT_EQ(static_cast<int64_t>(seen.size()), part.tokens);
}

// Records and remainders are what the codec makes of the token; codes decode to the residual,
// within half a step of the group's range as fp16 keeps it.
void ExpectTokensHold(const Case& c, const Data& data, const IndexPartView& part, int64_t head) {
  const int64_t dim = c.shape.head_dim, row = c.shape.kv_heads * dim;
  const int64_t element_bytes = ElementBytes(c.shape.element_type);
  const std::vector<float> keys = Rounded(c.shape, data.keys);
  const RecordCodec& codec = *FindRecordCodec(c.codec);
  const float* channels = part.channels.As<float>(head);
  std::vector<std::byte> key(dim * element_bytes), value(dim * element_bytes);
  std::vector<std::byte> record(codec.RecordBytes(c.shape.element_type, dim));
  std::vector<std::byte> remainder(codec.RemainderBytes(c.shape.element_type, dim));
  std::vector<float> residual(dim), decoded(dim);
  for (int64_t cluster = 0; cluster < part.clusters; ++cluster) {
    const int64_t at_begin = head * (part.clusters + 1) + cluster;
    const int32_t begin = *part.cluster_begin.As<int32_t>(at_begin);
    const int32_t end = *part.cluster_begin.As<int32_t>(at_begin + 1);
    for (int32_t slot = begin; slot < end; ++slot) {
      const int64_t at = head * part.tokens + slot;
      const int64_t token = *part.positions.As<int32_t>(at) - c.first_token;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t from = token * row + head * dim + d;
        StoreElement(data.keys[from], &key[d * element_bytes], c.shape.element_type);
        StoreElement(data.values[from], &value[d * element_bytes], c.shape.element_type);
        residual[d] = keys[from] * channels[d] -
                      HalfToFloat(part.centroids.As<uint16_t>(head * part.clusters + cluster)[d]);
      }
      codec.Encode(key.data(), 0, value.data(), 0, c.shape.element_type, dim, 1, record.data());
      ASSERT_TRUE(std::equal(record.begin(), record.end(), part.records.At(at))) << slot;
      if (!remainder.empty()) {
        codec.EncodeRemainders(value.data(), 0, c.shape.element_type, dim, 1, record.data(),
                               remainder.data());
        ASSERT_TRUE(std::equal(remainder.begin(), remainder.end(), part.remainders.At(at))) << slot;
      }
      if (c.params.codes.bits == 0) continue;
      DecodeResiduals(c.params.codes, dim, part.codes.At(at), channels + dim, channels + 2 * dim,
                      decoded.data(), nullptr);
      for (int64_t g = 0; g < dim; g += c.params.codes.group_channels) {
        float low = INFINITY, high = -INFINITY;
        for (int64_t d = g; d < g + c.params.codes.group_channels; ++d) {
          low = std::min(low, residual[d] * channels[dim + d]);
          high = std::max(high, residual[d] * channels[dim + d]);
        }
        const float step = (high - low) / ((1 << c.params.codes.bits) - 1);
        // Half a step, and fp16's rounding of low and of up to 2^bits - 1 steps, in the balanced
        // scale.
        const float room = 0.5f * step + (std::abs(low) + (high - low)) * 0x1p-10f + 1e-6f;
        for (int64_t d = g; d < g + c.params.codes.group_channels; ++d) {
          ASSERT_FALSE(!(std::abs(decoded[d] - residual[d]) * channels[dim + d] <= room))
              << slot << " " << d;
        }
      }
    }
  }
}

void ExpectHolds(const Case& c, const Data& data, const TestPart& part) {
  for (int64_t head = 0; head < c.shape.kv_heads; ++head) {
    ExpectHeadHolds(c, data, part.view(), head);
    ExpectTokensHold(c, data, part.view(), head);
  }
}

TEST(IndexTest, EqualsTheReferenceBitForBitOnSeparatedClusters) {
  // 25 directions in runs of 8 tokens: the stride start puts one center into each, in segments of
  // 104 and 96 tokens too, so that no row is near a tie.
  for (ElementType type : {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (bool balanced : {false, true}) {
      for (const char* codec : {"raw", "k8v4"}) {
        for (int64_t segment_tokens : {0, 104}) {
          Case c;
          c.shape.element_type = type;
          c.balanced = balanced;
          c.codec = codec;
          c.params.segment_tokens = segment_tokens;
          SCOPED_TRACE(::testing::Message()
                       << ElementTypeName(type) << balanced << codec << segment_tokens);
          const Data data = MakeData(c.shape, c.tokens, 25, 0.1f, 0, 8);
          const auto ours = Build(c, data);
          c.reference = true;
          c.placement = 9;
          ExpectEqualParts(*ours, *Build(c, data));
          ExpectHolds(c, data, *ours);
        }
      }
    }
  }
}

TEST(IndexTest, CentroidsAndValueMeansAreTheNearestHalvesAndSaturate) {
  // As above, all eight tokens of a run alike, so that a mean is any of them.
  Case c;
  c.shape.element_type = ElementType::kFloat32;
  c.balanced = false;
  Data data = MakeData(c.shape, c.tokens, 25, 0.0f, 0, 8);
  const struct {
    float mean, stored;
  } values[] = {
      {65504.0f, 65504.0f},
      {65519.0f, 65504.0f},
      {65520.0f, 65504.0f},
      {-65520.0f, -65504.0f},
      {1e6f, 65504.0f},
      {-3e38f, -65504.0f},
      {1 + 0x1p-11f, 1.0f},
      {1 + 0x3p-11f, 1 + 0x1p-9f},
      {1 + 0x1.002p-11f, 1 + 0x1p-10f},
      {-0x1p-14f, -0x1p-14f},
      {0x1.5p-16f, 0x1.5p-16f},
      {0x1p-25f, 0.0f},
      {0x1.8p-25f, 0x1p-24f},
      {-1e-30f, 0.0f},
      {0.1f, 0x1.998p-4f},
  };
  const int64_t row = c.shape.kv_heads * c.shape.head_dim;
  const auto value_of = [&](int64_t t, int64_t i) {
    return values[(t / 8 + i) % std::size(values)];
  };
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < row; ++i) {
      data.keys[t * row + i] *= t / 8 % 2 == 0 ? 1e5f : 0.3f;
      data.values[t * row + i] = value_of(t, i).mean;
    }
  }
  const auto part = Build(c, data);
  ExpectHolds(c, data, *part);
  const MutableIndexPartView& view = part->view();
  for (int64_t head = 0; head < c.shape.kv_heads; ++head) {
    for (int64_t run = 0; run < 25; ++run) {
      const uint16_t* centroid = view.centroids.As<uint16_t>(head * view.clusters + run);
      const uint16_t* mean = view.value_means.As<uint16_t>(head * view.clusters + run);
      const float largest = HalfToFloat(*std::max_element(centroid, centroid + c.shape.head_dim));
      EXPECT_EQ(largest, run % 2 == 0 ? 65504.0f : 0x1.334p0f);
      for (int64_t d = 0; d < c.shape.head_dim; ++d) {
        EXPECT_EQ(HalfToFloat(mean[d]), value_of(8 * run, head * c.shape.head_dim + d).stored);
      }
    }
  }
  c.reference = true;
  ExpectEqualParts(*part, *Build(c, data));
}

TEST(IndexTest, HoldsOverSegmentsAndSplitsAsTheReferenceDoes) {
  for (float split_over : {0.0f, 1.0f, 1.5f, 3.0f}) {
    for (int64_t segment : {0, 1, 50, 199, 200, 201}) {
      Case c;
      c.params.segment_tokens = segment;
      c.params.split_over = split_over;
      c.params.init = KMeansInit::kRandom;
      c.params.seed = 5;
      SCOPED_TRACE(::testing::Message() << split_over << " " << segment);
      const Data data = MakeData(c.shape, c.tokens, 9, 0.1f);
      const auto ours = Build(c, data);
      ExpectHolds(c, data, *ours);
      // Random starts put several clusters into one direction, where near ties abound: the
      // reference is held to the same promises, not to the same bits.
      c.reference = true;
      ExpectHolds(c, data, *Build(c, data));
    }
  }
}

TEST(IndexTest, HoldsForAwkwardShapes) {
  for (int64_t tokens : {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 331, 1025}) {
    for (int64_t dim : {16, 48, 128}) {
      Case c;
      c.tokens = tokens;
      c.shape = {.kv_heads = dim == 48 ? 3 : 1,
                 .query_heads = 3,
                 .head_dim = dim,
                 .element_type = dim == 16 ? ElementType::kFloat32 : ElementType::kBFloat16};
      c.params.segment_tokens = tokens == 331 ? 100 : 0;
      c.codec = tokens % 2 == 0 ? "raw" : "k8v4";
      SCOPED_TRACE(::testing::Message() << tokens << "x" << dim);
      const Data data = MakeData(c.shape, tokens, 5, 1.0f);
      ExpectHolds(c, data, *Build(c, data));
    }
  }
}

TEST(IndexTest, HoldsForEveryWidthOfCodesAndWithout) {
  for (int bits : {0, 2, 3, 4}) {
    for (int group : {8, 16, 32}) {
      Case c;
      c.params.codes = {.bits = bits, .group_channels = group};
      const Data data = MakeData(c.shape, c.tokens, 9, 0.5f);
      const auto part = Build(c, data);
      ExpectHolds(c, data, *part);
      EXPECT_EQ(part->view().codes.size, bits == 0 ? 0 : 2 * c.tokens);
      c.reference = true;
      ExpectHolds(c, data, *Build(c, data));
    }
  }
}

TEST(IndexTest, SameBitsOnEveryThreadCountPlacementAndPageSize) {
  Case c;
  c.tokens = 777;
  c.params.segment_tokens = 250;
  c.params.split_over = 1.5f;
  const Data data = MakeData(c.shape, c.tokens, 40, 1.0f);
  const auto one = Build(c, data);
  const uint64_t digest = IndexDigest(c.shape, one->view());
  for (int threads : {1, 2, 3}) {
    for (int64_t page_bytes : {384, 400, 1000, 4096, 65536}) {
      c.threads = threads;
      c.page_bytes = page_bytes;
      c.placement = 100 * threads + page_bytes;
      const auto other = Build(c, data);
      ExpectEqualParts(*one, *other);
      EXPECT_EQ(IndexDigest(c.shape, other->view()), digest);
    }
  }
}

TEST(IndexTest, AllButRecordsAndRemaindersIsTheSameUnderEveryCodec) {
  Case c;
  const Data data = MakeData(c.shape, c.tokens, 30, 1.0f);
  const auto raw = Build(c, data);
  for (const RecordCodec* codec : RecordCodecs()) {
    c.codec = std::string(codec->name());
    const auto other = Build(c, data);
    ExpectEqualParts(*raw, *other, /*records=*/false);
    EXPECT_EQ(IndexDigest(c.shape, raw->view()), IndexDigest(c.shape, other->view()));
  }
}

TEST(IndexTest, DigestSeesEveryArrayButRecordsAndRemainders) {
  Case c;
  const Data data = MakeData(c.shape, c.tokens, 30, 1.0f);
  const auto part = Build(c, data);
  const uint64_t digest = IndexDigest(c.shape, part->view());
  const MutableIndexPartView& v = part->view();
  for (const MutablePagedView* array : {&v.centroids, &v.value_means, &v.cluster_begin,
                                        &v.positions, &v.slots, &v.codes, &v.channels}) {
    std::byte* last = array->At(array->size - 1) + array->element_bytes - 1;
    *last ^= std::byte{1};
    EXPECT_NE(IndexDigest(c.shape, v), digest);
    *last ^= std::byte{1};
  }
  *v.records.At(3) ^= std::byte{1};
  EXPECT_EQ(IndexDigest(c.shape, v), digest);
}

TEST(IndexTest, BalancedMetricIsBlindToScaledChannels) {
  // Channels of K times 16, of Q divided by 16: powers of two change no mantissa, so all but the
  // weights is the same to the bit.
  Case c;
  c.shape.element_type = ElementType::kFloat32;
  Data data = MakeData(c.shape, c.tokens, 40, 1.0f);
  const auto plain = Build(c, data);
  for (size_t i = 0; i < data.keys.size(); ++i) {
    if (i % c.shape.head_dim % 11 == 0) data.keys[i] *= 16;
  }
  for (size_t i = 0; i < data.query_rms.size(); ++i) {
    if (i % c.shape.head_dim % 11 == 0) data.query_rms[i] /= 16;
  }
  const auto scaled = Build(c, data);
  for (int i = 0; i < 6; ++i) {
    EXPECT_TRUE(Bytes(plain->arrays()[i]) == Bytes(scaled->arrays()[i])) << i;
  }
  const auto a = Elements<float>(plain->view().channels);
  const auto b = Elements<float>(scaled->view().channels);
  for (size_t i = 0; i < a.size(); ++i) {
    const int64_t d = i % c.shape.head_dim;
    const bool weight = i / c.shape.head_dim % 3 == 0;
    EXPECT_EQ(weight && d % 11 == 0 ? b[i] * 16 : b[i], a[i]) << i;
  }
}

TEST(IndexTest, MetricWeightsAndBalancesAreAsDefined) {
  Case c;
  c.shape = {
      .kv_heads = 1, .query_heads = 1, .head_dim = 16, .element_type = ElementType::kFloat32};
  c.tokens = 4;
  c.params.tokens_per_cluster = 4;
  Data data;
  for (int t = 0; t < 4; ++t) {
    for (int d = 0; d < 16; ++d) {
      // One cluster; std over n - 1 of {-3, -1, 1, 3} is sqrt(20 / 3), its mean square 5.
      data.keys.push_back(d == 0 ? 2.0f * t - 3 + 1000 : 7.0f);
      data.values.push_back(d == 0 ? t % 2 : 0.0f);
    }
  }
  data.query_rms.assign(16, 3.0f);
  const auto part = Build(c, data);
  const float* channels = part->view().channels.As<float>(0);
  const double weight = std::sqrt(3 / std::sqrt(20.0 / 3));
  EXPECT_FLOAT_EQ(channels[0], weight);
  EXPECT_FLOAT_EQ(channels[1], std::sqrt(3 / 1e-6));  // a channel without spread
  // Residuals are of the centroid as it is stored: a half, 1 apart here.
  const double rounding = HalfToFloat(*part->view().centroids.As<uint16_t>(0)) - 1000 * weight;
  EXPECT_LE(std::abs(rounding), 0.5);
  EXPECT_NEAR(channels[16], std::pow(5 * weight * weight + rounding * rounding, -0.25), 1e-4);
  EXPECT_FLOAT_EQ(channels[32], 1 / std::sqrt(0.5));
  EXPECT_FLOAT_EQ(channels[33], 1 / std::sqrt(1e-9));
  c.balanced = false;
  EXPECT_EQ(*Build(c, data)->view().channels.As<float>(0), 1.0f);
  c.params.codes.bits = 0;
  EXPECT_THAT(Elements<float>(Build(c, data)->view().channels), ::testing::Each(1.0f));
}

TEST(IndexTest, WindowsUseTheChannelsTheyInherit) {
  Case prompt;
  const auto first = Build(prompt, MakeData(prompt.shape, prompt.tokens, 30, 1.0f));
  const PagedView channels = first->view().channels;
  Case window;
  window.tokens = 37;
  window.first_token = prompt.first_token + prompt.tokens;
  window.inherited = &channels;
  const Data data = MakeData(window.shape, window.tokens, 5, 1.0f, 77);
  const auto part = Build(window, data);
  EXPECT_TRUE(Bytes(part->view().channels) == Bytes(channels));
  ExpectHolds(window, data, *part);
  window.balanced = false;  // query_rms is ignored
  ExpectEqualParts(*part, *Build(window, data));
  window.reference = true;
  ExpectHolds(window, data, *Build(window, data));
}

TEST(IndexTest, SplittingLeavesNoLargeClusterAndFewerThanCapacity) {
  for (float split_over : {1.0f, 1.25f, 2.0f, 4.0f}) {
    Case c;
    c.tokens = 600;
    c.params.segment_tokens = 220;
    c.params.split_over = split_over;
    // Few directions: natural clusters are far larger than 8 tokens.
    const Data data = MakeData(c.shape, c.tokens, 3, 0.3f);
    const auto part = Build(c, data);
    ExpectHolds(c, data, *part);
    const auto begin = Elements<int32_t>(part->view().cluster_begin);
    for (size_t i = 1; i < begin.size(); ++i) EXPECT_LE(begin[i] - begin[i - 1], 8 * split_over);
  }
}

TEST(IndexTest, IdenticalKeysSplitIntoRunsOfPositions) {
  Case c;
  c.tokens = 64;
  c.params.split_over = 1;
  Data data = MakeData(c.shape, c.tokens, 1, 0.0f);
  const auto part = Build(c, data);
  ExpectHolds(c, data, *part);
  const auto begin = Elements<int32_t>(part->view().cluster_begin);
  std::multiset<int32_t> sizes;
  for (int64_t i = 1; i <= part->view().clusters; ++i) sizes.insert(begin[i] - begin[i - 1]);
  EXPECT_EQ(sizes.count(8), 8u);
  EXPECT_EQ(sizes.count(0), static_cast<size_t>(part->view().clusters - 8));
  c.params.split_over = 0;  // the rest of the clusters is empty
  const auto whole = Build(c, data);
  ExpectHolds(c, data, *whole);
  EXPECT_EQ(*whole->view().cluster_begin.As<int32_t>(1), 64);
}

TEST(IndexTest, SegmentsKeepTheirTokensApart) {
  Case c;
  c.tokens = 107;
  c.params.segment_tokens = 50;
  const Data data = MakeData(c.shape, c.tokens, 4, 0.2f);
  const auto part = Build(c, data);
  // 50 / 8, 50 / 8, max(1, 7 / 8) clusters; slots of a segment are its tokens' numbers.
  EXPECT_EQ(part->view().clusters, 6 + 6 + 1);
  for (int64_t head = 0; head < 2; ++head) {
    EXPECT_EQ(*part->view().cluster_begin.As<int32_t>(head * 14 + 6), 50);
    EXPECT_EQ(*part->view().cluster_begin.As<int32_t>(head * 14 + 12), 100);
  }
}

TEST(IndexTest, CapacityFollowsThePresets) {
  IndexParams params;
  EXPECT_EQ(ClusterCapacity(params, 7792), 487);
  EXPECT_EQ(ClusterCapacity(params, 32752), 3 * 512 + 511);
  EXPECT_EQ(ClusterCapacity(params, 8193), 512 + 1);
  EXPECT_EQ(ClusterCapacity(params, 1), 1);
  EXPECT_EQ(ClusterCapacity(params, 0), 0);
  params = {.tokens_per_cluster = 80, .segment_tokens = 0};
  EXPECT_EQ(ClusterCapacity(params, 7792), 97);
  params.split_over = 2;  // pieces of at least 41 tokens
  EXPECT_EQ(ClusterCapacity(params, 7792), 96 + 7792 / 41);
  EXPECT_EQ(ClusterCapacity(params, 160), 2);  // nothing can be too large
}

TEST(IndexTest, LayoutCountsPagesOfEachArrayByItself) {
  const KvShape shape{
      .kv_heads = 2, .query_heads = 8, .head_dim = 128, .element_type = ElementType::kBFloat16};
  const IndexParams params;
  const IndexLayout layout = MakeIndexLayout(shape, params, *FindRecordCodec("raw"), 7792);
  EXPECT_EQ(layout.arrays[5].element_bytes, 96);
  EXPECT_EQ(layout.arrays[6].element_bytes, 512);
  EXPECT_EQ(layout.arrays[6].size, 2 * 7792);
  // 65,536 bytes: 256 rows of halves, 16,384 int32, 682 codes, 128 records, 42 channels.
  EXPECT_EQ(layout.Pages(65536), 4 + 4 + 1 + 1 + 1 + 23 + 122 + 1);
  IndexParams without = params;
  without.codes.bits = 0;
  EXPECT_EQ(MakeIndexLayout(shape, without, *FindRecordCodec("raw"), 7792).Pages(65536), 134);
  // Records of 200 bytes, 327 in a page, and remainders of 64, 1,024 in a page.
  const IndexLayout coarse = MakeIndexLayout(shape, params, *FindRecordCodec("k8v4"), 7792);
  EXPECT_EQ(layout.arrays[8].element_bytes, 0);
  EXPECT_EQ(coarse.arrays[8].element_bytes, 64);
  EXPECT_EQ(coarse.Pages(65536), layout.Pages(65536) - 122 + 48 + 16);
}

TEST(IndexTest, RefusesWhatDoesNotFitAndWritesNothing) {
  const Case c;
  const Data data = MakeData(c.shape, c.tokens, 9, 1.0f);
  const RecordCodec& codec = *FindRecordCodec("raw");
  const TestRows keys(c.shape, data.keys, 7, 1), values(c.shape, data.values, 7, 2);
  TestPart part(c.shape, c.params, codec, 16, c.tokens, 4096, 3);
  const auto refused = [&](const KvShape& shape, const IndexParams& params, const IndexInput& input,
                           const MutableIndexPartView& view, const std::string& field) {
    for (const absl::Status& status :
         {BuildIndexPart(shape, params, codec, input, view, SerialFor),
          BuildIndexPartReference(shape, params, codec, input, view)}) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr(field));
    }
    for (const PagedView& array : part.arrays()) {
      EXPECT_THAT(Bytes(array), ::testing::Each(kPoison));
    }
  };
  const IndexInput good{.keys = keys.view(), .values = values.view(), .query_rms = data.query_rms};
  IndexInput input = good;
  input.keys.size -= 1;
  refused(c.shape, c.params, input, part.view(), "keys.size");
  input = good;
  input.values.element_bytes *= 2;
  refused(c.shape, c.params, input, part.view(), "values.element_bytes");
  input = good;
  input.query_rms.remove_suffix(1);
  refused(c.shape, c.params, input, part.view(), "query_rms");
  std::vector<float> bad_rms = data.query_rms;
  bad_rms[33] = std::numeric_limits<float>::quiet_NaN();
  input.query_rms = bad_rms;
  refused(c.shape, c.params, input, part.view(), "query_rms: element 33");
  input = good;
  const PagedView channels = part.view().positions;
  input.inherited_channels = &channels;
  refused(c.shape, c.params, input, part.view(), "inherited_channels");
  MutableIndexPartView view = part.view();
  view.records.element_bytes -= 1;
  refused(c.shape, c.params, good, view, "records");
  view = part.view();
  view.clusters += 1;
  refused(c.shape, c.params, good, view, "clusters");
  view = part.view();
  view.first_token = std::numeric_limits<int32_t>::max() - 10;
  refused(c.shape, c.params, good, view, "2^31");
  IndexParams params = c.params;
  params.codes.bits = 0;
  refused(c.shape, params, good, part.view(), "codes");
}

TEST(IndexTest, ParametersAreCheckedByName) {
  const KvShape good{.kv_heads = 2, .query_heads = 8, .head_dim = 128};
  EXPECT_TRUE(ValidateKvShape(good).ok());
  EXPECT_TRUE(ValidateIndexParams(good, IndexParams()).ok());
  const auto shape_error = [](KvShape shape) { return ValidateKvShape(shape).ToString(); };
  EXPECT_THAT(shape_error({0, 8, 128}), HasSubstr("kv_heads"));
  EXPECT_THAT(shape_error({257, 257, 128}), HasSubstr("kv_heads"));
  EXPECT_THAT(shape_error({2, 7, 128}), HasSubstr("query_heads"));
  EXPECT_THAT(shape_error({2, 0, 128}), HasSubstr("query_heads"));
  EXPECT_THAT(shape_error({1, 33, 128}), HasSubstr("query_heads"));
  EXPECT_THAT(shape_error({2, 8, 120}), HasSubstr("head_dim"));
  EXPECT_THAT(shape_error({2, 8, 528}), HasSubstr("head_dim"));
  EXPECT_THAT(shape_error({2, 8, 128, static_cast<ElementType>(9)}), HasSubstr("element_type"));
  const auto params_error = [&](IndexParams params) {
    return ValidateIndexParams(good, params).ToString();
  };
  EXPECT_THAT(params_error({.tokens_per_cluster = 0}), HasSubstr("tokens_per_cluster"));
  EXPECT_THAT(params_error({.segment_tokens = -1}), HasSubstr("segment_tokens"));
  EXPECT_THAT(params_error({.init = static_cast<KMeansInit>(7)}), HasSubstr("init"));
  EXPECT_THAT(params_error({.iterations = 0}), HasSubstr("iterations"));
  EXPECT_THAT(params_error({.split_over = 0.5f}), HasSubstr("split_over"));
  EXPECT_THAT(params_error({.split_over = std::nanf("")}), HasSubstr("split_over"));
  EXPECT_THAT(params_error({.codes = {.bits = 5}}), HasSubstr("codes.bits"));
  EXPECT_THAT(params_error({.codes = {.bits = 2, .group_channels = 48}}),
              HasSubstr("codes.group_channels"));
}

}  // namespace
}  // namespace clusterkv::kernels
