#include "kernels/codec/residual_codes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "hwy/targets.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/code_packing.h"

namespace clusterkv::kernels {
namespace {

constexpr uint32_t kSeed = 20240607;

struct Shape {
  int64_t head_dim;
  int group_channels;
};
constexpr Shape kShapes[] = {{16, 16},  {16, 4},  {32, 32},  {48, 16},   {80, 16},   {80, 80},
                             {80, 20},  {96, 32}, {96, 96},  {128, 32},  {128, 128}, {128, 64},
                             {128, 16}, {128, 1}, {256, 32}, {256, 256}, {512, 64}};

// Rows with everything that could make two implementations differ: ties of the rounding, both
// zeros, constant groups, values beyond fp16, and plain noise.
std::vector<float> HardRows(int64_t rows, int64_t head_dim, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * head_dim);
  for (int64_t t = 0; t < rows; ++t) {
    float* row = x.data() + t * head_dim;
    for (int64_t j = 0; j < head_dim; ++j) {
      switch (t % 7) {
        case 0:
          row[j] = normal(random);
          break;
        case 1:
          row[j] = static_cast<float>(static_cast<int>(random() % 13)) * 0.5f;
          break;
        case 2:
          row[j] = random() % 2 ? 0.0f : -0.0f;
          break;
        case 3:
          row[j] = 1.0f + 1e-4f * normal(random);
          break;
        case 4:
          row[j] = 1e5f * normal(random);
          break;
        case 5:
          row[j] = 1e-7f * normal(random);
          break;
        default:
          row[j] = j == 3 ? 2e38f : normal(random);
      }
    }
  }
  return x;
}

std::vector<float> RandomBalance(int64_t head_dim, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(0.25f, 4.0f);
  std::vector<float> balance(head_dim);
  for (float& u : balance) u = uniform(random);
  return balance;
}

TEST(ResidualCodesTest, BytesAreThoseOfTheTable) {
  EXPECT_EQ(CodesBytes({2, 32}, 128), 96);
  EXPECT_EQ(CodesBytes({2, 128}, 128), 72);
  EXPECT_EQ(CodesBytes({3, 128}, 128), 104);
  EXPECT_EQ(CodesBytes({4, 128}, 128), 136);
  EXPECT_EQ(CodesBytes({0, 32}, 128), 0);
  // 80 channels of 3 bits are 30 bytes, rounded up to 32.
  EXPECT_EQ(CodesBytes({3, 80}, 80), 2 * (32 + 4));
}

TEST(ResidualCodesTest, BadParamsAreNamed) {
  EXPECT_TRUE(ValidateCodesParams({2, 32}, 128).ok());
  EXPECT_TRUE(ValidateCodesParams({0, 0}, 128).ok());
  for (int bits : {-1, 1, 5, 8}) {
    const absl::Status status = ValidateCodesParams({bits, 32}, 128);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("codes.bits"));
  }
  for (int group : {-32, 0, 24, 256}) {
    const absl::Status status = ValidateCodesParams({2, group}, 128);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("codes.group_channels"));
  }
}

// Calls f once for each instruction set that was compiled in and that this machine has.
template <typename F>
void ForEachInstructionSet(F f) {
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    f();
  }
  hwy::SetSupportedTargetsForTest(0);
}

void ExpectSimdEqualsReference() {
  for (const Shape& shape : kShapes) {
    for (int bits : {2, 3, 4}) {
      for (int64_t rows : {0, 1, 7, 97}) {
        std::mt19937 random(kSeed);
        const CodesParams params{bits, shape.group_channels};
        const int64_t bytes = CodesBytes(params, shape.head_dim);
        const auto k = HardRows(rows, shape.head_dim, random);
        const auto v = HardRows(rows, shape.head_dim, random);
        const auto ku = RandomBalance(shape.head_dim, random);
        const auto vu = RandomBalance(shape.head_dim, random);
        std::vector<std::byte> simd(rows * bytes + 8, std::byte{0xA5});
        std::vector<std::byte> plain(rows * bytes + 8, std::byte{0xA5});
        EncodeResiduals(params, shape.head_dim, rows, k.data(), v.data(), ku.data(), vu.data(),
                        simd.data());
        EncodeResidualsReference(params, shape.head_dim, rows, k.data(), v.data(), ku.data(),
                                 vu.data(), plain.data());
        ASSERT_EQ(simd, plain) << "bits " << bits << " group " << shape.group_channels
                               << " head_dim " << shape.head_dim << " rows " << rows;
        EXPECT_EQ(simd.back(), std::byte{0xA5});
      }
    }
  }
}

TEST(ResidualCodesTest, SimdAndReferenceGiveTheSameBytes) {
  ForEachInstructionSet(ExpectSimdEqualsReference);
}

TEST(ResidualCodesTest, DecodingIsTheSameUnderEveryInstructionSet) {
  std::mt19937 random(kSeed);
  for (int bits : {2, 3, 4}) {
    const CodesParams params{bits, 32};
    const auto k = HardRows(7, 96, random);
    const auto v = HardRows(7, 96, random);
    const auto u = RandomBalance(96, random);
    std::vector<std::byte> codes(7 * CodesBytes(params, 96));
    EncodeResiduals(params, 96, 7, k.data(), v.data(), u.data(), u.data(), codes.data());
    for (int64_t t = 0; t < 7; ++t) {
      std::vector<float> key(96), value(96), first_key, first_value;
      ForEachInstructionSet([&] {
        DecodeResiduals(params, 96, codes.data() + t * CodesBytes(params, 96), u.data(), u.data(),
                        key.data(), value.data());
        if (first_key.empty()) first_key = key, first_value = value;
        EXPECT_EQ(key, first_key);
        EXPECT_EQ(value, first_value);
      });
    }
  }
}

TEST(ResidualCodesTest, LayoutIsScalesLowsThenBitsOfKeyAndValue) {
  const CodesParams params{2, 16};
  const int64_t head_dim = 32;
  std::vector<float> k(head_dim), v(head_dim), u(head_dim, 1.0f);
  for (int64_t j = 0; j < head_dim; ++j) {
    k[j] = static_cast<float>(j % 4) * 0.5f - 1.0f;           // low -1, scale .5, codes j % 4
    v[j] = static_cast<float>(3 - j % 4) * (j < 16 ? 2 : 4);  // low 0, scales 2 and 4
  }
  std::vector<std::byte> codes(CodesBytes(params, head_dim));
  EncodeResiduals(params, head_dim, 1, k.data(), v.data(), u.data(), u.data(), codes.data());
  uint16_t halves[8];
  std::memcpy(halves, codes.data(), sizeof(halves));
  const float expected[8] = {.5f, .5f, -1, -1, 2, 4, 0, 0};
  for (int i = 0; i < 8; ++i) EXPECT_EQ(HalfToFloat(halves[i]), expected[i]) << i;
  for (int64_t j = 0; j < head_dim; ++j) {
    EXPECT_EQ(LoadCode(codes.data() + 16, 2, head_dim, j), j % 4);
    EXPECT_EQ(LoadCode(codes.data() + 24, 2, head_dim, j), 3 - j % 4);
  }
}

TEST(ResidualCodesTest, PackingKeepsEveryCode) {
  std::mt19937 random(kSeed);
  for (int bits : {2, 3, 4}) {
    for (int64_t head_dim = 16; head_dim <= 512; head_dim += 16) {
      std::vector<std::byte> packed(PackedCodeBytes(bits, head_dim), std::byte{0});
      std::vector<uint32_t> codes(head_dim);
      for (int64_t j = 0; j < head_dim; ++j) {
        codes[j] = random() % (1u << bits);
        StoreCode(codes[j], packed.data(), bits, head_dim, j);
      }
      for (int64_t j = 0; j < head_dim; ++j) {
        ASSERT_EQ(LoadCode(packed.data(), bits, head_dim, j), codes[j]) << bits << " " << j;
      }
    }
  }
}

// |y - decoded| <= scale / 2, and what rounding low and scale to fp16 adds.
TEST(ResidualCodesTest, ErrorIsHalfAStepAndTheRoundingOfLowAndScale) {
  for (const Shape& shape : kShapes) {
    for (int bits : {2, 3, 4}) {
      std::mt19937 random(kSeed + bits);
      std::normal_distribution<float> normal(0.3f, 1.7f);
      const CodesParams params{bits, shape.group_channels};
      const int64_t rows = 29;
      const int64_t bytes = CodesBytes(params, shape.head_dim);
      std::vector<float> x[2], u[2];
      for (int half = 0; half < 2; ++half) {
        x[half].resize(rows * shape.head_dim);
        for (float& value : x[half]) value = normal(random);
        u[half] = RandomBalance(shape.head_dim, random);
      }
      std::vector<std::byte> codes(rows * bytes);
      EncodeResiduals(params, shape.head_dim, rows, x[0].data(), x[1].data(), u[0].data(),
                      u[1].data(), codes.data());
      std::vector<float> decoded[2];
      decoded[0].resize(shape.head_dim);
      decoded[1].resize(shape.head_dim);
      for (int64_t t = 0; t < rows; ++t) {
        DecodeResiduals(params, shape.head_dim, codes.data() + t * bytes, u[0].data(), u[1].data(),
                        decoded[0].data(), decoded[1].data());
        for (int half = 0; half < 2; ++half) {
          for (int64_t g = 0; g < shape.head_dim / shape.group_channels; ++g) {
            const float* y = x[half].data() + t * shape.head_dim;
            float low = std::numeric_limits<float>::infinity(), high = -low;
            for (int64_t j = g * shape.group_channels; j < (g + 1) * shape.group_channels; ++j) {
              low = std::min(low, y[j] * u[half][j]);
              high = std::max(high, y[j] * u[half][j]);
            }
            const float levels = static_cast<float>((1 << bits) - 1);
            const float scale = (high - low) / levels;
            const float bound =
                scale * 0.5f + (std::abs(low) + levels * scale) * 0x1p-10f + levels * 0x1p-24f;
            for (int64_t j = g * shape.group_channels; j < (g + 1) * shape.group_channels; ++j) {
              const float error = std::abs(y[j] - decoded[half][j]) * u[half][j];
              ASSERT_FALSE(!(error <= bound)) << error << " > " << bound << " bits " << bits;
            }
          }
        }
      }
    }
  }
}

TEST(ResidualCodesTest, ConstantGroupsDecodeToTheirValue) {
  for (int bits : {2, 3, 4}) {
    for (float value : {0.0f, -0.0f, 1.5f, -2.0f, 65504.0f, 1e30f, -1e30f}) {
      const CodesParams params{bits, 32};
      const std::vector<float> x(128, value), u(128, 1.0f);
      std::vector<std::byte> codes(CodesBytes(params, 128));
      EncodeResiduals(params, 128, 1, x.data(), x.data(), u.data(), u.data(), codes.data());
      std::vector<float> k(128), v(128);
      DecodeResiduals(params, 128, codes.data(), u.data(), u.data(), k.data(), v.data());
      const float expected = std::min(std::max(value, -65504.0f), 65504.0f);
      EXPECT_THAT(k, testing::Each(expected));
      EXPECT_THAT(v, testing::Each(expected));
    }
  }
}

TEST(ResidualCodesTest, EitherHalfMayBeLeftOut) {
  std::mt19937 random(kSeed);
  const CodesParams params{3, 16};
  const auto k = HardRows(1, 48, random);
  const auto v = HardRows(1, 48, random);
  const auto ku = RandomBalance(48, random);
  const auto vu = RandomBalance(48, random);
  std::vector<std::byte> codes(CodesBytes(params, 48));
  EncodeResiduals(params, 48, 1, k.data(), v.data(), ku.data(), vu.data(), codes.data());
  std::vector<float> both[2] = {std::vector<float>(48), std::vector<float>(48)};
  std::vector<float> one[2] = {std::vector<float>(48), std::vector<float>(48)};
  DecodeResiduals(params, 48, codes.data(), ku.data(), vu.data(), both[0].data(), both[1].data());
  DecodeResiduals(params, 48, codes.data(), ku.data(), vu.data(), one[0].data(), nullptr);
  DecodeResiduals(params, 48, codes.data(), ku.data(), vu.data(), nullptr, one[1].data());
  EXPECT_EQ(both[0], one[0]);
  EXPECT_EQ(both[1], one[1]);
}

TEST(ResidualBalanceTest, IsTheInverseRootOfTheRms) {
  const std::vector<float> residuals = {3, 0, 1e-20f, -4, 0, 1e-20f};  // 2 rows, 3 channels
  std::vector<float> balance(3);
  ResidualBalance(residuals.data(), 2, 3, balance.data());
  EXPECT_FLOAT_EQ(balance[0], 1.0f / std::sqrt(std::sqrt(12.5f)));
  EXPECT_FLOAT_EQ(balance[1], 1.0f / std::sqrt(1e-9f));
  EXPECT_FLOAT_EQ(balance[2], 1.0f / std::sqrt(1e-9f));
}

TEST(ResidualBalanceTest, WithoutRowsIsOne) {
  std::vector<float> balance(5, -1.0f);
  ResidualBalance(nullptr, 0, 5, balance.data());
  EXPECT_THAT(balance, testing::Each(1.0f));
}

}  // namespace
}  // namespace clusterkv::kernels
