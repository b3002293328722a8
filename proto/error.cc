#include "proto/error.h"

#include "absl/strings/cord.h"
#include "google/rpc/error_details.pb.h"

namespace clusterkv {
namespace {

constexpr char kPayloadUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";

}  // namespace

absl::StatusCode CodeOf(v1::ErrorReason reason) {
  switch (reason) {
    case v1::INVALID_FIELD:
    case v1::SHAPE_MISMATCH:
    case v1::DTYPE_MISMATCH:
    case v1::LAYER_OUT_OF_RANGE:
    case v1::TOKENS_OUT_OF_RANGE:
    case v1::NON_FINITE_KEY:
    case v1::NON_FINITE_QUERY:
    case v1::BUDGET_ZERO:
    case v1::CHUNK_TOO_LARGE:
    case v1::STREAM_TRUNCATED:
      return absl::StatusCode::kInvalidArgument;
    case v1::CHUNK_CONFLICT:
    case v1::SEQUENCE_EXISTS:
      return absl::StatusCode::kAlreadyExists;
    case v1::CHUNKS_MISSING:
    case v1::STALE_GENERATION:
    case v1::STALE_BOOT_ID:
    case v1::LAYER_NOT_READY:
    case v1::SEQUENCE_NOT_READY:
    case v1::APPEND_OUT_OF_ORDER:
    case v1::NOT_OWNER:
      return absl::StatusCode::kFailedPrecondition;
    case v1::SEQUENCE_NOT_FOUND:
    case v1::ATTACHMENT_NOT_FOUND:
    case v1::SESSION_NOT_FOUND:
    case v1::WINDOW_NOT_FOUND:
      return absl::StatusCode::kNotFound;
    case v1::SEQUENCE_RELEASED:
    case v1::RESIDENCY_STALE:
    case v1::DEVICE_LOST:
      return absl::StatusCode::kAborted;
    case v1::IDENTITY_REFUSED:
      return absl::StatusCode::kPermissionDenied;
    case v1::TENANT_QUOTA:
    case v1::RATE_LIMITED:
    case v1::ARENA_FULL:
    case v1::LIMIT_EXCEEDED:
      return absl::StatusCode::kResourceExhausted;
    case v1::DRAINING:
      return absl::StatusCode::kUnavailable;
    case v1::QUEUE_DEADLINE:
      return absl::StatusCode::kDeadlineExceeded;
    case v1::CANCELLED_BY_CLIENT:
      return absl::StatusCode::kCancelled;
    case v1::CHECKSUM_MISMATCH:
      return absl::StatusCode::kDataLoss;
    case v1::UNSUPPORTED:
      return absl::StatusCode::kUnimplemented;
    default:
      return absl::StatusCode::kInternal;
  }
}

absl::Status Error(v1::ErrorReason reason, std::string_view message,
                   const ErrorMetadata& metadata) {
  return ErrorFromParts(CodeOf(reason), reason, message, metadata);
}

absl::Status ErrorFromParts(absl::StatusCode code, v1::ErrorReason reason, std::string_view message,
                            const ErrorMetadata& metadata) {
  absl::Status status(code, absl::string_view(message.data(), message.size()));
  google::rpc::ErrorInfo info;
  info.set_reason(v1::ErrorReason_Name(reason));
  info.set_domain("clusterkv");
  for (const auto& [key, value] : metadata) (*info.mutable_metadata())[key] = value;
  status.SetPayload(kPayloadUrl, absl::Cord(info.SerializeAsString()));
  return status;
}

v1::ErrorReason ReasonOf(const absl::Status& status) {
  if (auto payload = status.GetPayload(kPayloadUrl)) {
    google::rpc::ErrorInfo info;
    v1::ErrorReason reason;
    if (info.ParseFromString(std::string(*payload)) &&
        v1::ErrorReason_Parse(info.reason(), &reason)) {
      return reason;
    }
  }
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return v1::ERROR_REASON_UNSPECIFIED;
    case absl::StatusCode::kInvalidArgument:
      return v1::INVALID_FIELD;
    case absl::StatusCode::kCancelled:
      return v1::CANCELLED_BY_CLIENT;
    case absl::StatusCode::kDeadlineExceeded:
      return v1::QUEUE_DEADLINE;
    default:
      return v1::INTERNAL_ERROR;
  }
}

ErrorMetadata MetadataOf(const absl::Status& status) {
  ErrorMetadata metadata;
  if (auto payload = status.GetPayload(kPayloadUrl)) {
    google::rpc::ErrorInfo info;
    if (info.ParseFromString(std::string(*payload))) {
      for (const auto& [key, value] : info.metadata()) metadata.emplace_back(key, value);
    }
  }
  return metadata;
}

}  // namespace clusterkv
