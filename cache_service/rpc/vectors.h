// v1.Vector <-> floats, with the errors that a client gets for a bad one.
//
// Stateless; thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_VECTORS_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_VECTORS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "clusterkv/v1/errors.pb.h"
#include "clusterkv/v1/types.pb.h"
#include "kernels/base/element_type.h"

namespace clusterkv::cache_service {

// A wire enum's element type; UNSPECIFIED is `otherwise`. `field` names it in messages.
// Errors: DTYPE_MISMATCH for a number that names no type.
absl::StatusOr<kernels::ElementType> ParseElementType(v1::ElementType type,
                                                      kernels::ElementType otherwise,
                                                      std::string_view field);

// The vector's numbers as float into *out (its memory is reused). Their count is what came: who
// knows the shape compares it. Errors: INVALID_FIELD when `data` and `values` are both set;
// DTYPE_MISMATCH for an unknown type; SHAPE_MISMATCH when it is empty or bytes are no whole number
// of elements; `non_finite` when one is NaN or infinite. All name the field, what was expected and
// what came.
absl::Status ParseVector(const v1::Vector& vector, std::string_view field,
                         v1::ErrorReason non_finite, std::vector<float>* out);

// `numbers` as packed `type` into *out. FLOAT16 saturates, so that no finite number becomes
// infinite.
void PackNumbers(absl::Span<const float> numbers, kernels::ElementType type, std::string* out);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_VECTORS_H_
