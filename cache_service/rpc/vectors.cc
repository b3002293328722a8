#include "cache_service/rpc/vectors.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kernels/base/status_macros.h"
#include "proto/error.h"

namespace clusterkv::cache_service {
namespace {

using kernels::ElementType;

constexpr float kMaxHalf = 65504.0f;

}  // namespace

absl::StatusOr<ElementType> ParseElementType(v1::ElementType type, ElementType otherwise,
                                             std::string_view field) {
  switch (type) {
    case v1::ELEMENT_TYPE_UNSPECIFIED:
      return otherwise;
    case v1::ELEMENT_TYPE_FLOAT32:
    case v1::ELEMENT_TYPE_FLOAT16:
    case v1::ELEMENT_TYPE_BFLOAT16:
      return static_cast<ElementType>(type);
    default:
      break;
  }
  const std::string got = std::to_string(static_cast<int>(type));
  return Error(v1::DTYPE_MISMATCH,
               std::string(field) + ": expected FLOAT32, FLOAT16 or BFLOAT16 (1 to 3), got " + got,
               {{"field", std::string(field)}, {"expected", "1 to 3"}, {"got", got}});
}

absl::Status ParseVector(const v1::Vector& vector, std::string_view field,
                         v1::ErrorReason non_finite, std::vector<float>* out) {
  const std::string name(field);
  const std::string& data = vector.data();
  if (!data.empty() && vector.values_size() > 0) {
    return Error(v1::INVALID_FIELD, name + ": expected data or values, got both",
                 {{"field", name}, {"expected", "data or values"}, {"got", "both"}});
  }
  CKV_ASSIGN_OR_RETURN(const ElementType type,
                       ParseElementType(vector.type(), ElementType::kFloat32, name + ".type"));
  const auto element_bytes = static_cast<size_t>(ElementBytes(type));
  if (data.size() % element_bytes != 0 || (data.empty() && vector.values_size() == 0)) {
    const std::string got = data.empty() ? "none" : std::to_string(data.size()) + " bytes";
    const std::string expected =
        data.empty() ? "numbers" : "a multiple of " + std::to_string(element_bytes) + " bytes";
    return Error(v1::SHAPE_MISMATCH, name + ": expected " + expected + ", got " + got,
                 {{"field", name}, {"expected", expected}, {"got", got}});
  }
  if (data.empty()) {
    out->assign(vector.values().begin(), vector.values().end());
  } else {
    out->resize(data.size() / element_bytes);
    kernels::ToFloat(reinterpret_cast<const std::byte*>(data.data()), type,
                     static_cast<int64_t>(out->size()), out->data());
  }
  int64_t bad = 0;
  if (!kernels::AllFinite(reinterpret_cast<const std::byte*>(out->data()), ElementType::kFloat32,
                          static_cast<int64_t>(out->size()), &bad)) {
    const float value = (*out)[static_cast<size_t>(bad)];
    const std::string got = std::isnan(value) ? "NaN" : value > 0 ? "Inf" : "-Inf";
    return Error(non_finite,
                 name + "[" + std::to_string(bad) + "]: expected a finite number, got " + got,
                 {{"field", name}, {"index", std::to_string(bad)}, {"got", got}});
  }
  return absl::OkStatus();
}

void PackNumbers(absl::Span<const float> numbers, ElementType type, std::string* out) {
  out->resize(numbers.size() * static_cast<size_t>(ElementBytes(type)));
  auto* to = reinterpret_cast<std::byte*>(out->data());
  if (type != ElementType::kFloat16) {
    kernels::FromFloat(numbers.data(), type, static_cast<int64_t>(numbers.size()), to);
    return;
  }
  constexpr size_t kPiece = 256;
  float clamped[kPiece];
  for (size_t begin = 0; begin < numbers.size(); begin += kPiece) {
    const size_t count = std::min(kPiece, numbers.size() - begin);
    for (size_t i = 0; i < count; ++i) {
      clamped[i] = std::clamp(numbers[begin + i], -kMaxHalf, kMaxHalf);
    }
    kernels::FromFloat(clamped, type, static_cast<int64_t>(count), to + 2 * begin);
  }
}

}  // namespace clusterkv::cache_service
