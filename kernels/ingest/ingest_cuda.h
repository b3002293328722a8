// A prompt's rows from one GPU's memory to another's: packed into a slot of the worker's window,
// and out of it into the service's pages. Bit for bit; each kernel hashes what it copies (RowsHash,
// rows_hash.h), so that what arrived can be compared with what was sent.
//
// Asynchronous on `stream`; may be captured in a graph. The slot may be mapped from another process
// or another GPU.
#ifndef CLUSTERKV_KERNELS_INGEST_INGEST_CUDA_H_
#define CLUSTERKV_KERNELS_INGEST_INGEST_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/base/paged_cuda.h"

namespace clusterkv::kernels {

// K or V of some tokens: the row of (token, head) lies at data + token * token_stride_bytes + head
// * head_stride_bytes.
struct StridedRows {
  const unsigned char* data = nullptr;
  int64_t token_stride_bytes = 0, head_stride_bytes = 0;
};

struct PackRows {
  StridedRows keys, values;  // [tokens, heads] of head_bytes each
  int64_t tokens = 0;
  int32_t heads = 0, head_bytes = 0;     // head_bytes even
  unsigned char* slot_keys = nullptr;    // out: [tokens, heads, head_bytes]
  unsigned char* slot_values = nullptr;  // out: likewise
  unsigned long long* hash = nullptr;    // out, device memory. NOLINT(runtime/int): atomics' type
};

// Errors: cudaErrorInvalidValue for sizes or addresses that are not of whole 16-bit words; whatever
// the launch reports.
cudaError_t LaunchPackRows(const PackRows& rows, cudaStream_t stream);

// What LaunchTakeRows finds; zeroed by the caller before the first launch of a chunk, whose
// launches add to it.
struct RowsFound {
  unsigned long long hash = 0;  // NOLINT(runtime/int): atomics' type
  // The complement of the index of the first element that is NaN or infinite, counted over the
  // chunk's keys or values; 0: all are finite.
  unsigned long long not_first_bad_key = 0, not_first_bad_value = 0;  // NOLINT(runtime/int)
};

// Rows [begin, end) of a chunk of `rows` rows that lies packed in a slot.
struct TakeRows {
  const unsigned char* slot_keys = nullptr;    // [rows, row_bytes]
  const unsigned char* slot_values = nullptr;  // likewise
  int64_t rows = 0, begin = 0, end = 0;
  ElementType type = ElementType::kBFloat16;
  DevicePagedView keys, values;  // out: row `begin` goes to element `first`
  uint32_t first = 0;
  RowsFound* found = nullptr;  // device memory
};

// Errors: as LaunchPackRows.
cudaError_t LaunchTakeRows(const TakeRows& rows, cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_INGEST_INGEST_CUDA_H_
