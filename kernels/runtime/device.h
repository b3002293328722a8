// CUDA's resources as values: move-only, freed when they die, made by Create.
//
// Each remembers the device it was made on and works whichever device is current. Thread-safety: as
// the runtime's own: streams and events may be used from any thread, one at a time. Built only
// where there is a CUDA compiler; needs no driver to start.
#ifndef CLUSTERKV_KERNELS_RUNTIME_DEVICE_H_
#define CLUSTERKV_KERNELS_RUNTIME_DEVICE_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace clusterkv::kernels {

// Ok, or the error as: ResourceExhausted for memory, InvalidArgument for a bad value, Unavailable
// when there is no device or driver, Internal for what is left. `what` says what was tried.
absl::Status CudaStatus(cudaError_t error, const char* what);

// Devices that there are; 0 without a driver.
int DeviceCount();

// Makes `device` current on this thread while it lives.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device);
  ~ScopedDevice();
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  int previous_ = -1;
};

// A stream that does not wait for the default stream.
class Stream {
 public:
  // priority: lower runs first, clamped to what the device has; 0 is the default.
  // Errors: as CudaStatus.
  static absl::StatusOr<Stream> Create(int device, int priority = 0);
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  ~Stream();

  cudaStream_t get() const { return stream_; }
  int device() const { return device_; }
  // Waits for all that was launched on it. Errors: what any of it met.
  absl::Status Synchronize() const;

 private:
  Stream(cudaStream_t stream, int device) : stream_(stream), device_(device) {}
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
};

class Event {
 public:
  // timed: ElapsedMs may be asked of it. Errors: as CudaStatus.
  static absl::StatusOr<Event> Create(int device, bool timed = false);
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  ~Event();

  cudaEvent_t get() const { return event_; }
  absl::Status Record(cudaStream_t stream) const;
  // Makes `stream` wait for what was recorded.
  absl::Status Wait(cudaStream_t stream) const;
  // True once what was recorded is done. Errors: what it met.
  absl::StatusOr<bool> Done() const;
  absl::Status Synchronize() const;
  // Milliseconds from `start` to this. REQUIRES: both timed, recorded and done.
  absl::StatusOr<float> ElapsedMs(const Event& start) const;

 private:
  Event(cudaEvent_t event, int device) : event_(event), device_(device) {}
  cudaEvent_t event_ = nullptr;
  int device_ = 0;
};

// Device memory, aligned to 256 bytes.
class DeviceBuffer {
 public:
  // bytes may be 0: data() is null then. Errors: as CudaStatus.
  static absl::StatusOr<DeviceBuffer> Create(int device, int64_t bytes);
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int device() const { return device_; }
  // What all of them have on a device, as long as they live.
  static int64_t TotalBytes(int device);

 private:
  DeviceBuffer(std::byte* data, int64_t bytes, int device)
      : data_(data), bytes_(bytes), device_(device) {}
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int device_ = 0;
};

// Host memory that every device reaches.
class PinnedBuffer {
 public:
  // bytes may be 0: data() is null then. Errors: as CudaStatus.
  static absl::StatusOr<PinnedBuffer> Create(int64_t bytes);
  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  ~PinnedBuffer();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  PinnedBuffer(std::byte* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_RUNTIME_DEVICE_H_
