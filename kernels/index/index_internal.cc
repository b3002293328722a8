#include "kernels/index/index_internal.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels::internal {
namespace {

// The most tokens of a cluster that is not split.
int64_t SplitLimit(const IndexParams& params) {
  if (params.split_over == 0) return std::numeric_limits<int64_t>::max();
  const double limit = static_cast<double>(params.split_over) * params.tokens_per_cluster;
  return limit >= 0x1p62 ? std::numeric_limits<int64_t>::max()
                         : std::max<int64_t>(1, static_cast<int64_t>(limit));
}

// Every side of a split has at least a quarter of the limit + 1 tokens or more that were split, so
// a segment's pieces are no more than its tokens over that; one whole cluster at least was split
// for them.
int64_t SegmentCapacity(const IndexParams& params, int64_t tokens, int64_t clusters) {
  const int64_t limit = SplitLimit(params);
  if (tokens <= limit) return clusters;
  const int64_t smallest_piece = (limit + 1 + 3) / 4;
  return clusters - 1 + std::max<int64_t>(1, tokens / smallest_piece);
}

absl::Status CheckView(std::string_view name, const PagedView& view, int64_t element_bytes,
                       int64_t size) {
  if (view.size != size) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(name), ".size: expected ", size, ", got ", view.size));
  }
  if (size > 0 && view.element_bytes != element_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(name), ".element_bytes: expected ",
                                                   element_bytes, ", got ", view.element_bytes));
  }
  return absl::OkStatus();
}

// Means of the two sides of `rows` [count, dim] as labels say, summed in order in double.
void TwoMeans(const std::vector<float>& rows, int64_t dim, const std::vector<int32_t>& labels,
              std::vector<float>* centroids, std::vector<int32_t>* sizes) {
  std::vector<double> sums(2 * dim, 0.0);
  sizes->assign(2, 0);
  for (size_t i = 0; i < labels.size(); ++i) {
    ++(*sizes)[labels[i]];
    for (int64_t d = 0; d < dim; ++d) sums[labels[i] * dim + d] += rows[i * dim + d];
  }
  for (int64_t i = 0; i < 2 * dim; ++i) {
    (*centroids)[i] = static_cast<float>(sums[i] / (*sizes)[i / dim]);
  }
}

// Splits cluster c; its second side becomes the last cluster.
absl::Status SplitCluster(int64_t c, int64_t dim, const IndexParams& params,
                          absl::Span<const float> keys, KMeansFunction kmeans,
                          SegmentClusters* clusters) {
  std::vector<int32_t> members;
  std::vector<float> rows;
  for (size_t i = 0; i < clusters->labels.size(); ++i) {
    if (clusters->labels[i] != c) continue;
    members.push_back(static_cast<int32_t>(i));
    rows.insert(rows.end(), &keys[i * dim], &keys[i * dim] + dim);
  }
  const int64_t count = static_cast<int64_t>(members.size());
  std::vector<int32_t> labels(count), sizes(2);
  std::vector<float> centroids(2 * dim);
  const KMeansParams two{.rows = count, .dim = dim, .clusters = 2, .iterations = params.iterations};
  CKV_RETURN_IF_ERROR(
      kmeans(two, rows, absl::MakeSpan(labels), absl::MakeSpan(centroids), absl::MakeSpan(sizes)));
  if (4 * int64_t{std::min(sizes[0], sizes[1])} < count) {
    for (int64_t i = 0; i < count; ++i) labels[i] = i < (count + 1) / 2 ? 0 : 1;
    TwoMeans(rows, dim, labels, &centroids, &sizes);
  }
  const int32_t added = static_cast<int32_t>(clusters->sizes.size());
  for (int64_t i = 0; i < count; ++i) {
    if (labels[i] == 1) clusters->labels[members[i]] = added;
  }
  clusters->sizes[c] = sizes[0];
  clusters->sizes.push_back(sizes[1]);
  std::copy_n(centroids.begin(), dim, clusters->centroids.begin() + c * dim);
  clusters->centroids.insert(clusters->centroids.end(), centroids.begin() + dim, centroids.end());
  return absl::OkStatus();
}

}  // namespace

std::vector<Segment> Segments(const IndexParams& params, int64_t tokens) {
  const int64_t step = params.segment_tokens > 0 ? params.segment_tokens : tokens;
  std::vector<Segment> segments;
  int64_t first_cluster = 0;
  for (int64_t begin = 0; begin < tokens; begin += segments.back().tokens) {
    Segment segment{.begin = begin, .tokens = std::min(step, tokens - begin)};
    segment.clusters = std::max<int64_t>(1, segment.tokens / params.tokens_per_cluster);
    segment.first_cluster = first_cluster;
    segment.capacity = SegmentCapacity(params, segment.tokens, segment.clusters);
    first_cluster += segment.capacity;
    segments.push_back(segment);
  }
  return segments;
}

absl::Status ValidateBuild(const KvShape& shape, const IndexParams& params,
                           const RecordCodec& codec, const IndexInput& input,
                           const IndexPartView& part) {
  CKV_RETURN_IF_ERROR(ValidateKvShape(shape));
  CKV_RETURN_IF_ERROR(ValidateIndexParams(shape, params));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (part.tokens < 1 || part.first_token < 0 || part.tokens > kMost - part.first_token) {
    return absl::InvalidArgumentError(
        absl::StrCat("part: tokens ", part.tokens, " from ", part.first_token,
                     ": expected at least 1, and positions below 2^31"));
  }
  const int64_t row_bytes = shape.kv_heads * shape.head_dim * ElementBytes(shape.element_type);
  CKV_RETURN_IF_ERROR(CheckView("keys", input.keys, row_bytes, part.tokens));
  CKV_RETURN_IF_ERROR(CheckView("values", input.values, row_bytes, part.tokens));
  const IndexLayout layout = MakeIndexLayout(shape, params, codec, part.tokens);
  const PagedView* views[kIndexArrays] = {&part.centroids, &part.value_means, &part.cluster_begin,
                                          &part.positions, &part.slots,       &part.codes,
                                          &part.records,   &part.channels,    &part.remainders};
  for (int i = 0; i < kIndexArrays; ++i) {
    const IndexArrayLayout& array = layout.arrays[i];
    CKV_RETURN_IF_ERROR(CheckView(array.name, *views[i], array.element_bytes, array.size));
  }
  if (const int64_t expected = ClusterCapacity(params, part.tokens); part.clusters != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("part.clusters: expected ", expected, ", got ", part.clusters));
  }
  if (input.inherited_channels != nullptr) {
    return CheckView("inherited_channels", *input.inherited_channels,
                     3 * shape.head_dim * sizeof(float), shape.kv_heads);
  }
  const int64_t channels = shape.kv_heads * shape.head_dim;
  if (!input.query_rms.empty() && static_cast<int64_t>(input.query_rms.size()) != channels) {
    return absl::InvalidArgumentError(absl::StrCat("query_rms: expected 0 or ", channels,
                                                   " elements, got ", input.query_rms.size()));
  }
  for (size_t i = 0; i < input.query_rms.size(); ++i) {
    if (!std::isfinite(input.query_rms[i])) {
      return absl::InvalidArgumentError(
          absl::StrCat("query_rms: element ", i, " is not finite: ", input.query_rms[i]));
    }
  }
  return absl::OkStatus();
}

KMeansParams SegmentKMeans(const KvShape& shape, const IndexParams& params, const Segment& segment,
                           int64_t head, int64_t segment_index) {
  return {.rows = segment.tokens,
          .dim = shape.head_dim,
          .clusters = segment.clusters,
          .iterations = params.iterations,
          .init = params.init,
          .seed = params.seed + (static_cast<uint64_t>(head) << 32) +
                  static_cast<uint64_t>(segment_index)};
}

absl::Status ClusterSegment(const KvShape& shape, const IndexParams& params, const Segment& segment,
                            int64_t head, int64_t segment_index, absl::Span<const float> keys,
                            KMeansFunction kmeans, SegmentClusters* clusters) {
  clusters->labels.resize(segment.tokens);
  clusters->centroids.resize(segment.clusters * shape.head_dim);
  clusters->sizes.resize(segment.clusters);
  CKV_RETURN_IF_ERROR(kmeans(SegmentKMeans(shape, params, segment, head, segment_index), keys,
                             absl::MakeSpan(clusters->labels), absl::MakeSpan(clusters->centroids),
                             absl::MakeSpan(clusters->sizes)));
  const int64_t limit = SplitLimit(params);
  // Grows as it goes: a new cluster's turn comes at the end.
  for (size_t c = 0; c < clusters->sizes.size(); ++c) {
    while (clusters->sizes[c] > limit) {
      CKV_RETURN_IF_ERROR(SplitCluster(c, shape.head_dim, params, keys, kmeans, clusters));
    }
  }
  CKV_CHECK(static_cast<int64_t>(clusters->sizes.size()) <= segment.capacity)
      << clusters->sizes.size() << " " << segment.capacity;
  return absl::OkStatus();
}

float MetricWeight(float query_rms, double key_std) {
  return static_cast<float>(
      std::sqrt(std::max(static_cast<double>(query_rms), 1e-6) / std::max(key_std, 1e-6)));
}

}  // namespace clusterkv::kernels::internal
