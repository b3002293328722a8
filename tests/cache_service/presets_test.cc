// The presets to the letter, what a request changes, and what it may not ask for.
#include "cache_service/presets.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "kernels/select/select.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

using kernels::KMeansInit;
using kernels::SelectMode;

v1::OpenSequenceRequest Request(const std::string& preset) {
  v1::OpenSequenceRequest request;
  request.set_name("s");
  request.set_preset(preset);
  request.set_prompt_tokens(32768);
  request.set_max_decode_tokens(1024);
  v1::KvShape& shape = *request.mutable_shape();
  shape.set_layers(8);
  shape.set_kv_heads(2);
  shape.set_query_heads(8);
  shape.set_head_dim(128);
  return request;
}

TEST(PresetsTest, ClusterKvIsAsPublished) {
  const SequenceParams params = ResolveParams(Request("clusterkv")).value();
  EXPECT_EQ(params.sink_tokens, 16);
  EXPECT_EQ(params.index.tokens_per_cluster, 80);
  EXPECT_EQ(params.index.segment_tokens, 0);
  EXPECT_EQ(params.index.init, KMeansInit::kRandom);
  EXPECT_EQ(params.index.iterations, 20);
  EXPECT_EQ(params.index.codes.bits, 0);
  EXPECT_EQ(params.index.split_over, 0);
  EXPECT_EQ(params.metric, v1::METRIC_RAW);
  EXPECT_FALSE(params.metric_required);
  EXPECT_EQ(params.window_tokens, 320);
  EXPECT_EQ(params.window_clusters, 4);
  const kernels::IndexParams window = WindowIndexParams(params);
  EXPECT_EQ(window.segment_tokens, 0);
  EXPECT_EQ(kernels::ClusterCapacity(window, 320), 4);
  const kernels::SelectParams select = SelectParamsFor(params);
  EXPECT_EQ(select.mode, SelectMode::kPerQueryHead);
  EXPECT_EQ(select.budget_tokens, 1024);
  EXPECT_EQ(select.scored_tokens, 0);
  EXPECT_FALSE(select.answer_scored);
  EXPECT_EQ(select.estimated_fraction, 0);
}

TEST(PresetsTest, RecallRefinesEightfold) {
  const SequenceParams params = ResolveParams(Request("recall")).value();
  EXPECT_EQ(params.sink_tokens, 16);
  EXPECT_EQ(params.index.tokens_per_cluster, 16);
  EXPECT_EQ(params.index.segment_tokens, 8192);
  EXPECT_EQ(params.index.init, KMeansInit::kStride);
  EXPECT_EQ(params.index.iterations, 10);
  EXPECT_EQ(params.index.codes.bits, 2);
  EXPECT_EQ(params.index.codes.group_channels, 32);
  EXPECT_EQ(params.metric, v1::METRIC_BALANCED);
  EXPECT_FALSE(params.metric_required);
  EXPECT_EQ(kernels::ClusterCapacity(WindowIndexParams(params), 320), 20);
  const kernels::SelectParams select = SelectParamsFor(params);
  EXPECT_EQ(select.mode, SelectMode::kSharedPerKvHead);
  EXPECT_EQ(select.budget_tokens, 128);
  EXPECT_EQ(select.scored_tokens, 8 * (128 - 16));
  EXPECT_FALSE(select.answer_scored);
  EXPECT_EQ(select.estimated_fraction, 0.25f);
}

TEST(PresetsTest, DefaultAnswersTwoThousandCodedTokens) {
  for (const char* name : {"default", ""}) {
    const SequenceParams params = ResolveParams(Request(name)).value();
    EXPECT_EQ(params.preset, "default");
    EXPECT_EQ(params.index, ResolveParams(Request("recall")).value().index);
    const kernels::SelectParams select = SelectParamsFor(params);
    EXPECT_EQ(select.mode, SelectMode::kSharedPerKvHead);
    EXPECT_EQ(select.budget_tokens, 64);
    EXPECT_EQ(select.scored_tokens, 2048);
    EXPECT_TRUE(select.answer_scored);
    EXPECT_EQ(select.estimated_fraction, 0.25f);
  }
}

TEST(PresetsTest, ScoredTokensAreNeverFewerThanTheBudgetsOwn) {
  v1::OpenSequenceRequest request = Request("default");
  request.mutable_select()->set_budget_tokens(4096);
  EXPECT_EQ(SelectParamsFor(ResolveParams(request).value()).scored_tokens, 4096 - 16);
}

TEST(PresetsTest, BudgetsBeyondTheContextMeanAllOfIt) {
  v1::OpenSequenceRequest request = Request("recall");
  request.mutable_select()->set_budget_tokens(std::numeric_limits<uint32_t>::max());
  request.mutable_select()->set_refine_factor(std::numeric_limits<uint32_t>::max());
  const kernels::SelectParams select = SelectParamsFor(ResolveParams(request).value());
  EXPECT_EQ(select.budget_tokens, 32768 + 1024);
  EXPECT_EQ(select.scored_tokens, 32768 + 1024);
}

TEST(PresetsTest, BudgetsWithinTheSinksLeaveNoExactToken) {
  v1::OpenSequenceRequest request = Request("recall");
  request.mutable_select()->set_budget_tokens(16);
  EXPECT_EQ(SelectParamsFor(ResolveParams(request).value()).scored_tokens, 0);
}

TEST(PresetsTest, CodedTokensTurnRefinementOffAndTheOtherWayRound) {
  v1::OpenSequenceRequest request = Request("recall");
  request.mutable_select()->set_coded_tokens(512);
  const SequenceParams coded = ResolveParams(request).value();
  EXPECT_EQ(coded.refine_factor, 0);
  EXPECT_TRUE(SelectParamsFor(coded).answer_scored);
  v1::SelectConfig config;
  config.set_refine_factor(4);
  const SequenceParams refined = WithSelectConfig(coded, config).value();
  EXPECT_EQ(refined.coded_tokens, 0);
  EXPECT_EQ(SelectParamsFor(refined).scored_tokens, 4 * 112);
}

TEST(PresetsTest, EveryParameterCanBeSet) {
  v1::OpenSequenceRequest request = Request("clusterkv");
  v1::IndexConfig& index = *request.mutable_index();
  index.set_sink_tokens(0);
  index.set_segment_tokens(4096);
  index.set_tokens_per_cluster(12);
  index.set_init(v1::CLUSTER_INIT_STRIDE);
  index.set_seed(7);
  index.set_iterations(4);
  index.set_window_tokens(64);
  index.set_window_clusters(8);
  index.set_split_over(2);
  index.set_metric(v1::METRIC_BALANCED);
  index.mutable_codes()->set_bits(4);
  v1::SelectConfig& select = *request.mutable_select();
  select.set_mode(v1::SELECT_MODE_SHARED);
  select.set_budget_tokens(100);
  select.set_coded_tokens(1000);
  select.set_estimated_fraction(0.5f);
  request.set_codec("k8v4");
  const SequenceParams params = ResolveParams(request).value();
  EXPECT_TRUE(params.metric_required);
  EXPECT_EQ(params.codec->name(), "k8v4");
  EXPECT_EQ(params.index.codes.group_channels, 128) << "0: head_dim";
  v1::IndexConfig expected = index;
  expected.mutable_codes()->set_group_channels(128);
  EXPECT_EQ(IndexConfigOf(params).SerializeAsString(), expected.SerializeAsString());
  v1::SelectConfig answered = select;
  answered.set_refine_factor(0);
  EXPECT_EQ(SelectConfigOf(params).SerializeAsString(), answered.SerializeAsString());
}

TEST(PresetsTest, GroupsOfAPresetFitSmallHeads) {
  v1::OpenSequenceRequest request = Request("default");
  request.mutable_shape()->set_head_dim(48);
  EXPECT_EQ(ResolveParams(request).value().index.codes.group_channels, 16);
}

struct BadRequest {
  const char* field;
  v1::ErrorReason reason;
  std::function<void(v1::OpenSequenceRequest&)> spoil;
};

std::vector<BadRequest> BadRequests() {
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  using R = v1::OpenSequenceRequest;
  return {
      {"name", v1::INVALID_FIELD, [](R& r) { r.set_name(""); }},
      {"name", v1::INVALID_FIELD, [](R& r) { r.set_name(std::string(257, 'x')); }},
      {"preset", v1::INVALID_FIELD, [](R& r) { r.set_preset("best"); }},
      {"codec", v1::UNSUPPORTED, [](R& r) { r.set_codec("zip"); }},
      {"prompt_tokens", v1::INVALID_FIELD, [](R& r) { r.set_prompt_tokens(0); }},
      {"prompt_tokens", v1::INVALID_FIELD, [](R& r) { r.set_prompt_tokens(1u << 31); }},
      {"max_decode_tokens", v1::INVALID_FIELD, [](R& r) { r.set_max_decode_tokens(0x7fffffff); }},
      {"shape.layers", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_layers(0); }},
      {"shape.layers", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_layers(1025); }},
      {"shape.kv_heads", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_kv_heads(0); }},
      {"shape.kv_heads", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_kv_heads(257); }},
      {"shape.query_heads", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_query_heads(3); }},
      {"shape.query_heads", v1::INVALID_FIELD,
       [](R& r) { r.mutable_shape()->set_query_heads(66); }},
      {"shape.head_dim", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_head_dim(8); }},
      {"shape.head_dim", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_head_dim(120); }},
      {"shape.head_dim", v1::INVALID_FIELD, [](R& r) { r.mutable_shape()->set_head_dim(528); }},
      {"shape.element_type", v1::INVALID_FIELD,
       [](R& r) { r.mutable_shape()->set_element_type(static_cast<v1::ElementType>(9)); }},
      {"index.sink_tokens", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_sink_tokens(1025); }},
      {"index.tokens_per_cluster", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_tokens_per_cluster(0); }},
      {"index.tokens_per_cluster", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_tokens_per_cluster(65537); }},
      {"index.init", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_init(static_cast<v1::ClusterInit>(9)); }},
      {"index.iterations", v1::INVALID_FIELD, [](R& r) { r.mutable_index()->set_iterations(0); }},
      {"index.iterations", v1::INVALID_FIELD, [](R& r) { r.mutable_index()->set_iterations(101); }},
      {"index.window_clusters", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_window_clusters(321); }},
      {"index.split_over", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_split_over(0.5f); }},
      {"index.split_over", v1::INVALID_FIELD,
       [nan](R& r) { r.mutable_index()->set_split_over(nan); }},
      {"index.metric", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->set_metric(static_cast<v1::Metric>(9)); }},
      {"index.codes.bits", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->mutable_codes()->set_bits(5); }},
      {"index.codes.group_channels", v1::INVALID_FIELD,
       [](R& r) {
         r.mutable_index()->mutable_codes()->set_bits(2);
         r.mutable_index()->mutable_codes()->set_group_channels(48);
       }},
      {"select.mode", v1::INVALID_FIELD,
       [](R& r) { r.mutable_select()->set_mode(static_cast<v1::SelectMode>(9)); }},
      {"select.mode", v1::INVALID_FIELD,
       [](R& r) { r.mutable_select()->set_mode(v1::SELECT_MODE_PER_QUERY_HEAD); }},
      {"select.budget_tokens", v1::BUDGET_ZERO,
       [](R& r) { r.mutable_select()->set_budget_tokens(0); }},
      {"select.refine_factor", v1::INVALID_FIELD,
       [](R& r) {
         r.mutable_select()->set_refine_factor(2);
         r.mutable_select()->set_coded_tokens(2);
       }},
      {"select.coded_tokens", v1::INVALID_FIELD,
       [](R& r) { r.mutable_index()->mutable_codes()->set_bits(0); }},
      {"select.estimated_fraction", v1::INVALID_FIELD,
       [](R& r) { r.mutable_select()->set_estimated_fraction(1.5f); }},
      {"select.estimated_fraction", v1::INVALID_FIELD,
       [nan](R& r) { r.mutable_select()->set_estimated_fraction(nan); }},
  };
}

TEST(PresetsTest, RefusesWhatIsOutOfRangeNamingTheField) {
  for (const BadRequest& bad : BadRequests()) {
    v1::OpenSequenceRequest request = Request("default");
    bad.spoil(request);
    const absl::Status status = ResolveParams(request).status();
    EXPECT_FALSE(status.ok()) << bad.field;
    if (status.ok()) continue;
    EXPECT_EQ(ReasonOf(status), bad.reason) << status;
    std::string field;
    for (const auto& [key, value] : MetadataOf(status)) {
      if (key == "field") field = value;
    }
    EXPECT_EQ(field, bad.field) << status;
    EXPECT_EQ(status.message().substr(0, std::string(bad.field).size()), bad.field);
  }
}

TEST(PresetsTest, ResolvedPresetsAreValidForTheKernel) {
  for (const std::string& name : PresetNames()) {
    const SequenceParams params = ResolveParams(Request(name)).value();
    EXPECT_TRUE(kernels::ValidateSelectParams(SelectParamsFor(params), params.index.codes).ok())
        << name;
  }
}

}  // namespace
}  // namespace clusterkv::cache_service
