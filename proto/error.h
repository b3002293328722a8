// The one way that the service says no: an absl::Status whose canonical code follows from its
// reason.
//
// Reason and metadata travel as a payload; grpc_status.h turns them into google.rpc.ErrorInfo.
// Codes are chosen by what the caller should do: see README.md for the table.
#ifndef CLUSTERKV_PROTO_ERROR_H_
#define CLUSTERKV_PROTO_ERROR_H_

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "clusterkv/v1/errors.pb.h"

namespace clusterkv {

using ErrorMetadata = std::vector<std::pair<std::string, std::string>>;  // lowerCamel keys

// The canonical code of a reason: a total function, tested against proto/README.md.
absl::StatusCode CodeOf(v1::ErrorReason reason);

// A status of CodeOf(reason). `message` names field, expected and got.
absl::Status Error(v1::ErrorReason reason, std::string_view message,
                   const ErrorMetadata& metadata = {});

// The reason of a status made by Error; for others: a reason by code (InvalidArgument:
// INVALID_FIELD, Cancelled: CANCELLED_BY_CLIENT, DeadlineExceeded: QUEUE_DEADLINE, otherwise
// INTERNAL_ERROR).
v1::ErrorReason ReasonOf(const absl::Status& status);
ErrorMetadata MetadataOf(const absl::Status& status);

// The inverse for clients: a status as the server's Error made it, from the parts of an ErrorInfo.
absl::Status ErrorFromParts(absl::StatusCode code, v1::ErrorReason reason, std::string_view message,
                            const ErrorMetadata& metadata);

}  // namespace clusterkv

#endif  // CLUSTERKV_PROTO_ERROR_H_
