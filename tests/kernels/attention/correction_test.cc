#include "kernels/attention/correction.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace clusterkv::kernels {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Tokens of one KV head as the service holds them, and their raw rows.
class Zone {
 public:
  Zone(ElementType type, int64_t head_dim, int64_t count, std::mt19937_64& random)
      : type_(type), head_dim_(head_dim), codec_(FindRecordCodec("k8v4")) {
    const int64_t row = head_dim * ElementBytes(type);
    std::normal_distribution<float> normal(0.2f, 1.5f);
    std::vector<float> numbers(2 * count * head_dim);
    for (float& number : numbers) number = normal(random);
    rows_.resize(2 * count * row);
    FromFloat(numbers.data(), type, static_cast<int64_t>(numbers.size()), rows_.data());
    const int64_t record_bytes = codec_->RecordBytes(type, head_dim);
    const int64_t remainder_bytes = codec_->RemainderBytes(type, head_dim);
    records_.resize(count * record_bytes);
    remainders_.resize(count * remainder_bytes);
    if (count > 0) {
      codec_->Encode(rows_.data(), 2 * row, rows_.data() + row, 2 * row, type, head_dim, count,
                     records_.data());
      codec_->EncodeRemainders(rows_.data() + row, 2 * row, type, head_dim, count, records_.data(),
                               remainders_.data());
    }
    for (int64_t i = 0; i < count; ++i) {
      record_pointers_.push_back(records_.data() + i * record_bytes);
      remainder_pointers_.push_back(remainders_.data() + i * remainder_bytes);
      slots_.push_back(static_cast<int32_t>(i));
    }
  }
  Zone(const Zone&) = delete;

  RemainderRun Remainders(const std::vector<uint32_t>& masks = {}) const {
    return {codec_, record_pointers_, remainder_pointers_, masks};
  }
  RecordRun Records(const std::vector<uint32_t>& masks = {}) const {
    return {codec_, records_.data(), slots_, masks};
  }
  // The records' keys with the values as they came: what perfect remainders would make of them.
  std::vector<std::byte> Rows() const {
    std::vector<std::byte> rows = rows_;
    const int64_t row = head_dim_ * ElementBytes(type_);
    std::vector<float> key(head_dim_);
    for (size_t i = 0; i < slots_.size(); ++i) {
      codec_->Decode(record_pointers_[i], type_, head_dim_, key.data(), nullptr);
      FromFloat(key.data(), type_, head_dim_, rows.data() + 2 * i * row);
    }
    return rows;
  }

 private:
  ElementType type_;
  int64_t head_dim_;
  const RecordCodec* codec_;
  std::vector<std::byte> rows_, records_, remainders_;
  std::vector<const std::byte*> record_pointers_, remainder_pointers_;
  std::vector<int32_t> slots_;
};

std::vector<float> Queries(const AttentionParams& params, std::mt19937_64& random,
                           float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> queries(params.group * params.head_dim);
  for (float& query : queries) query = normal(random);
  return queries;
}

AttentionParams Params(int64_t group, int64_t head_dim, ElementType type) {
  return {group, head_dim, type, 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

class CorrectionTest : public testing::Test {
 protected:
  std::mt19937_64 random_{11};
};

TEST_F(CorrectionTest, AgreesWithTheReferenceForEveryShapeTypeAndMask) {
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (const int64_t head_dim : {16, 48, 80, 128, 512}) {
      for (const int64_t group : {1, 3, 4, 7, 32}) {
        for (const int64_t count : {0, 1, 31, 32, 33, 97}) {
          for (const bool masked : {false, true}) {
            SCOPED_TRACE(testing::Message() << ElementTypeName(type) << " head_dim " << head_dim
                                            << " group " << group << " tokens " << count);
            const AttentionParams params = Params(group, head_dim, type);
            const Zone zone(type, head_dim, count, random_);
            std::vector<uint32_t> masks;
            for (int64_t i = 0; masked && i < count; ++i) {
              masks.push_back(static_cast<uint32_t>(random_()) & ~uint32_t{1});
            }
            const std::vector<float> queries = Queries(params, random_, 3);
            Correction got, expected;
            got.codes.assign(3, 99);  // of an earlier call
            ASSERT_TRUE(ComputeCorrection(params, queries, zone.Remainders(masks), &got).ok());
            ASSERT_TRUE(
                ComputeCorrectionReference(params, queries, zone.Remainders(masks), &expected)
                    .ok());
            ASSERT_EQ(got.codes.size(), expected.codes.size());
            for (int64_t g = 0; g < group; ++g) {
              ASSERT_EQ(got.log_scales[g] == kNothing, expected.log_scales[g] == kNothing) << g;
              if (masked) {
                ASSERT_EQ(got.log_scales[0], kNothing) << "nobody attends";
              }
              if (got.log_scales[g] == kNothing) continue;
              ASSERT_FALSE(!(std::abs(got.log_scales[g] - expected.log_scales[g]) <= 1e-4));
              for (int64_t j = g * head_dim; j < (g + 1) * head_dim; ++j) {
                // A code where one sum rounds up and the other down.
                ASSERT_LE(std::abs(got.codes[j] - expected.codes[j]), 1) << j;
              }
            }
          }
        }
      }
    }
  }
}

// What it is for: attention over records, corrected, is attention over the values themselves, to
// what remainders and 8 bits leave.
TEST_F(CorrectionTest, CorrectedAttentionIsThatOverTheValuesThemselves) {
  for (const float spread : {0.3f, 1.0f, 8.0f}) {  // the last one copies single tokens
    const ElementType type = ElementType::kFloat32;
    const AttentionParams params = Params(4, 128, type);
    const int64_t count = 50, elements = params.group * params.head_dim;
    const Zone zone(type, params.head_dim, count, random_);
    const std::vector<float> queries = Queries(params, random_, spread);
    std::vector<float> state_output = Queries(params, random_), state_lse(params.group, 0.5f);
    state_lse[1] = kNothing;
    const AttentionState state = {state_output, state_lse};
    std::vector<float> coarse(elements), exact(elements), lse(params.group), unused(params.group);
    ASSERT_TRUE(SparseAttention(params, queries, {}, zone.Records(), state, absl::MakeSpan(coarse),
                                absl::MakeSpan(lse))
                    .ok());
    const std::vector<std::byte> rows = zone.Rows();
    const int64_t row = params.head_dim * ElementBytes(type);
    const RawRun raw = {rows.data(), rows.data() + row, 2 * row, 2 * row, count};
    ASSERT_TRUE(SparseAttention(params, queries, {raw}, {}, state, absl::MakeSpan(exact),
                                absl::MakeSpan(unused))
                    .ok());
    Correction correction;
    ASSERT_TRUE(ComputeCorrection(params, queries, zone.Remainders(), &correction).ok());
    std::vector<float> corrected = coarse;
    AddCorrection(params.group, params.head_dim, correction.codes, correction.log_scales, lse,
                  absl::MakeSpan(corrected));
    double before = 0, after = 0;
    for (int64_t i = 0; i < elements; ++i) {
      before += std::pow(coarse[i] - exact[i], 2);
      after += std::pow(corrected[i] - exact[i], 2);
    }
    EXPECT_FALSE(!(std::sqrt(after) <= std::sqrt(before) / 10))
        << "spread " << spread << ": " << std::sqrt(after) << " of " << std::sqrt(before);
  }
}

TEST_F(CorrectionTest, AnEmptyOneAddsNothing) {
  const AttentionParams params = Params(3, 16, ElementType::kBFloat16);
  const std::vector<float> queries = Queries(params, random_);
  Correction correction;
  ASSERT_TRUE(ComputeCorrection(params, queries, {}, &correction).ok());
  EXPECT_EQ(correction.codes, std::vector<int8_t>(48, 0));
  EXPECT_EQ(correction.log_scales, std::vector<float>(3, kNothing));
  std::vector<float> output(48, 1.5f);
  const std::vector<float> lse = {0, kNothing, 3};
  AddCorrection(3, 16, correction.codes, correction.log_scales, lse, absl::MakeSpan(output));
  EXPECT_EQ(output, std::vector<float>(48, 1.5f));
}

// The same factor on the logits of everything changes numerators and denominator alike.
TEST_F(CorrectionTest, LargeLogitsNeitherOverflowNorVanish) {
  const AttentionParams params = Params(2, 128, ElementType::kFloat32);
  const Zone zone(ElementType::kFloat32, 128, 40, random_);
  const std::vector<float> queries = Queries(params, random_, 300);
  Correction correction, reference;
  ASSERT_TRUE(ComputeCorrection(params, queries, zone.Remainders(), &correction).ok());
  ASSERT_TRUE(ComputeCorrectionReference(params, queries, zone.Remainders(), &reference).ok());
  for (int64_t g = 0; g < 2; ++g) {
    EXPECT_GT(correction.log_scales[g], 100) << "more than a float's exp";
    EXPECT_NEAR(correction.log_scales[g], reference.log_scales[g], 1e-2);
    int largest = 0;
    for (int64_t j = 0; j < 128; ++j) {
      largest = std::max(largest, std::abs(int{correction.codes[g * 128 + j]}));
    }
    EXPECT_EQ(largest, 127);
  }
}

TEST_F(CorrectionTest, LogitsThatOverflowAreAnError) {
  const AttentionParams params = Params(2, 16, ElementType::kFloat32);
  const Zone zone(ElementType::kFloat32, 16, 3, random_);
  std::vector<float> queries(32, 1.0f);
  for (int64_t j = 16; j < 32; ++j) queries[j] = j % 2 == 0 ? 3e38f : -3e38f;
  Correction correction;
  EXPECT_TRUE(
      absl::IsInvalidArgument(ComputeCorrection(params, queries, zone.Remainders(), &correction)));
}

TEST_F(CorrectionTest, RefusesWhatDoesNotFit) {
  const AttentionParams params = Params(2, 16, ElementType::kFloat32);
  const Zone zone(ElementType::kFloat32, 16, 5, random_);
  const std::vector<float> queries = Queries(params, random_);
  const auto fails = [&](const AttentionParams& p, absl::Span<const float> q,
                         const RemainderRun& run) {
    Correction correction;
    return absl::IsInvalidArgument(ComputeCorrection(p, q, run, &correction)) &&
           absl::IsInvalidArgument(ComputeCorrectionReference(p, q, run, &correction));
  };
  const RemainderRun fits = zone.Remainders();
  EXPECT_TRUE(fails(Params(0, 16, ElementType::kFloat32), {}, fits));
  EXPECT_TRUE(fails(Params(2, 24, ElementType::kFloat32), queries, fits));
  EXPECT_TRUE(fails(params, absl::MakeConstSpan(queries).subspan(1), fits));
  const std::vector<uint32_t> masks(4, 1);
  EXPECT_TRUE(fails(params, queries, zone.Remainders(masks)));
  RemainderRun run = fits;
  run.remainders = run.remainders.subspan(1);
  EXPECT_TRUE(fails(params, queries, run));
  run = fits;
  run.codec = FindRecordCodec("raw");
  EXPECT_TRUE(fails(params, queries, run)) << "a codec without remainders";
  run.codec = nullptr;
  EXPECT_TRUE(fails(params, queries, run));
}

}  // namespace
}  // namespace clusterkv::kernels
