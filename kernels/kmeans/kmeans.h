// Spherical k-means of key vectors: assignment by cosine, raw-mean centroids.
//
// Bitwise reproducible: the same input and parameters give the same labels and centroids on every
// run and for every ParallelFor. Each centroid is summed over its members in ascending row order.
#ifndef CLUSTERKV_KERNELS_KMEANS_KMEANS_H_
#define CLUSTERKV_KERNELS_KMEANS_KMEANS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/parallel.h"

namespace clusterkv::kernels {

enum class KMeansInit : uint8_t {
  // Centroid i starts at row floor(i (n - 1) / (C - 1)); row 0 when C is 1.
  kStride = 1,
  // C distinct rows drawn without replacement by a generator seeded with `seed`.
  kRandom = 2,
};

struct KMeansParams {
  int64_t rows = 0;      // n, at least 1
  int64_t dim = 0;       // D, 1 to 1,024
  int64_t clusters = 0;  // C, 1 to rows
  int iterations = 10;   // assignment + update, at least 1
  KMeansInit init = KMeansInit::kStride;
  uint64_t seed = 0;  // of kRandom
};

// Labels of the rows and the means of the labels' members.
//
//   keys       [rows, dim] float, row-major, finite
//   labels     [rows] out: the cluster of each row, 0 <= label < clusters
//   centroids  [clusters, dim] out: the raw mean of the rows with that label; a cluster that lost
//   all
//              its rows keeps its last centroid and has size 0
//   sizes      [clusters] out
//
// Each iteration assigns every row to the centroid of the largest cosine (row · centroid /
// |centroid|; the lowest index wins ties, a zero centroid scores 0) and then sets each centroid to
// its members' mean. The labels are those of the last assignment, so centroids are exactly their
// means. Errors: InvalidArgument when a size is out of range or a span's length differs from the
// shapes above. Source: ClusterKV (arXiv 2412.03213), section on semantic clustering.
absl::Status KMeans(const KMeansParams& params, absl::Span<const float> keys,
                    absl::Span<int32_t> labels, absl::Span<float> centroids,
                    absl::Span<int32_t> sizes, ParallelFor parallel_for);
absl::Status KMeansReference(const KMeansParams& params, absl::Span<const float> keys,
                             absl::Span<int32_t> labels, absl::Span<float> centroids,
                             absl::Span<int32_t> sizes);

// One assignment pass: labels of `keys` under given `centroids`, shapes as above. The part of
// KMeans that a benchmark compares with a matrix product.
absl::Status AssignRows(int64_t rows, int64_t dim, int64_t clusters, absl::Span<const float> keys,
                        absl::Span<const float> centroids, absl::Span<int32_t> labels,
                        ParallelFor parallel_for);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_KMEANS_KMEANS_H_
