// A communicator of two ranks: one link between a service (rank 0) and a worker (rank 1).
//
// It dies with its peer and is never shared. Nothing here waits without a deadline: initialisation
// and every call are non-blocking underneath. Whatever goes wrong ends it for good: Abort, at most
// once, after which memory that was handed to it is free again. The library is looked up at run
// time (libnccl.so.2).
//
// Thread-safe: calls exclude each other; Abort and CheckAsync come from any thread.
#ifndef CLUSTERKV_KERNELS_COMM_NCCL_COMM_H_
#define CLUSTERKV_KERNELS_COMM_NCCL_COMM_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace clusterkv::kernels {

class NcclComm {
 public:
  // OK if there is a library to be used. Errors: Unavailable, saying why not.
  static absl::Status Available();
  // What both ranks need to find each other. Errors: Unavailable.
  static absl::StatusOr<std::string> MakeUniqueId();

  // Meets the other rank and lets a first message through, so that later ones need nothing of the
  // peer's host. Blocks until `deadline` at most. Errors: DeadlineExceeded; Unavailable;
  // InvalidArgument for an id of wrong length.
  static absl::StatusOr<std::unique_ptr<NcclComm>> Connect(const std::string& unique_id, int rank,
                                                           int device, absl::Time deadline);
  ~NcclComm();  // aborts

  // Queues a message to or from the other rank on `stream`; both sides give the same bytes. The
  // memory must be left alone until what was queued is done, or the communicator aborted.
  // Errors: Unavailable: the communicator is broken (it was aborted here).
  absl::Status Send(const void* data, int64_t bytes, cudaStream_t stream);
  absl::Status Receive(void* data, int64_t bytes, cudaStream_t stream);
  // Waits for all that was queued on `stream`. Aborts when `deadline` passes before, or on an error
  // of the communicator. Errors: DeadlineExceeded, Unavailable.
  absl::Status Wait(cudaStream_t stream, absl::Time deadline);
  // Errors: Unavailable: what the communicator met; it was aborted here.
  absl::Status CheckAsync();
  void Abort();

 private:
  struct Impl;
  explicit NcclComm(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_COMM_NCCL_COMM_H_
