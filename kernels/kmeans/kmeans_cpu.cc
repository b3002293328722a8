// KMeans with Highway: a register-blocked product of rows and packed centroids whose results go
// straight into a running argmax, so that no matrix of scores is ever stored. README.md tells the
// blocking.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "hwy/aligned_allocator.h"
#include "kernels/base/status_macros.h"
#include "kernels/kmeans/kmeans.h"
#include "kernels/kmeans/kmeans_internal.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/kmeans/kmeans_cpu.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;
constexpr int64_t kLanes = HWY_LANES(float);

// A tile is kTileRows rows by up to kTileVectors vectors of centroids: 24 accumulators where there
// are 32 registers, 12 where there are 16.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;
constexpr int64_t kPanelWidth = kTileVectors * kLanes;

// Rows of one task. Their running maxima (two vectors a row) stay in the L2 cache.
constexpr int64_t kBlockRows = 256;

// Panel p holds centroids [p * kPanelWidth, ...) transposed and scaled to length 1, [dim][width],
// at packed + p * kPanelWidth * dim; width is whole vectors, the last panel's padding repeats its
// first centroid: the lowest index wins ties, so a copy never does.
void PackPanel(const float* HWY_RESTRICT centroids, int64_t dim, int64_t clusters, int64_t panel,
               float* HWY_RESTRICT packed) {
  const int64_t first = panel * kPanelWidth;
  const int64_t valid = std::min(kPanelWidth, clusters - first);
  const int64_t width = (valid + kLanes - 1) / kLanes * kLanes;
  float* out = packed + first * dim;
  for (int64_t i = 0; i < width; ++i) {
    const float* centroid = centroids + (first + (i < valid ? i : 0)) * dim;
    double squares = 0;
    for (int64_t d = 0; d < dim; ++d) squares += static_cast<double>(centroid[d]) * centroid[d];
    const double inverse = squares > 0 ? 1.0 / std::sqrt(squares) : 0.0;
    for (int64_t d = 0; d < dim; ++d) {
      out[d * width + i] = static_cast<float>(centroid[d] * inverse);
    }
  }
}

// Scores kTileRows rows against one panel and folds them into the rows' running maxima. Every score
// is one chain of multiply-adds over ascending channels, whatever the tile.
template <int kVectors>
HWY_INLINE void ScoreTile(const float* const* rows, const float* HWY_RESTRICT panel, int64_t dim,
                          int32_t first_cluster, float* HWY_RESTRICT best,
                          int32_t* HWY_RESTRICT best_cluster) {
  const DF df;
  const DI di;
  VF sums[kTileRows][kVectors];
  const float* row[kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::Zero(df);
  }
  for (int64_t d = 0; d < dim; ++d) {
    VF centroids[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) centroids[v] = hn::Load(df, panel + v * kLanes);
    panel += kVectors * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const VF x = hn::Set(df, row[r][d]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(x, centroids[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    VF top = hn::Load(df, best + r * kLanes);
    VI top_cluster = hn::Load(di, best_cluster + r * kLanes);
    VI cluster = hn::Iota(di, first_cluster);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const auto better = hn::Gt(sums[r][v], top);
      top = hn::IfThenElse(better, sums[r][v], top);
      top_cluster = hn::IfThenElse(hn::RebindMask(di, better), cluster, top_cluster);
      cluster = hn::Add(cluster, hn::Set(di, static_cast<int32_t>(kLanes)));
    }
    hn::Store(top, df, best + r * kLanes);
    hn::Store(top_cluster, di, best_cluster + r * kLanes);
  }
}

// The cluster of the largest score over lanes, the lowest of equals.
int32_t BestOverLanes(const float* best, const int32_t* best_cluster) {
  float score = best[0];
  int32_t cluster = best_cluster[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    if (best[lane] > score || (best[lane] == score && best_cluster[lane] < cluster)) {
      score = best[lane];
      cluster = best_cluster[lane];
    }
  }
  return cluster;
}

// labels [rows] of up to kBlockRows rows of keys.
void AssignBlock(const float* HWY_RESTRICT keys, int64_t rows, int64_t dim, int64_t clusters,
                 const float* HWY_RESTRICT packed, int32_t* HWY_RESTRICT labels) {
  HWY_ALIGN float best[kBlockRows * kLanes];
  HWY_ALIGN int32_t best_cluster[kBlockRows * kLanes];
  std::fill_n(best, kBlockRows * kLanes, -std::numeric_limits<float>::infinity());
  std::fill_n(best_cluster, kBlockRows * kLanes, 0);
  for (int64_t first = 0; first < clusters; first += kPanelWidth) {
    const float* panel = packed + first * dim;
    const int64_t vectors = (std::min(kPanelWidth, clusters - first) + kLanes - 1) / kLanes;
    for (int64_t tile = 0; tile < rows; tile += kTileRows) {
      // Past the block's end the last row is scored again, into maxima that nobody reads.
      const float* row[kTileRows];
      for (int r = 0; r < kTileRows; ++r) row[r] = keys + std::min(tile + r, rows - 1) * dim;
      float* tile_best = best + tile * kLanes;
      int32_t* tile_cluster = best_cluster + tile * kLanes;
      const int32_t cluster = static_cast<int32_t>(first);
      if (vectors == 3) ScoreTile<3>(row, panel, dim, cluster, tile_best, tile_cluster);
      if (vectors == 2) ScoreTile<2>(row, panel, dim, cluster, tile_best, tile_cluster);
      if (vectors == 1) ScoreTile<1>(row, panel, dim, cluster, tile_best, tile_cluster);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    labels[row] = BestOverLanes(best + row * kLanes, best_cluster + row * kLanes);
  }
}

// mean [dim] of the rows `members` of keys, summed in their order in double. REQUIRES: count >= 1.
void MeanOfRows(const float* HWY_RESTRICT keys, int64_t dim, const int32_t* HWY_RESTRICT members,
                int64_t count, float* HWY_RESTRICT mean) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> half;
  const int64_t lanes = hn::Lanes(dd);
  int64_t d = 0;
  for (; d + 4 * lanes <= dim; d += 4 * lanes) {
    auto s0 = hn::Zero(dd), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t i = 0; i < count; ++i) {
      const float* row = keys + members[i] * dim + d;
      s0 = hn::Add(s0, hn::PromoteTo(dd, hn::LoadU(half, row)));
      s1 = hn::Add(s1, hn::PromoteTo(dd, hn::LoadU(half, row + lanes)));
      s2 = hn::Add(s2, hn::PromoteTo(dd, hn::LoadU(half, row + 2 * lanes)));
      s3 = hn::Add(s3, hn::PromoteTo(dd, hn::LoadU(half, row + 3 * lanes)));
    }
    const auto n = hn::Set(dd, static_cast<double>(count));
    hn::StoreU(hn::DemoteTo(half, hn::Div(s0, n)), half, mean + d);
    hn::StoreU(hn::DemoteTo(half, hn::Div(s1, n)), half, mean + d + lanes);
    hn::StoreU(hn::DemoteTo(half, hn::Div(s2, n)), half, mean + d + 2 * lanes);
    hn::StoreU(hn::DemoteTo(half, hn::Div(s3, n)), half, mean + d + 3 * lanes);
  }
  for (; d < dim; ++d) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += keys[members[i] * dim + d];
    mean[d] = static_cast<float>(sum / static_cast<double>(count));
  }
}

int64_t PanelWidth() { return kPanelWidth; }
int64_t BlockRows() { return kBlockRows; }

}  // namespace HWY_NAMESPACE
}  // namespace clusterkv::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterkv::kernels {
namespace {

HWY_EXPORT(PackPanel);
HWY_EXPORT(AssignBlock);
HWY_EXPORT(MeanOfRows);
HWY_EXPORT(PanelWidth);
HWY_EXPORT(BlockRows);

// Clusters whose means one task computes.
constexpr int64_t kMeanClusters = 64;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Room for every panel, the last one's padding included.
hwy::AlignedFreeUniquePtr<float[]> AllocatePacked(int64_t dim, int64_t clusters) {
  const int64_t width = HWY_DYNAMIC_DISPATCH(PanelWidth)();
  return hwy::AllocateAligned<float>(CeilDiv(clusters, width) * width * dim);
}

void Assign(int64_t rows, int64_t dim, int64_t clusters, const float* keys, const float* centroids,
            float* packed, int32_t* labels, ParallelFor parallel_for) {
  const int64_t panels = CeilDiv(clusters, HWY_DYNAMIC_DISPATCH(PanelWidth)());
  parallel_for(panels, [&](int64_t panel) {
    HWY_DYNAMIC_DISPATCH(PackPanel)(centroids, dim, clusters, panel, packed);
  });
  const int64_t block = HWY_DYNAMIC_DISPATCH(BlockRows)();
  parallel_for(CeilDiv(rows, block), [&](int64_t i) {
    const int64_t first = i * block;
    HWY_DYNAMIC_DISPATCH(AssignBlock)
    (keys + first * dim, std::min(block, rows - first), dim, clusters, packed, labels + first);
  });
}

}  // namespace

absl::Status AssignRows(int64_t rows, int64_t dim, int64_t clusters, absl::Span<const float> keys,
                        absl::Span<const float> centroids, absl::Span<int32_t> labels,
                        ParallelFor parallel_for) {
  CKV_RETURN_IF_ERROR(
      internal::ValidateAssign(rows, dim, clusters, keys.size(), centroids.size(), labels.size()));
  const auto packed = AllocatePacked(dim, clusters);
  Assign(rows, dim, clusters, keys.data(), centroids.data(), packed.get(), labels.data(),
         parallel_for);
  return absl::OkStatus();
}

absl::Status KMeans(const KMeansParams& params, absl::Span<const float> keys,
                    absl::Span<int32_t> labels, absl::Span<float> centroids,
                    absl::Span<int32_t> sizes, ParallelFor parallel_for) {
  CKV_RETURN_IF_ERROR(
      internal::ValidateKMeans(params, keys.size(), labels.size(), centroids.size(), sizes.size()));
  const int64_t dim = params.dim;
  const std::vector<int32_t> start = internal::InitialRows(params);
  for (int64_t c = 0; c < params.clusters; ++c) {
    std::copy_n(&keys[start[c] * dim], dim, &centroids[c * dim]);
  }
  const auto packed = AllocatePacked(dim, params.clusters);
  std::vector<int32_t> last_labels, begin, order;
  for (int i = 0; i < params.iterations; ++i) {
    Assign(params.rows, dim, params.clusters, keys.data(), centroids.data(), packed.get(),
           labels.data(), parallel_for);
    // The same labels give the same means, and so on for ever: the rest would change nothing.
    if (i > 0 && std::equal(labels.begin(), labels.end(), last_labels.begin())) break;
    last_labels.assign(labels.begin(), labels.end());
    internal::SortByLabel(labels, sizes, &begin, &order);
    parallel_for(CeilDiv(params.clusters, kMeanClusters), [&](int64_t task) {
      const int64_t end = std::min(params.clusters, (task + 1) * kMeanClusters);
      for (int64_t c = task * kMeanClusters; c < end; ++c) {
        if (sizes[c] == 0) continue;  // keeps its last centroid
        HWY_DYNAMIC_DISPATCH(MeanOfRows)
        (keys.data(), dim, order.data() + begin[c], sizes[c], &centroids[c * dim]);
      }
    });
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
#endif  // HWY_ONCE
