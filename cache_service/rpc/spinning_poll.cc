#include "cache_service/rpc/spinning_poll.h"

#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "kernels/base/thread_scheduling.h"

namespace clusterkv::cache_service {
namespace {

std::atomic<int64_t> g_spin_ns{0};
std::atomic<int> g_scopes{0};
std::atomic<bool> g_prompt{false};

}  // namespace

void SetPollSpin(absl::Duration spin) {
  g_spin_ns.store(absl::ToInt64Nanoseconds(spin), std::memory_order_relaxed);
}

void SetPromptPolls(bool prompt) { g_prompt.store(prompt, std::memory_order_relaxed); }

PollSpinScope::PollSpinScope() { g_scopes.fetch_add(1, std::memory_order_relaxed); }
PollSpinScope::~PollSpinScope() { g_scopes.fetch_sub(1, std::memory_order_relaxed); }

}  // namespace clusterkv::cache_service

#ifndef CLUSTERKV_SANITIZED
namespace {

int PollOnce(int epoll, epoll_event* events, int max_events, int timeout_ms) {
  return static_cast<int>(
      syscall(SYS_epoll_pwait, epoll, events, max_events, timeout_ms, nullptr, 8));
}

}  // namespace

// Takes the C library's place for every library of the program.
extern "C" int epoll_wait(int epoll, epoll_event* events, int max_events, int timeout_ms) {
  using clusterkv::cache_service::g_scopes;
  using clusterkv::cache_service::g_spin_ns;
  static thread_local bool asked = false;
  if (!asked && clusterkv::cache_service::g_prompt.load(std::memory_order_relaxed)) {
    asked = true;
    clusterkv::kernels::ScheduleThisThread({.short_slices = true});
  }
  const int64_t spin_ns = g_spin_ns.load(std::memory_order_relaxed);
  if (spin_ns == 0 || timeout_ms == 0 || g_scopes.load(std::memory_order_relaxed) == 0) {
    return PollOnce(epoll, events, max_events, timeout_ms);
  }
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto spun = Clock::duration::zero();
  do {
    const int ready = PollOnce(epoll, events, max_events, 0);
    if (ready != 0) return ready;
    spun = Clock::now() - start;
  } while (spun < std::chrono::nanoseconds(spin_ns));
  if (timeout_ms > 0) {
    const auto spun_ms = std::chrono::duration_cast<std::chrono::milliseconds>(spun).count();
    timeout_ms = static_cast<int>(std::max<int64_t>(0, timeout_ms - spun_ms));
  }
  return PollOnce(epoll, events, max_events, timeout_ms);
}
#endif
