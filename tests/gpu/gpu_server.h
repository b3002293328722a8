// A server with a GPU for tests of a worker beside it.
#ifndef CLUSTERKV_TESTS_GPU_GPU_SERVER_H_
#define CLUSTERKV_TESTS_GPU_GPU_SERVER_H_

#include <cuda_runtime.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "tests/worker/worker_harness.h"
#ifdef CLUSTERKV_CUDA_EMULATOR
#include "cache_service/cuda_device.h"
#else
#include "tests/worker/ckv/processes.h"
#endif

namespace clusterkv::worker {

// Its device is "cuda:N", or "cpu". On the emulator in this process; else in one of its own: the
// program that CLUSTERKV_SERVER names, or lies beside the test.
class GpuServer {
 public:
  explicit GpuServer(const std::string& device) {
#ifdef CLUSTERKV_CUDA_EMULATOR
    service_ = std::make_unique<Service>(
        0, nullptr, device == "cpu" ? nullptr : cache_service::CreateCudaDevice(0).value());
    target_ = service_->target();
    admin_ = service_->server().admin_address();
#else
    const char* const given = std::getenv("CLUSTERKV_SERVER");
    const std::string program =
        given != nullptr
            ? given
            : std::filesystem::canonical("/proc/self/exe").parent_path() / "clusterkv-server";
    process_ = ckv::ServerProcess::Start(
        program, {absl::StrCat("--device=", device), "--arena_bytes=256MiB"});
    if (process_ == nullptr) std::abort();  // it said why
    target_ = process_->target();
    admin_ = process_->admin();
#endif
    admin_stub_ =
        v1::AdminService::NewStub(grpc::CreateChannel(admin_, grpc::InsecureChannelCredentials()));
  }

  const std::string& target() const { return target_; }
  v1::Stats stats() const {
    grpc::ClientContext context;
    v1::Stats stats;
    EXPECT_TRUE(admin_stub_->GetStats(&context, {}, &stats).ok());
    return stats;
  }
  void ForceReleaseWorker(uint64_t session_id) const {
    grpc::ClientContext context;
    v1::ForceReleaseWorkerRequest request;
    v1::ForceReleaseWorkerResponse response;
    request.set_session_id(session_id);
    EXPECT_TRUE(admin_stub_->ForceReleaseWorker(&context, request, &response).ok());
  }
  std::unique_ptr<Client> Connect() const {
    auto client = Client::Connect(target_);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? std::move(*client) : nullptr;
  }

 private:
#ifdef CLUSTERKV_CUDA_EMULATOR
  std::unique_ptr<Service> service_;
#else
  std::unique_ptr<ckv::ServerProcess> process_;
#endif
  std::string target_, admin_;
  std::unique_ptr<v1::AdminService::Stub> admin_stub_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_TESTS_GPU_GPU_SERVER_H_
