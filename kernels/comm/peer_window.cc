#include "kernels/comm/peer_window.h"

#include <cuda_runtime.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {
namespace {

// Whether the allocation at `data` has `bytes` bytes. A peer that said more than it has would make
// our own kernels fault.
absl::Status CheckExtent(void* data, int64_t bytes) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)data;
  (void)bytes;
  return absl::OkStatus();
#else
  using GetAddressRange = int (*)(unsigned long long* base, size_t* size, unsigned long long at);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  CKV_RETURN_IF_ERROR(CudaStatus(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &function,
                                                                  12000, cudaEnableDefault, &found),
                                 "window"));
  if (function == nullptr) return absl::InternalError("window: cuMemGetAddressRange is not there");
  unsigned long long base = 0;
  size_t size = 0;
  const auto at = reinterpret_cast<unsigned long long>(data);
  const int error = reinterpret_cast<GetAddressRange>(function)(&base, &size, at);
  if (error != 0) return absl::InternalError(absl::StrCat("window: its extent: error ", error));
  const int64_t there = static_cast<int64_t>(base + size - at);
  if (there >= bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("window.bytes: expected at most ", there, ", got ", bytes));
#endif
}

}  // namespace

absl::StatusOr<std::string> ExportWindow(const DeviceBuffer& buffer) {
  const ScopedDevice scoped(buffer.device());
  cudaIpcMemHandle_t handle;
  CKV_RETURN_IF_ERROR(CudaStatus(cudaIpcGetMemHandle(&handle, buffer.data()), "window"));
  return std::string(reinterpret_cast<const char*>(&handle), sizeof(handle));
}

absl::StatusOr<PeerWindow> PeerWindow::Open(int device, const std::string& handle, int64_t bytes) {
  cudaIpcMemHandle_t native;
  if (handle.size() != sizeof(native) || bytes < 1) {
    return absl::InvalidArgumentError(absl::StrCat("window: expected a handle of ", sizeof(native),
                                                   " bytes and at least 1 byte, got ",
                                                   handle.size(), " and ", bytes));
  }
  std::memcpy(&native, handle.data(), sizeof(native));
  const ScopedDevice scoped(device);
  void* data = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&data, native, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) (void)cudaGetLastError();  // so that the next caller does not meet it
  CKV_RETURN_IF_ERROR(CudaStatus(error, "window"));
  PeerWindow window(static_cast<std::byte*>(data), bytes, device);
  CKV_RETURN_IF_ERROR(CheckExtent(data, bytes));
  return window;
}

PeerWindow::PeerWindow(PeerWindow&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_) {}

PeerWindow& PeerWindow::operator=(PeerWindow&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

PeerWindow::~PeerWindow() {
  if (data_ == nullptr) return;
  const ScopedDevice scoped(device_);
  (void)cudaIpcCloseMemHandle(data_);
}

}  // namespace clusterkv::kernels
