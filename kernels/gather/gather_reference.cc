#include "kernels/base/status_macros.h"
#include "kernels/gather/gather.h"
#include "kernels/gather/gather_validate.h"

namespace clusterkv::kernels {

absl::Status GatherRecordsReference(const PagedView& records, absl::Span<const int64_t> indices,
                                    absl::Span<std::byte> packed) {
  CKV_RETURN_IF_ERROR(internal::ValidateGather(records, indices, packed));
  for (size_t i = 0; i < indices.size(); ++i) {
    for (int64_t byte = 0; byte < records.element_bytes; ++byte) {
      packed[i * records.element_bytes + byte] = records.At(indices[i])[byte];
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
