// Building an index part (index.h) on a GPU, in a fixed sequence of launches.
//
// Same contract as BuildIndexPart without splitting. Sums over a whole part (the metric's, the
// balances') are made of sums over runs of tokens, in double: they differ from BuildIndexPart's
// below a float's last bit, so that all arrays are the same bytes but for a rare channel that falls
// on a rounding edge. Bitwise reproducible. No synchronisation, nothing allocated: may be captured
// in a graph.
#ifndef CLUSTERKV_KERNELS_INDEX_INDEX_CUDA_H_
#define CLUSTERKV_KERNELS_INDEX_INDEX_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/base/paged_cuda.h"
#include "kernels/codec/record_format.h"
#include "kernels/index/index_view_cuda.h"

namespace clusterkv::kernels {

// KvShape, IndexParams and codec of the part.
struct IndexCudaParams {
  int32_t kv_heads = 0;  // 1 to 256
  int32_t head_dim = 0;  // a multiple of 16, 16 to 512
  ElementType element_type = ElementType::kBFloat16;
  int32_t tokens_per_cluster = 16;
  int32_t segment_tokens = 8192;  // 0: one run
  int32_t iterations = 10;
  int32_t code_bits = 2;        // 2, 3, 4; 0: no codes
  int32_t group_channels = 32;  // a multiple of 16 that divides head_dim
  RecordFormat format = RecordFormat::kRaw;
};

// IndexInput. Rows and records are aligned to 16 bytes (records of k8v4 to 8, codes and remainders
// to 4).
struct IndexCudaInput {
  // Element t is token (first_token + t)'s rows of all KV heads.
  DevicePagedView keys;
  DevicePagedView values;
  // [kv_heads, head_dim] in device memory; null: raw metric.
  const float* query_rms = nullptr;
  // Channels of an earlier part where inherits_channels; query_rms is then ignored.
  DevicePagedView inherited_channels;
  bool inherits_channels = false;
  // KMeansInit::kRandom's rows (internal::InitialRows) of every head's segments one after another,
  // [kv_heads, clusters] in device memory, counted from the segment's first; null: kStride's.
  const int32_t* initial_rows = nullptr;
};

// Clusters per KV head of a part of `tokens`: ClusterCapacity without splitting.
int64_t IndexCudaClusters(const IndexCudaParams& params, int64_t tokens);

// Bytes of `workspace` for a part of `tokens` tokens or fewer, aligned to 256; 0 for parameters out
// of the ranges above.
int64_t IndexCudaWorkspaceBytes(const IndexCudaParams& params, int64_t tokens);

// Builds `part`, whose arrays are all written. Asynchronous on `stream`. `workspace` must not be
// shared with work that runs at the same time. Errors: cudaErrorInvalidValue for parameters out of
// the ranges above, part.tokens < 1, part.clusters that are not IndexCudaClusters(), or more than
// 65,535 segments over all heads; whatever a launch reports.
cudaError_t LaunchBuildIndexPart(const IndexCudaParams& params, const IndexCudaInput& input,
                                 const DeviceIndexPart& part, void* workspace, cudaStream_t stream);

// The last step alone, which a benchmark wants apart: records and codes in cluster order. After
// LaunchBuildIndexPart with the same arguments.
cudaError_t LaunchEncodeIndexSlots(const IndexCudaParams& params, const IndexCudaInput& input,
                                   const DeviceIndexPart& part, void* workspace,
                                   cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_INDEX_INDEX_CUDA_H_
