// A group (engine_device.h) on a CUDA GPU: windows that grow in its memory, and one kernel per
// layer that asks the service's GPU and attends to what it answers (kernels/resident).
#ifndef CLUSTERKV_WORKER_ENGINE_RESIDENT_H_
#define CLUSTERKV_WORKER_ENGINE_RESIDENT_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/base/element_type.h"
#include "worker/engine_device.h"

namespace clusterkv::worker {

// On GPU `device`; a step waits up to timeout_ns for an answer. Errors: as EngineDevice::MakeGroup.
absl::StatusOr<std::unique_ptr<EngineGroup>> MakeResidentGroup(
    int device, uint64_t timeout_ns, absl::Span<DecodeSession* const> sessions,
    kernels::ElementType output_type);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_ENGINE_RESIDENT_H_
