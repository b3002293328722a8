#include "worker/kv_chunks.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <random>
#include <string>
#include <vector>

namespace clusterkv::worker {
namespace {

std::vector<std::byte> RandomBytes(size_t count, int seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

TEST(KvChunksTest, ChunksTileTheRowsInOrder) {
  constexpr int64_t kRowBytes = 48;
  for (const int64_t tokens : {1, 2, 31, 32, 33, 97}) {
    for (const int64_t chunk_bytes : {1, 95, 96, 97, 960, 32 * 96, 1 << 20}) {
      const std::vector<std::byte> keys = RandomBytes(tokens * kRowBytes, 1);
      const std::vector<std::byte> values = RandomBytes(tokens * kRowBytes, 2);
      std::string all_keys, all_values;
      uint32_t next = 5;
      for (const v1::PutKvRequest& request :
           CutIntoChunks({3, 5, tokens, keys, values, {}}, chunk_bytes)) {
        const v1::KvChunk& chunk = request.chunk();
        EXPECT_EQ(chunk.layer(), 3u);
        EXPECT_EQ(chunk.first_token(), next);
        EXPECT_GE(chunk.tokens(), 1u);
        EXPECT_TRUE(chunk.tokens() == 1 || chunk.tokens() * 2 * kRowBytes <= chunk_bytes);
        EXPECT_EQ(chunk.keys().size(), chunk.tokens() * kRowBytes);
        EXPECT_EQ(chunk.values().size(), chunk.tokens() * kRowBytes);
        next += chunk.tokens();
        all_keys += chunk.keys();
        all_values += chunk.values();
      }
      EXPECT_EQ(next, 5 + tokens);
      EXPECT_EQ(all_keys, std::string(reinterpret_cast<const char*>(keys.data()), keys.size()));
      EXPECT_EQ(all_values,
                std::string(reinterpret_cast<const char*>(values.data()), values.size()));
    }
  }
}

TEST(KvChunksTest, StatisticsComeBeforeTheChunksThatMayCompleteTheLayer) {
  const std::vector<std::byte> rows(64);
  const std::vector<float> query_rms = {1, 2, 3};
  const auto requests = CutIntoChunks({7, 0, 2, rows, rows, query_rms}, 64);
  ASSERT_EQ(requests.size(), 3u);
  ASSERT_TRUE(requests[0].has_statistics());
  EXPECT_FALSE(requests[0].has_chunk());
  EXPECT_EQ(requests[0].statistics().layer(), 7u);
  EXPECT_EQ(requests[0].statistics().query_rms().data().size(), 12u);
  EXPECT_TRUE(requests[1].has_chunk());
}

TEST(KvChunksTest, ChecksumIsOfKeysThenValues) {
  v1::KvChunk chunk;
  chunk.set_keys("abc");
  chunk.set_values("defg");
  EXPECT_EQ(ChunkChecksum(chunk), XXH3_64bits("abcdefg", 7));
}

}  // namespace
}  // namespace clusterkv::worker
