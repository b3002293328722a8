#include "kernels/comm/nccl_comm.h"

#include <dlfcn.h>

#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/runtime/device.h"

#if __has_include(<nccl.h>)
#include <nccl.h>
#define CLUSTERKV_HAS_NCCL 1
#endif

namespace clusterkv::kernels {

#ifdef CLUSTERKV_HAS_NCCL

namespace {

// Queueing a message takes tens of microseconds: who waits for that spins at first.
constexpr absl::Duration kSpin = absl::Milliseconds(2), kPoll = absl::Microseconds(200);
// A call that only queues work ends within this, or never.
constexpr absl::Duration kCallTimeout = absl::Seconds(2);
constexpr int64_t kFirstMessageBytes = 256;

struct Library {
  absl::Status status;
  decltype(&::ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&::ncclCommInitRankConfig) init = nullptr;
  decltype(&::ncclCommAbort) abort = nullptr;
  decltype(&::ncclCommGetAsyncError) async_error = nullptr;
  decltype(&::ncclSend) send = nullptr;
  decltype(&::ncclRecv) receive = nullptr;
  decltype(&::ncclGetErrorString) error_string = nullptr;
};

template <typename Function>
bool Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

const Library& GetLibrary() {
  static const Library& library = *[] {
    auto* found = new Library;
    void* handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      found->status = absl::UnavailableError(absl::StrCat("nccl: ", dlerror()));
      return found;
    }
    const bool whole = Find(handle, "ncclGetUniqueId", &found->get_unique_id) &&
                       Find(handle, "ncclCommInitRankConfig", &found->init) &&
                       Find(handle, "ncclCommAbort", &found->abort) &&
                       Find(handle, "ncclCommGetAsyncError", &found->async_error) &&
                       Find(handle, "ncclSend", &found->send) &&
                       Find(handle, "ncclRecv", &found->receive) &&
                       Find(handle, "ncclGetErrorString", &found->error_string);
    if (!whole) found->status = absl::UnavailableError("nccl: libnccl.so.2 lacks a function");
    return found;
  }();
  return library;
}

absl::Status NcclStatus(ncclResult_t result, const char* what) {
  if (result == ncclSuccess) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("nccl: ", what, ": ", GetLibrary().error_string(result)));
}

}  // namespace

struct NcclComm::Impl {
  // Until what was begun is no longer in progress. Errors: DeadlineExceeded, Unavailable.
  absl::Status Await(const char* what, absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    const absl::Time sleeps_from = absl::Now() + kSpin;
    while (true) {
      ncclResult_t state = ncclSuccess;
      CKV_RETURN_IF_ERROR(NcclStatus(GetLibrary().async_error(comm, &state), what));
      if (state != ncclInProgress) return NcclStatus(state, what);
      const absl::Time now = absl::Now();
      if (now >= deadline) {
        return absl::DeadlineExceededError(absl::StrCat("nccl: ", what, " took too long"));
      }
      if (now >= sleeps_from) absl::SleepFor(kPoll);
    }
  }
  absl::Status Check(ncclResult_t result, const char* what, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    absl::Status status =
        result == ncclInProgress ? Await(what, deadline) : NcclStatus(result, what);
    if (!status.ok()) AbortLocked();
    return status;
  }
  void AbortLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (comm == nullptr) return;
    const ScopedDevice scoped(device);
    (void)GetLibrary().abort(std::exchange(comm, nullptr));
  }
  absl::Status Gone() const { return absl::UnavailableError("nccl: the communicator is aborted"); }

  int device = 0;
  int peer = 0;
  absl::Mutex mutex;
  ncclComm_t comm ABSL_GUARDED_BY(mutex) = nullptr;  // null: aborted
};

NcclComm::NcclComm(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
NcclComm::~NcclComm() { Abort(); }

absl::Status NcclComm::Available() { return GetLibrary().status; }

absl::StatusOr<std::string> NcclComm::MakeUniqueId() {
  CKV_RETURN_IF_ERROR(Available());
  ncclUniqueId id;
  CKV_RETURN_IF_ERROR(NcclStatus(GetLibrary().get_unique_id(&id), "unique id"));
  return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

absl::StatusOr<std::unique_ptr<NcclComm>> NcclComm::Connect(const std::string& unique_id, int rank,
                                                            int device, absl::Time deadline) {
  CKV_RETURN_IF_ERROR(Available());
  ncclUniqueId id;
  if (unique_id.size() != sizeof(id)) {
    return absl::InvalidArgumentError(
        absl::StrCat("unique_id: expected ", sizeof(id), " bytes, got ", unique_id.size()));
  }
  std::memcpy(&id, unique_id.data(), sizeof(id));
  const ScopedDevice scoped(device);
  CKV_ASSIGN_OR_RETURN(const Stream stream, Stream::Create(device));
  CKV_ASSIGN_OR_RETURN(const DeviceBuffer first, DeviceBuffer::Create(device, kFirstMessageBytes));
  auto impl = std::make_unique<Impl>();
  impl->device = device;
  impl->peer = 1 - rank;
  {
    absl::MutexLock lock(&impl->mutex);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    // One message at a time of a few megabytes: more channels take memory and multiprocessors.
    config.minCTAs = 1;
    config.maxCTAs = 16;
    const ncclResult_t begun = GetLibrary().init(&impl->comm, 2, id, rank, &config);
    CKV_RETURN_IF_ERROR(impl->Check(begun, "initialisation", deadline));
  }
  auto comm = std::unique_ptr<NcclComm>(new NcclComm(std::move(impl)));
  CKV_RETURN_IF_ERROR(rank == 0 ? comm->Send(first.data(), kFirstMessageBytes, stream.get())
                                : comm->Receive(first.data(), kFirstMessageBytes, stream.get()));
  CKV_RETURN_IF_ERROR(comm->Wait(stream.get(), deadline));
  return comm;
}

absl::Status NcclComm::Send(const void* data, int64_t bytes, cudaStream_t stream) {
  absl::MutexLock lock(&impl_->mutex);
  if (impl_->comm == nullptr) return impl_->Gone();
  const ncclResult_t result = GetLibrary().send(data, static_cast<size_t>(bytes), ncclInt8,
                                                impl_->peer, impl_->comm, stream);
  return impl_->Check(result, "send", absl::Now() + kCallTimeout);
}

absl::Status NcclComm::Receive(void* data, int64_t bytes, cudaStream_t stream) {
  absl::MutexLock lock(&impl_->mutex);
  if (impl_->comm == nullptr) return impl_->Gone();
  const ncclResult_t result = GetLibrary().receive(data, static_cast<size_t>(bytes), ncclInt8,
                                                   impl_->peer, impl_->comm, stream);
  return impl_->Check(result, "receive", absl::Now() + kCallTimeout);
}

absl::Status NcclComm::Wait(cudaStream_t stream, absl::Time deadline) {
  // Messages take microseconds: the communicator is asked, and the clock, only every so often.
  constexpr int kQueriesPerCheck = 64;
  while (true) {
    for (int i = 0; i < kQueriesPerCheck; ++i) {
      const cudaError_t state = cudaStreamQuery(stream);
      if (state == cudaSuccess) return absl::OkStatus();
      if (state != cudaErrorNotReady) {
        Abort();
        return CudaStatus(state, "message");
      }
    }
    CKV_RETURN_IF_ERROR(CheckAsync());
    if (absl::Now() < deadline) continue;
    Abort();
    return absl::DeadlineExceededError("nccl: a message took too long");
  }
}

absl::Status NcclComm::CheckAsync() {
  absl::MutexLock lock(&impl_->mutex);
  if (impl_->comm == nullptr) return impl_->Gone();
  ncclResult_t state = ncclSuccess;
  absl::Status status =
      NcclStatus(GetLibrary().async_error(impl_->comm, &state), "asynchronous error");
  if (status.ok() && state != ncclInProgress) status = NcclStatus(state, "asynchronous error");
  if (!status.ok()) impl_->AbortLocked();
  return status;
}

void NcclComm::Abort() {
  absl::MutexLock lock(&impl_->mutex);
  impl_->AbortLocked();
}

#else  // without NCCL's header

struct NcclComm::Impl {};

NcclComm::NcclComm(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
NcclComm::~NcclComm() = default;

absl::Status NcclComm::Available() {
  return absl::UnavailableError("nccl: this program was built without NCCL");
}
absl::StatusOr<std::string> NcclComm::MakeUniqueId() { return Available(); }
absl::StatusOr<std::unique_ptr<NcclComm>> NcclComm::Connect(const std::string&, int, int,
                                                            absl::Time) {
  return Available();
}
absl::Status NcclComm::Send(const void*, int64_t, cudaStream_t) { return Available(); }
absl::Status NcclComm::Receive(void*, int64_t, cudaStream_t) { return Available(); }
absl::Status NcclComm::Wait(cudaStream_t, absl::Time) { return Available(); }
absl::Status NcclComm::CheckAsync() { return Available(); }
void NcclComm::Abort() {}

#endif

}  // namespace clusterkv::kernels
