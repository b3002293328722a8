// Links of a CUDA device (RecordLink, shard_device.h).
#ifndef CLUSTERKV_CACHE_SERVICE_CUDA_LINKS_H_
#define CLUSTERKV_CACHE_SERVICE_CUDA_LINKS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cache_service/shard_device.h"
#include "kernels/index/index_view_cuda.h"

namespace clusterkv::cache_service {

// A part as kernels see it. All parts that a CUDA device makes are such.
struct CudaPartBase : DevicePart {
  kernels::DeviceIndexPart part;
};

// Writes records straight into the worker's window, which lies on this host.
absl::StatusOr<std::unique_ptr<RecordLink>> ConnectPeerLink(int device, const LinkSetup& setup);

// Gathers records and sends them as one message. A thread of its own meets the worker, then watches
// over what is under way.
absl::StatusOr<std::unique_ptr<RecordLink>> ConnectNcclLink(int device, const LinkSetup& setup,
                                                            std::string* unique_id);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CUDA_LINKS_H_
