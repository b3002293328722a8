#include "kernels/base/thread_scheduling.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace clusterkv::kernels {
namespace {

// As the kernel has it; the C library has no name for it.
struct SchedulerAttributes {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};

constexpr uint64_t kShortestSliceNs = 100'000;

}  // namespace

void ScheduleThisThread(const ThreadScheduling& scheduling) {
  // On Linux this is the thread's own priority.
  if (scheduling.nice > 0) {
    setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), scheduling.nice);
  }
  if (!scheduling.short_slices && !scheduling.batch) return;
  SchedulerAttributes attributes = {};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof(attributes), 0) != 0) return;
  if (scheduling.batch) attributes.policy = SCHED_BATCH;
  if (scheduling.short_slices) attributes.runtime = kShortestSliceNs;  // kernels before: no effect
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace clusterkv::kernels
