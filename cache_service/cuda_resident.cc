#include "cache_service/cuda_resident.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "kernels/base/status_macros.h"
#include "kernels/select/resident_clusters.h"

namespace clusterkv::cache_service {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::PeerWindow;
using kernels::ScopedDevice;
using kernels::ServeControl;
using kernels::Stream;

// Of the indexes of a layer, asked for into the second cache before queries come.
constexpr int64_t kPrefetchBytes = 32 << 20;
static_assert(kMaxGroupsOfKernel == kernels::kMaxTogether);

// Why the kernel does not take them.
absl::Status Refusal(const kernels::ServeParams& serve) {
  const int32_t most = kernels::MostServedClusters(serve), clusters = serve.select.max_clusters;
  if (most > 0 && most < clusters) {
    return absl::UnavailableError(absl::StrCat(
        "resident: a sequence has ", clusters, " clusters per KV head, expected at most ", most,
        ": fewer tokens, or more of them per cluster (tokens_per_cluster)"));
  }
  return absl::UnavailableError(
      "resident: expected 128 channels, up to 8 query heads per KV head, codes of 2 bits in groups "
      "of 32 or none, and max_exact_tokens at least the budget");
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaResident>> CudaResident::Create(
    int device, const kernels::ResidentShape& shape, const ResidentSetup& setup) {
  const ScopedDevice scoped(device);
  const int64_t least = kernels::ReplyWindowBytes(shape) + kernels::HotCacheBytes(shape);
  if (setup.window.bytes() < static_cast<uint64_t>(least)) {
    return FieldError(v1::INVALID_FIELD, "window.bytes", absl::StrCat("at least ", least),
                      absl::StrCat(setup.window.bytes()));
  }
  CKV_ASSIGN_OR_RETURN(PeerWindow window, PeerWindow::Open(device, setup.window.handle(), least));
  std::unique_ptr<CudaResident> resident(new CudaResident(device, shape, std::move(window)));
  CKV_RETURN_IF_ERROR(resident->Allocate());
  return resident;
}

CudaResident::~CudaResident() = default;

absl::Status CudaResident::Allocate() {
  CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(device_, /*priority=*/-1));
  stream_.emplace(std::move(stream));
  CKV_ASSIGN_OR_RETURN(Stream other, Stream::Create(device_, /*priority=*/-1));
  other_.emplace(std::move(other));
  const int64_t requests_bytes =
      (kernels::RequestWindowBytes(shape_) + kernels::kExportedBytes - 1) /
      kernels::kExportedBytes * kernels::kExportedBytes;
  CKV_ASSIGN_OR_RETURN(requests_, DeviceBuffer::Create(device_, requests_bytes));
  CKV_RETURN_IF_ERROR(CudaStatus(
      cudaMemsetAsync(requests_.data(), 0, static_cast<size_t>(requests_bytes), stream_->get()),
      "resident: requests"));
  CKV_ASSIGN_OR_RETURN(*exported_.mutable_handle(), kernels::ExportWindow(requests_));
  exported_.set_bytes(static_cast<uint64_t>(requests_.bytes()));
  CKV_ASSIGN_OR_RETURN(directory_, DeviceBuffer::Create(device_, kernels::DirectoryBytes(shape_)));
  CKV_ASSIGN_OR_RETURN(control_, DeviceBuffer::Create(device_, sizeof(ServeControl)));
  serve_.shape = shape_;
  serve_.requests = requests_.data();
  serve_.replies = window_->data();
  serve_.hot_cache = window_->data() + kernels::ReplyWindowBytes(shape_);
  serve_.directory = directory_.data();
  serve_.control = control();
  serve_.prefetch_bytes = kPrefetchBytes / shape_.pairs;
  CKV_RETURN_IF_ERROR(
      CudaStatus(kernels::LaunchForget(shape_, directory_.data(), 0, shape_.pairs, stream_->get()),
                 "resident: directory"));
  return stream_->Synchronize();
}

absl::Status CudaResident::SetInput(const ResidentInput& input) {
  const ScopedDevice scoped(device_);
  kernels::ServeParams serve = serve_;
  serve.select = input.select;
  // What every place that it may have is enough for.
  serve.select.blocks_per_pair = round().quads;
  serve.blocks = kernels::ReadLimits().multiprocessors;
  const int64_t workspace_bytes = kernels::ServeWorkspaceBytes(serve);
  if (workspace_bytes == 0) return Refusal(serve);
  if (workspace_.bytes() < workspace_bytes) {
    CKV_ASSIGN_OR_RETURN(workspace_, DeviceBuffer::Create(device_, workspace_bytes));
  }
  // What the last parts need again, so that one more each time does not take new memory each time.
  if (input_.bytes() < input.bytes) {
    CKV_ASSIGN_OR_RETURN(input_, DeviceBuffer::Create(device_, 2 * input.bytes));
  }
  std::vector<std::byte> host(static_cast<size_t>(input.bytes));
  input.fill(host.data(), input_.data());
  CKV_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(input_.data(), host.data(), host.size(),
                                                 cudaMemcpyHostToDevice, stream_->get()),
                                 "resident: input"));
  CKV_RETURN_IF_ERROR(stream_->Synchronize());
  serve.workspace = workspace_.data();
  serve.pairs = reinterpret_cast<const kernels::SelectCudaPair*>(input_.data() + input.pairs_at);
  serve_ = serve;
  return absl::OkStatus();
}

absl::Status CudaResident::Prepare(const ResidentPlace& place) {
  serve_.select.blocks_per_pair = place.blocks_per_pair;
  serve_.blocks = place.blocks();
  serve_.first_round = rounds_ + 1;
  ServeControl start = {};
  start.served = rounds_ * static_cast<uint64_t>(shape_.pairs);
  CKV_RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(control(), &start, sizeof(start), cudaMemcpyHostToDevice, stream_->get()),
      "resident: control"));
  // A Stop that follows must not come before it.
  return stream_->Synchronize();
}

absl::Status CudaResident::Start(const ResidentPlace& place,
                                 const std::vector<ResidentEnd*>& others) {
  if (first_ != nullptr) return absl::OkStatus();
  const ScopedDevice scoped(device_);
  std::vector<CudaResident*> all = {this};
  for (ResidentEnd* other : others) all.push_back(static_cast<CudaResident*>(other));
  std::vector<kernels::ServeParams> groups;
  for (CudaResident* resident : all) {
    CKV_RETURN_IF_ERROR(resident->Prepare(place));
    groups.push_back(resident->serve_);
  }
  CKV_RETURN_IF_ERROR(CudaStatus(
      kernels::LaunchServe(groups.data(), static_cast<int32_t>(groups.size()), stream_->get()),
      "resident"));
  for (CudaResident* resident : all) resident->first_ = this;
  return absl::OkStatus();
}

absl::Status CudaResident::Stop() {
  if (first_ == nullptr) return absl::OkStatus();
  const ScopedDevice scoped(device_);
  const CudaResident& first = *std::exchange(first_, nullptr);
  // Also when another has stopped it: nothing is left to wait for then.
  CKV_RETURN_IF_ERROR(CudaStatus(
      kernels::StopServe(first.control(), first.stream_->get(), other_->get()), "resident: stop"));
  ServeControl end = {};
  CKV_RETURN_IF_ERROR(CudaStatus(
      cudaMemcpyAsync(&end, control(), sizeof(end), cudaMemcpyDeviceToHost, stream_->get()),
      "resident: control"));
  CKV_RETURN_IF_ERROR(stream_->Synchronize());
  rounds_ = end.served / static_cast<uint64_t>(shape_.pairs);
  return absl::OkStatus();
}

void CudaResident::Free() {
  window_.reset();
  for (DeviceBuffer* buffer : {&directory_, &control_, &workspace_, &input_}) {
    *buffer = DeviceBuffer();
  }
}

}  // namespace clusterkv::cache_service
