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
    const uint32_t* first = view.pages + begin / view.elements_per_page;
    const uint32_t* last = view.pages + (begin + rows - 1) / view.elements_per_page;
    for (const uint32_t* at = first; at <= last; at += kLineBytes / 4) PrefetchL2(at);
    PrefetchL2(last);
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::LoadSizes() {
  int* slots = Array<int>(plan_.slots);
  for (int k = 0; k < part_count_; ++k) {
    const DeviceIndexPart& part = parts_[k];
    const uint32_t base = static_cast<uint32_t>(kv_head_) * (part.clusters + 1);
#pragma unroll 4
    for (int i = thread_; i < part.clusters; i += kThreads) {
      const int begin = *part.cluster_begin.As<int32_t>(base + i);
      const int end = *part.cluster_begin.As<int32_t>(base + i + 1);
      Sizes()[part.first_cluster + i] = end - begin;
      slots[part.first_cluster + i] = begin;
    }
  }
}

// Rows r and r + 8 of the tile for lanes 4 r ..; behind the last cluster the last.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::LocateCentroids(int tile) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int cluster = min(tile * kAnswerTile + lane_ / 4 + 8 * i, clusters_ - 1);
    const DeviceIndexPart& part = PartOf(cluster);
    centroid_[i] = Element(part.centroids, part.clusters, cluster - part.first_cluster);
  }
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
  ClusterArrive(plan_.blocks);
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
  if (tile_ < tile_end_) {
    LocateCentroids(tile_);
    FetchCentroids<0>();
    FetchCentroids<1>();
  }
  // Channels: [3, D] of the first part: metric weight, K balance, V balance.
  const int channel = thread_ % kAnswerDim;
  const float* channels = parts_[0].channels.template As<float>(kv_head_);
  weight_ = channels[channel];
  balance_ = channels[kAnswerDim + channel];
  const float value_balance = channels[2 * kAnswerDim + channel];
  LoadSizes();
  if (plan_.refine) PrefetchPages();
  if (thread_ < kAnswerDim) s_.inverse_v[channel] = 1.0f / value_balance;
#pragma unroll
  for (int h = 0; h < kAnswerHeads; ++h) state_[h] = Filled4(0);
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
  const int exponent = largest > 0 ? static_cast<int>(__float_as_uint(largest) >> 23) - 127 : 0;
  const float unit = exp2f(static_cast<float>(exponent - 11)), inverse = 1.0f / unit;
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
  for (int tile = tile_; tile < tile_end_; tile += kWarps) {
    const bool more = tile + kWarps < tile_end_;
    if (more) LocateCentroids(tile + kWarps);
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

// ---- phases 2 and 4: ranks
// -----------------------------------------------------------------------

// Of each head: log2 of the sum of 2^logit over clusters that are not empty, or over tokens and
// sinks; +infinity for heads that there are not. One barrier.
template <int kThreads>
template <bool kClusters>
__device__ __forceinline__ float4 PairAnswer<kThreads>::SoftmaxLogSums(const float4* logits,
                                                                       int n) {
  const float4* sinks = Array<float4>(plan_.sinks);
  const int extra = kClusters ? 0 : sinks_;
  float4 largest = Filled4(kAnswerNegativeInfinity), sum = Filled4(0);
#pragma unroll 4
  for (int i = thread_; i < n; i += kThreads) {
    if (!kClusters || Sizes()[i] > 0) largest = Max4(largest, logits[i]);
  }
  for (int i = thread_; i < extra; i += kThreads) largest = Max4(largest, sinks[i]);
  const float warp_largest = WarpJoin4<false>(largest);
  const float4 shift = Spread4(ZeroIfNone(warp_largest), 8);
  const auto add = [&](float4 x) {
    sum = Add4(sum, make_float4(Exp2(x.x - shift.x), Exp2(x.y - shift.y), Exp2(x.z - shift.z),
                                Exp2(x.w - shift.w)));
  };
#pragma unroll 4
  for (int i = thread_; i < n; i += kThreads) {
    if (!kClusters || Sizes()[i] > 0) add(logits[i]);
  }
  for (int i = thread_; i < extra; i += kThreads) add(sinks[i]);
  const float warp_sum = WarpJoin4<true>(sum);
  if (lane_ % 8 == 0) {
    s_.warp_max[4 * warp_ + lane_ / 8] = warp_largest;
    s_.warp_sum[4 * warp_ + lane_ / 8] = warp_sum;
  }
  __syncthreads();
  float all = kAnswerNegativeInfinity, total = 0;
#pragma unroll
  for (int i = lane_; i < 4 * kWarps; i += kWarp) all = fmaxf(all, s_.warp_max[i]);
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    all = fmaxf(all, __shfl_xor_sync(kFullMask, all, offset));
  }
  all = ZeroIfNone(all);
#pragma unroll
  for (int i = lane_; i < 4 * kWarps; i += kWarp) {
    total += s_.warp_sum[i] * Exp2(s_.warp_max[i] - all);
  }
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    total += __shfl_xor_sync(kFullMask, total, offset);
  }
  const float log_sum = total > 0 ? all + log2f(total) : 0.0f;
  return Spread4(lane_ % 4 < plan_.params.group ? log_sum : -kAnswerNegativeInfinity, 1);
}

// Keys() = RankKey of the sum over the heads of the softmax, and how many items, and of clusters
// how many tokens, each range of keys has. Logarithms, so that nothing underflows. Two barriers.
template <int kThreads>
template <bool kClusters>
__device__ __forceinline__ void PairAnswer<kThreads>::RankItems(const float4* logits, int n) {
  const float4 log_sum = SoftmaxLogSums<kClusters>(logits, n);
#pragma unroll 4
  for (int i = thread_; i < n; i += kThreads) {
    const int size = kClusters ? Sizes()[i] : 1;
    const float4 x = logits[i];
    const float a = x.x - log_sum.x, b = x.y - log_sum.y, c = x.z - log_sum.z, d = x.w - log_sum.w;
    const float largest = ZeroIfNone(fmaxf(fmaxf(a, b), fmaxf(c, d)));
    const float sum = Exp2(a - largest) + Exp2(b - largest) + Exp2(c - largest) + Exp2(d - largest);
    const uint32_t key = RankKey(largest + log2f(sum));
    Keys()[i] = key;
    if (size <= 0) continue;
    const int bin = KeyRange(key);
    atomicAdd(&s_.bin_counts[bin], 1);
    if (kClusters) atomicAdd(&s_.threshold.histogram[bin], static_cast<uint32_t>(size));
  }
  __syncthreads();
}

// Sums over the threads before this one, and over all. One barrier, and one between two calls.
template <int kThreads>
__device__ __forceinline__ int2 PairAnswer<kThreads>::ScanBlock(int2 x, int2* total) {
  int2 inclusive = x;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int a = __shfl_up_sync(kFullMask, inclusive.x, offset);
    const int b = __shfl_up_sync(kFullMask, inclusive.y, offset);
    if (lane_ >= offset) inclusive = make_int2(inclusive.x + a, inclusive.y + b);
  }
  if (lane_ == kWarp - 1) s_.scan[warp_] = inclusive;
  __syncthreads();
  int2 before = make_int2(0, 0), all = make_int2(0, 0);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int2 of = s_.scan[w];
    all = make_int2(all.x + of.x, all.y + of.y);
    if (w < warp_) before = make_int2(before.x + of.x, before.y + of.y);
  }
  *total = all;
  return make_int2(before.x + inclusive.x - x.x, before.y + inclusive.y - x.y);
}

// The thread's bins, and in *before the sums of the bins before them.
template <int kThreads>
template <bool kTokens>
__device__ __forceinline__ void PairAnswer<kThreads>::CountBins(
    int (&tokens)[kHistogramBins / kThreads], int (&counts)[kHistogramBins / kThreads],
    int2* before) {
  constexpr int kBins = kHistogramBins / kThreads;
  int2 sum = make_int2(0, 0), total;
#pragma unroll
  for (int j = 0; j < kBins; ++j) {
    const int bin = thread_ * kBins + j;
    tokens[j] = kTokens ? static_cast<int>(s_.threshold.histogram[bin]) : 0;
    counts[j] = s_.bin_counts[bin];
    sum = make_int2(sum.x + tokens[j], sum.y + counts[j]);
  }
  *before = ScanBlock(sum, &total);
}

// ---- phase 2: clusters
// ---------------------------------------------------------------------------

// Marks the clusters to score, `room` tokens of them, and cuts the last one's size. Where the range
// of keys in which the room ends holds too many, they are left to ChooseClustersSlowly.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseTouched(int room) {
  ThresholdScratch& t = s_.threshold;
  const int bin = s_.found_bin;
  const bool all = bin < 0 && room > 0;
#pragma unroll 4
  for (int i = thread_; i < clusters_; i += kThreads) {
    const int size = Sizes()[i];
    const uint32_t key = Keys()[i];
    const int range = KeyRange(key);
    Kinds()[i] = size > 0 && (all || range < bin) ? 1 : 0;
    if (size <= 0 || range != bin) continue;
    const int at = atomicAdd(&s_.candidates, 1);
    if (at >= kThresholdCandidates) continue;
    t.candidate_keys[at] = key;
    t.candidate_weights[at] = size;
    t.candidate_indices[at] = i;
  }
  __syncthreads();
  const int candidates = s_.candidates;
  if (candidates > kThresholdCandidates) return;
  for (int c = thread_; c < candidates; c += kThreads) {
    const uint32_t key = t.candidate_keys[c];
    const int index = t.candidate_indices[c], size = t.candidate_weights[c];
    int before = s_.found_tokens, place = s_.found_count;
    for (int j = 0; j < candidates; ++j) {
      const uint32_t other = t.candidate_keys[j];
      const bool first = other > key || (other == key && t.candidate_indices[j] < index);
      before += first ? t.candidate_weights[j] : 0;
      place += first ? 1 : 0;
    }
    s_.places[c] = place;
    if (before >= room) continue;
    Kinds()[index] = 1;
    if (before + size >= room) {
      Sizes()[index] = room - before;
      s_.touched = place + 1;
    }
  }
  __syncthreads();
}

// Marks the `wanted` clusters that follow in rank. counts: of the thread's bins, `before` of those
// before them.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseEstimated(
    int wanted, const int (&counts)[kHistogramBins / kThreads], int before) {
  constexpr int kBins = kHistogramBins / kThreads;
  ThresholdScratch& t = s_.threshold;
  const int end = s_.touched + wanted, candidates = s_.candidates;
  for (int c = thread_; c < candidates; c += kThreads) {
    const int index = t.candidate_indices[c];
    if (s_.places[c] >= s_.touched && s_.places[c] < end) Kinds()[index] = 2;
  }
#pragma unroll
  for (int j = 0; j < kBins; ++j) {
    if (before < end && before + counts[j] >= end) {
      s_.found_bin2 = thread_ * kBins + j;
      s_.found_count2 = before;
    }
    before += counts[j];
  }
  __syncthreads();
  const int bin = s_.found_bin, last = s_.found_bin2 < 0 ? kHistogramBins : s_.found_bin2;
#pragma unroll 4
  for (int i = thread_; i < clusters_; i += kThreads) {
    const uint32_t key = Keys()[i];
    const int range = KeyRange(key);
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
    int place = s_.found_count2;
    for (int j = 0; j < others; ++j) {
      const uint32_t other = t.candidate_keys[j];
      place += other > key || (other == key && t.candidate_indices[j] < index) ? 1 : 0;
    }
    if (place < end) Kinds()[index] = 2;
  }
  __syncthreads();
}

// The same by a search over all bits of the keys, for many clusters of nearly equal rank. With
// room < 0 the touched ones stay as they are.
template <int kThreads>
__device__ __noinline__ void ChooseSlowly(int room, int wanted, int n, const uint32_t* keys,
                                          int* sizes, unsigned char* kinds,
                                          ThresholdScratch& scratch) {
  const auto key = [&](int i) { return keys[i]; };
  int total;
  if (room >= 0) {
    const auto size = [&](int i) { return sizes[i]; };
    const Threshold threshold = RadixThreshold<kThreads>(n, room, key, size, scratch);
    OrderedTake<kThreads>(
        n, threshold, key, size, scratch,
        [&](int i, int take, int, int) {
          kinds[i] = take > 0 ? 1 : 0;
          if (take > 0) sizes[i] = take;
        },
        &total);
  }
  const auto free = [&](int i) { return sizes[i] > 0 && kinds[i] != 1 ? 1 : 0; };
  const Threshold last = RadixThreshold<kThreads>(n, wanted, key, free, scratch);
  OrderedTake<kThreads>(
      n, last, key, free, scratch,
      [&](int i, int take, int, int) {
        if (kinds[i] != 1) kinds[i] = take > 0 && wanted > 0 ? 2 : 0;
      },
      &total);
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseClusters() {
  constexpr int kBins = kHistogramBins / kThreads;
  const SelectCudaParams& p = plan_.params;
  const int room = max(p.scored_tokens, max(0, p.budget_tokens - sinks_));
  const int wanted = static_cast<int>(static_cast<double>(p.estimated_fraction) * clusters_);
  RankItems<true>(ClusterLogits(), clusters_);
  int tokens[kBins], counts[kBins];
  int2 before;
  CountBins<true>(tokens, counts, &before);
  int above = before.x, above_count = before.y;
#pragma unroll
  for (int j = 0; j < kBins; ++j) {
    if (above < room && above + tokens[j] >= room) {
      s_.found_bin = thread_ * kBins + j;
      s_.found_tokens = above;
      s_.found_count = above_count;
    }
    above += tokens[j];
    above_count += counts[j];
  }
  __syncthreads();
  ChooseTouched(room);
  const bool slow = s_.candidates > kThresholdCandidates;
  const bool remaining = s_.found_bin >= 0 || room <= 0;  // clusters for the estimated zone
  if (!slow && wanted > 0 && remaining) ChooseEstimated(wanted, counts, before.y);
  if (slow || s_.candidates2 > kThresholdCandidates) {
    ChooseSlowly<kThreads>(slow ? room : -1, wanted, clusters_, Keys(), Sizes(), Kinds(),
                           s_.threshold);
  }
}

// The touched clusters in order, where their tokens begin, and the estimated ones.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ListClusters() {
  const int* slots = Array<int>(plan_.slots);
  float4 largest = Filled4(kAnswerNegativeInfinity);
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
    const int2 before = ScanBlock(mine, &total);
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
        const float log_size = log2f(static_cast<float>(Sizes()[i]));
        largest = Max4(largest, Add4(ClusterLogits()[i], Filled4(log_size)));
      }
    }
    listed_count_ += total.y & 0xffff;
    token_count_ += total.x;
    estimated_count_ += total.y >> 16;
  }
  const float warp_largest = WarpJoin4<false>(largest);
  if (lane_ % 8 == 0) s_.warp_estimated[4 * warp_ + lane_ / 8] = warp_largest;
  if (thread_ == 0) {
    ListedStart()[listed_count_] = static_cast<uint16_t>(token_count_);
    s_.found_bin = -1;
    s_.found_count = s_.candidates = 0;
  }
  for (int i = thread_; i < kHistogramBins; i += kThreads) s_.bin_counts[i] = 0;
  __syncthreads();
  estimated_max_ = CombineWarps(s_.warp_estimated);
  ListTokens();
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ListTokens() {
  for (int e = warp_; e < listed_count_; e += kWarps) {
    const int end = ListedStart()[e + 1];
    for (int t = ListedStart()[e] + lane_; t < end; t += kWarp) {
      TokenEntry()[t] = static_cast<uint16_t>(e);
    }
  }
  __syncthreads();
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
__device__ __forceinline__ uint32_t WordOfFour(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}
// The codes at bits b and b + 16 of a word, left = 8 - b, as the halves 1 + code / 4: the bits
// become a mantissa's leading ones, no conversion. Scales and lows make good for it:
// low + scale · code = (low - 4 scale) + 4 scale · (1 + code / 4).
__device__ __forceinline__ uint32_t CodesOverFour(uint32_t word, int left) {
  return (__funnelshift_l(word, word, static_cast<uint32_t>(left)) & 0x03000300u) | 0x3c003c00u;
}

// Key codes of the tile's tokens r and r + 8 into codes_; value codes on their way to shared
// memory.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::FetchCodes(int tile) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = min(tile * kAnswerTile + lane_ / 4 + 8 * i, token_count_ - 1);
    code_row_[i] = CodesOf(token);
    const uint4* row = reinterpret_cast<const uint4*>(code_row_[i]);
    codes_[i][0] = row[0];
    codes_[i][1] = row[2];
    codes_[i][2] = row[3];
  }
}
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::StageValues(int local) {
  using Address = unsigned long long;  // NOLINT(runtime/int): what shuffles take
  if (local >= plan_.staged_tiles) return;
  unsigned char* to = Array<unsigned char>(plan_.values) + local * kAnswerTile * kAnswerValueBytes;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    // Pieces of 16 bytes: scales and lows, bits, bits.
    const int piece = lane_ + k * kWarp, token = piece / 3, part = piece % 3;
    const Address low =
        __shfl_sync(kFullMask, reinterpret_cast<Address>(code_row_[0]), token % 8 * 4);
    const Address high =
        __shfl_sync(kFullMask, reinterpret_cast<Address>(code_row_[1]), token % 8 * 4);
    const unsigned char* from = reinterpret_cast<const unsigned char*>(token < 8 ? low : high);
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

// Asks for the value means that the block will read.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::PrefetchMeans() {
  const int step = plan_.blocks * kThreads, first = rank_ * kThreads + thread_;
  for (int i = first; i < 4 * estimated_count_; i += step) {
    PrefetchL2(ValueMean(Estimated()[i / 4]) + i % 4 * 128);
  }
  const int listed = plan_.refine && plan_.params.answer_scored ? listed_count_ : 0;
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
  if (tile < end) FetchCodes(tile);
  if (tile < end) StageValues(tile - begin);
  PrefetchMeans();
  for (; tile < end; tile += kWarps) {
    const uint4 codes[2][3] = {{codes_[0][0], codes_[0][1], codes_[0][2]},
                               {codes_[1][0], codes_[1][1], codes_[1][2]}};
    if (tile + kWarps < end) {
      FetchCodes(tile + kWarps);
      StageValues(tile + kWarps - begin);
    }
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
  for (int first = (rank_ * kWarps + warp_) * kRows; first < estimated_count_;
       first += plan_.blocks * kWarps * kRows) {
    float4 rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int cluster = Estimated()[min(first + i, estimated_count_ - 1)];
      rows[i] = reinterpret_cast<const float4*>(ValueMean(cluster))[lane_];
    }
    // Lane 4 i + h: cluster i's weight for head h.
    const int mine = first + lane_ / 4;
    float weight = 0;
    if (mine < estimated_count_ && head < plan_.params.group) {
      const int cluster = Estimated()[mine];
      const float logit = Array<float>(plan_.cluster_logits)[4 * cluster + head];
      weight = Exp2(logit + log2f(static_cast<float>(Sizes()[cluster])) - shift);
    }
    weights_ += weight;
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

// Marks the `wanted` tokens of the largest keys and lists them in any order; leaves in warp_coded
// the largest logits of the others. Where too many tokens share a range, as ChooseTouched.
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseExactAmong(int wanted) {
  constexpr int kBins = kHistogramBins / kThreads;
  ThresholdScratch& s = s_.threshold;
  int tokens[kBins], counts[kBins];
  int2 before;
  CountBins<false>(tokens, counts, &before);
  int above = before.y;
#pragma unroll
  for (int j = 0; j < kBins; ++j) {
    if (above < wanted && above + counts[j] >= wanted) {
      s_.found_bin = thread_ * kBins + j;
      s_.found_count = above;
    }
    above += counts[j];
  }
  __syncthreads();
  const bool all = wanted >= token_count_;
  const int bin = s_.found_bin;
  const auto add = [&](int token) {
    Array<int>(plan_.exact_token)[atomicAdd(&s_.exact_count, 1)] = token;
  };
  float4 largest = Filled4(kAnswerNegativeInfinity);
#pragma unroll 4
  for (int i = thread_; i < token_count_; i += kThreads) {
    const uint32_t key = Keys()[i];
    const int range = KeyRange(key);
    const bool exact = all || range < bin;
    Exact()[i] = exact;
    if (exact) {
      add(i);
    } else if (range > bin) {
      largest = Max4(largest, TokenLogits()[i]);
    } else {
      const int at = atomicAdd(&s_.candidates, 1);
      if (at >= kThresholdCandidates) continue;
      s.candidate_keys[at] = key;
      s.candidate_indices[at] = i;
    }
  }
  __syncthreads();
  const int candidates = s_.candidates;
  for (int c = thread_; c < candidates && candidates <= kThresholdCandidates; c += kThreads) {
    const uint32_t key = s.candidate_keys[c];
    const int token = s.candidate_indices[c];
    int place = s_.found_count;
    for (int j = 0; j < candidates; ++j) {
      const uint32_t other = s.candidate_keys[j];
      place += other > key || (other == key && s.candidate_indices[j] < token) ? 1 : 0;
    }
    Exact()[token] = place < wanted;
    if (place < wanted) {
      add(token);
    } else {
      largest = Max4(largest, TokenLogits()[token]);
    }
  }
  const float warp_largest = WarpJoin4<false>(largest);
  if (lane_ % 8 == 0) s_.warp_coded[4 * warp_ + lane_ / 8] = warp_largest;
  __syncthreads();
}

// The same by a search over all bits of the keys.
template <int kThreads>
__device__ __noinline__ int TakeExactSlowly(int wanted, int n, const uint32_t* keys,
                                            unsigned char* exact, int* exact_token,
                                            ThresholdScratch& scratch) {
  const auto key = [&](int i) { return keys[i]; };
  const auto one = [](int) { return 1; };
  const Threshold threshold = RadixThreshold<kThreads>(n, wanted, key, one, scratch);
  int total;
  return OrderedTake<kThreads>(
      n, threshold, key, one, scratch,
      [&](int i, int take, int index, int) {
        exact[i] = take > 0;
        if (take > 0) exact_token[index] = i;
      },
      &total);
}
template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseExactSlowly(int wanted) {
  const int count = TakeExactSlowly<kThreads>(wanted, token_count_, Keys(), Exact(),
                                              Array<int>(plan_.exact_token), s_.threshold);
  float4 largest = Filled4(kAnswerNegativeInfinity);
  for (int i = thread_; i < token_count_; i += kThreads) {
    if (!Exact()[i]) largest = Max4(largest, TokenLogits()[i]);
  }
  const float warp_largest = WarpJoin4<false>(largest);
  if (lane_ % 8 == 0) s_.warp_coded[4 * warp_ + lane_ / 8] = warp_largest;
  if (thread_ == 0) s_.exact_count = count;
  __syncthreads();
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::ChooseExact() {
  if (!plan_.refine) {
    for (int t = thread_; t < token_count_; t += kThreads) Array<int>(plan_.exact_token)[t] = t;
    if (thread_ == 0) s_.exact_count = token_count_;
    __syncthreads();
    return;
  }
  const int wanted = min(token_count_, max(0, plan_.params.budget_tokens - sinks_));
  RankItems<false>(TokenLogits(), token_count_);
  ChooseExactAmong(wanted);
  if (s_.candidates > kThresholdCandidates) ChooseExactSlowly(wanted);
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
  for (; e < listed_count_; e += step) {
    const float4 row = next;
    if (e + step < listed_count_) next = fetch(e + step);
    const int end = ListedStart()[e + 1];
    float weight = 0;
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
  for (int tile = begin + warp_; tile < end; tile += kWarps) {
    if (lane_ >= kAnswerTile) continue;
    const int local = tile - begin;
    uint2 scales;
    if (local < plan_.staged_tiles) {
      scales = *reinterpret_cast<const uint2*>(Array<unsigned char>(plan_.values) +
                                               (local * kAnswerTile + lane_) * kAnswerValueBytes);
    } else {
      const int token = min(tile * kAnswerTile + lane_, token_count_ - 1);
      scales = *reinterpret_cast<const uint2*>(CodesOf(token) + 16);
    }
    largest = max(largest, static_cast<int>(max(scales.x & 0xffffu, scales.x >> 16)));
    largest = max(largest, static_cast<int>(max(scales.y & 0xffffu, scales.y >> 16)));
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullMask, largest, offset));
  }
  // A half's field e stands for [2^(e - 15), 2^(e - 14)).
  return 27 - (__shfl_sync(kFullMask, largest, 0) >> 10);
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
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 2 * t + i % 2 + i / 2 * 8, token = tile * kAnswerTile + at;
    weight[i] = token < token_count_ && head < plan_.params.group && !Exact()[token]
                    ? Exp2(Array<float>(plan_.token_logits)[4 * token + head] - shift)
                    : 0.0f;
    if (local < plan_.staged_tiles) {
      const uint4* row = reinterpret_cast<const uint4*>(
          Array<unsigned char>(plan_.values) + (local * kAnswerTile + at) * kAnswerValueBytes);
      meta[i] = row[0];
      bits[i][0] = row[1];
      bits[i][1] = row[2];
    } else {
      const uint4* row = reinterpret_cast<const uint4*>(CodesOf(min(token, token_count_ - 1)));
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
    SplitHalves(x[0] * up, x[1] * up, &high[0], &rest[0]);
    SplitHalves(x[2] * up, x[3] * up, &high[1], &rest[1]);
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
          (4.0f * all * down + low[block / 2][j]) * s_.inverse_v[channel];
    }
  }
}

template <int kThreads>
__device__ __forceinline__ void PairAnswer<kThreads>::SumCodes() {
  int begin, end;
  Share(token_count_, &begin, &end);
  if (begin + warp_ >= end) return;
  const int exponent = ValueExponent(begin, end);
  const float up = exp2f(static_cast<float>(exponent));
  float sum[8][4] = {}, lows[kAnswerGroups] = {};
#pragma unroll 1
  for (int tile = begin + warp_; tile < end; tile += kWarps) {
    AddTile(tile, tile - begin, up, sum, lows);
  }
  AddCodes(sum, lows, 1.0f / up);
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
