// What every record codec promises, run for each codec in the registry, and what "raw" promises.
#include "kernels/codec/record_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace clusterkv::kernels {
namespace {

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                  ElementType::kBFloat16};
constexpr int64_t kHeadDims[] = {16, 80, 96, 128, 256, 512};
constexpr std::byte kGuard{0xA5};

// `count` rows of `head_dim` elements, stride_bytes apart, guard bytes between them.
std::vector<std::byte> RandomRows(int64_t count, int64_t head_dim, ElementType type,
                                  int64_t stride_bytes, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.5f, 2.0f);
  std::vector<std::byte> rows(count * stride_bytes, kGuard);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < head_dim; ++j) {
      StoreElement(normal(random), rows.data() + i * stride_bytes + j * ElementBytes(type), type);
    }
  }
  return rows;
}

class RecordCodecTest : public testing::TestWithParam<const RecordCodec*> {
 protected:
  const RecordCodec& codec() const { return *GetParam(); }
};

TEST_P(RecordCodecTest, IsFoundByItsName) { EXPECT_EQ(FindRecordCodec(codec().name()), &codec()); }

TEST_P(RecordCodecTest, RecordsStayWithinTheLimit) {
  for (ElementType type : kTypes) {
    for (int64_t head_dim = 16; head_dim <= 512; head_dim += 16) {
      EXPECT_GT(codec().RecordBytes(type, head_dim), 0);
      EXPECT_LE(codec().RecordBytes(type, head_dim), 4096) << head_dim;
    }
  }
}

TEST_P(RecordCodecTest, ARecordDependsOnItsTokenAlone) {
  for (ElementType type : kTypes) {
    for (int64_t head_dim : kHeadDims) {
      const int64_t bytes = codec().RecordBytes(type, head_dim);
      const int64_t key_stride = head_dim * ElementBytes(type) + 32;
      const int64_t value_stride = head_dim * ElementBytes(type);
      for (int64_t count : {0, 1, 7, 33}) {
        const auto keys = RandomRows(count, head_dim, type, key_stride, 11);
        const auto values = RandomRows(count, head_dim, type, value_stride, 12);
        std::vector<std::byte> records(count * bytes + 16, kGuard);
        codec().Encode(keys.data(), key_stride, values.data(), value_stride, type, head_dim, count,
                       records.data());
        EXPECT_TRUE(std::all_of(records.end() - 16, records.end(),
                                [](std::byte b) { return b == kGuard; }));
        for (int64_t i = 0; i < count; ++i) {
          std::vector<std::byte> alone(bytes, std::byte{0});
          codec().Encode(keys.data() + i * key_stride, 0, values.data() + i * value_stride, 0, type,
                         head_dim, 1, alone.data());
          ASSERT_EQ(std::memcmp(alone.data(), records.data() + i * bytes, bytes), 0)
              << codec().name() << " head_dim " << head_dim << " token " << i << " of " << count;
        }
      }
    }
  }
}

TEST_P(RecordCodecTest, FiniteInputDecodesToFiniteOutput) {
  const float largest_of_type[] = {3.0e38f, 65504.0f, 3.0e38f};
  for (size_t t = 0; t < std::size(kTypes); ++t) {
    const ElementType type = kTypes[t];
    for (float fill : {0.0f, -0.0f, 1.0f, -3.25f, 1e-30f, 65504.0f, largest_of_type[t]}) {
      const int64_t head_dim = 128;
      std::vector<std::byte> constant(head_dim * ElementBytes(type));
      std::vector<std::byte> mixed(head_dim * ElementBytes(type));
      for (int64_t j = 0; j < head_dim; ++j) {
        StoreElement(fill, constant.data() + j * ElementBytes(type), type);
        StoreElement(j % 2 ? fill : -fill, mixed.data() + j * ElementBytes(type), type);
      }
      std::vector<std::byte> record(codec().RecordBytes(type, head_dim));
      std::vector<float> key(head_dim), value(head_dim);
      codec().Encode(constant.data(), 0, mixed.data(), 0, type, head_dim, 1, record.data());
      codec().Decode(record.data(), type, head_dim, key.data(), value.data());
      if (const int64_t bytes = codec().RemainderBytes(type, head_dim); bytes > 0) {
        std::vector<std::byte> code(bytes);
        std::vector<float> remainder(head_dim);
        codec().EncodeRemainders(mixed.data(), 0, type, head_dim, 1, record.data(), code.data());
        codec().DecodeRemainder(record.data(), code.data(), type, head_dim, remainder.data());
        for (const float x : remainder) ASSERT_TRUE(std::isfinite(x)) << codec().name() << fill;
      }
      for (int64_t j = 0; j < head_dim; ++j) {
        ASSERT_TRUE(std::isfinite(key[j])) << codec().name() << " " << fill;
        ASSERT_TRUE(std::isfinite(value[j])) << codec().name() << " " << fill;
      }
    }
  }
}

TEST_P(RecordCodecTest, DecodesKeyOrValueAlone) {
  const ElementType type = ElementType::kBFloat16;
  const int64_t head_dim = 80, row_bytes = head_dim * ElementBytes(type);
  const auto rows = RandomRows(2, head_dim, type, row_bytes, 31);
  std::vector<std::byte> record(codec().RecordBytes(type, head_dim));
  codec().Encode(rows.data(), 0, rows.data() + row_bytes, 0, type, head_dim, 1, record.data());
  std::vector<float> key(head_dim), value(head_dim), alone(head_dim);
  codec().Decode(record.data(), type, head_dim, key.data(), value.data());
  codec().Decode(record.data(), type, head_dim, alone.data(), nullptr);
  EXPECT_EQ(alone, key);
  codec().Decode(record.data(), type, head_dim, nullptr, alone.data());
  EXPECT_EQ(alone, value);
}

TEST_P(RecordCodecTest, RecordsDecodeToWhatWasEncodedIfTheCodecSaysSo) {
  for (ElementType type : kTypes) {
    const int64_t head_dim = 96, row_bytes = head_dim * ElementBytes(type);
    const auto rows = RandomRows(2, head_dim, type, row_bytes, 32);
    std::vector<std::byte> record(codec().RecordBytes(type, head_dim));
    codec().Encode(rows.data(), 0, rows.data() + row_bytes, 0, type, head_dim, 1, record.data());
    std::vector<float> key(head_dim), value(head_dim);
    codec().Decode(record.data(), type, head_dim, key.data(), value.data());
    bool same = true;
    for (int64_t j = 0; j < head_dim; ++j) {
      same &= key[j] == LoadElement(rows.data() + j * ElementBytes(type), type);
      same &= value[j] == LoadElement(rows.data() + row_bytes + j * ElementBytes(type), type);
    }
    EXPECT_EQ(same, codec().lossless());
  }
}

// With its remainder a value is nearer than without, and what is decoded is finite.
TEST_P(RecordCodecTest, RemaindersAreOfOneTokenAndBringItsValueNearer) {
  const bool has_remainders = codec().RemainderBytes(ElementType::kBFloat16, 128) > 0;
  EXPECT_FALSE(has_remainders && codec().lossless());
  for (ElementType type : kTypes) {
    for (int64_t head_dim : kHeadDims) {
      const int64_t record_bytes = codec().RecordBytes(type, head_dim);
      const int64_t bytes = codec().RemainderBytes(type, head_dim);
      ASSERT_EQ(bytes > 0, has_remainders);
      ASSERT_LE(bytes, 4096);
      if (!has_remainders) continue;
      const int64_t count = 17, stride = head_dim * ElementBytes(type) + 16;
      const auto values = RandomRows(count, head_dim, type, stride, 33);
      std::vector<std::byte> records(count * record_bytes);
      std::vector<std::byte> remainders(count * bytes + 16, kGuard);
      codec().Encode(values.data(), stride, values.data(), stride, type, head_dim, count,
                     records.data());
      codec().EncodeRemainders(values.data(), stride, type, head_dim, count, records.data(),
                               remainders.data());
      EXPECT_TRUE(std::all_of(remainders.end() - 16, remainders.end(),
                              [](std::byte b) { return b == kGuard; }));
      double with = 0, without = 0;
      for (int64_t i = 0; i < count; ++i) {
        const std::byte* record = records.data() + i * record_bytes;
        const std::byte* value = values.data() + i * stride;
        std::vector<std::byte> alone(bytes, kGuard);
        codec().EncodeRemainders(value, 0, type, head_dim, 1, record, alone.data());
        ASSERT_EQ(std::memcmp(alone.data(), remainders.data() + i * bytes, bytes), 0) << i;
        std::vector<float> decoded(head_dim), remainder(head_dim);
        codec().Decode(record, type, head_dim, nullptr, decoded.data());
        codec().DecodeRemainder(record, alone.data(), type, head_dim, remainder.data());
        for (int64_t j = 0; j < head_dim; ++j) {
          ASSERT_TRUE(std::isfinite(remainder[j]));
          const double lacks = LoadElement(value + j * ElementBytes(type), type) - decoded[j];
          without += lacks * lacks;
          with += (lacks - remainder[j]) * (lacks - remainder[j]);
        }
      }
      EXPECT_FALSE(!(with <= without / 4)) << head_dim << ": " << with << " of " << without;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllCodecs, RecordCodecTest, testing::ValuesIn(RecordCodecs()),
                         [](const auto& info) { return std::string(info.param->name()); });

TEST(RecordCodecRegistryTest, RawComesFirstAndNamesAreUnique) {
  ASSERT_FALSE(RecordCodecs().empty());
  EXPECT_EQ(RecordCodecs().front()->name(), "raw");
  std::vector<std::string_view> names;
  for (const RecordCodec* codec : RecordCodecs()) names.push_back(codec->name());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
}

TEST(RecordCodecRegistryTest, AnUnknownNameIsNull) {
  EXPECT_EQ(FindRecordCodec("k9v9"), nullptr);
  EXPECT_EQ(FindRecordCodec(""), nullptr);
  EXPECT_EQ(FindRecordCodec("RAW"), nullptr);
}

TEST(RawCodecTest, RecordsSayAllSoThatNothingRemains) {
  const RecordCodec& raw = *FindRecordCodec("raw");
  EXPECT_TRUE(raw.lossless());
  for (ElementType type : kTypes) EXPECT_EQ(raw.RemainderBytes(type, 128), 0);
}

TEST(RawCodecTest, RecordsAreKeyBytesThenValueBytes) {
  const RecordCodec& raw = *FindRecordCodec("raw");
  for (ElementType type : kTypes) {
    for (int64_t head_dim : kHeadDims) {
      const int64_t row_bytes = head_dim * ElementBytes(type);
      ASSERT_EQ(raw.RecordBytes(type, head_dim), 2 * row_bytes);
      const int64_t count = 13;
      const auto keys = RandomRows(count, head_dim, type, row_bytes + 8, 21);
      const auto values = RandomRows(count, head_dim, type, row_bytes, 22);
      std::vector<std::byte> records(count * 2 * row_bytes);
      raw.Encode(keys.data(), row_bytes + 8, values.data(), row_bytes, type, head_dim, count,
                 records.data());
      std::vector<float> key(head_dim), value(head_dim);
      for (int64_t i = 0; i < count; ++i) {
        const std::byte* record = records.data() + i * 2 * row_bytes;
        EXPECT_EQ(std::memcmp(record, keys.data() + i * (row_bytes + 8), row_bytes), 0);
        EXPECT_EQ(std::memcmp(record + row_bytes, values.data() + i * row_bytes, row_bytes), 0);
        raw.Decode(record, type, head_dim, key.data(), value.data());
        for (int64_t j = 0; j < head_dim; ++j) {
          EXPECT_EQ(key[j], LoadElement(record + j * ElementBytes(type), type));
          EXPECT_EQ(value[j], LoadElement(record + row_bytes + j * ElementBytes(type), type));
        }
      }
    }
  }
}

}  // namespace
}  // namespace clusterkv::kernels
