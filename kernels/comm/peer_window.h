// GPU memory of another process of this host, mapped here (CUDA IPC).
//
// The owner exports a whole allocation; who opens it may write into it as if it were its own, also
// when it lies on another GPU. The memory lives until the owner freed it and everybody closed it.
#ifndef CLUSTERKV_KERNELS_COMM_PEER_WINDOW_H_
#define CLUSTERKV_KERNELS_COMM_PEER_WINDOW_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/runtime/device.h"

namespace clusterkv::kernels {

// The bytes that PeerWindow::Open takes, in another process. `buffer` is not empty.
// Errors: as CudaStatus.
absl::StatusOr<std::string> ExportWindow(const DeviceBuffer& buffer);

// Move-only; closed when it dies. REQUIRES then: nothing that was launched uses it any more.
class PeerWindow {
 public:
  // Maps the window for kernels of `device`. Errors: InvalidArgument when the handle is none, or
  // names fewer than `bytes` bytes; else as CudaStatus (the same process cannot open its own).
  static absl::StatusOr<PeerWindow> Open(int device, const std::string& handle, int64_t bytes);
  PeerWindow(PeerWindow&& other) noexcept;
  PeerWindow& operator=(PeerWindow&& other) noexcept;
  ~PeerWindow();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  PeerWindow(std::byte* data, int64_t bytes, int device)
      : data_(data), bytes_(bytes), device_(device) {}
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int device_ = 0;
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_COMM_PEER_WINDOW_H_
