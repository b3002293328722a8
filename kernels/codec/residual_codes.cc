#include "kernels/codec/residual_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/code_packing.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/codec/residual_codes.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After foreach_target.h.
#include "kernels/codec/code_packing-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {

// One token's K or V, groups of whole blocks. Every step is one IEEE operation per channel (no
// fused multiply-add) or a minimum or maximum, so that the bytes are those of the reference.
template <int kBits>
void EncodeHalf(int64_t head_dim, int64_t group_channels, const float* HWY_RESTRICT residual,
                const float* HWY_RESTRICT balance, std::byte* HWY_RESTRICT scales,
                std::byte* HWY_RESTRICT lows, std::byte* HWY_RESTRICT packed) {
  constexpr float kLevels = (1 << kBits) - 1;
  const CodeFloatTag d;
  const CodeWordTag du;
  const hn::RebindToSigned<CodeFloatTag> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto balanced = [&](int64_t j) HWY_ATTR {
    const auto y = hn::Mul(hn::LoadU(d, residual + j), hn::LoadU(d, balance + j));
    return hn::Min(hn::Max(y, hn::Set(d, -kLargestHalf)), hn::Set(d, kLargestHalf));
  };
  for (int64_t g = 0; g < head_dim / group_channels; ++g) {
    const int64_t begin = g * group_channels;
    auto lowest = balanced(begin);
    auto highest = lowest;
    for (int64_t j = begin + lanes; j < begin + group_channels; j += lanes) {
      lowest = hn::Min(lowest, balanced(j));
      highest = hn::Max(highest, balanced(j));
    }
    const float low = hn::GetLane(hn::MinOfLanes(d, lowest));
    const float high = hn::GetLane(hn::MaxOfLanes(d, highest));
    const uint16_t low_half = FloatToHalfSaturated(low + 0.0f);
    const uint16_t scale_half = FloatToHalfSaturated((high - low) / kLevels);
    std::memcpy(lows + 2 * g, &low_half, 2);
    std::memcpy(scales + 2 * g, &scale_half, 2);
    const auto seen_low = hn::Set(d, HalfToFloat(low_half));
    const auto seen_scale = hn::Set(d, HalfToFloat(scale_half));
    const auto has_range = hn::Gt(seen_scale, hn::Zero(d));
    for (int64_t block = begin; block < begin + group_channels; block += kCodeBlockChannels) {
      HWY_ALIGN uint32_t codes[kCodeBlockChannels];
      for (int64_t i = 0; i < kCodeBlockChannels; i += lanes) {
        const auto steps = hn::Round(hn::Div(hn::Sub(balanced(block + i), seen_low), seen_scale));
        const auto code = hn::Min(hn::Max(hn::IfThenElseZero(has_range, steps), hn::Zero(d)),
                                  hn::Set(d, kLevels));
        hn::Store(hn::BitCast(du, hn::ConvertTo(di, code)), du, codes + i);
      }
      PackBlock<kBits>(codes, packed, head_dim, block / kCodeBlockChannels);
    }
  }
}

template <int kBits>
void EncodeRows(int64_t group_channels, int64_t head_dim, int64_t rows,
                const float* HWY_RESTRICT key_residuals, const float* HWY_RESTRICT value_residuals,
                const float* HWY_RESTRICT key_balance, const float* HWY_RESTRICT value_balance,
                std::byte* HWY_RESTRICT codes) {
  const int64_t halves_bytes = 2 * (head_dim / group_channels);
  const int64_t packed_bytes = PackedCodeBytes(kBits, head_dim);
  const int64_t code_bytes = 4 * halves_bytes + 2 * packed_bytes;
  for (int64_t t = 0; t < rows; ++t) {
    std::byte* token = codes + t * code_bytes;
    std::byte* packed = token + 4 * halves_bytes;
    std::memset(packed, 0, 2 * packed_bytes);
    EncodeHalf<kBits>(head_dim, group_channels, key_residuals + t * head_dim, key_balance, token,
                      token + halves_bytes, packed);
    EncodeHalf<kBits>(head_dim, group_channels, value_residuals + t * head_dim, value_balance,
                      token + 2 * halves_bytes, token + 3 * halves_bytes, packed + packed_bytes);
  }
}

void Encode(int bits, int64_t group_channels, int64_t head_dim, int64_t rows,
            const float* key_residuals, const float* value_residuals, const float* key_balance,
            const float* value_balance, std::byte* codes) {
  const auto encode = bits == 2 ? EncodeRows<2> : bits == 3 ? EncodeRows<3> : EncodeRows<4>;
  encode(group_channels, head_dim, rows, key_residuals, value_residuals, key_balance, value_balance,
         codes);
}

// One token's K or V. Scales and lows are those of each channel's group.
template <int kBits>
void DecodeHalf(int64_t group_channels, int64_t head_dim, const std::byte* HWY_RESTRICT scales,
                const std::byte* HWY_RESTRICT lows, const std::byte* HWY_RESTRICT packed,
                const float* HWY_RESTRICT balance, float* HWY_RESTRICT residual) {
  const auto half = [](const std::byte* halves, int64_t g) {
    uint16_t bits;
    std::memcpy(&bits, halves + 2 * g, 2);
    return HalfToFloat(bits);
  };
  ForEachCodeVector<kBits>(packed, head_dim, 0, head_dim / kCodeBlockChannels,
                           [&](int64_t j, auto codes)
                               HWY_ATTR { hn::StoreU(codes, CodeFloatTag(), residual + j); });
  for (int64_t g = 0; g < head_dim / group_channels; ++g) {
    const float scale = half(scales, g);
    const float low = half(lows, g);
    float* HWY_RESTRICT out = residual + g * group_channels;
    const float* HWY_RESTRICT u = balance + g * group_channels;
    for (int64_t j = 0; j < group_channels; ++j) out[j] = (out[j] * scale + low) / u[j];
  }
}

void Decode(int bits, int64_t group_channels, int64_t head_dim, const std::byte* scales,
            const std::byte* lows, const std::byte* packed, const float* balance, float* residual) {
  const auto decode = bits == 2 ? DecodeHalf<2> : bits == 3 ? DecodeHalf<3> : DecodeHalf<4>;
  decode(group_channels, head_dim, scales, lows, packed, balance, residual);
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterkv::kernels {

HWY_EXPORT(Encode);
HWY_EXPORT(Decode);

absl::Status ValidateCodesParams(const CodesParams& params, int64_t head_dim) {
  if (params.bits == 0) return absl::OkStatus();
  if (params.bits < 2 || params.bits > 4) {
    return absl::InvalidArgumentError(
        absl::StrCat("codes.bits: expected 0, 2, 3 or 4, got ", params.bits));
  }
  if (params.group_channels < 1 || head_dim % params.group_channels != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("codes.group_channels: expected a divisor of head_dim ", head_dim, ", got ",
                     params.group_channels));
  }
  return absl::OkStatus();
}

int64_t CodesBytes(const CodesParams& params, int64_t head_dim) {
  if (params.bits == 0) return 0;
  return 2 * (PackedCodeBytes(params.bits, head_dim) + 4 * (head_dim / params.group_channels));
}

void ResidualBalance(const float* residuals, int64_t rows, int64_t head_dim, float* balance) {
  std::vector<double> squares(head_dim, 0.0);
  for (int64_t t = 0; t < rows; ++t) {
    const float* row = residuals + t * head_dim;
    for (int64_t j = 0; j < head_dim; ++j) squares[j] += static_cast<double>(row[j]) * row[j];
  }
  for (int64_t j = 0; j < head_dim; ++j) {
    const double rms = rows == 0 ? 1.0 : std::sqrt(squares[j] / static_cast<double>(rows));
    balance[j] = static_cast<float>(1.0 / std::sqrt(std::max(rms, 1e-9)));
  }
}

void EncodeResiduals(const CodesParams& params, int64_t head_dim, int64_t rows,
                     const float* key_residuals, const float* value_residuals,
                     const float* key_balance, const float* value_balance, std::byte* codes) {
  CKV_CHECK(ValidateCodesParams(params, head_dim).ok() && params.bits != 0);
  CKV_CHECK(head_dim % kCodeBlockChannels == 0) << head_dim;
  if (params.group_channels % kCodeBlockChannels != 0) {
    // A group that ends inside a block: allowed, in no preset, not worth code of its own.
    EncodeResidualsReference(params, head_dim, rows, key_residuals, value_residuals, key_balance,
                             value_balance, codes);
    return;
  }
  HWY_DYNAMIC_DISPATCH(Encode)
  (params.bits, params.group_channels, head_dim, rows, key_residuals, value_residuals, key_balance,
   value_balance, codes);
}

void DecodeResiduals(const CodesParams& params, int64_t head_dim, const std::byte* codes,
                     const float* key_balance, const float* value_balance, float* key_residual,
                     float* value_residual) {
  CKV_CHECK(ValidateCodesParams(params, head_dim).ok() && params.bits != 0);
  const int64_t halves_bytes = 2 * (head_dim / params.group_channels);
  const std::byte* packed = codes + 4 * halves_bytes;
  if (key_residual != nullptr) {
    HWY_DYNAMIC_DISPATCH(Decode)
    (params.bits, params.group_channels, head_dim, codes, codes + halves_bytes, packed, key_balance,
     key_residual);
  }
  if (value_residual != nullptr) {
    HWY_DYNAMIC_DISPATCH(Decode)
    (params.bits, params.group_channels, head_dim, codes + 2 * halves_bytes,
     codes + 3 * halves_bytes, packed + PackedCodeBytes(params.bits, head_dim), value_balance,
     value_residual);
  }
}

}  // namespace clusterkv::kernels
#endif  // HWY_ONCE
