// K-means (kmeans.h) on a GPU, for a batch of problems in a fixed sequence of launches.
//
// Same contract and, where the processor has fused multiply-add, the same labels and centroids bit
// for bit as KMeans: rows are scored on the matrix unit in fp16, and where the two best scores
// lie closer than fp16's error allows, all that come so close are scored again in KMeans' own float
// arithmetic; sums run over the members in ascending row order, in double. (A score that fp16
// misjudges by more than six standard deviations would slip through.) No float atomics, no
// synchronisation, nothing allocated: may be captured in a graph.
#ifndef CLUSTERKV_KERNELS_KMEANS_KMEANS_CUDA_H_
#define CLUSTERKV_KERNELS_KMEANS_KMEANS_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/base/paged_cuda.h"

namespace clusterkv::kernels {

struct KMeansCudaParams {
  int32_t dim = 0;  // a multiple of 16, 16 to 512
  ElementType element_type = ElementType::kBFloat16;
  int32_t iterations = 10;
  // Bounds over the batch.
  int32_t max_rows = 0;
  int32_t max_clusters = 0;  // at most 45,000
  // Without the instructions that only Hopper has; the same results.
  bool plain = false;
};

// One problem. Device memory, as are all arrays it names.
struct KMeansCudaProblem {
  // Row i: the element rows.At(first_row + i), from byte row_offset on: [dim] of the element type,
  // aligned to 16 bytes, times `weights` [dim], likewise aligned, where not null.
  DevicePagedView rows;
  uint32_t first_row = 0;
  uint32_t row_offset = 0;
  const float* weights = nullptr;
  int32_t row_count = 0;      // 1 to max_rows
  int32_t cluster_count = 0;  // 1 to max_clusters, at most row_count
  // [cluster_count]: the rows that the centroids start from, or null: kStride's.
  const int32_t* initial_rows = nullptr;
  int32_t* labels = nullptr;   // [row_count] out
  float* centroids = nullptr;  // [cluster_count, dim] out, aligned to 16 bytes
  int32_t* order = nullptr;    // [row_count] out: the rows by cluster, ascending within each
  int32_t* begin = nullptr;    // [cluster_count + 1] out: where each cluster begins in `order`
};

// Bytes of `workspace` for `problems`, aligned to 256.
int64_t KMeansCudaWorkspaceBytes(const KMeansCudaParams& params, int32_t problems);

// Errors: cudaErrorInvalidValue for parameters out of the ranges above; whatever a launch reports.
cudaError_t LaunchKMeans(const KMeansCudaParams& params, const KMeansCudaProblem* problems,
                         int32_t problem_count, void* workspace, cudaStream_t stream);

// The two parts of LaunchKMeans that a benchmark wants apart: PrepareRows once, then one assignment
// of all rows to the centroids that `problems` name. Sets labels alone.
cudaError_t LaunchPrepareRows(const KMeansCudaParams& params, const KMeansCudaProblem* problems,
                              int32_t problem_count, void* workspace, cudaStream_t stream);
cudaError_t LaunchAssignRows(const KMeansCudaParams& params, const KMeansCudaProblem* problems,
                             int32_t problem_count, void* workspace, cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_KMEANS_KMEANS_CUDA_H_
