// The plain statement of KMeans: one row, one centroid, one channel at a time, in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "kernels/kmeans/kmeans.h"
#include "kernels/kmeans/kmeans_internal.h"

namespace clusterkv::kernels {
namespace {

double Dot(const float* a, const float* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

int32_t BestCentroid(const float* row, const float* centroids, int64_t dim, int64_t clusters) {
  int32_t best = 0;
  double best_score = -INFINITY;
  for (int64_t c = 0; c < clusters; ++c) {
    const float* centroid = centroids + c * dim;
    const double norm = std::sqrt(Dot(centroid, centroid, dim));
    const double score = norm > 0 ? Dot(row, centroid, dim) / norm : 0.0;
    if (score > best_score) {
      best_score = score;
      best = static_cast<int32_t>(c);
    }
  }
  return best;
}

}  // namespace

absl::Status KMeansReference(const KMeansParams& params, absl::Span<const float> keys,
                             absl::Span<int32_t> labels, absl::Span<float> centroids,
                             absl::Span<int32_t> sizes) {
  CKV_RETURN_IF_ERROR(
      internal::ValidateKMeans(params, keys.size(), labels.size(), centroids.size(), sizes.size()));
  const int64_t dim = params.dim;
  const std::vector<int32_t> start = internal::InitialRows(params);
  for (int64_t c = 0; c < params.clusters; ++c) {
    std::copy_n(&keys[start[c] * dim], dim, &centroids[c * dim]);
  }
  for (int i = 0; i < params.iterations; ++i) {
    for (int64_t row = 0; row < params.rows; ++row) {
      labels[row] = BestCentroid(&keys[row * dim], centroids.data(), dim, params.clusters);
    }
    std::vector<double> sums(params.clusters * dim, 0.0);
    std::fill(sizes.begin(), sizes.end(), 0);
    for (int64_t row = 0; row < params.rows; ++row) {
      ++sizes[labels[row]];
      for (int64_t d = 0; d < dim; ++d) sums[labels[row] * dim + d] += keys[row * dim + d];
    }
    for (int64_t c = 0; c < params.clusters; ++c) {
      for (int64_t d = 0; sizes[c] > 0 && d < dim; ++d) {
        centroids[c * dim + d] = static_cast<float>(sums[c * dim + d] / sizes[c]);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
