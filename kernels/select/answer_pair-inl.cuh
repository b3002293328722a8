// The bodies of PairAnswer (answer_pair.cuh), which alone includes this.
#ifndef CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_INL_CUH_
#define CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_INL_CUH_

namespace clusterkv::kernels::cuda {

// ---- what needs no query
// ------------------------------------------------------------------------

template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::CopyParts(
    const SelectCudaPair& pair) {
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
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::PrefetchPages() {
  constexpr int kViews = 4, kLineBytes = 128;
  for (int i = thread_; i < kViews * part_count_; i += kThreads) {
    const DeviceIndexPart& part = parts_[i / kViews];
    const bool means = i % kViews == 0;
    const DevicePagedView& view = means             ? part.value_means
                                  : i % kViews == 1 ? part.codes
                                  : i % kViews == 2 ? part.positions
                                                    : part.records;
    const uint32_t rows = static_cast<uint32_t>(means ? part.clusters : part.tokens);
    if (rows == 0 || view.elements_per_page == 0) continue;
    const uint32_t begin = static_cast<uint32_t>(kv_head_) * rows;
    const uint32_t* first = view.pages + view.PageOf(begin);
    const uint32_t* last = view.pages + view.PageOf(begin + rows - 1);
    for (const uint32_t* at = first; at <= last; at += kLineBytes / 4) PrefetchL2(at);
    PrefetchL2(last);
  }
}

template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::LoadSizes() {
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
template <int kThreads, bool kLarge>
__device__ __forceinline__ const unsigned char* PairAnswer<kThreads, kLarge>::CentroidOfTile(
    int tile) const {
  const int cluster = min(tile * kAnswerTile + lane_ % kAnswerTile, clusters_ - 1);
  const DeviceIndexPart& part = PartOf(cluster);
  return Element(part.centroids, part.clusters, cluster - part.first_cluster);
}
template <int kThreads, bool kLarge>
__device__ __forceinline__ unsigned char* PairAnswer<kThreads, kLarge>::CentroidRing(
    int turn) const {
  return Array<unsigned char>(plan_.centroids) +
         (warp_ * plan_.centroid_stages + turn) * kAnswerSliceBytes;
}

// The warp's next slice of centroids on its way to place `turn` of the ring, 16 rows of
// kAnswerSliceRow bytes; none behind the last tile. One group of copies. The halves of every other
// row change places: so lanes that read two rows at once find them in different banks.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::FetchCentroids(int turn) {
  constexpr int kCopies = kAnswerTile / 4;
  if (tile_ < tile_end_) {
    const int row = lane_ / 8, chunk = lane_ % 8;
    if (slice_ == 0) {
      const unsigned char* mine = CentroidOfTile(tile_);
#pragma unroll
      for (int k = 0; k < kCopies; ++k) {
        centroid_[k] = ShuffleAddress(mine, row + 4 * k) + 16 * chunk;
      }
    }
    unsigned char* to = CentroidRing(turn) + row * kAnswerSliceRow + 16 * (chunk ^ row % 2 * 4);
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      CopyAsync16OfLine(to + 4 * k * kAnswerSliceRow, centroid_[k]);
      centroid_[k] += kAnswerSliceRow;
    }
    if (++slice_ == kAnswerSlices) {
      slice_ = 0;
      tile_ += kWarps;
    }
  }
  CopyAsyncCommit();
}

template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::Begin(const SelectCudaPair& pair) {
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
  weight_ = channels[channel];
  balance_ = channels[kAnswerDim + channel];
  const float value_balance = channels[2 * kAnswerDim + channel];
#pragma unroll 1
  for (int turn = 0; turn < plan_.centroid_stages; ++turn) FetchCentroids(turn);
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

__device__ __forceinline__ float HeadOf(float4 x, int head) {
  return head == 0 ? x.x : head == 1 ? x.y : head == 2 ? x.z : x.w;
}

// -126 <= exponent <= 127.
__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// A head's query as operands of half products, by one warp: column `head` its numbers' high halves,
// column head + 4 what these lack. Divided by a power of two, which is returned, that brings its
// largest channel to [2^11, 2^12). channel(step, t, j): which one is number j of lane t of a
// product, in the order in which lanes read what it is multiplied by.
template <int kThreads, bool kLarge>
template <typename Channel>
__device__ __forceinline__ float PairAnswer<kThreads, kLarge>::MakeOperands(
    const float* query, int head, uint2 (*operands)[kWarp], const Channel& channel) {
  static_assert(kAnswerDim == 4 * kWarp);
  float largest = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fabsf(query[k * kWarp + lane_]));
  // Powers stay normal; infinite queries give no numbers, as they should.
  const int field = static_cast<int>(__float_as_uint(WarpMax(largest)) >> 23);
  const int exponent = min(max(field, 30), 240) - 127;
  const float inverse = PowerOfTwo(11 - exponent);
  const int step = lane_ / 4, t = lane_ % 4;
  float x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = query[channel(step, t, j)] * inverse;
  uint2 high, low;
  SplitHalves(x[0], x[1], &high.x, &low.x);
  SplitHalves(x[2], x[3], &high.y, &low.y);
  operands[step][4 * head + t] = high;
  operands[step][4 * (head + 4) + t] = low;
  return PowerOfTwo(exponent - 11);
}

// Scales' factors of products with codes, then lows', over kSumUnit: sums of 32 numbers below 2^12.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::PrepareCodeSums(int head,
                                                                              float inverse) {
  float sums[kAnswerGroups];
#pragma unroll
  for (int g = 0; g < kAnswerGroups; ++g) sums[g] = WarpSum(s_.balanced[head][g * kWarp + lane_]);
  const int g = lane_ % 2 * 2;
  const float two[2] = {g == 0 ? sums[0] : sums[2], g == 0 ? sums[1] : sums[3]};
  const float factor = (lane_ < 2 ? -1.0f : 0.25f) * inverse / kSumUnit;
  uint32_t sum_high, sum_low;
  SplitHalves(two[0] * factor, two[1] * factor, &sum_high, &sum_low);
  if (lane_ < 4) {
    s_.sum_query[4 * head + lane_] = sum_high;
    s_.sum_query[4 * (head + 4) + lane_] = sum_low;
  }
}

// A warp for each head and operand.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::PrepareQueries(const float* queries) {
  const int channel = thread_ % kAnswerDim;
#pragma unroll
  for (int k = 0; k < kAnswerHeads * kAnswerDim / kThreads; ++k) {
    const int h = thread_ / kAnswerDim + k * (kThreads / kAnswerDim);
    const float query = h < Heads() ? queries[h * kAnswerDim + channel] : 0.0f;
    const float raw = query * plan_.params.scale * kLog2E;
    s_.raw[h][channel] = raw;
    s_.query[h][channel] = raw / weight_;
    s_.balanced[h][channel] = raw / weight_ / balance_;
  }
  __syncthreads();
  static_assert(kWarps >= 2 * kAnswerHeads);
  const int head = warp_ % kAnswerHeads;
  if (warp_ < kAnswerHeads) {
    const float unit =
        MakeOperands(s_.query[head], head, s_.centroid_query, [](int step, int t, int j) {
          return 64 * (step / 4) + 32 * (step / 2 % 2) + 8 * t + 4 * (step % 2) + j;
        });
    if (lane_ == 0) reinterpret_cast<float*>(&s_.centroid_unit)[head] = unit;
  } else if (plan_.refine && warp_ < 2 * kAnswerHeads) {
    const float unit =
        MakeOperands(s_.balanced[head], head, s_.code_query, [](int block, int t, int j) {
          return block * kCodeBlock + ChannelOfIndex(2 * t + j % 2 + j / 2 * 8);
        });
    if (lane_ == 0) s_.code_unit[head] = unit;
    PrepareCodeSums(head, 1.0f / unit);
  }
  __syncthreads();
}

// ---- phase 1: centroids
// --------------------------------------------------------------------------

// Of a product of 16 rows whose columns are four heads' high and low parts: the four heads of row
// r (even lanes) or r + 8 (odd lanes).
template <int kThreads, bool kLarge>
__device__ __forceinline__ float4 PairAnswer<kThreads, kLarge>::TileRow(float (&sum)[4]) const {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
  const bool odd = lane_ % 2 == 1;
  const float get0 = __shfl_xor_sync(kFullMask, odd ? sum[0] : sum[2], 1);
  const float get1 = __shfl_xor_sync(kFullMask, odd ? sum[1] : sum[3], 1);
  return odd ? make_float4(get0, get1, sum[2], sum[3]) : make_float4(sum[0], sum[1], get0, get1);
}

// Gives a row that TileRow returned to every block of the quad, in whose shared memory it has one
// place; lanes 2 apart share the blocks.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::Publish(float4* row, float4 logits) {
  const int first = lane_ / 2 % 2;
  if (plan_.quad_blocks == 1) {
    if (first == 0) *row = logits;
    return;
  }
#pragma unroll 1
  for (int k = first; k < plan_.quad_blocks; k += 2) StoreToBlock(row, BlockOf(k), logits);
}

// Adds the products of a tile's slice with the query to sums: several chains, for sums of many
// products lose bits.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::MultiplySlice(int slice, int turn,
                                                                            float (&sums)[4][4]) {
  const int r = lane_ / 4, t = lane_ % 4;
  const unsigned char* rows = CentroidRing(turn) + r * kAnswerSliceRow + 16 * t;
  uint4 x[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[j][i] = *reinterpret_cast<const uint4*>(rows + 8 * i * kAnswerSliceRow + 64 * (j ^ r % 2));
    }
  }
  __syncwarp();
  FetchCentroids(turn);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint4 x0 = x[j][0], x1 = x[j][1];
    const uint32_t operands[2][4] = {{x0.x, x1.x, x0.y, x1.y}, {x0.z, x1.z, x0.w, x1.w}};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint2 q = s_.centroid_query[4 * slice + 2 * j + e][lane_];
      MmaHalf(sums[2 * j + e], operands[e], q.x, q.y);
    }
  }
}

template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ScoreCentroids() {
  int begin, end, turn = 0;
  Share(clusters_, &begin, &end);
#pragma unroll 1
  for (int tile = begin + warp_; tile < end; tile += kWarps) {
    float sums[4][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < kAnswerSlices; ++slice) {
      CopyAsyncWaitAtMost(plan_.centroid_stages - 1);
      __syncwarp();
      MultiplySlice(slice, turn, sums);
      turn = turn + 1 == plan_.centroid_stages ? 0 : turn + 1;
    }
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    const float4 logits = Mul4(TileRow(sum), s_.centroid_unit);
    const int cluster = tile * kAnswerTile + lane_ / 4 + lane_ % 2 * 8;
    if (cluster >= clusters_) continue;
    if (!IsFar()) {
      Publish(Array<float4>(plan_.cluster_logits) + cluster, logits);
    } else if (lane_ / 2 % 2 == 0) {
      far_[cluster] = logits;
    }
  }
}

// Sinks' logits by their keys as they came.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ScoreSinks() {
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

// Items to rank and choose among: clusters, or tokens. Arrays are offsets into dynamic shared
// memory, so that the compiler knows where they point.
struct AnswerItems {
  int shared;  // AnswerShared
  int logits;  // float4 [n]
  int sizes;   // [n], 0: no item; -1: 1 each
  int kinds;   // [n]: 1: chosen, else 0
  int keys;    // [n]
  int sinks;   // float4 [sink_count]: beside them in the softmax
  int n, sink_count;
  int heads;
  int room;    // items are chosen in order of rank until their sizes fill it; the last one is cut
  int peer;    // the other quad's block that chooses the same; -1: there is none
  int blocks;  // of the cluster
  const float4* far;  // the logits, where they are in memory, else null

  template <bool kLarge>
  __device__ __forceinline__ float4 Logits(int i) const {
    if (kLarge && far != nullptr) return LoadFar(far + i);
    return reinterpret_cast<const float4*>(SharedMemory() + logits)[i];
  }
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
template <int kThreads, bool kLarge>
__device__ __forceinline__ float4 SoftmaxLogSums(const AnswerItems& items, AnswerShared& s) {
  constexpr int kWarps = kThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const float4* sinks = reinterpret_cast<const float4*>(SharedMemory() + items.sinks);
  const int* sizes = reinterpret_cast<const int*>(SharedMemory() + items.sizes);
  // Loads from memory in flight; else short code, which is read anew for each query.
  [[maybe_unused]] constexpr int kUnroll = kLarge ? 4 : 1;
  float4 largest = Filled4(kAnswerNegativeInfinity), sum = Filled4(0);
#pragma unroll kUnroll
  for (int i = thread; i < items.n; i += kThreads) {
    if (items.sizes < 0 || sizes[i] > 0) largest = Max4(largest, items.Logits<kLarge>(i));
  }
#pragma unroll 1
  for (int i = thread; i < items.sink_count; i += kThreads) largest = Max4(largest, sinks[i]);
  const float warp_largest = WarpJoin4<false>(largest);
  const float4 shift = Spread4(ZeroIfNone(warp_largest), 8);
#pragma unroll kUnroll
  for (int i = thread; i < items.n; i += kThreads) {
    if (items.sizes < 0 || sizes[i] > 0) sum = Add4(sum, Exp2Of4(items.Logits<kLarge>(i), shift));
  }
#pragma unroll 1
  for (int i = thread; i < items.sink_count; i += kThreads) {
    sum = Add4(sum, Exp2Of4(sinks[i], shift));
  }
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
  return Spread4(lane % 4 < items.heads ? log_sum : -kAnswerNegativeInfinity, 1);
}

// log2 of 2^x + 2^y; the same whichever comes first.
__device__ __forceinline__ float Log2OfSum(float x, float y) {
  const float largest = ZeroIfNone(fmaxf(x, y));
  return largest + Log2(Exp2(x - largest) + Exp2(y - largest));
}

// keys = RankKey of the sum over the heads of the softmax, and how many items and how much size
// each range of keys has. Logarithms, so that nothing underflows. Two barriers, and where there is
// another quad one of the cluster.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void RankItems(const AnswerItems& items, AnswerShared& s) {
  const int* sizes = reinterpret_cast<const int*>(SharedMemory() + items.sizes);
  uint32_t* keys = reinterpret_cast<uint32_t*>(SharedMemory() + items.keys);
  const float4 log_sum = SoftmaxLogSums<kThreads, kLarge>(items, s);
  const auto share_of = [&log_sum](float4 x) {
    const float4 y =
        make_float4(x.x - log_sum.x, x.y - log_sum.y, x.z - log_sum.z, x.w - log_sum.w);
    const float largest = ZeroIfNone(fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
    const float4 part = Exp2Of4(y, Filled4(largest));
    return largest + Log2((part.x + part.y) + (part.z + part.w));
  };
  const bool two = kLarge && items.peer >= 0;
  float* shares = reinterpret_cast<float*>(keys);  // the other quad's, until keys take their place
  if (two) {
    for (int i = static_cast<int>(threadIdx.x); i < items.n; i += kThreads) {
      StoreToBlock(shares + i, items.peer, share_of(items.Logits<kLarge>(i)));
    }
    __syncwarp();
    ClusterArrive(items.blocks);
    ClusterWait(items.blocks);
  }
  constexpr int kBatch = kLarge ? 4 : 1;  // loads from memory in flight: none may pass a store
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < items.n; first += kBatch * kThreads) {
    float4 x[kBatch];
    int size[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = min(first + j * kThreads, items.n - 1);
      x[j] = items.Logits<kLarge>(i);
      size[j] = items.sizes < 0 ? 1 : sizes[i];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads;
      const float share = share_of(x[j]);
      const uint32_t key = RankKey(two ? Log2OfSum(share, i < items.n ? shares[i] : 0.0f) : share);
      const int bin = AnswerRange(key);
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
template <int kThreads, bool kLarge>
__device__ __noinline__ void ChooseItems(AnswerItems items) {
  AnswerShared& s = *reinterpret_cast<AnswerShared*>(SharedMemory() + items.shared);
  int* sizes = reinterpret_cast<int*>(SharedMemory() + items.sizes);
  unsigned char* kinds = SharedMemory() + items.kinds;
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(SharedMemory() + items.keys);
  ThresholdScratch& t = s.threshold;
  const int thread = static_cast<int>(threadIdx.x), room = items.room;
  RankItems<kThreads, kLarge>(items, s);
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
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ChooseEstimated(int wanted) {
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

template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ChooseClusters() {
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
                             Heads(),
                             room,
                             Peer(),
                             plan_.blocks,
                             IsFar() ? far_ : nullptr};
  ChooseItems<kThreads, kLarge>(items);
  const bool slow = s_.candidates > kThresholdCandidates;
  const bool remaining = s_.found_bin >= 0 || room <= 0;  // clusters for the estimated zone
  if (!slow && wanted > 0 && remaining) ChooseEstimated(wanted);
  if (slow || s_.candidates2 > kThresholdCandidates) {
    ChooseSlowly<kThreads>(items, slow, wanted);
  }
}

// The touched clusters in order, where their tokens begin, and the estimated ones.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ListClusters() {
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
  for (int i = thread_; plan_.refine && i < kHistogramBins; i += kThreads) {
    s_.bin_counts[i] = 0;
    s_.threshold.histogram[i] = 0;
  }
  __syncthreads();
  ListTokens();
}

// Each token's place in the list of clusters, and the largest logits of the estimated zone.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ListTokens() {
#pragma unroll 1
  for (int e = thread_ / 8; e < listed_count_; e += kThreads / 8) {
    const int end = ListedStart()[e + 1];
#pragma unroll 1
    for (int t = ListedStart()[e] + lane_ % 8; t < end; t += 8) {
      TokenEntry()[t] = static_cast<uint16_t>(e);
    }
  }
  estimated_max_ = Filled4(kAnswerNegativeInfinity);
  if (estimated_count_ == 0) {
    __syncthreads();
    return;
  }
  float4 largest = estimated_max_;
#pragma unroll 1
  for (int i = thread_; i < estimated_count_; i += kThreads) {
    const int cluster = Estimated()[i];
    const float log_size = Log2(static_cast<float>(Sizes()[cluster]));
    largest = Max4(largest, Add4(ClusterLogits(cluster), Filled4(log_size)));
  }
  const float warp_largest = WarpJoin4<false>(largest);
  if (lane_ % 8 == 0) s_.warp_estimated[4 * warp_ + lane_ / 8] = warp_largest;
  __syncthreads();
  estimated_max_ = CombineWarps(s_.warp_estimated);
}

// The largest of each head over the warps.
template <int kThreads, bool kLarge>
__device__ __forceinline__ float4
PairAnswer<kThreads, kLarge>::CombineWarps(const float* of_warps) const {
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
template <int kThreads, bool kLarge>
__device__ __forceinline__ const unsigned char* PairAnswer<kThreads, kLarge>::CodesOfTile(
    int tile) {
  return CodesOf(min(tile * kAnswerTile + lane_ % kAnswerTile, token_count_ - 1));
}

// Place `turn` of the warp's ring: a tile's codes of one side, 48 bytes a token: scales and lows,
// bits.
template <int kThreads, bool kLarge>
__device__ __forceinline__ unsigned char* PairAnswer<kThreads, kLarge>::CodeRing(int turn) const {
  return Array<unsigned char>(plan_.codes) +
         (warp_ * plan_.code_stages + turn) * kAnswerTile * kAnswerSideBytes;
}

// Key or value codes of a tile on their way to place `turn` of the ring. `mine`: CodesOfTile.
template <int kThreads, bool kLarge>
template <bool kValues>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::CopyCodes(const unsigned char* mine,
                                                                        int turn) {
  unsigned char* to = CodeRing(turn);
  constexpr int kMeta = kValues ? 16 : 0, kBits = kValues ? 64 : 32;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int piece = lane_ + k * kWarp, token = piece / 3, part = piece % 3;
    const unsigned char* from = ShuffleAddress(mine, token % kAnswerTile);
    if (token < kAnswerTile) {
      CopyAsync16OfLine(to + piece * 16, from + (part == 0 ? kMeta : kBits - 16 + 16 * part));
    }
  }
}
// Of the warp's first tiles as many as the ring has places for; one group of copies for each place.
template <int kThreads, bool kLarge>
template <bool kValues>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::FillRing() {
  int begin, end;
  Share(token_count_, &begin, &end);
#pragma unroll 1
  for (int turn = 0; turn < plan_.code_stages; ++turn) {
    const int tile = begin + warp_ + turn * kWarps;
    if (tile < end) CopyCodes<kValues>(CodesOfTile(tile), turn);
    CopyAsyncCommit();
  }
}
// Calls use(tile, rows, done) for each of the warp's tiles, `rows` its place in the ring; use calls
// done() when it has read them, so that the place takes another tile meanwhile. After FillRing.
template <int kThreads, bool kLarge>
template <bool kValues, typename Use>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ForTiles(const Use& use) {
  int begin, end, turn = 0;
  Share(token_count_, &begin, &end);
#pragma unroll 1
  for (int tile = begin + warp_; tile < end; tile += kWarps) {
    CopyAsyncWaitAtMost(plan_.code_stages - 1);
    __syncwarp();
    use(tile, CodeRing(turn), [&] {
      __syncwarp();
      const int next = tile + plan_.code_stages * kWarps;
      if (next < end) CopyCodes<kValues>(CodesOfTile(next), turn);
      CopyAsyncCommit();
    });
    turn = turn + 1 == plan_.code_stages ? 0 : turn + 1;
  }
}

// Logits of a tile's tokens: codes [16 tokens × 16 channels] times the query [16 channels × 4
// heads' high and low halves], scales and lows [16 tokens × 8] times the query's sums, and their
// clusters' logits.
template <int kThreads, bool kLarge>
template <typename Done>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ScoreTile(int tile,
                                                                        const unsigned char* rows,
                                                                        const Done& done) {
  const int r = lane_ / 4, t = lane_ % 4;
  uint2 scales[2];
  uint4 bits[2][2];
  uint32_t meta[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned char* row = rows + (r + 8 * i) * kAnswerSideBytes;
    scales[i] = *reinterpret_cast<const uint2*>(row);
    meta[i] = reinterpret_cast<const uint32_t*>(row)[t];
    bits[i][0] = reinterpret_cast<const uint4*>(row)[1];
    bits[i][1] = reinterpret_cast<const uint4*>(row)[2];
  }
  done();
  float logit[4] = {0, 0, 0, 0};
  MmaHalf(logit, meta, s_.sum_query[lane_], 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) logit[i] *= kSumUnit;
#pragma unroll
  for (int g = 0; g < kAnswerGroups; ++g) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int block = 2 * g; block < 2 * g + 2; ++block) {
      const uint2 q = s_.code_query[block][lane_];
      uint32_t operand[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = WordOfFour(bits[i][block / 4], block % 4);
        operand[i] = CodesOverFour(word, 8 - 4 * t);
        operand[2 + i] = CodesOverFour(word, 6 - 4 * t);
      }
      MmaHalf(sum, operand, q.x, q.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logit[i] += HalfOfWords(scales[i / 2].x, scales[i / 2].y, g) * sum[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) logit[i] *= 4.0f * s_.code_unit[2 * t % 4 + i % 2];
  const float4 residual = TileRow(logit);
  const int token = tile * kAnswerTile + r + t % 2 * 8;
  if (token < token_count_) {
    const float4 cluster = ClusterLogits(Listed()[TokenEntry()[token]]);
    Publish(TokenLogits() + token, Add4(residual, cluster));
  }
}

// Asks for the value means of a list of clusters, which all blocks will read.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::PrefetchMeans(const uint16_t* list,
                                                                            int count) {
  constexpr int kLine = 128, kLines = kAnswerRowBytes / kLine;
  const int step = plan_.quad_blocks * kThreads;
#pragma unroll 1
  for (int i = rank_ * kThreads + thread_; i < kLines * count; i += step) {
    PrefetchL2(ValueMean(list[i / kLines]) + i % kLines * kLine);
  }
}

// After the cluster's next barrier every block has all tokens' logits.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ScoreTokens() {
  FillRing<false>();
  // A block alone with a quad has its tokens to ask for, and waits longer for the lists.
  if (plan_.quad_blocks > 1) {
    PrefetchMeans(Estimated(), estimated_count_);
    if (plan_.params.answer_scored) PrefetchMeans(Listed(), listed_count_);
  }
  ForTiles<false>(
      [&](int tile, const unsigned char* rows, const auto& done) { ScoreTile(tile, rows, done); });
  __syncwarp();
  ClusterArrive(plan_.blocks);
  if (plan_.params.answer_scored) FillRing<true>();
}

// Where the warp's partial state has number i of a pair of blocks of channels, as the lane has it
// of JoinMeans: two channels by two heads.
template <int kThreads, bool kLarge>
__device__ __forceinline__ float* PairAnswer<kThreads, kLarge>::PartialOf(int block_pair, int i) {
  const int r = lane_ / 4, t = lane_ % 4, block = 2 * block_pair + t / 2;
  const int channel = 64 * (block / 4) + 8 * r + 2 * (block % 4) + i / 2;
  return Partial() + (warp_ * kAnswerHeads + 2 * (t % 2) + i % 2) * kAnswerRow + channel;
}

// The products' sums, times `inverse`, as state_ has them. Lanes 2 apart have the heads' high and
// low parts; each keeps one of two blocks.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::JoinMeans(
    const float (&sums)[8][4], float inverse, float (&joined)[4][4]) const {
  const bool upper = lane_ % 4 >= 2;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = sums[2 * p][i], b = sums[2 * p + 1][i];
      const float get = __shfl_xor_sync(kFullMask, upper ? a : b, 2);
      joined[p][i] = ((upper ? b : a) + get) * inverse;
    }
  }
}

// The warp's part of the sum of the value means of a list's `count` clusters, 16 at a time, on the
// matrix unit: means [16 channels × 16 clusters, per block of channels] times weights [16 clusters
// × 4 heads' high and low halves]. weigh(i): the weight of cluster i of the list for head
// lane / 4 % 4; times `unit` it is a half. The last warps have the first clusters: of the first
// ones a taker has more to do.
template <int kThreads, bool kLarge>
template <typename Weigh>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::SumMeans(const uint16_t* list,
                                                                       int count, float unit,
                                                                       const Weigh& weigh,
                                                                       float (&joined)[4][4]) {
  const int r = lane_ / 4, t = lane_ % 4;
  float sums[8][4] = {};
#pragma unroll 1
  for (int first = ((kWarps - 1 - warp_) * plan_.quad_blocks + rank_) * kAnswerTile; first < count;
       first += plan_.quad_blocks * kWarps * kAnswerTile) {
    // The lane's clusters are first + 4 t .., its channels 8 r .. and 64 + 8 r ..
    const unsigned char* row = ValueMean(list[min(first + lane_ % kAnswerTile, count - 1)]);
    uint4 x[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = ShuffleAddress(row, 4 * t + i) + 16 * r;
      x[i][0] = *reinterpret_cast<const uint4*>(from);
      x[i][1] = *reinterpret_cast<const uint4*>(from + kAnswerRowBytes / 2);
    }
    // Lanes r and r + 4 are of one head: each weighs two of the four clusters.
    const int mine = first + 4 * t + r / kAnswerHeads * 2;
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[i] = mine + i < count ? weigh(mine + i) : 0.0f;
      weights_ += weight[i];
    }
    const float other[2] = {__shfl_xor_sync(kFullMask, weight[0], kWarp / 2),
                            __shfl_xor_sync(kFullMask, weight[1], kWarp / 2)};
    const bool low = r >= kAnswerHeads;
    uint32_t operand[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool own = (i == 1) == low;
      uint32_t high_half, low_half;
      SplitHalves((own ? weight[0] : other[0]) * unit, (own ? weight[1] : other[1]) * unit,
                  &high_half, &low_half);
      operand[i] = low ? low_half : high_half;
    }
#pragma unroll
    for (int block = 0; block < 8; ++block) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = WordOfFour(x[i][block / 4], block % 4);
      const uint32_t means[4] = {
          __byte_perm(word[0], word[1], 0x5410), __byte_perm(word[0], word[1], 0x7632),
          __byte_perm(word[2], word[3], 0x5410), __byte_perm(word[2], word[3], 0x7632)};
      MmaHalf(sums[block], means, operand[0], operand[1]);
    }
  }
  JoinMeans(sums, 1.0f / unit, joined);
}

// The estimated clusters' part of the state, relative to estimated_max_.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::SumEstimated() {
  const int head = lane_ / 4 % kAnswerHeads;
  const float shift = ZeroIfNone(HeadOf(estimated_max_, head));
  const auto weigh = [&](int i) {
    if (head >= Heads()) return 0.0f;
    const int cluster = Estimated()[i];
    const float logit = IsFar() ? LoadFar(reinterpret_cast<const float*>(far_ + cluster) + head)
                                : Array<float>(plan_.cluster_logits)[4 * cluster + head];
    return Exp2(logit + Log2(static_cast<float>(Sizes()[cluster])) - shift);
  };
  SumMeans(Estimated(), estimated_count_, kMeanUnit, weigh, state_);
}

// ---- phase 4: the exact zone
// ---------------------------------------------------------------------

// The tokens of the largest ranks, in any order; leaves in warp_coded the largest logits of the
// others.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::ChooseExact() {
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
                             Heads(),
                             max(0, plan_.params.budget_tokens - sinks_),
                             Peer(),
                             plan_.blocks,
                             nullptr};
  ChooseItems<kThreads, kLarge>(items);
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

// Makes weights of the tokens' logits, relative to state_max_; none of the exact zone's. Ends with
// a barrier.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::WeighTokens() {
  const float4 shift = ZeroIfNone4(state_max_);
  const int heads = Heads();
#pragma unroll 4
  for (int i = thread_; i < token_count_; i += kThreads) {
    const float4 weight = Exp2Of4(TokenLogits()[i], shift);
    const bool coded = Exact()[i] == 0;
    TokenLogits()[i] =
        make_float4(coded ? weight.x : 0.0f, coded && heads > 1 ? weight.y : 0.0f,
                    coded && heads > 2 ? weight.z : 0.0f, coded && heads > 3 ? weight.w : 0.0f);
  }
  __syncthreads();
}

// Adds the value means of touched clusters, each by the weights of its coded tokens, to the warp's
// partial state.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::SumTouched() {
  const float* weights = Array<float>(plan_.token_logits) + lane_ / 4 % kAnswerHeads;
  const auto weigh = [&](int i) {
    const int last = ListedStart()[i + 1];
    float sum = 0;
#pragma unroll 4
    for (int t = ListedStart()[i]; t < last; ++t) sum += weights[kAnswerHeads * t];
    return sum;
  };
  float joined[4][4];
  SumMeans(Listed(), listed_count_, plan_.touched_unit, weigh, joined);
#pragma unroll
  for (int p = 0; p < 4; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) *PartialOf(p, i) += joined[p][i];
  }
}

// What a warp sums of its tiles' value codes.
template <int kThreads, bool kLarge>
struct PairAnswer<kThreads, kLarge>::CodeSums {
  float codes[8][4] = {};  // times 2^exponent(): weight × scale below 2^14 is a half
  float meta[4] = {};      // times kWeightUnit
  int field = 0;           // of the largest scale's exponent: of [2^(field - 15), 2^(field - 14))

  __device__ __forceinline__ int exponent() const { return 27 - field; }
  __device__ __forceinline__ void Raise(int of_tile) {
    if (of_tile <= field) return;
    const float factor = PowerOfTwo(field - of_tile);
#pragma unroll
    for (auto& block : codes) {
#pragma unroll
      for (float& sum : block) sum *= factor;
    }
    field = of_tile;
  }
};

// The largest exponent's field among a tile's scales of values.
template <int kThreads, bool kLarge>
__device__ __forceinline__ int PairAnswer<kThreads, kLarge>::LargestScale(
    const unsigned char* rows) const {
  const uint2 scales =
      *reinterpret_cast<const uint2*>(rows + lane_ % kAnswerTile * kAnswerSideBytes);
  const uint32_t largest =
      max(max(scales.x & 0xffffu, scales.x >> 16), max(scales.y & 0xffffu, scales.y >> 16));
  return static_cast<int>(WarpMaxUnsigned(largest) >> 10);
}

// Adds a tile's codes [16 channels × 16 tokens, per block of channels] times weight × scale [16
// tokens × 4 heads' high and low halves] to sums.codes, and its scales and lows [8 × 16 tokens]
// times the weights to sums.meta.
template <int kThreads, bool kLarge>
template <typename Done>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::AddTile(int tile,
                                                                      const unsigned char* rows,
                                                                      const Done& done,
                                                                      CodeSums& sums) {
  const int r = lane_ / 4, t = lane_ % 4, head = r % 4;
  const int field = LargestScale(rows);
  float weight[4];
  uint2 scales[4];
  uint32_t own[4];  // half r of scales and lows
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 2 * t + i % 2 + i / 2 * 8, token = tile * kAnswerTile + at;
    weight[i] = token < token_count_ ? Array<float>(plan_.token_logits)[4 * token + head] : 0.0f;
    const unsigned char* row = rows + at * kAnswerSideBytes;
    scales[i] = *reinterpret_cast<const uint2*>(row);
    own[i] = reinterpret_cast<const uint16_t*>(row)[r];
  }
  // Column r: heads' high halves, then what these lack.
  const float without = r < 4 ? 0.0f : -1.0f;
  const auto operand_of = [without](float a, float b) {
    const uint32_t high = PackHalves(a, b);
    return PackHalves(a + without * HalfBitsToFloat(static_cast<uint16_t>(high)),
                      b + without * HalfBitsToFloat(static_cast<uint16_t>(high >> 16)));
  };
  const uint32_t meta[4] = {own[0] | own[1] << 16, 0, own[2] | own[3] << 16, 0};
  MmaHalf(sums.meta, meta, operand_of(weight[0] * kWeightUnit, weight[1] * kWeightUnit),
          operand_of(weight[2] * kWeightUnit, weight[3] * kWeightUnit));
  sums.Raise(field);
  const float up = PowerOfTwo(sums.exponent());
#pragma unroll
  for (int i = 0; i < 4; ++i) weight[i] *= up;
#pragma unroll
  for (int side = 0; side < 2; ++side) {  // 64 channels each
    uint4 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * t + i % 2 + i / 2 * 8;
      bits[i] = reinterpret_cast<const uint4*>(rows + at * kAnswerSideBytes)[1 + side];
    }
    if (side == 1) done();
#pragma unroll
    for (int g = 2 * side; g < 2 * side + 2; ++g) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = weight[i] * HalfOfWords(scales[i].x, scales[i].y, g);
      const uint32_t b0 = operand_of(x[0], x[1]), b1 = operand_of(x[2], x[3]);
#pragma unroll
      for (int block = 2 * g; block < 2 * g + 2; ++block) {
        uint32_t word[4], operand[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = WordOfFour(bits[i], block % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // channels r and r + 8 of tokens 2t .. and 2t + 8 ..
          const uint32_t pair =
              __byte_perm(word[i / 2 * 2], word[i / 2 * 2 + 1], i % 2 == 0 ? 0x5410 : 0x7632);
          operand[i] = CodesOverFour(pair, 8 - 2 * r);
        }
        MmaHalf(sums.codes[block], operand, b0, b1);
      }
    }
  }
}

// Adds what AddTile summed to the warp's partial state.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::AddCodes(const CodeSums& sums) {
  const int r = lane_ / 4, t = lane_ % 4, head = 2 * (t % 2);
  const bool upper = t >= 2;
  const float down = 4.0f * PowerOfTwo(-sums.exponent());
  // Rows of sums.meta: the groups' scales, then their lows. Lanes 2 apart have a head's halves.
  float low[kAnswerGroups][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float all =
        (sums.meta[j] + __shfl_xor_sync(kFullMask, sums.meta[j], 2)) * (1.0f / kWeightUnit);
#pragma unroll
    for (int g = 0; g < kAnswerGroups; ++g) {
      const float scale = __shfl_sync(kFullMask, all, 4 * g + t);
      low[g][j] = __shfl_sync(kFullMask, all, 4 * (g + kAnswerGroups) + t) - 4.0f * scale;
    }
  }
  float* to = Partial() + (warp_ * kAnswerHeads + head) * kAnswerRow;
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    const int channel = block * kCodeBlock + r + (upper ? 8 : 0);
    const auto& sum = sums.codes[block];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float get = __shfl_xor_sync(kFullMask, upper ? sum[j] : sum[2 + j], 2);
      const float all = (upper ? sum[2 + j] : sum[j]) + get;
      to[j * kAnswerRow + channel] += (all * down + low[block / 2][j]) * s_.inverse_v[channel];
    }
  }
}

// The warp's tiles. After ScoreTokens, which asked for the first of them.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::SumCodes() {
  CodeSums sums;
  ForTiles<true>([&](int tile, const unsigned char* rows, const auto& done) {
    AddTile(tile, rows, done, sums);
  });
  AddCodes(sums);
}

// Makes weights of logits, and the estimated clusters' part the warp's partial state.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::WeighState(bool coded) {
  const float4 coded_max = coded ? CombineWarps(s_.warp_coded) : Filled4(kAnswerNegativeInfinity);
  state_max_ = Max4(coded_max, estimated_max_);
  // The heads' factors from the estimated zone's shift to the state's.
  const auto factor_of = [this](int head) {
    return Exp2(HeadOf(estimated_max_, head) - ZeroIfNone(HeadOf(state_max_, head)));
  };
  weights_ *= factor_of(lane_ / 4 % kAnswerHeads);
  const float factor[2] = {factor_of(lane_ % 2 * 2), factor_of(lane_ % 2 * 2 + 1)};
#pragma unroll
  for (int p = 0; p < 4; ++p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) *PartialOf(p, i) = state_[p][i] * factor[i % 2];
  }
  if (coded) WeighTokens();
}

// The block's part of the state, each channel to the block that writes it. After WeighState.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::SumState(bool coded) {
  if (coded) SumTouched();
#pragma unroll
  for (int offset : {1, 2, kWarp / 2}) weights_ += __shfl_xor_sync(kFullMask, weights_, offset);
  if (lane_ % 4 == 0 && lane_ < kWarp / 2) s_.warp_weights[4 * warp_ + lane_ / 4] = weights_;
  __syncwarp();
  if (coded) SumCodes();
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
    if (plan_.quad_blocks == 1) {
      *to = sum;
    } else {
      StoreToBlock(to, BlockOf(owner), sum);
    }
  }
  if (thread_ < 4 * plan_.quad_blocks) {
    float sum = 0;
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) sum += s_.warp_weights[4 * w + thread_ % 4];
    float* to = reinterpret_cast<float*>(&s_.block_weights[rank_]) + thread_ % 4;
    if (plan_.quad_blocks == 1) {
      *to = sum;
    } else {
      StoreToBlock(to, BlockOf(thread_ / 4), sum);
    }
  }
}

// ---- phase 6: results
// ----------------------------------------------------------------------------

template <int kThreads, bool kLarge>
__device__ __forceinline__ int PairAnswer<kThreads, kLarge>::ExactPosition(int i) {
  int slot;
  const DeviceIndexPart& part = ExactToken(i, &slot);
  return *reinterpret_cast<const int32_t*>(Element(part.positions, part.tokens, slot));
}

// The exact zone by ascending position: each token's place is the number of smaller positions,
// which eight lanes count. After a barrier that follows the writing of exact_position.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::WriteSelection(
    const SelectCudaOutput& out, int row) {
  const int* positions = Array<int>(plan_.exact_position);
  const int exact = s_.exact_count;
  const int64_t to = static_cast<int64_t>(row) * out.max_exact;
  constexpr int kLanes = 8;
  for (int first = 0; first < exact; first += kThreads / kLanes) {
    const int i = first + thread_ / kLanes, lane = thread_ % kLanes;
    const int position = i < exact ? positions[i] : 0;
    int place = 0;
#pragma unroll 4
    for (int j = lane; j < exact; j += kLanes) place += positions[j] < position ? 1 : 0;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      place += __shfl_xor_sync(kFullMask, place, offset);
    }
    if (i >= exact || lane != 0) continue;
    const int token = Array<int>(plan_.exact_token)[i];
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

template <int kThreads, bool kLarge>
__device__ __forceinline__ float PairAnswer<kThreads, kLarge>::StateWeight(int head) const {
  float total = 0;
  for (int k = 0; k < plan_.quad_blocks; ++k) {
    total += reinterpret_cast<const float*>(&s_.block_weights[k])[head];
  }
  return total;
}
template <int kThreads, bool kLarge>
__device__ __forceinline__ float PairAnswer<kThreads, kLarge>::StateNumber(int i, bool any) const {
  if (!any) return 0.0f;
  const int share = StateShare();
  const float total = StateWeight((rank_ * share + i) / kAnswerDim);
  float sum = 0;
  for (int k = 0; k < plan_.quad_blocks; ++k) sum += s_.state_parts[k * share + i];
  return total > 0 ? sum / total : 0.0f;
}
template <int kThreads, bool kLarge>
__device__ __forceinline__ float PairAnswer<kThreads, kLarge>::StateLse(int i, bool any) const {
  const float total = any ? StateWeight(i) : 0.0f;
  return total > 0 ? (HeadOf(state_max_, i) + log2f(total)) * kLn2 : kAnswerNegativeInfinity;
}

// The block's channels of the state.
template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::WriteState(
    const SelectCudaOutput& out, int row, bool any) {
  const int group = plan_.params.group, count = StateCount();
  float* to = out.state_output + static_cast<int64_t>(row) * group * kAnswerDim + StateBegin();
  for (int i = thread_; i < count; i += kThreads) to[i] = StateNumber(i, any);
  if (thread_ < LseCount()) {
    out.state_lse[static_cast<int64_t>(row) * group + FirstHead() + thread_] =
        StateLse(thread_, any);
  }
}

template <int kThreads, bool kLarge>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::Finish(const SelectCudaOutput& out,
                                                                     int row) {
  Writer writer = {out, row};
  Answer(writer);
}

template <int kThreads, bool kLarge>
template <typename Taker>
__device__ __forceinline__ void PairAnswer<kThreads, kLarge>::Answer(Taker& taker) {
  ScoreCentroids();
  ClusterArrive(plan_.blocks);
  ScoreSinks();
  ClusterWait(plan_.blocks);
  ChooseClusters();
  ListClusters();
  if (plan_.refine) ScoreTokens();
  if (plan_.refine || estimated_count_ > 0) SumEstimated();
  if (plan_.refine) ClusterWait(plan_.blocks);
  ChooseExact();
  const bool last = IsLast();
  const bool coded = plan_.refine && plan_.params.answer_scored;
  const bool any = estimated_count_ > 0 || (coded && token_count_ > s_.exact_count);
  if (last) taker.Exact(*this);
  if (any && !plan_.refine) __syncthreads();  // all have read what WeighState overwrites
  if (any) WeighState(coded);
  if (last) taker.Pushed(*this);
  if (any) {
    SumState(coded);
  } else {
    CopyAsyncWait<0>();  // of codes that nobody reads: the place has other uses
    __syncthreads();
  }
  if (any) ClusterArrive(plan_.blocks);
  if (last) taker.Selection(*this);
  if (any) ClusterWait(plan_.blocks);
  taker.State(*this, any);
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_SELECT_ANSWER_PAIR_INL_CUH_
