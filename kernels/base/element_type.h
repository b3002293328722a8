// The element types of keys, values and queries, and their conversion to and from float.
//
// Conversions are exact upwards; downwards they round to nearest even. NaN stays NaN. All functions
// are thread-safe and free of state.
#ifndef CLUSTERKV_KERNELS_BASE_ELEMENT_TYPE_H_
#define CLUSTERKV_KERNELS_BASE_ELEMENT_TYPE_H_

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace clusterkv::kernels {

// Values equal clusterkv.v1.ElementType.
enum class ElementType : uint8_t { kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

constexpr int ElementBytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }
// "fp32", "fp16", "bf16".
std::string_view ElementTypeName(ElementType type);

constexpr float kLargestHalf = 65504.0f;  // finite
float HalfToFloat(uint16_t half);
// Beyond the largest half: infinity. FloatToHalfSaturated clamps to it instead.
uint16_t FloatToHalf(float value);
uint16_t FloatToHalfSaturated(float value);
float BFloat16ToFloat(uint16_t value);
uint16_t FloatToBFloat16(float value);

// The plain reference of ToFloat: one element at a time.
float LoadElement(const std::byte* element, ElementType type);
void StoreElement(float value, std::byte* element, ElementType type);

// Converts `count` elements at `from` (host memory, any alignment) to float at `to`. SIMD.
void ToFloat(const std::byte* from, ElementType type, int64_t count, float* to);
// Converts `count` floats to `type`, rounding to nearest even. SIMD.
void FromFloat(const float* from, ElementType type, int64_t count, std::byte* to);
// HalfToFloat and FloatToHalfSaturated of `count` elements. SIMD.
void HalvesToFloat(const uint16_t* from, int64_t count, float* to);
void FloatToHalvesSaturated(const float* from, int64_t count, uint16_t* to);
// True if none of `count` elements is NaN or infinite. SIMD. On false, *first_bad (may be null) is
// the index of the first such element.
bool AllFinite(const std::byte* from, ElementType type, int64_t count, int64_t* first_bad);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_ELEMENT_TYPE_H_
