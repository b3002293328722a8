// Where each channel's code lies among the packed bits: the one addressing of codes of 2, 3 and 4
// bits.
//
// Channels are packed in blocks of 16; head_dim is a multiple of 16. All words are little-endian.
//   2 bits  one uint32 per block; channel i of the block at bits [2 i, 2 i + 2)
//   3 bits  the low two bits of all blocks as above, then one uint16 per block: the third bit of
//           channel i at bit i
//   4 bits  two uint32 per block; channel i of the block at bits [4 (i / 2), 4 (i / 2) + 4) of word
//   i % 2
// A vector of 4, 8 or 16 lanes thus gets its codes from one broadcast load and one shift by lane
// (two of each for 3 bits): no table, no shuffle.
#ifndef CLUSTERKV_KERNELS_CODEC_CODE_PACKING_H_
#define CLUSTERKV_KERNELS_CODEC_CODE_PACKING_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace clusterkv::kernels {

static_assert(std::endian::native == std::endian::little, "packed codes are little-endian words");

constexpr int64_t kCodeBlockChannels = 16;

// Bytes of `channels` packed codes, rounded up to 4.
constexpr int64_t PackedCodeBytes(int bits, int64_t channels) {
  return (channels * bits + 31) / 32 * 4;
}

// The code of `channel`: the plain reference of all unpacking.
inline uint32_t LoadCode(const std::byte* packed, int bits, int64_t channels, int64_t channel) {
  const int64_t block = channel / kCodeBlockChannels;
  const int64_t i = channel % kCodeBlockChannels;
  uint32_t word;
  if (bits == 4) {
    std::memcpy(&word, packed + block * 8 + i % 2 * 4, 4);
    return word >> (4 * (i / 2)) & 15;
  }
  std::memcpy(&word, packed + block * 4, 4);
  const uint32_t low = word >> (2 * i) & 3;
  if (bits == 2) return low;
  uint16_t high;
  std::memcpy(&high, packed + channels / 4 + block * 2, 2);
  return low | (high >> i & 1u) << 2;
}

// Sets the code of `channel` in bits that were zero. The plain reference of all packing.
inline void StoreCode(uint32_t code, std::byte* packed, int bits, int64_t channels,
                      int64_t channel) {
  const int64_t block = channel / kCodeBlockChannels;
  const int64_t i = channel % kCodeBlockChannels;
  const auto or_word = [](std::byte* at, uint32_t value) {
    uint32_t word;
    std::memcpy(&word, at, 4);
    word |= value;
    std::memcpy(at, &word, 4);
  };
  if (bits == 4) {
    or_word(packed + block * 8 + i % 2 * 4, code << (4 * (i / 2)));
    return;
  }
  or_word(packed + block * 4, (code & 3) << (2 * i));
  if (bits == 2) return;
  std::byte* at = packed + channels / 4 + block * 2;
  uint16_t high;
  std::memcpy(&high, at, 2);
  high = static_cast<uint16_t>(high | (code >> 2) << i);
  std::memcpy(at, &high, 2);
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_CODEC_CODE_PACKING_H_
