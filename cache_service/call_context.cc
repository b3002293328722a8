#include "cache_service/call_context.h"

#include "absl/strings/str_cat.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

absl::Status CheckContext(const CallContext& context, absl::Time now) {
  if (context.is_cancelled != nullptr && context.is_cancelled()) {
    return Error(v1::CANCELLED_BY_CLIENT, "the client left before the work began");
  }
  if (now >= context.deadline) {
    return Error(v1::QUEUE_DEADLINE, absl::StrCat("the deadline passed ",
                                                  absl::ToInt64Milliseconds(now - context.deadline),
                                                  " ms before the work could begin"));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::cache_service
