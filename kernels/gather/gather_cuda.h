// Gather (gather.h) on a GPU, and the recall kernel: scattered records straight into their slots.
//
// A warp copies a record in pieces of 16, 8 or 4 bytes, whichever record size, bases and strides
// allow. Destinations may lie on another GPU whose memory is mapped here. Bit for bit. Asynchronous
// on `stream`; may be captured in a graph.
#ifndef CLUSTERKV_KERNELS_GATHER_GATHER_CUDA_H_
#define CLUSTERKV_KERNELS_GATHER_GATHER_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/paged_cuda.h"

namespace clusterkv::kernels {

// packed [count, records.element_bytes] out: record indices[i] of `records`. `indices` [count] in
// device memory, each in [0, records' size): not checked. element_bytes is a multiple of 4, and so
// are bases.
cudaError_t LaunchGatherRecords(const DevicePagedView& records, const int32_t* indices,
                                int64_t count, unsigned char* packed, cudaStream_t stream);

struct RecordMove {
  uint32_t view = 0;        // index into `views`
  uint32_t element = 0;     // record of that view
  int64_t destination = 0;  // bytes from the destination's base
};

// Copies record moves[i].element of views[moves[i].view] to destination + moves[i].destination for
// i below *count (or below max_count where count is null). views, moves and count in device memory;
// all views have records of record_bytes, a multiple of 4, as are the destinations.
cudaError_t LaunchMoveRecords(const DevicePagedView* views, const RecordMove* moves,
                              const int32_t* count, int32_t max_count, int32_t record_bytes,
                              unsigned char* destination, cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_GATHER_GATHER_CUDA_H_
