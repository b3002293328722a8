#include "worker/prefill_writer.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/error.h"
#include "tests/free_port.h"
#include "tests/test_seed.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::worker {
namespace {

const kernels::KvShape kShape = {2, 4, 32, kernels::ElementType::kBFloat16};

std::vector<TraceLayer> MakeLayers(int64_t tokens) {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < 3; ++l) layers.push_back(MakeLayer(kShape, tokens + 4, 4, l + 1));
  return layers;
}

// What the service built, layer by layer.
std::vector<uint64_t> Digests(const v1::Sequence& sequence) {
  std::vector<uint64_t> digests;
  for (const v1::LayerInfo& layer : sequence.layers()) digests.push_back(layer.index_digest());
  return digests;
}

TEST(PrefillWriterTest, ChunkSizeChangesNothing) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = MakeLayers(401);
  std::vector<uint64_t> expected;
  for (const int64_t chunk_bytes : {1 << 20, 1, 257, 4096}) {
    const auto sequence =
        Prefill(client.get(), OpenRequest(absl::StrCat("a", chunk_bytes), layers), layers,
                {.chunk_bytes = chunk_bytes, .max_in_flight_bytes = 1 << 20});
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    EXPECT_EQ(sequence->state(), v1::SEQUENCE_STATE_READY);
    if (expected.empty()) expected = Digests(*sequence);
    EXPECT_EQ(Digests(*sequence), expected);
    EXPECT_EQ(expected.size(), 3u);
  }
}

TEST(PrefillWriterTest, FullQueueRefusesAndLaterTakes) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = MakeLayers(1000);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok()) << opened.status();
  const TraceLayer& layer = layers[0];
  const int64_t put_bytes = 2 * static_cast<int64_t>(Rows(layer, layer.keys, 0, 100).size());
  auto writer = PrefillWriter::Create(client.get(), *opened,
                                      {.chunk_bytes = 256, .max_in_flight_bytes = 2 * put_bytes});
  ASSERT_TRUE(writer.ok()) << writer.status();
  int refused = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    for (int64_t begin = 0; begin < 1000; begin += 100) {
      while (true) {
        const absl::Status put =
            (*writer)->Put(static_cast<int64_t>(l), begin, 100,
                           Rows(layers[l], layers[l].keys, begin, begin + 100),
                           Rows(layers[l], layers[l].values, begin, begin + 100),
                           begin == 0 ? layers[l].query_rms : std::vector<float>());
        if (put.ok()) break;
        ASSERT_EQ(ReasonOf(put), v1::LIMIT_EXCEEDED) << put;
        ++refused;
        ASSERT_TRUE((*writer)->WaitForRoom(put_bytes).ok());
      }
    }
  }
  EXPECT_GT(refused, 0);
  const auto sequence = (*writer)->Finish();
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  const auto whole = Prefill(client.get(), OpenRequest("b", layers), layers);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(Digests(*sequence), Digests(*whole));
}

TEST(PrefillWriterTest, RowsThatDoNotFitAreRefusedAtOnce) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = MakeLayers(100);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok());
  auto writer = PrefillWriter::Create(client.get(), *opened,
                                      {.chunk_bytes = 256, .max_in_flight_bytes = 20'000});
  ASSERT_TRUE(writer.ok());
  const auto put = [&](int64_t layer, int64_t first, int64_t tokens, int64_t rows,
                       std::vector<float> query_rms = {}) {
    return ReasonOf((*writer)->Put(layer, first, tokens, Rows(layers[0], layers[0].keys, 0, rows),
                                   Rows(layers[0], layers[0].values, 0, rows), query_rms));
  };
  EXPECT_EQ(put(3, 0, 10, 10), v1::LAYER_OUT_OF_RANGE);
  EXPECT_EQ(put(-1, 0, 10, 10), v1::LAYER_OUT_OF_RANGE);
  EXPECT_EQ(put(0, 91, 10, 10), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(put(0, -1, 10, 10), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(put(0, 0, 0, 0), v1::TOKENS_OUT_OF_RANGE);
  EXPECT_EQ(put(0, 0, 10, 11), v1::SHAPE_MISMATCH);
  EXPECT_EQ(put(0, 0, 10, 10, {1.0f}), v1::SHAPE_MISMATCH);
  EXPECT_EQ(put(0, 0, 100, 100), v1::INVALID_FIELD);  // more than may ever be in flight
  EXPECT_EQ(ReasonOf((*writer)->WaitForRoom(20'001)), v1::INVALID_FIELD);
  EXPECT_TRUE((*writer)->status().ok());
}

TEST(PrefillWriterTest, ServersRefusalEndsTheWriter) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = MakeLayers(100);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok());
  const std::vector<TraceLayer> others = {MakeLayer(kShape, 104, 4, 99)};
  auto writer = PrefillWriter::Create(client.get(), *opened);
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE((*writer)
                  ->Put(0, 0, 50, Rows(layers[0], layers[0].keys, 0, 50),
                        Rows(layers[0], layers[0].values, 0, 50), layers[0].query_rms)
                  .ok());
  ASSERT_TRUE(PutAll(writer->get(), others).ok());  // conflicts
  const auto sequence = (*writer)->Finish();
  EXPECT_EQ(ReasonOf(sequence.status()), v1::CHUNK_CONFLICT) << sequence.status();
  EXPECT_EQ(ReasonOf((*writer)->status()), v1::CHUNK_CONFLICT);
}

TEST(PrefillWriterTest, MissingTokensAreNamedAtTheEnd) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = MakeLayers(100);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok());
  auto writer = PrefillWriter::Create(client.get(), *opened);
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(PutAll(writer->get(), {layers[0]}).ok());
  EXPECT_EQ(ReasonOf((*writer)->Finish().status()), v1::CHUNKS_MISSING);
}

TEST(PrefillWriterTest, AbandonedWriterLeavesNothingBehind) {
  const Service service;
  const auto client = service.Connect();
  const std::vector<TraceLayer> layers = MakeLayers(1000);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok());
  auto writer = PrefillWriter::Create(client.get(), *opened, {.chunk_bytes = 64});
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(PutAll(writer->get(), layers).ok());
  writer->reset();
  ASSERT_TRUE(client->ReleaseSequence(opened->handle()).ok());
}

TEST(PrefillWriterTest, CutConnectionsAreSurvivedAtAnyByte) {
  std::mt19937_64 random(TestSeed(17));
  Service service;
  CuttingProxy proxy(service.target());
  auto client = Client::Connect(proxy.address());
  ASSERT_TRUE(client.ok()) << client.status();
  const std::vector<TraceLayer> layers = MakeLayers(300);
  const auto direct = Prefill(client->get(), OpenRequest("whole", layers), layers);
  ASSERT_TRUE(direct.ok()) << direct.status();
  const int64_t bytes = 3 * 300 * 2 * 2 * 32 * 2;
  for (int i = 0; i < 20; ++i) {
    const auto opened = (*client)->OpenSequence(OpenRequest(absl::StrCat("cut", i), layers));
    ASSERT_TRUE(opened.ok()) << opened.status();
    auto writer = PrefillWriter::Create(client->get(), *opened, {.chunk_bytes = 2048});
    ASSERT_TRUE(writer.ok());
    proxy.CutAfter(static_cast<int64_t>(random() % bytes));
    ASSERT_TRUE(PutAll(writer->get(), layers).ok());
    const auto sequence = (*writer)->Finish();
    proxy.CutAfter(-1);
    ASSERT_TRUE(sequence.ok()) << i << ": " << sequence.status();
    EXPECT_EQ(Digests(*sequence), Digests(*direct));
    ASSERT_TRUE((*client)->Reconnect(absl::Seconds(10), nullptr).ok());
    ASSERT_TRUE((*client)->ReleaseSequence(opened->handle()).ok());
  }
  EXPECT_GE(proxy.cuts(), 15);
}

TEST(PrefillWriterTest, RestartedServerIsTold) {
  const int port = FreePort();
  auto service = std::make_unique<Service>(port);
  const auto client = service->Connect();
  const std::vector<TraceLayer> layers = MakeLayers(100);
  const auto opened = client->OpenSequence(OpenRequest("a", layers));
  ASSERT_TRUE(opened.ok());
  auto writer = PrefillWriter::Create(client.get(), *opened);
  ASSERT_TRUE(writer.ok());
  service.reset();
  service = std::make_unique<Service>(port);
  const absl::Status put = PutAll(writer->get(), layers);
  const auto sequence = (*writer)->Finish();
  EXPECT_EQ(ReasonOf(sequence.status()), v1::STALE_BOOT_ID) << sequence.status();
  // And the worker starts anew.
  const auto again = Prefill(client.get(), OpenRequest("a", layers), layers);
  EXPECT_TRUE(again.ok()) << again.status();
}

}  // namespace
}  // namespace clusterkv::worker
