// Engine over CUDA's pointers and streams: the outputs of a DecodeSession, within what the kernel's
// products may differ by.
#include "worker/engine_cuda.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/runtime/device.h"
#include "proto/error.h"
#include "tests/gpu/gpu_server.h"
#include "tests/gpu/on_device.h"
#include "tests/worker/worker_harness.h"
#include "worker/engine.h"
#include "worker/stream_cuda.h"

namespace clusterkv::worker {
namespace {

using kernels::DeviceBuffer;
using kernels::ElementType;
using kernels::PinnedBuffer;
using kernels::Stream;

constexpr int64_t kLayers = 2, kQueryHeads = 4, kKvHeads = 2, kHeadDim = 32;
constexpr int64_t kOutput = kQueryHeads * kHeadDim;
constexpr float kTolerance = 5e-4f;  // outputs are 1 to 3

struct Case {
  std::string preset, codec;
  ElementType type;
  int64_t prompt;
  uint32_t window = 8;
};

std::vector<TraceLayer> MakeLayers(const Case& c, int64_t steps, uint64_t seed = 1) {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < kLayers; ++l) {
    layers.push_back(MakeLayer({kKvHeads, kQueryHeads, kHeadDim, c.type}, c.prompt + steps, steps,
                               seed * 10 + l));
  }
  return layers;
}

v1::OpenSequenceRequest Request(const std::string& name, const Case& c,
                                const std::vector<TraceLayer>& layers) {
  v1::OpenSequenceRequest request = OpenRequest(name, layers);
  request.set_preset(c.preset);
  request.set_codec(c.codec);
  request.mutable_index()->set_window_tokens(c.window);
  return request;
}

EngineOptions Options(const std::string& target, const std::vector<v1::Link>& links = {}) {
  EngineOptions options;
  options.target = target;
  options.decode.links = links;
  options.decode.hot_cache.set_capacity_tokens(64);
  options.decode.select.set_budget_tokens(32);
  options.threads = 2;
  return options;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_FALSE(!(std::abs(got[i] - want[i]) <= kTolerance))
        << i << ": " << got[i] << " against " << want[i];
  }
}

class EngineCudaTest : public testing::Test {
 protected:
  void SetUp() override {
    auto stream = Stream::Create(0);
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_ = std::make_unique<Stream>(std::move(*stream));
    if (target_.empty()) {
      service_ = std::make_unique<Service>();
      target_ = service_->target();
    }
    Open({});
  }
  void TearDown() override { engine_.reset(); }

  // Anew, with these links.
  void Open(const std::vector<v1::Link>& links) {
    engine_.reset();
    auto device = MakeCudaEngineDevice(0, absl::Seconds(240));
    ASSERT_TRUE(device.ok()) << device.status();
    auto engine = Engine::Open(Options(target_, links), std::move(*device));
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = std::move(*engine);
    auto client = Client::Connect(target_);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = std::move(*client);
  }

  // Filled from device memory whose rows lie apart, sealed and attached.
  EngineSequence* MustAttach(const std::string& name, const Case& c,
                             const std::vector<TraceLayer>& layers) {
    const auto created = engine_->Create(Request(name, c, layers));
    EXPECT_TRUE(created.ok()) << created.status();
    if (!created.ok()) return nullptr;
    const int64_t row = kHeadDim * kernels::ElementBytes(c.type);
    std::vector<DeviceBuffer> pages;  // [kv_heads, tokens, K and V, row]
    for (int64_t l = 0; l < kLayers; ++l) {
      const TraceLayer& layer = layers[l];
      std::vector<std::byte> page(static_cast<size_t>(kKvHeads * c.prompt * 2 * row));
      for (int64_t t = 0; t < c.prompt; ++t) {
        for (int64_t h = 0; h < kKvHeads; ++h) {
          std::byte* const to = page.data() + (h * c.prompt + t) * 2 * row;
          std::memcpy(to, layer.keys.data() + (t * kKvHeads + h) * row, row);
          std::memcpy(to + row, layer.values.data() + (t * kKvHeads + h) * row, row);
        }
      }
      pages.push_back(OnDevice(page));
      const std::byte* const first = pages.back().data();
      const absl::Status ingested = engine_->Ingest(
          *created, l, 0, c.prompt, {first, first + row, 2 * row, c.prompt * 2 * row},
          layer.query_rms, Cuda());
      EXPECT_TRUE(ingested.ok()) << ingested;
    }
    absl::Status status = engine_->Seal(*created);
    EXPECT_TRUE(status.ok()) << status;
    status = engine_->Attach(*created);
    EXPECT_TRUE(status.ok()) << status;
    return *created;
  }
  std::unique_ptr<DecodeSession> MustMirror(const std::string& name, const Case& c,
                                            const std::vector<TraceLayer>& layers) {
    const auto sequence = Prefill(client_.get(), Request(name, c, layers), layers);
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    if (!sequence.ok()) return nullptr;
    auto session =
        DecodeSession::Attach(client_.get(), sequence->handle(), Options(target_).decode);
    EXPECT_TRUE(session.ok()) << session.status();
    return session.ok() ? std::move(*session) : nullptr;
  }

  EngineStream Cuda() { return stream_->get(); }

  absl::Status Append(EngineSequence* sequence, const TraceLayer& layer, int64_t l, int64_t step) {
    const int64_t token = layer.tokens - layer.queries + step;
    const DeviceBuffer key = OnDevice(Rows(layer, layer.keys, token, token + 1));
    const DeviceBuffer value = OnDevice(Rows(layer, layer.values, token, token + 1));
    const EngineAppend append = {sequence, {key.data(), value.data(), 0, 0}};
    absl::Status status = engine_->Append(l, {&append, 1}, Cuda());
    EXPECT_TRUE(stream_->Synchronize().ok());  // before the buffers go
    return status;
  }
  absl::Status Step(EngineSequence* sequence, const TraceLayer& layer, int64_t l, int64_t step,
                    std::vector<float>* output) {
    const DeviceBuffer queries = OnDevice(Query(layer, step));
    const std::vector<float> poison(kOutput, std::numeric_limits<float>::quiet_NaN());
    const DeviceBuffer out = OnDevice(poison.data(), kOutput * sizeof(float));
    const EngineStep one = {sequence, queries.data(), out.data(), nullptr};
    const absl::Status status = engine_->Step(l, {&one, 1}, Cuda());
    EXPECT_TRUE(stream_->Synchronize().ok());
    output->resize(kOutput);
    EXPECT_EQ(
        cudaMemcpy(output->data(), out.data(), kOutput * sizeof(float), cudaMemcpyDeviceToHost),
        cudaSuccess);
    return status;
  }

  // Steps of all layers, each beside a DecodeSession's.
  void ExpectADecodeSessions(EngineSequence* sequence, DecodeSession* mirror, const Case& c,
                             const std::vector<TraceLayer>& layers, int64_t steps) {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t l = 0; l < kLayers; ++l) {
        const TraceLayer& layer = layers[l];
        const int64_t token = c.prompt + step;
        ASSERT_TRUE(Append(sequence, layer, l, step).ok());
        ASSERT_TRUE(mirror
                        ->Append(l, Rows(layer, layer.keys, token, token + 1),
                                 Rows(layer, layer.values, token, token + 1))
                        .ok());
        std::vector<float> got, want(kOutput);
        const absl::Status status = Step(sequence, layer, l, step, &got);
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_TRUE(mirror->Step(l, Query(layer, step), absl::MakeSpan(want), nullptr).ok());
        ExpectNear(got, want);
        if (HasFatalFailure()) return;
      }
    }
  }

  std::unique_ptr<Service> service_;  // null: target_ is another's
  std::string target_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<Engine> engine_;
};

// Presets, codecs (one with corrections) and types; the window goes around its ring.
TEST_F(EngineCudaTest, OutputsAreADecodeSessions) {
  constexpr int64_t kSteps = 40;
  const std::vector<Case> cases = {{"default", "raw", ElementType::kBFloat16, 300},
                                   {"default", "k8v4", ElementType::kBFloat16, 200},
                                   {"recall", "raw", ElementType::kFloat32, 150},
                                   {"clusterkv", "raw", ElementType::kFloat16, 170},
                                   {"default", "raw", ElementType::kBFloat16, 1}};
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    SCOPED_TRACE(testing::Message() << c.preset << " " << c.codec << " " << c.prompt);
    const auto layers = MakeLayers(c, kSteps);
    EngineSequence* const sequence = MustAttach(absl::StrCat("a", i), c, layers);
    const auto mirror = MustMirror(absl::StrCat("b", i), c, layers);
    ASSERT_TRUE(sequence != nullptr && mirror != nullptr);
    ExpectADecodeSessions(sequence, mirror.get(), c, layers, kSteps);
    if (HasFatalFailure()) return;
    const absl::Status closed = engine_->Close(sequence);
    EXPECT_TRUE(closed.ok()) << closed;
  }
}

TEST_F(EngineCudaTest, EachSequenceOfABatchGetsItsOwn) {
  constexpr int64_t kSteps = 3;
  std::vector<std::vector<TraceLayer>> layers;
  std::vector<EngineSequence*> sequences;
  std::vector<std::unique_ptr<DecodeSession>> mirrors;
  for (const int64_t prompt : {60, 200}) {
    const Case c = {"default", "raw", ElementType::kBFloat16, prompt, 8};
    layers.push_back(MakeLayers(c, kSteps, static_cast<uint64_t>(prompt)));
    sequences.push_back(MustAttach(absl::StrCat("a", prompt), c, layers.back()));
    mirrors.push_back(MustMirror(absl::StrCat("b", prompt), c, layers.back()));
    ASSERT_TRUE(sequences.back() != nullptr && mirrors.back() != nullptr);
  }
  const std::vector<float> poison(2 * kOutput, std::numeric_limits<float>::quiet_NaN());
  for (int64_t step = 0; step < kSteps; ++step) {
    const DeviceBuffer out = OnDevice(poison.data(), poison.size() * sizeof(float));
    std::vector<DeviceBuffer> queries;
    std::vector<EngineStep> batch;
    for (size_t i = 0; i < 2; ++i) {
      queries.push_back(OnDevice(Query(layers[i][0], step)));
      batch.push_back({sequences[i], queries.back().data(),
                       reinterpret_cast<float*>(out.data()) + i * kOutput, nullptr});
    }
    ASSERT_TRUE(engine_->Step(0, batch, Cuda()).ok());
    ASSERT_TRUE(stream_->Synchronize().ok());
    for (size_t i = 0; i < 2; ++i) {
      std::vector<float> got(kOutput), want(kOutput);
      ASSERT_EQ(
          cudaMemcpy(got.data(), batch[i].output, kOutput * sizeof(float), cudaMemcpyDeviceToHost),
          cudaSuccess);
      const absl::Status status =
          mirrors[i]->Step(0, Query(layers[i][0], step), absl::MakeSpan(want), nullptr);
      ASSERT_TRUE(status.ok()) << status;
      ExpectNear(got, want);
    }
  }
}

// More tokens than a step can bring: a failure, and the next step has them all.
TEST_F(EngineCudaTest, ManyTokensBetweenStepsTakeTwoSteps) {
  const Case c = {"default", "raw", ElementType::kBFloat16, 100, 1024};
  constexpr int64_t kTokens = 70;
  const auto layers = MakeLayers(c, kTokens);
  EngineSequence* const sequence = MustAttach("a", c, layers);
  const auto mirror = MustMirror("b", c, layers);
  ASSERT_TRUE(sequence != nullptr && mirror != nullptr);
  const TraceLayer& layer = layers[0];
  for (int64_t step = 0; step < kTokens; ++step) {
    const int64_t token = c.prompt + step;
    ASSERT_TRUE(Append(sequence, layer, 0, step).ok());
    ASSERT_TRUE(mirror
                    ->Append(0, Rows(layer, layer.keys, token, token + 1),
                             Rows(layer, layer.values, token, token + 1))
                    .ok());
  }
  std::vector<float> got, want(kOutput);
  const absl::Status first = Step(sequence, layer, 0, 0, &got);
  ASSERT_TRUE(first.ok()) << first;
  ASSERT_TRUE(mirror->Step(0, Query(layer, 0), absl::MakeSpan(want), nullptr).ok());
  EXPECT_EQ(ReasonOf(engine_->Wait(sequence)), v1::LIMIT_EXCEEDED);
  EXPECT_EQ(got, std::vector<float>(kOutput, 0.0f));
  ASSERT_TRUE(Step(sequence, layer, 0, 1, &got).ok());
  ASSERT_TRUE(mirror->Step(0, Query(layer, 1), absl::MakeSpan(want), nullptr).ok());
  EXPECT_TRUE(engine_->Wait(sequence).ok());
  ExpectNear(got, want);
}

// Zeros now, the failure with the next call, and then it goes on.
TEST_F(EngineCudaTest, AFailureIsToldByTheNextCall) {
  const Case c = {"default", "raw", ElementType::kBFloat16, 200};
  std::vector<TraceLayer> layers = MakeLayers(c, 4);
  EngineSequence* const sequence = MustAttach("a", c, layers);
  const auto mirror = MustMirror("b", c, layers);
  ASSERT_TRUE(sequence != nullptr && mirror != nullptr);
  ASSERT_TRUE(Append(sequence, layers[0], 0, 0).ok());
  ASSERT_TRUE(mirror
                  ->Append(0, Rows(layers[0], layers[0].keys, c.prompt, c.prompt + 1),
                           Rows(layers[0], layers[0].values, c.prompt, c.prompt + 1))
                  .ok());
  std::vector<float> got, want(kOutput);
  TraceLayer broken = layers[0];
  const uint16_t infinity = 0x7f80;
  std::memcpy(broken.q.data(), &infinity, sizeof(infinity));
  ASSERT_TRUE(Step(sequence, broken, 0, 0, &got).ok());
  EXPECT_EQ(got, std::vector<float>(kOutput, 0.0f));
  EXPECT_EQ(ReasonOf(engine_->Wait(sequence)), v1::NON_FINITE_QUERY);
  EXPECT_TRUE(engine_->Wait(sequence).ok()) << "told once";
  ASSERT_TRUE(Step(sequence, layers[0], 0, 0, &got).ok());
  ASSERT_TRUE(mirror->Step(0, Query(layers[0], 0), absl::MakeSpan(want), nullptr).ok());
  ExpectNear(got, want);
  EXPECT_TRUE(engine_->Wait(sequence).ok());
  ASSERT_TRUE(client_->ReleaseSequence(Engine::sequence(*sequence).handle()).ok());
  ASSERT_TRUE(Step(sequence, layers[0], 0, 1, &got).ok());
  EXPECT_EQ(got, std::vector<float>(kOutput, 0.0f));
  EXPECT_FALSE(engine_->Close(sequence).ok());
}

// What LaunchTake takes, of a package that is all zeros.
struct EmptyPackage {
  EmptyPackage() {
    std::memset(pinned.data(), 0, 4096);
    take.package = reinterpret_cast<StreamPackage*>(pinned.data());
    take.state = reinterpret_cast<uint32_t*>(state.data());
  }
  PinnedBuffer pinned = PinnedBuffer::Create(4096).value();
  DeviceBuffer state = DeviceBuffer::Create(0, 256).value();
  StreamTake take;
};

TEST_F(EngineCudaTest, WithoutAnAnswerTheStreamGoesOnWithZeros) {
  EmptyPackage package;
  StreamTake& take = package.take;
  take.package->published = 6;
  take.package->records = 1;  // nowhere to go: must not be looked at
  ASSERT_EQ(LaunchTake(take, 7, 1'000'000, stream_->get()), cudaSuccess);
  const std::vector<float> ones(kOutput, 1.0f);
  const DeviceBuffer attended = OnDevice(ones.data(), kOutput * sizeof(float));
  const DeviceBuffer output = OnDevice(ones.data(), kOutput * sizeof(float));
  StreamGive give;
  give.state = take.state;
  give.attended = reinterpret_cast<const float*>(attended.data());
  give.heads = kQueryHeads;
  give.head_dim = kHeadDim;
  ASSERT_EQ(LaunchGive(give, output.data(), stream_->get()), cudaSuccess);
  ASSERT_TRUE(stream_->Synchronize().ok());
  std::vector<float> got(kOutput);
  ASSERT_EQ(cudaMemcpy(got.data(), output.data(), kOutput * 4, cudaMemcpyDeviceToHost),
            cudaSuccess);
  EXPECT_EQ(got, std::vector<float>(kOutput, 0.0f));
  EXPECT_EQ(take.package->gave_up, 7u);
}

// A link that the service does not have: records come by gRPC, to where the link's would be.
TEST_F(EngineCudaTest, WithoutTheLinkAskedForItIsTheSame) {
  Open({v1::LINK_PEER, v1::LINK_GRPC});
  const Case c = {"default", "raw", ElementType::kBFloat16, 200};
  const auto layers = MakeLayers(c, 6);
  EngineSequence* const sequence = MustAttach("a", c, layers);
  const auto mirror = MustMirror("b", c, layers);
  ASSERT_TRUE(sequence != nullptr && mirror != nullptr);
  EXPECT_EQ(Engine::link(*sequence), "grpc");
  EXPECT_NE(Engine::link_reason(*sequence), "");
  ExpectADecodeSessions(sequence, mirror.get(), c, layers, 6);
}

// With a server that has a GPU: another than this test's, where there is one.
class EngineLinkTest : public EngineCudaTest {
 protected:
  void SetUp() override {
    const int last = kernels::DeviceCount() - 1;
    server_ = std::make_unique<GpuServer>(absl::StrCat("cuda:", std::min(last, 1)));
    target_ = server_->target();
    EngineCudaTest::SetUp();
    Open({v1::LINK_NCCL, v1::LINK_PEER, v1::LINK_GRPC});  // NCCL is not for an engine
  }
  void TearDown() override {
    EngineCudaTest::TearDown();
    client_.reset();
  }

  std::unique_ptr<GpuServer> server_;
};

TEST_F(EngineLinkTest, RecordsAreAttendedToWhereTheLinkPutsThem) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  constexpr int64_t kPrompt = 110, kSteps = 3;  // a select takes a second
#else
  constexpr int64_t kPrompt = 3000, kSteps = 40;
#endif
  int i = 0;
  for (const char* codec : {"raw", "k8v4"}) {
    const Case c = {"default", codec, ElementType::kBFloat16, kPrompt};
    SCOPED_TRACE(codec);
    const auto layers = MakeLayers(c, kSteps);
    EngineSequence* const sequence = MustAttach(absl::StrCat("a", i), c, layers);
    const auto mirror = MustMirror(absl::StrCat("b", i++), c, layers);
    ASSERT_TRUE(sequence != nullptr && mirror != nullptr);
    EXPECT_EQ(Engine::link(*sequence), "peer") << Engine::link_reason(*sequence);
    ExpectADecodeSessions(sequence, mirror.get(), c, layers, kSteps);
    if (HasFatalFailure()) return;
    EXPECT_EQ(Engine::link_reason(*sequence), "");
    EXPECT_TRUE(engine_->Release(sequence).ok());
  }
  EXPECT_GT(server_->stats().link_bytes(), 0u);
}

// Lets the device fail while what `queue` queues waits in the stream behind it.
void FailUnder(Stream& stream, const std::function<void()>& queue) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)stream;
  cuda_emulator::Fail();
  queue();
#else
  EmptyPackage package;
  StreamTake& take = package.take;
  take.small_copy = reinterpret_cast<unsigned char*>(8);  // nobody's
  take.small = reinterpret_cast<const unsigned char*>(package.pinned.data());
  take.small_bytes = 8;
  ASSERT_EQ(LaunchTake(take, 1, 10'000'000'000, stream.get()), cudaSuccess);
  queue();
  __atomic_store_n(&take.package->published, uint64_t{1}, __ATOMIC_RELEASE);
  EXPECT_FALSE(stream.Synchronize().ok());
#endif
}

class EngineCudaDeathTest : public EngineCudaTest {
 protected:
  // In a process of its own, which it ends: with 0 if all was as it should be.
  [[noreturn]] void FailWhileAStepWaits() {
    const Case c = {"default", "raw", ElementType::kBFloat16, 200};
    const auto layers = MakeLayers(c, 2);
    EngineSequence* const sequence = MustAttach("a", c, layers);
    std::vector<float> got;
    EXPECT_TRUE(Append(sequence, layers[0], 0, 0).ok());
    EXPECT_TRUE(Step(sequence, layers[0], 0, 0, &got).ok());  // all kernels are loaded
    const DeviceBuffer rows = OnDevice(Rows(layers[0], layers[0].keys, c.prompt, c.prompt + 1));
    const DeviceBuffer queries = OnDevice(Query(layers[0], 1));
    const DeviceBuffer output = OnDevice(Query(layers[0], 1));
    FailUnder(*stream_, [&] {
      const EngineAppend append = {sequence, {rows.data(), rows.data(), 0, 0}};
      EXPECT_TRUE(engine_->Append(0, {&append, 1}, Cuda()).ok());
      const EngineStep step = {sequence, queries.data(), output.data(), nullptr};
      EXPECT_TRUE(engine_->Step(0, {&step, 1}, Cuda()).ok());
    });
    EXPECT_EQ(ReasonOf(engine_->Wait(sequence)), v1::INTERNAL_ERROR);
    EXPECT_EQ(ReasonOf(engine_->Wait(sequence)), v1::INTERNAL_ERROR) << "it stays";
    const EngineStep again = {sequence, queries.data(), output.data(), nullptr};
    EXPECT_EQ(ReasonOf(engine_->Step(0, {&again, 1}, Cuda())), v1::INTERNAL_ERROR);
    EXPECT_EQ(ReasonOf(engine_->Close(sequence)), v1::INTERNAL_ERROR);
    engine_.reset();
    std::_Exit(HasFailure() ? 1 : 0);
  }
};

TEST_F(EngineCudaDeathTest, AFailedDeviceIsATypedErrorAndNothingHangs) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // threads, and a driver, do not fork
  EXPECT_EXIT(FailWhileAStepWaits(), testing::ExitedWithCode(0), "");
}

TEST_F(EngineCudaTest, DevicesThatThereAreNotAreRefused) {
  EXPECT_TRUE(absl::IsUnavailable(MakeCudaEngineDevice(99, absl::Seconds(1)).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(MakeCudaEngineDevice(0, absl::ZeroDuration()).status()));
}

}  // namespace
}  // namespace clusterkv::worker
