#include "kernels/attention/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace clusterkv::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kPoison = 12345.0f;

struct Result {
  std::vector<float> output, lse;
};

// Keys and values of one KV head in every form that attention takes: raw rows and records.
class Tokens {
 public:
  Tokens(ElementType type, int64_t head_dim, int64_t count, std::mt19937_64& random,
         std::string_view codec_name = "raw")
      : type_(type), head_dim_(head_dim), count_(count), codec_(FindRecordCodec(codec_name)) {
    std::normal_distribution<float> normal;
    std::vector<float> numbers(2 * count * head_dim);
    for (float& number : numbers) number = normal(random);
    const int64_t row = head_dim * ElementBytes(type);
    rows_.resize(2 * count * row);
    FromFloat(numbers.data(), type, static_cast<int64_t>(numbers.size()), rows_.data());
    record_bytes_ = codec_->RecordBytes(type, head_dim);
    records_.resize(count * record_bytes_);
    if (count == 0) return;  // no rows, no address to step from
    codec_->Encode(rows_.data(), 2 * row, rows_.data() + row, 2 * row, type, head_dim, count,
                   records_.data());
  }

  // Keys and values interleaved, so that strides matter.
  RawRun Raw(int64_t begin, int64_t end) const {
    if (begin == end) return {};
    const int64_t row = head_dim_ * ElementBytes(type_);
    if (rows_.empty()) return {nullptr, nullptr, 2 * row, 2 * row, end - begin};
    const std::byte* first = rows_.data() + 2 * begin * row;
    return {first, first + row, 2 * row, 2 * row, end - begin};
  }
  RecordRun Records(absl::Span<const int32_t> slots,
                    absl::Span<const uint32_t> head_masks = {}) const {
    return {codec_, records_.data(), slots, head_masks};
  }
  int64_t count() const { return count_; }

 private:
  ElementType type_;
  int64_t head_dim_, count_;
  const RecordCodec* codec_;
  int64_t record_bytes_ = 0;
  std::vector<std::byte> rows_, records_;
};

std::vector<int32_t> Slots(int32_t begin, int32_t end) {
  std::vector<int32_t> slots;
  for (int32_t slot = begin; slot < end; ++slot) slots.push_back(slot);
  return slots;
}

using Attend = decltype(&SparseAttention);

Result RunWith(Attend attend, const AttentionParams& params, const std::vector<float>& queries,
               std::vector<RawRun> raw, const RecordRun& records,
               const AttentionState& state = {}) {
  Result result{std::vector<float>(params.group * params.head_dim, kPoison),
                std::vector<float>(params.group, kPoison)};
  const absl::Status status = attend(params, queries, raw, records, state,
                                     absl::MakeSpan(result.output), absl::MakeSpan(result.lse));
  EXPECT_TRUE(status.ok()) << status;
  return result;
}

void ExpectNear(const Result& got, const Result& expected, float tolerance) {
  ASSERT_EQ(got.output.size(), expected.output.size());
  for (size_t i = 0; i < got.output.size(); ++i) {
    ASSERT_FALSE(!(std::abs(got.output[i] - expected.output[i]) <= tolerance))
        << "output " << i << ": " << got.output[i] << " against " << expected.output[i];
  }
  for (size_t g = 0; g < got.lse.size(); ++g) {
    if (got.lse[g] == expected.lse[g]) continue;  // both -infinity, too
    ASSERT_FALSE(!(std::abs(got.lse[g] - expected.lse[g]) <= tolerance))
        << "lse " << g << ": " << got.lse[g] << " against " << expected.lse[g];
  }
}

std::vector<float> Queries(const AttentionParams& params, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<float> queries(params.group * params.head_dim);
  for (float& query : queries) query = normal(random);
  return queries;
}

AttentionParams Params(int64_t group, int64_t head_dim, ElementType type = ElementType::kFloat32) {
  return {group, head_dim, type, 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

class AttentionTest : public testing::Test {
 protected:
  std::mt19937_64 random_{7};
};

TEST_F(AttentionTest, AgreesWithTheReferenceForEveryShapeAndType) {
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (const int64_t head_dim : {16, 48, 80, 128, 512}) {
      for (const int64_t group : {1, 2, 3, 4, 7, 32}) {
        for (const int64_t count : {0, 1, 31, 32, 33, 97}) {
          SCOPED_TRACE(testing::Message() << ElementTypeName(type) << " head_dim " << head_dim
                                          << " group " << group << " tokens " << count);
          const AttentionParams params = Params(group, head_dim, type);
          const Tokens tokens(type, head_dim, count, random_);
          const std::vector<float> queries = Queries(params, random_);
          const int64_t raw = count / 3;
          const std::vector<int32_t> slots = Slots(raw, count);
          std::vector<uint32_t> masks;
          for (size_t i = 0; i < slots.size(); ++i) masks.push_back(random_());
          const Result fast = RunWith(&SparseAttention, params, queries, {tokens.Raw(0, raw)},
                                      tokens.Records(slots, masks));
          const Result reference = RunWith(&SparseAttentionReference, params, queries,
                                           {tokens.Raw(0, raw)}, tokens.Records(slots, masks));
          ExpectNear(fast, reference, 1e-5f);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_F(AttentionTest, EveryTokenExactEqualsFullAttention) {
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    const AttentionParams params = Params(4, 128, type);
    const Tokens tokens(type, 128, 1009, random_);
    const std::vector<float> queries = Queries(params, random_);
    const Result full =
        RunWith(&SparseAttentionReference, params, queries, {tokens.Raw(0, 1009)}, {});
    const std::vector<int32_t> slots = Slots(16, 900);
    ExpectNear(RunWith(&SparseAttention, params, queries,
                       {tokens.Raw(0, 16), tokens.Raw(900, 1009)}, tokens.Records(slots)),
               full, 1e-5f);
  }
}

TEST_F(AttentionTest, MergeOfAnySplitEqualsTheWhole) {
  const AttentionParams params = Params(5, 64);
  const int64_t count = 61;
  const Tokens tokens(ElementType::kFloat32, 64, count, random_);
  const std::vector<float> queries = Queries(params, random_);
  const Result whole =
      RunWith(&SparseAttentionReference, params, queries, {tokens.Raw(0, count)}, {});
  for (int64_t split = 0; split <= count; ++split) {
    Result left = RunWith(&SparseAttention, params, queries, {tokens.Raw(0, split)}, {});
    const Result right = RunWith(&SparseAttention, params, queries, {tokens.Raw(split, count)}, {});
    MergeStates(5, 64, absl::MakeSpan(left.output), absl::MakeSpan(left.lse), right.output,
                right.lse);
    ExpectNear(left, whole, 1e-5f);
    const Result by_state = RunWith(&SparseAttention, params, queries, {tokens.Raw(0, split)}, {},
                                    {right.output, right.lse});
    ExpectNear(by_state, whole, 1e-5f);
  }
}

TEST_F(AttentionTest, MergeIsWithoutNanWhereASideIsEmpty) {
  const std::vector<float> filled = {1, 2, 3, 4};
  const std::vector<float> none(4, 0.0f);
  std::vector<float> output = none, lse = {-kInfinity, 0.5f};
  output[2] = 5, output[3] = 6;
  MergeStates(2, 2, absl::MakeSpan(output), absl::MakeSpan(lse), filled,
              std::vector<float>{0.25f, -kInfinity});
  EXPECT_EQ(output, (std::vector<float>{1, 2, 5, 6}));
  EXPECT_EQ(lse, (std::vector<float>{0.25f, 0.5f}));
  std::vector<float> empty = none, empty_lse = {-kInfinity, -kInfinity};
  MergeStates(2, 2, absl::MakeSpan(empty), absl::MakeSpan(empty_lse), none,
              std::vector<float>{-kInfinity, -kInfinity});
  EXPECT_EQ(empty, none);
  EXPECT_EQ(empty_lse, (std::vector<float>{-kInfinity, -kInfinity}));
}

TEST_F(AttentionTest, NothingToAttendToIsZero) {
  const AttentionParams params = Params(3, 16);
  const Tokens tokens(ElementType::kFloat32, 16, 40, random_);
  const std::vector<float> queries = Queries(params, random_);
  const std::vector<int32_t> slots = Slots(0, 40);
  const std::vector<uint32_t> masks(40, 0b101);  // nothing for head 1
  for (const Attend attend : {&SparseAttention, &SparseAttentionReference}) {
    const Result result = RunWith(attend, params, queries, {}, tokens.Records(slots, masks));
    EXPECT_EQ(result.lse[1], -kInfinity);
    EXPECT_TRUE(std::isfinite(result.lse[0]) && std::isfinite(result.lse[2]));
    for (int64_t j = 0; j < 16; ++j) EXPECT_EQ(result.output[16 + j], 0.0f);
    const Result nothing = RunWith(attend, params, queries, {}, {});
    EXPECT_EQ(nothing.output, std::vector<float>(48, 0.0f));
    EXPECT_EQ(nothing.lse, std::vector<float>(3, -kInfinity));
  }
}

TEST_F(AttentionTest, MaskedTokensCountForTheirHeadsAlone) {
  const AttentionParams params = Params(2, 32);
  const Tokens tokens(ElementType::kFloat32, 32, 50, random_);
  const std::vector<float> queries = Queries(params, random_);
  const std::vector<int32_t> slots = Slots(0, 50);
  std::vector<uint32_t> masks(50, 0b01);
  std::fill(masks.begin() + 20, masks.end(), 0b10);
  const Result masked =
      RunWith(&SparseAttention, params, queries, {}, tokens.Records(slots, masks));
  const Result first = RunWith(&SparseAttentionReference, params, queries, {tokens.Raw(0, 20)}, {});
  const Result second =
      RunWith(&SparseAttentionReference, params, queries, {tokens.Raw(20, 50)}, {});
  Result expected = first;
  std::copy_n(second.output.begin() + 32, 32, expected.output.begin() + 32);
  expected.lse[1] = second.lse[1];
  ExpectNear(masked, expected, 1e-5f);
}

TEST_F(AttentionTest, HugeLogitsStayFinite) {
  AttentionParams params = Params(2, 16);
  params.scale = 1e4f;
  const Tokens tokens(ElementType::kFloat32, 16, 70, random_);
  const std::vector<float> queries = Queries(params, random_);
  const Result fast = RunWith(&SparseAttention, params, queries, {tokens.Raw(0, 70)}, {});
  for (const float number : fast.output) EXPECT_TRUE(std::isfinite(number));
  const Result reference =
      RunWith(&SparseAttentionReference, params, queries, {tokens.Raw(0, 70)}, {});
  for (size_t i = 0; i < fast.output.size(); ++i) {
    EXPECT_FALSE(!(std::abs(fast.output[i] - reference.output[i]) <= 1e-2f));
  }
}

TEST_F(AttentionTest, RefusesSpansThatDoNotFit) {
  const AttentionParams params = Params(2, 16);
  const Tokens tokens(ElementType::kFloat32, 16, 4, random_);
  const std::vector<float> queries = Queries(params, random_), short_one(31), state_lse(2);
  std::vector<float> output(32), lse(2);
  const std::vector<int32_t> slots = {0, 1}, negative = {0, -1};
  const std::vector<uint32_t> masks = {1};
  const auto refused = [&](const AttentionParams& p, absl::Span<const float> q,
                           std::vector<RawRun> raw, const RecordRun& records,
                           const AttentionState& state, absl::Span<float> out,
                           absl::Span<float> l) {
    return SparseAttention(p, q, raw, records, state, out, l).code() ==
               absl::StatusCode::kInvalidArgument &&
           SparseAttentionReference(p, q, raw, records, state, out, l).code() ==
               absl::StatusCode::kInvalidArgument;
  };
  const absl::Span<float> out = absl::MakeSpan(output), l = absl::MakeSpan(lse);
  EXPECT_TRUE(refused(params, short_one, {}, {}, {}, out, l));
  EXPECT_TRUE(refused(params, queries, {}, {}, {}, out.first(31), l));
  EXPECT_TRUE(refused(params, queries, {}, {}, {}, out, l.first(1)));
  EXPECT_TRUE(refused(params, queries, {}, {}, {short_one, state_lse}, out, l));
  EXPECT_TRUE(refused(params, queries, {}, {}, {queries, {}}, out, l));
  EXPECT_TRUE(refused(params, queries, {}, tokens.Records(slots, masks), {}, out, l));
  EXPECT_TRUE(refused(params, queries, {}, tokens.Records(negative), {}, out, l));
  EXPECT_TRUE(refused(params, queries, {}, {nullptr, nullptr, slots, {}}, {}, out, l));
  EXPECT_TRUE(refused(params, queries, {{nullptr, nullptr, 0, 0, 1}}, {}, {}, out, l));
  EXPECT_TRUE(refused({33, 16, ElementType::kFloat32, 1}, queries, {}, {}, {}, out, l));
  EXPECT_TRUE(refused({2, 24, ElementType::kFloat32, 1}, queries, {}, {}, {}, out, l));
}

}  // namespace
}  // namespace clusterkv::kernels
