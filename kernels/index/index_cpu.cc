// BuildIndexPart in four parallel passes over the input: metric weights by head; clusters, order
// and value means by (head, segment); offsets and balances by head; codes and records by runs of
// slots. What one pass must tell the next lies in the part's own arrays, so that no pass holds a
// head's keys.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/index/index.h"
#include "kernels/index/index_internal.h"

namespace clusterkv::kernels {
namespace {

using internal::HeadRow;
using internal::Segment;
using internal::SegmentClusters;

constexpr int64_t kMaxHeadDim = 512;
// Slots of one task of the last pass, and of one call to the encoders.
constexpr int64_t kTaskSlots = 1024;
constexpr int64_t kChunkSlots = 64;

class Builder {
 public:
  Builder(const KvShape& shape, const IndexParams& params, const RecordCodec& codec,
          const IndexInput& input, const MutableIndexPartView& part, ParallelFor parallel_for)
      : shape_(shape),
        params_(params),
        codec_(codec),
        input_(input),
        part_(part),
        parallel_for_(parallel_for),
        dim_(shape.head_dim),
        segments_(internal::Segments(params, part.tokens)),
        computes_balance_(params.codes.bits != 0 && input.inherited_channels == nullptr),
        cluster_counts_(shape.kv_heads * segments_.size()),
        squares_(computes_balance_ ? cluster_counts_.size() * 2 * dim_ : 0) {}

  void Build() {
    const int64_t segments = segments_.size();
    const int64_t tasks = (part_.tokens + kTaskSlots - 1) / kTaskSlots;
    parallel_for_(shape_.kv_heads, [&](int64_t head) { WriteMetric(head); });
    parallel_for_(shape_.kv_heads * segments,
                  [&](int64_t i) { BuildSegment(i / segments, i % segments); });
    parallel_for_(shape_.kv_heads, [&](int64_t head) {
      PackClusters(head);
      WriteBalance(head);
    });
    parallel_for_(shape_.kv_heads * tasks, [&](int64_t i) {
      const int64_t begin = i % tasks * kTaskSlots;
      EncodeSlots(i / tasks, begin, std::min(part_.tokens, begin + kTaskSlots));
    });
  }

 private:
  void LoadValue(int64_t head, int64_t token, float* value) const {
    ToFloat(HeadRow(shape_, input_.values, token, head), shape_.element_type, dim_, value);
  }
  // Weighted.
  void LoadKey(int64_t head, int64_t token, float* key) const {
    const float* weights = part_.channels.As<float>(head);
    ToFloat(HeadRow(shape_, input_.keys, token, head), shape_.element_type, dim_, key);
    for (int64_t d = 0; d < dim_; ++d) key[d] *= weights[d];
  }

  // The head's element of `channels`, the balances still 1 where they are to be computed.
  void WriteMetric(int64_t head) {
    float* channels = part_.channels.As<float>(head);
    if (input_.inherited_channels != nullptr) {
      std::copy_n(input_.inherited_channels->As<float>(head), 3 * dim_, channels);
      return;
    }
    std::fill_n(channels, 3 * dim_, 1.0f);
    if (input_.query_rms.empty()) return;
    const std::vector<double> squares = KeySquaredDifferences(head);
    for (int64_t d = 0; d < dim_; ++d) {
      const double std =
          part_.tokens > 1 ? std::sqrt(squares[d] / static_cast<double>(part_.tokens - 1)) : 0.0;
      channels[d] = internal::MetricWeight(input_.query_rms[head * dim_ + d], std);
    }
  }

  // Of the keys, not weighted, from their mean, by channel. In two passes: a channel's offset may
  // be large against its spread.
  std::vector<double> KeySquaredDifferences(int64_t head) const {
    std::vector<double> means(dim_, 0.0), squares(dim_, 0.0);
    float key[kMaxHeadDim];
    for (int64_t t = 0; t < part_.tokens; ++t) {
      ToFloat(HeadRow(shape_, input_.keys, t, head), shape_.element_type, dim_, key);
      for (int64_t d = 0; d < dim_; ++d) means[d] += key[d];
    }
    for (double& mean : means) mean /= static_cast<double>(part_.tokens);
    for (int64_t t = 0; t < part_.tokens; ++t) {
      ToFloat(HeadRow(shape_, input_.keys, t, head), shape_.element_type, dim_, key);
      for (int64_t d = 0; d < dim_; ++d) {
        const double difference = key[d] - means[d];
        squares[d] += difference * difference;
      }
    }
    return squares;
  }

  // Clusters a segment and writes its positions, slots, and, at the segment's first cluster by
  // capacity, centroids, value means and begins.
  void BuildSegment(int64_t head, int64_t s) {
    const Segment& segment = segments_[s];
    SegmentClusters clusters;
    {
      std::vector<float> keys(segment.tokens * dim_);
      for (int64_t t = 0; t < segment.tokens; ++t) {
        LoadKey(head, segment.begin + t, &keys[t * dim_]);
      }
      const absl::Status status = internal::ClusterSegment(
          shape_, params_, segment, head, s, keys,
          [&](const KMeansParams& params, absl::Span<const float> rows, absl::Span<int32_t> labels,
              absl::Span<float> centroids, absl::Span<int32_t> sizes) {
            return KMeans(params, rows, labels, centroids, sizes, parallel_for_);
          },
          &clusters);
      CKV_CHECK(status.ok()) << status;  // the parameters were validated
    }
    cluster_counts_[head * segments_.size() + s] = clusters.sizes.size();
    WriteOrder(head, segment, clusters);
    std::vector<float> value_means = ValueMeans(head, segment, clusters);
    for (size_t c = 0; c < clusters.sizes.size(); ++c) {
      const int64_t at = head * part_.clusters + segment.first_cluster + c;
      StoreRow(&clusters.centroids[c * dim_], part_.centroids.As<uint16_t>(at));
      StoreRow(&value_means[c * dim_], part_.value_means.As<uint16_t>(at));
    }
    if (computes_balance_) SumSquares(head, s, clusters, value_means);
  }

  // Stores row [head_dim], which then holds what was stored of it.
  void StoreRow(float* row, uint16_t* stored) const {
    FloatToHalvesSaturated(row, dim_, stored);
    HalvesToFloat(stored, dim_, row);
  }

  // A segment's tokens are the slots of the same numbers: counting sort, so that positions ascend
  // within a cluster.
  void WriteOrder(int64_t head, const Segment& segment, const SegmentClusters& clusters) {
    std::vector<int32_t> next;
    int32_t begin = static_cast<int32_t>(segment.begin);
    for (size_t c = 0; c < clusters.sizes.size(); ++c) {
      next.push_back(begin);
      *part_.cluster_begin.As<int32_t>(head * (part_.clusters + 1) + segment.first_cluster + c) =
          begin;
      begin += clusters.sizes[c];
    }
    for (int64_t t = 0; t < segment.tokens; ++t) {
      const int64_t token = segment.begin + t;
      const int32_t slot = next[clusters.labels[t]]++;
      *part_.slots.As<int32_t>(head * part_.tokens + token) = slot;
      *part_.positions.As<int32_t>(head * part_.tokens + slot) =
          static_cast<int32_t>(part_.first_token + token);
    }
  }

  std::vector<float> ValueMeans(int64_t head, const Segment& segment,
                                const SegmentClusters& clusters) const {
    std::vector<double> sums(clusters.sizes.size() * dim_, 0.0);
    float value[kMaxHeadDim];
    for (int64_t t = 0; t < segment.tokens; ++t) {
      LoadValue(head, segment.begin + t, value);
      double* sum = &sums[clusters.labels[t] * dim_];
      for (int64_t d = 0; d < dim_; ++d) sum[d] += value[d];
    }
    std::vector<float> means(sums.size(), 0.0f);
    for (size_t c = 0; c < clusters.sizes.size(); ++c) {
      for (int64_t d = 0; clusters.sizes[c] > 0 && d < dim_; ++d) {
        means[c * dim_ + d] = static_cast<float>(sums[c * dim_ + d] / clusters.sizes[c]);
      }
    }
    return means;
  }

  // The segment's share of the sums that the balances are made of, from centroids and means as they
  // are stored.
  void SumSquares(int64_t head, int64_t s, const SegmentClusters& clusters,
                  const std::vector<float>& value_means) {
    double* key_squares = &squares_[(head * segments_.size() + s) * 2 * dim_];
    double* value_squares = key_squares + dim_;
    float key[kMaxHeadDim], value[kMaxHeadDim];
    for (int64_t t = 0; t < segments_[s].tokens; ++t) {
      LoadKey(head, segments_[s].begin + t, key);
      LoadValue(head, segments_[s].begin + t, value);
      const float* centroid = &clusters.centroids[clusters.labels[t] * dim_];
      const float* mean = &value_means[clusters.labels[t] * dim_];
      for (int64_t d = 0; d < dim_; ++d) {
        const double key_residual = key[d] - centroid[d];
        const double value_residual = value[d] - mean[d];
        key_squares[d] += key_residual * key_residual;
        value_squares[d] += value_residual * value_residual;
      }
    }
  }

  // Moves the segments' clusters together where splitting left capacity over, and writes the head's
  // empty clusters and last begin.
  void PackClusters(int64_t head) {
    int64_t to = head * part_.clusters;
    for (size_t s = 0; s < segments_.size(); ++s) {
      int64_t from = head * part_.clusters + segments_[s].first_cluster;
      const int64_t count = cluster_counts_[head * segments_.size() + s];
      for (int64_t c = 0; c < count; ++c, ++from, ++to) {
        if (from == to) continue;
        std::copy_n(part_.centroids.As<uint16_t>(from), dim_, part_.centroids.As<uint16_t>(to));
        std::copy_n(part_.value_means.As<uint16_t>(from), dim_, part_.value_means.As<uint16_t>(to));
        // cluster_begin has one element more per head.
        *part_.cluster_begin.As<int32_t>(to + head) = *part_.cluster_begin.As<int32_t>(from + head);
      }
    }
    for (; to < (head + 1) * part_.clusters; ++to) {
      std::fill_n(part_.centroids.As<uint16_t>(to), dim_, uint16_t{0});
      std::fill_n(part_.value_means.As<uint16_t>(to), dim_, uint16_t{0});
      *part_.cluster_begin.As<int32_t>(to + head) = static_cast<int32_t>(part_.tokens);
    }
    *part_.cluster_begin.As<int32_t>(to + head) = static_cast<int32_t>(part_.tokens);
  }

  // As ResidualBalance says, from the segments' sums in order.
  void WriteBalance(int64_t head) {
    if (!computes_balance_) return;
    float* balance = part_.channels.As<float>(head) + dim_;
    for (int64_t i = 0; i < 2 * dim_; ++i) {
      double sum = 0;
      for (size_t s = 0; s < segments_.size(); ++s) {
        sum += squares_[(head * segments_.size() + s) * 2 * dim_ + i];
      }
      const double rms = std::sqrt(sum / static_cast<double>(part_.tokens));
      balance[i] = static_cast<float>(1.0 / std::sqrt(std::max(rms, 1e-9)));
    }
  }

  // Codes and records of the head's slots [begin, end).
  void EncodeSlots(int64_t head, int64_t begin, int64_t end) {
    const int64_t row_bytes = dim_ * ElementBytes(shape_.element_type);
    std::vector<std::byte> keys(kChunkSlots * row_bytes), values(keys.size());
    std::vector<float> key_residuals(kChunkSlots * dim_), value_residuals(key_residuals.size());
    int64_t cluster = ClusterOfSlot(head, begin);
    float centroid[kMaxHeadDim], mean[kMaxHeadDim];
    LoadCluster(head, cluster, centroid, mean);
    for (int64_t first = begin; first < end; first += kChunkSlots) {
      const int64_t count = std::min(kChunkSlots, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = head * part_.tokens + first + i;
        const int64_t token = *part_.positions.As<int32_t>(at) - part_.first_token;
        std::memcpy(&keys[i * row_bytes], HeadRow(shape_, input_.keys, token, head), row_bytes);
        std::memcpy(&values[i * row_bytes], HeadRow(shape_, input_.values, token, head), row_bytes);
        if (params_.codes.bits == 0) continue;
        while (ClusterBegin(head, cluster + 1) <= first + i) {
          LoadCluster(head, ++cluster, centroid, mean);
        }
        LoadResiduals(head, token, centroid, mean, &key_residuals[i * dim_],
                      &value_residuals[i * dim_]);
      }
      EncodeRecords(head * part_.tokens + first, count, keys.data(), values.data());
      if (params_.codes.bits == 0) continue;
      EncodeCodes(head, first, count, key_residuals.data(), value_residuals.data());
    }
  }

  void EncodeRecords(int64_t at, int64_t count, const std::byte* keys, const std::byte* values) {
    const int64_t row_bytes = dim_ * ElementBytes(shape_.element_type);
    ForEachRun(part_.records, at, at + count, [&](std::byte* run, int64_t first, int64_t n) {
      const int64_t offset = (first - at) * row_bytes;
      codec_.Encode(keys + offset, row_bytes, values + offset, row_bytes, shape_.element_type, dim_,
                    n, run);
    });
    if (part_.remainders.size == 0) return;
    ForEachRun(part_.remainders, at, at + count, [&](std::byte* run, int64_t first, int64_t n) {
      // Records lie in pages of their own, with other ends.
      ForEachRun(part_.records, first, first + n, [&](std::byte* records, int64_t i, int64_t some) {
        codec_.EncodeRemainders(values + (i - at) * row_bytes, row_bytes, shape_.element_type, dim_,
                                some, records, run + (i - first) * part_.remainders.element_bytes);
      });
    });
  }

  void EncodeCodes(int64_t head, int64_t first_slot, int64_t count, const float* key_residuals,
                   const float* value_residuals) {
    const float* channels = part_.channels.As<float>(head);
    const int64_t at = head * part_.tokens + first_slot;
    ForEachRun(part_.codes, at, at + count, [&](std::byte* run, int64_t first, int64_t n) {
      const int64_t offset = (first - at) * dim_;
      EncodeResiduals(params_.codes, dim_, n, key_residuals + offset, value_residuals + offset,
                      channels + dim_, channels + 2 * dim_, run);
    });
  }

  void LoadCluster(int64_t head, int64_t cluster, float* centroid, float* mean) const {
    const int64_t at = head * part_.clusters + cluster;
    HalvesToFloat(part_.centroids.As<uint16_t>(at), dim_, centroid);
    HalvesToFloat(part_.value_means.As<uint16_t>(at), dim_, mean);
  }

  void LoadResiduals(int64_t head, int64_t token, const float* centroid, const float* mean,
                     float* key_residual, float* value_residual) const {
    LoadKey(head, token, key_residual);
    LoadValue(head, token, value_residual);
    for (int64_t d = 0; d < dim_; ++d) {
      key_residual[d] -= centroid[d];
      value_residual[d] -= mean[d];
    }
  }

  int32_t ClusterBegin(int64_t head, int64_t cluster) const {
    return *part_.cluster_begin.As<int32_t>(head * (part_.clusters + 1) + cluster);
  }
  // The cluster that holds `slot`: the last that begins at or before it.
  int64_t ClusterOfSlot(int64_t head, int64_t slot) const {
    int64_t low = 0, high = part_.clusters;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (ClusterBegin(head, middle) <= slot ? low : high) = middle;
    }
    return low;
  }

  const KvShape& shape_;
  const IndexParams& params_;
  const RecordCodec& codec_;
  const IndexInput& input_;
  const MutableIndexPartView& part_;
  const ParallelFor parallel_for_;
  const int64_t dim_;
  const std::vector<Segment> segments_;
  const bool computes_balance_;
  std::vector<int64_t> cluster_counts_;  // [kv_heads, segments] that clustering made
  std::vector<double> squares_;          // [kv_heads, segments, 2, head_dim]: of K and V residuals
};

}  // namespace

absl::Status BuildIndexPart(const KvShape& shape, const IndexParams& params,
                            const RecordCodec& codec, const IndexInput& input,
                            const MutableIndexPartView& part, ParallelFor parallel_for) {
  CKV_RETURN_IF_ERROR(internal::ValidateBuild(shape, params, codec, input, part));
  Builder(shape, params, codec, input, part, parallel_for).Build();
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
