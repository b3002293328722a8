// Select (select.h) on a GPU, for a batch of (sequence, KV head) pairs in one launch.
//
// Same contract as Select in mode kSharedPerKvHead: the same zones up to near ties of scores that
// differ by rounding, the same state within 1e-4 of its size. Ties of equal scores go to the lower
// cluster, then the lower position. Bitwise reproducible for the same inputs and the same
// `blocks_per_pair`.
//
// kPerQueryHead: one pair per query head, group 1 (the caller unites the heads' tokens).
#ifndef CLUSTERKV_KERNELS_SELECT_SELECT_CUDA_H_
#define CLUSTERKV_KERNELS_SELECT_SELECT_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/index/index_view_cuda.h"

namespace clusterkv::kernels {

// Query heads of a quad: what a block answers of a pair in the kernel for the usual shapes.
constexpr int32_t kQuadHeads = 4;
// Quads of so many query heads.
__host__ __device__ inline int32_t QuadsOf(int32_t group) {
  return (group + kQuadHeads - 1) / kQuadHeads;
}

// Of the launch: all pairs alike.
struct SelectCudaParams {
  int32_t group = 0;                                  // query heads per KV head, 1 to 32
  int32_t head_dim = 0;                               // a multiple of 16, 16 to 512
  ElementType element_type = ElementType::kBFloat16;  // of the sinks' keys
  float scale = 0;                                    // of the logits
  int32_t code_bits = 2;        // 2, 3, 4; 0: no codes, then scored_tokens is 0
  int32_t group_channels = 32;  // of the codes' scales; a multiple of 16
  int32_t budget_tokens = 64;   // as in SelectParams
  int32_t scored_tokens = 2048;
  bool answer_scored = true;
  float estimated_fraction = 0.25f;
  // Bounds over all pairs of the batch: memory is laid out for them.
  int32_t max_clusters = 0;  // clusters of a pair, over its parts
  int32_t max_sinks = 0;
  // Blocks that share one pair (a thread-block cluster): 1 to 8, or 16; 0: as the batch and the
  // device suggest. More than 1 needs compute capability 9.0. The kernel for the usual shapes
  // (answer_pair.cuh) takes multiples of QuadsOf(group).
  int32_t blocks_per_pair = 0;
  // Takes the kernel for every shape also where there is the one for the usual shape
  // (answer_pair.cuh): the two check each other.
  bool general = false;
};

// One pair's input. Device memory, as are all arrays it names.
struct SelectCudaPair {
  const DeviceIndexPart* parts = nullptr;  // [part_count], in token order
  int32_t part_count = 0;
  int32_t clusters = 0;  // over the parts; <= max_clusters
  int32_t kv_head = 0;
  int32_t sink_tokens = 0;                   // <= max_sinks
  const float* queries = nullptr;            // [group, head_dim], as the model has them
  const unsigned char* sink_keys = nullptr;  // row i at sink_keys + i * sink_key_stride_bytes
  int64_t sink_key_stride_bytes = 0;
};

// Where the results go; row p belongs to pair p. Device memory. Pointers marked "may be null" may
// be.
struct SelectCudaOutput {
  int32_t max_exact = 0;  // tokens per row of the exact arrays; at least ExactCapacity()
  // The exact zone without sinks, by ascending position.
  int32_t* exact_count = nullptr;   // [pairs]
  int32_t* positions = nullptr;     // [pairs, max_exact]
  int32_t* parts = nullptr;         // [pairs, max_exact]
  int32_t* slots = nullptr;         // [pairs, max_exact], head-local
  int32_t* clusters = nullptr;      // [pairs, max_exact], counted over the parts; may be null
  int32_t* coded_tokens = nullptr;  // [pairs]; may be null
  // Clusters by zone, in ascending order (not by rank); may be null, then the counts may be too.
  int32_t max_listed = 0;
  int32_t* scored_count = nullptr;     // [pairs]
  int32_t* scored_clusters = nullptr;  // [pairs, max_listed]; what is beyond max_listed is left out
  int32_t* estimated_count = nullptr;  // [pairs]
  int32_t* estimated_clusters = nullptr;  // [pairs, max_listed]
  float* state_output = nullptr;          // [pairs, group, head_dim]
  float* state_lse = nullptr;             // [pairs, group]
};

// Tokens that the exact zone of a pair may have: budget_tokens, or what is scored when that is
// more.
int32_t ExactCapacity(const SelectCudaParams& params);
// Bytes of `workspace` for a batch of `pairs`. Aligned to 256.
int64_t SelectCudaWorkspaceBytes(const SelectCudaParams& params, int32_t pairs);

// Answers `pair_count` pairs. `pairs` in device memory. Asynchronous on `stream`; may be captured
// in a graph. `workspace` (SelectCudaWorkspaceBytes, 256-byte aligned) must not be shared with work
// that runs at the same time. Errors: cudaErrorInvalidValue for parameters out of the ranges above;
// whatever the launch reports.
cudaError_t LaunchSelect(const SelectCudaParams& params, const SelectCudaPair* pairs,
                         int32_t pair_count, const SelectCudaOutput& output, void* workspace,
                         cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_SELECT_SELECT_CUDA_H_
