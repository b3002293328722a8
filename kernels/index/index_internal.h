// What BuildIndexPart and BuildIndexPartReference share: validation, segments, addressing of
// inputs, and the splitting of large clusters.
#ifndef CLUSTERKV_KERNELS_INDEX_INDEX_INTERNAL_H_
#define CLUSTERKV_KERNELS_INDEX_INDEX_INTERNAL_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/index/index.h"

namespace clusterkv::kernels::internal {

// A run of tokens that is clustered by itself. Clusters [first_cluster, first_cluster + capacity)
// of the part may be its own; k-means makes `clusters` of them, splitting the rest.
struct Segment {
  int64_t begin = 0;  // token of the part
  int64_t tokens = 0;
  int64_t clusters = 0;
  int64_t first_cluster = 0;
  int64_t capacity = 0;
};
// REQUIRES: valid params, tokens >= 0.
std::vector<Segment> Segments(const IndexParams& params, int64_t tokens);

// Errors: as BuildIndexPart's.
absl::Status ValidateBuild(const KvShape& shape, const IndexParams& params,
                           const RecordCodec& codec, const IndexInput& input,
                           const IndexPartView& part);

KMeansParams SegmentKMeans(const KvShape& shape, const IndexParams& params, const Segment& segment,
                           int64_t head, int64_t segment_index);

// Head h's row of token t of the part, [head_dim] of the element type.
inline const std::byte* HeadRow(const KvShape& shape, const PagedView& rows, int64_t token,
                                int64_t head) {
  return rows.At(token) + head * shape.head_dim * ElementBytes(shape.element_type);
}

// Clusters of one segment; label and cluster counted from the segment's first.
struct SegmentClusters {
  std::vector<int32_t> labels;   // [tokens]
  std::vector<float> centroids;  // [clusters, head_dim]
  std::vector<int32_t> sizes;    // [clusters]
};

// KMeans or KMeansReference.
using KMeansFunction = absl::FunctionRef<absl::Status(
    const KMeansParams& params, absl::Span<const float> keys, absl::Span<int32_t> labels,
    absl::Span<float> centroids, absl::Span<int32_t> sizes)>;

// Clusters keys [segment.tokens, head_dim] and splits what params.split_over says; at most
// segment.capacity clusters come of it.
absl::Status ClusterSegment(const KvShape& shape, const IndexParams& params, const Segment& segment,
                            int64_t head, int64_t segment_index, absl::Span<const float> keys,
                            KMeansFunction kmeans, SegmentClusters* clusters);

// w_j of the balanced metric.
float MetricWeight(float query_rms, double key_std);

}  // namespace clusterkv::kernels::internal

#endif  // CLUSTERKV_KERNELS_INDEX_INDEX_INTERNAL_H_
