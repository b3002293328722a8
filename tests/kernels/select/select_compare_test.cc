// Select against SelectReference: the same choice, and nearly the same state, over shapes, codes,
// parts, modes and instruction sets. Where two tokens or clusters tie to within the float version's
// rounding, either choice is right; the bound of that rounding is derived from the data.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "hwy/targets.h"
#include "kernels/select/select.h"
#include "tests/kernels/testing/select_fixture.h"

namespace clusterkv::kernels {
namespace {

using testing::MakeShape;
using testing::PlantedPart;
using testing::SelectFixture;
using testing::TestPartSpec;

constexpr uint32_t kSeed = 20250503;

double LogSumExp(const std::vector<double>& x) {
  double max = -std::numeric_limits<double>::infinity();
  for (double v : x) max = std::max(max, v);
  double sum = 0;
  for (double v : x) sum += std::exp(v - max);
  return max + std::log(sum);
}

// Logs of the summed softmax of every cluster and of every token of a scored set, and how far float
// arithmetic may be from them.
class Masses {
 public:
  explicit Masses(SelectFixture& fixture) : f_(fixture), group_(f_.input().shape.group()) {
    const int64_t d = f_.input().shape.head_dim;
    std::vector<std::vector<double>> logits(group_);  // of clusters that have tokens
    std::vector<int64_t> ids;
    int64_t id = 0;
    for (int64_t p = 0; p < f_.parts(); ++p) {
      const IndexPartView& view = f_.part(p).view();
      const float* weight = f_.part(p).channels().data() + f_.input().kv_head * 3 * d;
      for (int64_t c = 0; c < view.clusters; ++c, ++id) {
        const int64_t row = f_.input().kv_head * (view.clusters + 1) + c;
        const int32_t begin = *view.cluster_begin.As<int32_t>(row);
        const int32_t end = *view.cluster_begin.As<int32_t>(row + 1);
        if (begin == end) continue;
        std::vector<float> centroid(d);
        HalvesToFloat(view.centroids.As<uint16_t>(f_.input().kv_head * view.clusters + c), d,
                      centroid.data());
        std::vector<double> of_cluster(group_);
        for (int64_t g = 0; g < group_; ++g) {
          double magnitude = 0;
          of_cluster[g] = Dot(g, weight, centroid.data(), &magnitude);
          error_ = std::max(error_, magnitude);
          logits[g].push_back(of_cluster[g]);
        }
        ids.push_back(id);
        for (int32_t slot = begin; slot < end; ++slot) {
          AddToken(view, weight, slot, of_cluster);
        }
      }
    }
    // A dot product's error is at most its additions times 2^-24 of its terms' magnitudes (vector
    // code adds fewer times); queries were rounded three times before; exp and log add a few ulps.
    error_ = error_ * static_cast<double>(d + 8) * 0x1p-24 + 4e-6;
    std::vector<double> lse(group_);
    for (int64_t g = 0; g < group_; ++g) lse[g] = LogSumExp(logits[g]);
    for (size_t i = 0; i < ids.size(); ++i) {
      std::vector<double> shares(group_);
      for (int64_t g = 0; g < group_; ++g) shares[g] = logits[g][i] - lse[g];
      clusters_[ids[i]] = LogSumExp(shares);
      for (int64_t g = 0; g < group_; ++g) head_clusters_[{g, ids[i]}] = logits[g][i];
    }
  }

  double cluster(int64_t id) const { return clusters_.at(id); }
  double head_cluster(int64_t g, int64_t id) const { return head_clusters_.at({g, id}); }
  double logit_error() const { return error_; }
  // Of a log mass: the logit's, and the normaliser's.
  double mass_error() const { return 2 * error_; }

  // Log masses of tokens by position, when these are scored together with the sinks.
  std::map<int32_t, double> TokensOf(const std::vector<int32_t>& positions) const {
    std::vector<double> lse(group_);
    for (int64_t g = 0; g < group_; ++g) {
      std::vector<double> logits;
      for (int64_t t = 0; t < SelectFixture::kSinks; ++t) {
        logits.push_back(f_.Logit(g, f_.sinks().data() + t * f_.input().shape.head_dim));
      }
      for (int32_t position : positions) logits.push_back(tokens_.at(position)[g]);
      lse[g] = LogSumExp(logits);
    }
    std::map<int32_t, double> masses;
    for (int32_t position : positions) {
      std::vector<double> shares(group_);
      for (int64_t g = 0; g < group_; ++g) shares[g] = tokens_.at(position)[g] - lse[g];
      masses[position] = LogSumExp(shares);
    }
    return masses;
  }

 private:
  double Dot(int64_t g, const float* weight, const float* row, double* magnitude) const {
    const int64_t d = f_.input().shape.head_dim;
    double sum = 0;
    *magnitude = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double term = static_cast<double>(f_.queries()[g * d + j]) / weight[j] * row[j];
      sum += term;
      *magnitude += std::abs(term) * f_.input().scale;
    }
    return sum * f_.input().scale;
  }

  void AddToken(const IndexPartView& view, const float* weight, int32_t slot,
                const std::vector<double>& of_cluster) {
    const int64_t d = f_.input().shape.head_dim;
    if (f_.input().codes.bits == 0) return;
    std::vector<float> residual(d);
    const int64_t row = f_.input().kv_head * view.tokens + slot;
    DecodeResiduals(f_.input().codes, d, view.codes.At(row), weight + d, weight + 2 * d,
                    residual.data(), nullptr);
    std::vector<double>& logits = tokens_[*view.positions.As<int32_t>(row)];
    for (int64_t g = 0; g < group_; ++g) {
      double magnitude = 0;
      logits.push_back(of_cluster[g] + Dot(g, weight, residual.data(), &magnitude));
      error_ = std::max(error_, 3 * magnitude);  // low + scale code may cancel
    }
  }

  SelectFixture& f_;
  const int64_t group_;
  double error_ = 0;
  std::map<int64_t, double> clusters_;
  std::map<std::pair<int64_t, int64_t>, double> head_clusters_;
  std::map<int32_t, std::vector<double>> tokens_;
};

// The clusters by rank, scored and estimated ones, are equal up to near ties.
void ExpectSameRanking(const HeadSelection& fast, const HeadSelection& plain,
                       const Masses& masses) {
  const auto ranking = [](const HeadSelection& selection) {
    std::vector<int32_t> ranked = selection.scored_clusters;
    ranked.insert(ranked.end(), selection.estimated_clusters.begin(),
                  selection.estimated_clusters.end());
    return ranked;
  };
  const std::vector<int32_t> a = ranking(fast), b = ranking(plain);
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    if (a[i] == b[i]) continue;
    const double difference = std::abs(masses.cluster(a[i]) - masses.cluster(b[i]));
    ASSERT_FALSE(!(difference <= 2 * masses.mass_error()))
        << "rank " << i << ": " << a[i] << " and " << b[i] << " are " << difference << " apart";
  }
  // A tie between clusters of different size may move the end of the scored ones, nothing else may.
  if (a == b) {
    ASSERT_EQ(fast.scored_clusters, plain.scored_clusters);
  }
}

// The positions of the scored tokens, as the contract says: whole clusters, the last one cut.
std::vector<int32_t> ScoredPositions(SelectFixture& f, const SelectParams& params,
                                     const HeadSelection& selection) {
  int64_t left = std::max(params.scored_tokens,
                          std::max<int64_t>(0, params.budget_tokens - SelectFixture::kSinks));
  std::vector<int32_t> positions;
  for (int32_t id : selection.scored_clusters) {
    int64_t p = 0, c = id;
    while (c >= f.part(p).view().clusters) c -= f.part(p++).view().clusters;
    const IndexPartView& view = f.part(p).view();
    const int64_t row = f.input().kv_head * (view.clusters + 1) + c;
    for (int32_t slot = *view.cluster_begin.As<int32_t>(row);
         slot < *view.cluster_begin.As<int32_t>(row + 1) && left > 0; ++slot, --left) {
      positions.push_back(*view.positions.As<int32_t>(f.input().kv_head * view.tokens + slot));
    }
  }
  return positions;
}

void ExpectSameExactZone(SelectFixture& f, const SelectParams& params, const HeadSelection& fast,
                         const HeadSelection& plain, const Masses& masses) {
  ASSERT_EQ(fast.positions.size(), plain.positions.size());
  ASSERT_TRUE(std::is_sorted(fast.positions.begin(), fast.positions.end()));
  if (fast.positions == plain.positions) {
    EXPECT_EQ(fast.parts, plain.parts);
    EXPECT_EQ(fast.slots, plain.slots);
    EXPECT_EQ(fast.clusters, plain.clusters);
    EXPECT_EQ(fast.head_masks, plain.head_masks);
    return;
  }
  ASSERT_GT(params.scored_tokens, 0) << "without scores only clusters can tie";
  const auto mass = masses.TokensOf(ScoredPositions(f, params, plain));
  std::vector<int32_t> only_fast, only_plain;
  std::set_difference(fast.positions.begin(), fast.positions.end(), plain.positions.begin(),
                      plain.positions.end(), std::back_inserter(only_fast));
  std::set_difference(plain.positions.begin(), plain.positions.end(), fast.positions.begin(),
                      fast.positions.end(), std::back_inserter(only_plain));
  for (int32_t a : only_fast) {
    for (int32_t b : only_plain) {
      const double difference = std::abs(mass.at(a) - mass.at(b));
      ASSERT_FALSE(!(difference <= 2 * masses.mass_error())) << a << " for " << b;
    }
  }
}

void ExpectSameState(SelectFixture& f, const HeadSelection& fast, const HeadSelection& plain,
                     const Masses& masses) {
  const int64_t d = f.input().shape.head_dim;
  float largest = 0;
  for (int64_t p = 0; p < f.parts(); ++p) {
    for (float v : f.part(p).spec().values) largest = std::max(largest, std::abs(v));
  }
  ASSERT_EQ(fast.state_lse.size(), plain.state_lse.size());
  ASSERT_EQ(fast.state_output.size(), plain.state_output.size());
  for (size_t g = 0; g < plain.state_lse.size(); ++g) {
    if (std::isinf(plain.state_lse[g])) {
      EXPECT_EQ(fast.state_lse[g], plain.state_lse[g]);
    } else {
      // Besides the logits' error, a sum of all the weights.
      const double bound = masses.logit_error() + std::abs(plain.state_lse[g]) * 0x1p-22 +
                           static_cast<double>(f.tokens()) * 0x1p-24;
      ASSERT_FALSE(!(std::abs(fast.state_lse[g] - plain.state_lse[g]) <= bound))
          << fast.state_lse[g] << " " << plain.state_lse[g] << " bound " << bound;
    }
    // Weights are off by a factor exp(± 2 logit errors), and each weighted value is rounded.
    const double bound =
        largest * (4 * masses.logit_error() + static_cast<double>(f.tokens()) * 0x1p-23);
    for (int64_t j = 0; j < d; ++j) {
      const size_t i = g * d + j;
      ASSERT_FALSE(!(std::abs(fast.state_output[i] - plain.state_output[i]) <= bound))
          << "head " << g << " channel " << j << ": " << fast.state_output[i] << " "
          << plain.state_output[i] << " bound " << bound;
    }
  }
}

// `masses` are of the fixture's present queries.
void Compare(SelectFixture& f, const Masses& masses, const SelectParams& params,
             SelectScratch& scratch) {
  HeadSelection fast, plain;
  ASSERT_TRUE(Select(params, f.input(), scratch, &fast).ok());
  ASSERT_TRUE(SelectReference(params, f.input(), &plain).ok());
  ExpectSameRanking(fast, plain, masses);
  if (::testing::Test::HasFatalFailure()) return;
  // Where near ties put another cluster last, other tokens are scored: nothing more to compare.
  auto fast_scored = ScoredPositions(f, params, fast);
  auto plain_scored = ScoredPositions(f, params, plain);
  std::sort(fast_scored.begin(), fast_scored.end());
  std::sort(plain_scored.begin(), plain_scored.end());
  if (fast_scored != plain_scored) return;
  EXPECT_EQ(fast.coded_tokens, plain.coded_tokens);
  ExpectSameExactZone(f, params, fast, plain, masses);
  if (fast.positions == plain.positions) ExpectSameState(f, fast, plain, masses);
}

// Two parts: a prompt, and a window that inherits its channels.
std::vector<TestPartSpec> TwoParts(const KvShape& shape, const CodesParams& codes, uint32_t seed,
                                   bool weighted) {
  TestPartSpec prompt = PlantedPart(shape, codes, 701, 43, seed, /*empty_clusters=*/true);
  prompt.first_token = SelectFixture::kSinks;
  if (weighted) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(0.3f, 3.0f);
    prompt.metric_weight.resize(shape.kv_heads * shape.head_dim);
    for (float& w : prompt.metric_weight) w = uniform(random);
  }
  TestPartSpec window = PlantedPart(shape, codes, 61, 4, seed + 1);
  window.first_token = prompt.first_token + prompt.tokens;
  window.metric_weight = prompt.metric_weight;
  const testing::TestIndexPart built(prompt);
  const int64_t d = shape.head_dim;
  for (int64_t h = 0; h < shape.kv_heads; ++h) {
    const float* channels = built.channels().data() + h * 3 * d;
    window.key_balance.insert(window.key_balance.end(), channels + d, channels + 2 * d);
    window.value_balance.insert(window.value_balance.end(), channels + 2 * d, channels + 3 * d);
  }
  return {prompt, window};
}

struct ShapeCase {
  int64_t group;
  int64_t head_dim;
  CodesParams codes;
};

class SelectCompareTest : public ::testing::TestWithParam<ShapeCase> {};

TEST_P(SelectCompareTest, SharedModesAgreeWithTheReference) {
  const ShapeCase& c = GetParam();
  SelectScratch scratch;
  for (uint32_t seed = kSeed; seed < kSeed + 2; ++seed) {
    SCOPED_TRACE(seed);
    SelectFixture f(TwoParts(MakeShape(2, c.group, c.head_dim), c.codes, seed, seed % 2 == 0),
                    seed);
    for (int64_t kv_head : {0, 1}) {
      f.input().kv_head = kv_head;
      f.NewQueries(kv_head == 0 ? 4.0f : 1.0f);
      const Masses masses(f);
      for (const SelectParams& params :
           {SelectParams{SelectMode::kSharedPerKvHead, 64, 256, true, 0.25f},
            SelectParams{SelectMode::kSharedPerKvHead, 128, 300, false, 0.25f},
            SelectParams{SelectMode::kSharedPerKvHead, 200, 0, true, 0.5f},
            SelectParams{SelectMode::kSharedPerKvHead, 16, 100, true, 1.0f},
            SelectParams{SelectMode::kSharedPerKvHead, 300, 8, true, 0.0f},
            SelectParams{SelectMode::kSharedPerKvHead, 100'000, 64, true, 0.25f}}) {
        SCOPED_TRACE(::testing::Message()
                     << "budget " << params.budget_tokens << " scored " << params.scored_tokens);
        Compare(f, masses, params, scratch);
        if (HasFatalFailure()) return;
      }
    }
  }
}

std::vector<ShapeCase> Shapes() {
  std::vector<ShapeCase> shapes;
  for (int64_t group = 1; group <= 8; ++group) shapes.push_back({group, 128, {2, 32}});
  for (int64_t head_dim : {16, 32, 64, 80, 96, 112, 256}) {
    for (int bits : {2, 3, 4}) {
      const int whole = static_cast<int>(head_dim);
      shapes.push_back({4, head_dim, {bits, head_dim % 32 == 0 ? 32 : 16}});
      shapes.push_back({3, head_dim, {bits, whole}});
    }
  }
  for (int bits : {2, 3, 4}) {
    shapes.push_back({4, 128, {bits, 128}});
    shapes.push_back({2, 80, {bits, 20}});  // groups that end inside a vector
    shapes.push_back({5, 96, {bits, 24}});
  }
  shapes.push_back({32, 64, {2, 32}});
  return shapes;
}

INSTANTIATE_TEST_SUITE_P(Shapes, SelectCompareTest, ::testing::ValuesIn(Shapes()),
                         [](const auto& info) {
                           const ShapeCase& c = info.param;
                           return absl::StrCat("G", c.group, "D", c.head_dim, "Bits", c.codes.bits,
                                               "Group", c.codes.group_channels);
                         });

TEST(SelectCompareTest, EveryInstructionSetAgreesWithTheReference) {
  SelectFixture f(TwoParts(MakeShape(1, 4, 128), {2, 32}, kSeed, true), kSeed);
  SelectFixture odd(TwoParts(MakeShape(1, 3, 80), {3, 16}, kSeed, true), kSeed);
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    SelectScratch scratch;
    Compare(f, Masses(f), {SelectMode::kSharedPerKvHead, 64, 256, true, 0.25f}, scratch);
    Compare(odd, Masses(odd), {SelectMode::kSharedPerKvHead, 64, 256, true, 0.25f}, scratch);
  }
  hwy::SetSupportedTargetsForTest(0);
}

// Each head's ranking is by cluster alone, so that only clusters can tie: compare when none does.
TEST(SelectCompareTest, ThePublishedModeAgreesWithTheReference) {
  int compared = 0;
  for (int64_t group : {1, 4, 7, 32}) {
    for (uint32_t seed = kSeed; seed < kSeed + 8; ++seed) {
      SelectFixture f(TwoParts(MakeShape(2, group, 64), {0, 32}, seed, seed % 2 == 0), seed);
      f.input().kv_head = seed % 2;
      f.NewQueries(1.0f);
      SelectScratch scratch;
      for (int64_t budget : {16, 17, 97, 500, 5000}) {
        const SelectParams params{SelectMode::kPerQueryHead, budget, 0, false, 0.0f};
        HeadSelection fast, plain;
        ASSERT_TRUE(Select(params, f.input(), scratch, &fast).ok());
        ASSERT_TRUE(SelectReference(params, f.input(), &plain).ok());
        if (fast.positions != plain.positions || fast.head_masks != plain.head_masks) continue;
        EXPECT_EQ(fast.parts, plain.parts);
        EXPECT_EQ(fast.slots, plain.slots);
        EXPECT_EQ(fast.clusters, plain.clusters);
        EXPECT_EQ(fast.state_lse, plain.state_lse);
        ++compared;
      }
    }
  }
  EXPECT_GE(compared, 158) << "of 160: near ties are rare";
}

// Masses far below the smallest float: their order is still that of the logits.
TEST(SelectCompareTest, RanksBelowTheSmallestFloatKeepTheirOrder) {
  for (uint32_t seed = kSeed; seed < kSeed + 5; ++seed) {
    SelectFixture f(TwoParts(MakeShape(1, 2, 64), {2, 32}, seed, false), seed);
    f.NewQueries(40.0f);
    SelectScratch scratch;
    Compare(f, Masses(f), {SelectMode::kSharedPerKvHead, 64, 512, true, 0.5f}, scratch);
    HeadSelection selection;
    ASSERT_TRUE(
        Select({SelectMode::kSharedPerKvHead, 64, 512, true, 0.5f}, f.input(), scratch, &selection)
            .ok());
    EXPECT_LT(Masses(f).cluster(selection.scored_clusters.back()), -150.0);
  }
}

}  // namespace
}  // namespace clusterkv::kernels
