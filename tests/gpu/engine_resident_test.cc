// An engine whose steps the service's GPU answers by itself, both ends on the emulator and a
// server's gRPC between them: the outputs of a DecodeSession of a server without a GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cache_service/cuda_device.h"
#include "kernels/base/element_type.h"
#include "proto/error.h"
#include "tests/gpu/on_device.h"
#include "tests/worker/worker_harness.h"
#include "worker/engine.h"
#include "worker/engine_cuda.h"

namespace clusterkv::worker {
namespace {

using kernels::DeviceBuffer;
using kernels::ElementType;

constexpr int64_t kLayers = 2, kHeadDim = 128;
constexpr int64_t kWindow = 3;
constexpr float kBFloat16Tolerance = 2e-2f;  // an output is rounded by up to 2^-9 of itself

std::vector<TraceLayer> MakeLayers(const kernels::KvShape& shape, int64_t prompt, int64_t steps) {
  std::vector<TraceLayer> layers;
  for (uint64_t l = 0; l < kLayers; ++l) {
    layers.push_back(
        MakeLayer(shape, prompt + steps, steps, static_cast<uint64_t>(prompt) * 10 + l));
  }
  return layers;
}

v1::OpenSequenceRequest Request(const std::string& name, const std::vector<TraceLayer>& layers) {
  v1::OpenSequenceRequest request = OpenRequest(name, layers);
  request.mutable_index()->set_window_tokens(static_cast<uint32_t>(kWindow));
  request.mutable_index()->set_iterations(1);  // good clusters would take an emulator long
  return request;
}

EngineOptions Options(const std::string& target, ElementType type) {
  EngineOptions options;
  options.target = target;
  options.output_type = static_cast<v1::ElementType>(type);
  options.decode.hot_cache.set_capacity_tokens(64);
  options.decode.select.set_budget_tokens(32);
  options.decode.state_type = v1::ELEMENT_TYPE_FLOAT32;
  // So that the service knows every token but the newest.
  options.decode.append_batch_tokens = 1;
  return options;
}

// A sequence of the engine beside one of a DecodeSession's, of the same tokens.
struct Twins {
  std::vector<TraceLayer> layers;
  EngineSequence* sequence = nullptr;
  std::unique_ptr<DecodeSession> mirror;
  int64_t prompt = 0;
};

class EngineResidentTest : public testing::Test {
 protected:
  void Start(ElementType type, bool with_device = true) {
    type_ = type;
    service_ = std::make_unique<Service>(
        0, nullptr, with_device ? cache_service::CreateCudaDevice(0).value() : nullptr);
    client_ = service_->Connect();
    mirror_client_ = mirror_service_.Connect();
    auto engine_device = MakeCudaEngineDevice(0, absl::Seconds(240));
    ASSERT_TRUE(engine_device.ok()) << engine_device.status();
    auto engine = Engine::Open(Options(service_->target(), type), std::move(*engine_device));
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = std::move(*engine);
  }
  void TearDown() override {
    twins_.clear();
    engine_.reset();
    mirror_client_.reset();
    client_.reset();
  }

  void Add(int64_t prompt, int64_t steps) {
    Twins twins;
    twins.layers = MakeLayers({kv_heads_, query_heads_, kHeadDim, type_}, prompt, steps);
    twins.prompt = prompt;
    const v1::OpenSequenceRequest request = Request(absl::StrCat("s", sequences_++), twins.layers);
    const auto sealed = Prefill(client_.get(), request, twins.layers);
    ASSERT_TRUE(sealed.ok()) << sealed.status();
    const auto attached = engine_->Attach(sealed->handle());
    ASSERT_TRUE(attached.ok()) << attached.status();
    twins.sequence = *attached;
    const auto mirrored = Prefill(mirror_client_.get(), request, twins.layers);
    ASSERT_TRUE(mirrored.ok()) << mirrored.status();
    auto session = DecodeSession::Attach(mirror_client_.get(), mirrored->handle(),
                                         Options(service_->target(), type_).decode);
    ASSERT_TRUE(session.ok()) << session.status();
    twins.mirror = std::move(*session);
    twins_.push_back(std::move(twins));
  }
  std::vector<EngineSequence*> Batch() const {
    std::vector<EngineSequence*> batch;
    for (const Twins& twins : twins_) batch.push_back(twins.sequence);
    return batch;
  }

  absl::Status Append(int64_t l, int64_t step) {
    std::vector<DeviceBuffer> rows;
    std::vector<EngineAppend> batch;
    for (const Twins& twins : twins_) {
      const TraceLayer& layer = twins.layers[l];
      const int64_t token = twins.prompt + step;
      rows.push_back(OnDevice(Rows(layer, layer.keys, token, token + 1)));
      rows.push_back(OnDevice(Rows(layer, layer.values, token, token + 1)));
      batch.push_back(
          {twins.sequence, {rows[rows.size() - 2].data(), rows[rows.size() - 1].data(), 0, 0}});
    }
    return engine_->Append(l, batch, nullptr);
  }
  absl::Status Step(int64_t l, int64_t step, std::vector<float>* outputs) {
    std::vector<std::byte> queries;
    for (const Twins& twins : twins_) {
      const auto query = Query(twins.layers[l], step);
      queries.insert(queries.end(), query.begin(), query.end());
    }
    const DeviceBuffer asked = OnDevice(queries), answered = OnDevice(queries);
    const auto bytes = static_cast<int64_t>(queries.size() / twins_.size());
    std::vector<EngineStep> batch;
    for (size_t i = 0; i < twins_.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) * bytes;
      batch.push_back({twins_[i].sequence, asked.data() + at, answered.data() + at, nullptr});
    }
    absl::Status status = engine_->Step(l, batch, nullptr);
    for (EngineSequence* sequence : Batch()) status.Update(engine_->Wait(sequence));
    EXPECT_EQ(cudaMemcpy(queries.data(), answered.data(), queries.size(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    outputs->resize(twins_.size() * elements());
    kernels::ToFloat(queries.data(), type_, static_cast<int64_t>(outputs->size()), outputs->data());
    return status;
  }

  // One token through all layers, compared with the mirrors'.
  void Decode(int64_t step, float tolerance) {
    for (int64_t l = 0; l < kLayers; ++l) {
      absl::Status status = Append(l, step);
      ASSERT_TRUE(status.ok()) << status;
      std::vector<float> got, want(elements());
      status = Step(l, step, &got);
      ASSERT_TRUE(status.ok()) << status;
      for (size_t i = 0; i < twins_.size(); ++i) {
        const TraceLayer& layer = twins_[i].layers[l];
        DecodeSession& mirror = *twins_[i].mirror;
        const int64_t token = twins_[i].prompt + step;
        status = mirror.Append(l, Rows(layer, layer.keys, token, token + 1),
                               Rows(layer, layer.values, token, token + 1));
        ASSERT_TRUE(status.ok()) << status;
        status = mirror.Step(l, Query(layer, step), absl::MakeSpan(want), nullptr);
        ASSERT_TRUE(status.ok()) << status;
        for (size_t j = 0; j < elements(); ++j) {
          const float x = got[i * elements() + j];
          ASSERT_FALSE(!(std::abs(x - want[j]) <= tolerance))
              << "step " << step << " layer " << l << " sequence " << i << ": " << x << " for "
              << want[j];
        }
      }
    }
  }
  // Settles until all that is sent is clustered, so that the group is where a select would be.
  void SettleAll() {
    for (int turn = 0; turn < 2; ++turn) {
      const absl::Status settled = engine_->Settle(twins_[0].sequence, nullptr);
      ASSERT_TRUE(settled.ok()) << settled;
      for (const Twins& twins : twins_) {
        v1::SequenceState state = v1::SEQUENCE_STATE_APPENDING;
        while (state == v1::SEQUENCE_STATE_APPENDING) {
          const auto sequence = client_->GetSequence(Engine::sequence(*twins.sequence).handle());
          ASSERT_TRUE(sequence.ok()) << sequence.status();
          state = sequence->state();
        }
      }
    }
  }

  size_t elements() const { return static_cast<size_t>(query_heads_ * kHeadDim); }

  ElementType type_ = ElementType::kFloat32;
  int64_t kv_heads_ = 2, query_heads_ = 8;
  int sequences_ = 0;
  Service mirror_service_;
  std::unique_ptr<Service> service_;
  std::unique_ptr<Client> mirror_client_, client_;
  std::unique_ptr<Engine> engine_;
  std::vector<Twins> twins_;
};

// A batch over two windows; what it appended is the service's afterwards.
TEST_F(EngineResidentTest, OutputsAreDecodeSessionsWhileWindowsAreClustered) {
  constexpr int64_t kSteps = 2 * kWindow + 2;
  ASSERT_NO_FATAL_FAILURE(Start(ElementType::kFloat32));
  ASSERT_NO_FATAL_FAILURE(Add(150, kSteps));
  ASSERT_NO_FATAL_FAILURE(Add(90, kSteps));
  const absl::Status joined = engine_->Join(Batch());
  ASSERT_TRUE(joined.ok()) << joined;
  EXPECT_EQ(Engine::link(*twins_[1].sequence), "resident");
  for (int64_t step = 0; step < kSteps; ++step) {
    ASSERT_NO_FATAL_FAILURE(Decode(step, 5e-4f));
    ASSERT_NO_FATAL_FAILURE(SettleAll());
  }
  const absl::Status left = engine_->Leave(twins_[0].sequence, nullptr);
  ASSERT_TRUE(left.ok()) << left;
  for (const Twins& twins : twins_) {
    EXPECT_EQ(twins.mirror->window_begin(0), twins.prompt + 2 * kWindow);
    EXPECT_EQ(Engine::link(*twins.sequence), "grpc");
    const auto sequence = client_->GetSequence(Engine::sequence(*twins.sequence).handle());
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    EXPECT_EQ(sequence->tokens(), twins.prompt + kSteps);
  }
}

TEST_F(EngineResidentTest, BFloat16) {
  constexpr int64_t kSteps = 2;
  ASSERT_NO_FATAL_FAILURE(Start(ElementType::kBFloat16));
  ASSERT_NO_FATAL_FAILURE(Add(100, kSteps));
  ASSERT_TRUE(engine_->Join(Batch()).ok());
  for (int64_t step = 0; step < kSteps; ++step) {
    ASSERT_NO_FATAL_FAILURE(Decode(step, kBFloat16Tolerance));
  }
}

TEST_F(EngineResidentTest, SevenAndEightQueryHeadsPerKvHead) {
  constexpr int64_t kSteps = 2;
  for (const int64_t group : {7, 8}) {
    query_heads_ = group * kv_heads_;
    ASSERT_NO_FATAL_FAILURE(Start(ElementType::kFloat32));
    ASSERT_NO_FATAL_FAILURE(Add(100, kSteps));
    const absl::Status joined = engine_->Join(Batch());
    ASSERT_TRUE(joined.ok()) << joined;
    for (int64_t step = 0; step < kSteps; ++step) {
      ASSERT_NO_FATAL_FAILURE(Decode(step, 5e-4f));
    }
    TearDown();
  }
}

// Each has more pairs than half of the multiprocessors: one kernel serves both.
TEST_F(EngineResidentTest, GroupsThatAreServedTogetherGetWhatIsTheirs) {
  constexpr int64_t kSteps = 2;
  kv_heads_ = query_heads_ = 65;
  ASSERT_NO_FATAL_FAILURE(Start(ElementType::kBFloat16));
  std::vector<Twins> groups;
  for (const int64_t prompt : {30, 50}) {
    ASSERT_NO_FATAL_FAILURE(Add(prompt, kSteps));
    const absl::Status joined = engine_->Join(Batch());
    ASSERT_TRUE(joined.ok()) << joined;
    groups.push_back(std::move(twins_.back()));
    twins_.clear();
  }
  const auto decode = [&](size_t group, int64_t step) {
    twins_.push_back(std::move(groups[group]));
    Decode(step, kBFloat16Tolerance);
    groups[group] = std::move(twins_.back());
    twins_.clear();
  };
  ASSERT_NO_FATAL_FAILURE(decode(1, 0));
  ASSERT_NO_FATAL_FAILURE(decode(0, 0));
  ASSERT_NO_FATAL_FAILURE(decode(0, 1));
  const absl::Status left = engine_->Leave(groups[0].sequence, nullptr);
  ASSERT_TRUE(left.ok()) << left;
  ASSERT_NO_FATAL_FAILURE(decode(1, 1));
}

TEST_F(EngineResidentTest, AGroupIsTakenWholeAndInOrder) {
  ASSERT_NO_FATAL_FAILURE(Start(ElementType::kFloat32));
  ASSERT_NO_FATAL_FAILURE(Add(60, 2));
  ASSERT_NO_FATAL_FAILURE(Add(60, 2));
  EXPECT_EQ(ReasonOf(engine_->Settle(twins_[0].sequence, nullptr)), v1::SEQUENCE_NOT_READY);
  ASSERT_TRUE(engine_->Join(Batch()).ok());
  EXPECT_EQ(ReasonOf(engine_->Join(Batch())), v1::INVALID_FIELD);
  std::vector<float> output;
  EXPECT_EQ(ReasonOf(Step(1, 0, &output)), v1::INVALID_FIELD) << "layer 0 comes first";
  std::swap(twins_[0], twins_[1]);
  EXPECT_EQ(ReasonOf(Step(0, 0, &output)), v1::INVALID_FIELD);
  EXPECT_EQ(ReasonOf(Append(0, 0)), v1::INVALID_FIELD);
  const absl::Status closed = engine_->Close(twins_[0].sequence);
  EXPECT_TRUE(closed.ok()) << closed;
  EXPECT_EQ(Engine::link(*twins_[1].sequence), "grpc") << "the other one left too";
}

// The outputs are zeros, and every call from then on says so.
TEST_F(EngineResidentTest, AGroupThatTheServiceEndedFailsAndIsLeft) {
  ASSERT_NO_FATAL_FAILURE(Start(ElementType::kFloat32));
  ASSERT_NO_FATAL_FAILURE(Add(60, 3));
  ASSERT_TRUE(engine_->Join(Batch()).ok());
  ASSERT_NO_FATAL_FAILURE(Decode(0, 5e-4f));
  ASSERT_TRUE(client_->ReleaseSequence(Engine::sequence(*twins_[0].sequence).handle()).ok());
  std::vector<float> output;
  ASSERT_TRUE(Append(0, 1).ok());
  EXPECT_EQ(ReasonOf(Step(0, 1, &output)), v1::QUEUE_DEADLINE);  // of its Wait
  EXPECT_EQ(output, std::vector<float>(elements(), 0.0f));
  EXPECT_EQ(ReasonOf(Append(1, 1)), v1::QUEUE_DEADLINE);
  EXPECT_FALSE(engine_->Leave(twins_[0].sequence, nullptr).ok());
  EXPECT_EQ(Engine::link(*twins_[0].sequence), "grpc");
}

TEST_F(EngineResidentTest, WhereThereIsNoneItIsSaid) {
  ASSERT_NO_FATAL_FAILURE(Start(ElementType::kFloat32, /*with_device=*/false));
  ASSERT_NO_FATAL_FAILURE(Add(60, 1));
  const absl::Status joined = engine_->Join(Batch());
  EXPECT_TRUE(absl::IsUnavailable(joined)) << joined;
  EXPECT_NE(joined.message().find("no GPU device"), joined.message().npos) << joined;
  ASSERT_NO_FATAL_FAILURE(Decode(0, 5e-4f));
}

}  // namespace
}  // namespace clusterkv::worker
