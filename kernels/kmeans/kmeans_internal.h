// What KMeans and KMeansReference share: the validator, the start and the order of members.
#ifndef CLUSTERKV_KERNELS_KMEANS_KMEANS_INTERNAL_H_
#define CLUSTERKV_KERNELS_KMEANS_KMEANS_INTERNAL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/kmeans/kmeans.h"

namespace clusterkv::kernels::internal {

// The generator of kRandom, the same on every platform: SplitMix64 (Steele, Lea, Flood 2014).
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  // Of [0, bound): the upper 32 bits of Next() times bound, over 2^32. REQUIRES: 1 <= bound < 2^31.
  int64_t Below(int64_t bound);

 private:
  uint64_t state_;
};

// Errors: InvalidArgument naming the field or span.
absl::Status ValidateAssign(int64_t rows, int64_t dim, int64_t clusters, size_t keys_size,
                            size_t centroids_size, size_t labels_size);
absl::Status ValidateKMeans(const KMeansParams& params, size_t keys_size, size_t labels_size,
                            size_t centroids_size, size_t sizes_size);

// The rows where the centroids start, [clusters]: kStride as kmeans.h says; kRandom by a partial
// Fisher-Yates shuffle: for i ascending, entry i of 0, 1, 2 ... is swapped with entry i + Below(n -
// i).
std::vector<int32_t> InitialRows(const KMeansParams& params);

// Counts `labels` into sizes [clusters] and lists rows by ascending label, ascending row within
// one: begin [clusters + 1], order [rows].
void SortByLabel(absl::Span<const int32_t> labels, absl::Span<int32_t> sizes,
                 std::vector<int32_t>* begin, std::vector<int32_t>* order);

}  // namespace clusterkv::kernels::internal

#endif  // CLUSTERKV_KERNELS_KMEANS_KMEANS_INTERNAL_H_
