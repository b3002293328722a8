// Tells ThreadSanitizer what the distributions' gRPC does not: its queues are built without
// ThreadSanitizer, which therefore sees no order between the start of an operation and the thread
// that is told of its end, and reports every message and every reactor as a race. The functions
// below stand in front of the shared library's and mark the orders that gRPC promises: what came
// before an operation's start comes before its tag leaves the completion queue, be it taken by hand
// or by the threads that call reactors; what came before a server's start comes before its calls,
// also on threads that an earlier server has started; and OnDone comes after all else that a call
// does.
//
// Linked into every program of the tsan preset and into nothing else. Not needed with a gRPC that
// was built with ThreadSanitizer.
#include <dlfcn.h>
#include <grpc/grpc.h>
#include <grpcpp/alarm.h>
#include <grpcpp/server.h>
#include <grpcpp/support/server_callback.h>
#include <sanitizer/tsan_interface.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <utility>

namespace {

template <typename Function>
Function* Real(const char* name) {
  void* real = dlsym(RTLD_NEXT, name);
  if (real == nullptr) {
    std::fprintf(stderr, "grpc_tsan_annotations: this gRPC has no %s\n", name);
    std::abort();
  }
  return reinterpret_cast<Function*>(real);
}

char g_starts;  // of servers

}  // namespace

extern "C" {

void grpc_server_start(grpc_server* server) {
  static auto* const real = Real<decltype(grpc_server_start)>("grpc_server_start");
  __tsan_release(&g_starts);
  real(server);
}

grpc_call_error grpc_call_start_batch(grpc_call* call, const grpc_op* ops, size_t count, void* tag,
                                      void* reserved) {
  static auto* const real = Real<decltype(grpc_call_start_batch)>("grpc_call_start_batch");
  __tsan_release(tag);
  return real(call, ops, count, tag, reserved);
}

grpc_event grpc_completion_queue_next(grpc_completion_queue* queue, gpr_timespec deadline,
                                      void* reserved) {
  static auto* const real =
      Real<decltype(grpc_completion_queue_next)>("grpc_completion_queue_next");
  const grpc_event event = real(queue, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) {
    __tsan_acquire(&g_starts);
    __tsan_acquire(event.tag);
  }
  return event;
}

grpc_event grpc_completion_queue_pluck(grpc_completion_queue* queue, void* tag,
                                       gpr_timespec deadline, void* reserved) {
  static auto* const real =
      Real<decltype(grpc_completion_queue_pluck)>("grpc_completion_queue_pluck");
  const grpc_event event = real(queue, tag, deadline, reserved);
  if (event.type == GRPC_OP_COMPLETE) __tsan_acquire(tag);
  return event;
}

}  // extern "C"

namespace grpc {

// An alarm's callback is run once, whatever becomes of the alarm, and comes after what set it.
void Alarm::SetInternal(gpr_timespec deadline, std::function<void(bool)> callback) {
  static auto* const real = Real<void(Alarm*, gpr_timespec, std::function<void(bool)>)>(
      "_ZN4grpc5Alarm11SetInternalE12gpr_timespecSt8functionIFvbEE");
  // Destroyed here, not in the library.
  auto* const own = new std::function<void(bool)>(std::move(callback));
  __tsan_release(own);
  real(this, deadline, [own](bool expired) {
    __tsan_acquire(own);
    (*own)(expired);
    delete own;
  });
}

namespace internal {

// The library hands reactions that may block to threads of its own, and counts them down unseen.
// Here each gets a thread; the counts are then seen, but for what the library's completion of the
// call counts down.
void ServerCallbackCall::ScheduleOnDone(bool inline_on_done) {
  __tsan_acquire(&callbacks_outstanding_);
  if (inline_on_done) {
    CallOnDone();
  } else {
    std::thread([this] { CallOnDone(); }).detach();
  }
}

void ServerCallbackCall::CallOnCancel(ServerReactor* reactor) {
  __tsan_acquire(&on_cancel_conditions_remaining_);
  if (reactor->InternalInlineable()) {
    reactor->OnCancel();
    return;
  }
  Ref();
  std::thread([this, reactor] {
    reactor->OnCancel();
    MaybeDone();
  }).detach();
}

}  // namespace internal
}  // namespace grpc

// A server's calls end before its shutdown does: the library's count of them.
namespace {
char g_calls;
}  // namespace

extern "C" {

void EndCall(grpc::Server* server) asm("_ZN4grpc6Server23UnrefWithPossibleNotifyEv");
void EndCall(grpc::Server* server) {
  static auto* const real = Real<void(grpc::Server*)>("_ZN4grpc6Server23UnrefWithPossibleNotifyEv");
  __tsan_release(&g_calls);
  real(server);
}

void AwaitCalls(grpc::Server* server) asm("_ZN4grpc6Server18UnrefAndWaitLockedEv");
void AwaitCalls(grpc::Server* server) {
  static auto* const real = Real<void(grpc::Server*)>("_ZN4grpc6Server18UnrefAndWaitLockedEv");
  real(server);
  __tsan_acquire(&g_calls);
}

}  // extern "C"
