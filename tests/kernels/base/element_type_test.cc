#include "kernels/base/element_type.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace clusterkv::kernels {
namespace {

constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16,
                                  ElementType::kBFloat16};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

uint32_t FloatBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float BitsFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The definition of binary16, without tricks.
double HalfByDefinition(uint16_t half) {
  const double sign = half & 0x8000 ? -1 : 1;
  const int exponent = (half >> 10) & 0x1f;
  const int mantissa = half & 0x3ff;
  if (exponent == 31) return mantissa == 0 ? sign * kInfinity : kNan;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// Every pattern that could go wrong, and random ones: exponents around each limit, ties, NaNs.
std::vector<float> HardFloats() {
  std::vector<float> floats = {0.0f,     -0.0f,    kInfinity, -kInfinity, kNan,     65504.0f,
                               65519.0f, 65520.0f, 65536.0f,  -65520.0f,  0x1p-24f, 0x1p-25f,
                               0x1p-14f, 1e-40f,   -1e-45f,   3.4e38f};
  floats.push_back(BitsFloat(0x7f800001));  // signalling NaN, payload lost in 16 bits
  floats.push_back(BitsFloat(0xffc12345));
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
      floats.push_back(BitsFloat(high << 16 | low));
    }
  }
  std::mt19937 random(7);
  for (int i = 0; i < 100'000; ++i) floats.push_back(BitsFloat(random()));
  return floats;
}

TEST(ElementTypeTest, NamesAndSizes) {
  EXPECT_EQ(ElementTypeName(ElementType::kFloat32), "fp32");
  EXPECT_EQ(ElementTypeName(ElementType::kFloat16), "fp16");
  EXPECT_EQ(ElementTypeName(ElementType::kBFloat16), "bf16");
  EXPECT_EQ(ElementBytes(ElementType::kFloat32), 4);
  EXPECT_EQ(ElementBytes(ElementType::kFloat16), 2);
  EXPECT_EQ(ElementBytes(ElementType::kBFloat16), 2);
}

TEST(ElementTypeTest, EveryHalfHasTheValueOfItsDefinition) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const double expected = HalfByDefinition(static_cast<uint16_t>(half));
    const float got = HalfToFloat(static_cast<uint16_t>(half));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << half;
    } else {
      ASSERT_EQ(static_cast<double>(got), expected) << half;
      ASSERT_EQ(std::signbit(got), (half & 0x8000) != 0) << half;
    }
  }
}

TEST(ElementTypeTest, HalvesAndBFloat16sSurviveTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float half = HalfToFloat(static_cast<uint16_t>(bits));
    const float bfloat = BFloat16ToFloat(static_cast<uint16_t>(bits));
    if (!std::isnan(half)) {
      ASSERT_EQ(FloatToHalf(half), bits);
    }
    if (!std::isnan(bfloat)) {
      ASSERT_EQ(FloatToBFloat16(bfloat), bits);
    }
  }
}

TEST(ElementTypeTest, NarrowingRoundsToTheNearestAndTiesToEven) {
  for (float value : HardFloats()) {
    if (!std::isfinite(value)) continue;
    const uint16_t half = FloatToHalf(value);
    if (std::abs(value) >= 65520.0f) {
      ASSERT_EQ(half & 0x7fff, 0x7c00) << value;
      continue;
    }
    // No neighbour is nearer, and of two as near the even one was taken. Doubles are exact here.
    const double error = std::abs(HalfByDefinition(half) - static_cast<double>(value));
    for (int step : {-1, 1}) {
      const int neighbour = (half & 0x7fff) + step;
      if (neighbour < 0 || neighbour > 0x7bff) continue;
      const double other =
          std::abs(HalfByDefinition(static_cast<uint16_t>(neighbour | (half & 0x8000))) -
                   static_cast<double>(value));
      ASSERT_LE(error, other) << value;
      if (error == other) {
        ASSERT_EQ(half & 1, 0) << value;
      }
    }
    ASSERT_EQ((half & 0x8000) != 0, std::signbit(value)) << value;
  }
  EXPECT_EQ(FloatToBFloat16(BitsFloat(0x3f808000)), 0x3f80);  // tie, even stays
  EXPECT_EQ(FloatToBFloat16(BitsFloat(0x3f818000)), 0x3f82);  // tie, odd goes up
  EXPECT_EQ(FloatToBFloat16(BitsFloat(0x3f808001)), 0x3f81);
  EXPECT_EQ(FloatToBFloat16(BitsFloat(0x7f7fffff)), 0x7f80);  // the largest float: infinity
}

TEST(ElementTypeTest, NanStaysNan) {
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fc00000u, 0xffffffffu}) {
    const float nan = BitsFloat(bits);
    EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(nan)))) << bits;
    EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalfSaturated(nan)))) << bits;
    EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(nan)))) << bits;
  }
}

TEST(ElementTypeTest, SaturationClampsWhatAHalfCannotHold) {
  EXPECT_EQ(HalfToFloat(FloatToHalfSaturated(1e10f)), 65504.0f);
  EXPECT_EQ(HalfToFloat(FloatToHalfSaturated(-kInfinity)), -65504.0f);
  EXPECT_EQ(HalfToFloat(FloatToHalfSaturated(65519.0f)), 65504.0f);
  EXPECT_EQ(HalfToFloat(FloatToHalfSaturated(-1.5f)), -1.5f);
  for (float value : HardFloats()) {
    const uint16_t half = FloatToHalf(value);
    const bool infinite = (half & 0x7fff) == 0x7c00;
    ASSERT_EQ(FloatToHalfSaturated(value), infinite ? half - 1 : half) << value;
  }
}

TEST(ElementTypeTest, RowsOfHalvesConvertAsTheirElements) {
  const std::vector<float> floats = HardFloats();
  const int64_t count = static_cast<int64_t>(floats.size());
  std::vector<uint16_t> halves(count);
  FloatToHalvesSaturated(floats.data(), count, halves.data());
  for (int64_t i = 0; i < count; ++i) ASSERT_EQ(halves[i], FloatToHalfSaturated(floats[i])) << i;
  std::vector<float> wide(count);
  HalvesToFloat(halves.data(), count, wide.data());
  for (int64_t i = 0; i < count; ++i) {
    ASSERT_EQ(FloatBits(wide[i]), FloatBits(HalfToFloat(halves[i]))) << i;
  }
}

TEST(ElementTypeTest, RowsOfHalvesSurviveTheRoundTrip) {
  std::vector<uint16_t> halves(0x10000), back(halves.size());
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(halves.size());
  HalvesToFloat(halves.data(), static_cast<int64_t>(halves.size()), wide.data());
  FloatToHalvesSaturated(wide.data(), static_cast<int64_t>(wide.size()), back.data());
  for (size_t i = 0; i < halves.size(); ++i) {
    if (!std::isfinite(wide[i])) continue;
    ASSERT_EQ(back[i], halves[i]);
  }
}

TEST(ElementTypeTest, SimdGivesTheBitsOfTheReference) {
  const std::vector<float> floats = HardFloats();
  const int64_t count = static_cast<int64_t>(floats.size());
  for (ElementType type : kTypes) {
    const int bytes = ElementBytes(type);
    std::vector<std::byte> narrow(bytes * count), expected(bytes * count);
    FromFloat(floats.data(), type, count, narrow.data());
    for (int64_t i = 0; i < count; ++i) StoreElement(floats[i], &expected[bytes * i], type);
    ASSERT_EQ(narrow, expected) << ElementTypeName(type);

    std::vector<float> wide(count);
    ToFloat(narrow.data(), type, count, wide.data());
    for (int64_t i = 0; i < count; ++i) {
      ASSERT_EQ(FloatBits(wide[i]), FloatBits(LoadElement(&narrow[bytes * i], type)))
          << ElementTypeName(type) << " " << i;
    }
  }
}

TEST(ElementTypeTest, EveryHalfPatternWidensAsTheReference) {
  std::vector<uint16_t> halves(0x10000);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(halves.size());
  for (ElementType type : {ElementType::kFloat16, ElementType::kBFloat16}) {
    const auto* from = reinterpret_cast<const std::byte*>(halves.data());
    ToFloat(from, type, static_cast<int64_t>(halves.size()), wide.data());
    for (size_t i = 0; i < halves.size(); ++i) {
      ASSERT_EQ(FloatBits(wide[i]), FloatBits(LoadElement(from + 2 * i, type))) << i;
    }
  }
}

TEST(ElementTypeTest, WritesNothingBeyondItsCountAtAnyLengthAndAlignment) {
  for (ElementType type : kTypes) {
    const int bytes = ElementBytes(type);
    for (int64_t count : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 131}) {
      for (int shift : {0, 1, 3}) {
        std::vector<float> floats(count);
        for (int64_t i = 0; i < count; ++i) floats[i] = static_cast<float>(i) - 3.5f;
        std::vector<std::byte> narrow(shift + bytes * count + 16, std::byte{0xa5});
        FromFloat(floats.data(), type, count, narrow.data() + shift);
        for (int i = 0; i < shift; ++i) ASSERT_EQ(narrow[i], std::byte{0xa5});
        for (size_t i = shift + bytes * count; i < narrow.size(); ++i) {
          ASSERT_EQ(narrow[i], std::byte{0xa5}) << count;
        }
        std::vector<float> wide(count + 4, -1e30f);
        ToFloat(narrow.data() + shift, type, count, wide.data());
        for (int64_t i = 0; i < count; ++i) ASSERT_EQ(wide[i], floats[i]) << count;
        for (size_t i = count; i < wide.size(); ++i) ASSERT_EQ(wide[i], -1e30f) << count;
      }
    }
  }
  for (int64_t count : {0, 1, 15, 16, 17, 131}) {
    const std::vector<float> floats(count, 2.0f);
    std::vector<uint16_t> halves(count + 1, 0xa5a5);
    FloatToHalvesSaturated(floats.data(), count, halves.data());
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(halves[i], FloatToHalf(2.0f)) << count;
    ASSERT_EQ(halves[count], 0xa5a5) << count;
  }
}

TEST(ElementTypeTest, AllFiniteNamesTheFirstBadElement) {
  for (ElementType type : kTypes) {
    const int bytes = ElementBytes(type);
    for (int64_t count : {0, 1, 5, 64, 257, 1009}) {
      std::vector<std::byte> data(bytes * count + 1);
      std::byte* elements = data.data() + 1;  // unaligned
      for (int64_t i = 0; i < count; ++i) StoreElement(65504.0f, elements + bytes * i, type);
      int64_t first_bad = -1;
      EXPECT_TRUE(AllFinite(elements, type, count, &first_bad));
      EXPECT_EQ(first_bad, -1);
      for (int64_t bad = 0; bad < count; bad += 1 + bad / 3) {
        for (float value : {kNan, kInfinity, -kInfinity}) {
          StoreElement(value, elements + bytes * bad, type);
          StoreElement(kNan, elements + bytes * (count - 1), type);
          EXPECT_FALSE(AllFinite(elements, type, count, &first_bad));
          EXPECT_EQ(first_bad, bad);
          EXPECT_FALSE(AllFinite(elements, type, count, nullptr));
        }
        StoreElement(-1.0f, elements + bytes * bad, type);
        StoreElement(1.0f, elements + bytes * (count - 1), type);
      }
    }
  }
}

}  // namespace
}  // namespace clusterkv::kernels
