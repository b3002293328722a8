#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/code_packing.h"
#include "kernels/codec/residual_codes.h"

namespace clusterkv::kernels {
namespace {

void StoreHalf(float value, std::byte* halves, int64_t index) {
  const uint16_t half = FloatToHalfSaturated(value);
  std::memcpy(halves + 2 * index, &half, 2);
}

float LoadHalf(const std::byte* halves, int64_t index) {
  uint16_t half;
  std::memcpy(&half, halves + 2 * index, 2);
  return HalfToFloat(half);
}

// One token's K or V: scales and lows [head_dim / group_channels] fp16, packed zeroed beforehand.
void EncodeHalfReference(const CodesParams& params, int64_t head_dim, const float* residual,
                         const float* balance, std::byte* scales, std::byte* lows,
                         std::byte* packed) {
  const float levels = static_cast<float>((1 << params.bits) - 1);
  // Beyond fp16's range there is no low to code against: the residual saturates there.
  const auto balanced = [&](int64_t j) {
    return std::min(std::max(residual[j] * balance[j], -kLargestHalf), kLargestHalf);
  };
  for (int64_t g = 0; g < head_dim / params.group_channels; ++g) {
    const int64_t begin = g * params.group_channels;
    float low = balanced(begin);
    float high = low;
    for (int64_t j = begin; j < begin + params.group_channels; ++j) {
      low = std::min(low, balanced(j));
      high = std::max(high, balanced(j));
    }
    StoreHalf(low + 0.0f, lows, g);  // + 0: -0 and 0 give the same bytes whatever the order of min
    StoreHalf((high - low) / levels, scales, g);
    // Codes are relative to what the decoder will see: the rounded low and scale.
    low = LoadHalf(lows, g);
    const float scale = LoadHalf(scales, g);
    if (scale == 0) continue;
    for (int64_t j = begin; j < begin + params.group_channels; ++j) {
      const float code = std::nearbyint((balanced(j) - low) / scale);
      StoreCode(static_cast<uint32_t>(std::min(std::max(code, 0.0f), levels)), packed, params.bits,
                head_dim, j);
    }
  }
}

}  // namespace

void EncodeResidualsReference(const CodesParams& params, int64_t head_dim, int64_t rows,
                              const float* key_residuals, const float* value_residuals,
                              const float* key_balance, const float* value_balance,
                              std::byte* codes) {
  CKV_CHECK(ValidateCodesParams(params, head_dim).ok() && params.bits != 0);
  const int64_t code_bytes = CodesBytes(params, head_dim);
  const int64_t halves_bytes = 2 * (head_dim / params.group_channels);
  const int64_t packed_bytes = PackedCodeBytes(params.bits, head_dim);
  for (int64_t t = 0; t < rows; ++t) {
    std::byte* token = codes + t * code_bytes;
    std::memset(token, 0, code_bytes);
    std::byte* packed = token + 4 * halves_bytes;
    EncodeHalfReference(params, head_dim, key_residuals + t * head_dim, key_balance, token,
                        token + halves_bytes, packed);
    EncodeHalfReference(params, head_dim, value_residuals + t * head_dim, value_balance,
                        token + 2 * halves_bytes, token + 3 * halves_bytes, packed + packed_bytes);
  }
}

}  // namespace clusterkv::kernels
