// What the attention kernels share: a warp takes 16 tokens at a time, with 8 query heads as the
// rows of both matrix products (their high halves in rows 0-7, their low halves in rows 8-15).
//
//   scores [heads × tokens] = queries [heads × channels] · keys [channels × tokens]
//   output [heads × channels] += weights [heads × tokens] · values [tokens × channels]
//
// The first product leaves its result in the registers that the second wants it in, and keys and
// values go from memory to operands by 16-byte loads: channels are permuted so that what a lane
// loads is what it needs. Logits are in units of log2. Blocks have whole warps, as many as the
// kernel likes.
#ifndef CLUSTERKV_KERNELS_ATTENTION_ATTENTION_TILE_CUH_
#define CLUSTERKV_KERNELS_ATTENTION_ATTENTION_TILE_CUH_

#include <cstdint>

#include "kernels/attention/attention_cuda.h"
#include "kernels/base/cuda_util.cuh"

namespace clusterkv::kernels::cuda::attention {

constexpr int kTile = 16;  // tokens
constexpr int kHeads = 8;  // query heads of a block
constexpr int kSpan = 64;  // channels of one value load of a warp
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// A block's shared memory, in this order: units [8], sums [8], the ticket, all in the header; the
// query's fragments; the query [8, dim], later under the warps' partials. Offsets in bytes.
constexpr int kUnitOffset = 0;
constexpr int kQuerySumOffset = kUnitOffset + kHeads * 4;
constexpr int kTicketOffset = kQuerySumOffset + kHeads * 4;
constexpr int kHeaderBytes = 128;
static_assert(kTicketOffset + 4 <= kHeaderBytes);
__host__ __device__ constexpr int FragmentBytes(int steps) { return steps * 2 * kWarp * 16; }
__host__ __device__ constexpr int QueryOffset(int steps, int fragment_sets) {
  return kHeaderBytes + fragment_sets * FragmentBytes(steps);
}

__device__ __forceinline__ int Threads() { return static_cast<int>(blockDim.x); }

enum class Source { kFloat32, kFloat16, kBFloat16, kK8V4 };

// Four 32-bit operands of eight channels, and what is left of them where 16 bits hold too little.
struct Operands {
  uint32_t hi[4];
  uint32_t lo[4];
};

template <Source kSource>
struct Traits {
  static constexpr bool kHalfKeys = kSource == Source::kFloat16 || kSource == Source::kK8V4;
  static constexpr bool kHalfValues = kSource == Source::kFloat16;

  // Channels [channel, channel + 8) of a key.
  static __device__ __forceinline__ void LoadKey(const unsigned char* row, int channel,
                                                 Operands* out) {
    if constexpr (kSource == Source::kFloat32) {
      const float4* at = reinterpret_cast<const float4*>(row + 4 * channel);
      const float4 a = at[0], b = at[1];
      SplitBFloat16(a.x, a.y, &out->hi[0], &out->lo[0]);
      SplitBFloat16(a.z, a.w, &out->hi[1], &out->lo[1]);
      SplitBFloat16(b.x, b.y, &out->hi[2], &out->lo[2]);
      SplitBFloat16(b.z, b.w, &out->hi[3], &out->lo[3]);
    } else if constexpr (kSource == Source::kK8V4) {
      const uint2 codes = *reinterpret_cast<const uint2*>(row + 8 + channel);
      out->hi[0] = BytesToHalves(__byte_perm(codes.x, 0, 0x4140));
      out->hi[1] = BytesToHalves(__byte_perm(codes.x, 0, 0x4342));
      out->hi[2] = BytesToHalves(__byte_perm(codes.y, 0, 0x4140));
      out->hi[3] = BytesToHalves(__byte_perm(codes.y, 0, 0x4342));
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(row + 2 * channel);
      out->hi[0] = x.x;
      out->hi[1] = x.y;
      out->hi[2] = x.z;
      out->hi[3] = x.w;
    }
  }

  // Channels [channel, channel + 8) of a value, raw.
  static __device__ __forceinline__ void LoadValue(const unsigned char* row, int channel, int dim,
                                                   Operands* out) {
    if constexpr (kSource == Source::kK8V4) {
      // The two words of the block of 16; shifted so that the lane's half is in the low bits.
      const uint2 codes = *reinterpret_cast<const uint2*>(row + 8 + dim + channel / 16 * 8);
      out->hi[0] = codes.x >> (channel % 16 * 2);
      out->hi[1] = codes.y >> (channel % 16 * 2);
    } else {
      LoadKey(row, channel, out);
    }
  }

  // Channel i (0 to 7) of tokens a and b, from their loads.
  static __device__ __forceinline__ uint32_t Pair(const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                  int i) {
    if constexpr (kSource == Source::kK8V4) {
      const uint32_t codes = (a[i % 2] >> (i / 2 * 4) & 0xfu) | (b[i % 2] >> (i / 2 * 4) & 0xfu)
                                                                    << 16;
      return NibblesToBFloat16(codes);
    } else {
      return __byte_perm(a[i / 2], b[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

// Rows of a tile's tokens. Lane (r, t) = (lane / 4, lane % 4).
struct TileRows {
  const unsigned char* key[2];    // of tokens r, r + 8
  const unsigned char* value[4];  // of tokens 2t, 2t + 1, 2t + 8, 2t + 9
  uint32_t heads[4];              // of those: bits of the heads that attend, 0 past the end
};

// The running softmax of a warp's tokens: of head r; weight_sum and zero_sum over the lane's own
// tokens.
template <int kChunks>
struct Running {
  float largest = kNegativeInfinity;
  float weight_sum = 0;
  float zero_sum = 0;  // weight × value zero (K8V4)
  float output[kChunks * 8][4];
};

// What all warps of a block share.
struct BlockState {
  const uint4* query_raw;     // [steps, 2, 32]: fragments for raw keys
  const uint4* query_record;  // for records
  const float* unit;          // [8]: what the half fragments were divided by
  const float* query_sum;     // [8]: sum of the query's channels
  int dim, steps, first_channel;
};

// Queries as matrix operands: `to` [steps, 2, 32] of (hi, hi, lo, lo) pairs in the order of MMA's
// rows.
template <bool kHalf>
__device__ void MakeFragments(const float* query, const float* unit, int dim, int steps,
                              uint4* to) {
  for (int i = threadIdx.x; i < steps * 2 * kWarp; i += Threads()) {
    const int lane = i % kWarp, part = i / kWarp % 2, step = i / (2 * kWarp);
    const int r = lane / 4, channel = step * 32 + lane % 4 * 8 + part * 4;
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[j] = channel + j < dim ? query[r * dim + channel + j] / (kHalf ? unit[r] : 1.0f) : 0.0f;
    }
    uint4 fragment;
    if constexpr (kHalf) {
      SplitHalves(x[0], x[1], &fragment.x, &fragment.y);
      SplitHalves(x[2], x[3], &fragment.z, &fragment.w);
    } else {
      SplitBFloat16(x[0], x[1], &fragment.x, &fragment.y);
      SplitBFloat16(x[2], x[3], &fragment.z, &fragment.w);
    }
    to[i] = fragment;
  }
}

// Logits of head r and tokens 2t, 2t + 1, 2t + 8, 2t + 9.
template <Source kSource>
__device__ __forceinline__ void Score(const BlockState& b, const TileRows& rows, const uint4* query,
                                      float (&logits)[4]) {
  using T = Traits<kSource>;
  constexpr int kSteps = 4;  // whose keys are in flight together
  const int lane = threadIdx.x % kWarp;
  float sum[2][4] = {};
  for (int first = 0; first < b.steps; first += kSteps) {
    Operands keys[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int channel = (first + s) * 32 + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        keys[s][i] = {};
        if (channel < b.dim) T::LoadKey(rows.key[i], channel, &keys[s][i]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (first + s >= b.steps) break;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint4 q = query[((first + s) * 2 + part) * kWarp + lane];
        const uint32_t operand[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Operands& key = keys[s][i];
          if constexpr (T::kHalfKeys) {
            MmaHalf(sum[i], operand, key.hi[2 * part], key.hi[2 * part + 1]);
          } else {
            MmaBFloat16(sum[i], operand, key.hi[2 * part], key.hi[2 * part + 1]);
            if constexpr (kSource == Source::kFloat32) {
              MmaBFloat16(sum[i], operand, key.lo[2 * part], key.lo[2 * part + 1]);
            }
          }
        }
      }
    }
  }
  const float unit = T::kHalfKeys ? b.unit[lane / 4] : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) logits[i] = (sum[i / 2][i % 2] + sum[i / 2][i % 2 + 2]) * unit;
}

// Folds one tile into the running softmax.
template <Source kSource, int kChunks>
__device__ __forceinline__ void AttendTile(const BlockState& b, const TileRows& rows,
                                           const uint4* query, Running<kChunks>& run) {
  using T = Traits<kSource>;
  const int r = threadIdx.x % kWarp / 4;
  Operands values[kChunks][4];
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    const int channel = b.first_channel + j * kSpan + 8 * r;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[j][i] = {};
      if (channel < b.dim) T::LoadValue(rows.value[i], channel, b.dim, &values[j][i]);
    }
  }
  float logits[4], value_scale[4], value_zero[4];
  Score<kSource>(b, rows, query, logits);
  if constexpr (kSource == Source::kK8V4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Scales and zeros lie in front of the codes; value rows of a record are the record.
      const uint2 meta = *reinterpret_cast<const uint2*>(rows.value[i]);
      logits[i] = logits[i] * HalfBitsToFloat(static_cast<uint16_t>(meta.x)) +
                  HalfBitsToFloat(static_cast<uint16_t>(meta.x >> 16)) * b.query_sum[r];
      value_scale[i] = HalfBitsToFloat(static_cast<uint16_t>(meta.y));
      value_zero[i] = HalfBitsToFloat(static_cast<uint16_t>(meta.y >> 16));
    }
  }
  float largest = kNegativeInfinity;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((rows.heads[i] >> r & 1u) == 0) logits[i] = kNegativeInfinity;
    largest = fmaxf(largest, logits[i]);
  }
  largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, 2));
  largest = fmaxf(largest, run.largest);
  if (__any_sync(kFullMask, largest > run.largest)) {
    const float shrink = run.largest == kNegativeInfinity ? 0.0f : Exp2(run.largest - largest);
    run.weight_sum *= shrink;
    run.zero_sum *= shrink;
#pragma unroll
    for (int n = 0; n < kChunks * 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) run.output[n][i] *= shrink;
    }
    run.largest = largest;
  }
  float weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = logits[i] == kNegativeInfinity ? 0.0f : Exp2(logits[i] - largest);
    run.weight_sum += weights[i];
    if constexpr (kSource == Source::kK8V4) {
      run.zero_sum += weights[i] * value_zero[i];
      weights[i] *= value_scale[i];
    }
  }
  uint32_t operand[4];
  if constexpr (T::kHalfValues) {
    SplitHalves(weights[0], weights[1], &operand[0], &operand[1]);
    SplitHalves(weights[2], weights[3], &operand[2], &operand[3]);
  } else {
    SplitBFloat16(weights[0], weights[1], &operand[0], &operand[1]);
    SplitBFloat16(weights[2], weights[3], &operand[2], &operand[3]);
  }
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    const Operands(&v)[4] = values[j];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float(&sum)[4] = run.output[j * 8 + i];
      const uint32_t b0 = T::Pair(v[0].hi, v[1].hi, i), b1 = T::Pair(v[2].hi, v[3].hi, i);
      if constexpr (T::kHalfValues) {
        MmaHalf(sum, operand, b0, b1);
      } else {
        MmaBFloat16(sum, operand, b0, b1);
        if constexpr (kSource == Source::kFloat32) {
          MmaBFloat16(sum, operand, T::Pair(v[0].lo, v[1].lo, i), T::Pair(v[2].lo, v[3].lo, i));
        }
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ T FromLane(T value, int lane) {
  return __shfl_sync(kFullMask, value, lane);
}

// Rows of the tile of tokens [first, count): locate(i, token, &key, &value, &heads) for the lane's
// two tokens (i = 0, 1), which are < count.
template <typename Locate>
__device__ __forceinline__ TileRows MakeRows(int first, int count, const Locate& locate) {
  const int lane = threadIdx.x % kWarp, r = lane / 4, t = lane % 4;
  unsigned long long key[2], value[2];
  uint32_t heads[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = first + r + 8 * i;
    const unsigned char *key_row, *value_row;
    locate(i, min(token, count - 1), &key_row, &value_row, &heads[i]);
    if (token >= count) heads[i] = 0;
    key[i] = reinterpret_cast<unsigned long long>(key_row);
    value[i] = reinterpret_cast<unsigned long long>(value_row);
  }
  TileRows rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) rows.key[i] = reinterpret_cast<const unsigned char*>(key[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int from = (2 * t + i % 2) * 4;
    rows.value[i] = reinterpret_cast<const unsigned char*>(FromLane(value[i / 2], from));
    rows.heads[i] = FromLane(heads[i / 2], from);
  }
  return rows;
}

// The tiles of the raw runs that are `worker`'s among `workers` warps. *turn: tiles before these,
// over all calls; worker turn % workers takes the next.
template <Source kRaw, int kChunks>
__device__ __forceinline__ void AttendRuns(const DeviceRawRun* runs, int count, const BlockState& b,
                                           int worker, int workers, int* turn,
                                           Running<kChunks>& run) {
  for (int i = 0; i < count; ++i) {
    const DeviceRawRun raw = runs[i];
    const int tokens = static_cast<int>(raw.tokens);
    const int tiles = (tokens + kTile - 1) / kTile;
    for (int tile = (worker - *turn % workers + workers) % workers; tile < tiles; tile += workers) {
      const TileRows rows = MakeRows(tile * kTile, tokens,
                                     [&](int, int token, const unsigned char** key,
                                         const unsigned char** value, uint32_t* heads) {
                                       *key = raw.keys + token * raw.key_stride_bytes;
                                       *value = raw.values + token * raw.value_stride_bytes;
                                       *heads = 0xffu;
                                     });
      AttendTile<kRaw>(b, rows, b.query_raw, run);
    }
    *turn += tiles;
  }
}

// Asks for a record in the second cache; four lanes share it.
__device__ __forceinline__ void PrefetchRecord(const unsigned char* record, int record_bytes) {
  constexpr int kPiece = 64;  // bytes that memory is read by
  for (int at = threadIdx.x % 4 * kPiece; at < record_bytes; at += 4 * kPiece) {
    PrefetchL2(record + at);
  }
}

// Likewise the tiles of `count` records: that of token i at slot_base + slot(i) * record_bytes, for
// the query heads heads(i), bits. Slots are read two tiles ahead, and records asked for one.
template <Source kRecord, int kChunks, typename Slot, typename Heads>
__device__ __forceinline__ void AttendRecords(const unsigned char* slot_base, int record_bytes,
                                              int count, const Slot& slot, const Heads& heads_of,
                                              const BlockState& b, int worker, int workers,
                                              int turn, Running<kChunks>& run) {
  const int tiles = (count + kTile - 1) / kTile, r = threadIdx.x % kWarp / 4;
  int tile = (worker - turn % workers + workers) % workers;
  if (tile >= tiles) return;
  const auto record_of = [&](int of_tile, int i) {
    const int token = min(of_tile * kTile + r + 8 * i, count - 1);
    return slot_base + static_cast<int64_t>(slot(token)) * record_bytes;
  };
  const unsigned char* records[2] = {record_of(tile, 0), record_of(tile, 1)};
  const unsigned char* next[2] = {record_of(tile + workers, 0), record_of(tile + workers, 1)};
  for (; tile < tiles; tile += workers) {
    if (tile + workers < tiles) {
#pragma unroll
      for (int i = 0; i < 2; ++i) PrefetchRecord(next[i], record_bytes);
    }
    const unsigned char* after[2] = {record_of(tile + 2 * workers, 0),
                                     record_of(tile + 2 * workers, 1)};
    const TileRows rows =
        MakeRows(tile * kTile, count,
                 [&](int i, int token, const unsigned char** key, const unsigned char** value,
                     uint32_t* heads) {
                   *key = records[i];
                   *value = kRecord == Source::kK8V4 ? records[i] : records[i] + record_bytes / 2;
                   *heads = heads_of(token);
                 });
    AttendTile<kRecord>(b, rows, b.query_record, run);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      records[i] = next[i];
      next[i] = after[i];
    }
  }
}

// A partial result: largest [8], weight_sum [8], output [8, channel_span].
__device__ __forceinline__ float* PartialLargest(float* partial) { return partial; }
__device__ __forceinline__ float* PartialSum(float* partial) { return partial + kHeads; }
__device__ __forceinline__ float* PartialOutput(float* partial) { return partial + 2 * kHeads; }

// Writes the warp's running softmax as a partial.
template <int kChunks>
__device__ void StorePartial(Running<kChunks>& run, int span, float* partial) {
  const int lane = threadIdx.x % kWarp, r = lane / 4, t = lane % 4;
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    run.weight_sum += __shfl_xor_sync(kFullMask, run.weight_sum, offset);
    run.zero_sum += __shfl_xor_sync(kFullMask, run.zero_sum, offset);
  }
  if (t == 0) {
    PartialLargest(partial)[r] = run.largest;
    PartialSum(partial)[r] = run.weight_sum;
  }
#pragma unroll
  for (int n = 0; n < kChunks * 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = n / 8 * kSpan + 8 * (2 * t + i) + n % 8;
      if (channel < span) {
        PartialOutput(partial)[r * span + channel] =
            run.output[n][i] + run.output[n][i + 2] + run.zero_sum;
      }
    }
  }
}

// Merges `count` partials, `stride` floats apart, into one at `to` (which may be the first).
__device__ inline void MergePartials(const float* partials, int count, int64_t stride, int span,
                                     float* to) {
  for (int i = threadIdx.x; i < kHeads * span; i += Threads()) {
    const int head = i / span;
    float largest = kNegativeInfinity;
    for (int k = 0; k < count; ++k) largest = fmaxf(largest, partials[k * stride + head]);
    float sum = 0;
    for (int k = 0; k < count; ++k) {
      const float own = partials[k * stride + head];
      if (own == kNegativeInfinity) continue;
      sum += Exp2(own - largest) * partials[k * stride + 2 * kHeads + i];
    }
    PartialOutput(to)[i] = sum;
  }
  __syncthreads();
  float largest = kNegativeInfinity, sum = 0;
  if (threadIdx.x < kHeads) {
    const int head = threadIdx.x;
    for (int k = 0; k < count; ++k) largest = fmaxf(largest, partials[k * stride + head]);
    for (int k = 0; k < count; ++k) {
      const float own = partials[k * stride + head];
      if (own != kNegativeInfinity)
        sum += Exp2(own - largest) * partials[k * stride + kHeads + head];
    }
  }
  __syncthreads();
  if (threadIdx.x < kHeads) {
    PartialLargest(to)[threadIdx.x] = largest;
    PartialSum(to)[threadIdx.x] = sum;
  }
  __syncthreads();
}

// Of one query head: a merged partial's largest logit and weight sum, and what the attention state
// of log-sum-exp `state_lse` changes in them: output = (own × partial + other × state) / sum.
struct StateMerge {
  float largest, sum, own, other;

  __device__ StateMerge(float partial_largest, float partial_sum, float state_lse)
      : largest(partial_largest), sum(partial_sum), own(1), other(0) {
    const float state = state_lse * kLog2E;
    if (state == kNegativeInfinity) return;
    const float top = fmaxf(largest, state);
    own = largest == kNegativeInfinity ? 0.0f : Exp2(largest - top);
    other = Exp2(state - top);
    sum = sum * own + other;
    largest = top;
  }
  __device__ float Output(float partial, float state) const {
    return sum > 0 ? (partial * own + state * other) / sum : 0.0f;
  }
  __device__ float Lse() const {
    return sum > 0 ? (largest + log2f(sum)) * kLn2 : kNegativeInfinity;
  }
};

// A block's queries as operands. `query` [8, dim]: in units of log2, set by the caller, a barrier
// before; `memory`: HeaderBytes and fragments, as laid out above.
template <Source kRaw, Source kRecord>
__device__ BlockState PrepareBlock(const float* query, unsigned char* memory, int dim, int steps,
                                   int fragment_sets, int first_channel) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* unit = reinterpret_cast<float*>(memory + kUnitOffset);
  float* query_sum = reinterpret_cast<float*>(memory + kQuerySumOffset);
  uint4* fragments = reinterpret_cast<uint4*>(memory + kHeaderBytes);
  uint4* record_fragments =
      reinterpret_cast<uint4*>(memory + kHeaderBytes + (fragment_sets - 1) * FragmentBytes(steps));
  for (int h = warp; h < kHeads; h += Threads() / kWarp) {
    float largest = 0, sum = 0;
    for (int j = lane; j < dim; j += kWarp) {
      largest = fmaxf(largest, fabsf(query[h * dim + j]));
      sum += query[h * dim + j];
    }
    largest = WarpMax(largest);
    sum = WarpSum(sum);
    if (lane == 0) {
      unit[h] = largest > 0 ? exp2f(static_cast<float>(
                                  static_cast<int>(__float_as_uint(largest) >> 23) - 127 - 11))
                            : 1.0f;
      query_sum[h] = sum;
    }
  }
  __syncthreads();
  MakeFragments<Traits<kRaw>::kHalfKeys>(query, unit, dim, steps, fragments);
  if (fragment_sets > 1) {
    MakeFragments<Traits<kRecord>::kHalfKeys>(query, unit, dim, steps, record_fragments);
  }
  __syncthreads();
  return {fragments, record_fragments, unit, query_sum, dim, steps, first_channel};
}

template <int kChunks>
__device__ __forceinline__ void Clear(Running<kChunks>& run) {
#pragma unroll
  for (int n = 0; n < kChunks * 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) run.output[n][i] = 0;
  }
}

}  // namespace clusterkv::kernels::cuda::attention

#endif  // CLUSTERKV_KERNELS_ATTENTION_ATTENTION_TILE_CUH_
