#include "kernels/runtime/device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {
namespace {

absl::Status CheckBytes(int64_t bytes, const char* what) {
  if (bytes >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ": expected bytes >= 0, got ", bytes));
}

std::atomic<int64_t>& TotalOf(int device) {
  constexpr size_t kDevices = 64;
  static std::array<std::atomic<int64_t>, kDevices> totals = {};
  return totals[static_cast<size_t>(device) % kDevices];
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message = absl::StrCat(what, ": ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(message);
    case cudaErrorInvalidValue:
    case cudaErrorInvalidDevice:
      return absl::InvalidArgumentError(message);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
      return absl::UnavailableError(message);
    default:
      return absl::InternalError(message);
  }
}

int DeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();  // so that the next caller does not meet it
  return 0;
}

ScopedDevice::ScopedDevice(int device) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current == device) return;
  if (cudaSetDevice(device) == cudaSuccess) previous_ = current;
}

ScopedDevice::~ScopedDevice() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

absl::StatusOr<Stream> Stream::Create(int device, int priority) {
  const ScopedDevice scoped(device);
  int least = 0, greatest = 0;
  CKV_RETURN_IF_ERROR(CudaStatus(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream"));
  cudaStream_t stream = nullptr;
  CKV_RETURN_IF_ERROR(
      CudaStatus(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking,
                                              std::clamp(priority, greatest, least)),
                 "stream"));
  return Stream(stream, device);
}

Stream::Stream(Stream&& other) noexcept
    : stream_(std::exchange(other.stream_, nullptr)), device_(other.device_) {}

Stream& Stream::operator=(Stream&& other) noexcept {
  std::swap(stream_, other.stream_);
  std::swap(device_, other.device_);
  return *this;
}

Stream::~Stream() {
  if (stream_ == nullptr) return;
  const ScopedDevice scoped(device_);
  (void)cudaStreamDestroy(stream_);
}

absl::Status Stream::Synchronize() const {
  return CudaStatus(cudaStreamSynchronize(stream_), "stream");
}

absl::StatusOr<Event> Event::Create(int device, bool timed) {
  const ScopedDevice scoped(device);
  cudaEvent_t event = nullptr;
  const unsigned flags = timed ? cudaEventDefault : cudaEventDisableTiming;
  CKV_RETURN_IF_ERROR(CudaStatus(cudaEventCreateWithFlags(&event, flags), "event"));
  return Event(event, device);
}

Event::Event(Event&& other) noexcept
    : event_(std::exchange(other.event_, nullptr)), device_(other.device_) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(event_, other.event_);
  std::swap(device_, other.device_);
  return *this;
}

Event::~Event() {
  if (event_ == nullptr) return;
  const ScopedDevice scoped(device_);
  (void)cudaEventDestroy(event_);
}

absl::Status Event::Record(cudaStream_t stream) const {
  return CudaStatus(cudaEventRecord(event_, stream), "event");
}

absl::Status Event::Wait(cudaStream_t stream) const {
  return CudaStatus(cudaStreamWaitEvent(stream, event_, 0), "event");
}

absl::StatusOr<bool> Event::Done() const {
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) return false;
  CKV_RETURN_IF_ERROR(CudaStatus(error, "event"));
  return true;
}

absl::Status Event::Synchronize() const {
  return CudaStatus(cudaEventSynchronize(event_), "event");
}

absl::StatusOr<float> Event::ElapsedMs(const Event& start) const {
  float ms = 0;
  CKV_RETURN_IF_ERROR(CudaStatus(cudaEventElapsedTime(&ms, start.event_, event_), "event"));
  return ms;
}

int64_t DeviceBuffer::TotalBytes(int device) { return TotalOf(device).load(); }

absl::StatusOr<DeviceBuffer> DeviceBuffer::Create(int device, int64_t bytes) {
  CKV_RETURN_IF_ERROR(CheckBytes(bytes, "device memory"));
  if (bytes == 0) return DeviceBuffer(nullptr, 0, device);
  const ScopedDevice scoped(device);
  void* data = nullptr;
  CKV_RETURN_IF_ERROR(CudaStatus(cudaMalloc(&data, static_cast<size_t>(bytes)), "device memory"));
  TotalOf(device).fetch_add(bytes);
  return DeviceBuffer(static_cast<std::byte*>(data), bytes, device);
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      device_(other.device_) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_ == nullptr) return;
  const ScopedDevice scoped(device_);
  (void)cudaFree(data_);
  TotalOf(device_).fetch_sub(bytes_);
}

absl::StatusOr<PinnedBuffer> PinnedBuffer::Create(int64_t bytes) {
  CKV_RETURN_IF_ERROR(CheckBytes(bytes, "pinned memory"));
  if (bytes == 0) return PinnedBuffer();
  void* data = nullptr;
  CKV_RETURN_IF_ERROR(CudaStatus(
      cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocPortable), "pinned memory"));
  return PinnedBuffer(static_cast<std::byte*>(data), bytes);
}

PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr) (void)cudaFreeHost(data_);
}

}  // namespace clusterkv::kernels
