// An engine's device (engine_device.h) on a CUDA GPU: pointers are its memory, streams the
// caller's.
#ifndef CLUSTERKV_WORKER_ENGINE_CUDA_H_
#define CLUSTERKV_WORKER_ENGINE_CUDA_H_

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/engine_device.h"

namespace clusterkv::worker {

// GPU `ordinal` of those that this process sees. Errors: Unavailable where there is none;
// InvalidArgument for a timeout that is not positive.
absl::StatusOr<std::unique_ptr<EngineDevice>> MakeCudaEngineDevice(int ordinal,
                                                                   absl::Duration step_timeout);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_ENGINE_CUDA_H_
