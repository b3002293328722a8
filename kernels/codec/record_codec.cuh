// Record codecs and residual codes for kernels: a lane has 16 channels of a row, a *unit* of
// head_dim / 16 lanes the whole row, a warp as many units as it has room for.
//
// Every step is one IEEE operation per channel or a minimum or maximum, never contracted, so that
// the bytes are those of the codecs in record_codec.h and residual_codes.h.
#ifndef CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_CUH_
#define CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"
#include "kernels/codec/code_packing.cuh"
#include "kernels/codec/record_format.h"

namespace clusterkv::kernels::cuda {

// Where a thread stands in its warp's units.
struct UnitLane {
  int lanes;     // of a unit: head_dim / 16
  int per_warp;  // units of a warp; what is left of it idles
  int unit;      // of this lane; >= per_warp: idle
  int block;     // of 16 channels, of this lane
  int first;     // lane of the unit's block 0

  __device__ explicit UnitLane(int head_dim) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    lanes = head_dim / kCodeBlock;
    per_warp = kWarp / lanes;
    unit = lane / lanes;
    block = lane % lanes;
    first = unit * lanes;
  }
};

// 16 channels as they lie in memory: 32 bytes, or 64 of fp32.
struct RowBlock {
  uint4 words[4];

  __device__ __forceinline__ void Load(const unsigned char* row, ElementType type, int block) {
    const uint4* from =
        reinterpret_cast<const uint4*>(row + block * kCodeBlock * DeviceElementBytes(type));
    words[0] = from[0];
    words[1] = from[1];
    if (type != ElementType::kFloat32) return;
    words[2] = from[2];
    words[3] = from[3];
  }
  __device__ __forceinline__ void Store(unsigned char* row, ElementType type, int block) const {
    uint4* to = reinterpret_cast<uint4*>(row + block * kCodeBlock * DeviceElementBytes(type));
    to[0] = words[0];
    to[1] = words[1];
    if (type != ElementType::kFloat32) return;
    to[2] = words[2];
    to[3] = words[3];
  }
  __device__ __forceinline__ void ToFloats(ElementType type, float (&x)[kCodeBlock]) const {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t word[4] = {words[w].x, words[w].y, words[w].z, words[w].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (type == ElementType::kFloat32) {
          x[4 * w + i] = __uint_as_float(word[i]);
        } else if (w < 2) {
          const uint16_t low = static_cast<uint16_t>(word[i]);
          const uint16_t high = static_cast<uint16_t>(word[i] >> 16);
          const bool half = type == ElementType::kFloat16;
          x[8 * w + 2 * i] = half ? HalfBitsToFloat(low) : BFloat16BitsToFloat(low);
          x[8 * w + 2 * i + 1] = half ? HalfBitsToFloat(high) : BFloat16BitsToFloat(high);
        }
      }
    }
  }
};

// The least and the greatest over `count` lanes from `first` on; `count` alike in the whole warp.
__device__ __forceinline__ void LanesRange(int first, int count, float* low, float* high) {
  float least = *low, greatest = *high;
  for (int i = 0; i < count; ++i) {
    least = fminf(least, __shfl_sync(kFullMask, *low, (first + i) % kWarp));
    greatest = fmaxf(greatest, __shfl_sync(kFullMask, *high, (first + i) % kWarp));
  }
  *low = least;
  *high = greatest;
}

// Codes of kBits for `count` lanes' x, which is clamped to fp16's range: one range for all of them,
// as fp16 in *scale and *low.
template <int kBits>
__device__ __forceinline__ void QuantizeLanes(int first, int count, float (&x)[kCodeBlock],
                                              uint32_t (&codes)[kCodeBlock], uint16_t* scale,
                                              uint16_t* low) {
  constexpr float kLevels = (1 << kBits) - 1;
  float least = kLargestHalf, greatest = -kLargestHalf;
#pragma unroll
  for (int i = 0; i < kCodeBlock; ++i) {
    x[i] = fminf(fmaxf(x[i], -kLargestHalf), kLargestHalf);
    least = fminf(least, x[i]);
    greatest = fmaxf(greatest, x[i]);
  }
  LanesRange(first, count, &least, &greatest);
  // + 0: -0 and 0 give the same bits whatever the order of min.
  *low = FloatToHalfBitsSaturated(__fadd_rn(least, 0.0f));
  *scale = FloatToHalfBitsSaturated(__fdiv_rn(__fsub_rn(greatest, least), kLevels));
  const float seen_low = HalfBitsToFloat(*low), seen_scale = HalfBitsToFloat(*scale);
#pragma unroll
  for (int i = 0; i < kCodeBlock; ++i) {
    float code = 0;
    if (seen_scale > 0) {
      code = fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(x[i], seen_low), seen_scale)), 0.0f), kLevels);
    }
    codes[i] = static_cast<uint32_t>(code);
  }
}

// Packs a block's codes as code_packing.h says; `packed` aligned to 4.
template <int kBits>
__device__ __forceinline__ void StoreCodes(const uint32_t (&codes)[kCodeBlock],
                                           unsigned char* packed, int head_dim, int block) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kCodeBlock; ++i) {
    if constexpr (kBits == 4) {
      words[i % 2] |= codes[i] << (4 * (i / 2));
    } else {
      words[0] |= (codes[i] & 3u) << (2 * i);
      words[1] |= codes[i] >> 2 << i;  // 3 bits: the plane of third bits
    }
  }
  if constexpr (kBits == 4) {
    *reinterpret_cast<uint32_t*>(packed + 8 * block) = words[0];
    *reinterpret_cast<uint32_t*>(packed + 8 * block + 4) = words[1];
  } else {
    *reinterpret_cast<uint32_t*>(packed + 4 * block) = words[0];
    if constexpr (kBits == 3) {
      uint16_t* plane = reinterpret_cast<uint16_t*>(packed + head_dim / 4) + block;
      plane[0] = static_cast<uint16_t>(words[1]);
      // What fills up the last word is zero.
      if (block == head_dim / kCodeBlock - 1 && block % 2 == 0) plane[1] = 0;
    }
  }
}

// A block of a value's remainder (k8v4_codec.cc): x [16] the value, its codes, scale and zero.
__device__ __forceinline__ void EncodeRemainderBlock(const UnitLane& at,
                                                     const float (&x)[kCodeBlock],
                                                     const uint32_t (&value)[kCodeBlock],
                                                     uint16_t scale_half, uint16_t zero_half,
                                                     int head_dim, unsigned char* remainder) {
  const float scale = HalfBitsToFloat(scale_half), zero = HalfBitsToFloat(zero_half);
  const float step = __fmul_rn(scale, 0.0625f), low = __fmul_rn(step, -7.5f);
  uint32_t codes[kCodeBlock];
#pragma unroll
  for (int i = 0; i < kCodeBlock; ++i) {
    const float decoded = __fadd_rn(__fmul_rn(static_cast<float>(value[i]), scale), zero);
    float code = 0;
    if (step > 0) {
      const float lacks = __fsub_rn(x[i], decoded);
      code = fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(lacks, low), step)), 0.0f), 15.0f);
    }
    codes[i] = static_cast<uint32_t>(code);
  }
  StoreCodes<4>(codes, remainder, head_dim, at.block);
}

// One half (0: K, 1: V) of a record, by the unit's lanes, and of a value its remainder where the
// format has one and `remainder` is not null. All lanes of the warp call it; those with `record`
// null write nothing.
template <RecordFormat kFormat>
__device__ __forceinline__ void EncodeRecordHalf(const UnitLane& at, const RowBlock& row, int half,
                                                 ElementType type, int head_dim,
                                                 unsigned char* record,
                                                 unsigned char* remainder = nullptr) {
  if constexpr (kFormat == RecordFormat::kRaw) {
    if (record == nullptr) return;
    row.Store(record + half * head_dim * DeviceElementBytes(type), type, at.block);
  } else {
    float x[kCodeBlock];
    uint32_t key[kCodeBlock], value[kCodeBlock];
    uint16_t key_scale, key_low, value_scale, value_low;
    row.ToFloats(type, x);
    // Both: a warp has units of either half.
    QuantizeLanes<8>(at.first, at.lanes, x, key, &key_scale, &key_low);
    QuantizeLanes<4>(at.first, at.lanes, x, value, &value_scale, &value_low);
    if (record == nullptr) return;
    if (at.block == 0) {
      const uint32_t meta = half == 0 ? key_scale | static_cast<uint32_t>(key_low) << 16
                                      : value_scale | static_cast<uint32_t>(value_low) << 16;
      reinterpret_cast<uint32_t*>(record)[half] = meta;
    }
    if (half == 0) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < kCodeBlock; ++i) words[i / 4] |= key[i] << (8 * (i % 4));
      uint2* to = reinterpret_cast<uint2*>(record + 8 + kCodeBlock * at.block);
      to[0] = make_uint2(words[0], words[1]);
      to[1] = make_uint2(words[2], words[3]);
    } else {
      StoreCodes<4>(value, record + 8 + head_dim, head_dim, at.block);
      if (remainder == nullptr) return;
      EncodeRemainderBlock(at, x, value, value_scale, value_low, head_dim, remainder);
    }
  }
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_CUH_
