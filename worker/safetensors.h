// The safetensors container: eight bytes of header length, a JSON header, the tensors' bytes.
//
// Read strictly: every tensor lies inside the file, aligned to its element, none overlaps another
// and no byte belongs to none. Functions are free of state. Source:
// https://github.com/huggingface/safetensors#format
#ifndef CLUSTERKV_WORKER_SAFETENSORS_H_
#define CLUSTERKV_WORKER_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace clusterkv::worker {

struct TensorInfo {
  std::string dtype;  // "F32", "BF16", ...
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  // bytes of the file
};

// The tensors that a header of `header` (JSON) names, for a file whose data starts at data_begin
// and ends at file_bytes. Errors: InvalidArgument naming the tensor.
absl::StatusOr<std::map<std::string, TensorInfo>> ParseSafetensorsHeader(std::string_view header,
                                                                         int64_t data_begin,
                                                                         int64_t file_bytes);

// An open file. Move-only; not thread-safe.
class SafetensorsFile {
 public:
  // Errors: NotFound; InvalidArgument when it is not a whole safetensors file.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;
  ~SafetensorsFile();

  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  // The bytes of a tensor of this file to `to` [info.end - info.begin]. Errors: InvalidArgument
  // when the file has become shorter; Internal for other failures of reading.
  absl::Status Read(const TensorInfo& info, absl::Span<std::byte> to) const;

 private:
  SafetensorsFile() = default;
  absl::Status ReadAt(int64_t begin, int64_t bytes, void* to) const;

  std::string path_;
  int fd_ = -1;
  std::map<std::string, TensorInfo> tensors_;
};

struct TensorToWrite {
  std::string name, dtype;
  std::vector<int64_t> shape;
  absl::Span<const std::byte> bytes;
};
// Writes a file as a whole or not at all (by renaming). Errors: PermissionDenied or Internal.
absl::Status WriteSafetensors(const std::string& path, const std::vector<TensorToWrite>& tensors);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_SAFETENSORS_H_
