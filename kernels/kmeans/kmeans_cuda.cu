// K-means: four launches per iteration.
//
//   assign    rows stay in registers while the centroids stream through shared memory; the best and
//             second best score of each row are kept, no score is stored. On Hopper four warpgroups
//             of 64 rows and a warp that fetches for them run through all blocks of rows; elsewhere
//             a block has its rows
//   rescore   rows whose two best are too close to call in fp16: the clusters that come close are
//             found again, and scored in exact float
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
constexpr int kRescoreRows = 64;                                // scored at a time
constexpr int kRescoreChunk = 1024;                             // that a block looks through
constexpr int kRescoreRoom = 2 * kRescoreRows * kTileClusters;  // candidates
constexpr int kPrepareRows = 4;                                 // of a warp
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

// Tiles that rescoring has in shared memory.
constexpr __host__ __device__ int RescoreStages(int dim) { return dim <= 128 ? 4 : 2; }

// The workspace, offsets in bytes; per problem where it says [P].
struct Plan {
  KMeansCudaParams params;
  int padded_dim;       // 64, 128, 256 or 512
  int padded_clusters;  // whole tiles
  int padded_rows;      // whole items
  int64_t rows;         // [P, padded_rows, padded_dim] half, unit length, permuted
  int64_t margins;      // [P, padded_rows] float: scores this close are scored again
  int64_t limits;       // [P, padded_rows] float, of close rows: what such scores reach
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

// The best two scores of a row so far, and whose the best is.
struct BestTwo {
  float best;
  float second;
  int cluster;

  // Not by initializers in the class: of an array of arrays, nvcc 13.0 then sets the first alone.
  __device__ __forceinline__ void Clear() {
    best = second = kNegativeInfinity;
    cluster = 0;
  }

  // `at`: where the best is, so far.
  __device__ __forceinline__ void Add(float score, int c, int* at) {
    second = fmaxf(second, fminf(best, score));
    *at = score > best ? c : *at;
    best = fmaxf(best, score);
  }
  // Of another lane; the lower cluster wins a tie.
  __device__ __forceinline__ void Merge(int offset) {
    const float other = __shfl_xor_sync(kFullMask, best, offset);
    const float other_second = __shfl_xor_sync(kFullMask, second, offset);
    const int other_cluster = __shfl_xor_sync(kFullMask, cluster, offset);
    second = fmaxf(fmaxf(second, other_second), fminf(best, other));
    if (other > best || (other == best && other_cluster < cluster)) cluster = other_cluster;
    best = fmaxf(best, other);
  }
};

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

// Folds 16 rows' scores of a tile, sum[n] as MmaHalf has them, into the best of rows r and r + 8.
__device__ __forceinline__ void FoldTile(const float (&sum)[kTileClusters / 8][4], int first,
                                         int clusters, BestTwo (&best)[2]) {
  const int t = threadIdx.x % 4;
  if (first + kTileClusters <= clusters) {
    // Places within the tile are constants: the cluster is worked out once.
    int at[2] = {-1, -1};
#pragma unroll
    for (int n = 0; n < kTileClusters / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          best[half].Add(sum[n][i + 2 * half], n * 8 + i, &at[half]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (at[half] >= 0) best[half].cluster = first + 2 * t + at[half];
    }
    return;
  }
  // What is beyond the last cluster changes nothing.
#pragma unroll
  for (int n = 0; n < kTileClusters / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int cluster = first + n * 8 + t * 2 + i;
      const bool there = cluster < clusters;
      best[0].Add(there ? sum[n][i] : kNegativeInfinity, cluster, &best[0].cluster);
      best[1].Add(there ? sum[n][i + 2] : kNegativeInfinity, cluster, &best[1].cluster);
    }
  }
}

// Merges the four lanes that have a row and writes its label: as ~label with its limit where the
// second best is too close to the best.
__device__ __forceinline__ void WriteLabel(const Plan& plan, int index, int row, int row_count,
                                           float margin, BestTwo& best, int32_t* labels,
                                           unsigned char* workspace) {
  best.Merge(1);
  best.Merge(2);
  if (threadIdx.x % 4 != 0 || row >= row_count) return;
  const bool close = best.best - best.second < margin;
  labels[row] = close ? ~best.cluster : best.cluster;
  if (close) {
    *plan.At<float>(workspace, plan.limits, static_cast<int64_t>(index) * plan.padded_rows + row) =
        best.best - margin;
  }
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
  BestTwo best[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) best[m][half].Clear();
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
    for (int m = 0; m < kRowTiles; ++m) {
      FoldTile(sum[m], tile * kTileClusters, clusters, best[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + r;
      const float margin =
          *plan.At<float>(workspace, plan.margins, rows_at + min(row, row_count - 1));
      WriteLabel(plan, index, row, row_count, margin, best[m][half], problem.labels, workspace);
    }
  }
}

// Shared memory of AssignHopperKernel.
template <int kDim>
struct HopperShared {
  uint16_t centroids[kHopperStages][kTileClusters * kDim];
  uint16_t rows[kGroups][kGroupRows * kDim];
  PhaseBarrier centroids_full[kHopperStages], centroids_empty[kHopperStages];
  PhaseBarrier rows_full[kGroups], rows_empty[kGroups];
};

#if CKV_HOPPER
// What a block works on next: kItemRows rows of a problem.
struct Item {
  int problem;
  int first_row;
  int row_count;  // of the problem; 0 where the item is empty
  int clusters;
  int32_t* labels;

  __device__ __forceinline__ void Load(const Plan& plan, const KMeansCudaProblem* problems,
                                       int item, int items) {
    const int per_problem = plan.padded_rows / kItemRows;
    const int i = min(item, items - 1);
    problem = i / per_problem;
    first_row = i % per_problem * kItemRows;
    row_count = problems[problem].row_count;
    clusters = problems[problem].cluster_count;
    labels = problems[problem].labels;
  }
  __device__ __forceinline__ bool Empty() const { return first_row >= row_count; }
};

// Fetches rows and centroids for the other warps, item after item. One thread.
template <int kDim>
__device__ void FetchItems(const Plan& plan, const KMeansCudaProblem* problems, int items,
                           HopperShared<kDim>& shared, unsigned char* workspace) {
  constexpr int kTileBytes = kTileClusters * kDim * 2, kRowsBytes = kGroupRows * kDim * 2;
  int stage = 0, parity = 1, rows_parity = 1;  // at first all are empty
  for (int i = static_cast<int>(blockIdx.x); i < items; i += static_cast<int>(gridDim.x)) {
    Item item;
    item.Load(plan, problems, i, items);
    if (item.Empty()) continue;
    const uint16_t* rows = plan.At<uint16_t>(
        workspace, plan.rows,
        (static_cast<int64_t>(item.problem) * plan.padded_rows + item.first_row) * kDim);
    for (int g = 0; g < kGroups; ++g) {
      shared.rows_empty[g].Wait(rows_parity);
      shared.rows_full[g].ArriveAndExpect(kRowsBytes);
      CopyBulk(shared.rows[g], rows + g * kGroupRows * kDim, kRowsBytes, &shared.rows_full[g]);
    }
    rows_parity ^= 1;
    const uint16_t* centroids = plan.Centroid(workspace, item.problem, 0);
    for (int first = 0; first < item.clusters; first += kTileClusters) {
      shared.centroids_empty[stage].Wait(parity);
      shared.centroids_full[stage].ArriveAndExpect(kTileBytes);
      CopyBulk(shared.centroids[stage], centroids + static_cast<int64_t>(first) * kDim, kTileBytes,
               &shared.centroids_full[stage]);
      if (++stage == kHopperStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// A warpgroup's 64 rows of every item. The products of one group run while others fold theirs.
template <int kDim>
__device__ void ScoreItems(const Plan& plan, const KMeansCudaProblem* problems, int items,
                           HopperShared<kDim>& shared, unsigned char* workspace) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = warp / 4;
  const int row_in_group = warp % 4 * 16 + lane / 4;
  int stage = 0, parity = 0, rows_parity = 0;
  Item item, next;
  next.Load(plan, problems, static_cast<int>(blockIdx.x), items);
  for (int i = static_cast<int>(blockIdx.x); i < items; i += static_cast<int>(gridDim.x)) {
    item = next;
    next.Load(plan, problems, i + static_cast<int>(gridDim.x), items);
    if (item.Empty()) continue;
    const int row = item.first_row + group * kGroupRows + row_in_group;
    const float* margins = plan.At<float>(workspace, plan.margins,
                                          static_cast<int64_t>(item.problem) * plan.padded_rows);
    const float margin[2] = {margins[row], margins[row + 8]};
    uint32_t rows[kDim / 16][4];
    shared.rows_full[group].Wait(rows_parity);
    const uint16_t* from[2] = {shared.rows[group] + row_in_group * kDim,
                               shared.rows[group] + (row_in_group + 8) * kDim};
    LoadRows<kDim>(from, rows);
    __syncwarp();
    if (lane == 0) shared.rows_empty[group].Arrive();
    rows_parity ^= 1;
    BestTwo best[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) best[half].Clear();
    for (int first = 0; first < item.clusters; first += kTileClusters) {
      float sum[kTileClusters / 2];
      shared.centroids_full[stage].Wait(parity);
      WarpgroupFence();
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        WarpgroupMmaHalf(
            sum, rows[k],
            MakeMatrixB<kTileClusters * 16>(shared.centroids[stage] + 2 * k * Plan::kChannelStep),
            k > 0);
      }
      WarpgroupCommit();
      WarpgroupWait(sum);
      if (lane == 0) shared.centroids_empty[stage].Arrive();
      if (++stage == kHopperStages) {
        stage = 0;
        parity ^= 1;
      }
      float tile[kTileClusters / 8][4];
#pragma unroll
      for (int n = 0; n < kTileClusters / 2; ++n) tile[n / 4][n % 4] = sum[n];
      FoldTile(tile, first, item.clusters, best);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      WriteLabel(plan, item.problem, row + 8 * half, item.row_count, margin[half], best[half],
                 item.labels, workspace);
    }
  }
}
#endif  // CKV_HOPPER

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
    ScoreItems<kDim>(plan, problems, items, shared, workspace);
  } else if (threadIdx.x == kGroups * 128) {
    FetchItems<kDim>(plan, problems, items, shared, workspace);
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

struct RescoreShared {
  alignas(16) unsigned char problem[kProblemBytes];
  unsigned long long best[kRescoreRows];  // NOLINT(runtime/int): what atomicMax takes
  uint32_t candidates[kRescoreRoom];      // row of the batch, cluster
  int close[kRescoreChunk];
  int close_count, candidate_count;
};

// Scores the candidates exactly and empties their list. All threads.
__device__ void ScoreCandidates(const Plan& plan, const KMeansCudaProblem& problem, int index,
                                const int* rows, RescoreShared& shared, unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  __syncthreads();
  for (int i = threadIdx.x; i < shared.candidate_count; i += kRescoreThreads) {
    const int row = static_cast<int>(shared.candidates[i] >> 16);
    const int cluster = static_cast<int>(shared.candidates[i] & 0xffffu);
    const float* unit = plan.At<float>(
        workspace, plan.unit, (static_cast<int64_t>(index) * p.max_clusters + cluster) * p.dim);
    const float score = ExactScore(problem, p, rows[row], unit);
    atomicMax(&shared.best[row], ScoreKey(score, cluster));
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.candidate_count = 0;
  __syncthreads();
}

// Scores up to kRescoreRows close rows again, in fp16; who comes close enough, in exact float.
template <int kDim>
__device__ void RescoreRows(const Plan& plan, const KMeansCudaProblem& problem, int index,
                            const int* close, int count, RescoreShared& shared, uint16_t* stages,
                            unsigned char* workspace) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  const int64_t rows_at = static_cast<int64_t>(index) * plan.padded_rows;
  const uint16_t* centroids = plan.Centroid(workspace, index, 0);
  const int clusters = problem.cluster_count;
  for (int i = threadIdx.x; i < kRescoreRows; i += kRescoreThreads) shared.best[i] = 0;
  uint32_t rows[1][kDim / 16][4];
  const uint16_t* from[2];
  float limit[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = warp * 16 + half * 8 + r, row = close[min(i, count - 1)];
    from[half] = plan.At<uint16_t>(workspace, plan.rows, (rows_at + row) * kDim);
    limit[half] =
        i < count ? *plan.At<float>(workspace, plan.limits, rows_at + row) : -kNegativeInfinity;
  }
  LoadRows<kDim>(from, rows[0]);
  constexpr int kDepth = RescoreStages(kDim), kTile = kTileClusters * kDim;
  const int tiles = (clusters + kTileClusters - 1) / kTileClusters;
  for (int tile = 0; tile < kDepth - 1; ++tile) {
    if (tile < tiles) {
      StageCentroids<kDim, kRescoreThreads>(centroids, tile * kTileClusters, stages + tile * kTile);
    }
    CopyAsyncCommit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    const int first = tile * kTileClusters, ahead = tile + kDepth - 1;
    if (ahead < tiles) {
      StageCentroids<kDim, kRescoreThreads>(centroids, ahead * kTileClusters,
                                            stages + ahead % kDepth * kTile);
    }
    CopyAsyncCommit();
    CopyAsyncWait<kDepth - 1>();
    __syncthreads();
    float sum[1][kTileClusters / 8][4];
    ScoreTile<kDim, 1>(rows, stages + tile % kDepth * kTile, sum);
    uint32_t hits = 0;  // few, or none
#pragma unroll
    for (int n = 0; n < kTileClusters / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) hits |= sum[0][n][i] >= limit[i / 2] ? 1u << (4 * n + i) : 0u;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int hit = __ffs(static_cast<int>(hits)) - 1, i = hit % 4;
      const int cluster = first + hit / 4 * 8 + t * 2 + i % 2;
      if (cluster >= clusters) continue;
      const uint32_t row = static_cast<uint32_t>(warp * 16 + i / 2 * 8 + r);
      const int at = atomicAdd(&shared.candidate_count, 1);
      shared.candidates[at] = row << 16 | static_cast<uint32_t>(cluster);
    }
    __syncthreads();
    if (shared.candidate_count > kRescoreRoom - kRescoreRows * kTileClusters) {
      ScoreCandidates(plan, problem, index, close, shared, workspace);
    }
  }
  ScoreCandidates(plan, problem, index, close, shared, workspace);
  for (int i = threadIdx.x; i < count; i += kRescoreThreads) {
    problem.labels[close[i]] =
        static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(shared.best[i]));
  }
  __syncthreads();
}

// A block looks through kRescoreChunk labels for those that assignment left open.
template <int kDim>
__global__ void __launch_bounds__(kRescoreThreads)
    RescoreKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                  unsigned char* workspace) {
  const int index = static_cast<int>(blockIdx.y);
  RescoreShared& shared = *reinterpret_cast<RescoreShared*>(SharedMemory());
  const KMeansCudaProblem& problem = ShareProblem(problems + index, shared.problem);
  const int begin = static_cast<int>(blockIdx.x) * kRescoreChunk;
  const int end = min(problem.row_count, begin + kRescoreChunk);
  uint16_t* stages =
      reinterpret_cast<uint16_t*>(SharedMemory() + (sizeof(RescoreShared) + 127) / 128 * 128);
  if (threadIdx.x == 0) shared.close_count = shared.candidate_count = 0;
  __syncthreads();
  static_assert(kRescoreChunk == kLabelBatch * kRescoreThreads);
  const int own = begin + static_cast<int>(threadIdx.x);
  int32_t labels[kLabelBatch];
  LoadLabels(problem.labels, own, kRescoreThreads, end, labels);
#pragma unroll
  for (int j = 0; j < kLabelBatch; ++j) {
    if (labels[j] < 0) {
      shared.close[atomicAdd(&shared.close_count, 1)] = own + j * kRescoreThreads;
    }
  }
  __syncthreads();
  const int close = shared.close_count;
  for (int first = 0; first < close; first += kRescoreRows) {
    RescoreRows<kDim>(plan, problem, index, shared.close + first, min(kRescoreRows, close - first),
                      shared, stages, workspace);
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
  plan.limits = take(problems * plan.padded_rows * 4);
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
  const ProblemsKernel rescore = dim == 64    ? RescoreKernel<64>
                                 : dim == 128 ? RescoreKernel<128>
                                 : dim == 256 ? RescoreKernel<256>
                                              : RescoreKernel<512>;
  return cuda::Launch(rescore, Grid(p.max_rows, kRescoreChunk, count), dim3(kRescoreThreads),
                      (sizeof(RescoreShared) + 127) / 128 * 128 + RescoreStages(dim) * tile_bytes,
                      1, stream, plan, problems, workspace);
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
