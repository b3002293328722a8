// Load on a server: calls at a given rate whatever the answers take, and what came of them.
//
// Open loop: call i is due at start + i / rps, and its latency counts from then, so that a server
// that stalls is charged for the calls it kept waiting (no coordinated omission). rps 0: closed
// loop, each thread calls again as soon as it has its answer.
#ifndef CLUSTERKV_WORKER_CKV_LOAD_H_
#define CLUSTERKV_WORKER_CKV_LOAD_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/ckv/histogram.h"

namespace clusterkv::worker::ckv {

struct LoadOptions {
  double rps = 0;
  absl::Duration duration = absl::Seconds(10);
  int64_t concurrency = 8;  // most calls in flight, one thread each
};

struct LoadResult {
  Histogram latencies_ns;                       // of calls that ended OK
  std::map<std::string, int64_t> status_codes;  // by gRPC's name of the code, OK too
  std::map<std::string, int64_t> errors;        // by code and message
  absl::Duration total;                         // first call until last answer

  int64_t count() const;  // all calls
  int64_t failed() const;
};

// One call of one of the threads, thread-safe against those of the others.
using LoadCall = std::function<absl::Status()>;

// calls [concurrency]: one per thread. progress(done seconds of the duration), may be null.
LoadResult RunLoad(const LoadOptions& options, const std::vector<LoadCall>& calls,
                   const std::function<void(absl::Duration done)>& progress);

// As ghz prints it, and with the keys of ghz's JSON; durations in nanoseconds, marks in seconds.
std::string LoadSummary(const LoadResult& result);
std::string LoadJson(const LoadResult& result);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_LOAD_H_
