// An ingest ring (ingest_ring.h) on a CUDA GPU.
#ifndef CLUSTERKV_WORKER_CUDA_INGEST_RING_H_
#define CLUSTERKV_WORKER_CUDA_INGEST_RING_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "worker/ingest_ring.h"

namespace clusterkv::worker {

// On GPU `device` of those that this process sees. Errors: ResourceExhausted for memory;
// Unavailable.
absl::StatusOr<std::unique_ptr<IngestRing>> MakeCudaIngestRing(int device, int slots,
                                                               int64_t slot_bytes);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_CUDA_INGEST_RING_H_
