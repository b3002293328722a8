#include "worker/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::worker {
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxDimensions = 16;

// 0: unknown.
int64_t DtypeBytes(std::string_view dtype) {
  static constexpr std::pair<std::string_view, int64_t> kTypes[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
      {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
  for (const auto& [name, bytes] : kTypes) {
    if (name == dtype) return bytes;
  }
  return 0;
}

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

// False when `value` is not an integer in [0, 2^62].
bool GetSize(const Json& value, int64_t* size) {
  if (!value.is_number_unsigned()) return false;
  const uint64_t number = *value.get_ptr<const Json::number_unsigned_t*>();
  if (number > (uint64_t{1} << 62)) return false;
  *size = static_cast<int64_t>(number);
  return true;
}

bool GetSizes(const Json& object, const char* key, std::vector<int64_t>* sizes) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array() || found->size() > kMaxDimensions) return false;
  for (const Json& item : *found) {
    int64_t size = 0;
    if (!GetSize(item, &size)) return false;
    sizes->push_back(size);
  }
  return true;
}

absl::StatusOr<TensorInfo> ParseTensor(const std::string& name, const Json& object,
                                       int64_t data_begin, int64_t file_bytes) {
  TensorInfo info;
  std::vector<int64_t> offsets;
  if (!object.is_object() || !object.contains("dtype") || !object["dtype"].is_string() ||
      !GetSizes(object, "shape", &info.shape) || !GetSizes(object, "data_offsets", &offsets) ||
      offsets.size() != 2) {
    return Invalid("tensor ", name, ": expected dtype, shape and two data_offsets");
  }
  info.dtype = *object["dtype"].get_ptr<const Json::string_t*>();
  const int64_t element_bytes = DtypeBytes(info.dtype);
  if (element_bytes == 0) return Invalid("tensor ", name, ": unknown dtype ", info.dtype);
  int64_t bytes = element_bytes;
  for (const int64_t size : info.shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      return Invalid("tensor ", name, ": shape [", absl::StrJoin(info.shape, ", "), "] overflows");
    }
  }
  if (offsets[0] > offsets[1] || offsets[1] > file_bytes - data_begin) {
    return Invalid("tensor ", name, ": data_offsets [", offsets[0], ", ", offsets[1],
                   ") lie outside the file's ", file_bytes - data_begin, " bytes of data");
  }
  if (offsets[1] - offsets[0] != bytes) {
    return Invalid("tensor ", name, ": ", info.dtype, " [", absl::StrJoin(info.shape, ", "),
                   "] takes ", bytes, " bytes, data_offsets span ", offsets[1] - offsets[0]);
  }
  if (offsets[0] % element_bytes != 0) {
    return Invalid("tensor ", name, ": offset ", offsets[0], " is not aligned to ", info.dtype);
  }
  info.begin = data_begin + offsets[0];
  info.end = data_begin + offsets[1];
  return info;
}

absl::Status CheckCoverage(const std::map<std::string, TensorInfo>& tensors, int64_t data_begin,
                           int64_t file_bytes) {
  std::vector<std::pair<int64_t, const std::string*>> order;
  order.reserve(tensors.size());
  for (const auto& [name, info] : tensors) order.emplace_back(info.begin, &name);
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    return std::pair(a.first, tensors.at(*a.second).end) <
           std::pair(b.first, tensors.at(*b.second).end);
  });
  int64_t covered = data_begin;
  for (const auto& [begin, name] : order) {
    if (begin < covered) return Invalid("tensor ", *name, ": overlaps the tensor before it");
    if (begin > covered) return Invalid("tensor ", *name, ": a hole lies before it");
    covered = tensors.at(*name).end;
  }
  if (covered != file_bytes) {
    return Invalid("file: expected ", covered, " bytes as its header says, got ", file_bytes);
  }
  return absl::OkStatus();
}

absl::Status FromErrno(int error, const std::string& what) {
  const std::string message = absl::StrCat(what, ": ", std::strerror(error));
  if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(message);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  return absl::InternalError(message);
}

absl::Status WriteAll(int fd, const void* data, size_t bytes, const std::string& path) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(fd, next, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return FromErrno(errno, path);
    next += written;
    bytes -= static_cast<size_t>(written);
  }
  return absl::OkStatus();
}

std::string MakeHeader(const std::vector<TensorToWrite>& tensors) {
  Json header = Json::object();
  int64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    const int64_t end = offset + static_cast<int64_t>(tensor.bytes.size());
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
  return text;
}

}  // namespace

absl::StatusOr<std::map<std::string, TensorInfo>> ParseSafetensorsHeader(std::string_view header,
                                                                         int64_t data_begin,
                                                                         int64_t file_bytes) {
  std::set<std::string> names;
  bool named_twice = false;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth == 1 && event == Json::parse_event_t::key) {
      named_twice |= !names.insert(*parsed.get_ptr<const Json::string_t*>()).second;
    }
    return true;
  };
  const Json root = Json::parse(header.begin(), header.end(), watch, /*allow_exceptions=*/false);
  if (!root.is_object()) return Invalid("header: not a JSON object");
  if (named_twice) return Invalid("header: a tensor is named twice");
  std::map<std::string, TensorInfo> tensors;
  for (const auto& [name, object] : root.items()) {
    if (name == "__metadata__") continue;
    CKV_ASSIGN_OR_RETURN(tensors[name], ParseTensor(name, object, data_begin, file_bytes));
  }
  CKV_RETURN_IF_ERROR(CheckCoverage(tensors, data_begin, file_bytes));
  return tensors;
}

SafetensorsFile::SafetensorsFile(SafetensorsFile&& other) noexcept { *this = std::move(other); }

SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(tensors_, other.tensors_);
  return *this;
}

SafetensorsFile::~SafetensorsFile() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  SafetensorsFile file;
  file.path_ = path;
  file.fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file.fd_ < 0) return FromErrno(errno, path);
  struct stat status;
  if (fstat(file.fd_, &status) != 0) return FromErrno(errno, path);
  if (!S_ISREG(status.st_mode)) return Invalid(path, ": not a regular file");
  const int64_t file_bytes = status.st_size;
  if (file_bytes < kLengthBytes) return Invalid(path, ": truncated, ", file_bytes, " bytes");
  uint64_t header_bytes = 0;
  CKV_RETURN_IF_ERROR(file.ReadAt(0, kLengthBytes, &header_bytes));
  if (header_bytes > static_cast<uint64_t>(std::min(kMaxHeaderBytes, file_bytes - kLengthBytes))) {
    return Invalid(path, ": header of ", header_bytes, " bytes in a file of ", file_bytes);
  }
  std::string header(header_bytes, '\0');
  CKV_RETURN_IF_ERROR(file.ReadAt(kLengthBytes, static_cast<int64_t>(header_bytes), header.data()));
  auto tensors =
      ParseSafetensorsHeader(header, kLengthBytes + static_cast<int64_t>(header_bytes), file_bytes);
  if (!tensors.ok()) return Invalid(path, ": ", tensors.status().message());
  file.tensors_ = *std::move(tensors);
  return file;
}

absl::Status SafetensorsFile::ReadAt(int64_t begin, int64_t bytes, void* to) const {
  char* next = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = pread(fd_, next, static_cast<size_t>(bytes), begin);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FromErrno(errno, path_);
    if (got == 0) return Invalid(path_, ": ends at byte ", begin, ", ", bytes, " short");
    next += got;
    begin += got;
    bytes -= got;
  }
  return absl::OkStatus();
}

absl::Status SafetensorsFile::Read(const TensorInfo& info, absl::Span<std::byte> to) const {
  if (static_cast<int64_t>(to.size()) != info.end - info.begin) {
    return Invalid(path_, ": a tensor of ", info.end - info.begin, " bytes read to ", to.size());
  }
  return ReadAt(info.begin, info.end - info.begin, to.data());
}

absl::Status WriteSafetensors(const std::string& path, const std::vector<TensorToWrite>& tensors) {
  const std::string header = MakeHeader(tensors);
  const std::string unfinished = absl::StrCat(path, ".unfinished.", getpid());
  const int fd = open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FromErrno(errno, unfinished);
  const uint64_t header_bytes = header.size();
  absl::Status status = WriteAll(fd, &header_bytes, sizeof(header_bytes), path);
  status.Update(WriteAll(fd, header.data(), header.size(), path));
  for (const TensorToWrite& tensor : tensors) {
    if (status.ok()) status = WriteAll(fd, tensor.bytes.data(), tensor.bytes.size(), path);
  }
  if (close(fd) != 0 && status.ok()) status = FromErrno(errno, path);
  if (status.ok() && rename(unfinished.c_str(), path.c_str()) != 0) status = FromErrno(errno, path);
  if (!status.ok()) unlink(unfinished.c_str());
  return status;
}

}  // namespace clusterkv::worker
