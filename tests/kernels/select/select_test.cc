// What Select promises, checked on Select and on its reference alike.
#include "kernels/select/select.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/testing/select_fixture.h"

namespace clusterkv::kernels {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::MakeShape;
using testing::PlantedPart;
using testing::SelectFixture;
using testing::TestPartSpec;

constexpr uint32_t kSeed = 20241205;
constexpr int64_t kSinks = SelectFixture::kSinks;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr SelectMode kShared = SelectMode::kSharedPerKvHead;
constexpr SelectMode kPerHead = SelectMode::kPerQueryHead;

std::vector<TestPartSpec> OnePart(TestPartSpec spec) {
  spec.first_token = kSinks;
  return {std::move(spec)};
}

enum class Version { kFast, kReference };

class SelectTest : public ::testing::TestWithParam<Version> {
 protected:
  absl::Status TrySelect(const SelectParams& params, const SelectInput& input,
                         HeadSelection* selection) {
    if (GetParam() == Version::kReference) return SelectReference(params, input, selection);
    return Select(params, input, scratch_, selection);
  }
  HeadSelection Do(const SelectParams& params, SelectFixture& f) {
    HeadSelection selection;
    const absl::Status status = TrySelect(params, f.input(), &selection);
    EXPECT_TRUE(status.ok()) << status;
    return selection;
  }

 private:
  SelectScratch scratch_;
};

INSTANTIATE_TEST_SUITE_P(Versions, SelectTest,
                         ::testing::Values(Version::kFast, Version::kReference),
                         [](const auto& info) {
                           return info.param == Version::kFast ? "Fast" : "Reference";
                         });

// Positions of a cluster, ascending; clusters counted over the parts.
std::vector<int32_t> Members(SelectFixture& f, int64_t cluster) {
  int64_t p = 0;
  while (cluster >= f.part(p).view().clusters) cluster -= f.part(p++).view().clusters;
  const TestPartSpec& spec = f.part(p).spec();
  std::vector<int32_t> members;
  for (int64_t t = 0; t < spec.tokens; ++t) {
    if (spec.labels[f.input().kv_head][t] == cluster) {
      members.push_back(static_cast<int32_t>(spec.first_token + t));
    }
  }
  return members;
}

double LogSumExp(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double v : x) sum += std::exp(v - max);
  return max + std::log(sum);
}

// The mean of the members' logits plus log of their number: what an estimated cluster counts.
double EstimatedLogit(SelectFixture& f, int64_t g, const std::vector<int32_t>& members) {
  double sum = 0;
  for (int32_t position : members) sum += f.Logit(g, f.Key(position));
  const double size = static_cast<double>(members.size());
  return sum / size + std::log(size);
}

TEST_P(SelectTest, ACentroidsScoreIsTheMeanOfItsMembersLogits) {
  for (bool weighted : {false, true}) {
    TestPartSpec spec = PlantedPart(MakeShape(1, 4, 128), {0, 32}, 211, 1, kSeed);
    if (weighted) {
      std::mt19937 random(kSeed);
      std::uniform_real_distribution<float> uniform(0.1f, 10.0f);
      spec.metric_weight.resize(128);
      for (float& w : spec.metric_weight) w = uniform(random);
    }
    SelectFixture f(OnePart(spec), kSeed);
    // Everything is estimated: the log-sum-exp is the one cluster's score and log size.
    const HeadSelection selection = Do({kShared, kSinks, 0, true, 1.0f}, f);
    ASSERT_THAT(selection.estimated_clusters, ElementsAre(0));
    const std::vector<int32_t> members = Members(f, 0);
    std::vector<double> keys(128), values(128);
    for (int32_t position : members) {
      for (int64_t j = 0; j < 128; ++j) {
        keys[j] += f.Key(position)[j] / 211.0;
        values[j] += f.Value(position)[j] / 211.0;
      }
    }
    // Centroid and value mean were rounded to halves: by at most 2^-11 of each channel's size.
    constexpr double kHalf = 0x1p-11;
    for (int64_t g = 0; g < 4; ++g) {
      double rounding = 0;
      for (int64_t j = 0; j < 128; ++j) {
        rounding += kHalf * f.input().scale * std::abs(f.queries()[g * 128 + j] * keys[j]);
        EXPECT_NEAR(selection.state_output[g * 128 + j], values[j],
                    1e-5 + kHalf * std::abs(values[j]));
      }
      EXPECT_NEAR(selection.state_lse[g], EstimatedLogit(f, g, members), 1e-4 + rounding);
    }
  }
}

TEST_P(SelectTest, TheEstimationIsALowerBoundOfTheMassItStandsFor) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(2, 4, 64), {0, 32}, 613, 37, kSeed)), kSeed);
  const HeadSelection selection = Do({kShared, kSinks, 0, true, 1.0f}, f);
  for (int64_t g = 0; g < 4; ++g) {
    std::vector<double> logits;
    for (int64_t t = 0; t < f.tokens(); ++t) logits.push_back(f.Logit(g, f.Key(kSinks + t)));
    EXPECT_LT(selection.state_lse[g], LogSumExp(logits) + 1e-5);  // Jensen
    EXPECT_GT(selection.state_lse[g], LogSumExp(logits) - 3);     // and not far below it
  }
}

TEST_P(SelectTest, ABudgetBeyondTheContextTakesEveryTokenOnce) {
  for (const SelectParams& params :
       {SelectParams{kShared, 1000, 0, true, 0.25f}, SelectParams{kShared, 1000, 2048, true, 0.25f},
        SelectParams{kShared, 613 + kSinks, 300, false, 1.0f},
        SelectParams{kPerHead, 613 + kSinks, 0, false, 0.0f}}) {
    SelectFixture f(OnePart(PlantedPart(MakeShape(2, 4, 64), {2, 32}, 613, 37, kSeed, true)), 7);
    f.input().kv_head = 1;
    const HeadSelection selection = Do(params, f);
    std::vector<int32_t> all(613);
    std::iota(all.begin(), all.end(), static_cast<int32_t>(kSinks));
    EXPECT_EQ(selection.positions, all);
    EXPECT_EQ(selection.coded_tokens, 0);
    EXPECT_THAT(selection.estimated_clusters, IsEmpty());
    EXPECT_THAT(selection.state_lse, ::testing::Each(-kInfinity));
    EXPECT_THAT(selection.state_output, ::testing::Each(0.0f));
    if (params.mode == kPerHead) {
      EXPECT_THAT(selection.head_masks, ::testing::Each(0xfu));
    }
  }
}

TEST_P(SelectTest, ExactlyTheBudgetIsExactAndSinksCountIntoIt) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {2, 32}, 613, 37, kSeed)), kSeed);
  for (int64_t budget : {1, 15, 16, 17, 31, 64, 128, 628, 629}) {
    const size_t expected = static_cast<size_t>(std::max<int64_t>(0, budget - kSinks));
    for (int64_t scored : {0, 5, 200}) {
      EXPECT_EQ(Do({kShared, budget, scored, true, 0.25f}, f).positions.size(), expected);
    }
  }
}

TEST_P(SelectTest, ZonesAreDisjointAndNothingScoredIsLost) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(2, 4, 64), {2, 32}, 613, 37, kSeed, true)), kSeed);
  for (int64_t scored : {0, 100, 333}) {
    const SelectParams params{kShared, 64, scored, true, 1.0f};
    const HeadSelection selection = Do(params, f);
    const int64_t taken = std::max<int64_t>(scored, 64 - kSinks);
    EXPECT_EQ(selection.coded_tokens + static_cast<int64_t>(selection.positions.size()), taken);
    std::set<int32_t> touched(selection.scored_clusters.begin(), selection.scored_clusters.end());
    EXPECT_EQ(touched.size(), selection.scored_clusters.size());
    int64_t covered = 0;
    for (int32_t cluster : selection.scored_clusters) covered += Members(f, cluster).size();
    EXPECT_GE(covered, taken);
    EXPECT_LT(covered - static_cast<int64_t>(Members(f, selection.scored_clusters.back()).size()),
              taken);
    for (int32_t cluster : selection.estimated_clusters) {
      EXPECT_FALSE(touched.count(cluster)) << cluster;
      covered += Members(f, cluster).size();
    }
    EXPECT_EQ(covered, f.tokens());  // all other clusters are estimated
    for (size_t i = 0; i < selection.positions.size(); ++i) {
      EXPECT_TRUE(touched.count(selection.clusters[i]));
      const std::vector<int32_t> members = Members(f, selection.clusters[i]);
      EXPECT_TRUE(std::count(members.begin(), members.end(), selection.positions[i]));
    }
  }
}

TEST_P(SelectTest, PartsAndSlotsLeadToTheToken) {
  TestPartSpec prompt = PlantedPart(MakeShape(2, 2, 32), {2, 32}, 307, 19, kSeed);
  TestPartSpec window = PlantedPart(MakeShape(2, 2, 32), {2, 32}, 83, 5, kSeed + 1);
  prompt.first_token = kSinks;
  window.first_token = kSinks + 307;
  window.key_balance.assign(64, 1.0f), window.value_balance.assign(64, 1.0f);
  prompt.key_balance = window.key_balance, prompt.value_balance = window.value_balance;
  SelectFixture f({prompt, window}, kSeed);
  f.input().kv_head = 1;
  const HeadSelection selection = Do({kShared, 200, 300, true, 0.25f}, f);
  ASSERT_EQ(selection.positions.size(), 184u);
  std::set<int32_t> parts;
  for (size_t i = 0; i < selection.positions.size(); ++i) {
    const IndexPartView& view = f.part(selection.parts[i]).view();
    const int64_t row = 1 * view.tokens + selection.slots[i];
    EXPECT_EQ(*view.positions.As<int32_t>(row), selection.positions[i]);
    parts.insert(selection.parts[i]);
  }
  EXPECT_EQ(parts.size(), 2u);
}

// One cluster per token's label: 8 clusters of equal keys, so that everything ties within them.
TestPartSpec EqualClusters(int64_t clusters, int64_t size, bool all_equal) {
  TestPartSpec spec = PlantedPart(MakeShape(1, 1, 16), {2, 16}, clusters * size, clusters, kSeed);
  for (int64_t t = 0; t < spec.tokens; ++t) {
    spec.labels[0][t] = static_cast<int32_t>(t % clusters);
    for (int64_t j = 0; j < 16; ++j) {
      spec.keys[t * 16 + j] = j == 0 ? (all_equal ? 1.0f : static_cast<float>(t % clusters)) : 0.0f;
    }
  }
  return spec;
}

TEST_P(SelectTest, TiesGoToTheLowerClusterThenTheLowerPosition) {
  SelectFixture f(OnePart(EqualClusters(8, 4, true)), kSeed);
  f.queries().assign(16, 1.0f);
  // All clusters and all tokens tie. 10 scored: clusters 0, 1 and half of 2.
  const HeadSelection selection = Do({kShared, kSinks + 3, 10, true, 0.25f}, f);
  EXPECT_THAT(selection.scored_clusters, ElementsAre(0, 1, 2));
  EXPECT_THAT(selection.estimated_clusters, ElementsAre(3, 4));
  // Scored are 16, 24, 32, 40 (cluster 0), 17, 25, 33, 41 and 18, 26.
  EXPECT_THAT(selection.positions, ElementsAre(16, 17, 18));
}

TEST_P(SelectTest, OfTheLastClusterTheLowestPositionsAreTaken) {
  SelectFixture f(OnePart(EqualClusters(8, 4, false)), kSeed);
  f.queries().assign(16, 1.0f);
  for (SelectMode mode : {kShared, kPerHead}) {
    // Cluster 7 is the best, then 6: its positions are 22, 30, 38, 46.
    const HeadSelection selection = Do({mode, kSinks + 6, 0, true, 0.0f}, f);
    EXPECT_THAT(selection.positions, ElementsAre(22, 23, 30, 31, 39, 47));
  }
}

TEST_P(SelectTest, FewerScoredTokensThanTheBudgetsOwnScoresThose) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 2, 32), {2, 32}, 307, 19, kSeed)), kSeed);
  const HeadSelection few = Do({kShared, 120, 8, true, 0.25f}, f);
  const HeadSelection same = Do({kShared, 120, 104, true, 0.25f}, f);
  EXPECT_EQ(few.positions.size(), 104u);
  EXPECT_EQ(few.positions, same.positions);
  EXPECT_EQ(few.coded_tokens, 0);
  EXPECT_EQ(few.state_lse, same.state_lse);
}

TEST_P(SelectTest, TheEstimatedShareCountsEmptyClustersButTakesNone) {
  TestPartSpec spec = PlantedPart(MakeShape(1, 2, 32), {2, 32}, 307, 40, kSeed);
  for (int32_t& label : spec.labels[0]) label %= 20;  // clusters 20 to 39 are empty
  SelectFixture f(OnePart(spec), kSeed);
  for (const auto& [fraction, expected] :
       {std::pair{0.0f, 0}, {0.024f, 0}, {0.025f, 1}, {0.25f, 10}, {0.5f, 20}, {1.0f, 20}}) {
    const HeadSelection selection = Do({kShared, kSinks, 0, true, fraction}, f);
    EXPECT_EQ(selection.estimated_clusters.size(), static_cast<size_t>(expected)) << fraction;
    for (int32_t cluster : selection.estimated_clusters) EXPECT_LT(cluster, 20);
  }
}

TEST_P(SelectTest, ScoredTokensThatAreNotAnsweredDropOut) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 2, 32), {2, 32}, 307, 19, kSeed)), kSeed);
  const HeadSelection answered = Do({kShared, 64, 200, true, 0.0f}, f);
  const HeadSelection dropped = Do({kShared, 64, 200, false, 0.0f}, f);
  EXPECT_EQ(answered.positions, dropped.positions);
  EXPECT_EQ(answered.scored_clusters, dropped.scored_clusters);
  EXPECT_EQ(answered.coded_tokens, 152);
  EXPECT_EQ(dropped.coded_tokens, 0);
  EXPECT_THAT(dropped.state_lse, ::testing::Each(-kInfinity));
  EXPECT_THAT(dropped.state_output, ::testing::Each(0.0f));
}

// Full attention over a group of tokens, per query head: output [group, head_dim] and log-sum-exp.
struct Attention {
  std::vector<double> output, lse;
};
Attention FullAttention(SelectFixture& f, const std::vector<int32_t>& positions) {
  const int64_t d = f.input().shape.head_dim;
  Attention attention;
  for (int64_t g = 0; g < f.input().shape.group(); ++g) {
    std::vector<double> logits;
    for (int32_t position : positions) logits.push_back(f.Logit(g, f.Key(position)));
    attention.lse.push_back(LogSumExp(logits));
    std::vector<double> output(d, 0.0);
    for (size_t i = 0; i < positions.size(); ++i) {
      const double weight = std::exp(logits[i] - attention.lse.back());
      for (int64_t j = 0; j < d; ++j) output[j] += weight * f.Value(positions[i])[j];
    }
    attention.output.insert(attention.output.end(), output.begin(), output.end());
  }
  return attention;
}

TEST_P(SelectTest, TheStateAnswersForTheTokensThatAreNotExact) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(2, 4, 128), {4, 32}, 613, 37, kSeed)), kSeed);
  f.input().kv_head = 1;
  // Everything is scored: the state stands for all tokens but the exact ones.
  const HeadSelection selection = Do({kShared, 64, 2048, true, 0.25f}, f);
  ASSERT_EQ(selection.coded_tokens, 613 - 48);
  std::vector<int32_t> rest;
  for (int32_t p = kSinks; p < kSinks + 613; ++p) {
    if (!std::binary_search(selection.positions.begin(), selection.positions.end(), p)) {
      rest.push_back(p);
    }
  }
  const Attention expected = FullAttention(f, rest);
  double difference = 0, norm = 0;
  for (int64_t g = 0; g < 4; ++g) {
    EXPECT_NEAR(selection.state_lse[g], expected.lse[g], 0.02);
    for (int64_t j = 0; j < 128; ++j) {
      const double x = expected.output[g * 128 + j];
      difference += std::pow(selection.state_output[g * 128 + j] - x, 2);
      norm += x * x;
    }
  }
  EXPECT_LT(std::sqrt(difference / norm), 0.02) << "4-bit codes";
}

TEST_P(SelectTest, ExactTokensAreThoseOfTheLargestSummedSoftmax) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {4, 32}, 400, 25, kSeed)), kSeed);
  const HeadSelection selection = Do({kShared, 16 + 20, 400, true, 0.0f}, f);
  std::vector<std::pair<double, int32_t>> mass(400);
  for (int32_t t = 0; t < 400; ++t) mass[t] = {0.0, static_cast<int32_t>(kSinks) + t};
  for (int64_t g = 0; g < 4; ++g) {
    std::vector<double> logits;
    for (int64_t t = 0; t < 400; ++t) logits.push_back(f.Logit(g, f.Key(kSinks + t)));
    for (int64_t t = 0; t < kSinks; ++t) {
      logits.push_back(f.Logit(g, f.sinks().data() + t * 64));
    }
    const double lse = LogSumExp(logits);
    for (int64_t t = 0; t < 400; ++t) mass[t].first += std::exp(logits[t] - lse);
  }
  std::sort(mass.rbegin(), mass.rend());
  // Codes of 4 bits may swap neighbours of the last place, not more.
  int found = 0;
  for (int i = 0; i < 20; ++i) {
    found +=
        std::binary_search(selection.positions.begin(), selection.positions.end(), mass[i].second);
  }
  EXPECT_GE(found, 18);
}

TEST_P(SelectTest, SinksNormaliseTheSoftmaxOfEachHead) {
  // Head 0 attends to the sinks and hardly to tokens, head 1 to tokens: head 1 decides.
  TestPartSpec spec = PlantedPart(MakeShape(1, 2, 16), {4, 16}, 40, 4, kSeed);
  for (float& key : spec.keys) key = 0;
  for (int64_t t = 0; t < 40; ++t) {
    spec.labels[0][t] = static_cast<int32_t>(t / 10);
    spec.keys[t * 16 + 0] = t == 3 ? 1.0f : 0.0f;  // what head 0 would like best
    spec.keys[t * 16 + 1] = t == 7 ? 1.0f : 0.0f;  // what head 1 likes best
  }
  SelectFixture f(OnePart(spec), kSeed);
  f.queries().assign(32, 0.0f);
  f.queries()[0] = 40.0f;
  f.queries()[16 + 1] = 8.0f;
  std::vector<float> sinks(kSinks * 16, 0.0f);
  f.input().sink_keys = reinterpret_cast<const std::byte*>(sinks.data());
  EXPECT_THAT(Do({kShared, kSinks + 1, 40, true, 0.0f}, f).positions, ElementsAre(kSinks + 3));
  sinks[0] = 3.0f;  // now a sink takes head 0's mass
  EXPECT_THAT(Do({kShared, kSinks + 1, 40, true, 0.0f}, f).positions, ElementsAre(kSinks + 7));
}

TEST_P(SelectTest, SinksComeInTheElementTypeOfTheModel) {
  for (ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    SelectFixture f(OnePart(PlantedPart(MakeShape(1, 2, 32), {2, 32}, 307, 19, kSeed)), kSeed);
    std::vector<float> rounded(f.sinks().size());
    std::vector<std::byte> stored(rounded.size() * 2);
    FromFloat(f.sinks().data(), type, static_cast<int64_t>(rounded.size()), stored.data());
    ToFloat(stored.data(), type, static_cast<int64_t>(rounded.size()), rounded.data());
    f.input().sink_keys = reinterpret_cast<const std::byte*>(rounded.data());
    const HeadSelection as_float = Do({kShared, 64, 200, true, 0.25f}, f);
    f.input().shape.element_type = type;
    f.input().sink_keys = stored.data();
    f.input().sink_key_stride_bytes = 64;
    const HeadSelection as_stored = Do({kShared, 64, 200, true, 0.25f}, f);
    EXPECT_EQ(as_float.positions, as_stored.positions);
    EXPECT_EQ(as_float.state_lse, as_stored.state_lse);
    EXPECT_EQ(as_float.state_output, as_stored.state_output);
  }
}

TEST_P(SelectTest, TheUnionHoldsEveryHeadsOwnSetAndSaysWhose) {
  const KvShape shape = MakeShape(1, 5, 64);
  SelectFixture f(OnePart(PlantedPart(shape, {0, 32}, 613, 12, kSeed)), kSeed);
  const SelectParams params{kPerHead, 100, 0, false, 0.0f};
  const HeadSelection together = Do(params, f);
  ASSERT_EQ(together.head_masks.size(), together.positions.size());
  EXPECT_TRUE(std::is_sorted(together.positions.begin(), together.positions.end()));
  const std::vector<float> queries = f.queries();
  f.input().shape = MakeShape(1, 1, 64);
  for (int64_t g = 0; g < 5; ++g) {
    const std::vector<float> own(queries.begin() + g * 64, queries.begin() + (g + 1) * 64);
    f.input().queries = own;
    const HeadSelection alone = Do(params, f);
    EXPECT_EQ(alone.positions.size(), 84u);
    std::vector<int32_t> masked;
    for (size_t i = 0; i < together.positions.size(); ++i) {
      if (together.head_masks[i] >> g & 1) masked.push_back(together.positions[i]);
    }
    EXPECT_EQ(masked, alone.positions);
  }
  for (uint32_t mask : together.head_masks) EXPECT_TRUE(mask != 0 && mask < 32);
}

TEST_P(SelectTest, AGroupOf32HeadsHasABitEach) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 32, 16), {0, 16}, 307, 12, kSeed)), kSeed);
  const HeadSelection selection = Do({kPerHead, 50, 0, false, 0.0f}, f);
  std::vector<int> counts(32, 0);
  for (uint32_t mask : selection.head_masks) {
    for (int g = 0; g < 32; ++g) counts[g] += mask >> g & 1;
  }
  EXPECT_THAT(counts, ::testing::Each(34));
}

// The same clusters as one part or as two: the same answer, to the last bit.
TEST_P(SelectTest, PartsCountAsOneIndex) {
  for (SelectMode mode : {kShared, kPerHead}) {
    const CodesParams codes = mode == kShared ? CodesParams{3, 16} : CodesParams{0, 16};
    TestPartSpec whole = PlantedPart(MakeShape(2, 3, 48), codes, 500, 30, kSeed);
    whole.first_token = kSinks;
    whole.key_balance.assign(96, 0.75f), whole.value_balance.assign(96, 1.25f);
    for (auto& labels : whole.labels) {
      for (int64_t t = 0; t < 500; ++t) {
        labels[t] = t < 380 ? labels[t] % 23 : 23 + labels[t] % 7;
      }
    }
    TestPartSpec first = whole, second = whole;
    first.tokens = 380, first.clusters = 23;
    first.keys.resize(380 * 96), first.values.resize(380 * 96);
    second.first_token = kSinks + 380, second.tokens = 120, second.clusters = 7;
    second.keys.erase(second.keys.begin(), second.keys.begin() + 380 * 96);
    second.values.erase(second.values.begin(), second.values.begin() + 380 * 96);
    for (int64_t h = 0; h < 2; ++h) {
      first.labels[h].resize(380);
      second.labels[h].assign(whole.labels[h].begin() + 380, whole.labels[h].end());
      for (int32_t& label : second.labels[h]) label -= 23;
    }
    SelectFixture one({whole}, kSeed);
    SelectFixture two({first, second}, kSeed);
    one.input().kv_head = two.input().kv_head = 1;
    two.queries() = one.queries();
    const SelectParams params = mode == kShared ? SelectParams{kShared, 64, 200, true, 0.25f}
                                                : SelectParams{kPerHead, 64, 0, false, 0.0f};
    const HeadSelection a = Do(params, one), b = Do(params, two);
    EXPECT_EQ(a.positions, b.positions);
    EXPECT_EQ(a.clusters, b.clusters);
    EXPECT_EQ(a.head_masks, b.head_masks);
    EXPECT_EQ(a.scored_clusters, b.scored_clusters);
    EXPECT_EQ(a.estimated_clusters, b.estimated_clusters);
    EXPECT_EQ(a.state_lse, b.state_lse);
    EXPECT_EQ(a.state_output, b.state_output);
  }
}

TEST_P(SelectTest, WherePagesLieChangesNothing) {
  HeadSelection first;
  for (int64_t page_bytes : {64, 512, 1000, 4096, 1 << 20}) {
    TestPartSpec spec = PlantedPart(MakeShape(2, 4, 96), {2, 32}, 613, 37, kSeed, true);
    spec.page_bytes = page_bytes;
    SelectFixture f(OnePart(spec), kSeed);
    f.input().kv_head = 1;
    const HeadSelection selection = Do({kShared, 64, 256, true, 0.25f}, f);
    if (first.positions.empty()) first = selection;
    EXPECT_EQ(selection.positions, first.positions);
    EXPECT_EQ(selection.slots, first.slots);
    EXPECT_EQ(selection.state_lse, first.state_lse);
    EXPECT_EQ(selection.state_output, first.state_output);
  }
}

TEST_P(SelectTest, RepeatsBitForBitWhateverTheScratchHeldBefore) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {2, 32}, 613, 37, kSeed)), kSeed);
  SelectFixture other(OnePart(PlantedPart(MakeShape(1, 8, 256), {4, 32}, 900, 90, 3)), 3);
  const SelectParams params{kShared, 64, 256, true, 0.25f};
  HeadSelection reused = Do(params, f);
  const HeadSelection first = reused;
  ASSERT_TRUE(TrySelect({kShared, 300, 700, true, 1.0f}, other.input(), &reused).ok());
  ASSERT_TRUE(TrySelect(params, f.input(), &reused).ok());
  EXPECT_EQ(reused.positions, first.positions);
  EXPECT_EQ(reused.parts, first.parts);
  EXPECT_EQ(reused.slots, first.slots);
  EXPECT_EQ(reused.clusters, first.clusters);
  EXPECT_EQ(reused.scored_clusters, first.scored_clusters);
  EXPECT_EQ(reused.estimated_clusters, first.estimated_clusters);
  EXPECT_EQ(reused.coded_tokens, first.coded_tokens);
  EXPECT_EQ(reused.state_lse, first.state_lse);
  EXPECT_EQ(reused.state_output, first.state_output);
}

TEST_P(SelectTest, WithoutPartsThereIsNothingToSelect) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {2, 32}, 61, 3, kSeed)), kSeed);
  f.input().parts = {};
  const HeadSelection selection = Do({kShared, 64, 256, true, 0.25f}, f);
  EXPECT_THAT(selection.positions, IsEmpty());
  EXPECT_THAT(selection.state_lse, ElementsAre(-kInfinity, -kInfinity, -kInfinity, -kInfinity));
}

TEST_P(SelectTest, OneTokenIsEnough) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {2, 32}, 1, 1, kSeed)), kSeed);
  EXPECT_THAT(Do({kShared, 64, 256, true, 0.25f}, f).positions, ElementsAre(kSinks));
  const HeadSelection coded = Do({kShared, 16, 256, true, 0.25f}, f);
  EXPECT_EQ(coded.coded_tokens, 1);
  for (int64_t g = 0; g < 4; ++g) {
    EXPECT_NEAR(coded.state_lse[g], f.Logit(g, f.Key(kSinks)), 1e-4);
  }
}

TEST_P(SelectTest, WithoutSinksTheWholeBudgetIsTokens) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {2, 32}, 307, 19, kSeed)), kSeed);
  f.input().sink_tokens = 0;
  f.input().sink_keys = nullptr;
  EXPECT_EQ(Do({kShared, 64, 256, true, 0.25f}, f).positions.size(), 64u);
}

TEST_P(SelectTest, QueriesThatAreNotFiniteAreNamed) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(2, 4, 64), {2, 32}, 307, 19, kSeed)), kSeed);
  f.input().kv_head = 1;
  HeadSelection selection;
  for (float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    f.queries()[2 * 64 + 17] = bad;
    const absl::Status status = TrySelect({}, f.input(), &selection);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("query head 6, channel 17"));
  }
}

TEST_P(SelectTest, QueriesOfTheWrongShapeAreRefused) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 4, 64), {2, 32}, 307, 19, kSeed)), kSeed);
  HeadSelection selection;
  for (size_t floats : {0, 64, 255, 257}) {
    const std::vector<float> queries(floats, 1.0f);
    f.input().queries = queries;
    const absl::Status status = TrySelect({}, f.input(), &selection);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("got ", floats)));
  }
}

TEST_P(SelectTest, QueriesWhoseLogitsOverflowAreRefused) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 2, 64), {2, 32}, 307, 19, kSeed)), kSeed);
  for (int64_t j = 64; j < 128; ++j) f.queries()[j] *= 1e38f;
  HeadSelection selection;
  const absl::Status status = TrySelect({}, f.input(), &selection);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("query head 1"));
}

TEST(SelectParamsTest, BadFieldsAreNamed) {
  const CodesParams codes{2, 32};
  EXPECT_TRUE(ValidateSelectParams({}, codes).ok());
  EXPECT_TRUE(ValidateSelectParams({kPerHead, 1, 0, true, 0.0f}, {0, 0}).ok());
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const struct {
    SelectParams params;
    CodesParams codes;
    const char* field;
  } kBad[] = {
      {{kShared, 0, 0, true, 0}, codes, "budget_tokens"},
      {{kShared, -5, 0, true, 0}, codes, "budget_tokens"},
      {{kShared, 64, -1, true, 0}, codes, "scored_tokens"},
      {{kShared, 64, 1, true, 0}, {0, 32}, "scored_tokens"},
      {{kShared, 64, 0, true, -0.1f}, codes, "estimated_fraction"},
      {{kShared, 64, 0, true, 1.1f}, codes, "estimated_fraction"},
      {{kShared, 64, 0, true, nan}, codes, "estimated_fraction"},
      {{kPerHead, 64, 8, true, 0}, codes, "scored_tokens"},
      {{kPerHead, 64, 0, true, 0.25f}, codes, "estimated_fraction"},
      {{static_cast<SelectMode>(7), 64, 0, true, 0}, codes, "mode"},
  };
  for (const auto& bad : kBad) {
    const absl::Status status = ValidateSelectParams(bad.params, bad.codes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad.field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.field));
  }
}

TEST(SelectScratchTest, Moves) {
  SelectFixture f(OnePart(PlantedPart(MakeShape(1, 2, 32), {2, 32}, 61, 3, kSeed)), kSeed);
  SelectScratch a;
  HeadSelection selection;
  ASSERT_TRUE(Select({}, f.input(), a, &selection).ok());
  SelectScratch b(std::move(a));
  ASSERT_TRUE(Select({}, f.input(), b, &selection).ok());
  SelectScratch c;
  c = std::move(b);
  ASSERT_TRUE(Select({}, f.input(), c, &selection).ok());
}

}  // namespace
}  // namespace clusterkv::kernels
