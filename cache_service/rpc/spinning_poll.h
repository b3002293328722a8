// Lets gRPC's poller spin before it sleeps, while streams are open, or come in sooner when it
// wakes.
//
// A wake-up costs more than everything else in a small call (a quarter of the time on a virtual
// machine). The callback API has no option to poll, but whichever of its threads waits for the
// network does so in epoll_wait: a program that links this file has its own epoll_wait, which first
// polls for the given time. Programs of the tests and other sanitized builds keep the C library's.
//
// Where selects keep all CPUs busy the kernel lets each use up its slice, a millisecond or more,
// before a poller that woke up gets in. Until then nobody knows whose calls have come, and turns
// are given to those that are known. Prompt pollers ask for the shortest slices (Linux 6.12 and
// later), so that they get in at once; for that they find fewer calls at a time. Select threads
// then do their part (ShardOptions::selects_give_way).
//
// Thread-safe.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_SPINNING_POLL_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_SPINNING_POLL_H_

#include "absl/time/time.h"

namespace clusterkv::cache_service {

// How long a poller spins before it sleeps, process-wide. Zero: not at all.
void SetPollSpin(absl::Duration spin);

// Whether pollers are prompt, process-wide. Threads that are stay so.
void SetPromptPolls(bool prompt);

// While one is alive pollers may spin.
class PollSpinScope {
 public:
  PollSpinScope();
  ~PollSpinScope();
  PollSpinScope(const PollSpinScope&) = delete;
  PollSpinScope& operator=(const PollSpinScope&) = delete;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_SPINNING_POLL_H_
