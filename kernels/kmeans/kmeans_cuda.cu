// K-means: five launches per iteration.
//
//   assign    rows [256 × dim] stay in registers while the centroids stream through shared memory;
//   the
//             best and second best score of each row are kept, no score is stored
//   rescore   rows whose two best are too close to call in fp16, in exact float
//   sort      counting sort of the rows by label, stable
//   means     a warp per cluster sums its rows in order
//
// Rows are kept a second time as fp16 of unit length, channels permuted so that one 16-byte load
// per lane is two matrix operands.
#include <algorithm>

#include "kernels/base/cuda_util.cuh"
#include "kernels/kmeans/kmeans_cuda.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kAssignThreads = 256;
constexpr int kAssignWarps = kAssignThreads / kWarp;
constexpr int kTileClusters = 64;  // of one stage in shared memory
constexpr int kStages = 3;
constexpr int kRescoreThreads = 256;
constexpr int kRescoreRows = 32;
constexpr int kRescoreClusters = 64;
constexpr int kSortThreads = 1024;
constexpr int64_t kSortCountBytes = 180 * 1024;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// The workspace, offsets in bytes; per problem where it says [P].
struct Plan {
  KMeansCudaParams params;
  int padded_dim;       // 64, 128, 256 or 512
  int padded_clusters;  // whole tiles
  int64_t rows;         // [P, max_rows, padded_dim] half, unit length, permuted
  int64_t margins;      // [P, max_rows] float: scores this close are scored again
  int64_t centroids;    // [P, padded_clusters, padded_dim] half, unit length
  int64_t unit;         // [P, max_clusters, dim] float, unit length
  int64_t close;        // [P, max_rows] int: rows to score again
  int64_t close_count;  // [P] int
  int64_t bytes;

  template <typename T>
  __host__ __device__ T* At(unsigned char* workspace, int64_t offset, int64_t index) const {
    return reinterpret_cast<T*>(workspace + offset) + index;
  }
};

__device__ __forceinline__ const unsigned char* RowOf(const KMeansCudaProblem& problem, int row) {
  return problem.rows.At(problem.first_row + static_cast<uint32_t>(row)) + problem.row_offset;
}

// Channel j of the row, weighted: the very float that KMeans is given on the CPU.
__device__ __forceinline__ float RowElement(const KMeansCudaProblem& problem,
                                            const unsigned char* row, ElementType type, int j) {
  const float x = LoadAsFloat(row, type, j);
  return problem.weights == nullptr ? x : __fmul_rn(x, problem.weights[j]);
}

// Where channel j of a row lies in its permuted copy: lane t's 16 bytes of a span of 32 channels
// hold what operands of two products want of it.
__device__ __forceinline__ int PermutedChannel(int j) {
  const int k = j % 16;  // of the product's 16 channels
  return j / 32 * 32 + k % 8 / 2 * 8 + j % 32 / 16 * 4 + k / 8 * 2 + k % 2;
}

// ---- rows and centroids as fp16 of unit length
// ---------------------------------------------------------

__global__ void __launch_bounds__(256)
    PrepareRowsKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                      unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = problems[index];
  const int lane = threadIdx.x % kWarp;
  const int row = static_cast<int>(blockIdx.x) * 8 + threadIdx.x / kWarp;
  if (row >= problem.row_count) return;
  const unsigned char* from = RowOf(problem, row);
  float squares = 0;
  for (int j = lane; j < p.dim; j += kWarp) {
    const float x = RowElement(problem, from, p.element_type, j);
    squares += x * x;
  }
  squares = WarpSum(squares);
  const float inverse = squares > 0 ? 1.0f / sqrtf(squares) : 0.0f;
  uint16_t* to = plan.At<uint16_t>(
      workspace, plan.rows, (static_cast<int64_t>(index) * p.max_rows + row) * plan.padded_dim);
  float fourth = 0;
  for (int j = lane; j < plan.padded_dim; j += kWarp) {
    const float x = j < p.dim ? RowElement(problem, from, p.element_type, j) * inverse : 0.0f;
    to[PermutedChannel(j)] = FloatToHalfBits(x);
    fourth += x * x * x * x;
  }
  fourth = WarpSum(fourth);
  // The two factors of each product are off by .41 · 2^-11 of it (root mean square), so the
  // difference of two scores by .41 · 2 · 2^-11 · sqrt(sum of fourth powers) for a centroid like
  // the row; six of those.
  if (lane == 0) {
    *plan.At<float>(workspace, plan.margins, static_cast<int64_t>(index) * p.max_rows + row) =
        2.5e-3f * sqrtf(fourth) + 2e-6f;
  }
}

// Writes centroid c [dim] (in `mean`, 4 channels per lane and vector) and its unit-length copies.
template <int kVectors>
__device__ void StoreCentroid(const Plan& plan, const KMeansCudaProblem& problem, int index, int c,
                              const float (&mean)[kVectors][4], unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  const int lane = threadIdx.x % kWarp;
  double squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += static_cast<double>(mean[v][i]) * mean[v][i];
  }
  squares = WarpSumDouble(squares);
  const double inverse = squares > 0 ? 1.0 / sqrt(squares) : 0.0;
  float* unit = plan.At<float>(workspace, plan.unit,
                               (static_cast<int64_t>(index) * p.max_clusters + c) * p.dim);
  uint16_t* half =
      plan.At<uint16_t>(workspace, plan.centroids,
                        (static_cast<int64_t>(index) * plan.padded_clusters + c) * plan.padded_dim);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 4 * (lane + v * kWarp) + i;
      const float x = static_cast<float>(mean[v][i] * inverse);
      if (j < p.dim) {
        problem.centroids[static_cast<int64_t>(c) * p.dim + j] = mean[v][i];
        unit[j] = x;
      }
      if (j < plan.padded_dim) half[j] = FloatToHalfBits(j < p.dim ? x : 0.0f);
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
    uint16_t* half = plan.At<uint16_t>(
        workspace, plan.centroids,
        (static_cast<int64_t>(index) * plan.padded_clusters + c) * plan.padded_dim);
    for (int j = lane; j < plan.padded_dim; j += kWarp) half[j] = 0;
    return;
  }
  int64_t row = 0;
  if (problem.initial_rows != nullptr) {
    row = problem.initial_rows[c];
  } else {
    row = static_cast<int64_t>(c) * (problem.row_count - 1) / max(1, problem.cluster_count - 1);
  }
  const unsigned char* from = RowOf(problem, static_cast<int>(row));
  float mean[kVectors][4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 4 * (lane + v * kWarp) + i;
      mean[v][i] = j >= p.dim ? 0.0f
                   : given    ? problem.centroids[static_cast<int64_t>(c) * p.dim + j]
                              : RowElement(problem, from, p.element_type, j);
    }
  }
  StoreCentroid<kVectors>(plan, problem, index, c, mean, workspace);
}

// ---- assignment
// ----------------------------------------------------------------------------------------

// The best two scores of a row so far, and whose the best is.
struct BestTwo {
  float best = kNegativeInfinity;
  float second = kNegativeInfinity;
  int cluster = 0;

  __device__ __forceinline__ void Add(float score, int c) {
    second = fmaxf(second, fminf(best, score));
    cluster = score > best ? c : cluster;
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

// Stages one tile of centroids: rows of kDim halves, their 16-byte chunks swizzled by the row.
template <int kDim>
__device__ __forceinline__ void StageCentroids(const uint16_t* centroids, int first,
                                               uint16_t* stage) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < kTileClusters * kChunks; i += kAssignThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    CopyAsync16(stage + row * kDim + (chunk ^ (row % 8)) * 8,
                centroids + static_cast<int64_t>(first + row) * kDim + chunk * 8);
  }
}

// Scores a warp's rows against the staged tile and folds them into `best`.
template <int kDim, int kRowTiles>
__device__ __forceinline__ void ScoreTile(const uint32_t (&rows)[kRowTiles][kDim / 16][4],
                                          const uint16_t* stage, int first, int clusters,
                                          BestTwo (&best)[kRowTiles][2]) {
  const int lane = threadIdx.x % kWarp;
  float sum[kRowTiles][kTileClusters / 8][4];
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
      LoadMatrices(centroid, stage + row * kDim + (chunk ^ (row % 8)) * 8);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        MmaHalf(sum[m][2 * n], rows[m][k], centroid[0], centroid[1]);
        MmaHalf(sum[m][2 * n + 1], rows[m][k], centroid[2], centroid[3]);
      }
    }
  }
  const bool whole = first + kTileClusters <= clusters;
#pragma unroll
  for (int n = 0; n < kTileClusters / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int cluster = first + n * 8 + lane % 4 * 2 + i;
      if (!whole && cluster >= clusters) continue;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        best[m][0].Add(sum[m][n][i], cluster);
        best[m][1].Add(sum[m][n][i + 2], cluster);
      }
    }
  }
}

template <int kDim, int kRowTiles>
__global__ void __launch_bounds__(kAssignThreads, 1)
    AssignKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                 unsigned char* workspace) {
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = problems[index];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, r = lane / 4, t = lane % 4;
  const int row_count = problem.row_count, clusters = problem.cluster_count;
  const int first_row = (static_cast<int>(blockIdx.x) * kAssignWarps + warp) * kRowTiles * 16;
  if (static_cast<int>(blockIdx.x) * kAssignWarps * kRowTiles * 16 >= row_count) return;
  uint16_t* stages = reinterpret_cast<uint16_t*>(SharedMemory());
  const uint16_t* centroids = plan.At<uint16_t>(
      workspace, plan.centroids, static_cast<int64_t>(index) * plan.padded_clusters * kDim);
  const int64_t rows_at = static_cast<int64_t>(index) * plan.params.max_rows;

  const int tiles = (clusters + kTileClusters - 1) / kTileClusters;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < tiles) {
      StageCentroids<kDim>(centroids, s * kTileClusters, stages + s * kTileClusters * kDim);
    }
    CopyAsyncCommit();
  }
  uint32_t rows[kRowTiles][kDim / 16][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(first_row + m * 16 + half * 8 + r, row_count - 1);
      const uint16_t* from = plan.At<uint16_t>(workspace, plan.rows, (rows_at + row) * kDim);
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        const uint4 x = *reinterpret_cast<const uint4*>(from + k * 32 + t * 8);
        rows[m][2 * k][half] = x.x;
        rows[m][2 * k][half + 2] = x.y;
        rows[m][2 * k + 1][half] = x.z;
        rows[m][2 * k + 1][half + 2] = x.w;
      }
    }
  }
  BestTwo best[kRowTiles][2];
  for (int tile = 0; tile < tiles; ++tile) {
    CopyAsyncWait<kStages - 2>();
    __syncthreads();
    const int next = tile + kStages - 1;
    if (next < tiles) {
      StageCentroids<kDim>(centroids, next * kTileClusters,
                           stages + next % kStages * kTileClusters * kDim);
    }
    CopyAsyncCommit();
    ScoreTile<kDim, kRowTiles>(rows, stages + tile % kStages * kTileClusters * kDim,
                               tile * kTileClusters, clusters, best);
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      BestTwo& b = best[m][half];
      b.Merge(1);
      b.Merge(2);
      const int row = first_row + m * 16 + half * 8 + r;
      if (t != 0 || row >= row_count) continue;
      problem.labels[row] = b.cluster;
      if (b.best - b.second < *plan.At<float>(workspace, plan.margins, rows_at + row)) {
        const int at = atomicAdd(plan.At<int>(workspace, plan.close_count, index), 1);
        *plan.At<int>(workspace, plan.close, rows_at + at) = row;
      }
    }
  }
}

// Scores the close rows again: every score one chain of multiply-adds over ascending channels, as
// KMeans does it. A thread has one centroid of a tile and 8 rows.
__global__ void __launch_bounds__(kRescoreThreads)
    RescoreKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                  unsigned char* workspace) {
  constexpr int kRowsPerThread = kRescoreRows / (kRescoreThreads / kRescoreClusters);
  const KMeansCudaParams& p = plan.params;
  const int index = static_cast<int>(blockIdx.y), dim = p.dim, stride = p.dim + 4;
  const KMeansCudaProblem& problem = problems[index];
  const int close = *plan.At<int>(workspace, plan.close_count, index);
  const int* list = plan.At<int>(workspace, plan.close, static_cast<int64_t>(index) * p.max_rows);
  const float* unit =
      plan.At<float>(workspace, plan.unit, static_cast<int64_t>(index) * p.max_clusters * dim);
  float* rows = reinterpret_cast<float*>(SharedMemory());  // [kRescoreRows, stride]
  float* tile = rows + kRescoreRows * stride;              // [kRescoreClusters, stride]
  float* scores = tile + kRescoreClusters * stride;        // [kRescoreRows, 2]
  int* winners = reinterpret_cast<int*>(scores + kRescoreRows * 2);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = threadIdx.x % kRescoreClusters;
  const int first_row = threadIdx.x / kRescoreClusters * kRowsPerThread;
  for (int chunk = blockIdx.x * kRescoreRows; chunk < close; chunk += gridDim.x * kRescoreRows) {
    for (int i = warp; i < kRescoreRows; i += kRescoreThreads / kWarp) {
      const unsigned char* from = RowOf(problem, list[min(chunk + i, close - 1)]);
      for (int j = lane; j < dim; j += kWarp) {
        rows[i * stride + j] = RowElement(problem, from, p.element_type, j);
      }
    }
    float best[kRowsPerThread];
    int winner[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      best[i] = kNegativeInfinity;
      winner[i] = 0x7fffffff;
    }
    for (int first = 0; first < problem.cluster_count; first += kRescoreClusters) {
      __syncthreads();
      for (int i = threadIdx.x; i < kRescoreClusters * dim; i += kRescoreThreads) {
        const int c = first + i / dim;
        tile[i / dim * stride + i % dim] =
            c < problem.cluster_count ? unit[static_cast<int64_t>(c) * dim + i % dim] : 0.0f;
      }
      __syncthreads();
      float sum[kRowsPerThread] = {};
      for (int j = 0; j < dim; j += 4) {
        const float4 c = *reinterpret_cast<const float4*>(tile + column * stride + j);
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
          const float4 x = *reinterpret_cast<const float4*>(rows + (first_row + i) * stride + j);
          sum[i] = fmaf(x.w, c.w, fmaf(x.z, c.z, fmaf(x.y, c.y, fmaf(x.x, c.x, sum[i]))));
        }
      }
      if (first + column >= problem.cluster_count) continue;
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        if (sum[i] > best[i]) {
          best[i] = sum[i];
          winner[i] = first + column;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(kFullMask, best[i], offset);
        const int other_winner = __shfl_xor_sync(kFullMask, winner[i], offset);
        if (other > best[i] || (other == best[i] && other_winner < winner[i])) {
          best[i] = other;
          winner[i] = other_winner;
        }
      }
      if (lane == 0) {
        scores[(first_row + i) * 2 + warp % 2] = best[i];
        winners[(first_row + i) * 2 + warp % 2] = winner[i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRescoreRows && chunk + i < close; i += kRescoreThreads) {
      const bool second =
          scores[2 * i + 1] > scores[2 * i] ||
          (scores[2 * i + 1] == scores[2 * i] && winners[2 * i + 1] < winners[2 * i]);
      problem.labels[list[chunk + i]] = winners[2 * i + second];
    }
    __syncthreads();
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

// A block per problem. Each of `workers` warps counts the labels of its run of rows; a scan turns
// counts into places; then each warp places its rows, in order.
__global__ void __launch_bounds__(kSortThreads)
    SortKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems, int workers,
               unsigned char* workspace) {
  const KMeansCudaProblem& problem = problems[blockIdx.x];
  const int clusters = problem.cluster_count, rows = problem.row_count;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int* sums = reinterpret_cast<int*>(SharedMemory());
  int* counts = sums + kWarp;  // [workers, clusters]
  for (int i = threadIdx.x; i < workers * clusters; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  const int share = (rows + workers - 1) / workers;
  const int begin = min(rows, warp * share),
            end = warp < workers ? min(rows, begin + share) : begin;
  int* mine = counts + warp * clusters;
  for (int row = begin + lane; row < end; row += kWarp) atomicAdd(&mine[problem.labels[row]], 1);
  __syncthreads();
  int base = 0;
  for (int first = 0; first < clusters; first += kSortThreads) {
    const int c = first + static_cast<int>(threadIdx.x);
    int size = 0;
    for (int w = 0; c < clusters && w < workers; ++w) size += counts[w * clusters + c];
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
  if (threadIdx.x == 0) {
    problem.begin[clusters] = rows;
    *plan.At<int>(workspace, plan.close_count, blockIdx.x) = 0;  // for the next assignment
  }
  __syncthreads();
  for (int first = begin; first < end; first += kWarp) {
    const int row = first + lane;
    const int label = row < end ? problem.labels[row] : -1;
    const unsigned same = __match_any_sync(kFullMask, label);
    const int leader = __ffs(same) - 1;
    int at = 0;
    if (lane == leader && label >= 0) {
      at = mine[label];
      mine[label] = at + __popc(same);
    }
    at = __shfl_sync(kFullMask, at, leader);
    if (label >= 0) problem.order[at + __popc(same & ((1u << lane) - 1))] = row;
    __syncwarp();
  }
}

// ---- means
// ---------------------------------------------------------------------------------------------

// A warp per cluster; its rows in ascending order, in double, four in flight.
template <int kVectors>
__global__ void __launch_bounds__(256)
    MeansKernel(const __grid_constant__ Plan plan, const KMeansCudaProblem* problems,
                unsigned char* workspace) {
  const KMeansCudaParams& p = plan.params;
  const int index = static_cast<int>(blockIdx.y);
  const KMeansCudaProblem& problem = problems[index];
  const int lane = threadIdx.x % kWarp;
  const int c = static_cast<int>(blockIdx.x) * 8 + threadIdx.x / kWarp;
  if (c >= problem.cluster_count) return;
  const int begin = problem.begin[c], end = problem.begin[c + 1];
  if (begin == end) return;  // keeps its last centroid
  double sum[kVectors][4] = {};
  for (int first = begin; first < end; first += 4) {
    float x[4][kVectors][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const unsigned char* row = RowOf(problem, problem.order[min(first + k, end - 1)]);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 4 * (lane + v * kWarp) + i;
          x[k][v][i] = j < p.dim ? RowElement(problem, row, p.element_type, j) : 0.0f;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (first + k >= end) break;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[v][i] += static_cast<double>(x[k][v][i]);
      }
    }
  }
  float mean[kVectors][4];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) mean[v][i] = static_cast<float>(sum[v][i] / (end - begin));
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
  plan.rows = take(problems * p.max_rows * plan.padded_dim * 2);
  plan.margins = take(problems * p.max_rows * 4);
  plan.centroids = take(problems * plan.padded_clusters * plan.padded_dim * 2);
  plan.unit = take(problems * p.max_clusters * p.dim * 4);
  plan.close = take(problems * p.max_rows * 4);
  plan.close_count = take(problems * 4);
  plan.bytes = at;
  return plan;
}

dim3 Grid(int64_t items, int64_t per_block, int32_t problems) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block),
              static_cast<unsigned>(problems));
}

cudaError_t Assign(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                   unsigned char* workspace, cudaStream_t stream) {
  const KMeansCudaParams& p = plan.params;
  const size_t shared_bytes = static_cast<size_t>(kStages) * kTileClusters * plan.padded_dim * 2;
  void (*kernel)(Plan, const KMeansCudaProblem*, unsigned char*) =
      plan.padded_dim == 64    ? AssignKernel<64, 2>
      : plan.padded_dim == 128 ? AssignKernel<128, 2>
      : plan.padded_dim == 256 ? AssignKernel<256, 1>
                               : AssignKernel<512, 1>;
  const int rows_per_block = kAssignWarps * 16 * (plan.padded_dim <= 128 ? 2 : 1);
  CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(kernel, Grid(p.max_rows, rows_per_block, count),
                                        dim3(kAssignThreads), shared_bytes, 1, stream, plan,
                                        problems, workspace));
  const size_t rescore_bytes =
      static_cast<size_t>(kRescoreRows + kRescoreClusters) * (p.dim + 4) * 4 + kRescoreRows * 16;
  const int chunks = (p.max_rows + kRescoreRows - 1) / kRescoreRows;
  const int blocks = std::max(1, std::min(chunks, 264 / std::max(1, static_cast<int>(count))));
  return cuda::Launch(RescoreKernel, dim3(blocks, count), dim3(kRescoreThreads), rescore_bytes, 1,
                      stream, plan, problems, workspace);
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
  const size_t sort_bytes = (kWarp + static_cast<size_t>(workers) * p.max_clusters) * 4;
  for (int i = 0; i < p.iterations; ++i) {
    CKV_RETURN_IF_CUDA_ERROR(Assign(plan, problems, count, workspace, stream));
    CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(SortKernel, dim3(count), dim3(kSortThreads), sort_bytes,
                                          1, stream, plan, problems, workers, workspace));
    CKV_RETURN_IF_CUDA_ERROR(cuda::Launch(MeansKernel<kVectors>, Grid(p.max_clusters, 8, count),
                                          dim3(256), 0, 1, stream, plan, problems, workspace));
  }
  return cudaSuccess;
}

cudaError_t PrepareRows(const Plan& plan, const KMeansCudaProblem* problems, int32_t count,
                        unsigned char* workspace, cudaStream_t stream) {
  CKV_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(workspace + plan.close_count, 0, static_cast<size_t>(count) * 4, stream));
  return cuda::Launch(PrepareRowsKernel, Grid(plan.params.max_rows, 8, count), dim3(256), 0, 1,
                      stream, plan, problems, workspace);
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
  CKV_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(bytes + plan.close_count, 0, static_cast<size_t>(problem_count) * 4, stream));
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
