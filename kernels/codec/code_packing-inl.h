// Highway's side of code_packing.h: packs and unpacks vectors of codes. Included once per target.
#if defined(CLUSTERKV_KERNELS_CODEC_CODE_PACKING_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CLUSTERKV_KERNELS_CODEC_CODE_PACKING_INL_H_
#undef CLUSTERKV_KERNELS_CODEC_CODE_PACKING_INL_H_
#else
#define CLUSTERKV_KERNELS_CODEC_CODE_PACKING_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/codec/code_packing.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Vectors of at most 16 floats: whole vectors always fit a block of 16 channels.
using CodeFloatTag = hn::CappedTag<float, 16>;
using CodeWordTag = hn::RebindToUnsigned<CodeFloatTag>;
using CodeWords = hn::Vec<CodeWordTag>;

// Iota by a load: Highway's makes its vector on the stack at each call.
HWY_INLINE CodeWords LaneNumbers(size_t first) {
  HWY_ALIGN static constexpr uint32_t kNumbers[kCodeBlockChannels] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                                      8, 9, 10, 11, 12, 13, 14, 15};
  return hn::LoadU(CodeWordTag(), kNumbers + first);
}

// Shifts of the channels [first, first + lanes) of a block.
template <int kBits>
HWY_INLINE CodeWords CodeShifts(size_t first) {
  const CodeWords channel = LaneNumbers(first);
  if constexpr (kBits == 4) {
    return hn::ShiftLeft<2>(hn::ShiftRight<1>(channel));
  } else {
    return hn::ShiftLeft<1>(channel);
  }
}

// The codes of channels [first, first + lanes) of a block as uint32. REQUIRES: first % lanes == 0.
template <int kBits>
HWY_INLINE CodeWords UnpackCodes(const std::byte* HWY_RESTRICT packed, int64_t channels,
                                 int64_t block, size_t first) {
  const CodeWordTag du;
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(du, LoadCode(packed, kBits, channels,
                              block * kCodeBlockChannels + static_cast<int64_t>(first)));
#else
  if constexpr (kBits == 4) {
    const hn::Repartition<uint64_t, CodeWordTag> du64;
    uint64_t pair;
    std::memcpy(&pair, packed + block * 8, 8);
    const CodeWords words = hn::BitCast(du, hn::Set(du64, pair));
    return hn::And(hn::Shr(words, CodeShifts<4>(first)), hn::Set(du, 15u));
  } else {
    uint32_t word;
    std::memcpy(&word, packed + block * 4, 4);
    const CodeWords low =
        hn::And(hn::Shr(hn::Set(du, word), CodeShifts<2>(first)), hn::Set(du, 3u));
    if constexpr (kBits == 2) return low;
    uint16_t plane;
    std::memcpy(&plane, packed + channels / 4 + block * 2, 2);
    const CodeWords lane = LaneNumbers(first);
    const CodeWords bit =
        hn::And(hn::Shr(hn::Set(du, static_cast<uint32_t>(plane)), lane), hn::Set(du, 1u));
    return hn::Or(low, hn::ShiftLeft<2>(bit));
  }
#endif
}

// Calls f(channel, codes as floats) for every vector of channels of blocks [begin, end).
template <int kBits, class F>
HWY_INLINE void ForEachCodeVector(const std::byte* HWY_RESTRICT packed, int64_t channels,
                                  int64_t begin, int64_t end, const F& f) {
  const hn::RebindToSigned<CodeFloatTag> di;
  const size_t lanes = hn::Lanes(CodeFloatTag());
  for (int64_t block = begin; block < end; ++block) {
    for (size_t first = 0; first < kCodeBlockChannels; first += lanes) {
      const CodeWords codes = UnpackCodes<kBits>(packed, channels, block, first);
      f(block * kCodeBlockChannels + static_cast<int64_t>(first),
        hn::ConvertTo(CodeFloatTag(), hn::BitCast(di, codes)));
    }
  }
}

// Packs one block: codes [16], each below 2^kBits, are those of `block`, whose bits are zero
// before.
template <int kBits>
HWY_INLINE void PackBlock(const uint32_t* HWY_RESTRICT codes, std::byte* HWY_RESTRICT packed,
                          int64_t channels, int64_t block) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t i = 0; i < kCodeBlockChannels; ++i) {
    StoreCode(codes[i], packed, kBits, channels, block * kCodeBlockChannels + i);
  }
#else
  const CodeWordTag du;
  const size_t lanes = hn::Lanes(du);
  if constexpr (kBits == 4) {
    // Channels 2k and 2k + 1 are the halves of 64-bit lane k, so that one sum makes both words.
    const hn::Repartition<uint64_t, CodeWordTag> du64;
    auto pair = hn::Zero(du64);
    for (size_t i = 0; i < kCodeBlockChannels; i += lanes) {
      const CodeWords placed = hn::Shl(hn::LoadU(du, codes + i), CodeShifts<4>(i));
      pair = hn::Or(pair, hn::BitCast(du64, placed));
    }
    const uint64_t word = hn::GetLane(hn::SumOfLanes(du64, pair));
    std::memcpy(packed + block * 8, &word, 8);
  } else {
    CodeWords low = hn::Zero(du);
    CodeWords high = hn::Zero(du);
    for (size_t i = 0; i < kCodeBlockChannels; i += lanes) {
      const CodeWords code = hn::LoadU(du, codes + i);
      low = hn::Or(low, hn::Shl(hn::And(code, hn::Set(du, 3u)), CodeShifts<2>(i)));
      if constexpr (kBits == 3) {
        const CodeWords lane = LaneNumbers(i);
        high = hn::Or(high, hn::Shl(hn::ShiftRight<2>(code), lane));
      }
    }
    const uint32_t word = hn::GetLane(hn::SumOfLanes(du, low));
    std::memcpy(packed + block * 4, &word, 4);
    if constexpr (kBits == 3) {
      const uint16_t plane = static_cast<uint16_t>(hn::GetLane(hn::SumOfLanes(du, high)));
      std::memcpy(packed + channels / 4 + block * 2, &plane, 2);
    }
  }
#endif
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // CLUSTERKV_KERNELS_CODEC_CODE_PACKING_INL_H_
