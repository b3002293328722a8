// A server with a device: what it says of it over the wire.
#include <cuda_runtime.h>
#include <grpcpp/channel.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cache_service/cuda_device.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/worker/worker_harness.h"
#include "worker/decode_session.h"

namespace clusterkv::worker {
namespace {

using grpc::health::v1::HealthCheckResponse;

HealthCheckResponse::ServingStatus Health(Service& service, const std::string& name) {
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(name);
  HealthCheckResponse response;
  const auto stub = grpc::health::v1::Health::NewStub(service.server().InProcessChannel());
  const grpc::Status status = stub->Check(&context, request, &response);
  if (status.error_code() == grpc::StatusCode::NOT_FOUND) {
    return HealthCheckResponse::SERVICE_UNKNOWN;
  }
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.status();
}

std::vector<float> FirstOutput(const Service& service, const std::string& name) {
  const std::vector<TraceLayer> layers = {
      MakeLayer({2, 4, 32, kernels::ElementType::kBFloat16}, 501, 1, /*seed=*/1)};
  const auto client = service.Connect();
  const auto sequence = Prefill(client.get(), OpenRequest(name, layers), layers);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  std::vector<float> output(4 * 32);
  if (!sequence.ok()) return output;
  auto session = DecodeSession::Attach(client.get(), sequence->handle(), {});
  EXPECT_TRUE(session.ok()) << session.status();
  if (!session.ok()) return output;
  const absl::Status status =
      (*session)->Step(0, Query(layers[0], 0), absl::MakeSpan(output), nullptr);
  EXPECT_TRUE(status.ok()) << status;
  return output;
}

// In a process of its own, which it ends: with 0 if all was as it should be.
[[noreturn]] void FailAndAsk() {
  {
    Service service(0, nullptr, cache_service::CreateCudaDevice(0).value());
    const std::vector<float> before = FirstOutput(service, "before");
    EXPECT_EQ(Health(service, "device"), HealthCheckResponse::SERVING);
    cuda_emulator::Fail();
    const std::vector<float> after = FirstOutput(service, "after");
    for (size_t i = 0; i < before.size(); ++i) EXPECT_NEAR(after[i], before[i], 1e-3f) << i;
    EXPECT_EQ(Health(service, "device"), HealthCheckResponse::NOT_SERVING);
    for (const char* name : {"", "liveness", "readiness"}) {
      EXPECT_EQ(Health(service, name), HealthCheckResponse::SERVING) << name;
    }
  }
  std::_Exit(testing::Test::HasFailure() ? 1 : 0);
}

TEST(ServerDeviceDeathTest, AFailedDeviceIsToldAndTheServerServesOn) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(FailAndAsk(), testing::ExitedWithCode(0), "");
}

TEST(ServerDeviceTest, WithoutADeviceNothingIsSaidOfIt) {
  Service service;
  EXPECT_EQ(Health(service, "device"), HealthCheckResponse::SERVICE_UNKNOWN);
}

}  // namespace
}  // namespace clusterkv::worker
