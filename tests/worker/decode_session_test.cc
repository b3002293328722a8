#include "worker/decode_session.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/support/client_interceptor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "kernels/attention/attention.h"
#include "proto/error.h"
#include "tests/free_port.h"
#include "tests/test_seed.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::worker {
namespace {

using kernels::ElementType;

constexpr int64_t kSinks = 16;

kernels::KvShape Shape(ElementType type = ElementType::kBFloat16) { return {2, 4, 32, type}; }

std::vector<TraceLayer> MakeLayers(int64_t prompt, int64_t steps,
                                   ElementType type = ElementType::kBFloat16) {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < 2; ++l)
    layers.push_back(MakeLayer(Shape(type), prompt + steps, steps, l + 1));
  return layers;
}

DecodeOptions Options(uint32_t capacity) {
  DecodeOptions options;
  options.hot_cache.set_capacity_tokens(capacity);
  options.state_type = v1::ELEMENT_TYPE_FLOAT32;
  options.digests = true;
  return options;
}

absl::Status Append(DecodeSession& session, const std::vector<TraceLayer>& layers, int64_t step) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t token = layers[l].tokens - layers[l].queries + step;
    absl::Status status =
        session.Append(static_cast<int64_t>(l), Rows(layers[l], layers[l].keys, token, token + 1),
                       Rows(layers[l], layers[l].values, token, token + 1));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

struct Decoded {
  std::vector<std::vector<float>> outputs;  // [steps * layers]
  std::vector<StepFigures> figures;
  std::vector<LayerDigests> digests;  // [layers], at the end
};

// Appends and attends, step by step.
absl::Status Decode(DecodeSession& session, const std::vector<TraceLayer>& layers, int64_t steps,
                    Decoded* decoded) {
  for (int64_t step = 0; step < steps; ++step) {
    if (absl::Status status = Append(session, layers, step); !status.ok()) return status;
    for (size_t l = 0; l < layers.size(); ++l) {
      std::vector<float> output(layers[l].shape.query_heads * layers[l].shape.head_dim,
                                std::numeric_limits<float>::quiet_NaN());
      StepFigures figures;
      absl::Status status = session.Step(static_cast<int64_t>(l), Query(layers[l], step),
                                         absl::MakeSpan(output), &figures);
      if (!status.ok()) return status;
      decoded->outputs.push_back(std::move(output));
      decoded->figures.push_back(figures);
    }
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    decoded->digests.push_back(session.digests(static_cast<int64_t>(l)));
  }
  return absl::OkStatus();
}

// Attention of query `step` over the tokens that `attends` says, and the state, by the reference.
std::vector<float> Expected(const TraceLayer& layer, int64_t step,
                            const std::vector<std::vector<std::vector<int64_t>>>& attends,
                            const std::vector<float>& state_output,
                            const std::vector<float>& state_lse) {
  const kernels::KvShape& shape = layer.shape;
  const int64_t head_bytes = shape.head_dim * kernels::ElementBytes(shape.element_type);
  std::vector<float> queries(shape.query_heads * shape.head_dim);
  kernels::ToFloat(Query(layer, step).data(), shape.element_type,
                   static_cast<int64_t>(queries.size()), queries.data());
  std::vector<float> output(queries.size());
  for (int64_t q = 0; q < shape.query_heads; ++q) {
    const int64_t h = q / shape.group();
    std::vector<kernels::RawRun> runs;
    for (const int64_t token : attends[h][q % shape.group()]) {
      const int64_t offset = (token * shape.kv_heads + h) * head_bytes;
      runs.push_back(
          {layer.keys.data() + offset, layer.values.data() + offset, head_bytes, head_bytes, 1});
    }
    kernels::AttentionState state;
    if (!state_lse.empty()) {
      state.output = absl::MakeConstSpan(state_output).subspan(q * shape.head_dim, shape.head_dim);
      state.lse = absl::MakeConstSpan(state_lse).subspan(q, 1);
    }
    const kernels::AttentionParams params = {1, shape.head_dim, shape.element_type,
                                             1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
    const absl::Status status = kernels::SparseAttentionReference(
        params, absl::MakeConstSpan(queries).subspan(q * shape.head_dim, shape.head_dim), runs, {},
        state, absl::MakeSpan(output).subspan(q * shape.head_dim, shape.head_dim), {});
    EXPECT_TRUE(status.ok()) << status;
  }
  return output;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& expected,
                float tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(!(std::abs(got[i] - expected[i]) <= tolerance))
        << i << ": " << got[i] << " against " << expected[i];
  }
}

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> range;
  for (int64_t i = begin; i < end; ++i) range.push_back(i);
  return range;
}

std::vector<float> Floats(const std::string& bytes) {
  std::vector<float> floats(bytes.size() / sizeof(float));
  if (!floats.empty()) std::memcpy(floats.data(), bytes.data(), floats.size() * sizeof(float));
  return floats;
}

// Changes what StreamSelectAndRecall answers before the worker sees it.
using Change = std::function<void(v1::SelectAndRecallResponse*)>;

class Forger : public grpc::experimental::Interceptor {
 public:
  explicit Forger(const Change* change) : change_(change) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using Point = grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(Point::POST_RECV_MESSAGE) && *change_ != nullptr &&
        methods->GetRecvMessage() != nullptr) {
      (*change_)(static_cast<v1::SelectAndRecallResponse*>(methods->GetRecvMessage()));
    }
    methods->Proceed();
  }

 private:
  const Change* const change_;
};

class ForgerFactory : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit ForgerFactory(const Change* change) : change_(change) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo* info) override {
    const std::string method = info->method();
    const bool is_it = method == "/clusterkv.v1.CacheService/StreamSelectAndRecall";
    return new Forger(is_it ? change_ : &nothing_);
  }

 private:
  const Change nothing_;
  const Change* const change_;
};

// *change may be another one from step to step; it outlives the client.
absl::StatusOr<std::unique_ptr<Client>> ConnectByForger(const Service& service,
                                                        const Change* change) {
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> factories;
  factories.push_back(std::make_unique<ForgerFactory>(change));
  return Client::Connect(grpc::experimental::CreateCustomChannelWithInterceptors(
      service.target(), grpc::InsecureChannelCredentials(), {}, std::move(factories)));
}

class DecodeSessionTest : public testing::Test {
 protected:
  std::unique_ptr<DecodeSession> Attach(Client* client, const v1::Sequence& sequence,
                                        const DecodeOptions& options) {
    auto session = DecodeSession::Attach(client, sequence.handle(), options);
    EXPECT_TRUE(session.ok()) << session.status();
    return session.ok() ? std::move(*session) : nullptr;
  }
  v1::Sequence MustPrefill(Client* client, const v1::OpenSequenceRequest& request,
                           const std::vector<TraceLayer>& layers) {
    auto sequence = Prefill(client, request, layers);
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    return sequence.ok() ? *sequence : v1::Sequence();
  }
};

TEST_F(DecodeSessionTest, BudgetBeyondTheContextIsFullAttention) {
  const Service service;
  const auto client = service.Connect();
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (const int64_t prompt : {1, 15, 16, 17, 200}) {
      for (const uint32_t window : {0, 7}) {
        SCOPED_TRACE(testing::Message()
                     << ElementTypeName(type) << " prompt " << prompt << " window " << window);
        const int64_t steps = 20;
        const auto layers = MakeLayers(prompt, steps, type);
        auto request = OpenRequest("a", layers);
        request.mutable_index()->set_window_tokens(window);
        request.mutable_select()->set_budget_tokens(1 << 20);
        const v1::Sequence sequence = MustPrefill(client.get(), request, layers);
        const auto session = Attach(client.get(), sequence, Options(64));
        ASSERT_NE(session, nullptr);
        Decoded decoded;
        const absl::Status status = Decode(*session, layers, steps, &decoded);
        ASSERT_TRUE(status.ok()) << status;
        for (int64_t step = 0; step < steps; ++step) {
          const std::vector<int64_t> all = Range(0, prompt + step + 1);
          for (size_t l = 0; l < 2; ++l) {
            ExpectNear(decoded.outputs[step * 2 + l],
                       Expected(layers[l], step, {{all, all}, {all, all}}, {}, {}), 1e-4f);
            if (HasFatalFailure()) return;
          }
        }
        ASSERT_TRUE(client->ReleaseSequence(sequence.handle()).ok());
      }
    }
  }
}

// Records, window and state are those of the selection, in every preset: no wrong byte, none twice.
TEST_F(DecodeSessionTest, OutputIsAttentionOverTheSelectionMergedWithTheState) {
  const Service service;
  const auto client = service.Connect();
  constexpr int64_t kPrompt = 600, kSteps = 40;
  const auto layers = MakeLayers(kPrompt, kSteps);
  for (const char* preset : {"default", "recall", "clusterkv"}) {
    SCOPED_TRACE(preset);
    auto request = OpenRequest(preset, layers);
    request.set_preset(preset);
    request.mutable_index()->set_window_tokens(13);
    request.mutable_index()->set_tokens_per_cluster(8);
    request.mutable_select()->set_budget_tokens(40);
    if (request.preset() == "default") request.mutable_select()->set_coded_tokens(150);
    const v1::Sequence sequence = MustPrefill(client.get(), request, layers);
    const auto session = Attach(client.get(), sequence, Options(64));
    ASSERT_NE(session, nullptr);
    for (int64_t step = 0; step < kSteps; ++step) {
      ASSERT_TRUE(Append(*session, layers, step).ok());
      const TraceLayer& layer = layers[step % 2];
      std::vector<float> output(4 * 32);
      StepFigures figures;
      const absl::Status status =
          session->Step(step % 2, Query(layer, step), absl::MakeSpan(output), &figures);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(figures.exact_tokens, figures.hits + figures.recalled_tokens);
      // The same question, asked without a session.
      v1::SelectClustersRequest select;
      v1::SelectItem& item = *select.add_items();
      *item.mutable_sequence() = sequence.handle();
      item.set_layer(static_cast<uint32_t>(step % 2));
      item.mutable_queries()->set_type(v1::ELEMENT_TYPE_BFLOAT16);
      item.mutable_queries()->set_data(Query(layer, step).data(), Query(layer, step).size());
      select.set_want_state(true);
      select.set_state_type(v1::ELEMENT_TYPE_FLOAT32);
      const auto answer = client->SelectClusters(select);
      ASSERT_TRUE(answer.ok()) << answer.status();
      const v1::SelectResult& result = answer->results(0);
      ASSERT_FALSE(result.has_error()) << result.error().ShortDebugString();
      EXPECT_EQ(session->window_begin(step % 2), result.window_begin());
      std::vector<std::vector<std::vector<int64_t>>> attends(2);
      int64_t exact = 0;
      for (int h = 0; h < 2; ++h) {
        const v1::HeadSelection& head = result.heads(h);
        exact += head.exact_positions_size();
        const auto& positions = session->last_positions(step % 2)[h];
        EXPECT_TRUE(std::equal(positions.begin(), positions.end(), head.exact_positions().begin(),
                               head.exact_positions().end()));
        for (int g = 0; g < 2; ++g) {
          std::vector<int64_t> tokens = Range(0, kSinks);
          for (int i = 0; i < head.exact_positions_size(); ++i) {
            if (head.head_masks().empty() || (head.head_masks(i) >> g & 1) != 0) {
              tokens.push_back(head.exact_positions(i));
            }
          }
          const auto window = Range(result.window_begin(), kPrompt + step + 1);
          tokens.insert(tokens.end(), window.begin(), window.end());
          attends[h].push_back(std::move(tokens));
        }
      }
      EXPECT_EQ(figures.exact_tokens, exact);
      EXPECT_EQ(figures.state_bytes > 0, request.preset() != "clusterkv");
      ExpectNear(output,
                 Expected(layer, step, attends, Floats(result.state().output()),
                          Floats(result.state().log_sum_exp())),
                 1e-4f);
      if (HasFatalFailure()) return;
    }
    EXPECT_GT(session->window_begin(0), kPrompt);  // windows were clustered under way
  }
}

TEST_F(DecodeSessionTest, HotCacheChangesWhatIsSentAndNothingElse) {
  const Service service;
  const auto client = service.Connect();
  constexpr int64_t kSteps = 50;
  const auto layers = MakeLayers(700, kSteps);
  auto request = OpenRequest("a", layers);
  request.mutable_index()->set_window_tokens(16);
  request.set_max_decode_tokens(kSteps);
  const v1::Sequence sequence = MustPrefill(client.get(), request, layers);
  Decoded expected;
  int64_t fewest = std::numeric_limits<int64_t>::max(), most = 0;
  for (const v1::HotCachePolicy policy :
       {v1::HOT_CACHE_POLICY_TOKEN_LRU, v1::HOT_CACHE_POLICY_CLUSTER_LRU,
        v1::HOT_CACHE_POLICY_LAST_STEPS}) {
    for (const uint32_t capacity : {0, 1, 37, 1024}) {
      SCOPED_TRACE(testing::Message() << "policy " << policy << " capacity " << capacity);
      DecodeOptions options = Options(capacity);
      options.hot_cache.set_policy(policy);
      options.hot_cache.set_steps(2);
      options.append_to_service = false;  // so that every session starts from the same sequence
      options.spin = capacity == 37 ? absl::Microseconds(200) : absl::ZeroDuration();
      const auto session = Attach(client.get(), sequence, options);
      ASSERT_NE(session, nullptr);
      Decoded decoded;
      const absl::Status status = Decode(*session, layers, kSteps, &decoded);
      ASSERT_TRUE(status.ok()) << status;
      if (expected.outputs.empty()) expected = decoded;
      EXPECT_EQ(decoded.outputs, expected.outputs);  // bit for bit
      int64_t recalled = 0;
      for (const StepFigures& figures : decoded.figures) {
        recalled += figures.recalled_tokens;
        EXPECT_EQ(figures.recalled_bytes, figures.recalled_tokens * 2 * 32 * 2);
        EXPECT_EQ(figures.state_bytes, 4 * (32 * 4 + 4));
        if (capacity == 0) {
          EXPECT_EQ(figures.hits, 0);
        }
      }
      for (size_t l = 0; l < 2; ++l) {
        EXPECT_EQ(decoded.digests[l].selection, expected.digests[l].selection);
        EXPECT_EQ(decoded.digests[l].state, expected.digests[l].state);
      }
      fewest = std::min(fewest, recalled);
      most = std::max(most, recalled);
    }
  }
  EXPECT_LT(2 * fewest, most);
}

TEST_F(DecodeSessionTest, BothCodecsSelectAndAnswerAlike) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(500, 40);
  std::vector<Decoded> decoded(2);
  for (int i = 0; i < 2; ++i) {
    auto request = OpenRequest(absl::StrCat("codec", i), layers);
    request.set_codec(i == 0 ? "raw" : "k8v4");
    request.set_max_decode_tokens(40);
    request.mutable_index()->set_window_tokens(16);
    const v1::Sequence sequence = MustPrefill(client.get(), request, layers);
    const auto session = Attach(client.get(), sequence, Options(256));
    ASSERT_NE(session, nullptr);
    const absl::Status status = Decode(*session, layers, 40, &decoded[i]);
    ASSERT_TRUE(status.ok()) << status;
    for (const StepFigures& figures : decoded[i].figures) {
      EXPECT_EQ(figures.correction_bytes, i == 0 ? 0 : 4 * (32 + 4));
      EXPECT_EQ(figures.state_bytes, 4 * (32 * 4 + 4) + figures.correction_bytes);
    }
  }
  for (size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(decoded[0].digests[l].selection, decoded[1].digests[l].selection);
    EXPECT_EQ(decoded[0].digests[l].state, decoded[1].digests[l].state);
    EXPECT_NE(decoded[0].digests[l].correction, decoded[1].digests[l].correction);
    EXPECT_NE(decoded[0].digests[l].recalled, decoded[1].digests[l].recalled);
  }
  for (size_t i = 0; i < decoded[0].outputs.size(); ++i) {
    // Values of 4 bits alone would be up to .1 off.
    ExpectNear(decoded[1].outputs[i], decoded[0].outputs[i], 0.02f);
  }
}

// A worker believes no answer that cannot be: it is an error, nothing is written, and the step can
// be asked for again.
TEST_F(DecodeSessionTest, MalformedStatesAndCorrectionsAreErrors) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const auto first_is = [](std::string* floats, float number) {
    std::memcpy(floats->data(), &number, sizeof(number));
  };
  using Result = v1::SelectResult;
  struct Case {
    std::string codec;
    std::function<void(Result*)> change;
  };
  const std::vector<Case> cases = {
      {"k8v4", [](Result* r) { r->mutable_correction()->mutable_codes()->pop_back(); }},
      {"k8v4", [](Result* r) { r->mutable_correction()->mutable_codes()->push_back(0); }},
      {"k8v4", [](Result* r) { r->mutable_correction()->mutable_log_scale()->pop_back(); }},
      {"k8v4", [](Result* r) { r->mutable_correction()->mutable_log_scale()->append(4, 0); }},
      {"k8v4", [](Result* r) { r->mutable_correction()->clear_codes(); }},
      {"k8v4", [](Result* r) { r->mutable_correction()->clear_log_scale(); }},
      {"k8v4", [](Result* r) { r->clear_correction(); }},
      {"k8v4", [&](Result* r) { first_is(r->mutable_correction()->mutable_log_scale(), nan); }},
      {"k8v4",
       [&](Result* r) { first_is(r->mutable_correction()->mutable_log_scale(), infinity); }},
      {"raw", [](Result* r) { r->mutable_correction()->set_codes(std::string(4 * 32, 1)); }},
      {"raw", [](Result* r) { r->mutable_correction()->set_log_scale(std::string(4 * 4, 0)); }},
      {"raw", [](Result* r) { r->mutable_state()->mutable_output()->pop_back(); }},
      {"raw", [](Result* r) { r->mutable_state()->clear_log_sum_exp(); }},
      {"raw", [&](Result* r) { first_is(r->mutable_state()->mutable_output(), infinity); }},
      {"raw", [&](Result* r) { first_is(r->mutable_state()->mutable_log_sum_exp(), nan); }},
  };
  const Service service;
  Change change;
  const auto client = ConnectByForger(service, &change);
  ASSERT_TRUE(client.ok()) << client.status();
  const auto layers = MakeLayers(500, 2);
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    auto request = OpenRequest(absl::StrCat("a", i), layers);
    request.set_codec(cases[i].codec);
    const v1::Sequence sequence = MustPrefill(client->get(), request, layers);
    const auto session = Attach(client->get(), sequence, Options(256));
    const auto undisturbed = Attach(client->get(), sequence, Options(256));
    ASSERT_TRUE(session != nullptr && undisturbed != nullptr);
    for (int64_t step = 0; step < 2; ++step) {
      const std::vector<float> poison(4 * 32, -7.0f);
      std::vector<float> want = poison, got = poison;
      const auto query = Query(layers[0], step);
      ASSERT_TRUE(undisturbed->Step(0, query, absl::MakeSpan(want), nullptr).ok());
      change = [&](v1::SelectAndRecallResponse* response) {
        for (Result& result : *response->mutable_selection()->mutable_results()) {
          cases[i].change(&result);
        }
      };
      const absl::Status refused = session->Step(0, query, absl::MakeSpan(got), nullptr);
      EXPECT_EQ(ReasonOf(refused), v1::INTERNAL_ERROR) << refused;
      EXPECT_EQ(got, poison);
      change = nullptr;
      const absl::Status taken = session->Step(0, query, absl::MakeSpan(got), nullptr);
      ASSERT_TRUE(taken.ok()) << taken;
      EXPECT_EQ(got, want);
    }
  }
}

TEST_F(DecodeSessionTest, RefusedQueryLeavesResidencyAndStream) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(500, 4);
  const v1::Sequence sequence = MustPrefill(client.get(), OpenRequest("a", layers), layers);
  const auto session = Attach(client.get(), sequence, Options(1024));
  ASSERT_NE(session, nullptr);
  std::vector<float> output(4 * 32);
  StepFigures figures;
  ASSERT_TRUE(session->Step(0, Query(layers[0], 0), absl::MakeSpan(output), &figures).ok());
  EXPECT_GT(figures.recalled_tokens, 0);
  std::vector<std::byte> bad(Query(layers[0], 0).begin(), Query(layers[0], 0).end());
  bad[0] = bad[1] = std::byte{0xff};  // a NaN
  EXPECT_EQ(ReasonOf(session->Step(0, bad, absl::MakeSpan(output), nullptr)), v1::NON_FINITE_QUERY);
  ASSERT_TRUE(session->Step(0, Query(layers[0], 0), absl::MakeSpan(output), &figures).ok());
  EXPECT_EQ(figures.recalled_tokens, 0);
  EXPECT_GT(figures.hits, 0);
}

TEST_F(DecodeSessionTest, ArgumentsThatDoNotFitAreRefusedAtOnce) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(50, 4);
  const v1::Sequence sequence = MustPrefill(client.get(), OpenRequest("a", layers), layers);
  const auto session = Attach(client.get(), sequence, Options(16));
  ASSERT_NE(session, nullptr);
  std::vector<float> output(4 * 32);
  const auto query = Query(layers[0], 0);
  EXPECT_EQ(ReasonOf(session->Step(2, query, absl::MakeSpan(output), nullptr)),
            v1::LAYER_OUT_OF_RANGE);
  EXPECT_EQ(ReasonOf(session->Step(0, query.subspan(2), absl::MakeSpan(output), nullptr)),
            v1::SHAPE_MISMATCH);
  EXPECT_EQ(ReasonOf(session->Step(0, query, absl::MakeSpan(output).subspan(1), nullptr)),
            v1::SHAPE_MISMATCH);
  EXPECT_EQ(ReasonOf(session->Append(0, query, query.subspan(2))), v1::SHAPE_MISMATCH);
  EXPECT_EQ(ReasonOf(session->Append(-1, query, query)), v1::LAYER_OUT_OF_RANGE);
}

TEST_F(DecodeSessionTest, OnlyReadySequencesAreAttached) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(50, 4);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok());
  EXPECT_EQ(ReasonOf(DecodeSession::Attach(client.get(), opened->handle(), Options(16)).status()),
            v1::SEQUENCE_NOT_READY);
  v1::SequenceHandle stale = opened->handle();
  stale.set_boot_id(stale.boot_id() + 1);
  EXPECT_EQ(ReasonOf(DecodeSession::Attach(client.get(), stale, Options(16)).status()),
            v1::STALE_BOOT_ID);
}

TEST_F(DecodeSessionTest, LostAttachmentIsMadeAnew) {
  Service service;
  const auto client = service.Connect();
  constexpr int64_t kSteps = 24;
  const auto layers = MakeLayers(500, kSteps);
  auto request = OpenRequest("a", layers);
  request.mutable_index()->set_window_tokens(8);
  Decoded expected;
  {
    const auto session =
        Attach(client.get(), MustPrefill(client.get(), request, layers), Options(1024));
    ASSERT_TRUE(Decode(*session, layers, kSteps, &expected).ok());
  }
  request.set_name("b");
  const v1::Sequence sequence = MustPrefill(client.get(), request, layers);
  const auto session = Attach(client.get(), sequence, Options(1024));
  ASSERT_NE(session, nullptr);
  const auto admin = v1::AdminService::NewStub(service.server().InProcessAdminChannel());
  for (int64_t step = 0; step < kSteps; ++step) {
    if (step % 7 == 3) {
      while (client->session_id() == 0) absl::SleepFor(absl::Milliseconds(1));
      grpc::ClientContext context;
      v1::ForceReleaseWorkerRequest release;
      release.set_session_id(client->session_id());
      v1::ForceReleaseWorkerResponse released;
      const grpc::Status status = admin->ForceReleaseWorker(&context, release, &released);
      ASSERT_TRUE(status.ok()) << status.error_message();
      while (client->session_id() == release.session_id()) absl::SleepFor(absl::Milliseconds(1));
    }
    ASSERT_TRUE(Append(*session, layers, step).ok());
    for (int64_t l = 0; l < 2; ++l) {
      std::vector<float> output(4 * 32);
      const absl::Status status =
          session->Step(l, Query(layers[l], step), absl::MakeSpan(output), nullptr);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(output, expected.outputs[step * 2 + l]);
    }
  }
}

TEST_F(DecodeSessionTest, CutConnectionsAreSurvivedAtAnyByte) {
  std::mt19937_64 random(TestSeed(23));
  Service service;
  CuttingProxy proxy(service.target());
  auto client = Client::Connect(proxy.address());
  ASSERT_TRUE(client.ok()) << client.status();
  constexpr int64_t kSteps = 60;
  const auto layers = MakeLayers(400, kSteps);
  auto request = OpenRequest("a", layers);
  request.mutable_index()->set_window_tokens(8);
  Decoded expected;
  {
    const auto session =
        Attach(client->get(), MustPrefill(client->get(), request, layers), Options(100));
    ASSERT_TRUE(Decode(*session, layers, kSteps, &expected).ok());
  }
  request.set_name("b");
  const v1::Sequence sequence = MustPrefill(client->get(), request, layers);
  const auto session = Attach(client->get(), sequence, Options(100));
  ASSERT_NE(session, nullptr);
  for (int64_t step = 0; step < kSteps; ++step) {
    proxy.CutAfter(static_cast<int64_t>(random() % 8000));
    const absl::Status appended = Append(*session, layers, step);
    ASSERT_TRUE(appended.ok()) << step << ": " << appended;
    for (int64_t l = 0; l < 2; ++l) {
      std::vector<float> output(4 * 32);
      const absl::Status status =
          session->Step(l, Query(layers[l], step), absl::MakeSpan(output), nullptr);
      ASSERT_TRUE(status.ok()) << step << ": " << status;
      ASSERT_EQ(output, expected.outputs[step * 2 + l]) << step;
    }
  }
  EXPECT_GE(proxy.cuts(), 20);
  EXPECT_EQ(session->digests(0).selection, expected.digests[0].selection);
  EXPECT_EQ(session->digests(1).state, expected.digests[1].state);
}

TEST_F(DecodeSessionTest, AppendsGoInBatchesOfAllLayers) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(100, 20);
  auto request = OpenRequest("a", layers);
  request.set_max_decode_tokens(20);
  const v1::Sequence sequence = MustPrefill(client.get(), request, layers);
  const auto tokens = [&] {
    const auto now = client->GetSequence(sequence.handle());
    EXPECT_TRUE(now.ok()) << now.status();
    EXPECT_EQ(now->layers(0).tokens(), now->layers(1).tokens());
    return now->layers(0).tokens() - 100;
  };
  DecodeOptions options = Options(64);
  options.append_batch_tokens = 8;
  {
    const auto session = Attach(client.get(), sequence, options);
    ASSERT_NE(session, nullptr);
    for (int64_t step = 0; step < 19; ++step) {
      ASSERT_TRUE(Append(*session, layers, step).ok());
      if (step == 17) {
        ASSERT_TRUE(session->Flush().ok());
        EXPECT_EQ(tokens(), 18u);
      } else if (step < 17) {
        EXPECT_EQ(tokens(), step / 8 * 8) << step;
      }
    }
    EXPECT_EQ(tokens(), 18u);
  }
  EXPECT_EQ(tokens(), 19u) << "the end of a session sends what is left";
  const auto next = Attach(client.get(), sequence, options);
  ASSERT_NE(next, nullptr);
  ASSERT_TRUE(Append(*next, layers, 19).ok());
  ASSERT_TRUE(next->Flush().ok());
  EXPECT_EQ(tokens(), 20u);
}

TEST_F(DecodeSessionTest, RestartedServerIsTold) {
  const int port = FreePort();
  auto service = std::make_unique<Service>(port);
  const auto client = service->Connect();
  const auto layers = MakeLayers(100, 4);
  const v1::Sequence sequence = MustPrefill(client.get(), OpenRequest("a", layers), layers);
  const auto session = Attach(client.get(), sequence, Options(64));
  ASSERT_NE(session, nullptr);
  std::vector<float> output(4 * 32);
  ASSERT_TRUE(session->Step(0, Query(layers[0], 0), absl::MakeSpan(output), nullptr).ok());
  service.reset();
  service = std::make_unique<Service>(port);
  const std::vector<float> before = output;
  EXPECT_EQ(ReasonOf(session->Step(0, Query(layers[0], 0), absl::MakeSpan(output), nullptr)),
            v1::STALE_BOOT_ID);
  EXPECT_EQ(output, before);
  ASSERT_TRUE(Append(*session, layers, 0).ok());
  EXPECT_EQ(ReasonOf(session->Flush()), v1::STALE_BOOT_ID);
}

TEST_F(DecodeSessionTest, ReleasedSequenceIsAnError) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(100, 4);
  const v1::Sequence sequence = MustPrefill(client.get(), OpenRequest("a", layers), layers);
  const auto session = Attach(client.get(), sequence, Options(64));
  ASSERT_NE(session, nullptr);
  ASSERT_TRUE(client->ReleaseSequence(sequence.handle()).ok());
  std::vector<float> output(4 * 32);
  const absl::Status status =
      session->Step(0, Query(layers[0], 0), absl::MakeSpan(output), nullptr);
  const v1::ErrorReason reason = ReasonOf(status);
  EXPECT_TRUE(reason == v1::SEQUENCE_RELEASED || reason == v1::SEQUENCE_NOT_FOUND) << status;
}

TEST_F(DecodeSessionTest, HoldsAFractionOfTheKv) {
  const Service service;
  const auto client = service.Connect();
  const auto layers = MakeLayers(2000, 20);
  const v1::Sequence sequence = MustPrefill(client.get(), OpenRequest("a", layers), layers);
  const auto session = Attach(client.get(), sequence, Options(128));
  ASSERT_NE(session, nullptr);
  Decoded decoded;
  ASSERT_TRUE(Decode(*session, layers, 20, &decoded).ok());
  const int64_t token_bytes = 2 * 2 * 32 * 2 * 2;  // layers, heads, channels, bytes, K and V
  EXPECT_GT(session->held_bytes(), (kSinks + 20) * token_bytes);
  EXPECT_LE(session->held_bytes(), (kSinks + 20 + 128) * token_bytes);
}

}  // namespace
}  // namespace clusterkv::worker
