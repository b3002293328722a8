#include "kernels/base/element_type.h"

#include <cmath>
#include <cstring>

#include "kernels/base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/base/element_type.cc"
#include "hwy/foreach_target.h"  // Compiles the SIMD part of this file once per target.
// Must come after foreach_target.h.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Halves are converted by integer code on every target, never by the processor's own instructions:
// not every target has them, and they differ in what they make of a signalling NaN.
using DF32 = hn::ScalableTag<float>;
using DU32 = hn::ScalableTag<uint32_t>;
using DI32 = hn::ScalableTag<int32_t>;
using DU16 = hn::Rebind<uint16_t, DU32>;
using VF32 = hn::Vec<DF32>;
using VU32 = hn::Vec<DU32>;
using VI32 = hn::Vec<DI32>;
using VU16 = hn::Vec<DU16>;

HWY_ATTR VF32 WidenHalf(VU16 half) {
  const DF32 df;
  const DU32 du;
  const VU32 bits = hn::PromoteTo(du, half);
  const VU32 sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)));
  const VU32 magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7fffu)));
  const VF32 scaled = hn::Mul(hn::BitCast(df, magnitude), hn::Set(df, 0x1p112f));
  // What had the largest exponent is infinity or NaN.
  const auto special = hn::Ge(scaled, hn::Set(df, 0x1p16f));
  const VF32 exponent = hn::BitCast(df, hn::Set(du, 0x7f800000u));
  return hn::Or(hn::Or(scaled, hn::IfThenElseZero(special, exponent)), hn::BitCast(df, sign));
}

HWY_ATTR VF32 WidenBFloat16(VU16 value) {
  return hn::BitCast(DF32(), hn::ShiftLeft<16>(hn::PromoteTo(DU32(), value)));
}

HWY_ATTR VU16 NarrowToHalf(VF32 value) {
  const DF32 df;
  const DU32 du;
  const DI32 di;
  const VU32 bits = hn::BitCast(du, value);
  const VU32 sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000u));
  const VU32 magnitude = hn::And(bits, hn::Set(du, 0x7fffffffu));
  const VI32 signed_magnitude = hn::BitCast(di, magnitude);

  const VU32 odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1u));
  const VU32 rebias = hn::Set(du, 0xc8000fffu);  // exponent - 112, mantissa + just under half
  VI32 half = hn::BitCast(di, hn::ShiftRight<13>(hn::Add(hn::Add(magnitude, rebias), odd)));

  // Adding 0.5 moves a subnormal half's last bit to float's last bit and lets the addition round.
  const VF32 shifted = hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5f));
  const VI32 subnormal = hn::Sub(hn::BitCast(di, shifted), hn::Set(di, 0x3f000000));
  half = hn::IfThenElse(hn::Lt(signed_magnitude, hn::Set(di, 0x38800000)), subnormal, half);

  half =
      hn::IfThenElse(hn::Gt(signed_magnitude, hn::Set(di, 0x477fffff)), hn::Set(di, 0x7c00), half);
  const VI32 payload = hn::And(hn::ShiftRight<13>(signed_magnitude), hn::Set(di, 0x3ff));
  half = hn::IfThenElse(hn::Gt(signed_magnitude, hn::Set(di, 0x7f800000)),
                        hn::Or(payload, hn::Set(di, 0x7e00)), half);
  return hn::DemoteTo(DU16(), hn::Or(half, hn::BitCast(di, sign)));
}

HWY_ATTR VU16 NarrowToHalfSaturated(VF32 value) {
  const VF32 largest = hn::Set(DF32(), kLargestHalf), least = hn::Neg(largest);
  // Comparisons with NaN are false, so that a NaN passes.
  value = hn::IfThenElse(hn::Gt(value, largest), largest, value);
  return NarrowToHalf(hn::IfThenElse(hn::Lt(value, least), least, value));
}

HWY_ATTR VU16 NarrowToBFloat16(VF32 value) {
  const DU32 du;
  const DI32 di;
  const VU32 bits = hn::BitCast(du, value);
  const VU32 high = hn::ShiftRight<16>(bits);
  const VU32 odd = hn::And(high, hn::Set(du, 1u));
  const VU32 rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7fffu)), odd));
  const VI32 magnitude = hn::BitCast(di, hn::And(bits, hn::Set(du, 0x7fffffffu)));
  const auto is_nan = hn::Gt(magnitude, hn::Set(di, 0x7f800000));
  return hn::DemoteTo(DU16(),
                      hn::IfThenElse(is_nan, hn::BitCast(di, hn::Or(high, hn::Set(du, 0x40u))),
                                     hn::BitCast(di, rounded)));
}

template <bool kHalf>
HWY_ATTR void WidenAll(const std::byte* from, int64_t count, float* to) {
  const DF32 df;
  const DU16 du16;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const auto widen = [&](const uint16_t* source, float* target) HWY_ATTR {
    const VU16 elements = hn::LoadU(du16, source);
    hn::StoreU(kHalf ? WidenHalf(elements) : WidenBFloat16(elements), df, target);
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    widen(reinterpret_cast<const uint16_t*>(from + 2 * i), to + i);
  }
  if (i >= count) return;
  uint16_t source[HWY_MAX_BYTES / sizeof(float)] = {};
  float target[HWY_MAX_BYTES / sizeof(float)];
  std::memcpy(source, from + 2 * i, 2 * (count - i));
  widen(source, target);
  std::memcpy(to + i, target, sizeof(float) * (count - i));
}

template <VU16 (*kNarrow)(VF32)>
HWY_ATTR void NarrowAll(const float* from, int64_t count, std::byte* to) {
  const DF32 df;
  const DU16 du16;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const auto narrow = [&](const float* source, uint16_t* target)
                          HWY_ATTR { hn::StoreU(kNarrow(hn::LoadU(df, source)), du16, target); };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    narrow(from + i, reinterpret_cast<uint16_t*>(to + 2 * i));
  }
  if (i >= count) return;
  float source[HWY_MAX_BYTES / sizeof(float)] = {};
  uint16_t target[HWY_MAX_BYTES / sizeof(float)];
  std::memcpy(source, from + i, sizeof(float) * (count - i));
  narrow(source, target);
  std::memcpy(to + 2 * i, target, 2 * (count - i));
}

// Where to look closer: the start of the first block that holds an element whose bits under
// `exponent_mask` are all ones, else of the tail that fills no block.
template <typename T>
HWY_ATTR int64_t FirstSuspectBlock(const std::byte* from, int64_t count, T exponent_mask) {
  const hn::ScalableTag<T> d;
  const auto mask = hn::Set(d, exponent_mask);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto special = [&](int64_t i) HWY_ATTR {
    const auto bits = hn::LoadU(d, reinterpret_cast<const T*>(from) + i);
    return hn::Eq(hn::And(bits, mask), mask);
  };
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    const auto any = hn::Or(hn::Or(special(i), special(i + lanes)),
                            hn::Or(special(i + 2 * lanes), special(i + 3 * lanes)));
    if (!hn::AllFalse(d, any)) return i;
  }
  return i;
}

void WidenHalves(const std::byte* from, int64_t count, float* to) {
  WidenAll<true>(from, count, to);
}
void WidenBFloat16s(const std::byte* from, int64_t count, float* to) {
  WidenAll<false>(from, count, to);
}
void NarrowToHalves(const float* from, int64_t count, std::byte* to) {
  NarrowAll<NarrowToHalf>(from, count, to);
}
void NarrowToHalvesSaturated(const float* from, int64_t count, std::byte* to) {
  NarrowAll<NarrowToHalfSaturated>(from, count, to);
}
void NarrowToBFloat16s(const float* from, int64_t count, std::byte* to) {
  NarrowAll<NarrowToBFloat16>(from, count, to);
}
int64_t FirstSuspectBlock16(const std::byte* from, int64_t count, uint16_t mask) {
  return FirstSuspectBlock<uint16_t>(from, count, mask);
}
int64_t FirstSuspectBlock32(const std::byte* from, int64_t count, uint32_t mask) {
  return FirstSuspectBlock<uint32_t>(from, count, mask);
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterkv::kernels {
namespace {

HWY_EXPORT(WidenHalves);
HWY_EXPORT(WidenBFloat16s);
HWY_EXPORT(NarrowToHalves);
HWY_EXPORT(NarrowToHalvesSaturated);
HWY_EXPORT(NarrowToBFloat16s);
HWY_EXPORT(FirstSuspectBlock16);
HWY_EXPORT(FirstSuspectBlock32);

uint32_t FloatBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float BitsFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The bits of an element's exponent: all ones in infinities and NaNs, and only there.
uint32_t ExponentMask(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return 0x7f800000u;
    case ElementType::kFloat16:
      return 0x7c00u;
    case ElementType::kBFloat16:
      return 0x7f80u;
  }
  CKV_CHECK(false) << "element type " << static_cast<int>(type);
  return 0;
}

}  // namespace

std::string_view ElementTypeName(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return "fp32";
    case ElementType::kFloat16:
      return "fp16";
    case ElementType::kBFloat16:
      return "bf16";
  }
  return "unknown";
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const float scaled = BitsFloat((half & 0x7fffu) << 13) * 0x1p112f;
  // The largest exponent means infinity or NaN; the mantissa stays.
  const uint32_t special = scaled >= 0x1p16f ? 0x7f800000u : 0;
  return BitsFloat(FloatBits(scaled) | special | sign);
}

uint16_t FloatToHalf(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN: quiet, with what fits of its payload
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536 and beyond
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at a half's last bit
    half = FloatBits(BitsFloat(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

uint16_t FloatToHalfSaturated(float value) {
  // Comparisons with NaN are false, so that a NaN passes.
  if (value > kLargestHalf) value = kLargestHalf;
  if (value < -kLargestHalf) value = -kLargestHalf;
  return FloatToHalf(value);
}

float BFloat16ToFloat(uint16_t value) { return BitsFloat(static_cast<uint32_t>(value) << 16); }

uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = FloatBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float LoadElement(const std::byte* element, ElementType type) {
  if (type == ElementType::kFloat32) {
    float value;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, element, sizeof(bits));
  return type == ElementType::kFloat16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
}

void StoreElement(float value, std::byte* element, ElementType type) {
  if (type == ElementType::kFloat32) {
    std::memcpy(element, &value, sizeof(value));
    return;
  }
  const uint16_t bits = type == ElementType::kFloat16 ? FloatToHalf(value) : FloatToBFloat16(value);
  std::memcpy(element, &bits, sizeof(bits));
}

void ToFloat(const std::byte* from, ElementType type, int64_t count, float* to) {
  if (count <= 0) return;
  switch (type) {
    case ElementType::kFloat32:
      std::memcpy(to, from, sizeof(float) * count);
      return;
    case ElementType::kFloat16:
      HWY_DYNAMIC_DISPATCH(WidenHalves)(from, count, to);
      return;
    case ElementType::kBFloat16:
      HWY_DYNAMIC_DISPATCH(WidenBFloat16s)(from, count, to);
      return;
  }
}

void FromFloat(const float* from, ElementType type, int64_t count, std::byte* to) {
  if (count <= 0) return;
  switch (type) {
    case ElementType::kFloat32:
      std::memcpy(to, from, sizeof(float) * count);
      return;
    case ElementType::kFloat16:
      HWY_DYNAMIC_DISPATCH(NarrowToHalves)(from, count, to);
      return;
    case ElementType::kBFloat16:
      HWY_DYNAMIC_DISPATCH(NarrowToBFloat16s)(from, count, to);
      return;
  }
}

void HalvesToFloat(const uint16_t* from, int64_t count, float* to) {
  ToFloat(reinterpret_cast<const std::byte*>(from), ElementType::kFloat16, count, to);
}

void FloatToHalvesSaturated(const float* from, int64_t count, uint16_t* to) {
  if (count <= 0) return;
  HWY_DYNAMIC_DISPATCH(NarrowToHalvesSaturated)(from, count, reinterpret_cast<std::byte*>(to));
}

bool AllFinite(const std::byte* from, ElementType type, int64_t count, int64_t* first_bad) {
  if (count <= 0) return true;
  const uint32_t mask = ExponentMask(type);
  const int64_t begin =
      type == ElementType::kFloat32
          ? HWY_DYNAMIC_DISPATCH(FirstSuspectBlock32)(from, count, mask)
          : HWY_DYNAMIC_DISPATCH(FirstSuspectBlock16)(from, count, static_cast<uint16_t>(mask));
  for (int64_t i = begin; i < count; ++i) {
    if (std::isfinite(LoadElement(from + i * ElementBytes(type), type))) continue;
    if (first_bad != nullptr) *first_bad = i;
    return false;
  }
  return true;
}

}  // namespace clusterkv::kernels
#endif  // HWY_ONCE
