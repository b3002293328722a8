// How the calls of one RPC end early.
#ifndef CLUSTERKV_CACHE_SERVICE_CALL_CONTEXT_H_
#define CLUSTERKV_CACHE_SERVICE_CALL_CONTEXT_H_

#include <functional>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace clusterkv::cache_service {

// Copyable; is_cancelled is asked from executor threads.
struct CallContext {
  absl::Time deadline = absl::InfiniteFuture();
  std::function<bool()> is_cancelled;  // may be null
};

// OK while the call is to go on. Errors: CANCELLED_BY_CLIENT, QUEUE_DEADLINE.
absl::Status CheckContext(const CallContext& context, absl::Time now);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_CALL_CONTEXT_H_
