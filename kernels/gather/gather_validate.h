// The one validator of gather's arguments, shared by its implementations.
#ifndef CLUSTERKV_KERNELS_GATHER_GATHER_VALIDATE_H_
#define CLUSTERKV_KERNELS_GATHER_GATHER_VALIDATE_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/base/paged.h"

namespace clusterkv::kernels::internal {

// Errors: as GatherRecords (gather.h).
inline absl::Status ValidateGather(const PagedView& records, absl::Span<const int64_t> indices,
                                   absl::Span<std::byte> packed) {
  // Divided, not multiplied: any count of indices times any record size is compared without
  // overflow.
  const size_t record_bytes = static_cast<size_t>(records.element_bytes);
  const bool fits = record_bytes == 0 ? packed.empty()
                                      : packed.size() % record_bytes == 0 &&
                                            packed.size() / record_bytes == indices.size();
  if (!fits) {
    return absl::InvalidArgumentError(absl::StrCat("packed: expected ", indices.size(),
                                                   " records of ", records.element_bytes,
                                                   " bytes, got ", packed.size(), " bytes"));
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] < 0 || indices[i] >= records.size) {
      return absl::OutOfRangeError(
          absl::StrCat("indices[", i, "]: expected 0 to ", records.size - 1, ", got ", indices[i]));
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels::internal

#endif  // CLUSTERKV_KERNELS_GATHER_GATHER_VALIDATE_H_
