// "k8v4": keys in 8 bits, values in 4, asymmetric per token and KV head over all of head_dim.
//
// Record at head_dim D (little-endian; D + D / 2 + 8 bytes, 200 at D = 128, whatever the element
// type):
//   byte 0   key scale, key zero, value scale, value zero: fp16 each
//   byte 8   D key codes, one byte each
//   8 + D    D value codes of 4 bits, in blocks of 16 channels as code_packing.h says
// x = zero + scale * code, with zero = min x, scale = (max x - min x) / (2^bits - 1), both rounded
// to fp16 before the codes are made, so that no code pays for their rounding twice. A constant
// vector has scale 0 and decodes to zero. Elements beyond fp16's range saturate to its ends.
//
// Remainder (D / 2 bytes): what the value code's step of `value scale` hides, in 16 steps of its
// own: value - decoded value = (code - 7.5) * value scale / 16, codes packed as those of the value.
// A copied token shows its value's rounding whole, and 4 bits are too few for it; with 4 more,
// which stay at the service, a value is known to 1/480 of its range.
// Source: LeanKV / DiffKV (arXiv 2412.03131), K8V4, one chunk per head.
#include <algorithm>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/code_packing.h"
#include "kernels/codec/record_codec.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/codec/k8v4_codec.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After foreach_target.h.
#include "kernels/codec/code_packing-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {

// Scale and zero of x [head_dim], as the decoder will see them. Clamps x to fp16's range in place.
template <int kBits>
void EncodeRange(int64_t head_dim, float* HWY_RESTRICT x, std::byte* HWY_RESTRICT meta,
                 float* scale, float* zero) {
  const CodeFloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto lowest = hn::Set(d, kLargestHalf);
  auto highest = hn::Set(d, -kLargestHalf);
  for (int64_t j = 0; j < head_dim; j += lanes) {
    const auto clamped =
        hn::Min(hn::Max(hn::LoadU(d, x + j), hn::Set(d, -kLargestHalf)), hn::Set(d, kLargestHalf));
    hn::StoreU(clamped, d, x + j);
    lowest = hn::Min(lowest, clamped);
    highest = hn::Max(highest, clamped);
  }
  const float low = hn::GetLane(hn::MinOfLanes(d, lowest));
  const float high = hn::GetLane(hn::MaxOfLanes(d, highest));
  // + 0: -0 and 0 give the same record whatever the order of min.
  const uint16_t halves[2] = {FloatToHalfSaturated((high - low) / ((1 << kBits) - 1)),
                              FloatToHalfSaturated(low + 0.0f)};
  std::memcpy(meta, halves, 4);
  *scale = HalfToFloat(halves[0]);
  *zero = HalfToFloat(halves[1]);
}

// Codes of x [head_dim] as uint32, at most 2^kBits - 1.
template <int kBits>
void Quantize(int64_t head_dim, const float* HWY_RESTRICT x, float scale, float zero,
              uint32_t* HWY_RESTRICT codes) {
  const CodeFloatTag d;
  const CodeWordTag du;
  const hn::RebindToSigned<CodeFloatTag> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto has_range = hn::Gt(hn::Set(d, scale), hn::Zero(d));
  for (int64_t j = 0; j < head_dim; j += lanes) {
    const auto steps =
        hn::Round(hn::Div(hn::Sub(hn::LoadU(d, x + j), hn::Set(d, zero)), hn::Set(d, scale)));
    const auto code = hn::Min(hn::Max(hn::IfThenElseZero(has_range, steps), hn::Zero(d)),
                              hn::Set(d, static_cast<float>((1 << kBits) - 1)));
    hn::StoreU(hn::BitCast(du, hn::ConvertTo(di, code)), du, codes + j);
  }
}

// x [2 * head_dim]: key, then value. Overwritten.
void EncodeK8V4(int64_t head_dim, float* HWY_RESTRICT x, uint32_t* HWY_RESTRICT codes,
                std::byte* HWY_RESTRICT record) {
  const CodeWordTag du;
  const hn::Rebind<uint8_t, CodeWordTag> du8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(du));
  float scale, zero;
  EncodeRange<8>(head_dim, x, record, &scale, &zero);
  Quantize<8>(head_dim, x, scale, zero, codes);
  uint8_t* key_codes = reinterpret_cast<uint8_t*>(record + 8);
  for (int64_t j = 0; j < head_dim; j += lanes) {
    hn::StoreU(hn::U8FromU32(hn::LoadU(du, codes + j)), du8, key_codes + j);
  }
  EncodeRange<4>(head_dim, x + head_dim, record + 4, &scale, &zero);
  Quantize<4>(head_dim, x + head_dim, scale, zero, codes);
  for (int64_t block = 0; block < head_dim / kCodeBlockChannels; ++block) {
    PackBlock<4>(codes + block * kCodeBlockChannels, record + 8 + head_dim, head_dim, block);
  }
}

// x[j] = scale * code[j] + zero, of codes of 8 bits.
void DecodeEightBits(int64_t head_dim, const std::byte* HWY_RESTRICT packed, float scale,
                     float zero, float* HWY_RESTRICT x) {
  const CodeFloatTag d;
  const hn::RebindToSigned<CodeFloatTag> di;
  const hn::Rebind<uint8_t, CodeFloatTag> du8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto s = hn::Set(d, scale), z = hn::Set(d, zero);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(packed);
  for (int64_t j = 0; j < head_dim; j += lanes) {
    const auto codes = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(du8, bytes + j)));
    hn::StoreU(hn::Add(hn::Mul(codes, s), z), d, x + j);
  }
}

// The same of codes of 4 bits.
void DecodeFourBits(int64_t head_dim, const std::byte* HWY_RESTRICT packed, float scale, float zero,
                    float* HWY_RESTRICT x) {
  const CodeFloatTag d;
  const auto s = hn::Set(d, scale), z = hn::Set(d, zero);
  ForEachCodeVector<4>(packed, head_dim, 0, head_dim / kCodeBlockChannels,
                       [&](int64_t j, auto codes)
                           HWY_ATTR { hn::StoreU(hn::Add(hn::Mul(codes, s), z), d, x + j); });
}

// x [head_dim]: the value, overwritten; decoded [head_dim] of its record. Elements beyond fp16's
// range are taken as its ends, as the record has them; remainders beyond half a step of the value's
// (fp16 rounded its scale or zero) saturate.
void EncodeRemainder(int64_t head_dim, float step, float* HWY_RESTRICT x,
                     const float* HWY_RESTRICT decoded, uint32_t* HWY_RESTRICT codes,
                     std::byte* HWY_RESTRICT packed) {
  const CodeFloatTag d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto largest = hn::Set(d, kLargestHalf);
  for (int64_t j = 0; j < head_dim; j += lanes) {
    const auto clamped = hn::Min(hn::Max(hn::LoadU(d, x + j), hn::Neg(largest)), largest);
    hn::StoreU(hn::Sub(clamped, hn::LoadU(d, decoded + j)), d, x + j);
  }
  Quantize<4>(head_dim, x, step, -7.5f * step, codes);
  for (int64_t block = 0; block < head_dim / kCodeBlockChannels; ++block) {
    PackBlock<4>(codes + block * kCodeBlockChannels, packed, head_dim, block);
  }
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterkv::kernels {
namespace {

HWY_EXPORT(EncodeK8V4);
HWY_EXPORT(DecodeEightBits);
HWY_EXPORT(DecodeFourBits);
HWY_EXPORT(EncodeRemainder);

constexpr int64_t kMaxHeadDim = 512;

// Scale and zero of a key (at byte 0 of its record) or value (at byte 4).
struct Range {
  explicit Range(const std::byte* meta) {
    uint16_t halves[2];
    std::memcpy(halves, meta, 4);
    scale = HalfToFloat(halves[0]);
    zero = HalfToFloat(halves[1]);
  }
  // Of remainders.
  float step() const { return scale / 16; }

  float scale, zero;
};

class K8V4 final : public RecordCodec {
 public:
  std::string_view name() const override { return "k8v4"; }

  int64_t RecordBytes(ElementType, int64_t head_dim) const override {
    return 8 + head_dim + head_dim / 2;
  }

  void Encode(const std::byte* keys, int64_t key_stride_bytes, const std::byte* values,
              int64_t value_stride_bytes, ElementType type, int64_t head_dim, int64_t count,
              std::byte* records) const override {
    CheckHeadDim(head_dim);
    const int64_t record_bytes = RecordBytes(type, head_dim);
    float x[2 * kMaxHeadDim];
    uint32_t codes[kMaxHeadDim];
    for (int64_t i = 0; i < count; ++i) {
      std::byte* record = records + i * record_bytes;
      ToFloat(keys + i * key_stride_bytes, type, head_dim, x);
      ToFloat(values + i * value_stride_bytes, type, head_dim, x + head_dim);
      std::memset(record, 0, record_bytes);  // packing sets bits in zeros
      HWY_DYNAMIC_DISPATCH(EncodeK8V4)(head_dim, x, codes, record);
    }
  }

  void Decode(const std::byte* record, ElementType, int64_t head_dim, float* key,
              float* value) const override {
    CheckHeadDim(head_dim);
    if (key != nullptr) {
      const Range range(record);
      HWY_DYNAMIC_DISPATCH(DecodeEightBits)(head_dim, record + 8, range.scale, range.zero, key);
    }
    if (value != nullptr) DecodeValue(record, head_dim, value);
  }

  int64_t RemainderBytes(ElementType, int64_t head_dim) const override { return head_dim / 2; }

  void EncodeRemainders(const std::byte* values, int64_t value_stride_bytes, ElementType type,
                        int64_t head_dim, int64_t count, const std::byte* records,
                        std::byte* remainders) const override {
    CheckHeadDim(head_dim);
    const int64_t remainder_bytes = RemainderBytes(type, head_dim);
    float x[kMaxHeadDim], decoded[kMaxHeadDim];
    uint32_t codes[kMaxHeadDim];
    for (int64_t i = 0; i < count; ++i) {
      const std::byte* record = records + i * RecordBytes(type, head_dim);
      std::byte* remainder = remainders + i * remainder_bytes;
      ToFloat(values + i * value_stride_bytes, type, head_dim, x);
      DecodeValue(record, head_dim, decoded);
      std::memset(remainder, 0, remainder_bytes);  // packing sets bits in zeros
      HWY_DYNAMIC_DISPATCH(EncodeRemainder)
      (head_dim, Range(record + 4).step(), x, decoded, codes, remainder);
    }
  }

  void DecodeRemainder(const std::byte* record, const std::byte* remainder_code, ElementType,
                       int64_t head_dim, float* remainder) const override {
    CheckHeadDim(head_dim);
    const float step = Range(record + 4).step();
    HWY_DYNAMIC_DISPATCH(DecodeFourBits)
    (head_dim, remainder_code, step, -7.5f * step, remainder);
  }

 private:
  static void DecodeValue(const std::byte* record, int64_t head_dim, float* value) {
    const Range range(record + 4);
    HWY_DYNAMIC_DISPATCH(DecodeFourBits)
    (head_dim, record + 8 + head_dim, range.scale, range.zero, value);
  }

  static void CheckHeadDim(int64_t head_dim) {
    CKV_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % kCodeBlockChannels == 0)
        << head_dim;
  }
};

}  // namespace

const RecordCodec* K8V4Codec() {
  static const K8V4& codec = *new K8V4;
  return &codec;
}

}  // namespace clusterkv::kernels
#endif  // HWY_ONCE
