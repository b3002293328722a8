// A configuration file and flags of any form: refused or resolved, never worse.
#include <string>
#include <vector>

#include "cache_service/config.h"
#include "kernels/base/check.h"

namespace clusterkv::cache_service {
namespace {

void RunOne(const std::string& text) {
  v1::ServerConfig message;
  ConfigPlaces places;
  if (ParseConfigText(text, "file", &message, &places).ok()) {
    const absl::StatusOr<Config> config = ResolveConfig(message, places);
    CKV_CHECK(config.ok() || !config.status().message().empty());
  }
  std::vector<std::string> flags(1);
  for (const char c : text) {
    if (c == '\n') {
      flags.emplace_back();
    } else {
      flags.back().push_back(c);
    }
  }
  for (const std::string& flag : flags) {
    if (flag.find("config") != std::string::npos) return;  // reads files
  }
  const absl::StatusOr<CommandLine> line = ParseCommandLine(flags);
  if (line.ok()) (void)ResolveConfig(line->message, line->places);
}

}  // namespace
}  // namespace clusterkv::cache_service

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  clusterkv::cache_service::RunOne(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
