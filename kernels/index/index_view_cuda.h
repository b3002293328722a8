// The semantic index in device memory: IndexPartView (index.h) for kernels.
#ifndef CLUSTERKV_KERNELS_INDEX_INDEX_VIEW_CUDA_H_
#define CLUSTERKV_KERNELS_INDEX_INDEX_VIEW_CUDA_H_

#include <cstdint>

#include "kernels/base/paged_cuda.h"

namespace clusterkv::kernels {

// The arrays, their elements and their order are those of the table in index.h. Elements whose size
// is a multiple of 16 bytes are aligned to 16. Lies in device
// memory itself where a kernel is handed a pointer to it.
struct DeviceIndexPart {
  int64_t first_token = 0;
  int32_t tokens = 0;         // T
  int32_t clusters = 0;       // C, per KV head
  int32_t first_cluster = 0;  // clusters per KV head of the parts before this one
  DevicePagedView centroids, value_means, cluster_begin, positions, slots, codes, records, channels,
      remainders;
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_INDEX_INDEX_VIEW_CUDA_H_
