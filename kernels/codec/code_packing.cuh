// code_packing.h for the GPU: residual codes as operands of the matrix unit.
//
// A code enters a product as the half of its number, not as the subnormal half with the code as its
// bits: the matrix unit aligns products by their exponents before it adds them, and a subnormal's
// leading zeros take up to ten of the sum's 24 bits. A block is 16 channels, as in code_packing.h.
#ifndef CLUSTERKV_KERNELS_CODEC_CODE_PACKING_CUH_
#define CLUSTERKV_KERNELS_CODEC_CODE_PACKING_CUH_

#include <cstdint>

#include "kernels/base/cuda_util.cuh"

namespace clusterkv::kernels::cuda {

constexpr int kCodeBlock = 16;

// Where things lie in one token's codes (residual_codes.h).
struct CodesLayout {
  int groups;        // head_dim / group_channels
  int group_blocks;  // group_channels / 16
  int packed_bytes;  // of K's or V's bits

  __host__ __device__ int KeyScales() const { return 0; }
  __host__ __device__ int KeyLows() const { return 2 * groups; }
  __host__ __device__ int ValueScales() const { return 4 * groups; }
  __host__ __device__ int ValueLows() const { return 6 * groups; }
  __host__ __device__ int KeyBits() const { return 8 * groups; }
  __host__ __device__ int ValueBits() const { return 8 * groups + packed_bytes; }
  __host__ __device__ int Bytes() const { return 8 * groups + 2 * packed_bytes; }
};
inline __host__ __device__ CodesLayout MakeCodesLayout(int bits, int group_channels, int head_dim) {
  return {head_dim / group_channels, group_channels / kCodeBlock, (head_dim * bits + 31) / 32 * 4};
}

// The packed codes of one block as they are loaded.
template <int kBits>
struct CodeBlock {
  uint32_t word0,
      word1;  // word1: 3 bits: the plane of third bits; 4 bits: the odd channels; 2 bits: unused

  __device__ __forceinline__ void Load(const unsigned char* packed, int head_dim, int block) {
    if constexpr (kBits == 4) {
      word0 = *reinterpret_cast<const uint32_t*>(packed + 8 * block);
      word1 = *reinterpret_cast<const uint32_t*>(packed + 8 * block + 4);
    } else {
      word0 = *reinterpret_cast<const uint32_t*>(packed + 4 * block);
      word1 = 0;
      if constexpr (kBits == 3) {
        word1 = *reinterpret_cast<const uint16_t*>(packed + head_dim / 4 + 2 * block);
      }
    }
  }

  // Channels (2t, 2t + 8) and (2t + 1, 2t + 9) of the block as two pairs of halves.
  __device__ __forceinline__ void ChannelPairs(int t, uint32_t* even, uint32_t* odd) const {
    if constexpr (kBits == 4) {
      *even = BytesToHalves(word0 >> (4 * t) & 0x000f000fu);
      *odd = BytesToHalves(word1 >> (4 * t) & 0x000f000fu);
    } else {
      uint32_t even_codes = word0 >> (4 * t) & 0x00030003u;
      uint32_t odd_codes = word0 >> (4 * t + 2) & 0x00030003u;
      if constexpr (kBits == 3) {
        const uint32_t plane = (word1 & 0xffu) | (word1 & 0xff00u) << 8;
        even_codes |= (plane >> (2 * t) & 0x00010001u) << 2;
        odd_codes |= (plane >> (2 * t + 1) & 0x00010001u) << 2;
      }
      *even = BytesToHalves(even_codes);
      *odd = BytesToHalves(odd_codes);
    }
  }
};
// Of ChannelPairs: the channel in the block of k-index `k` of a matrix product over the block.
inline __host__ __device__ int ChannelOfIndex(int k) {
  const int pair = k % 8 / 2;
  return 2 * pair + k / 8 + k % 2 * 8;
}

// Channel `HalfChannel(half, column)` of tokens a and b as a pair of halves: half 0 or 1, column 0
// to 7.
template <int kBits>
__device__ __forceinline__ uint32_t TokenPair(const CodeBlock<kBits>& a, const CodeBlock<kBits>& b,
                                              int half, int column) {
  if constexpr (kBits == 4) {
    const uint32_t wa = half ? a.word1 : a.word0, wb = half ? b.word1 : b.word0;
    return BytesToHalves((wa >> (4 * column) & 0xfu) | (wb >> (4 * column) & 0xfu) << 16);
  } else {
    uint32_t pair =
        __byte_perm(a.word0, b.word0, half ? 0x7632 : 0x5410) >> (2 * column) & 0x00030003u;
    if constexpr (kBits == 3) {
      const int bit = 8 * half + column;
      pair |= (a.word1 >> bit & 1u) << 2 | (b.word1 >> bit & 1u) << 18;
    }
    return BytesToHalves(pair);
  }
}
template <int kBits>
__device__ __forceinline__ int HalfChannel(int half, int column) {
  return kBits == 4 ? 2 * column + half : 8 * half + column;
}

}  // namespace clusterkv::kernels::cuda

#endif  // CLUSTERKV_KERNELS_CODEC_CODE_PACKING_CUH_
