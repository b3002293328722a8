// The errors that several rooms of the service make, each in one wording.
#ifndef CLUSTERKV_CACHE_SERVICE_ERRORS_H_
#define CLUSTERKV_CACHE_SERVICE_ERRORS_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

// "field: expected …, got …" with the three as metadata.
absl::Status FieldError(v1::ErrorReason reason, std::string_view field, std::string_view expected,
                        std::string_view got);
// INVALID_FIELD unless got is in [least, most].
absl::Status CheckRange(std::string_view field, uint64_t least, uint64_t most, uint64_t got);
// LIMIT_EXCEEDED, naming the limit.
absl::Status LimitError(std::string_view limit, int64_t allowed, int64_t needed);
absl::Status LayerOutOfRange(int64_t layer, int64_t layers);
absl::Status SequenceReleased(std::string_view name, uint64_t generation);
// The same status with parts of its own. What several threads are told of is copied: a status's
// shared parts are counted inside the distribution's library, where ThreadSanitizer sees no order.
absl::Status CopyOf(const absl::Status& status);
// CHECKSUM_MISMATCH of a layer's chunk.
absl::Status ChecksumMismatch(std::string_view field, int64_t layer, uint64_t expected,
                              uint64_t got);
// The device failed, and rows with it that lay there alone.
absl::Status DeviceLost();
// The server ends: queued work is answered with this.
absl::Status ServerEnding();

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_ERRORS_H_
