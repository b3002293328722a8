// AllFinite (element_type.h) on a GPU: what a server checks before it clusters what it was sent.
#ifndef CLUSTERKV_KERNELS_BASE_FINITE_CUDA_H_
#define CLUSTERKV_KERNELS_BASE_FINITE_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/base/paged_cuda.h"

namespace clusterkv::kernels {

// What LaunchFindNonFinite writes when every element is finite.
constexpr int64_t kAllFinite = 0x7f7f7f7f7f7f7f7f;

// Writes to *first_bad (device memory) the index i * row_elements + j of the first element that is
// NaN or infinite, element j of row i: the row_elements of `type` at rows.At(first_row + i), whose
// bytes are a multiple of 16, aligned to 16. Asynchronous on `stream`; may be captured in a graph.
// Errors: cudaErrorInvalidValue for negative counts or rows that are not of whole 16 bytes;
// whatever the launch reports.
cudaError_t LaunchFindNonFinite(const DevicePagedView& rows, uint32_t first_row, int64_t row_count,
                                int64_t row_elements, ElementType type, int64_t* first_bad,
                                cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_FINITE_CUDA_H_
