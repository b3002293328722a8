// What a resident kernel (kernels/resident/resident_cuda.h) has of one group, and its stream where
// the group is the first that it serves: the service's end of a group.
//
//   state     leaves it
//   stopped   Start, its own or that of another that it is served with: running; Free: freed
//   running   Stop: stopped
//   freed     -
//
// Not thread-safe. While it runs, calls that wait for the whole device (to free memory, to close a
// mapping) wait for it too: stop it before them.
#ifndef CLUSTERKV_CACHE_SERVICE_CUDA_RESIDENT_H_
#define CLUSTERKV_CACHE_SERVICE_CUDA_RESIDENT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_service/residents.h"
#include "cache_service/shard_device.h"
#include "kernels/comm/peer_window.h"
#include "kernels/resident/resident_cuda.h"
#include "kernels/runtime/device.h"

namespace clusterkv::cache_service {

// What a kernel answers from: the arrays that SelectCudaPair names, in one piece.
struct ResidentInput {
  kernels::SelectCudaParams select;
  int64_t bytes = 0;
  int64_t pairs_at = 0;  // offset of SelectCudaPair [layers, pairs]
  // Writes the piece as it will be read at `device` into `host`.
  std::function<void(std::byte* host, std::byte* device)> fill;
};

class CudaResident : public ResidentEnd {
 public:
  // Maps the worker's window. Stopped; has no input yet.
  // Errors: INVALID_FIELD for a window that is too small; as PeerWindow::Open and CudaStatus.
  static absl::StatusOr<std::unique_ptr<CudaResident>> Create(int device,
                                                              const kernels::ResidentShape& shape,
                                                              const ResidentSetup& setup);
  ~CudaResident() override;  // REQUIRES: stopped

  const v1::PeerWindow& requests() const { return exported_; }
  ResidentRound round() const override { return {shape_.pairs, kernels::QuadsOf(shape_.group)}; }
  // REQUIRES: stopped. Errors: Unavailable when the kernel does not take such an input, and the old
  // one stays; as CudaStatus.
  absl::Status SetInput(const ResidentInput& input);
  // REQUIRES: all have input.
  absl::Status Start(const ResidentPlace& place, const std::vector<ResidentEnd*>& others) override;
  // Those that it is served with are still to be told.
  absl::Status Stop() override;
  // Gives all but the requests' window back, for good. REQUIRES: stopped.
  void Free();
  // Rounds that were answered whole. REQUIRES: stopped.
  uint64_t rounds() const { return rounds_; }

 private:
  CudaResident(int device, const kernels::ResidentShape& shape, kernels::PeerWindow window)
      : device_(device), shape_(shape), window_(std::move(window)) {}

  absl::Status Allocate();
  // For a kernel with this place, which goes on where the last one ended.
  absl::Status Prepare(const ResidentPlace& place);
  kernels::ServeControl* control() const {
    return reinterpret_cast<kernels::ServeControl*>(control_.data());
  }

  const int device_;
  const kernels::ResidentShape shape_;
  std::optional<kernels::PeerWindow> window_;  // the worker's
  v1::PeerWindow exported_;
  kernels::DeviceBuffer requests_, directory_, control_, workspace_, input_;
  std::optional<kernels::Stream> stream_, other_;
  kernels::ServeParams serve_;
  uint64_t rounds_ = 0;
  CudaResident* first_ = nullptr;  // of its kernel, whose stream that has; null: stopped
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CUDA_RESIDENT_H_
