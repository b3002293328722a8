// Tells ThreadSanitizer what the distributions' Abseil does not: its Mutex, CondVar, Notification
// and BlockingCounter are built without ThreadSanitizer, which therefore sees no order between two
// critical sections and reports a race in every correct program. The functions below stand in front
// of the shared library's (the program's symbols come first, for gRPC's calls too), mark what they
// acquire and release, and call the library's.
//
// Linked into every program of the tsan preset and into nothing else. Not needed with an Abseil
// that was built with ThreadSanitizer.
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <typeinfo>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

namespace clusterkv::tsan {
namespace {

// The library calls some of its own functions by their public names; only the outermost one counts.
thread_local int depth = 0;

// "_ZN4absl7debian35Mutex" from the type's name, whatever the distribution calls its inline
// namespace.
std::string Scope(const char* type_name, bool is_const) {
  std::string name(type_name);
  name.pop_back();  // the E that ends a nested name
  return (is_const ? "_ZNK" : "_ZN") + name.substr(1);
}

// The library's function. In `member`, every '@' stands for Abseil's namespace.
template <typename Function>
Function* Real(const std::type_info& type, const char* member, bool is_const = false) {
  std::string symbol = Scope(type.name(), is_const);
  // N4absl7debian35MutexE has an inline namespace, N4absl5MutexE has none.
  const bool has_inline_namespace = std::string(typeid(absl::Mutex).name()) != "N4absl5MutexE";
  for (const char* c = member; *c != '\0'; ++c) {
    if (*c == '@') {
      symbol += has_inline_namespace ? "NS0_" : "NS_";
    } else {
      symbol += *c;
    }
  }
  void* real = dlsym(RTLD_NEXT, symbol.c_str());
  if (real == nullptr) {
    std::fprintf(stderr, "absl_tsan_annotations: this Abseil has no %s\n", symbol.c_str());
    std::abort();
  }
  return reinterpret_cast<Function*>(real);
}

class Depth {
 public:
  Depth() { ++depth; }
  ~Depth() { --depth; }
  bool outermost() const { return depth == 1; }
};

// `lock` returns whether it got the mutex.
template <typename Lock>
bool Acquire(void* mutex, unsigned flags, Lock lock) {
  Depth scope;
  if (!scope.outermost()) return lock();
  __tsan_mutex_pre_lock(mutex, flags);
  const bool locked = lock();
  __tsan_mutex_post_lock(mutex, locked ? flags : flags | __tsan_mutex_try_lock_failed, 0);
  return locked;
}

template <typename Unlock>
void ReleaseMutex(void* mutex, unsigned flags, Unlock unlock) {
  Depth scope;
  if (!scope.outermost()) return unlock();
  __tsan_mutex_pre_unlock(mutex, flags);
  unlock();
  __tsan_mutex_post_unlock(mutex, flags);
}

// A wait gives the held mutex up and takes it again.
template <typename Wait>
auto WaitHolding(void* mutex, Wait wait) {
  Depth scope;
  if (!scope.outermost()) return wait();
  __tsan_mutex_pre_unlock(mutex, 0);
  __tsan_mutex_post_unlock(mutex, 0);
  __tsan_mutex_pre_lock(mutex, 0);
  struct PostLock {
    void* mutex;
    ~PostLock() { __tsan_mutex_post_lock(mutex, 0, 0); }
  } post_lock{mutex};
  return wait();
}

}  // namespace
}  // namespace clusterkv::tsan

namespace absl {
ABSL_NAMESPACE_BEGIN

using clusterkv::tsan::Acquire;
using clusterkv::tsan::Real;
using clusterkv::tsan::ReleaseMutex;
using clusterkv::tsan::WaitHolding;

void Mutex::Lock() {
  static auto* const real = Real<void(Mutex*)>(typeid(Mutex), "4LockEv");
  Acquire(this, 0, [&] { return real(this), true; });
}
void Mutex::ReaderLock() {
  static auto* const real = Real<void(Mutex*)>(typeid(Mutex), "10ReaderLockEv");
  Acquire(this, __tsan_mutex_read_lock, [&] { return real(this), true; });
}
bool Mutex::TryLock() {
  static auto* const real = Real<bool(Mutex*)>(typeid(Mutex), "7TryLockEv");
  return Acquire(this, __tsan_mutex_try_lock, [&] { return real(this); });
}
bool Mutex::ReaderTryLock() {
  static auto* const real = Real<bool(Mutex*)>(typeid(Mutex), "13ReaderTryLockEv");
  return Acquire(this, __tsan_mutex_try_lock | __tsan_mutex_read_lock, [&] { return real(this); });
}
void Mutex::Unlock() {
  static auto* const real = Real<void(Mutex*)>(typeid(Mutex), "6UnlockEv");
  ReleaseMutex(this, 0, [&] { real(this); });
}
void Mutex::ReaderUnlock() {
  static auto* const real = Real<void(Mutex*)>(typeid(Mutex), "12ReaderUnlockEv");
  ReleaseMutex(this, __tsan_mutex_read_lock, [&] { real(this); });
}
void Mutex::LockWhen(const Condition& condition) {
  static auto* const real =
      Real<void(Mutex*, const Condition&)>(typeid(Mutex), "8LockWhenERK@9ConditionE");
  Acquire(this, 0, [&] { return real(this, condition), true; });
}
void Mutex::ReaderLockWhen(const Condition& condition) {
  static auto* const real =
      Real<void(Mutex*, const Condition&)>(typeid(Mutex), "14ReaderLockWhenERK@9ConditionE");
  Acquire(this, __tsan_mutex_read_lock, [&] { return real(this, condition), true; });
}
// The timed forms hold the mutex when they return, whatever they return.
bool Mutex::LockWhenWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Duration)>(
      typeid(Mutex), "19LockWhenWithTimeoutERK@9ConditionE@8DurationE");
  bool fulfilled = false;
  Acquire(this, 0, [&] { return fulfilled = real(this, condition, timeout), true; });
  return fulfilled;
}
bool Mutex::LockWhenWithDeadline(const Condition& condition, Time deadline) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Time)>(
      typeid(Mutex), "20LockWhenWithDeadlineERK@9ConditionE@4TimeE");
  bool fulfilled = false;
  Acquire(this, 0, [&] { return fulfilled = real(this, condition, deadline), true; });
  return fulfilled;
}
void Mutex::Await(const Condition& condition) {
  static auto* const real =
      Real<void(Mutex*, const Condition&)>(typeid(Mutex), "5AwaitERK@9ConditionE");
  WaitHolding(this, [&] { real(this, condition); });
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Duration)>(
      typeid(Mutex), "16AwaitWithTimeoutERK@9ConditionE@8DurationE");
  return WaitHolding(this, [&] { return real(this, condition, timeout); });
}
bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static auto* const real = Real<bool(Mutex*, const Condition&, Time)>(
      typeid(Mutex), "17AwaitWithDeadlineERK@9ConditionE@4TimeE");
  return WaitHolding(this, [&] { return real(this, condition, deadline); });
}

void CondVar::Wait(Mutex* mutex) {
  static auto* const real = Real<void(CondVar*, Mutex*)>(typeid(CondVar), "4WaitEP@5MutexE");
  WaitHolding(mutex, [&] { real(this, mutex); });
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static auto* const real = Real<bool(CondVar*, Mutex*, Duration)>(
      typeid(CondVar), "15WaitWithTimeoutEP@5MutexE@8DurationE");
  return WaitHolding(mutex, [&] { return real(this, mutex, timeout); });
}
bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static auto* const real =
      Real<bool(CondVar*, Mutex*, Time)>(typeid(CondVar), "16WaitWithDeadlineEP@5MutexE@4TimeE");
  return WaitHolding(mutex, [&] { return real(this, mutex, deadline); });
}

// The waits below return without the mutex when there is nothing to wait for.
void Notification::Notify() {
  static auto* const real = Real<void(Notification*)>(typeid(Notification), "6NotifyEv");
  __tsan_release(this);
  __tsan_release(&notified_yet_);  // what the header's HasBeenNotified loads
  real(this);
}
void Notification::WaitForNotification() const {
  static auto* const real = Real<void(const Notification*)>(
      typeid(Notification), "19WaitForNotificationEv", /*is_const=*/true);
  real(this);
  __tsan_acquire(const_cast<Notification*>(this));
}
bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  static auto* const real = Real<bool(const Notification*, Duration)>(
      typeid(Notification), "30WaitForNotificationWithTimeoutE@8DurationE", /*is_const=*/true);
  const bool notified = real(this, timeout);
  if (notified) __tsan_acquire(const_cast<Notification*>(this));
  return notified;
}
bool Notification::WaitForNotificationWithDeadline(Time deadline) const {
  static auto* const real = Real<bool(const Notification*, Time)>(
      typeid(Notification), "31WaitForNotificationWithDeadlineE@4TimeE", /*is_const=*/true);
  const bool notified = real(this, deadline);
  if (notified) __tsan_acquire(const_cast<Notification*>(this));
  return notified;
}

bool BlockingCounter::DecrementCount() {
  static auto* const real =
      Real<bool(BlockingCounter*)>(typeid(BlockingCounter), "14DecrementCountEv");
  __tsan_release(this);
  return real(this);
}
void BlockingCounter::Wait() {
  static auto* const real = Real<void(BlockingCounter*)>(typeid(BlockingCounter), "4WaitEv");
  real(this);
  __tsan_acquire(this);
}

ABSL_NAMESPACE_END
}  // namespace absl
