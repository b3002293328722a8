// The plain statement of an index part: one head, one token, one channel at a time, all in memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "kernels/index/index.h"
#include "kernels/index/index_internal.h"

namespace clusterkv::kernels {
namespace {

using internal::Segment;
using internal::SegmentClusters;

// One head's rows as float, [tokens, head_dim].
std::vector<float> HeadRows(const KvShape& shape, const PagedView& rows, int64_t tokens,
                            int64_t head) {
  const int64_t element_bytes = ElementBytes(shape.element_type);
  std::vector<float> out;
  for (int64_t t = 0; t < tokens; ++t) {
    const std::byte* row = internal::HeadRow(shape, rows, t, head);
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      out.push_back(LoadElement(row + d * element_bytes, shape.element_type));
    }
  }
  return out;
}

std::vector<float> MetricWeights(const KvShape& shape, const IndexInput& input,
                                 const std::vector<float>& keys, int64_t tokens, int64_t head) {
  std::vector<float> weights(shape.head_dim, 1.0f);
  for (int64_t d = 0; !input.query_rms.empty() && d < shape.head_dim; ++d) {
    double sum = 0;
    for (int64_t t = 0; t < tokens; ++t) sum += keys[t * shape.head_dim + d];
    const double mean = sum / static_cast<double>(tokens);
    double squares = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const double difference = keys[t * shape.head_dim + d] - mean;
      squares += difference * difference;
    }
    const double std = tokens > 1 ? std::sqrt(squares / static_cast<double>(tokens - 1)) : 0.0;
    weights[d] = internal::MetricWeight(input.query_rms[head * shape.head_dim + d], std);
  }
  return weights;
}

// What BuildHead makes before it writes.
struct Head {
  std::vector<float> keys, values;               // [tokens, head_dim], keys weighted
  std::vector<int32_t> labels;                   // [tokens], cluster of the part
  std::vector<uint16_t> centroids, value_means;  // [clusters, head_dim] half
  std::vector<int32_t> sizes;                    // [clusters]
  std::vector<float> channels;                   // [3, head_dim]
};

absl::Status ClusterHead(const KvShape& shape, const IndexParams& params, int64_t tokens,
                         int64_t head, Head* h) {
  const std::vector<Segment> segments = internal::Segments(params, tokens);
  for (size_t s = 0; s < segments.size(); ++s) {
    SegmentClusters clusters;
    CKV_RETURN_IF_ERROR(internal::ClusterSegment(
        shape, params, segments[s], head, s,
        absl::MakeConstSpan(h->keys).subspan(segments[s].begin * shape.head_dim,
                                             segments[s].tokens * shape.head_dim),
        KMeansReference, &clusters));
    const int32_t first = static_cast<int32_t>(h->sizes.size());
    for (int32_t label : clusters.labels) h->labels.push_back(first + label);
    h->sizes.insert(h->sizes.end(), clusters.sizes.begin(), clusters.sizes.end());
    for (float x : clusters.centroids) h->centroids.push_back(FloatToHalfSaturated(x));
  }
  // Clusters that the capacity leaves over: empty, centroid and value mean 0.
  const int64_t capacity = ClusterCapacity(params, tokens);
  h->sizes.resize(capacity, 0);
  h->centroids.resize(capacity * shape.head_dim, 0);
  std::vector<double> sums(capacity * shape.head_dim, 0.0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      sums[h->labels[t] * shape.head_dim + d] += h->values[t * shape.head_dim + d];
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    const int32_t size = h->sizes[i / shape.head_dim];
    const float mean = size > 0 ? static_cast<float>(sums[i] / size) : 0.0f;
    h->value_means.push_back(FloatToHalfSaturated(mean));
  }
  return absl::OkStatus();
}

// rows [tokens, head_dim] minus their cluster's row of `bases`.
std::vector<float> Residuals(const std::vector<float>& rows, const std::vector<uint16_t>& bases,
                             const std::vector<int32_t>& labels, int64_t head_dim) {
  std::vector<float> out;
  for (size_t i = 0; i < rows.size(); ++i) {
    out.push_back(rows[i] - HalfToFloat(bases[labels[i / head_dim] * head_dim + i % head_dim]));
  }
  return out;
}

void WriteHead(const KvShape& shape, const IndexParams& params, const RecordCodec& codec,
               const IndexInput& input, const MutableIndexPartView& part, int64_t head, Head* h) {
  const int64_t dim = shape.head_dim;
  const std::vector<float> key_residuals = Residuals(h->keys, h->centroids, h->labels, dim);
  const std::vector<float> value_residuals = Residuals(h->values, h->value_means, h->labels, dim);
  if (input.inherited_channels == nullptr && params.codes.bits != 0) {
    ResidualBalance(key_residuals.data(), part.tokens, dim, &h->channels[dim]);
    ResidualBalance(value_residuals.data(), part.tokens, dim, &h->channels[2 * dim]);
  }
  std::copy(h->channels.begin(), h->channels.end(), part.channels.As<float>(head));
  int32_t begin = 0;
  for (int64_t c = 0; c < part.clusters; ++c) {
    std::copy_n(&h->centroids[c * dim], dim, part.centroids.As<uint16_t>(head * part.clusters + c));
    std::copy_n(&h->value_means[c * dim], dim,
                part.value_means.As<uint16_t>(head * part.clusters + c));
    *part.cluster_begin.As<int32_t>(head * (part.clusters + 1) + c) = begin;
    begin += h->sizes[c];
  }
  *part.cluster_begin.As<int32_t>(head * (part.clusters + 1) + part.clusters) = begin;

  std::vector<int64_t> order(part.tokens);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return h->labels[a] < h->labels[b]; });
  for (int64_t slot = 0; slot < part.tokens; ++slot) {
    const int64_t t = order[slot];
    const int64_t at = head * part.tokens + slot;
    *part.positions.As<int32_t>(at) = static_cast<int32_t>(part.first_token + t);
    *part.slots.As<int32_t>(head * part.tokens + t) = static_cast<int32_t>(slot);
    codec.Encode(internal::HeadRow(shape, input.keys, t, head), 0,
                 internal::HeadRow(shape, input.values, t, head), 0, shape.element_type, dim, 1,
                 part.records.At(at));
    if (part.remainders.size > 0) {
      codec.EncodeRemainders(internal::HeadRow(shape, input.values, t, head), 0, shape.element_type,
                             dim, 1, part.records.At(at), part.remainders.At(at));
    }
    if (params.codes.bits == 0) continue;
    EncodeResidualsReference(params.codes, dim, 1, &key_residuals[t * dim],
                             &value_residuals[t * dim], &h->channels[dim], &h->channels[2 * dim],
                             part.codes.At(at));
  }
}

}  // namespace

absl::Status BuildIndexPartReference(const KvShape& shape, const IndexParams& params,
                                     const RecordCodec& codec, const IndexInput& input,
                                     const MutableIndexPartView& part) {
  CKV_RETURN_IF_ERROR(internal::ValidateBuild(shape, params, codec, input, part));
  for (int64_t head = 0; head < shape.kv_heads; ++head) {
    Head h;
    h.keys = HeadRows(shape, input.keys, part.tokens, head);
    h.values = HeadRows(shape, input.values, part.tokens, head);
    h.channels.assign(3 * shape.head_dim, 1.0f);
    if (input.inherited_channels != nullptr) {
      std::copy_n(input.inherited_channels->As<float>(head), 3 * shape.head_dim,
                  h.channels.begin());
    } else {
      const std::vector<float> weights = MetricWeights(shape, input, h.keys, part.tokens, head);
      std::copy(weights.begin(), weights.end(), h.channels.begin());
    }
    for (size_t i = 0; i < h.keys.size(); ++i) h.keys[i] *= h.channels[i % shape.head_dim];
    CKV_RETURN_IF_ERROR(ClusterHead(shape, params, part.tokens, head, &h));
    WriteHead(shape, params, codec, input, part, head, &h);
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
