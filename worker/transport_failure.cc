#include "worker/transport_failure.h"

#include "proto/error.h"

namespace clusterkv::worker {

bool IsTransportFailure(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
      return ReasonOf(status) != v1::DRAINING;
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kUnknown:
      return true;
    default:
      return false;
  }
}

bool IsStreamFailure(const absl::Status& status) {
  return IsTransportFailure(status) || ReasonOf(status) == v1::DRAINING;
}

}  // namespace clusterkv::worker
