// The bodies of PairAnswer (answer_pair.cuh), which alone includes this.
#ifndef CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_INL_CUH_
#define CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_INL_CUH_

namespace clusterkv::kernels::cuda {

// ---- what needs no query
// ------------------------------------------------------------------------

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::CopyParts(const SelectCudaPair& pair) {
  constexpr int kWords = sizeof(DeviceIndexPart) / 8;
  static_assert(sizeof(DeviceIndexPart) % 8 == 0);
  const DeviceIndexPart* parts = pair.parts;
  part_count_ = pair.part_count;
  clusters_ = pair.clusters;
  kv_head_ = pair.kv_head;
  sinks_ = pair.sink_tokens;
  sink_keys_ = pair.sink_keys;
  sink_stride_ = pair.sink_key_stride_bytes;
  const bool copies = part_count_ <= kAnswerParts;
  for (int i = thread_; copies && i < part_count_ * kWords; i += kThreads) {
    reinterpret_cast<uint64_t*>(s_.parts)[i] = reinterpret_cast<const uint64_t*>(parts)[i];
  }
  parts_ = copies ? s_.parts : parts;
}

// Page numbers of what is read after the choice of clusters: one trip to memory less then.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::PrefetchPages() {
  constexpr int kViews = 3, kLineBytes = 128;
  for (int i = thread_; i < kViews * part_count_; i += kThreads) {
    const DeviceIndexPart& part = parts_[i / kViews];
    const bool means = i % kViews == 0;
    const DevicePagedView& view = means             ? part.value_means
                                  : i % kViews == 1 ? part.codes
                                                    : part.positions;
    const uint32_t rows = static_cast<uint32_t>(means ? part.clusters : part.tokens);
    if (rows == 0 || view.elements_per_page == 0) continue;
    const uint32_t begin = static_cast<uint32_t>(kv_head_) * rows;
    const uint32_t* first = view.pages + view.PageOf(begin);
    const uint32_t* last = view.pages + view.PageOf(begin + rows - 1);
    for (const uint32_t* at = first; at <= last; at += kLineBytes / 4) PrefetchL2(at);
    PrefetchL2(last);
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::LoadSizes() {
  int* slots = Array<int>(plan_.slots);
  for (int k = 0; k < part_count_; ++k) {
    const DeviceIndexPart& part = parts_[k];
    const DevicePagedView& view = part.cluster_begin;
    const uint32_t base = static_cast<uint32_t>(kv_head_) * (part.clusters + 1);
    const int32_t* row = view.As<int32_t>(base);
    const bool run = view.PageOf(base) == view.PageOf(base + static_cast<uint32_t>(part.clusters));
    constexpr int kBatch = 4;  // loads in flight: none may pass a store
#pragma unroll 1
    for (int first = thread_; first < part.clusters; first += kBatch * kThreads) {
      int begin[kBatch], end[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = min(first + j * kThreads, part.clusters - 1);
        begin[j] = run ? row[i] : *view.As<int32_t>(base + i);
        end[j] = run ? row[i + 1] : *view.As<int32_t>(base + i + 1);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = first + j * kThreads;
        if (i >= part.clusters) break;
        Sizes()[part.first_cluster + i] = end[j] - begin[j];
        slots[part.first_cluster + i] = begin[j];
      }
    }
  }
}

// Row lane % 16 of the tile; behind the last cluster the last.
template <int kThreads>
__device__ __forceinline__ const unsigned char* PairAnswer<kThreads>::CentroidOfTile(
    int tile) const {
  const int cluster = min(tile * kAnswerTile + lane_ % kAnswerTile, clusters_ - 1);
  const DeviceIndexPart& part = PartOf(cluster);
  return Element(part.centroids, part.clusters, cluster - part.first_cluster);
}
// Rows r and r + 8 for lanes 4 r .., of what CentroidOfTile gave.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::LocateCentroids(const unsigned char* mine) {
#pragma unroll
  for (int i = 0; i < 2; ++i) centroid_[i] = ShuffleAddress(mine, lane_ / 4 + 8 * i);
}
template <int kThreads>
template <int kHalf>
__device__ __forceinline__ void PairAnswer<kThreads>::FetchCentroids() {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int channel = 64 * kHalf + 16 * j + 4 * (lane_ % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows_[kHalf][j][i] = *reinterpret_cast<const float4*>(centroid_[i] + 4 * channel);
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::Begin(const SelectCudaPair& pair) {
  ClusterArriveRelaxed(plan_.blocks);
  CopyParts(pair);
  for (int i = thread_; i < kHistogramBins; i += kThreads) {
    s_.threshold.histogram[i] = 0;
    s_.bin_counts[i] = 0;
  }
  if (thread_ == 0) {
    s_.found_bin = s_.found_bin2 = -1;
    s_.found_tokens = s_.found_count = s_.found_count2 = 0;
    s_.candidates = s_.candidates2 = s_.touched = s_.exact_count = 0;
  }
  __syncthreads();
  int begin;
  Share(clusters_, &begin, &tile_end_);
  tile_ = begin + warp_;
  // Channels: [3, D] of the first part: metric weight, K balance, V balance. All page numbers are
  // asked for before one is used.
  const int channel = thread_ % kAnswerDim;
  const float* channels = parts_[0].channels.template As<float>(kv_head_);
  const unsigned char* centroid = tile_ < tile_end_ ? CentroidOfTile(tile_) : nullptr;
  weight_ = channels[channel];
  balance_ = channels[kAnswerDim + channel];
  const float value_balance = channels[2 * kAnswerDim + channel];
  if (tile_ < tile_end_) {
    LocateCentroids(centroid);
    FetchCentroids<0>();
    FetchCentroids<1>();
  }
  LoadSizes();
  if (plan_.refine) {
    PrefetchPages();
    const int row_lines = plan_.params.element_type == ElementType::kFloat32 ? 4 : 2;
    for (int i = thread_; i < sinks_ * row_lines; i += kThreads) {
      PrefetchL2(sink_keys_ + i / row_lines * sink_stride_ + i % row_lines * 128);
    }
  }
  if (thread_ < kAnswerDim) s_.inverse_v[channel] = 1.0f / value_balance;
}

// ---- queries
// -----------------------------------------------------------------------------------

// The weighted query as operands of tf32 products: columns 0 to 3 the heads' leading 19 bits,
// columns 4 to 7 what these lack. In the order of channels in which lanes read centroids.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::PrepareQueries(const float* queries) {
  const int channel = thread_ % kAnswerDim;
#pragma unroll
  for (int k = 0; k < kAnswerHeads * kAnswerDim / kThreads; ++k) {
    const int h = thread_ / kAnswerDim + k * (kThreads / kAnswerDim);
    const float query = h < plan_.params.group ? queries[h * kAnswerDim + channel] : 0.0f;
    const float raw = query * plan_.params.scale * kLog2E;
    s_.raw[h][channel] = raw;
    s_.query[h][channel] = raw / weight_;
    s_.balanced[h][channel] = raw / weight_ / balance_;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kAnswerDim / 8 * kWarp / kThreads; ++k) {
    const int i = thread_ + k * kThreads, step = i / kWarp, r = lane_ / 4, t = lane_ % 4;
    const int first = 64 * (step / 8) + 16 * (step % 8 / 2) + 4 * t + 2 * (step % 2);
    uint32_t bits[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float x = s_.query[r % 4][first + j];
      bits[j] = __float_as_uint(x) & 0xffffe000u;
      if (r >= 4) bits[j] = __float_as_uint(x - __uint_as_float(bits[j]));
    }
    s_.centroid_query[step][lane_] = make_uint2(bits[0], bits[1]);
  }
  __syncthreads();
}

// -126 <= exponent <= 127.
__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// The balanced query in halves, as the operand of products with codes: a warp per head. Divided by
// a power of two that brings its largest channel to [2^11, 2^12).
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::PrepareCodeQueries() {
  const int head = warp_;
  if (!plan_.refine || head >= kAnswerHeads) return;
  float largest = 0;
#pragma unroll
  for (int g = 0; g < kAnswerGroups; ++g) {
    const float x = s_.balanced[head][g * kWarp + lane_];
    largest = fmaxf(largest, fabsf(x));
    const float sum = WarpSum(x);
    if (lane_ == 0) s_.query_sums[g][head] = sum;
  }
  largest = WarpMax(largest);
  // Powers stay normal; infinite queries give no numbers, as they should.
  const int field = static_cast<int>(__float_as_uint(largest) >> 23);
  const int exponent = min(max(field, 30), 240) - 127;
  const float unit = PowerOfTwo(exponent - 11), inverse = PowerOfTwo(11 - exponent);
  if (lane_ == 0) s_.query_unit[head] = unit;
  const int block = lane_ / 4, t = lane_ % 4;
  float x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int channel = block * kCodeBlock + ChannelOfIndex(2 * t + j % 2 + j / 2 * 8);
    x[j] = s_.balanced[head][channel] * inverse;
  }
  uint2 high, low;
  SplitHalves(x[0], x[1], &high.x, &low.x);
  SplitHalves(x[2], x[3], &high.y, &low.y);
  s_.code_query[block][4 * head + t] = high;
  s_.code_query[block][4 * (head + 4) + t] = low;
}

// ---- phase 1: centroids
// --------------------------------------------------------------------------

// Of a product of 16 rows whose columns are four heads' high and low parts: the four heads of row
// r (even lanes) or r + 8 (odd lanes).
template <int kThreads>
__device__ __forceinline__ float4 PairAnswer<kThreads>::TileRow(float (&sum)[4]) const {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
  const bool odd = lane_ % 2 == 1;
  const float get0 = __shfl_xor_sync(kFullMask, odd ? sum[0] : sum[2], 1);
  const float get1 = __shfl_xor_sync(kFullMask, odd ? sum[1] : sum[3], 1);
  return odd ? make_float4(get0, get1, sum[2], sum[3]) : make_float4(sum[0], sum[1], get0, get1);
}

// Gives a row that TileRow returned to every block; lanes 2 apart share the blocks.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::Publish(float4* rows, int row,
                                                              float4 logits) {
  const int first = lane_ / 2 % 2;
  if (plan_.blocks == 1) {
    if (first == 0) rows[row] = logits;
    return;
  }
#pragma unroll 1
  for (int k = first; k < plan_.blocks; k += 2) StoreToBlock(rows + row, k, logits);
}

template <int kThreads>
template <int kHalf>
__device__ __forceinline__ void PairAnswer<kThreads>::MultiplyCentroids(float (&sums)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float4 x0 = rows_[kHalf][j][0], x1 = rows_[kHalf][j][1];
    const float of[2][4] = {{x0.x, x1.x, x0.y, x1.y}, {x0.z, x1.z, x0.w, x1.w}};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint2 q = s_.centroid_query[(4 * kHalf + j) * 2 + e][lane_];
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        high[i] = __float_as_uint(of[e][i]) & 0xffffe000u;
        low[i] = __float_as_uint(of[e][i] - __uint_as_float(high[i]));
      }
      MmaTf32(sums[j], high, q.x, q.y);
      MmaTf32(sums[j], low, q.x, q.y);
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ScoreCentroids() {
#pragma unroll 1
  for (int tile = tile_; tile < tile_end_; tile += kWarps) {
    const bool more = tile + kWarps < tile_end_;
    if (more) LocateCentroids(CentroidOfTile(tile + kWarps));
    float sums[4][4] = {};  // several chains: sums of many products lose bits
    MultiplyCentroids<0>(sums);
    if (more) FetchCentroids<0>();
    MultiplyCentroids<1>(sums);
    if (more) FetchCentroids<1>();
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    const float4 logits = TileRow(sum);
    const int cluster = tile * kAnswerTile + lane_ / 4 + lane_ % 2 * 8;
    if (cluster < clusters_) Publish(ClusterLogits(), cluster, logits);
  }
}

// Sinks' logits by their keys as they came.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ScoreSinks() {
  if (!plan_.refine) return;
  float* logits = Array<float>(plan_.sinks);
  for (int i = kWarps - 1 - warp_; i < sinks_; i += kWarps) {
    const unsigned char* key = sink_keys_ + i * sink_stride_;
    float4 sum = Filled4(0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int channel = 4 * lane_ + j;
      const float x = LoadAsFloat(key, plan_.params.element_type, channel);
      AddScaled4(sum, x,
                 make_float4(s_.raw[0][channel], s_.raw[1][channel], s_.raw[2][channel],
                             s_.raw[3][channel]));
    }
    const float logit = WarpJoin4<true>(sum);
    if (lane_ % 8 == 0) logits[4 * i + lane_ / 8] = logit;
  }
}

__device__ __forceinline__ uint32_t WordOfFour(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// ---- phases 2 and 4: ranks
// -----------------------------------------------------------------------

// Items to rank and choose among: clusters, or tokens. Offsets into dynamic shared memory, so that
// the compiler knows where they point.
struct AnswerItems {
  int shared;  // AnswerShared
  int logits;  // float4 [n]
  int sizes;   // [n], 0: no item; -1: 1 each
  int kinds;   // [n]: 1: chosen, else 0
  int keys;    // [n]
  int sinks;   // float4 [sink_count]: beside them in the softmax
  int n, sink_count;
  int group;
  int room;  // items are chosen in order of rank until their sizes fill it; the last one is cut
};

// The range of keys, of 2^-6 in log2 of the rank, that a key is in, counted from a rank of 2^3; the
// rest is one.
__device__ __forceinline__ int AnswerRange(uint32_t key) {
  constexpr uint32_t kLargest = (3u + 1016u) << 22;
  return key >= kLargest ? 0 : min(static_cast<int>((kLargest - key) >> 16), kHistogramBins - 1);
}

// How many candidates stand before one of this key and index, and their weights' sum, with weights
// of 1 each where there are none.
__device__ __forceinline__ int2 CountBefore(const ThresholdScratch& t, int candidates, uint32_t key,
                                            int index) {
  int2 before = make_int2(0, 0);
#pragma unroll 1
  for (int j = 0; j < candidates; j += 4) {
    const uint4 keys = *reinterpret_cast<const uint4*>(t.candidate_keys + j);
    const uint4 indices = *reinterpret_cast<const uint4*>(t.candidate_indices + j);
    const uint4 weights = *reinterpret_cast<const uint4*>(t.candidate_weights + j);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t other = WordOfFour(keys, k);
      const bool first =
          other > key || (other == key && static_cast<int>(WordOfFour(indices, k)) < index);
      if (!first || j + k >= candidates) continue;
      before = make_int2(before.x + 1, before.y + static_cast<int>(WordOfFour(weights, k)));
    }
  }
  return before;
}

// Of each head: log2 of the sum of 2^logit; +infinity for heads that there are not. One barrier.
template <int kThreads>
__device__ __forceinline__ float4 SoftmaxLogSums(const AnswerItems& items, AnswerShared& s) {
  constexpr int kWarps = kThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const float4* logits = reinterpret_cast<const float4*>(SharedMemory() + items.logits);
  const float4* sinks = reinterpret_cast<const float4*>(SharedMemory() + items.sinks);
  const int* sizes = reinterpret_cast<const int*>(SharedMemory() + items.sizes);
  constexpr int kBatch = 4;
  float4 largest = Filled4(kAnswerNegativeInfinity), sum = Filled4(0);
  // Adds `x` of up to kBatch items to the thread's running softmax.
  const auto add = [&](const float4(&x)[kBatch]) {
    float4 more = largest;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) more = Max4(more, x[j]);
    const float4 shift = ZeroIfNone4(more);
    sum = Mul4(sum, Exp2Of4(largest, shift));
    largest = more;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) sum = Add4(sum, Exp2Of4(x[j], shift));
  };
#pragma unroll 1
  for (int first = thread; first < items.n; first += kBatch * kThreads) {
    float4 x[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads;
      const bool there = i < items.n && (items.sizes < 0 || sizes[i] > 0);
      x[j] = there ? logits[i] : Filled4(kAnswerNegativeInfinity);
    }
    add(x);
  }
#pragma unroll 1
  for (int i = thread; i < items.sink_count; i += kThreads) {
    const float4 none = Filled4(kAnswerNegativeInfinity), x[kBatch] = {sinks[i], none, none, none};
    add(x);
  }
  const float warp_largest = WarpJoin4<false>(largest);
  sum = Mul4(sum, Exp2Of4(largest, Spread4(ZeroIfNone(warp_largest), 8)));
  const float warp_sum = WarpJoin4<true>(sum);
  if (lane % 8 == 0) {
    s.warp_max[4 * warp + lane / 8] = warp_largest;
    s.warp_sum[4 * warp + lane / 8] = warp_sum;
  }
  __syncthreads();
  float all = kAnswerNegativeInfinity, total = 0;
#pragma unroll
  for (int i = lane; i < 4 * kWarps; i += kWarp) all = fmaxf(all, s.warp_max[i]);
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    all = fmaxf(all, __shfl_xor_sync(kFullMask, all, offset));
  }
  all = ZeroIfNone(all);
#pragma unroll
  for (int i = lane; i < 4 * kWarps; i += kWarp) total += s.warp_sum[i] * Exp2(s.warp_max[i] - all);
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    total += __shfl_xor_sync(kFullMask, total, offset);
  }
  const float log_sum = total > 0 ? all + log2f(total) : 0.0f;
  return Spread4(lane % 4 < items.group ? log_sum : -kAnswerNegativeInfinity, 1);
}

// keys = RankKey of the sum over the heads of the softmax, and how many items and how much size
// each range of keys has. Logarithms, so that nothing underflows. Two barriers.
template <int kThreads>
__device__ __forceinline__ void RankItems(const AnswerItems& items, AnswerShared& s) {
  const float4* logits = reinterpret_cast<const float4*>(SharedMemory() + items.logits);
  const int* sizes = reinterpret_cast<const int*>(SharedMemory() + items.sizes);
  uint32_t* keys = reinterpret_cast<uint32_t*>(SharedMemory() + items.keys);
  const float4 log_sum = SoftmaxLogSums<kThreads>(items, s);
  constexpr int kBatch = 4;  // loads in flight: none may pass a store
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < items.n; first += kBatch * kThreads) {
    float4 x[kBatch];
    int size[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = min(first + j * kThreads, items.n - 1);
      x[j] = logits[i];
      size[j] = items.sizes < 0 ? 1 : sizes[i];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float4 y = make_float4(x[j].x - log_sum.x, x[j].y - log_sum.y, x[j].z - log_sum.z,
                                   x[j].w - log_sum.w);
      const float largest = ZeroIfNone(fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
      const float4 share = Exp2Of4(y, Filled4(largest));
      const uint32_t key = RankKey(largest + Log2((share.x + share.y) + (share.z + share.w)));
      const int i = first + j * kThreads, bin = AnswerRange(key);
      if (i >= items.n) break;
      keys[i] = key;
      if (size[j] <= 0) continue;
      atomicAdd(&s.bin_counts[bin], 1);
      atomicAdd(&s.threshold.histogram[bin], static_cast<uint32_t>(size[j]));
    }
  }
  __syncthreads();
}

// Sums over the threads before this one, and over all. One barrier, and one between two calls.
template <int kThreads>
__device__ __forceinline__ int2 ScanBlock(int2 x, AnswerShared& s, int2* total) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto scan = [lane](int2 y) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int a = __shfl_up_sync(kFullMask, y.x, offset);
      const int b = __shfl_up_sync(kFullMask, y.y, offset);
      if (lane >= offset) y = make_int2(y.x + a, y.y + b);
    }
    return y;
  };
  const int2 inclusive = scan(x);
  if (lane == kWarp - 1) s.scan[warp] = inclusive;
  __syncthreads();
  const int2 warps = scan(lane < kWarps ? s.scan[lane] : make_int2(0, 0));
  const int from = max(warp - 1, 0);
  const int a = __shfl_sync(kFullMask, warps.x, from), b = __shfl_sync(kFullMask, warps.y, from);
  *total = make_int2(__shfl_sync(kFullMask, warps.x, kWarp - 1),
                     __shfl_sync(kFullMask, warps.y, kWarp - 1));
  return make_int2((warp > 0 ? a : 0) + inclusive.x - x.x, (warp > 0 ? b : 0) + inclusive.y - x.y);
}

// Where, in the order of the bins, the sum reaches the target; of sizes or of counts.
template <int kThreads, bool kSizes>
__device__ __forceinline__ void FindRange(int target, AnswerShared& s, int* found_bin,
                                          int* found_size, int* found_count) {
  constexpr int kBins = kHistogramBins / kThreads;
  const int first = static_cast<int>(threadIdx.x) * kBins;
  int sizes[kBins], counts[kBins];
  int2 sum = make_int2(0, 0), total;
#pragma unroll
  for (int j = 0; j < kBins; ++j) {
    sizes[j] = static_cast<int>(s.threshold.histogram[first + j]);
    counts[j] = s.bin_counts[first + j];
    sum = make_int2(sum.x + sizes[j], sum.y + counts[j]);
  }
  int2 above = ScanBlock<kThreads>(sum, s, &total);
#pragma unroll
  for (int j = 0; j < kBins; ++j) {
    const int before = kSizes ? above.x : above.y;
    if (before < target && before + (kSizes ? sizes[j] : counts[j]) >= target) {
      *found_bin = first + j;
      *found_size = above.x;
      *found_count = above.y;
    }
    above = make_int2(above.x + sizes[j], above.y + counts[j]);
  }
  __syncthreads();
}

// Chooses items; where the last one is among too many of nearly its rank, more than
// kThresholdCandidates, it is left to ChooseSlowly. A function of its own: its second caller finds
// its instructions at hand.
template <int kThreads>
__device__ __noinline__ void ChooseItems(AnswerItems items) {
  AnswerShared& s = *reinterpret_cast<AnswerShared*>(SharedMemory() + items.shared);
  int* sizes = reinterpret_cast<int*>(SharedMemory() + items.sizes);
  unsigned char* kinds = SharedMemory() + items.kinds;
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(SharedMemory() + items.keys);
  ThresholdScratch& t = s.threshold;
  const int thread = static_cast<int>(threadIdx.x), room = items.room;
  RankItems<kThreads>(items, s);
  FindRange<kThreads, true>(room, s, &s.found_bin, &s.found_tokens, &s.found_count);
  const int bin = s.found_bin;
  const bool all = bin < 0 && room > 0;
  // As many turns for each thread, see ChooseExact.
#pragma unroll 1
  for (int first = 0; first < items.n; first += kThreads) {
    const int i = first + thread;
    const bool there = i < items.n;
    const int size = !there ? 0 : items.sizes < 0 ? 1 : sizes[i];
    const uint32_t key = there ? keys[i] : 0;
    const int range = AnswerRange(key);
    if (there) kinds[i] = size > 0 && (all || range < bin) ? 1 : 0;
    if (size > 0 && range == bin) {
      const int at = atomicAdd(&s.candidates, 1);
      if (at < kThresholdCandidates) {
        t.candidate_keys[at] = key;
        t.candidate_weights[at] = size;
        t.candidate_indices[at] = i;
      }
    }
  }
  __syncthreads();
  // One way out for all: a function that is not inlined promises no convergence where it returns.
  const int candidates = s.candidates <= kThresholdCandidates ? s.candidates : 0;
  for (int first = 0; first < candidates; first += kThreads) {
    const int c = first + thread;
    if (c >= candidates) continue;
    const uint32_t key = t.candidate_keys[c];
    const int index = t.candidate_indices[c], size = t.candidate_weights[c];
    const int2 nearer = CountBefore(t, candidates, key, index);
    const int before = s.found_tokens + nearer.y, place = s.found_count + nearer.x;
    s.places[c] = place;
    if (before >= room) continue;
    kinds[index] = 1;
    if (before + size >= room) {
      if (items.sizes >= 0) sizes[index] = room - before;
      s.touched = place + 1;
    }
  }
  __syncthreads();
}

// ---- phase 2: clusters
// ---------------------------------------------------------------------------

// Marks the `wanted` clusters that follow in rank those that ChooseItems chose: their kind is 2.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseEstimated(int wanted) {
  ThresholdScratch& t = s_.threshold;
  const int end = s_.touched + wanted, candidates = s_.candidates;
  for (int c = thread_; c < candidates; c += kThreads) {
    const int index = t.candidate_indices[c];
    if (s_.places[c] >= s_.touched && s_.places[c] < end) Kinds()[index] = 2;
  }
  int unused;
  FindRange<kThreads, false>(end, s_, &s_.found_bin2, &unused, &s_.found_count2);
  const int bin = s_.found_bin, last = s_.found_bin2 < 0 ? kHistogramBins : s_.found_bin2;
#pragma unroll 2
  for (int i = thread_; i < clusters_; i += kThreads) {
    const uint32_t key = Keys()[i];
    const int range = AnswerRange(key);
    if (Sizes()[i] <= 0 || range <= bin || range > last) continue;
    if (range < last) {
      Kinds()[i] = 2;
      continue;
    }
    const int at = atomicAdd(&s_.candidates2, 1);
    if (at >= kThresholdCandidates) continue;
    t.candidate_keys[at] = key;
    t.candidate_indices[at] = i;
  }
  __syncthreads();
  const int others = s_.candidates2;
  if (others > kThresholdCandidates) return;
  for (int c = thread_; c < others; c += kThreads) {
    const uint32_t key = t.candidate_keys[c];
    const int index = t.candidate_indices[c];
    const int place = s_.found_count2 + CountBefore(t, others, key, index).x;
    if (place < end) Kinds()[index] = 2;
  }
  __syncthreads();
}

// The same by a search over all bits of the keys, for many items of nearly equal rank: chooses
// items.room of size where `choose`, then marks the `wanted` next.
template <int kThreads>
__device__ __noinline__ void ChooseSlowly(AnswerItems items, bool choose, int wanted) {
  AnswerShared& s = *reinterpret_cast<AnswerShared*>(SharedMemory() + items.shared);
  int* sizes = reinterpret_cast<int*>(SharedMemory() + items.sizes);
  unsigned char* kinds = SharedMemory() + items.kinds;
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(SharedMemory() + items.keys);
  const auto key = [&](int i) { return keys[i]; };
  const auto size = [&](int i) { return items.sizes < 0 ? 1 : sizes[i]; };
  const auto free = [&](int i) { return size(i) > 0 && kinds[i] != 1 ? 1 : 0; };
  int total;
  const int last = wanted > 0 ? 2 : 1;
#pragma unroll 1
  for (int kind = choose ? 1 : 2; kind <= last; ++kind) {
    const auto weight = [&](int i) { return kind == 1 ? size(i) : free(i); };
    const Threshold threshold = RadixThreshold<kThreads>(items.n, kind == 1 ? items.room : wanted,
                                                         key, weight, s.threshold);
    OrderedTake<kThreads>(
        items.n, threshold, key, weight, s.threshold,
        [&](int i, int take, int, int) {
          if (kind == 2 && kinds[i] == 1) return;
          kinds[i] = static_cast<unsigned char>(take > 0 ? kind : 0);
          if (kind == 1 && take > 0 && items.sizes >= 0) sizes[i] = take;
        },
        &total);
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseClusters() {
  const SelectCudaParams& p = plan_.params;
  const int room = max(p.scored_tokens, max(0, p.budget_tokens - sinks_));
  const int wanted = static_cast<int>(static_cast<double>(p.estimated_fraction) * clusters_);
  const AnswerItems items = {offset_,
                             offset_ + plan_.cluster_logits,
                             offset_ + plan_.sizes,
                             offset_ + plan_.kinds,
                             offset_ + plan_.keys,
                             0,
                             clusters_,
                             0,
                             p.group,
                             room};
  ChooseItems<kThreads>(items);
  const bool slow = s_.candidates > kThresholdCandidates;
  const bool remaining = s_.found_bin >= 0 || room <= 0;  // clusters for the estimated zone
  if (!slow && wanted > 0 && remaining) ChooseEstimated(wanted);
  if (slow || s_.candidates2 > kThresholdCandidates) {
    ChooseSlowly<kThreads>(items, slow, wanted);
  }
}

// The touched clusters in order, where their tokens begin, and the estimated ones.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ListClusters() {
  const int* slots = Array<int>(plan_.slots);
#pragma unroll 1
  for (int first = 0; first < clusters_; first += 4 * kThreads) {
    if (first > 0) __syncthreads();
    const int begin = first + 4 * thread_, count = min(4, clusters_ - begin);
    const uint32_t kinds = count > 0 ? *reinterpret_cast<const uint32_t*>(Kinds() + begin) : 0;
    int2 mine = make_int2(0, 0), total;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t kind = j < count ? kinds >> (8 * j) & 3 : 0;
      if (kind == 1) mine = make_int2(mine.x + Sizes()[begin + j], mine.y + 1);
      if (kind == 2) mine.y += 1 << 16;
    }
    const int2 before = ScanBlock<kThreads>(mine, s_, &total);
    int at = listed_count_ + (before.y & 0xffff), token = token_count_ + before.x;
    int to = estimated_count_ + (before.y >> 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t kind = j < count ? kinds >> (8 * j) & 3 : 0;
      const int i = begin + j;
      if (kind == 1) {
        Listed()[at] = static_cast<uint16_t>(i);
        ListedStart()[at] = static_cast<uint16_t>(token);
        ListedSlot()[at++] = slots[i];
        token += Sizes()[i];
      } else if (kind == 2) {
        Estimated()[to++] = static_cast<uint16_t>(i);
      }
    }
    listed_count_ += total.y & 0xffff;
    token_count_ += total.x;
    estimated_count_ += total.y >> 16;
  }
  if (thread_ == 0) {
    ListedStart()[listed_count_] = static_cast<uint16_t>(token_count_);
    s_.found_bin = -1;
    s_.found_tokens = s_.found_count = s_.candidates = 0;
  }
  for (int i = thread_; i < kHistogramBins; i += kThreads) {
    s_.bin_counts[i] = 0;
    s_.threshold.histogram[i] = 0;
  }
  __syncthreads();
  ListTokens();
}

// Each token's place in the list of clusters, and the largest logits of the estimated zone.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ListTokens() {
#pragma unroll 1
  for (int e = thread_ / 8; e < listed_count_; e += kThreads / 8) {
    const int end = ListedStart()[e + 1];
#pragma unroll 1
    for (int t = ListedStart()[e] + lane_ % 8; t < end; t += 8) {
      TokenEntry()[t] = static_cast<uint16_t>(e);
    }
  }
  float4 largest = Filled4(kAnswerNegativeInfinity);
#pragma unroll 1
  for (int i = thread_; i < estimated_count_; i += kThreads) {
    const int cluster = Estimated()[i];
    const float log_size = Log2(static_cast<float>(Sizes()[cluster]));
    largest = Max4(largest, Add4(ClusterLogits()[cluster], Filled4(log_size)));
  }
  const float warp_largest = WarpJoin4<false>(largest);
  if (lane_ % 8 == 0) s_.warp_estimated[4 * warp_ + lane_ / 8] = warp_largest;
  __syncthreads();
  estimated_max_ = CombineWarps(s_.warp_estimated);
}

// The largest of each head over the warps.
template <int kThreads>
__device__ __forceinline__ float4 PairAnswer<kThreads>::CombineWarps(const float* of_warps) const {
  float all = kAnswerNegativeInfinity;
#pragma unroll
  for (int i = lane_; i < 4 * kWarps; i += kWarp) all = fmaxf(all, of_warps[i]);
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    all = fmaxf(all, __shfl_xor_sync(kFullMask, all, offset));
  }
  return Spread4(all, 1);
}

// ---- phase 3: tokens
// -----------------------------------------------------------------------------

// Half i of the four in two words. With constant i no instruction or one.
__device__ __forceinline__ float HalfOfWords(uint32_t low, uint32_t high, int i) {
  return HalfBitsToFloat(static_cast<uint16_t>((i < 2 ? low : high) >> (i % 2 * 16)));
}
// The codes at bits b and b + 16 of a word, left = 8 - b, as the halves 1 + code / 4: the bits
// become a mantissa's leading ones, no conversion. Scales and lows make good for it:
// low + scale · code = (low - 4 scale) + 4 scale · (1 + code / 4).
__device__ __forceinline__ uint32_t CodesOverFour(uint32_t word, int left) {
  return (__funnelshift_l(word, word, static_cast<uint32_t>(left)) & 0x03000300u) | 0x3c003c00u;
}

// Where the codes of token `lane % 16` of a tile are; behind the last token the last.
template <int kThreads>
__device__ __forceinline__ const unsigned char* PairAnswer<kThreads>::CodesOfTile(int tile) {
  return CodesOf(min(tile * kAnswerTile + lane_ % kAnswerTile, token_count_ - 1));
}

// Key codes of the tile's tokens r and r + 8 into codes_; value codes on their way to shared
// memory, as tile `local` of the block.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::FetchCodes(int tile, int local) {
  const unsigned char* mine = CodesOfTile(tile);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4* row = reinterpret_cast<const uint4*>(ShuffleAddress(mine, lane_ / 4 + 8 * i));
    codes_[i][0] = row[0];
    codes_[i][1] = row[2];
    codes_[i][2] = row[3];
  }
  if (local >= plan_.staged_tiles) return;
  unsigned char* to = Array<unsigned char>(plan_.values) + local * kAnswerTile * kAnswerValueBytes;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    // Pieces of 16 bytes: scales and lows, bits, bits.
    const int piece = lane_ + k * kWarp, token = piece / 3, part = piece % 3;
    const unsigned char* from = ShuffleAddress(mine, token % kAnswerTile);
    if (token < kAnswerTile) {
      CopyAsync16(to + piece * 16, from + (part == 0 ? 16 : 48 + 16 * part));
    }
  }
}

// Logits of a tile's tokens: codes [16 tokens × 16 channels] times the query [16 channels × 4
// heads' high and low halves], and their clusters' logits.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ScoreTile(int tile,
                                                                const uint4 (&codes)[2][3]) {
  const int r = lane_ / 4, t = lane_ % 4;
  float logit[4] = {0, 0, 0, 0};
  const float unit[2] = {4.0f * s_.query_unit[2 * t % 4], 4.0f * s_.query_unit[2 * t % 4 + 1]};
#pragma unroll
  for (int g = 0; g < kAnswerGroups; ++g) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int block = 2 * g; block < 2 * g + 2; ++block) {
      const uint2 q = s_.code_query[block][lane_];
      uint32_t operand[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = WordOfFour(codes[i][1 + block / 4], block % 4);
        operand[i] = CodesOverFour(word, 8 - 4 * t);
        operand[2 + i] = CodesOverFour(word, 6 - 4 * t);
      }
      MmaHalf(sum, operand, q.x, q.y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = HalfOfWords(codes[i][0].x, codes[i][0].y, g);
      const float low = HalfOfWords(codes[i][0].z, codes[i][0].w, g) - 4.0f * scale;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float query_sum = t < 2 ? s_.query_sums[g][2 * t % 4 + j] : 0.0f;
        logit[2 * i + j] += scale * (sum[2 * i + j] * unit[j]) + low * query_sum;
      }
    }
  }
  const float4 residual = TileRow(logit);
  const int token = tile * kAnswerTile + r + t % 2 * 8;
  if (token < token_count_) {
    const float4 cluster = ClusterLogits()[Listed()[TokenEntry()[token]]];
    Publish(TokenLogits(), token, Add4(residual, cluster));
  }
}

// Asks for what the block will read: value means, and codes beyond each warp's first tile. Codes
// lie closer together than lines are long.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::PrefetchMeans() {
  int begin, end;
  Share(token_count_, &begin, &end);
#pragma unroll 1
  for (int t = (begin + kWarps) * kAnswerTile + thread_; t < min(end * kAnswerTile, token_count_);
       t += kThreads) {
    PrefetchL2(CodesOf(t));
  }
  const int step = plan_.blocks * kThreads, first = rank_ * kThreads + thread_;
#pragma unroll 1
  for (int i = first; i < 4 * estimated_count_; i += step) {
    PrefetchL2(ValueMean(Estimated()[i / 4]) + i % 4 * 128);
  }
  const int listed = plan_.refine && plan_.params.answer_scored ? listed_count_ : 0;
#pragma unroll 1
  for (int i = first; i < 4 * listed; i += step) {
    PrefetchL2(ValueMean(Listed()[i / 4]) + i % 4 * 128);
  }
}

// Ends with the barrier after which every block has all tokens' logits.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ScoreTokens() {
  int begin, end;
  Share(token_count_, &begin, &end);
  int tile = begin + warp_;
  if (tile < end) FetchCodes(tile, tile - begin);
  PrefetchMeans();
#pragma unroll 1
  for (; tile < end; tile += kWarps) {
    const uint4 codes[2][3] = {{codes_[0][0], codes_[0][1], codes_[0][2]},
                               {codes_[1][0], codes_[1][1], codes_[1][2]}};
    if (tile + kWarps < end) FetchCodes(tile + kWarps, tile + kWarps - begin);
    ScoreTile(tile, codes);
  }
  CopyAsyncCommit();
  ClusterArrive(plan_.blocks);
  SumEstimated();
  CopyAsyncWait<0>();
  ClusterWait(plan_.blocks);
}

// The estimated clusters' part of the state, relative to estimated_max_: eight clusters at a time.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::SumEstimated() {
  constexpr int kRows = 8;
  const int head = lane_ % 4;
  const float4 m = estimated_max_;
  const float shift = ZeroIfNone(head == 0 ? m.x : head == 1 ? m.y : head == 2 ? m.z : m.w);
#pragma unroll
  for (int h = 0; h < kAnswerHeads; ++h) state_[h] = Filled4(0);
  // Lane 4 i + h: cluster i, its row, and its weight for head h.
  const int step = plan_.blocks * kWarps * kRows;
  int mine = (rank_ * kWarps + warp_) * kRows + lane_ / 4;
  int cluster = 0;
  const unsigned char* row = nullptr;
  const auto locate = [&] {
    cluster = Estimated()[min(mine, estimated_count_ - 1)];
    row = ValueMean(cluster);
  };
  if (mine - lane_ / 4 < estimated_count_) locate();
#pragma unroll 1
  for (; mine - lane_ / 4 < estimated_count_; mine += step) {
    float4 rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = reinterpret_cast<const float4*>(ShuffleAddress(row, 4 * i))[lane_];
    }
    float weight = 0;
    if (mine < estimated_count_ && head < plan_.params.group) {
      const float logit = Array<float>(plan_.cluster_logits)[4 * cluster + head];
      weight = Exp2(logit + Log2(static_cast<float>(Sizes()[cluster])) - shift);
    }
    weights_ += weight;
    if (mine + step - lane_ / 4 < estimated_count_) {
      mine += step;
      locate();
      mine -= step;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int h = 0; h < kAnswerHeads; ++h) {
        AddScaled4(state_[h], __shfl_sync(kFullMask, weight, 4 * i + h), rows[i]);
      }
    }
  }
}

// ---- phase 4: the exact zone
// ---------------------------------------------------------------------

// The tokens of the largest ranks, in any order; leaves in warp_coded the largest logits of the
// others.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseExact() {
  int* list = Array<int>(plan_.exact_token);
  if (!plan_.refine) {
    for (int t = thread_; t < token_count_; t += kThreads) list[t] = t;
    if (thread_ == 0) s_.exact_count = token_count_;
    __syncthreads();
    return;
  }
  const AnswerItems items = {offset_,
                             offset_ + plan_.token_logits,
                             -1,
                             offset_ + plan_.exact,
                             offset_ + plan_.keys,
                             offset_ + plan_.sinks,
                             token_count_,
                             sinks_,
                             plan_.params.group,
                             max(0, plan_.params.budget_tokens - sinks_)};
  ChooseItems<kThreads>(items);
  if (s_.candidates > kThresholdCandidates) ChooseSlowly<kThreads>(items, true, 0);
  __syncwarp();
  float4 largest = Filled4(kAnswerNegativeInfinity);
  // As many turns for each thread of a warp: one that has left a loop early must not meet the
  // shuffles and the barrier below before its warp.
#pragma unroll 1
  for (int first = 0; first < token_count_; first += kThreads) {
    const int i = first + thread_;
    const bool there = i < token_count_, exact = there && Exact()[i] != 0;
    if (exact) list[atomicAdd(&s_.exact_count, 1)] = i;
    largest = Max4(largest, there && !exact ? TokenLogits()[i] : Filled4(kAnswerNegativeInfinity));
  }
  __syncwarp();
  const float warp_largest = WarpJoin4<false>(largest);
  if (lane_ % 8 == 0) s_.warp_coded[4 * warp_ + lane_ / 8] = warp_largest;
  __syncthreads();
}

// ---- phase 5: the state
// --------------------------------------------------------------------------

__device__ __forceinline__ float HeadOf(float4 x, int head) {
  return head == 0 ? x.x : head == 1 ? x.y : head == 2 ? x.z : x.w;
}

// The value means of touched clusters, each by the weights of its coded tokens.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::SumTouched() {
  const int head = lane_ % 4, step = plan_.blocks * kWarps;
  const float shift = ZeroIfNone(HeadOf(state_max_, head));
  const float* logits = Array<float>(plan_.token_logits);
  const bool there = head < plan_.params.group;
  int e = rank_ * kWarps + warp_;
  float4 next = Filled4(0);
  const auto fetch = [&](int entry) {
    return reinterpret_cast<const float4*>(ValueMean(Listed()[entry]))[lane_];
  };
  if (e < listed_count_) next = fetch(e);
#pragma unroll 1
  for (; e < listed_count_; e += step) {
    const float4 row = next;
    if (e + step < listed_count_) next = fetch(e + step);
    const int end = ListedStart()[e + 1];
    float weight = 0;
#pragma unroll 1
    for (int t = ListedStart()[e] + lane_ / 4; t < end; t += 8) {
      if (there && !Exact()[t]) weight += Exp2(logits[4 * t + head] - shift);
    }
    weights_ += weight;
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) {
      weight += __shfl_xor_sync(kFullMask, weight, offset);
    }
#pragma unroll
    for (int h = 0; h < kAnswerHeads; ++h) {
      AddScaled4(state_[h], __shfl_sync(kFullMask, weight, h), row);
    }
  }
}

// The exponent that brings weight × scale of the warp's tokens under 2^14, so that it is a half.
template <int kThreads>
__device__ __forceinline__ int PairAnswer<kThreads>::ValueExponent(int begin, int end) {
  int largest = 0;
#pragma unroll 1
  for (int tile = begin + warp_; tile < end; tile += kWarps) {
    const int local = tile - begin;
    uint2 scales;
    if (local < plan_.staged_tiles) {
      scales = *reinterpret_cast<const uint2*>(Array<unsigned char>(plan_.values) +
                                               (local * kAnswerTile + lane_ % kAnswerTile) *
                                                   kAnswerValueBytes);
    } else {
      scales = *reinterpret_cast<const uint2*>(CodesOfTile(tile) + 16);
    }
    largest = max(largest, static_cast<int>(max(scales.x & 0xffffu, scales.x >> 16)));
    largest = max(largest, static_cast<int>(max(scales.y & 0xffffu, scales.y >> 16)));
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullMask, largest, offset));
  }
  // A half's field e stands for [2^(e - 15), 2^(e - 14)).
  return 27 - (largest >> 10);
}

// Adds a tile's codes [16 channels × 16 tokens, per block of channels] times weight × scale [16
// tokens × 4 heads' high and low halves] to sum, and weight × (low - 4 scale) of the lane's four
// tokens, for head lane / 4 % 4, to lows.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::AddTile(int tile, int local, float up,
                                                              float (&sum)[8][4],
                                                              float (&lows)[kAnswerGroups]) {
  const int r = lane_ / 4, t = lane_ % 4, head = r % 4;
  const float shift = ZeroIfNone(HeadOf(state_max_, head));
  float weight[4];
  uint4 meta[4], bits[4][2];
  const bool staged = local < plan_.staged_tiles;
  const unsigned char* mine = staged ? nullptr : CodesOfTile(tile);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 2 * t + i % 2 + i / 2 * 8, token = tile * kAnswerTile + at;
    weight[i] = token < token_count_ && head < plan_.params.group && !Exact()[token]
                    ? Exp2(Array<float>(plan_.token_logits)[4 * token + head] - shift) * up
                    : 0.0f;
    if (staged) {
      const uint4* row = reinterpret_cast<const uint4*>(
          Array<unsigned char>(plan_.values) + (local * kAnswerTile + at) * kAnswerValueBytes);
      meta[i] = row[0];
      bits[i][0] = row[1];
      bits[i][1] = row[2];
    } else {
      const uint4* row = reinterpret_cast<const uint4*>(ShuffleAddress(mine, at));
      meta[i] = row[1];
      bits[i][0] = row[4];
      bits[i][1] = row[5];
    }
  }
#pragma unroll
  for (int g = 0; g < kAnswerGroups; ++g) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = HalfOfWords(meta[i].x, meta[i].y, g);
      const float low = HalfOfWords(meta[i].z, meta[i].w, g);
      x[i] = weight[i] * scale;
      lows[g] += weight[i] * low - 4.0f * x[i];
    }
    uint32_t high[2], rest[2];
    SplitHalves(x[0], x[1], &high[0], &rest[0]);
    SplitHalves(x[2], x[3], &high[1], &rest[1]);
    const uint32_t b0 = r < 4 ? high[0] : rest[0], b1 = r < 4 ? high[1] : rest[1];
#pragma unroll
    for (int block = 2 * g; block < 2 * g + 2; ++block) {
      uint32_t word[4], operand[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = WordOfFour(bits[i][block / 4], block % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // channels r and r + 8 of tokens 2t .. and 2t + 8 ..
        const uint32_t pair =
            __byte_perm(word[i / 2 * 2], word[i / 2 * 2 + 1], i % 2 == 0 ? 0x5410 : 0x7632);
        operand[i] = CodesOverFour(pair, 8 - 2 * r);
      }
      MmaHalf(sum[block], operand, b0, b1);
    }
  }
}

// Adds what AddTile summed to the warp's partial state.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::AddCodes(const float (&sum)[8][4],
                                                               float (&lows)[kAnswerGroups],
                                                               float down) {
  const int r = lane_ / 4, t = lane_ % 4, head = 2 * (t % 2);
  const bool upper = t >= 2;
  float low[kAnswerGroups][2];
#pragma unroll
  for (int g = 0; g < kAnswerGroups; ++g) {
    lows[g] += __shfl_xor_sync(kFullMask, lows[g], 1);
    lows[g] += __shfl_xor_sync(kFullMask, lows[g], 2);
    low[g][0] = __shfl_sync(kFullMask, lows[g], 4 * head);
    low[g][1] = __shfl_sync(kFullMask, lows[g], 4 * head + 4);
  }
  float* to = Partial() + (warp_ * kAnswerHeads + head) * kAnswerRow;
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    const int channel = block * kCodeBlock + r + (upper ? 8 : 0);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float get = __shfl_xor_sync(kFullMask, upper ? sum[block][j] : sum[block][2 + j], 2);
      const float all = (upper ? sum[block][2 + j] : sum[block][j]) + get;
      to[j * kAnswerRow + channel] +=
          (4.0f * all + low[block / 2][j]) * down * s_.inverse_v[channel];
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::SumCodes() {
  int begin, end;
  Share(token_count_, &begin, &end);
  if (begin + warp_ >= end) return;
  const int exponent = ValueExponent(begin, end);
  const float up = PowerOfTwo(exponent);
  float sum[8][4] = {}, lows[kAnswerGroups] = {};
#pragma unroll 1
  for (int tile = begin + warp_; tile < end; tile += kWarps) {
    AddTile(tile, tile - begin, up, sum, lows);
  }
  AddCodes(sum, lows, PowerOfTwo(-exponent));
}

// The block's part of the state, each channel to the block that writes it.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::SumState(int position) {
  const bool coded = plan_.refine && plan_.params.answer_scored;
  const float4 coded_max = coded ? CombineWarps(s_.warp_coded) : Filled4(kAnswerNegativeInfinity);
  state_max_ = Max4(coded_max, estimated_max_);
#pragma unroll
  for (int h = 0; h < kAnswerHeads; ++h) {
    const float factor = Exp2(HeadOf(estimated_max_, h) - ZeroIfNone(HeadOf(state_max_, h)));
    const float4 old = state_[h];
    state_[h] = Filled4(0);
    AddScaled4(state_[h], factor, old);
    if (lane_ % 4 == h) weights_ *= factor;
  }
  if (coded) SumTouched();
#pragma unroll
  for (int h = 0; h < kAnswerHeads; ++h) {
    reinterpret_cast<float4*>(Partial() + (warp_ * kAnswerHeads + h) * kAnswerRow)[lane_] =
        state_[h];
  }
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    weights_ += __shfl_xor_sync(kFullMask, weights_, offset);
  }
  if (lane_ < 4) s_.warp_weights[4 * warp_ + lane_] = weights_;
  __syncwarp();
  if (coded) SumCodes();
  if (thread_ < s_.exact_count) Array<int>(plan_.exact_position)[thread_] = position;
  __syncthreads();
  constexpr int kSize = kAnswerHeads * kAnswerDim;
  const int share = StateShare();
#pragma unroll
  for (int k = 0; k < kSize / kThreads; ++k) {
    const int i = thread_ + k * kThreads, owner = i / share;
    const float* from = Partial() + i / kAnswerDim * kAnswerRow + i % kAnswerDim;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += from[w * kAnswerHeads * kAnswerRow];
    float* to = &s_.state_parts[rank_ * share + i - owner * share];
    if (plan_.blocks == 1) {
      *to = sum;
    } else {
      StoreToBlock(to, owner, sum);
    }
  }
  if (thread_ < 4 * plan_.blocks) {
    float sum = 0;
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) sum += s_.warp_weights[4 * w + thread_ % 4];
    float* to = reinterpret_cast<float*>(&s_.block_weights[rank_]) + thread_ % 4;
    if (plan_.blocks == 1) {
      *to = sum;
    } else {
      StoreToBlock(to, thread_ / 4, sum);
    }
  }
}

// ---- phase 6: results
// ----------------------------------------------------------------------------

// Position of the thread's exact tokens: asked for early, for the last block's WriteSelection.
template <int kThreads>
__device__ __forceinline__ int PairAnswer<kThreads>::ExactPosition(int i) {
  if (rank_ != plan_.blocks - 1 || i >= s_.exact_count) return 0;
  const int token = Array<int>(plan_.exact_token)[i];
  const DeviceIndexPart& part = PartOf(Listed()[TokenEntry()[token]]);
  return *reinterpret_cast<const int32_t*>(Element(part.positions, part.tokens, SlotOf(token)));
}

// The exact zone by ascending position: each token's place is the number of smaller positions.
// After a barrier that follows the writing of exact_position.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::WriteSelection(const SelectCudaOutput& out,
                                                                     int row) {
  const int* positions = Array<int>(plan_.exact_position);
  const int exact = s_.exact_count;
  const int64_t to = static_cast<int64_t>(row) * out.max_exact;
  for (int i = thread_; i < exact; i += kThreads) {
    const int position = positions[i], token = Array<int>(plan_.exact_token)[i];
    int place = 0;
    for (int j = 0; j < exact; ++j) place += positions[j] < position ? 1 : 0;
    const int cluster = Listed()[TokenEntry()[token]];
    int part;
    PartOf(cluster, &part);
    out.positions[to + place] = position;
    out.parts[to + place] = part;
    out.slots[to + place] = SlotOf(token);
    if (out.clusters != nullptr) out.clusters[to + place] = cluster;
  }
  const int64_t list = static_cast<int64_t>(row) * out.max_listed;
  if (out.scored_clusters != nullptr) {
    for (int i = thread_; i < min(listed_count_, out.max_listed); i += kThreads) {
      out.scored_clusters[list + i] = Listed()[i];
    }
  }
  if (out.estimated_clusters != nullptr) {
    for (int i = thread_; i < min(estimated_count_, out.max_listed); i += kThreads) {
      out.estimated_clusters[list + i] = Estimated()[i];
    }
  }
  if (thread_ != 0) return;
  const bool coded = plan_.refine && plan_.params.answer_scored;
  out.exact_count[row] = exact;
  if (out.scored_count != nullptr) out.scored_count[row] = listed_count_;
  if (out.estimated_count != nullptr) out.estimated_count[row] = estimated_count_;
  if (out.coded_tokens != nullptr) out.coded_tokens[row] = coded ? token_count_ - exact : 0;
}

// `any`: the state is not empty.
template <int kThreads>
__device__ __forceinline__ float PairAnswer<kThreads>::StateWeight(int head, bool any) const {
  float total = 0;
  for (int k = 0; any && k < plan_.blocks; ++k) {
    total += reinterpret_cast<const float*>(&s_.block_weights[k])[head];
  }
  return total;
}
template <int kThreads>
__device__ __forceinline__ float PairAnswer<kThreads>::StateNumber(int i, bool any) const {
  const int share = StateShare();
  const float total = StateWeight((rank_ * share + i) / kAnswerDim, any);
  float sum = 0;
  for (int k = 0; any && k < plan_.blocks; ++k) sum += s_.state_parts[k * share + i];
  return total > 0 ? sum / total : 0.0f;
}
template <int kThreads>
__device__ __forceinline__ float PairAnswer<kThreads>::StateLse(int head, bool any) const {
  const float total = StateWeight(head, any);
  return total > 0 ? (HeadOf(state_max_, head) + log2f(total)) * kLn2 : kAnswerNegativeInfinity;
}

// The block's channels of the state.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::WriteState(const SelectCudaOutput& out,
                                                                 int row, bool any) {
  const int group = plan_.params.group, share = StateShare();
  for (int i = thread_; i < share; i += kThreads) {
    const int number = rank_ * share + i;
    if (number >= group * kAnswerDim) continue;
    out.state_output[static_cast<int64_t>(row) * group * kAnswerDim + number] = StateNumber(i, any);
  }
  if (rank_ == 0 && thread_ < group) {
    out.state_lse[static_cast<int64_t>(row) * group + thread_] = StateLse(thread_, any);
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::Finish(const float* queries,
                                                             const SelectCudaOutput& out, int row) {
  Answer(queries, Writer{out, row});
}

template <int kThreads>
template <typename Taker>
__device__ __forceinline__ void PairAnswer<kThreads>::Answer(const float* queries,
                                                             const Taker& taker) {
  PrepareQueries(queries);
  ClusterWait(plan_.blocks);
  ScoreCentroids();
  ClusterArrive(plan_.blocks);
  ScoreSinks();
  PrepareCodeQueries();
  ClusterWait(plan_.blocks);
  ChooseClusters();
  ListClusters();
  if (plan_.refine) {
    ScoreTokens();
  } else {
    SumEstimated();
  }
  ChooseExact();
  if (rank_ == plan_.blocks - 1) taker.Exact(*this);
  const int position = ExactPosition(thread_);
  const bool any = estimated_count_ > 0 ||
                   (plan_.refine && plan_.params.answer_scored && token_count_ > s_.exact_count);
  int* positions = Array<int>(plan_.exact_position);
  const int exact = s_.exact_count;
  if (any && !plan_.refine) __syncthreads();  // all have read what SumState overwrites
  if (rank_ == plan_.blocks - 1) {
    for (int i = thread_ + kThreads; i < exact; i += kThreads) positions[i] = ExactPosition(i);
  }
  if (any) SumState(position);
  if (!any) {
    if (thread_ < exact) positions[thread_] = position;
    __syncthreads();
  }
  ClusterArrive(plan_.blocks);
  if (rank_ == plan_.blocks - 1) taker.Selection(*this);
  ClusterWait(plan_.blocks);
  taker.State(*this, any);
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_INL_CUH_
