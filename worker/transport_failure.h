// Which failures are the connection's and not the call's.
#ifndef CLUSTERKV_WORKER_TRANSPORT_FAILURE_H_
#define CLUSTERKV_WORKER_TRANSPORT_FAILURE_H_

#include "absl/status/status.h"

namespace clusterkv::worker {

// True when one attempt more, after Client::Reconnect, may succeed: the stream or connection broke,
// or the server did not answer in time. A server that says why it refuses (DRAINING too) is
// believed.
bool IsTransportFailure(const absl::Status& status);

// The same for a stream that was open: a server that ends it with DRAINING shuts down, and the one
// that comes after it may answer.
bool IsStreamFailure(const absl::Status& status);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_TRANSPORT_FAILURE_H_
