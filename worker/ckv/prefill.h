// How the commands stream the prompt of a layer: in pieces, so that a layer of any length fits the
// writer's queue.
#ifndef CLUSTERKV_WORKER_CKV_PREFILL_H_
#define CLUSTERKV_WORKER_CKV_PREFILL_H_

#include <cstdint>

#include "absl/status/status.h"
#include "worker/prefill_writer.h"
#include "worker/trace.h"

namespace clusterkv::worker::ckv {

// Puts the first `tokens` tokens of `layer` as layer `index`, waiting for room in the queue.
// Errors: the writer's.
absl::Status PutPrompt(PrefillWriter* writer, int64_t index, const TraceLayer& layer,
                       int64_t tokens);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_PREFILL_H_
