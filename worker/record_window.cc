#include "worker/record_window.h"

#include <charconv>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#ifdef CLUSTERKV_HAS_CUDA
#include "worker/cuda_window.h"
#endif

namespace clusterkv::worker {
namespace {

// N of "cuda:N", 0 for "cuda"; nullopt for what is no GPU.
std::optional<int> OrdinalOf(std::string_view device) {
  constexpr std::string_view kNumbered = "cuda:";
  if (device == "cuda") return 0;
  if (device.substr(0, kNumbered.size()) != kNumbered) return std::nullopt;
  int ordinal = 0;
  const char* last = device.data() + device.size();
  const auto [end, error] = std::from_chars(device.data() + kNumbered.size(), last, ordinal);
  if (end != last || error != std::errc() || ordinal < 0) return std::nullopt;
  return ordinal;
}

}  // namespace

std::string WhyNoWindow(const std::string& device, v1::Link link) {
  const std::optional<int> ordinal = OrdinalOf(device);
  if (!ordinal.has_value())
    return absl::StrCat("this worker has no GPU (its device is ", device, ")");
#ifdef CLUSTERKV_HAS_CUDA
  return WhyNoCudaWindow(*ordinal, link);
#else
  (void)link;
  return "this worker was built without CUDA";
#endif
}

absl::StatusOr<std::unique_ptr<RecordWindow>> MakeRecordWindow(const std::string& device,
                                                               const RecordWindow::Layout& layout) {
  if (std::string why = WhyNoWindow(device, v1::LINK_PEER); !why.empty()) {
    return absl::UnavailableError(why);
  }
#ifdef CLUSTERKV_HAS_CUDA
  return MakeCudaWindow(*OrdinalOf(device), layout);
#else
  (void)layout;
  return absl::UnavailableError("this worker was built without CUDA");
#endif
}

}  // namespace clusterkv::worker
