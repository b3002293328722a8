// How Linux schedules a thread. Nothing here needs a privilege.
#ifndef CLUSTERKV_KERNELS_BASE_THREAD_SCHEDULING_H_
#define CLUSTERKV_KERNELS_BASE_THREAD_SCHEDULING_H_

namespace clusterkv::kernels {

struct ThreadScheduling {
  int nice = 0;  // by how much the priority is lowered
  // The shortest slices that there are: who waits for the CPU gets in sooner, and so does the
  // thread when it waits. Linux 6.12 and later.
  bool short_slices = false;
  // Takes no CPU from a thread that runs when it wakes up (SCHED_BATCH).
  bool batch = false;
};

// For the calling thread. What the system refuses stays as it is.
void ScheduleThisThread(const ThreadScheduling& scheduling);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_THREAD_SCHEDULING_H_
