// Sparse decode attention (attention.h) on a GPU, for a batch of (sequence, KV head) pairs.
//
// Same contract as SparseAttention, within 1e-4 of its output's size: products run on the matrix
// unit with queries and weights split in two 16-bit numbers. Bitwise reproducible for the same
// inputs and the same `splits`. Tokens of a pair are spread over `splits` blocks; the last one to
// finish merges their parts, in order, with the attention state.
#ifndef CLUSTERKV_KERNELS_ATTENTION_ATTENTION_CUDA_H_
#define CLUSTERKV_KERNELS_ATTENTION_ATTENTION_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/codec/record_format.h"

namespace clusterkv::kernels {

// As RawRun (attention.h), in device memory; rows and strides are multiples of 16 bytes.
struct DeviceRawRun {
  const unsigned char* keys = nullptr;
  const unsigned char* values = nullptr;
  int64_t key_stride_bytes = 0;
  int64_t value_stride_bytes = 0;
  int64_t tokens = 0;
};

// One pair. Device memory, as are all arrays it names.
struct AttentionCudaPair {
  const float* queries = nullptr;     // [group, head_dim]
  const DeviceRawRun* raw = nullptr;  // [raw_runs]
  int32_t raw_runs = 0;
  int32_t record_tokens = 0;
  // Where not null, the number of records in device memory; record_tokens is then its upper bound.
  const int32_t* record_count = nullptr;
  const unsigned char* slot_base = nullptr;  // record of slot s at slot_base + s * record bytes
  const int32_t* slots = nullptr;            // [record_tokens]
  const uint32_t* head_masks = nullptr;      // [record_tokens], or null: every head attends
  const float* state_output = nullptr;       // [group, head_dim], or null: no state
  const float* state_lse = nullptr;          // [group]
  float* output = nullptr;                   // [group, head_dim] out
  float* lse = nullptr;                      // [group] out, may be null
};

struct AttentionCudaParams {
  int32_t group = 0;     // 1 to 32
  int32_t head_dim = 0;  // a multiple of 16, 16 to 512
  ElementType element_type = ElementType::kBFloat16;
  RecordFormat format = RecordFormat::kRaw;
  float scale = 0;
  // Blocks per pair (and per 8 query heads); 0: as max_tokens, the batch and the device suggest.
  int32_t splits = 0;
  int64_t max_tokens = 0;  // of a pair, raw and records: only a hint for `splits`
};

// Bytes of `workspace` for a batch of `pairs`, aligned to 256. It must be zeroed once, before its
// first use; every launch leaves it fit for the next.
int64_t AttentionCudaWorkspaceBytes(const AttentionCudaParams& params, int32_t pairs);

// `pairs` [pair_count] in device memory. Asynchronous on `stream`; may be captured in a graph.
// Errors: cudaErrorInvalidValue for parameters out of the ranges above; whatever the launch
// reports.
cudaError_t LaunchSparseAttention(const AttentionCudaParams& params, const AttentionCudaPair* pairs,
                                  int32_t pair_count, void* workspace, cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_ATTENTION_ATTENTION_CUDA_H_
