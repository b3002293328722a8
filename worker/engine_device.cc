#include "worker/engine_device.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/element_type.h"
#include "proto/error.h"
#ifdef CLUSTERKV_HAS_CUDA
#include "worker/engine_cuda.h"
#endif

namespace clusterkv::worker {
namespace {

using kernels::ElementType;

class HostLayers : public EngineLayers {
 public:
  HostLayers(const DecodeSession& session, ElementType output_type) : output_type_(output_type) {
    const v1::KvShape& shape = session.sequence().shape();
    elements_ = static_cast<int64_t>(shape.query_heads()) * shape.head_dim();
    const int64_t query_bytes =
        elements_ * kernels::ElementBytes(static_cast<ElementType>(shape.element_type()));
    query_bytes_ = static_cast<size_t>(query_bytes);
    for (uint32_t l = 0; l < shape.layers(); ++l) layers_.push_back(std::make_unique<Layer>());
  }

  absl::Status Begin(int64_t layer) override {
    ++layers_[layer]->begun;
    return absl::OkStatus();
  }

  absl::Status Publish(int64_t layer, const std::byte* queries, DecodeSession* session,
                       const absl::Status& recalled) override {
    Layer& of = *layers_[layer];
    std::vector<float> output(static_cast<size_t>(elements_));
    absl::Status status = recalled;
    if (status.ok()) {
      status = session->Attend(layer, absl::MakeConstSpan(queries, query_bytes_),
                               absl::MakeSpan(output));
    }
    if (!status.ok()) output.assign(output.size(), 0.0f);
    const std::lock_guard<std::mutex> lock(of.mutex);
    of.output = std::move(output);
    of.status = status;
    ++of.published;
    of.changed.notify_all();
    return status;
  }

  absl::Status Attend(int64_t layer, void* output, EngineStream) override {
    Layer& of = *layers_[layer];
    std::unique_lock<std::mutex> lock(of.mutex);
    of.changed.wait(lock, [&of] { return of.published == of.begun; });
    kernels::FromFloat(of.output.data(), output_type_, elements_, static_cast<std::byte*>(output));
    return of.status;
  }

  int64_t held_bytes() const override { return 0; }

 private:
  struct Layer {
    int64_t begun = 0;  // the caller's
    std::mutex mutex;
    std::condition_variable changed;
    int64_t published = 0;
    std::vector<float> output;
    absl::Status status;
  };

  const ElementType output_type_;
  int64_t elements_ = 0;
  size_t query_bytes_ = 0;
  std::vector<std::unique_ptr<Layer>> layers_;
};

class HostDevice : public EngineDevice {
 public:
  bool synchronous() const override { return true; }

  absl::StatusOr<std::shared_ptr<std::byte>> Staging(int64_t bytes) override {
    return std::shared_ptr<std::byte>(new std::byte[static_cast<size_t>(bytes)],
                                      std::default_delete<std::byte[]>());
  }

  absl::Status Gather(const EngineRows& rows, std::byte* to, EngineStream) override {
    const auto* from = static_cast<const std::byte*>(rows.data);
    const auto row_bytes = static_cast<size_t>(rows.row_bytes);
    for (int64_t t = 0; t < rows.tokens; ++t) {
      for (int64_t h = 0; h < rows.heads; ++h, to += row_bytes) {
        std::memcpy(to, from + t * rows.token_stride_bytes + h * rows.head_stride_bytes, row_bytes);
      }
    }
    return absl::OkStatus();
  }

  absl::Status Then(EngineStream, std::function<void(const absl::Status&)> f) override {
    f(absl::OkStatus());
    return absl::OkStatus();
  }
  absl::Status Check() override { return absl::OkStatus(); }

  absl::StatusOr<std::unique_ptr<IngestRing>> MakeIngestRing(int, int64_t) override {
    return absl::UnavailableError("the rows lie in host memory");
  }

  absl::StatusOr<std::unique_ptr<EngineLayers>> MakeLayers(const DecodeSession& session,
                                                           v1::ElementType output_type) override {
    return std::make_unique<HostLayers>(session, static_cast<ElementType>(output_type));
  }

  absl::StatusOr<std::unique_ptr<EngineGroup>> MakeGroup(absl::Span<DecodeSession* const>,
                                                         v1::ElementType) override {
    return absl::UnavailableError("resident: the engine's pointers are host memory");
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<EngineDevice>> MakeEngineDevice(const std::string& device,
                                                               absl::Duration step_timeout) {
  if (device == "cpu") return std::make_unique<HostDevice>();
  constexpr std::string_view kNumbered = "cuda:";
  int ordinal = 0;
  if (device != "cuda" &&
      (device.substr(0, kNumbered.size()) != kNumbered ||
       !absl::SimpleAtoi(device.substr(kNumbered.size()), &ordinal) || ordinal < 0)) {
    return Error(v1::INVALID_FIELD,
                 absl::StrCat("device: expected cpu, cuda or cuda:N, got ", device));
  }
#ifdef CLUSTERKV_HAS_CUDA
  return MakeCudaEngineDevice(ordinal, step_timeout);
#else
  (void)step_timeout;
  return absl::UnavailableError(
      absl::StrCat("device ", device, ": this worker was built without CUDA"));
#endif
}

}  // namespace clusterkv::worker
