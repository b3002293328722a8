#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "hwy/targets.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/code_packing.h"
#include "kernels/codec/record_codec.h"

namespace clusterkv::kernels {
namespace {

constexpr uint32_t kSeed = 20241203;
constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                  ElementType::kBFloat16};

const RecordCodec& Codec() { return *FindRecordCodec("k8v4"); }

std::vector<std::byte> Rows(const std::vector<float>& x, ElementType type) {
  std::vector<std::byte> rows(x.size() * ElementBytes(type));
  FromFloat(x.data(), type, static_cast<int64_t>(x.size()), rows.data());
  return rows;
}

std::vector<float> Rounded(const std::vector<float>& x, ElementType type) {
  std::vector<float> rounded(x.size());
  ToFloat(Rows(x, type).data(), type, static_cast<int64_t>(x.size()), rounded.data());
  return rounded;
}

std::vector<std::byte> EncodeToken(const std::vector<float>& key, const std::vector<float>& value,
                                   ElementType type) {
  const int64_t head_dim = static_cast<int64_t>(key.size());
  std::vector<std::byte> record(Codec().RecordBytes(type, head_dim), std::byte{0xFF});
  Codec().Encode(Rows(key, type).data(), 0, Rows(value, type).data(), 0, type, head_dim, 1,
                 record.data());
  return record;
}

// The record as the layout in the codec's file says, one element at a time.
void EncodeHalfPlainly(const std::vector<float>& x, int bits, std::byte* meta, std::byte* codes) {
  const int64_t head_dim = static_cast<int64_t>(x.size());
  const float levels = static_cast<float>((1 << bits) - 1);
  const auto clamped = [&](int64_t j) { return std::clamp(x[j], -65504.0f, 65504.0f); };
  float low = clamped(0), high = clamped(0);
  for (int64_t j = 0; j < head_dim; ++j) {
    low = std::min(low, clamped(j));
    high = std::max(high, clamped(j));
  }
  const uint16_t halves[2] = {FloatToHalfSaturated((high - low) / levels),
                              FloatToHalfSaturated(low + 0.0f)};
  std::memcpy(meta, halves, 4);
  const float scale = HalfToFloat(halves[0]);
  const float zero = HalfToFloat(halves[1]);
  for (int64_t j = 0; j < head_dim; ++j) {
    const float steps = scale == 0 ? 0.0f : std::nearbyint((clamped(j) - zero) / scale);
    const uint32_t code = static_cast<uint32_t>(std::clamp(steps, 0.0f, levels));
    if (bits == 8) {
      codes[j] = static_cast<std::byte>(code);
    } else {
      StoreCode(code, codes, 4, head_dim, j);
    }
  }
}

TEST(K8V4CodecTest, ARecordOf128ChannelsIs200Bytes) {
  for (ElementType type : kTypes) EXPECT_EQ(Codec().RecordBytes(type, 128), 200);
  EXPECT_EQ(Codec().RecordBytes(ElementType::kBFloat16, 80), 128);
}

TEST(K8V4CodecTest, TheRecordIsTheDocumentedLayoutUnderEveryInstructionSet) {
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    std::mt19937 random(kSeed);
    std::normal_distribution<float> normal(-0.4f, 3.0f);
    for (int64_t head_dim : {16, 48, 80, 96, 128, 256, 512}) {
      for (int token = 0; token < 20; ++token) {
        std::vector<float> key(head_dim), value(head_dim);
        for (float& x : key) x = normal(random);
        for (float& x : value) x = static_cast<float>(static_cast<int>(random() % 31)) * 0.25f;
        if (token == 5) key[3] = 1e6f, value[7] = -3e38f;
        if (token == 6) std::fill(key.begin(), key.end(), -0.0f);
        const auto record = EncodeToken(key, value, ElementType::kFloat32);
        std::vector<std::byte> plain(record.size(), std::byte{0});
        EncodeHalfPlainly(key, 8, plain.data(), plain.data() + 8);
        EncodeHalfPlainly(value, 4, plain.data() + 4, plain.data() + 8 + head_dim);
        ASSERT_EQ(record, plain) << "head_dim " << head_dim << " token " << token;
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
}

// |x - decoded| <= scale / 2, and what rounding zero and scale to fp16 adds.
TEST(K8V4CodecTest, ErrorIsHalfAStepAndTheRoundingOfZeroAndScale) {
  for (ElementType type : kTypes) {
    std::mt19937 random(kSeed);
    for (int64_t head_dim : {16, 80, 128, 256}) {
      for (int token = 0; token < 50; ++token) {
        std::normal_distribution<float> normal(0.2f * static_cast<float>(token - 25), 1.5f);
        std::vector<float> x[2] = {std::vector<float>(head_dim), std::vector<float>(head_dim)};
        for (auto& half : x) {
          for (float& element : half) element = normal(random);
        }
        if (token % 5 == 0) x[0][1] *= 40;  // an outlier channel
        const auto record = EncodeToken(x[0], x[1], type);
        std::vector<float> decoded[2] = {std::vector<float>(head_dim),
                                         std::vector<float>(head_dim)};
        Codec().Decode(record.data(), type, head_dim, decoded[0].data(), decoded[1].data());
        for (int half = 0; half < 2; ++half) {
          const std::vector<float> seen = Rounded(x[half], type);
          const float levels = half == 0 ? 255.0f : 15.0f;
          const float low = *std::min_element(seen.begin(), seen.end());
          const float high = *std::max_element(seen.begin(), seen.end());
          const float rounding = (std::abs(low) + (high - low)) * 0x1p-10f;
          const float bound = (high - low) / levels / 2 + rounding;
          for (int64_t j = 0; j < head_dim; ++j) {
            const float error = std::abs(seen[j] - decoded[half][j]);
            ASSERT_FALSE(!(error <= bound)) << error << " > " << bound;
            const bool at_an_end = seen[j] == low || seen[j] == high;
            ASSERT_FALSE(at_an_end && !(error <= rounding)) << error;
          }
        }
      }
    }
  }
}

// The remainder as the layout in the codec's file says, and under every instruction set: half of a
// sixteenth of the value's step, but where fp16 rounded scale and zero.
TEST(K8V4CodecTest, TheRemainderIsTheDocumentedLayoutUnderEveryInstructionSet) {
  EXPECT_EQ(Codec().RemainderBytes(ElementType::kBFloat16, 128), 64);
  const ElementType type = ElementType::kFloat32;
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    std::mt19937 random(kSeed);
    std::normal_distribution<float> normal(-0.4f, 3.0f);
    for (int64_t head_dim : {16, 48, 128, 512}) {
      for (int token = 0; token < 20; ++token) {
        std::vector<float> value(head_dim), decoded(head_dim), remainder(head_dim);
        for (float& x : value) x = normal(random);
        if (token == 3) std::fill(value.begin(), value.end(), 0.3f);
        const auto record = EncodeToken(value, value, type);
        Codec().Decode(record.data(), type, head_dim, nullptr, decoded.data());
        std::vector<std::byte> code(head_dim / 2, std::byte{0xFF}), plain(head_dim / 2);
        Codec().EncodeRemainders(Rows(value, type).data(), 0, type, head_dim, 1, record.data(),
                                 code.data());
        Codec().DecodeRemainder(record.data(), code.data(), type, head_dim, remainder.data());
        uint16_t half;
        std::memcpy(&half, record.data() + 4, 2);
        const float step = HalfToFloat(half) / 16;
        const float low = *std::min_element(value.begin(), value.end());
        const float high = *std::max_element(value.begin(), value.end());
        const float rounding = (std::abs(low) + (high - low)) * 0x1p-10f;
        for (int64_t j = 0; j < head_dim; ++j) {
          const float lacks = value[j] - decoded[j];
          const float steps = step == 0 ? 0.0f : std::nearbyint((lacks + 7.5f * step) / step);
          StoreCode(static_cast<uint32_t>(std::clamp(steps, 0.0f, 15.0f)), plain.data(), 4,
                    head_dim, j);
          ASSERT_FALSE(!(std::abs(lacks - remainder[j]) <= step / 2 + rounding)) << j;
        }
        ASSERT_EQ(code, plain) << "head_dim " << head_dim << " token " << token;
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST(K8V4CodecTest, ConstantVectorsDecodeToTheirValueInFp16) {
  for (float constant : {0.0f, 1.0f, -0.333f, 1e-6f, 65504.0f}) {
    const std::vector<float> x(128, constant);
    const auto record = EncodeToken(x, x, ElementType::kFloat32);
    std::vector<float> key(128), value(128);
    Codec().Decode(record.data(), ElementType::kFloat32, 128, key.data(), value.data());
    const float expected = HalfToFloat(FloatToHalf(constant));
    EXPECT_THAT(key, testing::Each(expected));
    EXPECT_THAT(value, testing::Each(expected));
  }
}

TEST(K8V4CodecTest, ElementsBeyondFp16SaturateToItsEnds) {
  std::vector<float> key(128, 1e20f), value(128, 0.0f);
  value[0] = -1e20f;
  value[1] = 1e20f;
  const auto record = EncodeToken(key, value, ElementType::kBFloat16);
  std::vector<float> decoded_key(128), decoded_value(128);
  Codec().Decode(record.data(), ElementType::kBFloat16, 128, decoded_key.data(),
                 decoded_value.data());
  EXPECT_THAT(decoded_key, testing::Each(65504.0f));
  EXPECT_EQ(decoded_value[0], -65504.0f);
  EXPECT_NEAR(decoded_value[1], 65504.0f, 65504.0f * 0x1p-9f);
}

TEST(K8V4CodecTest, EightBitCodesCoarsenToFourBitOnesByIntegers) {
  // floor((q + 8) / 17) is what a tier below needs to requantise keys without decoding them.
  std::vector<float> x(256);
  for (int j = 0; j < 256; ++j) x[j] = static_cast<float>(j);
  const auto record = EncodeToken(x, x, ElementType::kFloat32);
  for (int j = 0; j < 256; ++j) {
    const uint32_t eight = static_cast<uint32_t>(record[8 + j]);
    EXPECT_EQ(eight, static_cast<uint32_t>(j));
    EXPECT_EQ((eight + 8) / 17, LoadCode(record.data() + 8 + 256, 4, 256, j)) << j;
  }
}

}  // namespace
}  // namespace clusterkv::kernels
