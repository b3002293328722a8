// How a replay's figures are shown: JSON for tools, tables and a picture for people.
#ifndef CLUSTERKV_WORKER_CKV_REPLAY_REPORT_H_
#define CLUSTERKV_WORKER_CKV_REPLAY_REPORT_H_

#include <string>
#include <vector>

#include "worker/ckv/replay.h"

namespace clusterkv::worker::ckv {

// {"layers": [{"layer", "preset", …}]} of all runs, in order. The keys are fixed; tools read them.
std::string ReplayJson(const std::vector<ReplayResult>& runs);

// One row per layer of one run.
std::string ReplayTable(const ReplayResult& run);

// One row per run and layer as a Markdown table, full attention among them: what the README shows.
std::string CompareTable(const std::vector<ReplayResult>& runs);

// Output error over bytes received per step, both logarithmic, one mark per run and layer. Runs
// with preset "full" are drawn as the line of all bytes. `all_kv_bytes`: of one KV head and layer.
std::string ReplayPicture(const std::vector<ReplayResult>& runs, double all_kv_bytes);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_REPLAY_REPORT_H_
