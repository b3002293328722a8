#include "cache_service/shard_device.h"

#include <charconv>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#ifdef CLUSTERKV_HAS_CUDA
#include "cache_service/cuda_device.h"
#endif

namespace clusterkv::cache_service {

namespace {

// N of "cuda:N" (0 for "cuda"), -1 for "cpu"; nullopt for what is no device.
std::optional<int> OrdinalOf(std::string_view name) {
  constexpr std::string_view kCuda = "cuda", kNumbered = "cuda:";
  if (name == "cpu") return -1;
  if (name == kCuda) return 0;
  if (name.substr(0, kNumbered.size()) != kNumbered) return std::nullopt;
  int ordinal = 0;
  const char* last = name.data() + name.size();
  const auto [end, error] = std::from_chars(name.data() + kNumbered.size(), last, ordinal);
  if (end != last || error != std::errc() || ordinal < 0) return std::nullopt;
  return ordinal;
}

}  // namespace

bool IsDeviceName(const std::string& name) { return OrdinalOf(name).has_value(); }

absl::StatusOr<std::unique_ptr<ShardDevice>> MakeShardDevice(const std::string& name) {
  const std::optional<int> ordinal = OrdinalOf(name);
  if (!ordinal.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("device: expected cpu, cuda or cuda:N, got \"", name, "\""));
  }
  if (*ordinal < 0) return nullptr;
#ifdef CLUSTERKV_HAS_CUDA
  return CreateCudaDevice(*ordinal);
#else
  return absl::FailedPreconditionError(
      absl::StrCat("device: ", name, ": this program was built without CUDA"));
#endif
}

}  // namespace clusterkv::cache_service
