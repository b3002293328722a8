// How many of the tokens that matter are selected: against Quest's pages on clustered keys, and
// against chance on keys without structure.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/index/index.h"
#include "kernels/select/select.h"
#include "tests/kernels/index/built_part.h"

namespace clusterkv::kernels {
namespace {

constexpr int64_t kTokens = 4096;
constexpr int64_t kHeadDim = 64;
constexpr int64_t kGroup = 4;
constexpr int64_t kQueries = 16;
constexpr uint32_t kSeed = 77;

// One KV head over kTokens, no sinks.
struct Context {
  std::vector<float> keys;                  // [kTokens, kHeadDim]
  std::vector<std::vector<float>> queries;  // [kQueries][kGroup, kHeadDim]
};

// Topics that come back all over the text; queries look for one of them each.
Context ClusteredContext() {
  constexpr int64_t kTopics = 64;
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  std::vector<float> topics(kTopics * kHeadDim);
  for (float& x : topics) x = normal(random);
  Context context;
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t topic = static_cast<int64_t>(random() % kTopics);
    for (int64_t j = 0; j < kHeadDim; ++j) {
      context.keys.push_back(topics[topic * kHeadDim + j] + 0.3f * normal(random));
    }
  }
  for (int64_t i = 0; i < kQueries; ++i) {
    std::vector<float> queries;
    for (int64_t g = 0; g < kGroup; ++g) {
      const int64_t topic = static_cast<int64_t>(random() % kTopics);
      for (int64_t j = 0; j < kHeadDim; ++j) {
        queries.push_back(topics[topic * kHeadDim + j] + 0.5f * normal(random));
      }
    }
    context.queries.push_back(std::move(queries));
  }
  return context;
}

Context IsotropicContext() {
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  Context context;
  context.keys.resize(kTokens * kHeadDim);
  for (float& x : context.keys) x = normal(random);
  context.queries.assign(kQueries, std::vector<float>(kGroup * kHeadDim));
  for (auto& queries : context.queries) {
    for (float& x : queries) x = normal(random);
  }
  return context;
}

std::vector<int32_t> TopTokens(const std::vector<float>& scores, int64_t count) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<int32_t> TrueTop(const Context& context, const float* query, int64_t budget) {
  std::vector<float> scores(kTokens, 0.0f);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t j = 0; j < kHeadDim; ++j) {
      scores[t] += query[j] * context.keys[t * kHeadDim + j];
    }
  }
  return TopTokens(scores, budget);
}

// Quest (arXiv 2406.10774): pages of 16 tokens, ranked by the upper bound of q · k that the page's
// minimum and maximum per channel give.
std::vector<int32_t> QuestTokens(const Context& context, const float* query, int64_t budget) {
  constexpr int64_t kPageTokens = 16;
  std::vector<float> bounds(kTokens / kPageTokens, 0.0f);
  for (size_t page = 0; page < bounds.size(); ++page) {
    for (int64_t j = 0; j < kHeadDim; ++j) {
      float bound = -std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < kPageTokens; ++i) {
        const float key = context.keys[(page * kPageTokens + i) * kHeadDim + j];
        bound = std::max(bound, query[j] * key);
      }
      bounds[page] += bound;
    }
  }
  std::vector<int32_t> tokens;
  for (int32_t page : TopTokens(bounds, budget / kPageTokens)) {
    for (int32_t i = 0; i < kPageTokens; ++i) {
      tokens.push_back(static_cast<int32_t>(page * kPageTokens) + i);
    }
  }
  return tokens;
}

double Overlap(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  std::vector<int32_t> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return static_cast<double>(both.size()) / static_cast<double>(b.size());
}

struct Recalls {
  double clusters = 0, quest = 0;  // of the true top tokens of a query head, mean
};

// Recall of the published method: each query head for itself, one cluster per 80 tokens.
Recalls MeasureRecalls(const Context& context, int64_t budget) {
  KvShape shape;
  shape.kv_heads = 1;
  shape.query_heads = kGroup;
  shape.head_dim = kHeadDim;
  shape.element_type = ElementType::kFloat32;
  IndexParams params;
  params.tokens_per_cluster = 80;
  params.segment_tokens = 0;
  params.init = KMeansInit::kRandom;
  params.seed = kSeed;
  params.iterations = 20;
  params.codes.bits = 0;
  const RecordCodec& codec = *FindRecordCodec("raw");
  TestPart part(shape, params, codec, 0, kTokens, 16'384, kSeed);
  const TestRows keys(shape, context.keys, 64, 1), values(shape, context.keys, 64, 2);
  IndexInput index_input;
  index_input.keys = keys.view();
  index_input.values = values.view();
  EXPECT_TRUE(BuildIndexPart(shape, params, codec, index_input, part.view(), SerialFor).ok());
  const IndexPartView view = part.view();

  SelectInput input;
  input.shape = shape;
  input.codes = params.codes;
  input.scale = 0.125f;
  input.parts = absl::MakeConstSpan(&view, 1);
  SelectScratch scratch;
  HeadSelection selection;
  Recalls recalls;
  for (const auto& queries : context.queries) {
    input.queries = queries;
    EXPECT_TRUE(
        Select({SelectMode::kPerQueryHead, budget, 0, false, 0.0f}, input, scratch, &selection)
            .ok());
    for (int64_t g = 0; g < kGroup; ++g) {
      std::vector<int32_t> own;
      for (size_t i = 0; i < selection.positions.size(); ++i) {
        if (selection.head_masks[i] >> g & 1) own.push_back(selection.positions[i]);
      }
      EXPECT_EQ(own.size(), static_cast<size_t>(budget));
      const float* query = queries.data() + g * kHeadDim;
      const std::vector<int32_t> best = TrueTop(context, query, budget);
      recalls.clusters += Overlap(own, best) / (kGroup * kQueries);
      recalls.quest += Overlap(QuestTokens(context, query, budget), best) / (kGroup * kQueries);
    }
  }
  return recalls;
}

TEST(SelectRecallTest, OnClusteredKeysItIsNotBelowQuestsPages) {
  const Context context = ClusteredContext();
  for (int64_t budget : {64, 256, 1024}) {
    const Recalls recalls = MeasureRecalls(context, budget);
    EXPECT_FALSE(!(recalls.clusters >= recalls.quest))
        << "budget " << budget << ": " << recalls.clusters << " against " << recalls.quest;
    RecordProperty("recall_" + std::to_string(budget), std::to_string(recalls.clusters));
    RecordProperty("quest_" + std::to_string(budget), std::to_string(recalls.quest));
  }
}

TEST(SelectRecallTest, OnKeysWithoutStructureItIsNotBelowChance) {
  const Context context = IsotropicContext();
  for (int64_t budget : {256, 1024}) {
    const Recalls recalls = MeasureRecalls(context, budget);
    const double chance = static_cast<double>(budget) / kTokens;
    EXPECT_FALSE(!(recalls.clusters >= chance)) << recalls.clusters << " against " << chance;
    // Nor can clusters know what is not there.
    EXPECT_FALSE(!(recalls.clusters <= 0.75)) << recalls.clusters;
  }
}

}  // namespace
}  // namespace clusterkv::kernels
