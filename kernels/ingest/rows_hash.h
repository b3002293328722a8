// A hash of rows of K and V that threads may take in any order: the sum over 16-bit words of a
// mix of the word and its place. It tells chunks apart that lie on a GPU, where XXH3 would have to
// go through them one after the other. Not against who wants a collision.
#ifndef CLUSTERKV_KERNELS_INGEST_ROWS_HASH_H_
#define CLUSTERKV_KERNELS_INGEST_ROWS_HASH_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CKV_HOST_DEVICE __host__ __device__
#else
#define CKV_HOST_DEVICE
#endif

namespace clusterkv::kernels {

// What word `word` at `place` adds, places counted over keys, then values.
CKV_HOST_DEVICE inline uint64_t MixWord(uint64_t place, uint16_t word) {
  uint64_t x = (place << 16 | word) * 0x9e3779b97f4a7c15u;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93u;
  return x ^ x >> 29;
}

// The plain reference. keys, values [bytes], an even number; host memory.
inline uint64_t RowsHash(const void* keys, const void* values, size_t bytes) {
  uint64_t hash = 0, place = 0;
  for (const void* rows : {keys, values}) {
    for (size_t at = 0; at < bytes; at += sizeof(uint16_t), ++place) {
      uint16_t word = 0;
      std::memcpy(&word, static_cast<const char*>(rows) + at, sizeof(word));
      hash += MixWord(place, word);
    }
  }
  return hash;
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_INGEST_ROWS_HASH_H_
