// K-means: four launches per iteration.
//
//   assign    rows stay in registers while the centroids stream through shared memory; of the
//             scores only maxima are kept that tell a row's best and what comes close to it. On
//             Hopper four warpgroups of 64 rows and a thread that fetches for them run through
//             a share of all blocks of rows; elsewhere a block has its rows
//   rescore   rows whose best are too close to call in fp16: those clusters, in exact float
//   sort      counting sort of the rows by label, stable
//   means     a warp per cluster sums its rows in order
//
// Rows are kept a second time as fp16 of unit length, channels permuted so that one 16-byte load
// per lane is two matrix operands; centroids in tiles of 64, as MatrixB has them (hopper.cuh).
#include <algorithm>
#include <type_traits>

#include "kernels/base/cuda_util.cuh"
#include "kernels/base/hopper.cuh"
#include "kernels/kmeans/kmeans_cuda.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kAssignThreads = 256;
constexpr int kAssignWarps = kAssignThreads / kWarp;
constexpr int kTileClusters = 64;  // of one stage in shared memory
constexpr int kStages = 3;
// On Hopper: warpgroups, rows of each, and stages.
constexpr int kGroups = 4;
constexpr int kGroupRows = 64;
constexpr int kItemRows = kGroups * kGroupRows;
constexpr int kHopperThreads = kGroups * 128 + kWarp;
constexpr int kHopperStages = 8;
constexpr int kRescoreThreads = 128;
constexpr int kRescoreLabels = 2;  // that a thread looks at
constexpr int kPrepareRows = 4;    // of a warp
constexpr int kSortThreads = 1024;
constexpr int kMeansThreads = 128;
constexpr int kMeansWarps = kMeansThreads / kWarp;
constexpr int kLineBytes = 128;  // of the second cache
// Of a multiprocessor: as many as have registers for the rows that are in flight.
constexpr __host__ __device__ int MeansBlocks(int vectors) {
  return vectors == 1 ? 9 : 12 / vectors;
}
constexpr int64_t kSortCountBytes = 180 * 1024;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// The workspace, offsets in bytes; per problem where it says [P].
struct Plan {
  KMeansCudaParams params;
  int padded_dim;       // 64, 128, 256 or 512
  int padded_clusters;  // whole tiles
  int padded_rows;      // whole items
  int64_t rows;         // [P, padded_rows, padded_dim] half, unit length, permuted
  int64_t margins;      // [P, padded_rows] float: scores this close are scored again
  int64_t close;        // [P, padded_rows, 4] CloseClusters, of open rows
  int64_t centroids;    // [P, padded_clusters / 64, padded_dim / 8, 64, 8] half, unit length
  int64_t unit;         // [P, max_clusters, dim] float, unit length
  int64_t bytes;

  template <typename T>
  __host__ __device__ T* At(unsigned char* workspace, int64_t offset, int64_t index) const {
    return reinterpret_cast<T*>(workspace + offset) + index;
  }
  // Where the halves of centroid c lie, and how far apart its runs of 8 channels are.
  __device__ __forceinline__ uint16_t* Centroid(unsigned char* workspace, int problem,
                                                int c) const {
    return At<uint16_t>(
        workspace, centroids,
        (static_cast<int64_t>(problem) * padded_clusters + c / kTileClusters * kTileClusters) *
                padded_dim +
            c % kTileClusters * 8);
  }
  static constexpr int kChannelStep = kTileClusters * 8;
};

// A problem in shared memory: all its fields for one trip to memory. 16-byte units.
constexpr int kProblemBytes = (sizeof(KMeansCudaProblem) + 15) / 16 * 16;
static_assert(sizeof(KMeansCudaProblem) % 8 == 0);
// Ends with a barrier. All threads.
__device__ __forceinline__ const KMeansCudaProblem& ShareProblem(const KMeansCudaProblem* problem,
                                                                 unsigned char* shared) {
  constexpr int kWords = sizeof(KMeansCudaProblem) / 8;
  for (int i = threadIdx.x; i < kWords; i += static_cast<int>(blockDim.x)) {
    reinterpret_cast<uint64_t*>(shared)[i] = reinterpret_cast<const uint64_t*>(problem)[i];
  }
  __syncthreads();
  return *reinterpret_cast<const KMeansCudaProblem*>(shared);
}

__device__ __forceinline__ const unsigned char* RowOf(const KMeansCudaProblem& problem, int row) {
  return problem.rows.At(problem.first_row + static_cast<uint32_t>(row)) + problem.row_offset;
}

// Channels [j, j + 4) of a row as they lie in memory: 8 bytes, or 16 of fp32.
template <bool kWide>
struct RawFour {
  std::conditional_t<kWide, float4, uint2> words;

  __device__ __forceinline__ void Load(const unsigned char* row, int j) {
    words = *reinterpret_cast<const decltype(words)*>(row + j * (kWide ? 4 : 2));
  }
  // Not weighted. `type`: of 16 bits, where not kWide.
  __device__ __forceinline__ float4 Get(ElementType type) const {
    if constexpr (kWide) {
      return words;
    } else {
      const uint16_t bits[4] = {
          static_cast<uint16_t>(words.x), static_cast<uint16_t>(words.x >> 16),
          static_cast<uint16_t>(words.y), static_cast<uint16_t>(words.y >> 16)};
      return type == ElementType::kFloat16
                 ? make_float4(HalfBitsToFloat(bits[0]), HalfBitsToFloat(bits[1]),
                               HalfBitsToFloat(bits[2]), HalfBitsToFloat(bits[3]))
                 : make_float4(BFloat16BitsToFloat(bits[0]), BFloat16BitsToFloat(bits[1]),
                               BFloat16BitsToFloat(bits[2]), BFloat16BitsToFloat(bits[3]));
    }
  }
};

// x · w, each product rounded: no multiply-add takes it in.
__device__ __forceinline__ float4 Weighted(float4 x, float4 w) {
  return make_float4(__fmul_rn(x.x, w.x), __fmul_rn(x.y, w.y), __fmul_rn(x.z, w.z),
                     __fmul_rn(x.w, w.w));
}

// Channels [j, j + 4) of a row, weighted: the very floats that KMeans is given on the CPU.
__device__ __forceinline__ float4 RowFour(const KMeansCudaProblem& problem,
                                          const unsigned char* row, ElementType type, int j) {
  float4 x;
  if (type == ElementType::kFloat32) {
    RawFour<true> raw;
    raw.Load(row, j);
    x = raw.Get(type);
  } else {
    RawFour<false> raw;
    raw.Load(row, j);
    x = raw.Get(type);
  }
  if (problem.weights == nullptr) return x;
  return Weighted(x, *reinterpret_cast<const float4*>(problem.weights + j));
}

// A lane's share of a row, or of zeros beyond it: channels [4 (lane + 32 v), …).
template <int kVectors>
struct RowShare {
  float4 x[kVectors];

  __device__ __forceinline__ void Load(const KMeansCudaProblem& problem, const unsigned char* row,
                                       const KMeansCudaParams& p) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int j = 4 * (lane + v * kWarp);
      x[v] = j < p.dim ? RowFour(problem, row, p.element_type, j) : make_float4(0, 0, 0, 0);
    }
  }
};

// Where channel j of a row lies in its permuted copy: lane t's 16 bytes of a span of 32 channels
// hold what operands of two products want of it.
__device__ __forceinline__ int PermutedChannel(int j) {
  const int k = j % 16;  // of the product's 16 channels
  return j / 32 * 32 + k % 8 / 2 * 8 + j % 32 / 16 * 4 + k / 8 * 2 + k % 2;
}

// ---- rows and centroids as fp16 of unit length
// ---------------------------------------------------------

// Writes the fp16 copies and margins of kPrepareRows rows per warp.
template <int kVectors>
__global__ void __launch_bounds__(256)
    PrepareRowsKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                      unsigned char* workspace) {
  static_assert(kPrepareRows == 4);  // what WarpJoin4 joins
  const KMeansCudaParams& p = plan.params;
  const int index = static_cast<int>(blockIdx.y), lane = threadIdx.x % kWarp;
  const KMeansCudaProblem& problem = ShareProblem(problems + index, SharedMemory());
  const int first = (static_cast<int>(blockIdx.x) * 8 + threadIdx.x / kWarp) * kPrepareRows;
  const int count = min(kPrepareRows, problem.row_count - first);
  RowShare<kVectors> shares[kPrepareRows];
  float squares[kPrepareRows] = {}, fourths[kPrepareRows] = {};
#pragma unroll
  for (int k = 0; k < kPrepareRows; ++k) {
    shares[k].Load(problem, RowOf(problem, min(first + k, problem.row_count - 1)), p);
  }
#pragma unroll
  for (int k = 0; k < kPrepareRows; ++k) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float4& x = shares[k].x[v];
      squares[k] += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
  }
  // Lane l works for row l / 8.
  const float total = WarpJoin4<true>(make_float4(squares[0], squares[1], squares[2], squares[3]));
  const float4 spread = Spread4(total > 0 ? 1.0f / sqrtf(total) : 0.0f, 8);
  const float inverses[kPrepareRows] = {spread.x, spread.y, spread.z, spread.w};
  const int64_t at = static_cast<int64_t>(index) * plan.padded_rows + first;
#pragma unroll
  for (int k = 0; k < kPrepareRows; ++k) {
    uint16_t* to = plan.At<uint16_t>(workspace, plan.rows, (at + k) * plan.padded_dim);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int j = 4 * (lane + v * kWarp);
      const float4& share = shares[k].x[v];
      const float x[4] = {share.x * inverses[k], share.y * inverses[k], share.z * inverses[k],
                          share.w * inverses[k]};
      if (j < plan.padded_dim && k < count) {
        *reinterpret_cast<uint32_t*>(to + PermutedChannel(j)) = PackHalves(x[0], x[1]);
        *reinterpret_cast<uint32_t*>(to + PermutedChannel(j + 2)) = PackHalves(x[2], x[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) fourths[k] += x[i] * x[i] * x[i] * x[i];
    }
  }
  const float fourth = WarpJoin4<true>(make_float4(fourths[0], fourths[1], fourths[2], fourths[3]));
  // The two factors of each product are off by .41 · 2^-11 of it (root mean square), so the
  // difference of two scores by .41 · 2 · 2^-11 · sqrt(sum of fourth powers) for a centroid like
  // the row; six of those.
  if (lane % 8 == 0 && lane / 8 < count) {
    *plan.At<float>(workspace, plan.margins, at + lane / 8) = 2.5e-3f * sqrtf(fourth) + 2e-6f;
  }
}

// Writes centroid c, a lane's share of it in `mean`, and its unit-length copies.
template <int kVectors>
__device__ void StoreCentroid(const Plan& plan, const KMeansCudaProblem& problem, int index, int c,
                              const float4 (&mean)[kVectors], unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  const int lane = threadIdx.x % kWarp;
  double squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float x[4] = {mean[v].x, mean[v].y, mean[v].z, mean[v].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += static_cast<double>(x[i]) * x[i];
  }
  squares = WarpSumDouble(squares);
  const double inverse = squares > 0 ? 1.0 / sqrt(squares) : 0.0;
  float* unit = plan.At<float>(workspace, plan.unit,
                               (static_cast<int64_t>(index) * p.max_clusters + c) * p.dim);
  float* raw = problem.centroids + static_cast<int64_t>(c) * p.dim;
  uint16_t* half = plan.Centroid(workspace, index, c);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int j = 4 * (lane + v * kWarp);
    const float4 x = make_float4(
        static_cast<float>(mean[v].x * inverse), static_cast<float>(mean[v].y * inverse),
        static_cast<float>(mean[v].z * inverse), static_cast<float>(mean[v].w * inverse));
    if (j < p.dim) {
      *reinterpret_cast<float4*>(raw + j) = mean[v];
      *reinterpret_cast<float4*>(unit + j) = x;
    }
    if (j < plan.padded_dim) {
      *reinterpret_cast<uint2*>(half + j / 8 * Plan::kChannelStep + j % 8) =
          make_uint2(PackHalves(x.x, x.y), PackHalves(x.z, x.w));
    }
  }
}

// A warp per centroid: from its initial row, or (`given`) from where the problem has it; zeros
// beyond the last.
template <int kVectors>
__global__ void __launch_bounds__(256)
    InitCentroidsKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                        bool given, unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = problems[index];
  const int lane = threadIdx.x % kWarp;
  const int c = static_cast<int>(blockIdx.x) * 8 + threadIdx.x / kWarp;
  if (c >= plan.padded_clusters) return;
  if (c >= problem.cluster_count) {
    uint16_t* half = plan.Centroid(workspace, index, c);
    for (int j = lane * 4; j < plan.padded_dim; j += kWarp * 4) {
      *reinterpret_cast<uint2*>(half + j / 8 * Plan::kChannelStep + j % 8) = make_uint2(0, 0);
    }
    return;
  }
  RowShare<kVectors> share;
  if (given) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int j = 4 * (lane + v * kWarp);
      share.x[v] = j < p.dim ? *reinterpret_cast<const float4*>(problem.centroids +
                                                                static_cast<int64_t>(c) * p.dim + j)
                             : make_float4(0, 0, 0, 0);
    }
  } else {
    int64_t row = 0;
    if (problem.initial_rows != nullptr) {
      row = problem.initial_rows[c];
    } else {
      row = static_cast<int64_t>(c) * (problem.row_count - 1) / max(1, problem.cluster_count - 1);
    }
    share.Load(problem, RowOf(problem, static_cast<int>(row)), p);
  }
  StoreCentroid<kVectors>(plan, problem, index, c, share.x, workspace);
}

// ---- assignment
// ----------------------------------------------------------------------------------------

// Of a row's scores in a tile, lane t of the row's four has kPlaces: at place 4 q + i, i < 4, of
// quad q cluster 16 q + i / 2 * 8 + 2 t + i % 2.
constexpr int kQuads = kTileClusters / 16;
__device__ __forceinline__ int ClusterAt(int tile, int quad, int place, int lane) {
  return tile * kTileClusters + quad * 16 + place / 2 * 8 + lane * 2 + place % 2;
}

// What a lane keeps of its scores of a row: the best of each quad and of each place in a quad, over
// tiles, and the second best of the tiles' best. No two clusters share tile, quad and place, so
// whatever comes close to the best score shows: as the best of another tile, quad or place. (Some
// two maxima per score are all that this takes; where the best is, is seen once per tile.)
struct RowMaxima {
  float quads[kQuads];
  float places[4];
  float second;
  int tile;  // of the best

  // Not by initializers in the class: of an array of arrays, nvcc 13.0 then sets the first alone.
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) quads[q] = kNegativeInfinity;
#pragma unroll
    for (int i = 0; i < 4; ++i) places[i] = kNegativeInfinity;
    second = kNegativeInfinity;
    tile = 0;
  }
  __device__ __forceinline__ float Best() const {
    return fmaxf(fmaxf(places[0], places[1]), fmaxf(places[2], places[3]));
  }

  // Scores of tile t as MmaHalf has them, of rows r (kHalf 0) or r + 8 (1).
  template <int kHalf>
  __device__ __forceinline__ void Add(const float (&sum)[kTileClusters / 8][4], int t) {
    const float best = Best();
    float of_places[4];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float x[4] = {sum[2 * q][2 * kHalf], sum[2 * q][2 * kHalf + 1],
                          sum[2 * q + 1][2 * kHalf], sum[2 * q + 1][2 * kHalf + 1]};
      quads[q] = fmaxf(quads[q], fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
#pragma unroll
      for (int i = 0; i < 4; ++i) of_places[i] = q == 0 ? x[i] : fmaxf(of_places[i], x[i]);
    }
    const float of_tile =
        fmaxf(fmaxf(of_places[0], of_places[1]), fmaxf(of_places[2], of_places[3]));
#pragma unroll
    for (int i = 0; i < 4; ++i) places[i] = fmaxf(places[i], of_places[i]);
    second = fmaxf(second, fminf(best, of_tile));
    tile = of_tile > best ? t : tile;
  }
};

// The clusters of a row whose scores a lane may have found close to the best: of these quads and
// these places, a bit each, of this tile, or of any. No quad: none.
struct CloseClusters {
  static constexpr uint32_t kAnyTile = 0xffff;
  static constexpr int kPlacesAt = 8, kTileAt = 16;
  static_assert(kQuads <= kPlacesAt);
  uint32_t word;

  __device__ __forceinline__ uint32_t Quads() const { return word & ((1u << kPlacesAt) - 1); }
  __device__ __forceinline__ uint32_t Places() const { return word >> kPlacesAt & 0xfu; }
  __device__ __forceinline__ uint32_t Tile() const { return word >> kTileAt; }
  __device__ __forceinline__ int Count(int tiles) const {
    return __popc(Quads()) * __popc(Places()) * (Tile() == kAnyTile ? tiles : 1);
  }
  // Cluster i < Count of the row's lane.
  __device__ __forceinline__ int At(int i, int lane) const {
    const int place_count = __popc(Places()), of_tile = __popc(Quads()) * place_count;
    const int place = Bit(Places(), i % place_count);
    const int quad = Bit(Quads(), i % of_tile / place_count);
    const int tile = Tile() == kAnyTile ? i / of_tile : static_cast<int>(Tile());
    return ClusterAt(tile, quad, place, lane);
  }

 private:
  // The place of bit `number` of those that are set.
  __device__ __forceinline__ static int Bit(uint32_t bits, int number) {
    for (; number > 0; --number) bits &= bits - 1;
    return __ffs(static_cast<int>(bits)) - 1;
  }
};

constexpr int32_t kOpenLabel = -1;  // of a row that will be scored again

// Stages one tile of centroids, as it lies.
template <int kDim, int kThreads>
__device__ __forceinline__ void StageCentroids(const uint16_t* centroids, int first,
                                               uint16_t* stage) {
  const uint16_t* from = centroids + static_cast<int64_t>(first) * kDim;
  for (int i = threadIdx.x; i < kTileClusters * kDim / 8; i += kThreads) {
    CopyAsync16(stage + i * 8, from + i * 8);
  }
}

// A warp's operands: rows row[0..1] of the permuted copy for this lane.
template <int kDim>
__device__ __forceinline__ void LoadRows(const uint16_t* const (&row)[2],
                                         uint32_t (&rows)[kDim / 16][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int k = 0; k < kDim / 32; ++k) {
      const uint4 x = *reinterpret_cast<const uint4*>(row[half] + k * 32 + t * 8);
      rows[2 * k][half] = x.x;
      rows[2 * k][half + 2] = x.y;
      rows[2 * k + 1][half] = x.z;
      rows[2 * k + 1][half + 2] = x.w;
    }
  }
}

// Scores of a warp's rows and the staged tile's clusters; sum[m][n] as MmaHalf has them.
template <int kDim, int kRowTiles>
__device__ __forceinline__ void ScoreTile(const uint32_t (&rows)[kRowTiles][kDim / 16][4],
                                          const uint16_t* stage,
                                          float (&sum)[kRowTiles][kTileClusters / 8][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTileClusters / 8; ++n) {
      sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0;
    }
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kTileClusters / 16; ++n) {
      // Matrices: clusters 16 n.. with the step's lower and upper channels, then clusters 16 n
      // + 8...
      const int row = n * 16 + lane / 16 * 8 + lane % 8, chunk = 2 * k + lane / 8 % 2;
      uint32_t centroid[4];
      LoadMatrices(centroid, stage + (chunk * kTileClusters + row) * 8);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        MmaHalf(sum[m][2 * n], rows[m][k], centroid[0], centroid[1]);
        MmaHalf(sum[m][2 * n + 1], rows[m][k], centroid[2], centroid[3]);
      }
    }
  }
}

// Folds 16 rows' scores of a tile, sum[n] as MmaHalf has them, into the maxima of rows r and r + 8.
__device__ __forceinline__ void FoldTile(float (&sum)[kTileClusters / 8][4], int tile, int clusters,
                                         RowMaxima (&maxima)[2]) {
  if ((tile + 1) * kTileClusters > clusters) {
    // What is beyond the last cluster changes nothing.
    const int after = clusters - tile * kTileClusters - threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTileClusters / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + i % 2 >= after) sum[n][i] = kNegativeInfinity;
      }
    }
  }
  maxima[0].Add<0>(sum, tile);
  maxima[1].Add<1>(sum, tile);
}

// Which of kCount scores reach the limit, a bit each.
template <int kCount>
__device__ __forceinline__ uint32_t Reaching(const float (&scores)[kCount], float limit) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits |= scores[i] >= limit ? 1u << i : 0u;
  return bits;
}

// Joins the four lanes that have a row and writes its label, or, where more than one score comes
// within `margin` of the best, kOpenLabel and what each lane found close.
__device__ __forceinline__ void WriteLabel(const Plan& plan, int index, int row, int row_count,
                                           float margin, const RowMaxima& maxima, int32_t* labels,
                                           unsigned char* workspace) {
  const int lane = threadIdx.x % 4;
  float limit = maxima.Best();
  limit = fmaxf(limit, __shfl_xor_sync(kFullMask, limit, 1));
  limit = fmaxf(limit, __shfl_xor_sync(kFullMask, limit, 2)) - margin;
  const uint32_t quads = Reaching(maxima.quads, limit), places = Reaching(maxima.places, limit);
  const uint32_t tile =
      maxima.second >= limit ? CloseClusters::kAnyTile : static_cast<uint32_t>(maxima.tile);
  const CloseClusters close = {quads | places << CloseClusters::kPlacesAt |
                               tile << CloseClusters::kTileAt};
  const int mine = close.Count(2);
  int all = mine + __shfl_xor_sync(kFullMask, mine, 1);
  all += __shfl_xor_sync(kFullMask, all, 2);
  if (row >= row_count) return;
  if (all == 1) {
    if (mine == 1) labels[row] = close.At(0, lane);
    return;
  }
  if (lane == 0) labels[row] = kOpenLabel;
  const int64_t at = (static_cast<int64_t>(index) * plan.padded_rows + row) * 4 + lane;
  *plan.At<CloseClusters>(workspace, plan.close, at) = close;
}

template <int kDim, int kRowTiles>
__global__ void __launch_bounds__(kAssignThreads, 1)
    AssignKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                 unsigned char* workspace) {
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = problems[index];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4;
  const int row_count = problem.row_count, clusters = problem.cluster_count;
  const int first_row = (static_cast<int>(blockIdx.x) * kAssignWarps + warp) * kRowTiles * 16;
  if (static_cast<int>(blockIdx.x) * kAssignWarps * kRowTiles * 16 >= row_count) return;
  uint16_t* stages = reinterpret_cast<uint16_t*>(SharedMemory());
  const uint16_t* centroids = plan.Centroid(workspace, index, 0);
  const int64_t rows_at = static_cast<int64_t>(index) * plan.padded_rows;

  const int tiles = (clusters + kTileClusters - 1) / kTileClusters;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < tiles) {
      StageCentroids<kDim, kAssignThreads>(centroids, s * kTileClusters,
                                           stages + s * kTileClusters * kDim);
    }
    CopyAsyncCommit();
  }
  uint32_t rows[kRowTiles][kDim / 16][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const uint16_t* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(first_row + m * 16 + half * 8 + r, row_count - 1);
      from[half] = plan.At<uint16_t>(workspace, plan.rows, (rows_at + row) * kDim);
    }
    LoadRows<kDim>(from, rows[m]);
  }
  RowMaxima maxima[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) maxima[m][half].Clear();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    CopyAsyncWait<kStages - 2>();
    __syncthreads();
    const int next = tile + kStages - 1;
    if (next < tiles) {
      StageCentroids<kDim, kAssignThreads>(centroids, next * kTileClusters,
                                           stages + next % kStages * kTileClusters * kDim);
    }
    CopyAsyncCommit();
    float sum[kRowTiles][kTileClusters / 8][4];
    ScoreTile<kDim, kRowTiles>(rows, stages + tile % kStages * kTileClusters * kDim, sum);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) FoldTile(sum[m], tile, clusters, maxima[m]);
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + r;
      const float margin =
          *plan.At<float>(workspace, plan.margins, rows_at + min(row, row_count - 1));
      WriteLabel(plan, index, row, row_count, margin, maxima[m][half], problem.labels, workspace);
    }
  }
}

// What a block of AssignHopperKernel works on next: kItemRows rows of a problem.
struct Item {
  int problem;
  int first_row;
  int row_count;  // of the problem
  int clusters;   // 0: there is nothing more to do
  int32_t* labels;
};

// Shared memory of AssignHopperKernel.
template <int kDim>
struct HopperShared {
  uint16_t centroids[kHopperStages][kTileClusters * kDim];
  uint16_t rows[kGroups][kGroupRows * kDim];
  float margins[kGroups][2][kGroupRows];  // of this item's rows and the next one's
  Item items[kGroups][2];                 // likewise
  PhaseBarrier centroids_full[kHopperStages], centroids_empty[kHopperStages];
  PhaseBarrier rows_full[kGroups], rows_empty[kGroups];
};

#if CKV_HOPPER
// Where an item's tiles pass: from stage 0 on, round and round; each stage with its own parity.
struct StageCursor {
  int stage;
  uint32_t parities;  // by stage, a bit each

  __device__ __forceinline__ int Parity() const { return static_cast<int>(parities >> stage & 1); }
  __device__ __forceinline__ void Advance() {
    parities ^= 1u << stage;
    stage = stage + 1 == kHopperStages ? 0 : stage + 1;
  }
};

// Fetches rows and centroids for the groups: of items first to end - 1, then an item without
// clusters. Centroids that all have a stage are fetched once for a problem's items. One thread.
template <int kDim>
__device__ void FetchItems(const Plan& plan, const KMeansCudaProblem* problems, int first, int end,
                           HopperShared<kDim>& shared, unsigned char* workspace) {
  constexpr int kTileBytes = kTileClusters * kDim * 2;
  constexpr int kRowsBytes = kGroupRows * kDim * 2, kMarginsBytes = kGroupRows * 4;
  const int per_problem = plan.padded_rows / kItemRows;
  StageCursor cursor = {0, (1u << kHopperStages) - 1};  // at first all are empty
  int turn = 0, staged = -1;
  for (int i = first; i <= end; ++i) {
    Item item = {i / per_problem, i % per_problem * kItemRows, 0, 0, nullptr};
    if (i < end) {
      const KMeansCudaProblem& problem = problems[item.problem];
      item.row_count = problem.row_count;
      item.clusters = problem.cluster_count;
      item.labels = problem.labels;
      if (item.first_row >= item.row_count) continue;
    }
    for (int g = 0; g < kGroups; ++g) {
      PhaseBarrier& full = shared.rows_full[g];
      shared.rows_empty[g].Wait(turn ^ 1);
      shared.items[g][turn] = item;
      if (item.clusters == 0) {
        full.Arrive();
        continue;
      }
      const int64_t row =
          static_cast<int64_t>(item.problem) * plan.padded_rows + item.first_row + g * kGroupRows;
      full.ArriveAndExpect(kRowsBytes + kMarginsBytes);
      CopyBulk(shared.rows[g], plan.At<uint16_t>(workspace, plan.rows, row * kDim), kRowsBytes,
               &full);
      CopyBulk(shared.margins[g][turn], plan.At<float>(workspace, plan.margins, row), kMarginsBytes,
               &full);
    }
    turn ^= 1;
    const uint16_t* centroids = plan.Centroid(workspace, item.problem, 0);
    const bool there = item.problem == staged;
    cursor.stage = 0;
    for (int at = 0; at < item.clusters; at += kTileClusters) {
      PhaseBarrier& full = shared.centroids_full[cursor.stage];
      shared.centroids_empty[cursor.stage].Wait(cursor.Parity());
      if (there) {
        full.Arrive();
      } else {
        full.ArriveAndExpect(kTileBytes);
        CopyBulk(shared.centroids[cursor.stage], centroids + static_cast<int64_t>(at) * kDim,
                 kTileBytes, &full);
      }
      cursor.Advance();
    }
    staged = item.clusters <= kHopperStages * kTileClusters ? item.problem : -1;
  }
}

// A warpgroup's 64 rows of every item. The products of one group run while others fold theirs.
template <int kDim>
__device__ void ScoreItems(const Plan& plan, HopperShared<kDim>& shared, unsigned char* workspace) {
  constexpr int kTileBytes = kTileClusters * kDim * 2;
  constexpr int kStepBytes = 2 * Plan::kChannelStep * 2;  // of 16 channels
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = warp / 4;
  const int row_in_group = warp % 4 * 16 + lane / 4;
  const MatrixB first_tile = MakeMatrixB<kTileClusters * 16>(shared.centroids[0]);
  StageCursor cursor = {0, 0};
  for (int turn = 0;; turn ^= 1) {
    shared.rows_full[group].Wait(turn);
    const Item& item = shared.items[group][turn];
    const int clusters = item.clusters, tiles = (clusters + kTileClusters - 1) / kTileClusters;
    if (tiles == 0) return;
    uint32_t rows[kDim / 16][4];
    const uint16_t* from[2] = {shared.rows[group] + row_in_group * kDim,
                               shared.rows[group] + (row_in_group + 8) * kDim};
    LoadRows<kDim>(from, rows);
    FenceBeforeCopies();  // of the next rows, and of margins where the last item's were
    __syncwarp();
    if (lane == 0) shared.rows_empty[group].Arrive();
    RowMaxima maxima[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) maxima[half].Clear();
    cursor.stage = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      float sum[kTileClusters / 2];
      const MatrixB b = MoveMatrixB(first_tile, cursor.stage * kTileBytes);
      shared.centroids_full[cursor.stage].Wait(cursor.Parity());
      WarpgroupFence();
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        WarpgroupMmaHalf(sum, rows[k], MoveMatrixB(b, k * kStepBytes), k > 0);
      }
      WarpgroupCommit();
      WarpgroupWait(sum);
      if (lane == 0) shared.centroids_empty[cursor.stage].Arrive();
      cursor.Advance();
      float by_columns[kTileClusters / 8][4];
#pragma unroll
      for (int n = 0; n < kTileClusters / 2; ++n) by_columns[n / 4][n % 4] = sum[n];
      FoldTile(by_columns, tile, clusters, maxima);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_in_group + 8 * half;
      WriteLabel(plan, item.problem, item.first_row + group * kGroupRows + row, item.row_count,
                 shared.margins[group][turn][row], maxima[half], item.labels, workspace);
    }
  }
}
#endif  // CKV_HOPPER

// A block has an equal share of the items, one after the other.
template <int kDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    AssignHopperKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                       int items, unsigned char* workspace) {
#if CKV_HOPPER
  HopperShared<kDim>& shared = *reinterpret_cast<HopperShared<kDim>*>(SharedMemory());
  if (threadIdx.x == 0) {
    for (int s = 0; s < kHopperStages; ++s) {
      shared.centroids_full[s].Init(1);
      shared.centroids_empty[s].Init(kGroups * 4);
    }
    for (int g = 0; g < kGroups; ++g) {
      shared.rows_full[g].Init(1);
      shared.rows_empty[g].Init(4);
    }
    FenceBarriers();
  }
  __syncthreads();
  if (threadIdx.x < kGroups * 128) {
    ScoreItems<kDim>(plan, shared, workspace);
  } else if (threadIdx.x == kGroups * 128) {
    const int64_t block = blockIdx.x, blocks = gridDim.x;
    FetchItems<kDim>(plan, problems, static_cast<int>(block * items / blocks),
                     static_cast<int>((block + 1) * items / blocks), shared, workspace);
  }
#endif
}

// Labels of rows first, first + step, … that lie before `end`; kNoLabel of others. Asked for
// together: loads in a loop with atomics wait for each other.
constexpr int kLabelBatch = 8;
constexpr int32_t kNoLabel = 0x7fffffff;
__device__ __forceinline__ void LoadLabels(const int32_t* labels, int first, int step, int end,
                                           int32_t (&out)[kLabelBatch]) {
#pragma unroll
  for (int j = 0; j < kLabelBatch; ++j) {
    const int row = first + j * step;
    out[j] = row < end ? labels[row] : kNoLabel;
  }
}

// ---- close rows
// --------------------------------------------------------------------------------------

// A score's bits in the order of scores, above the cluster's, in reverse: the lower wins a tie.
__device__ __forceinline__ unsigned long long ScoreKey(float score, int cluster) {  // NOLINT
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 |  // NOLINT(runtime/int)
         (0xffffffffu - static_cast<uint32_t>(cluster));
}

// row · centroid as KMeans has it: one chain of multiply-adds over ascending channels.
__device__ __forceinline__ float ExactScore(const KMeansCudaProblem& problem,
                                            const KMeansCudaParams& p, int row, const float* unit) {
  const unsigned char* from = RowOf(problem, row);
  float sum = 0;
#pragma unroll 16
  for (int j = 0; j < p.dim; j += 4) {
    const float4 x = RowFour(problem, from, p.element_type, j);
    const float4 c = *reinterpret_cast<const float4*>(unit + j);
    sum = fmaf(x.w, c.w, fmaf(x.z, c.z, fmaf(x.y, c.y, fmaf(x.x, c.x, sum))));
  }
  return sum;
}

// The label of an open row: of the clusters that came close, the best in exact float. A warp.
__device__ int32_t RescoreRow(const Plan& plan, const KMeansCudaProblem& problem, int index,
                              int row, unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  const int lane = threadIdx.x % kWarp, clusters = problem.cluster_count;
  const int tiles = (clusters + kTileClusters - 1) / kTileClusters;
  const uint4 words =
      *plan.At<uint4>(workspace, plan.close, static_cast<int64_t>(index) * plan.padded_rows + row);
  const CloseClusters close[4] = {{words.x}, {words.y}, {words.z}, {words.w}};
  int begin[5] = {};
#pragma unroll
  for (int t = 0; t < 4; ++t) begin[t + 1] = begin[t] + close[t].Count(tiles);
  unsigned long long best = ScoreKey(kNegativeInfinity, 0);  // NOLINT(runtime/int)
  for (int i = lane; i < begin[4]; i += kWarp) {
    int cluster = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (i >= begin[t] && i < begin[t + 1]) cluster = close[t].At(i - begin[t], t);
    }
    if (cluster >= clusters) continue;
    const float* unit = plan.At<float>(
        workspace, plan.unit, (static_cast<int64_t>(index) * p.max_clusters + cluster) * p.dim);
    best = max(best, ScoreKey(ExactScore(problem, p, row, unit), cluster));
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best = max(best, __shfl_xor_sync(kFullMask, best, offset));
  }
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(best));
}

// A block looks through kRescoreLabels labels per thread for those that assignment left open, of
// which its warps take one after the other.
__global__ void __launch_bounds__(kRescoreThreads)
    RescoreKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                  unsigned char* workspace) {
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = ShareProblem(problems + index, SharedMemory());
  int* open_count = reinterpret_cast<int*>(SharedMemory() + kProblemBytes);
  int* open = open_count + 1;
  if (threadIdx.x == 0) *open_count = 0;
  __syncthreads();
  const int first = static_cast<int>(blockIdx.x) * kRescoreLabels * kRescoreThreads;
#pragma unroll
  for (int j = 0; j < kRescoreLabels; ++j) {
    const int row = first + j * kRescoreThreads + static_cast<int>(threadIdx.x);
    if (row < problem.row_count && problem.labels[row] == kOpenLabel) {
      open[atomicAdd(open_count, 1)] = row;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x / kWarp; i < *open_count; i += kRescoreThreads / kWarp) {
    const int32_t label = RescoreRow(plan, problem, index, open[i], workspace);
    if (threadIdx.x % kWarp == 0) problem.labels[open[i]] = label;
  }
}

// ---- sort
// ----------------------------------------------------------------------------------------------

// Sum over the block of each thread's x, and in *before that of the threads before this one. `sums`
// [32] in shared memory.
__device__ int BlockSumBefore(int x, int* sums, int* before) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int inclusive = WarpInclusiveSum(x);
  __syncthreads();
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  int base = 0, total = 0;
  for (int w = 0; w < kSortThreads / kWarp; ++w) {
    const int sum = sums[w];
    base += w < warp ? sum : 0;
    total += sum;
  }
  *before = base + inclusive - x;
  return total;
}

// Lanes whose label has the same low `bits`. By ballots, which wait for less than
// __match_any_sync.
__device__ __forceinline__ unsigned LanesOfLabel(int32_t label, int bits) {
  unsigned same = kFullMask;
  for (int b = 0; b < bits; ++b) {
    const bool set = label >> b & 1;
    const unsigned lanes = __ballot_sync(kFullMask, set);
    same &= set ? lanes : ~lanes;
  }
  return same;
}

// Writes each lane's row at the next place of its label, in order of lanes. `bits`: enough for
// labels and one more, so that none of them has kNoLabel's. A warp.
__device__ __forceinline__ void PlaceRow(int row, int32_t label, int bits, int* places,
                                         int32_t* order) {
  const int lane = threadIdx.x % kWarp;
  const bool there = label != kNoLabel;
  const unsigned same = LanesOfLabel(label, bits);
  const int leader = __ffs(same) - 1;
  int at = 0;
  if (lane == leader && there) {
    at = places[label];
    places[label] = at + __popc(same);
  }
  at = __shfl_sync(kFullMask, at, leader);
  if (there) order[at + __popc(same & ((1u << lane) - 1))] = row;
  __syncwarp();
}

// A block per problem. Each of `workers` warps counts the labels of its run of rows; a scan turns
// counts into places; then each warp places its rows, in order.
__global__ void __launch_bounds__(kSortThreads, 1)
    SortKernel(const KMeansCudaProblem* problems, int workers) {
  const KMeansCudaProblem& problem = ShareProblem(problems + blockIdx.x, SharedMemory());
  const int clusters = problem.cluster_count, rows = problem.row_count;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* sums = reinterpret_cast<int*>(SharedMemory() + kProblemBytes);
  int* counts = sums + kWarp;  // [workers, clusters]
  for (int i = threadIdx.x; i < workers * clusters; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  const int share = (rows + workers - 1) / workers;
  const int begin = min(rows, warp * share),
            end = warp < workers ? min(rows, begin + share) : begin;
  int* mine = counts + warp * clusters;
  int32_t labels[kLabelBatch];
  for (int first = begin; first < end; first += kLabelBatch * kWarp) {
    LoadLabels(problem.labels, first + lane, kWarp, end, labels);
#pragma unroll
    for (int j = 0; j < kLabelBatch; ++j) {
      if (labels[j] != kNoLabel) atomicAdd(&mine[labels[j]], 1);
    }
  }
  __syncthreads();
  int base = 0;
  for (int first = 0; first < clusters; first += kSortThreads) {
    const int c = first + static_cast<int>(threadIdx.x);
    int size = 0;
#pragma unroll 8
    for (int w = 0; w < workers; ++w) size += c < clusters ? counts[w * clusters + c] : 0;
    int before;
    const int total = BlockSumBefore(size, sums, &before);
    if (c < clusters) {
      int at = base + before;
      problem.begin[c] = at;
      for (int w = 0; w < workers; ++w) {
        const int count = counts[w * clusters + c];
        counts[w * clusters + c] = at;
        at += count;
      }
    }
    base += total;
  }
  if (threadIdx.x == 0) problem.begin[clusters] = rows;
  __syncthreads();
  const int bits = kWarp - __clz(clusters);
  for (int first = begin; first < end; first += kLabelBatch * kWarp) {
    LoadLabels(problem.labels, first + lane, kWarp, end, labels);
#pragma unroll
    for (int j = 0; j < kLabelBatch; ++j) {
      PlaceRow(first + j * kWarp + lane, labels[j], bits, mine, problem.order);
    }
  }
}

// ---- means
// ---------------------------------------------------------------------------------------------

// static_cast<float>(sum / size), given 1 / size. The product is off by 2 units of a double at
// most, which can move the float only where the double lies that close to the middle of two floats,
// or where the float is subnormal.
__device__ __forceinline__ float Quotient(double sum, double size, double inverse) {
  const double product = sum * inverse;
#ifdef CLUSTERKV_CUDA_EMULATOR
  uint64_t bits;
  std::memcpy(&bits, &product, sizeof(bits));
  const uint32_t low = static_cast<uint32_t>(bits) & 0x1fffffffu;
#else
  const uint32_t low = static_cast<uint32_t>(__double2loint(product)) & 0x1fffffffu;
#endif
  const bool clear = low - 0x0ffffff0u > 0x20u && fabs(product) > 1.2e-38;
  return static_cast<float>(clear ? product : sum / size);
}

// A warp per cluster: its rows in ascending order, in double, kRows in flight.
template <int kVectors, bool kWide>
__global__ void __launch_bounds__(kMeansThreads, MeansBlocks(kVectors))
    MeansKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                unsigned char* workspace) {
  constexpr int kRows = (kWide ? 4 : 8) / kVectors;
  const KMeansCudaParams& p = plan.params;
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = ShareProblem(problems + index, SharedMemory());
  const int lane = threadIdx.x % kWarp;
  const int c = static_cast<int>(blockIdx.x) * kMeansWarps + threadIdx.x / kWarp;
  if (c >= problem.cluster_count) return;
  const int begin = problem.begin[c], end = problem.begin[c + 1];
  if (begin == end) return;  // keeps its last centroid
  const int row_bytes = p.dim * (kWide ? 4 : 2);
  // Lanes beyond the last channel read the last four, and come to nothing.
  int channel[kVectors];
  float4 weight[kVectors];
  double sum[kVectors][4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    channel[v] = min(4 * (lane + v * kWarp), p.dim - 4);
    weight[v] = problem.weights == nullptr
                    ? make_float4(1, 1, 1, 1)
                    : *reinterpret_cast<const float4*>(problem.weights + channel[v]);
  }
  for (int base = begin; base < end; base += kWarp) {
    const unsigned char* mine = RowOf(problem, problem.order[min(base + lane, end - 1)]);
    const int count = min(kWarp, end - base);
    for (int at = 0; at < row_bytes; at += kLineBytes) PrefetchL2(mine + at);
    for (int first = 0; first < count; first += kRows) {
      RawFour<kWide> rows[kRows][kVectors];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const unsigned char* from = ShuffleAddress(mine, first + k);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (first + k < count) rows[k][v].Load(from, channel[v]);
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (first + k >= count) break;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const float4 x = Weighted(rows[k][v].Get(p.element_type), weight[v]);
          sum[v][0] += static_cast<double>(x.x);
          sum[v][1] += static_cast<double>(x.y);
          sum[v][2] += static_cast<double>(x.z);
          sum[v][3] += static_cast<double>(x.w);
        }
      }
    }
  }
  float4 mean[kVectors];
  const double size = end - begin, inverse = 1.0 / size;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const bool inside = 4 * (lane + v * kWarp) < p.dim;
    mean[v] =
        inside ? make_float4(Quotient(sum[v][0], size, inverse), Quotient(sum[v][1], size, inverse),
                             Quotient(sum[v][2], size, inverse), Quotient(sum[v][3], size, inverse))
               : make_float4(0, 0, 0, 0);
  }
  StoreCentroid<kVectors>(plan, problem, index, c, mean, workspace);
}

// ---- host
// ----------------------------------------------------------------------------------------------

bool Valid(const KMeansCudaParams& p, int32_t problems) {
  return p.dim >= 16 && p.dim <= 512 && p.dim % 16 == 0 && p.iterations >= 1 && p.max_rows >= 1 &&
         p.max_clusters >= 1 && p.max_clusters <= kSortCountBytes / 4 && problems >= 0 &&
         problems <= 65535;
}

Plan MakePlan(const KMeansCudaParams& p, int64_t problems) {
  Plan plan = {};
  plan.params = p;
  plan.padded_dim = p.dim <= 64 ? 64 : p.dim <= 128 ? 128 : p.dim <= 256 ? 256 : 512;
  plan.padded_clusters = (p.max_clusters + kTileClusters - 1) / kTileClusters * kTileClusters;
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += (bytes + 255) / 256 * 256;
    return offset;
  };
  plan.padded_rows = (p.max_rows + kItemRows - 1) / kItemRows * kItemRows;
  plan.rows = take(problems * plan.padded_rows * plan.padded_dim * 2);
  plan.margins = take(problems * plan.padded_rows * 4);
  plan.close = take(problems * plan.padded_rows * 16);
  plan.centroids = take(problems * plan.padded_clusters * plan.padded_dim * 2);
  plan.unit = take(problems * p.max_clusters * p.dim * 4);
  plan.bytes = at;
  return plan;
}

dim3 Grid(int64_t items, int64_t per_block, int32_t problems) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block),
              static_cast<unsigned>(problems));
}

// Whether the current device has Hopper's own instructions, and its multiprocessors.
cudaError_t ReadDevice(bool* hopper, int* multiprocessors) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  *hopper = true;
  *multiprocessors = 3;  // few: a block has several items
  return cudaSuccess;
#else
  int device = 0, major = 0;
  CKV_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  CKV_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  *hopper = major == 9;
  return cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
#endif
}

using ProblemsKernel = void (*)(Plan, const KMeansCudaProblem*, unsigned char*);

template <int kDim>
cudaError_t AssignOnHopper(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                           int multiprocessors, unsigned char* workspace, cudaStream_t stream) {
  const int items = plan.padded_rows / kItemRows * count;
  return cuda::Launch(AssignHopperKernel<kDim>, dim3(std::min(items, multiprocessors)),
                      dim3(kHopperThreads), sizeof(HopperShared<kDim>), 1, stream, plan, problems,
                      items, workspace);
}

cudaError_t Assign(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                   unsigned char* workspace, cudaStream_t stream) {
  const KMeansCudaParams& p = plan.params;
  const int dim = plan.padded_dim;
  const size_t tile_bytes = static_cast<size_t>(kTileClusters) * dim * 2;
  bool hopper = false;
  int multiprocessors = 0;
  CKV_RETURN_IF_CUDA_ERROR(ReadDevice(&hopper, &multiprocessors));
  if (hopper && !p.plain && dim <= 128) {
    CKV_RETURN_IF_CUDA_ERROR(
        (dim == 64 ? AssignOnHopper<64> : AssignOnHopper<128>)(plan, problems, count,
                                                               multiprocessors, workspace, stream));
  } else {
    const ProblemsKernel kernel = dim == 64    ? AssignKernel<64, 2>
                                  : dim == 128 ? AssignKernel<128, 2>
                                  : dim == 256 ? AssignKernel<256, 1>
                                               : AssignKernel<512, 1>;
    const int rows_per_block = kAssignWarps * 16 * (dim <= 128 ? 2 : 1);
    CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(kernel, Grid(p.max_rows, rows_per_block, count),
                                          dim3(kAssignThreads), kStages * tile_bytes, 1, stream,
                                          plan, problems, workspace));
  }
  constexpr int kRescoreRows = kRescoreLabels * kRescoreThreads;
  return cuda::Launch(RescoreKernel, Grid(p.max_rows, kRescoreRows, count), dim3(kRescoreThreads),
                      kProblemBytes + (1 + kRescoreRows) * sizeof(int), 1, stream, plan, problems,
                      workspace);
}

template <int kVectors>
cudaError_t InitCentroids(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                          bool given, unsigned char* workspace, cudaStream_t stream) {
  return cuda::Launch(InitCentroidsKernel<kVectors>, Grid(plan.padded_clusters, 8, count),
                      dim3(256), 0, 1, stream, plan, problems, given, workspace);
}

// One instance per number of 4-channel vectors that a lane holds of a row.
template <int kVectors>
cudaError_t Run(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                unsigned char* workspace, cudaStream_t stream) {
  const KMeansCudaParams& p = plan.params;
  CKV_RETURN_IF_CUDA_ERROR(
      InitCentroids<kVectors>(plan, problems, count, false, workspace, stream));
  const int workers =
      static_cast<int>(std::clamp<int64_t>(kSortCountBytes / 4 / p.max_clusters, 1, 32));
  const size_t sort_bytes =
      kProblemBytes + (kWarp + static_cast<size_t>(workers) * p.max_clusters) * 4;
  const ProblemsKernel means = p.element_type == ElementType::kFloat32
                                   ? MeansKernel<kVectors, true>
                                   : MeansKernel<kVectors, false>;
  for (int i = 0; i < p.iterations; ++i) {
    CKV_RETURN_IF_CUDA_ERROR(Assign(plan, problems, count, workspace, stream));
    CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(SortKernel, dim3(count), dim3(kSortThreads), sort_bytes,
                                          1, stream, problems, workers));
    CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(means, Grid(p.max_clusters, kMeansWarps, count),
                                          dim3(kMeansThreads), kProblemBytes, 1, stream, plan,
                                          problems, workspace));
  }
  return cudaSuccess;
}

cudaError_t PrepareRows(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                        unsigned char* workspace, cudaStream_t stream) {
  const ProblemsKernel kernel = plan.padded_dim <= 128   ? PrepareRowsKernel<1>
                                : plan.padded_dim == 256 ? PrepareRowsKernel<2>
                                                         : PrepareRowsKernel<4>;
  return cuda::Launch(kernel, Grid(plan.params.max_rows, 8 * kPrepareRows, count), dim3(256),
                      kProblemBytes, 1, stream, plan, problems, workspace);
}

}  // namespace

int64_t KMeansCudaWorkspaceBytes(const KMeansCudaParams& params, int32_t problems) {
  return Valid(params, problems) ? MakePlan(params, problems).bytes : 0;
}

cudaError_t LaunchPrepareRows(const KMeansCudaParams& params, const KMeansCudaProblem* problems,
                              int32_t problem_count, void* workspace, cudaStream_t stream) {
  if (!Valid(params, problem_count)) return cudaErrorInvalidValue;
  if (problem_count == 0) return cudaSuccess;
  return PrepareRows(MakePlan(params, problem_count), problems, problem_count,
                     static_cast<unsigned char*>(workspace), stream);
}

cudaError_t LaunchAssignRows(const KMeansCudaParams& params, const KMeansCudaProblem* problems,
                             int32_t problem_count, void* workspace, cudaStream_t stream) {
  if (!Valid(params, problem_count)) return cudaErrorInvalidValue;
  if (problem_count == 0) return cudaSuccess;
  const Plan plan = MakePlan(params, problem_count);
  unsigned char* bytes = static_cast<unsigned char*>(workspace);
  const auto init = params.dim <= 128   ? InitCentroids<1>
                    : params.dim <= 256 ? InitCentroids<2>
                                        : InitCentroids<4>;
  CKV_RETURN_IF_CUDA_ERROR(init(plan, problems, problem_count, true, bytes, stream));
  return Assign(plan, problems, problem_count, bytes, stream);
}

cudaError_t LaunchKMeans(const KMeansCudaParams& params, const KMeansCudaProblem* problems,
                         int32_t problem_count, void* workspace, cudaStream_t stream) {
  if (!Valid(params, problem_count)) return cudaErrorInvalidValue;
  if (problem_count == 0) return cudaSuccess;
  const Plan plan = MakePlan(params, problem_count);
  unsigned char* bytes = static_cast<unsigned char*>(workspace);
  CKV_RETURN_IF_CUDA_ERROR(PrepareRows(plan, problems, problem_count, bytes, stream));
  const auto run = params.dim <= 128 ? Run<1> : params.dim <= 256 ? Run<2> : Run<4>;
  return run(plan, problems, problem_count, bytes, stream);
}

}  // namespace clusterkv::kernels
