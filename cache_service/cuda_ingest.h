// Windows of prefill workers on a CUDA device (RowWindow, shard_device.h).
#ifndef CLUSTERKV_CACHE_SERVICE_CUDA_INGEST_H_
#define CLUSTERKV_CACHE_SERVICE_CUDA_INGEST_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "cache_service/shard_device.h"

namespace clusterkv::cache_service {

struct RowWindowSetup {
  int device = 0;
  std::string handle;
  int64_t bytes = 0;
  std::byte* arena = nullptr;  // in device memory
  int64_t page_bytes = 0;
  std::function<void(const absl::Status& status)> failed;  // told what the device met
};

// Errors: InvalidArgument for a bad window; ResourceExhausted for memory; Unavailable.
absl::StatusOr<std::unique_ptr<RowWindow>> OpenRowWindow(RowWindowSetup setup);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CUDA_INGEST_H_
