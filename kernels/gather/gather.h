// Gather: scattered records of one KV head into one packed buffer, in the order asked.
#ifndef CLUSTERKV_KERNELS_GATHER_GATHER_H_
#define CLUSTERKV_KERNELS_GATHER_GATHER_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/paged.h"

namespace clusterkv::kernels {

// packed [indices.size(), records.element_bytes] out: record indices[i] of `records`, bit for bit.
// Errors: OutOfRange naming the first index outside [0, records.size); InvalidArgument when
// packed's length differs. Nothing is written then.
absl::Status GatherRecords(const PagedView& records, absl::Span<const int64_t> indices,
                           absl::Span<std::byte> packed);
absl::Status GatherRecordsReference(const PagedView& records, absl::Span<const int64_t> indices,
                                    absl::Span<std::byte> packed);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_GATHER_GATHER_H_
