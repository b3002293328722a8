#include "kernels/kmeans/kmeans.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/kmeans/kmeans_internal.h"

namespace clusterkv::kernels::internal {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxDim = 1024;

absl::Status CheckRange(const char* field, int64_t got, int64_t least, int64_t most) {
  if (got >= least && got <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": expected ", least, " to ", most, ", got ", got));
}

absl::Status CheckSize(const char* span, size_t got, int64_t expected) {
  if (got == static_cast<size_t>(expected)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(span, ": expected ", expected, " elements, got ", got));
}

}  // namespace

uint64_t SplitMix64::Next() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t SplitMix64::Below(int64_t bound) {
  return static_cast<int64_t>(((Next() >> 32) * static_cast<uint64_t>(bound)) >> 32);
}

absl::Status ValidateAssign(int64_t rows, int64_t dim, int64_t clusters, size_t keys_size,
                            size_t centroids_size, size_t labels_size) {
  // Ranges first: the products below cannot overflow then.
  if (auto s = CheckRange("rows", rows, 1, kMaxRows); !s.ok()) return s;
  if (auto s = CheckRange("dim", dim, 1, kMaxDim); !s.ok()) return s;
  if (auto s = CheckRange("clusters", clusters, 1, kMaxRows); !s.ok()) return s;
  if (auto s = CheckSize("keys", keys_size, rows * dim); !s.ok()) return s;
  if (auto s = CheckSize("centroids", centroids_size, clusters * dim); !s.ok()) return s;
  return CheckSize("labels", labels_size, rows);
}

absl::Status ValidateKMeans(const KMeansParams& params, size_t keys_size, size_t labels_size,
                            size_t centroids_size, size_t sizes_size) {
  if (auto s = CheckRange("rows", params.rows, 1, kMaxRows); !s.ok()) return s;
  if (auto s = CheckRange("clusters", params.clusters, 1, params.rows); !s.ok()) return s;
  if (auto s = CheckRange("iterations", params.iterations, 1, std::numeric_limits<int>::max());
      !s.ok()) {
    return s;
  }
  if (params.init != KMeansInit::kStride && params.init != KMeansInit::kRandom) {
    return absl::InvalidArgumentError(
        absl::StrCat("init: expected kStride or kRandom, got ", static_cast<int>(params.init)));
  }
  if (auto s = CheckSize("sizes", sizes_size, params.clusters); !s.ok()) return s;
  return ValidateAssign(params.rows, params.dim, params.clusters, keys_size, centroids_size,
                        labels_size);
}

std::vector<int32_t> InitialRows(const KMeansParams& params) {
  const int64_t n = params.rows;
  std::vector<int32_t> rows(params.clusters);
  if (params.init == KMeansInit::kStride) {
    const int64_t steps = std::max<int64_t>(1, params.clusters - 1);
    for (int64_t i = 0; i < params.clusters; ++i) {
      rows[i] = static_cast<int32_t>(i * (n - 1) / steps);
    }
    return rows;
  }
  SplitMix64 random(params.seed);
  std::vector<int32_t> deck(n);
  std::iota(deck.begin(), deck.end(), 0);
  for (int64_t i = 0; i < params.clusters; ++i) {
    std::swap(deck[i], deck[i + random.Below(n - i)]);
    rows[i] = deck[i];
  }
  return rows;
}

void SortByLabel(absl::Span<const int32_t> labels, absl::Span<int32_t> sizes,
                 std::vector<int32_t>* begin, std::vector<int32_t>* order) {
  std::fill(sizes.begin(), sizes.end(), 0);
  for (int32_t label : labels) ++sizes[label];
  begin->resize(sizes.size() + 1);
  (*begin)[0] = 0;
  for (size_t c = 0; c < sizes.size(); ++c) (*begin)[c + 1] = (*begin)[c] + sizes[c];
  std::vector<int32_t> next(begin->begin(), begin->end() - 1);
  order->resize(labels.size());
  for (size_t row = 0; row < labels.size(); ++row) {
    (*order)[next[labels[row]]++] = static_cast<int32_t>(row);
  }
}

}  // namespace clusterkv::kernels::internal
