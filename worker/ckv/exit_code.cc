#include "worker/ckv/exit_code.h"

#include "absl/strings/cord.h"
#include "proto/error.h"

namespace clusterkv::worker::ckv {
namespace {

constexpr char kExitUrl[] = "clusterkv/ckv/exit";

absl::Status Marked(absl::StatusCode code, const std::string& message, const char* mark) {
  absl::Status status(code, message);
  status.SetPayload(kExitUrl, absl::Cord(mark));
  return status;
}

// What a person can do about it; null: nothing that the message does not say.
const char* HintOf(v1::ErrorReason reason) {
  switch (reason) {
    case v1::SEQUENCE_NOT_FOUND:
      return "`ckv sequences` lists what the server holds";
    case v1::SEQUENCE_EXISTS:
      return "choose another name, or add --replace to release the old sequence first";
    case v1::STALE_GENERATION:
    case v1::STALE_BOOT_ID:
      return "the server restarted or the name was reused: prefill the sequence again";
    case v1::NOT_OWNER:
      return "ask the shard that the message names, or give --servers instead of --server";
    case v1::ARENA_FULL:
      return "release sequences, or start the server with a larger --arena_bytes (`ckv status` "
             "shows "
             "the arena)";
    case v1::LIMIT_EXCEEDED:
      return "the message names the limit: raise it in the server's configuration or ask for less";
    case v1::IDENTITY_REFUSED:
      return "show another certificate, or have its identity added to the server's tenants";
    case v1::TENANT_QUOTA:
      return "release sequences, or have the tenant's arena_bytes raised";
    case v1::RATE_LIMITED:
      return "wait as long as the message says, or have the tenant's rates raised";
    case v1::DRAINING:
      return "the server is going away: use another one, or wait for its successor";
    case v1::QUEUE_DEADLINE:
      return "the server is busy or stuck: `ckv top` shows its queues";
    case v1::CHECKSUM_MISMATCH:
      return "the server's memory is damaged: evict the sequence, and look at the machine";
    case v1::UNSUPPORTED:
      return "`ckv status` shows what this server supports";
    case v1::BUDGET_ZERO:
      return "give --budget=1 or more; sinks are part of it";
    default:
      return nullptr;
  }
}

}  // namespace

absl::Status UsageError(std::string_view message) {
  return Marked(absl::StatusCode::kInvalidArgument, std::string(message), "usage");
}

absl::Status ConnectError(std::string_view target, const absl::Status& status) {
  return Marked(status.code(),
                "cannot connect to " + std::string(target) + ": " + std::string(status.message()),
                "connect");
}

int ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  if (auto mark = status.GetPayload(kExitUrl)) {
    return *mark == "usage" ? kExitUsage : kExitCannotConnect;
  }
  return kExitFailed;
}

std::string DescribeError(const absl::Status& status) {
  std::string text(status.message());
  if (ExitCodeOf(status) == kExitUsage) return text;
  if (ExitCodeOf(status) == kExitCannotConnect) {
    return text +
           "\n  is clusterkv-server running there? Its data port is --listen, its admin port " +
           "--admin_listen";
  }
  // Only what the server said has a reason; a local failure speaks for itself.
  if (status.GetPayload("type.googleapis.com/google.rpc.ErrorInfo")) {
    const v1::ErrorReason reason = ReasonOf(status);
    text += " (" + v1::ErrorReason_Name(reason) + ")";
    if (const char* hint = HintOf(reason)) text += std::string("\n  ") + hint;
    return text;
  }
  return text + " (" + std::string(absl::StatusCodeToString(status.code())) + ")";
}

}  // namespace clusterkv::worker::ckv
