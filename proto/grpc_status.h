// absl::Status <-> grpc::Status: same canonical code, reason and metadata as one
// google.rpc.ErrorInfo.
#ifndef CLUSTERKV_PROTO_GRPC_STATUS_H_
#define CLUSTERKV_PROTO_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "google/rpc/status.pb.h"
#include "proto/error.h"

namespace clusterkv {

// Any status that is not OK leaves with exactly one ErrorInfo (ReasonOf and MetadataOf of it).
grpc::Status ToGrpcStatus(const absl::Status& status);
// The inverse. A status without ErrorInfo (made by the library) keeps its code and message.
absl::Status FromGrpcStatus(const grpc::Status& status);

// The same for errors inside batch responses.
google::rpc::Status ToRpcStatus(const absl::Status& status);
absl::Status FromRpcStatus(const google::rpc::Status& status);

}  // namespace clusterkv

#endif  // CLUSTERKV_PROTO_GRPC_STATUS_H_
