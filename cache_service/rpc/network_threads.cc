#include "cache_service/rpc/network_threads.h"

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace clusterkv::cache_service {
namespace {

// As CompletionQueue::CallbackAlternativeCQ of gRPC 1.51 counts.
int CallbackThreads() {
#if GRPC_CPP_VERSION_MAJOR == 1 && GRPC_CPP_VERSION_MINOR < 55
  return static_cast<int>(std::clamp<long>(sysconf(_SC_NPROCESSORS_CONF) / 2, 2, 16));
#else
  return 0;
#endif
}

class ParkingService final : public grpc::CallbackGenericService {
 public:
  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    absl::MutexLock lock(&mutex_);
    ++parked_;
    mutex_.Await(absl::Condition(&lifted_));
    return grpc::CallbackGenericService::CreateReactor(context);  // answers UNIMPLEMENTED
  }
  void AwaitParked(int count) {
    absl::MutexLock lock(&mutex_);
    const auto all = [this, count]()
                         ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return parked_ == count; };
    mutex_.Await(absl::Condition(&all));
  }
  void Lift() {
    absl::MutexLock lock(&mutex_);
    lifted_ = true;
  }

 private:
  absl::Mutex mutex_;
  int parked_ ABSL_GUARDED_BY(mutex_) = 0;
  bool lifted_ ABSL_GUARDED_BY(mutex_) = false;
};

struct ParkedCall {
  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> reader;
  grpc::ByteBuffer response;
  grpc::Status status;
};

}  // namespace

struct NetworkThreadLimit::Impl {
  ParkingService service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<grpc::GenericStub> stub;
  grpc::CompletionQueue queue;
  std::vector<std::unique_ptr<ParkedCall>> calls;
};

NetworkThreadLimit::NetworkThreadLimit(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

std::unique_ptr<NetworkThreadLimit> NetworkThreadLimit::Create(int threads) {
  auto impl = std::make_unique<Impl>();
  const int parked = threads == 0 ? 0 : std::max(0, CallbackThreads() - threads);
  if (parked > 0) {
    grpc::ServerBuilder builder;
    builder.RegisterCallbackGenericService(&impl->service);
    impl->server = builder.BuildAndStart();
    impl->stub = std::make_unique<grpc::GenericStub>(
        impl->server->InProcessChannel(grpc::ChannelArguments()));
  }
  for (int i = 0; i < parked; ++i) {
    ParkedCall& call = *impl->calls.emplace_back(std::make_unique<ParkedCall>());
    call.reader =
        impl->stub->PrepareUnaryCall(&call.context, "/park", grpc::ByteBuffer(), &impl->queue);
    call.reader->StartCall();
    call.reader->Finish(&call.response, &call.status, &call);
  }
  impl->service.AwaitParked(parked);
  return std::unique_ptr<NetworkThreadLimit>(new NetworkThreadLimit(std::move(impl)));
}

NetworkThreadLimit::~NetworkThreadLimit() {
  impl_->service.Lift();
  void* tag = nullptr;
  bool ok = false;
  for (size_t i = 0; i < impl_->calls.size(); ++i) impl_->queue.Next(&tag, &ok);
  impl_->queue.Shutdown();
  while (impl_->queue.Next(&tag, &ok)) {
  }
  if (impl_->server != nullptr) impl_->server->Shutdown();
}

int NetworkThreadLimit::parked() const { return static_cast<int>(impl_->calls.size()); }

}  // namespace clusterkv::cache_service
