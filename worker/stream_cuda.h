// What a step leaves on the caller's stream around its attention: waiting for the answer, taking it
// over, and writing the output.
//
//   LaunchTake   waits until the host has published the step, copies the answer's small arrays, the
//                records that were lacking and the window's new rows to where attention reads them
//   (attention_cuda.h)
//   LaunchGive   adds the correction, converts, or writes zeros after a failure
//
// The host publishes in pinned memory that the GPU reads by itself: nobody but the stream calls
// CUDA, so that nothing can wait for the kernel that waits.
#ifndef CLUSTERKV_WORKER_STREAM_CUDA_H_
#define CLUSTERKV_WORKER_STREAM_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"

namespace clusterkv::worker {

// Pinned; zeroed once. Of a step the host writes what it says, then `published`.
struct StreamPackage {
  uint64_t published;  // steps
  uint64_t gave_up;    // by the GPU: the step that did not come in time
  uint32_t failed;     // of the published step: 1: the output is zeros
  int32_t records, rows;
};

// Pieces of one size that are copied to places of their own. Sizes and places are multiples of 8.
struct StreamMoves {
  const int64_t* to = nullptr;          // [pieces] offsets in `base`; pinned
  const unsigned char* from = nullptr;  // [pieces, bytes]; pinned
  unsigned char* base = nullptr;        // device
  int32_t bytes = 0;
};

struct StreamTake {
  StreamPackage* package = nullptr;
  uint32_t* state = nullptr;             // device [2]: the step failed; it was published
  const unsigned char* small = nullptr;  // pinned [small_bytes], a multiple of 8
  unsigned char* small_copy = nullptr;   // device
  int64_t small_bytes = 0;
  StreamMoves records, rows;
};

// Errors: as the launches report.
cudaError_t LaunchTake(const StreamTake& take, uint64_t step, uint64_t timeout_ns,
                       cudaStream_t stream);

struct StreamGive {
  const uint32_t* state = nullptr;    // as of StreamTake
  const float* attended = nullptr;    // [heads, head_dim]
  const float* lse = nullptr;         // [heads]
  const int8_t* codes = nullptr;      // [heads, head_dim], or null: no correction
  const float* log_scales = nullptr;  // [heads]
  int32_t heads = 0, head_dim = 0;
  kernels::ElementType output_type = kernels::ElementType::kFloat32;
};

// output [heads, head_dim] of output_type.
cudaError_t LaunchGive(const StreamGive& give, void* output, cudaStream_t stream);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_STREAM_CUDA_H_
