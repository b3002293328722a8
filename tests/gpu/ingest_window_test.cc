// A prompt from a GPU's memory by window beside the same by PutKv, through a real server: in this
// process on the emulator, in one of its own on a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/runtime/device.h"
#include "proto/error.h"
#include "tests/gpu/gpu_server.h"
#include "tests/gpu/on_device.h"
#include "tests/worker/worker_harness.h"
#include "worker/cuda_ingest_ring.h"
#include "worker/engine.h"
#include "worker/engine_cuda.h"
#include "worker/window_writer.h"

namespace clusterkv::worker {
namespace {

using kernels::DeviceBuffer;
using kernels::ElementType;
using kernels::Stream;

constexpr int64_t kLayers = 2, kQueryHeads = 4, kKvHeads = 2, kHeadDim = 32, kPrompt = 150;
constexpr int64_t kSteps = 3;
// Pieces that a layer comes in, and a ring with slots for all of them; one with too few.
constexpr int64_t kPieces = 4, kPieceTokens = (kPrompt + kPieces - 1) / kPieces;
constexpr IngestRingOptions kRoomy = {kPieces * kLayers, 1 << 20};
constexpr IngestRingOptions kTight = {1, 4096};

// The worker's GPU: another than the server's, where there is one.
int WorkerGpu() { return std::min(kernels::DeviceCount() - 1, 1); }

struct Case {
  std::string preset, codec;
  ElementType type = ElementType::kBFloat16;
};

std::vector<TraceLayer> MakeLayers(ElementType type) {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < kLayers; ++l) {
    layers.push_back(
        MakeLayer({kKvHeads, kQueryHeads, kHeadDim, type}, kPrompt + kSteps, kSteps, 70 + l));
  }
  return layers;
}

// A layer's prompt in the worker's GPU memory, [kv_heads, tokens, K and V, row].
class LayerOnGpu {
 public:
  explicit LayerOnGpu(const TraceLayer& layer)
      : row_(kHeadDim * kernels::ElementBytes(layer.shape.element_type)) {
    std::vector<std::byte> page(static_cast<size_t>(kKvHeads * kPrompt * 2 * row_));
    for (int64_t t = 0; t < kPrompt; ++t) {
      for (int64_t h = 0; h < kKvHeads; ++h) {
        std::byte* const to = page.data() + (h * kPrompt + t) * 2 * row_;
        std::memcpy(to, layer.keys.data() + (t * kKvHeads + h) * row_, row_);
        std::memcpy(to + row_, layer.values.data() + (t * kKvHeads + h) * row_, row_);
      }
    }
    buffer_ = OnDevice(page.data(), page.size(), WorkerGpu());
  }
  // From `token` on.
  EngineKv At(int64_t token) const {
    const std::byte* const first = buffer_.data() + token * 2 * row_;
    return {first, first + row_, 2 * row_, kPrompt * 2 * row_};
  }

 private:
  const int64_t row_;
  DeviceBuffer buffer_;
};

std::unique_ptr<Engine> OpenEngine(const GpuServer& server, const IngestRingOptions& ring) {
  EngineOptions options;
  options.target = server.target();
  options.ingest_ring = ring;
  auto device = MakeCudaEngineDevice(WorkerGpu(), absl::Seconds(120));
  EXPECT_TRUE(device.ok()) << device.status();
  auto engine = Engine::Open(options, std::move(*device));
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? std::move(*engine) : nullptr;
}

v1::OpenSequenceRequest Request(const std::string& name, const Case& c,
                                const std::vector<TraceLayer>& layers) {
  v1::OpenSequenceRequest request = OpenRequest(name, layers);
  request.set_preset(c.preset);
  request.set_codec(c.codec);
  return request;
}

class IngestWindowTest : public testing::Test {
 protected:
  IngestWindowTest() : stream_(Stream::Create(WorkerGpu()).value()) {}

  // Ingests the prompt in pieces of `step` tokens and seals it.
  absl::StatusOr<v1::Sequence> Ingest(Engine* engine, const v1::OpenSequenceRequest& request,
                                      const std::vector<TraceLayer>& layers, int64_t step) {
    const absl::StatusOr<EngineSequence*> created = engine->Create(request);
    if (!created.ok()) return created.status();
    std::vector<LayerOnGpu> on_gpu;
    for (int64_t l = 0; l < kLayers; ++l) {
      on_gpu.emplace_back(layers[l]);
      for (int64_t token = 0; token < kPrompt; token += step) {
        const absl::Status ingested =
            engine->Ingest(*created, l, token, std::min(step, kPrompt - token),
                           on_gpu.back().At(token), layers[l].query_rms, stream_.get());
        if (!ingested.ok()) return ingested;
      }
    }
    EXPECT_TRUE(stream_.Synchronize().ok());
    const absl::Status sealed = engine->Seal(*created);
    if (!sealed.ok()) return sealed;
    return Engine::sequence(**created);
  }

  // What a decode of each token and layer answers.
  static std::vector<std::vector<float>> Decode(Client* client, const v1::SequenceHandle& handle,
                                                const std::vector<TraceLayer>& layers) {
    DecodeOptions options;
    options.hot_cache.set_capacity_tokens(64);
    auto session = DecodeSession::Attach(client, handle, options);
    EXPECT_TRUE(session.ok()) << session.status();
    std::vector<std::vector<float>> outputs;
    for (int64_t step = 0; session.ok() && step < kSteps; ++step) {
      for (int64_t l = 0; l < kLayers; ++l) {
        const int64_t token = kPrompt + step;
        absl::Status status =
            (*session)->Append(l, Rows(layers[l], layers[l].keys, token, token + 1),
                               Rows(layers[l], layers[l].values, token, token + 1));
        EXPECT_TRUE(status.ok()) << status;
        outputs.emplace_back(kQueryHeads * kHeadDim, std::numeric_limits<float>::quiet_NaN());
        status =
            (*session)->Step(l, Query(layers[l], step), absl::MakeSpan(outputs.back()), nullptr);
        EXPECT_TRUE(status.ok()) << status;
      }
    }
    return outputs;
  }

  // The prompt from the GPU is the one that a PrefillWriter puts.
  void ExpectSame(const GpuServer& server, const Case& c, const IngestRingOptions& ring,
                  int64_t step, IngestCounts* counts) {
    SCOPED_TRACE(absl::StrCat(c.preset, " ", c.codec, " ", kernels::ElementBytes(c.type)));
    const auto layers = MakeLayers(c.type);
    const auto client = server.Connect();
    const auto engine = OpenEngine(server, ring);
    const auto got = Ingest(engine.get(), Request("window", c, layers), layers, step);
    ASSERT_TRUE(got.ok()) << got.status();
    const auto want = Prefill(client.get(), Request("chunks", c, layers), layers);
    ASSERT_TRUE(want.ok()) << want.status();
    for (int l = 0; l < static_cast<int>(kLayers); ++l) {
      EXPECT_EQ(got->layers(l).index_digest(), want->layers(l).index_digest()) << l;
    }
    EXPECT_EQ(Decode(client.get(), got->handle(), layers),
              Decode(client.get(), want->handle(), layers));
    *counts = engine->ingest_counts();
    for (const auto& sequence : {*got, *want}) {
      EXPECT_TRUE(client->ReleaseSequence(sequence.handle()).ok());
    }
  }
  static int64_t PromptBytes(ElementType type) {
    return 2 * kLayers * kPrompt * kKvHeads * kHeadDim * kernels::ElementBytes(type);
  }

  Stream stream_;
};

TEST_F(IngestWindowTest, APromptFromTheGpuIsThatOfPutKv) {
  const GpuServer server("cuda:0");
  const std::vector<Case> cases = {{"default", "raw"},
                                   {"default", "k8v4"},
                                   {"recall", "raw", ElementType::kFloat32},
                                   {"clusterkv", "raw", ElementType::kFloat16}};
  for (const Case& c : cases) {
    IngestCounts counts;
    ExpectSame(server, c, kRoomy, kPrompt, &counts);
    EXPECT_EQ(counts.window_bytes, PromptBytes(c.type));
    EXPECT_EQ(counts.host_bytes, 0);
    EXPECT_TRUE(counts.fallbacks.empty()) << counts.fallbacks.begin()->first;
  }
}

TEST_F(IngestWindowTest, NothingIsCopiedFromTheHostToTheDevice) {
  const GpuServer server("cuda:0");
  const auto layers = MakeLayers(ElementType::kBFloat16);
  const auto engine = OpenEngine(server, kRoomy);
  const auto sealed =
      Ingest(engine.get(), Request("a", {"default", "raw"}, layers), layers, kPieceTokens);
  ASSERT_TRUE(sealed.ok()) << sealed.status();
  EXPECT_EQ(engine->ingest_counts().host_bytes, 0);
  EXPECT_EQ(engine->ingest_counts().window_bytes, PromptBytes(ElementType::kBFloat16));
  EXPECT_EQ(static_cast<int64_t>(server.stats().window_bytes()),
            PromptBytes(ElementType::kBFloat16));
  EXPECT_EQ(server.stats().device_uploaded_bytes(), 0u);
}

TEST_F(IngestWindowTest, RowsWithoutASlotGoThroughTheHost) {
  const GpuServer server("cuda:0");
  IngestCounts counts;
  ExpectSame(server, {"default", "raw"}, kTight, kPieceTokens, &counts);
  EXPECT_EQ(counts.window_bytes + counts.host_bytes, PromptBytes(ElementType::kBFloat16));
  EXPECT_EQ(counts.host_bytes > 0, counts.fallbacks.count("no free slot") > 0);
}

TEST_F(IngestWindowTest, AServerWithoutAGpuGetsChunks) {
  const GpuServer server("cpu");
  IngestCounts counts;
  ExpectSame(server, {"default", "raw"}, kRoomy, kPrompt, &counts);
  EXPECT_EQ(counts.window_bytes, 0);
  EXPECT_EQ(counts.host_bytes, PromptBytes(ElementType::kBFloat16));
  EXPECT_EQ(counts.fallbacks.size(), 1u);
}

TEST_F(IngestWindowTest, WhatIsNotFiniteIsToldByName) {
  const GpuServer server("cuda:0");
  auto layers = MakeLayers(ElementType::kFloat32);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(layers[1].values.data() + ((50 * kKvHeads + 1) * kHeadDim + 7) * 4, &nan, 4);
  const auto engine = OpenEngine(server, kRoomy);
  const absl::Status refused =
      Ingest(engine.get(), Request("a", {"default", "raw"}, layers), layers, kPrompt).status();
  EXPECT_EQ(ReasonOf(refused), v1::NON_FINITE_KEY) << refused;
  EXPECT_THAT(
      MetadataOf(refused),
      testing::IsSupersetOf(ErrorMetadata{
          {"field", "values"}, {"layer", "1"}, {"token", "50"}, {"head", "1"}, {"channel", "7"}}));
}

TEST_F(IngestWindowTest, AWorkerThatGoesLeavesNothingBehind) {
  const GpuServer server("cuda:0");
  const auto layers = MakeLayers(ElementType::kBFloat16);
  {
    const auto engine = OpenEngine(server, kRoomy);
    const auto created = engine->Create(Request("gone", {"default", "raw"}, layers));
    ASSERT_TRUE(created.ok()) << created.status();
    const LayerOnGpu rows(layers[0]);
    ASSERT_TRUE(engine->Ingest(*created, 0, 0, kPrompt, rows.At(0), {}, stream_.get()).ok());
    EXPECT_TRUE(stream_.Synchronize().ok());
    EXPECT_EQ(server.stats().ingest_windows(), 1u);
  }
  // The server hears of it when it does; ctest's timeout ends a wait for nothing.
  while (server.stats().ingest_windows() > 0 || server.stats().sequences() > 0) {
    std::this_thread::yield();
  }
  IngestCounts counts;
  ExpectSame(server, {"default", "raw"}, kRoomy, kPrompt, &counts);
}

TEST_F(IngestWindowTest, AWindowThatEndedIsPassedByAndConnectedAnew) {
  const GpuServer server("cuda:0");
  const auto layers = MakeLayers(ElementType::kBFloat16);
  const auto client = server.Connect();
  WindowWriter writer(client.get(), [] { return MakeCudaIngestRing(WorkerGpu(), 2, 1 << 20); });
  writer.Connect();
  ASSERT_EQ(server.stats().ingest_windows(), 1u);
  const uint64_t ended = client->session_id();
  server.ForceReleaseWorker(ended);
  ASSERT_EQ(server.stats().ingest_windows(), 0u);

  const v1::Sequence sequence =
      client->OpenSequence(Request("a", {"default", "raw"}, layers)).value();
  const auto otherwise = PrefillWriter::Create(client.get(), sequence).value();
  const int64_t row = kHeadDim * 2;
  for (int64_t l = 0; l < kLayers; ++l) {
    const LayerOnGpu on_gpu(layers[l]);
    const EngineKv kv = on_gpu.At(0);
    WindowWriter::Rows rows;
    rows.sequence = &sequence.handle();
    rows.layer = l;
    rows.keys = {kv.keys, kPrompt, kKvHeads, row, kv.token_stride_bytes, kv.head_stride_bytes};
    rows.values = {kv.values, kPrompt, kKvHeads, row, kv.token_stride_bytes, kv.head_stride_bytes};
    rows.otherwise = otherwise.get();
    std::promise<absl::Status> put;
    const auto taken = writer.Put(rows, stream_.get(), /*wait=*/true,
                                  [&](const absl::Status& status) { put.set_value(status); });
    ASSERT_TRUE(taken.ok()) << taken.status();
    ASSERT_EQ(*taken, kPrompt);
    const absl::Status status = put.get_future().get();
    EXPECT_TRUE(status.ok()) << status;
    if (l == 0) {
      EXPECT_EQ(writer.counts().host_bytes, PromptBytes(ElementType::kBFloat16) / kLayers);
      while (client->session_id() == 0 || client->session_id() == ended) std::this_thread::yield();
      writer.Connect();
    }
  }
  EXPECT_EQ(writer.counts().window_bytes, PromptBytes(ElementType::kBFloat16) / kLayers);
  EXPECT_EQ(writer.counts().fallbacks.size(), 1u);
  EXPECT_TRUE(otherwise->Finish().ok());
}

}  // namespace
}  // namespace clusterkv::worker
