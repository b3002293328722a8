#include "worker/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/element_type.h"
#include "proto/error.h"
#include "tests/free_port.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::worker {
namespace {

using kernels::ElementType;

constexpr int64_t kLayers = 2, kQueryHeads = 4, kHeadDim = 32, kOutput = kQueryHeads * kHeadDim;

std::vector<TraceLayer> MakeLayers(int64_t prompt, int64_t steps, uint64_t seed = 1) {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < kLayers; ++l) {
    layers.push_back(MakeLayer({2, kQueryHeads, kHeadDim, ElementType::kBFloat16}, prompt + steps,
                               steps, seed * 10 + l));
  }
  return layers;
}

v1::OpenSequenceRequest Request(const std::string& name, const std::vector<TraceLayer>& layers) {
  v1::OpenSequenceRequest request = OpenRequest(name, layers);
  request.mutable_index()->set_window_tokens(8);
  return request;
}

EngineOptions Options(const std::string& target, uint32_t budget = 32) {
  EngineOptions options;
  options.target = target;
  options.decode.select.set_budget_tokens(budget);
  options.decode.hot_cache.set_capacity_tokens(64);
  options.threads = 2;
  return options;
}

// Outputs [steps * layers] of a DecodeSession of its own.
std::vector<std::vector<float>> Expected(const Service& service, const std::string& name,
                                         const std::vector<TraceLayer>& layers,
                                         uint32_t budget = 32) {
  std::vector<std::vector<float>> outputs;
  const auto client = service.Connect();
  const auto sequence = Prefill(client.get(), Request(name, layers), layers);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  if (!sequence.ok()) return outputs;
  auto session = DecodeSession::Attach(client.get(), sequence->handle(),
                                       Options(service.target(), budget).decode);
  EXPECT_TRUE(session.ok()) << session.status();
  if (!session.ok()) return outputs;
  const int64_t prompt = layers[0].tokens - layers[0].queries;
  for (int64_t step = 0; step < layers[0].queries; ++step) {
    for (int64_t l = 0; l < kLayers; ++l) {
      const TraceLayer& layer = layers[l];
      const int64_t token = prompt + step;
      EXPECT_TRUE((*session)
                      ->Append(l, Rows(layer, layer.keys, token, token + 1),
                               Rows(layer, layer.values, token, token + 1))
                      .ok());
      std::vector<float> output(kOutput);
      EXPECT_TRUE((*session)->Step(l, Query(layer, step), absl::MakeSpan(output), nullptr).ok());
      outputs.push_back(std::move(output));
    }
  }
  return outputs;
}

class EngineTest : public testing::Test {
 protected:
  std::unique_ptr<Engine> MustOpen(const EngineOptions& options) {
    auto engine = Engine::Open(options);
    EXPECT_TRUE(engine.ok()) << engine.status();
    return engine.ok() ? std::move(*engine) : nullptr;
  }

  // Created, filled and sealed, not attached.
  EngineSequence* MustPrefill(Engine& engine, const std::string& name,
                              const std::vector<TraceLayer>& layers) {
    const auto created = engine.Create(Request(name, layers));
    EXPECT_TRUE(created.ok()) << created.status();
    if (!created.ok()) return nullptr;
    for (int64_t l = 0; l < kLayers; ++l) {
      const TraceLayer& layer = layers[l];
      const absl::Status ingested =
          engine.Ingest(*created, l, 0, layer.tokens - layer.queries,
                        {layer.keys.data(), layer.values.data(), 0, 0}, layer.query_rms, nullptr);
      EXPECT_TRUE(ingested.ok()) << ingested;
    }
    const absl::Status sealed = engine.Seal(*created);
    EXPECT_TRUE(sealed.ok()) << sealed;
    return *created;
  }
  EngineSequence* MustAttach(Engine& engine, const std::string& name,
                             const std::vector<TraceLayer>& layers) {
    EngineSequence* const sequence = MustPrefill(engine, name, layers);
    if (sequence == nullptr) return nullptr;
    const absl::Status attached = engine.Attach(sequence);
    EXPECT_TRUE(attached.ok()) << attached;
    return sequence;
  }
  absl::Status AppendToken(Engine& engine, EngineSequence* sequence,
                           const std::vector<TraceLayer>& layers, int64_t l, int64_t step) {
    const TraceLayer& layer = layers[l];
    const int64_t token = layer.tokens - layer.queries + step;
    const EngineAppend append = {sequence,
                                 {Rows(layer, layer.keys, token, token + 1).data(),
                                  Rows(layer, layer.values, token, token + 1).data(), 0, 0}};
    return engine.Append(l, {&append, 1}, nullptr);
  }
};

// Prompts around the window, decoded tokens that cross window and batch boundaries.
TEST_F(EngineTest, OutputsAreADecodeSessionsBitForBit) {
  const Service service;
  for (const int64_t prompt : {1, 17, 300}) {
    SCOPED_TRACE(prompt);
    constexpr int64_t kSteps = 40;
    const auto layers = MakeLayers(prompt, kSteps);
    const auto expected = Expected(service, absl::StrCat("expected", prompt), layers);
    const auto engine = MustOpen(Options(service.target()));
    ASSERT_NE(engine, nullptr);
    EngineSequence* const sequence = MustAttach(*engine, absl::StrCat("a", prompt), layers);
    ASSERT_NE(sequence, nullptr);
    ASSERT_EQ(expected.size(), static_cast<size_t>(kSteps * kLayers));
    for (int64_t step = 0; step < kSteps; ++step) {
      for (int64_t l = 0; l < kLayers; ++l) {
        ASSERT_TRUE(AppendToken(*engine, sequence, layers, l, step).ok());
        std::vector<float> output(kOutput, std::numeric_limits<float>::quiet_NaN());
        const EngineStep one = {sequence, Query(layers[l], step).data(), output.data(), nullptr};
        const absl::Status status = engine->Step(l, {&one, 1}, nullptr);
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_EQ(output, expected[step * kLayers + l]) << "step " << step << " layer " << l;
      }
    }
    EXPECT_EQ(Engine::link(*sequence), "grpc");
    EXPECT_TRUE(engine->Close(sequence).ok());
  }
}

// KV as an engine's pages have it: K and V in turn, heads before tokens, in two pieces.
TEST_F(EngineTest, StridedRowsInPiecesAreTheSameSequence) {
  const Service service;
  constexpr int64_t kPrompt = 130, kSteps = 3;
  const auto layers = MakeLayers(kPrompt, kSteps);
  const auto expected = Expected(service, "expected", layers);
  const auto engine = MustOpen(Options(service.target()));
  ASSERT_NE(engine, nullptr);
  const auto sequence = engine->Create(Request("a", layers));
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  const int64_t row = kHeadDim * 2, tokens = kPrompt + kSteps;
  std::vector<std::vector<std::byte>> pages;  // [kv_heads, tokens, K and V, row]
  for (const TraceLayer& layer : layers) {
    std::vector<std::byte>& page = pages.emplace_back(2 * tokens * 2 * row);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < 2; ++h) {
        std::byte* const to = page.data() + (h * tokens + t) * 2 * row;
        std::memcpy(to, layer.keys.data() + (t * 2 + h) * row, row);
        std::memcpy(to + row, layer.values.data() + (t * 2 + h) * row, row);
      }
    }
  }
  const auto at = [&](int64_t l, int64_t token) {
    const std::byte* const first = pages[l].data() + token * 2 * row;
    return EngineKv{first, first + row, 2 * row, tokens * 2 * row};
  };
  for (int64_t l = 0; l < kLayers; ++l) {
    for (const int64_t first : {0, 50}) {
      const int64_t count = first == 0 ? 50 : kPrompt - 50;
      const absl::Status ingested =
          engine->Ingest(*sequence, l, first, count, at(l, first), layers[l].query_rms, nullptr);
      ASSERT_TRUE(ingested.ok()) << ingested;
    }
  }
  ASSERT_TRUE(engine->Seal(*sequence).ok());
  ASSERT_TRUE(engine->Attach(*sequence).ok());
  for (int64_t step = 0; step < kSteps; ++step) {
    for (int64_t l = 0; l < kLayers; ++l) {
      const EngineAppend append = {*sequence, at(l, kPrompt + step)};
      ASSERT_TRUE(engine->Append(l, {&append, 1}, nullptr).ok());
      std::vector<float> output(kOutput);
      const EngineStep one = {*sequence, Query(layers[l], step).data(), output.data(), nullptr};
      ASSERT_TRUE(engine->Step(l, {&one, 1}, nullptr).ok());
      EXPECT_EQ(output, expected[step * kLayers + l]);
    }
  }
}

TEST_F(EngineTest, EachSequenceOfABatchGetsItsOwn) {
  const Service service;
  constexpr int64_t kSteps = 20;
  const auto engine = MustOpen(Options(service.target()));
  ASSERT_NE(engine, nullptr);
  std::vector<std::vector<TraceLayer>> layers;
  std::vector<std::vector<std::vector<float>>> expected;
  std::vector<EngineSequence*> sequences;
  for (const int64_t prompt : {40, 150, 301}) {
    layers.push_back(MakeLayers(prompt, kSteps, static_cast<uint64_t>(prompt)));
    expected.push_back(Expected(service, absl::StrCat("expected", prompt), layers.back()));
    sequences.push_back(MustAttach(*engine, absl::StrCat("a", prompt), layers.back()));
    ASSERT_NE(sequences.back(), nullptr);
    ASSERT_EQ(expected.back().size(), static_cast<size_t>(kSteps * kLayers));
  }
  for (int64_t step = 0; step < kSteps; ++step) {
    for (int64_t l = 0; l < kLayers; ++l) {
      std::vector<std::vector<float>> outputs(3, std::vector<float>(kOutput));
      std::vector<EngineStep> batch;
      for (size_t i = 0; i < 3; ++i) {
        ASSERT_TRUE(AppendToken(*engine, sequences[i], layers[i], l, step).ok());
        batch.push_back(
            {sequences[i], Query(layers[i][l], step).data(), outputs[i].data(), nullptr});
      }
      ASSERT_TRUE(engine->Step(l, batch, nullptr).ok());
      for (size_t i = 0; i < 3; ++i) {
        ASSERT_EQ(outputs[i], expected[i][step * kLayers + l]) << "sequence " << i;
      }
    }
  }
}

TEST_F(EngineTest, OneThatFailsLeavesTheOthersRight) {
  const Service service;
  const auto layers = MakeLayers(100, 4);
  const auto expected = Expected(service, "expected", layers);
  const auto engine = MustOpen(Options(service.target()));
  ASSERT_NE(engine, nullptr);
  EngineSequence* const good = MustAttach(*engine, "good", layers);
  EngineSequence* const bad = MustAttach(*engine, "bad", layers);
  ASSERT_TRUE(good != nullptr && bad != nullptr);
  ASSERT_TRUE(AppendToken(*engine, good, layers, 0, 0).ok());
  ASSERT_TRUE(AppendToken(*engine, bad, layers, 0, 0).ok());
  ASSERT_TRUE(service.Connect()->ReleaseSequence(Engine::sequence(*bad).handle()).ok());
  std::vector<float> right(kOutput), wrong(kOutput, std::numeric_limits<float>::quiet_NaN());
  absl::Status of_good, of_bad;
  const auto query = Query(layers[0], 0);
  const std::vector<EngineStep> batch = {{bad, query.data(), wrong.data(), &of_bad},
                                         {good, query.data(), right.data(), &of_good}};
  const absl::Status status = engine->Step(0, batch, nullptr);
  EXPECT_TRUE(of_good.ok()) << of_good;
  EXPECT_FALSE(of_bad.ok());
  EXPECT_EQ(status, of_bad);
  const v1::ErrorReason reason = ReasonOf(of_bad);
  EXPECT_TRUE(reason == v1::SEQUENCE_RELEASED || reason == v1::SEQUENCE_NOT_FOUND) << of_bad;
  EXPECT_EQ(right, expected[0]);
  EXPECT_EQ(wrong, std::vector<float>(kOutput, 0.0f));
}

TEST_F(EngineTest, AFailureThatPassesLeavesTheSequenceUsable) {
  const Service service;
  const auto layers = MakeLayers(100, 4);
  const auto expected = Expected(service, "expected", layers);
  const auto engine = MustOpen(Options(service.target()));
  ASSERT_NE(engine, nullptr);
  EngineSequence* const sequence = MustAttach(*engine, "a", layers);
  ASSERT_NE(sequence, nullptr);
  ASSERT_TRUE(AppendToken(*engine, sequence, layers, 0, 0).ok());
  std::vector<std::byte> query(Query(layers[0], 0).begin(), Query(layers[0], 0).end());
  std::vector<float> output(kOutput, 1.0f);
  const EngineStep step = {sequence, query.data(), output.data(), nullptr};
  const uint16_t infinity = 0x7f80;
  std::vector<std::byte> finite = query;
  std::memcpy(query.data(), &infinity, sizeof(infinity));
  EXPECT_EQ(ReasonOf(engine->Step(0, {&step, 1}, nullptr)), v1::NON_FINITE_QUERY);
  EXPECT_EQ(output, std::vector<float>(kOutput, 0.0f));
  query = finite;
  const EngineStep again = {sequence, query.data(), output.data(), nullptr};
  EXPECT_TRUE(engine->Step(0, {&again, 1}, nullptr).ok());
  EXPECT_EQ(output, expected[0]);
}

TEST_F(EngineTest, AServerThatIsGoneIsATypedError) {
  auto service = std::make_unique<Service>(FreePort());  // nobody comes there after it
  const auto layers = MakeLayers(100, 4);
  EngineOptions options = Options(service->target());
  options.client.call_timeout = absl::Seconds(8);  // of Attach under load, too
  const auto engine = MustOpen(options);
  ASSERT_NE(engine, nullptr);
  EngineSequence* const sequence = MustAttach(*engine, "a", layers);
  ASSERT_NE(sequence, nullptr);
  service.reset();
  std::vector<float> output(kOutput, 1.0f);
  const EngineStep step = {sequence, Query(layers[0], 0).data(), output.data(), nullptr};
  EXPECT_TRUE(absl::IsUnavailable(engine->Step(0, {&step, 1}, nullptr)));
  EXPECT_EQ(output, std::vector<float>(kOutput, 0.0f));
}

TEST_F(EngineTest, ARestartedServerIsTold) {
  const int port = FreePort();
  auto service = std::make_unique<Service>(port);
  const auto layers = MakeLayers(100, 4);
  const auto engine = MustOpen(Options(service->target()));
  ASSERT_NE(engine, nullptr);
  EngineSequence* const sequence = MustAttach(*engine, "a", layers);
  ASSERT_NE(sequence, nullptr);
  service.reset();
  service = std::make_unique<Service>(port);
  std::vector<float> output(kOutput, 1.0f);
  const EngineStep step = {sequence, Query(layers[0], 0).data(), output.data(), nullptr};
  EXPECT_EQ(ReasonOf(engine->Step(0, {&step, 1}, nullptr)), v1::STALE_BOOT_ID);
}

TEST_F(EngineTest, OutputsAreOfTheTypeAskedFor) {
  const Service service;
  const auto layers = MakeLayers(100, 1);
  const auto expected = Expected(service, "expected", layers);
  EngineOptions options = Options(service.target());
  options.output_type = v1::ELEMENT_TYPE_BFLOAT16;
  const auto engine = MustOpen(options);
  ASSERT_NE(engine, nullptr);
  EngineSequence* const sequence = MustAttach(*engine, "a", layers);
  ASSERT_NE(sequence, nullptr);
  ASSERT_TRUE(AppendToken(*engine, sequence, layers, 0, 0).ok());
  std::vector<uint16_t> output(kOutput + 1, 0x1234);
  const EngineStep step = {sequence, Query(layers[0], 0).data(), output.data(), nullptr};
  ASSERT_TRUE(engine->Step(0, {&step, 1}, nullptr).ok());
  std::vector<uint16_t> want(kOutput);
  kernels::FromFloat(expected[0].data(), ElementType::kBFloat16, kOutput,
                     reinterpret_cast<std::byte*>(want.data()));
  EXPECT_EQ(output.back(), 0x1234);
  output.pop_back();
  EXPECT_EQ(output, want);
}

TEST_F(EngineTest, CallsOutOfOrderAreRefused) {
  const Service service;
  const auto layers = MakeLayers(50, 4);
  const auto engine = MustOpen(Options(service.target()));
  ASSERT_NE(engine, nullptr);
  const auto sequence = engine->Create(Request("a", layers));
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  const TraceLayer& layer = layers[0];
  const EngineKv kv = {layer.keys.data(), layer.values.data(), 0, 0};
  std::vector<float> output(kOutput);
  const EngineStep step = {*sequence, Query(layer, 0).data(), output.data(), nullptr};
  EXPECT_EQ(ReasonOf(engine->Step(0, {&step, 1}, nullptr)), v1::SEQUENCE_NOT_READY);
  EXPECT_EQ(ReasonOf(engine->Attach(*sequence)), v1::SEQUENCE_NOT_READY);
  EXPECT_EQ(ReasonOf(engine->Ingest(*sequence, 2, 0, 50, kv, {}, nullptr)), v1::LAYER_OUT_OF_RANGE);
  EXPECT_EQ(ReasonOf(engine->Ingest(*sequence, 0, 1, 50, kv, {}, nullptr)),
            v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(ReasonOf(engine->Ingest(*sequence, 0, 0, 0, kv, {}, nullptr)), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(ReasonOf(engine->Seal(*sequence)), v1::CHUNKS_MISSING);
  EngineSequence* const attached = MustAttach(*engine, "b", layers);
  ASSERT_NE(attached, nullptr);
  EXPECT_EQ(ReasonOf(engine->Ingest(attached, 0, 0, 50, kv, {}, nullptr)), v1::SEQUENCE_NOT_READY);
  const EngineStep wrong = {attached, Query(layer, 0).data(), output.data(), nullptr};
  EXPECT_EQ(ReasonOf(engine->Step(kLayers, {&wrong, 1}, nullptr)), v1::LAYER_OUT_OF_RANGE);
  EXPECT_TRUE(engine->Step(0, {}, nullptr).ok());
  EXPECT_TRUE(engine->Release(attached).ok());
  v1::SequenceHandle handle;
  handle.set_name("b");
  EXPECT_EQ(ReasonOf(engine->Attach(handle).status()), v1::SEQUENCE_NOT_FOUND);
}

TEST_F(EngineTest, DevicesThatThereAreNotAreRefused) {
  const Service service;
  EngineOptions options = Options(service.target());
  options.device = "tpu";
  EXPECT_TRUE(absl::IsInvalidArgument(Engine::Open(options).status()));
  options.device = "cuda:99";
  EXPECT_TRUE(absl::IsUnavailable(Engine::Open(options).status()));
}

// The sequence outlives its first reader; the second goes on where that one's tokens ended. With a
// budget beyond the context, so that it does not matter what is clustered when.
TEST_F(EngineTest, AnotherEngineGoesOnWhereOneClosed) {
  const Service service;
  constexpr int64_t kSteps = 12;
  constexpr uint32_t kAll = 1 << 20;
  const auto layers = MakeLayers(100, kSteps);
  const auto expected = Expected(service, "expected", layers, kAll);
  std::unique_ptr<Engine> engine = MustOpen(Options(service.target(), kAll));
  ASSERT_NE(engine, nullptr);
  EngineSequence* sequence = MustAttach(*engine, "a", layers);
  ASSERT_NE(sequence, nullptr);
  const std::unique_ptr<Engine> other = MustOpen(Options(service.target(), kAll));
  ASSERT_NE(other, nullptr);
  for (int64_t step = 0; step < kSteps; ++step) {
    if (step == 5) {
      ASSERT_TRUE(engine->Close(sequence).ok());
      v1::SequenceHandle handle;
      handle.set_name("a");
      const auto attached = other->Attach(handle);
      ASSERT_TRUE(attached.ok()) << attached.status();
      sequence = *attached;
    }
    Engine& now = step < 5 ? *engine : *other;
    for (int64_t l = 0; l < kLayers; ++l) {
      ASSERT_TRUE(AppendToken(now, sequence, layers, l, step).ok());
      std::vector<float> output(kOutput);
      const EngineStep one = {sequence, Query(layers[l], step).data(), output.data(), nullptr};
      ASSERT_TRUE(now.Step(l, {&one, 1}, nullptr).ok());
      ASSERT_EQ(output.size(), expected[step * kLayers + l].size());
      for (size_t i = 0; i < output.size(); ++i) {
        ASSERT_FALSE(!(std::abs(output[i] - expected[step * kLayers + l][i]) <= 1e-4f));
      }
    }
  }
}

}  // namespace
}  // namespace clusterkv::worker
