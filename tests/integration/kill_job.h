// The job of the kill tests: the same small sequence for workers, tests and killed processes alike.
#ifndef CLUSTERKV_TESTS_INTEGRATION_KILL_JOB_H_
#define CLUSTERKV_TESTS_INTEGRATION_KILL_JOB_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/client.h"
#include "worker/decode_session.h"
#include "worker/trace.h"

namespace clusterkv::integration {

constexpr int64_t kJobPrompt = 200, kJobSteps = 24;

const std::vector<worker::TraceLayer>& JobLayers();
v1::OpenSequenceRequest JobRequest(const std::string& name);
// Index digests of all layers in one line.
std::string JobDigest(const v1::Sequence& sequence);

// Decodes the steps from `first_step` on, appending what the sequence lacks, and tells each
// output's digest: told(step, layer, digest).
absl::Status DecodeJob(worker::Client* client, const v1::SequenceHandle& sequence,
                       int64_t first_step,
                       const std::function<void(int64_t, int64_t, uint64_t)>& told);
// The step that a worker which takes the sequence over begins with.
absl::StatusOr<int64_t> NextStep(worker::Client* client, const v1::SequenceHandle& sequence);

}  // namespace clusterkv::integration

#endif  // CLUSTERKV_TESTS_INTEGRATION_KILL_JOB_H_
