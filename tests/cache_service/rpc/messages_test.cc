#define XXH_STATIC_LINKING_ONLY
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cmath>
#include <limits>

#include "cache_service/rpc/select_messages.h"
#include "cache_service/rpc/vectors.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

using kernels::ElementType;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

absl::Status Parse(const v1::Vector& vector, std::vector<float>* out) {
  return ParseVector(vector, "queries", v1::NON_FINITE_QUERY, out);
}

TEST(VectorsTest, PackedAndPlainNumbersAreTheSame) {
  const std::vector<float> numbers = {1, -2, 0.5f, 65504};
  v1::Vector plain;
  for (const float number : numbers) plain.add_values(number);
  std::vector<float> parsed;
  ASSERT_TRUE(Parse(plain, &parsed).ok());
  EXPECT_EQ(parsed, numbers);
  for (const ElementType type : {ElementType::kFloat32, ElementType::kFloat16}) {
    v1::Vector packed;
    packed.set_type(static_cast<v1::ElementType>(type));
    PackNumbers(numbers, type, packed.mutable_data());
    EXPECT_THAT(packed.data(), SizeIs(numbers.size() * kernels::ElementBytes(type)));
    ASSERT_TRUE(Parse(packed, &parsed).ok());
    EXPECT_EQ(parsed, numbers);
  }
}

TEST(VectorsTest, HalvesSaturateInsteadOfBecomingInfinite) {
  std::vector<float> numbers(300, 1e30f);
  numbers[299] = -1e30f;
  v1::Vector packed;
  packed.set_type(v1::ELEMENT_TYPE_FLOAT16);
  PackNumbers(numbers, ElementType::kFloat16, packed.mutable_data());
  std::vector<float> parsed;
  ASSERT_TRUE(Parse(packed, &parsed).ok());
  EXPECT_EQ(parsed[0], 65504);
  EXPECT_EQ(parsed[299], -65504);
}

TEST(VectorsTest, EveryNonFiniteHalfIsRefusedByItsIndex) {
  for (const uint16_t bad : {uint16_t{0x7c00}, uint16_t{0xfc00}, uint16_t{0x7e01}}) {
    v1::Vector vector;
    vector.set_type(v1::ELEMENT_TYPE_FLOAT16);
    std::string data(2 * 67, '\0');
    data.replace(2 * 41, 2, reinterpret_cast<const char*>(&bad), 2);
    vector.set_data(data);
    std::vector<float> parsed;
    const absl::Status status = Parse(vector, &parsed);
    EXPECT_EQ(ReasonOf(status), v1::NON_FINITE_QUERY);
    EXPECT_THAT(std::string(status.message()), HasSubstr("queries[41]"));
  }
}

TEST(RecordPackerTest, RecordsAreCutIntoMessagesAndKeepTheirOrder) {
  constexpr int64_t kRecordBytes = 10;
  std::vector<std::byte> memory(kRecordBytes * 100);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i * 7);
  std::vector<int32_t> first(23), second(5), none;
  std::vector<const std::byte*> first_records, second_records, no_records;
  for (int i = 0; i < 23; ++i) {
    first[static_cast<size_t>(i)] = 3 * i;
    first_records.push_back(memory.data() + (99 - i) * kRecordBytes);  // scattered
  }
  for (int i = 0; i < 5; ++i) {
    second[static_cast<size_t>(i)] = i;
    second_records.push_back(memory.data() + i * kRecordBytes);
  }
  RecordPacker packer;
  packer.Add({1, 2, 0, &first, &first_records, kRecordBytes});
  packer.Add({1, 2, 1, &none, &no_records, kRecordBytes});
  packer.Add({1, 2, 2, &second, &second_records, kRecordBytes});
  std::vector<size_t> counts;
  std::string packed;
  std::vector<uint32_t> positions;
  while (!packer.done()) {
    v1::RecordChunk chunk;
    const int64_t bytes = packer.Next(95, &chunk);
    EXPECT_EQ(bytes, static_cast<int64_t>(chunk.records().size()));
    EXPECT_EQ(chunk.item(), 1u);
    EXPECT_EQ(chunk.layer(), 2u);
    EXPECT_EQ(chunk.checksum(), XXH3_64bits(chunk.records().data(), chunk.records().size()));
    counts.push_back(static_cast<size_t>(chunk.positions_size()));
    EXPECT_EQ(chunk.kv_head(), counts.size() <= 3 ? 0u : 2u);
    packed += chunk.records();
    positions.insert(positions.end(), chunk.positions().begin(), chunk.positions().end());
  }
  EXPECT_THAT(counts, ElementsAre(9, 9, 5, 5));
  std::string expected;
  for (const auto* records : {&first_records, &second_records}) {
    for (const std::byte* record : *records) {
      expected.append(reinterpret_cast<const char*>(record), kRecordBytes);
    }
  }
  EXPECT_EQ(packed, expected);
  EXPECT_EQ(positions[22], 66u);
  EXPECT_EQ(positions[23], 0u);
}

TEST(RecordPackerTest, ARecordLargerThanAMessageGoesAlone) {
  const std::vector<std::byte> memory(4096);
  const std::vector<int32_t> positions = {1, 2};
  const std::vector<const std::byte*> records = {memory.data(), memory.data()};
  RecordPacker packer;
  packer.Add({0, 0, 0, &positions, &records, 4096});
  v1::RecordChunk chunk;
  EXPECT_EQ(packer.Next(100, &chunk), 4096);
  EXPECT_FALSE(packer.done());
}

TEST(SplitIndexChunkTest, PiecesTogetherAreTheWhole) {
  v1::IndexChunk whole;
  whole.set_kv_head(3);
  whole.set_part(1);
  whole.set_first_cluster(100);
  constexpr int kClusters = 53, kRow = 64;
  for (int c = 0; c < kClusters; ++c) {
    whole.add_sizes(static_cast<uint32_t>(c % 4));
    for (int i = 0; i < c % 4; ++i) whole.add_positions(static_cast<uint32_t>(1000 * c + i));
    whole.mutable_centroids()->mutable_data()->append(kRow, static_cast<char>(c));
    whole.mutable_value_means()->mutable_data()->append(kRow, static_cast<char>(2 * c));
  }
  whole.mutable_centroids()->set_type(v1::ELEMENT_TYPE_FLOAT32);
  whole.mutable_metric_weights()->set_data("weights.");
  std::vector<v1::IndexChunk> pieces;
  SplitIndexChunk(whole, 1000, &pieces);
  EXPECT_GT(pieces.size(), 5u);
  v1::IndexChunk joined = pieces[0];
  for (size_t i = 0; i < pieces.size(); ++i) {
    EXPECT_LT(pieces[i].ByteSizeLong(), 1300u);
    EXPECT_EQ(pieces[i].kv_head(), 3u);
    EXPECT_EQ(pieces[i].has_metric_weights(), i == 0);
    if (i == 0) continue;
    EXPECT_EQ(pieces[i].first_cluster(), 100u + static_cast<uint32_t>(joined.sizes_size()));
    joined.mutable_sizes()->MergeFrom(pieces[i].sizes());
    joined.mutable_positions()->MergeFrom(pieces[i].positions());
    joined.mutable_centroids()->mutable_data()->append(pieces[i].centroids().data());
    joined.mutable_value_means()->mutable_data()->append(pieces[i].value_means().data());
  }
  EXPECT_EQ(joined.SerializeAsString(), whole.SerializeAsString());
}

TEST(SplitIndexChunkTest, WhatFitsStaysWhole) {
  v1::IndexChunk small;
  small.add_sizes(1);
  small.add_positions(5);
  std::vector<v1::IndexChunk> pieces;
  SplitIndexChunk(small, 1000, &pieces);
  ASSERT_THAT(pieces, SizeIs(1));
  EXPECT_EQ(pieces[0].SerializeAsString(), small.SerializeAsString());
}

TEST(SelectionDigestTest, TellsPositionsMasksAndHeadsApart) {
  kernels::HeadSelection a, b;
  a.positions = {1, 2, 3};
  b.positions = {1, 2, 4};
  EXPECT_NE(SelectionDigest({a}), SelectionDigest({b}));
  EXPECT_NE(SelectionDigest({a, b}), SelectionDigest({b, a}));
  kernels::HeadSelection masked = a;
  masked.head_masks = {1, 1, 2};
  EXPECT_NE(SelectionDigest({a}), SelectionDigest({masked}));
  a.clusters = {9, 9, 9};
  EXPECT_EQ(SelectionDigest({a}), SelectionDigest({[&] {
              kernels::HeadSelection same;
              same.positions = a.positions;
              return same;
            }()}));
}

}  // namespace
}  // namespace clusterkv::cache_service
