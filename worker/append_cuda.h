// A decoded token's rows into the windows of a batch, at the place that a count in device memory
// says: so it can be captured in a graph and replayed.
#ifndef CLUSTERKV_WORKER_APPEND_CUDA_H_
#define CLUSTERKV_WORKER_APPEND_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace clusterkv::worker {

constexpr int kMaxAppended = 64;

// One layer. Device memory; pointers, row_bytes and strides are multiples of 16.
struct AppendCudaParams {
  struct Token {  // of a sequence: rows [kv_heads, row_bytes]
    const unsigned char* key = nullptr;
    const unsigned char* value = nullptr;
    int64_t head_stride_bytes = 0;
  };
  Token tokens[kMaxAppended];     // [sequences]
  unsigned char* rows = nullptr;  // [sequences, any number of rows, kv_heads, K and V, row_bytes]
  int64_t sequence_bytes = 0;     // from one sequence's rows to the next one's
  int64_t first_row = 0;          // of the window
  int64_t capacity = 0;           // of the window, tokens
  int64_t* counts = nullptr;      // [sequences]: tokens in the windows; one more afterwards
  uint32_t* status = nullptr;     // kWindowFull is set where there is no room, and nothing appended
  int32_t sequences = 0, kv_heads = 0, row_bytes = 0;
};
constexpr uint32_t kWindowFull = 1u << 16;  // beside kernels::StepStatus

// Errors: cudaErrorInvalidValue for more than kMaxAppended sequences; as the launch reports.
cudaError_t LaunchAppend(const AppendCudaParams& params, cudaStream_t stream);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_APPEND_CUDA_H_
