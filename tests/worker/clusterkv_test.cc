// clusterkv.h from C: clusterkv_caller.c is compiled as C99.
#include "worker/clusterkv.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/worker/clusterkv_caller.h"
#include "tests/worker/worker_harness.h"
#include "worker/decode_session.h"

namespace clusterkv::worker {
namespace {

constexpr uint32_t kLayers = 2, kPrompt = 120, kSteps = 20, kOutput = 4 * 32;

std::vector<TraceLayer> MakeLayers() {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < kLayers; ++l) {
    layers.push_back(
        MakeLayer({2, 4, 32, kernels::ElementType::kFloat32}, kPrompt + kSteps, kSteps, l + 1));
  }
  return layers;
}

std::vector<float> Expected(const Service& service, const std::vector<TraceLayer>& layers) {
  std::vector<float> outputs(kSteps * kLayers * kOutput);
  const auto client = service.Connect();
  const auto sequence = Prefill(client.get(), OpenRequest("expected", layers), layers);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  if (!sequence.ok()) return outputs;
  DecodeOptions options;
  options.hot_cache.set_capacity_tokens(64);
  const auto session = DecodeSession::Attach(client.get(), sequence->handle(), options);
  EXPECT_TRUE(session.ok()) << session.status();
  if (!session.ok()) return outputs;
  for (uint32_t step = 0; step < kSteps; ++step) {
    for (uint32_t l = 0; l < kLayers; ++l) {
      const int64_t token = kPrompt + step;
      EXPECT_TRUE((*session)
                      ->Append(l, Rows(layers[l], layers[l].keys, token, token + 1),
                               Rows(layers[l], layers[l].values, token, token + 1))
                      .ok());
      const auto output = absl::MakeSpan(outputs).subspan((step * kLayers + l) * kOutput, kOutput);
      EXPECT_TRUE((*session)->Step(l, Query(layers[l], step), output, nullptr).ok());
    }
  }
  return outputs;
}

TEST(ClusterkvTest, AnEngineInCGetsADecodeSessionsOutputs) {
  const Service service;
  const auto layers = MakeLayers();
  const auto floats = [](const std::vector<std::byte>& bytes) {
    return reinterpret_cast<const float*>(bytes.data());
  };
  std::vector<const float*> keys, values, queries, rms;
  for (const TraceLayer& layer : layers) {
    keys.push_back(floats(layer.keys));
    values.push_back(floats(layer.values));
    queries.push_back(floats(layer.q));
    rms.push_back(layer.query_rms.data());
  }
  const caller_model model = {
      "a",           kLayers,        2,         4, 32, kPrompt, kSteps, keys.data(),
      values.data(), queries.data(), rms.data()};
  std::vector<float> outputs(kSteps * kLayers * kOutput, -1.0f);
  char message[512] = "";
  ASSERT_EQ(caller_run(service.target().c_str(), &model, outputs.data(), message, sizeof(message)),
            0)
      << message;
  EXPECT_EQ(outputs, Expected(service, layers));
}

TEST(ClusterkvTest, WhatIsMissingIsAnErrorNotACrash) {
  const Service service;
  ckv_engine* engine = nullptr;
  ckv_sequence* sequence = nullptr;
  ckv_options options;
  EXPECT_EQ(ckv_open(nullptr, &engine), CKV_INVALID_ARGUMENT);
  CKV_INIT(&options);
  EXPECT_EQ(ckv_open(&options, &engine), CKV_INVALID_ARGUMENT);  // no target
  EXPECT_STREQ(ckv_error_reason(), "INVALID_FIELD");
  const std::string target = service.target();
  options.target = target.c_str();
  EXPECT_EQ(ckv_open(&options, nullptr), CKV_INVALID_ARGUMENT);
  options.links = "peer,carrier-pigeon";
  EXPECT_EQ(ckv_open(&options, &engine), CKV_INVALID_ARGUMENT);
  options.links = nullptr;
  options.size = 0;
  EXPECT_EQ(ckv_open(&options, &engine), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(engine, nullptr);
  CKV_INIT(&options);
  options.target = target.c_str();
  ASSERT_EQ(ckv_open(&options, &engine), CKV_OK) << ckv_error_message();
  EXPECT_EQ(ckv_seal(engine, nullptr), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(ckv_wait(nullptr, nullptr), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(ckv_join(engine, nullptr, 0), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(ckv_join(engine, &sequence, 1), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(ckv_settle(engine, nullptr, nullptr), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(ckv_attach_by_name(engine, "nobody", &sequence), CKV_NOT_FOUND);
  EXPECT_STREQ(ckv_error_reason(), "SEQUENCE_NOT_FOUND");
  ckv_step_entry entry;
  std::memset(&entry, 0, sizeof(entry));
  EXPECT_EQ(ckv_step(engine, 0, &entry, 1, nullptr), CKV_INVALID_ARGUMENT);
  EXPECT_EQ(ckv_step(engine, 0, nullptr, 0, nullptr), CKV_OK);
  ckv_shutdown(engine);
  ckv_shutdown(nullptr);
}

// An older caller's struct ends earlier; a newer one's may only say nothing new.
TEST(ClusterkvTest, StructsMayBeOlderOrNewer) {
  const Service service;
  const std::string target = service.target();
  ckv_engine* engine = nullptr;
  struct {
    ckv_options options;
    uint64_t later;
  } newer;
  CKV_INIT(&newer.options);
  newer.options.target = target.c_str();
  newer.options.size = sizeof(newer);
  newer.later = 0;
  ASSERT_EQ(ckv_open(&newer.options, &engine), CKV_OK) << ckv_error_message();
  ckv_shutdown(engine);
  engine = nullptr;
  newer.later = 1;
  EXPECT_EQ(ckv_open(&newer.options, &engine), CKV_UNIMPLEMENTED);
  EXPECT_STREQ(ckv_error_reason(), "UNSUPPORTED");
  newer.options.size = offsetof(ckv_options, device);
  newer.options.device = "a place that this library must not look at";
  ASSERT_EQ(ckv_open(&newer.options, &engine), CKV_OK) << ckv_error_message();
  ckv_shutdown(engine);
}

TEST(ClusterkvTest, ErrorsAreOfTheirThread) {
  ckv_engine* engine = nullptr;
  EXPECT_EQ(ckv_open(nullptr, &engine), CKV_INVALID_ARGUMENT);
  std::thread other([] {
    EXPECT_STREQ(ckv_error_message(), "");
    EXPECT_EQ(ckv_seal(nullptr, nullptr), CKV_INVALID_ARGUMENT);
    EXPECT_STREQ(ckv_error_message(), "engine: expected one, got none");
  });
  other.join();
  EXPECT_STREQ(ckv_error_message(), "options: expected one, got none");
}

}  // namespace
}  // namespace clusterkv::worker
