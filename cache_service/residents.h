// The resident kernels of a device: who runs, with how many multiprocessors, and who must wait.
//
// A call that waits for the whole device (memory freed, a mapping opened or closed) waits for every
// resident kernel, and holds up the process's other calls of CUDA meanwhile: it is made while all
// are stopped (Pause). NCCL makes such calls whenever it likes, so there is no resident kernel
// while there is a link of NCCL's, and no such link while there is a resident kernel.
#ifndef CLUSTERKV_CACHE_SERVICE_RESIDENTS_H_
#define CLUSTERKV_CACHE_SERVICE_RESIDENTS_H_

#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/resident_shares.h"

namespace clusterkv::cache_service {

// The service's end of a group: a kernel serves it, perhaps together with others.
class ResidentEnd {
 public:
  virtual ~ResidentEnd() = default;
  virtual ResidentRound round() const = 0;
  // Starts a kernel that serves it and `others`, of the same class. Both do nothing where there is
  // nothing to do.
  virtual absl::Status Start(const ResidentPlace& place,
                             const std::vector<ResidentEnd*>& others) = 0;
  // Stops the kernel that serves it.
  virtual absl::Status Stop() = 0;
};

// Thread-safe.
class Residents {
 public:
  // Stops all while it lives, but what failed; then they go on, each in its place.
  class Pause {
   public:
    explicit Pause(Residents* residents);
    ~Pause();
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    Residents& residents_;
  };

  // For a link of NCCL's, from before it is made until after it is gone. Move-only.
  class NcclPlace {
   public:
    explicit NcclPlace(Residents* residents) : residents_(residents) {}
    NcclPlace(NcclPlace&& other) noexcept : residents_(std::exchange(other.residents_, nullptr)) {}
    NcclPlace& operator=(NcclPlace&&) = delete;
    ~NcclPlace();

   private:
    Residents* residents_;
  };

  explicit Residents(int multiprocessors) : multiprocessors_(multiprocessors) {}

  // With a Pause: whether there is room for one more. Errors: Unavailable, ResourceExhausted.
  absl::Status CheckRoom() const;
  // With a Pause, after CheckRoom: adds a stopped one and starts it. Errors: as ResidentEnd::Start;
  // it is not added then.
  absl::Status Add(ResidentEnd* end);
  // With a Pause: takes one out, if it is there.
  void Remove(ResidentEnd* end);

  // Errors: Unavailable beside resident kernels.
  absl::StatusOr<NcclPlace> TakeNcclPlace();

  // Returns launch(blocks_per_pair) for such a select, which finds its place beside the resident
  // kernels: none starts meanwhile.
  template <typename Launch>
  auto LaunchSelect(const ResidentRound& round, const Launch& launch) {
    absl::MutexLock lock(&launch_mutex_);
    return launch(SelectBlocksPerPair(multiprocessors_, held_, round));
  }

 private:
  // The kernels for all that there are.
  std::vector<ResidentLaunch> Launches() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Start(const ResidentLaunch& launch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // From now on selects leave room for those.
  void Hold(const std::vector<ResidentLaunch>& launches) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int multiprocessors_;
  absl::Mutex mutex_;  // held by a Pause
  std::vector<ResidentEnd*> all_ ABSL_GUARDED_BY(mutex_);
  int nccl_links_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Mutex launch_mutex_ ABSL_ACQUIRED_AFTER(mutex_);
  int held_ ABSL_GUARDED_BY(launch_mutex_) = 0;  // multiprocessors, also during a Pause
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RESIDENTS_H_
