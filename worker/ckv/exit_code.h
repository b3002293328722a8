// How a command of ckv ends: its exit code, and what a person reads when it fails.
#ifndef CLUSTERKV_WORKER_CKV_EXIT_CODE_H_
#define CLUSTERKV_WORKER_CKV_EXIT_CODE_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace clusterkv::worker::ckv {

enum ExitCode {
  kExitOk = 0,
  kExitFailed = 1,         // a check failed, or the server said no
  kExitUsage = 2,          // wrong flags or arguments
  kExitCannotConnect = 3,  // no server answers at the address
};

// A status that ends the program with kExitUsage. `message` says what is wrong and what would be
// right.
absl::Status UsageError(std::string_view message);
// `status`, so marked that it ends the program with kExitCannotConnect.
absl::Status ConnectError(std::string_view target, const absl::Status& status);

int ExitCodeOf(const absl::Status& status);

// "message (REASON)" and, where something can be done about it, a second line "  what to do".
std::string DescribeError(const absl::Status& status);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_EXIT_CODE_H_
