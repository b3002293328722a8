// A shard's device (shard_device.h) that is a CUDA GPU.
#ifndef CLUSTERKV_CACHE_SERVICE_CUDA_DEVICE_H_
#define CLUSTERKV_CACHE_SERVICE_CUDA_DEVICE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "cache_service/shard_device.h"

namespace clusterkv::cache_service {

// GPU `ordinal` of those that this process sees, not yet started.
// Errors: Unavailable without a driver or such a GPU.
absl::StatusOr<std::unique_ptr<ShardDevice>> CreateCudaDevice(int ordinal);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CUDA_DEVICE_H_
