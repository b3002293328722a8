#include "proto/grpc_status.h"

#include <gtest/gtest.h>

#include "google/rpc/error_details.pb.h"

namespace clusterkv {
namespace {

TEST(GrpcStatusTest, EveryReasonTravelsWithCodeMessageAndMetadata) {
  const auto* reasons = v1::ErrorReason_descriptor();
  for (int i = 0; i < reasons->value_count(); ++i) {
    const auto reason = static_cast<v1::ErrorReason>(reasons->value(i)->number());
    if (reason == v1::ERROR_REASON_UNSPECIFIED) continue;
    SCOPED_TRACE(std::string(reasons->value(i)->name()));
    const absl::Status made = Error(reason, "field: expected 1, got 2", {{"got", "2"}});
    ASSERT_FALSE(made.ok());
    const grpc::Status sent = ToGrpcStatus(made);
    EXPECT_EQ(static_cast<int>(sent.error_code()), static_cast<int>(CodeOf(reason)));
    google::rpc::Status details;
    ASSERT_TRUE(details.ParseFromString(sent.error_details()));
    ASSERT_EQ(details.details_size(), 1) << "exactly one detail";
    const absl::Status received = FromGrpcStatus(sent);
    EXPECT_EQ(received.code(), made.code());
    EXPECT_EQ(std::string(received.message()), "field: expected 1, got 2");
    EXPECT_EQ(ReasonOf(received), reason);
    ASSERT_EQ(MetadataOf(received).size(), 1u);
    EXPECT_EQ(MetadataOf(received)[0].second, "2");
  }
}

TEST(GrpcStatusTest, OkIsOk) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  EXPECT_EQ(ToRpcStatus(absl::OkStatus()).details_size(), 0);
}

TEST(GrpcStatusTest, AStatusOfOtherOriginGetsAReasonByItsCode) {
  EXPECT_EQ(ReasonOf(absl::InvalidArgumentError("x")), v1::INVALID_FIELD);
  EXPECT_EQ(ReasonOf(absl::CancelledError("x")), v1::CANCELLED_BY_CLIENT);
  EXPECT_EQ(ReasonOf(absl::DeadlineExceededError("x")), v1::QUEUE_DEADLINE);
  EXPECT_EQ(ReasonOf(absl::UnknownError("x")), v1::INTERNAL_ERROR);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(ToGrpcStatus(absl::UnknownError("x")).error_details()));
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(details.details(0).UnpackTo(&info));
  EXPECT_EQ(info.reason(), "INTERNAL_ERROR");
}

TEST(GrpcStatusTest, AStatusWithoutDetailsKeepsCodeAndMessage) {
  const absl::Status status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "connection refused"));
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(std::string(status.message()), "connection refused");
}

TEST(GrpcStatusTest, DetailsThatAreNotOursAreNotTrusted) {
  const grpc::Status garbled(grpc::StatusCode::NOT_FOUND, "gone", "\xff\xff not a message");
  EXPECT_EQ(FromGrpcStatus(garbled).code(), absl::StatusCode::kNotFound);
  google::rpc::Status other;
  other.set_code(3);
  other.set_message("another story");
  const grpc::Status differs(grpc::StatusCode::NOT_FOUND, "gone", other.SerializeAsString());
  EXPECT_EQ(FromGrpcStatus(differs).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(std::string(FromGrpcStatus(differs).message()), "gone");
}

}  // namespace
}  // namespace clusterkv
