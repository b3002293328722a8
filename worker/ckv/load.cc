#include "worker/ckv/load.h"

#include <sys/prctl.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

constexpr double kPercentages[] = {10, 25, 50, 75, 90, 95, 99, 99.9};

// The names that gRPC's own tools print.
std::string CodeName(absl::StatusCode code) {
  const char* const names[] = {
      "OK",       "Canceled",       "Unknown",          "InvalidArgument",   "DeadlineExceeded",
      "NotFound", "AlreadyExists",  "PermissionDenied", "ResourceExhausted", "FailedPrecondition",
      "Aborted",  "OutOfRange",     "Unimplemented",    "Internal",          "Unavailable",
      "DataLoss", "Unauthenticated"};
  const int index = static_cast<int>(code);
  return index >= 0 && index < 17 ? names[index] : "Unknown";
}

void Count(const absl::Status& status, absl::Duration latency, LoadResult* result) {
  const std::string code = CodeName(status.code());
  ++result->status_codes[code];
  if (status.ok()) {
    result->latencies_ns.Record(absl::ToInt64Nanoseconds(latency));
  } else {
    ++result->errors["rpc error: code = " + code + " desc = " + std::string(status.message())];
  }
}

void MergeInto(const LoadResult& from, LoadResult* to) {
  to->latencies_ns.Merge(from.latencies_ns);
  for (const auto& [code, count] : from.status_codes) to->status_codes[code] += count;
  for (const auto& [error, count] : from.errors) to->errors[error] += count;
}

// One thread's share of the load.
LoadResult RunThread(const LoadOptions& options, const LoadCall& call, absl::Time start,
                     std::atomic<int64_t>* next) {
  // The kernel may let sleepers wait 50 us longer than they asked for, which would count as the
  // server's time.
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  LoadResult result;
  const absl::Time end = start + options.duration;
  while (true) {
    absl::Time due = absl::Now();
    if (options.rps > 0) {
      due = start + absl::Seconds(static_cast<double>(next->fetch_add(1)) / options.rps);
      if (due >= end) return result;
      absl::SleepFor(due - absl::Now());
    } else if (due >= end) {
      return result;
    }
    const absl::Status status = call();
    Count(status, absl::Now() - due, &result);
  }
}

}  // namespace

int64_t LoadResult::count() const {
  int64_t count = 0;
  for (const auto& [code, calls] : status_codes) count += calls;
  return count;
}

int64_t LoadResult::failed() const { return count() - latencies_ns.count(); }

LoadResult RunLoad(const LoadOptions& options, const std::vector<LoadCall>& calls,
                   const std::function<void(absl::Duration done)>& progress) {
  LoadResult result;
  absl::Mutex mutex;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> running{static_cast<int64_t>(calls.size())};
  const absl::Time start = absl::Now();
  std::vector<std::thread> threads;
  threads.reserve(calls.size());
  for (const LoadCall& call : calls) {
    threads.emplace_back([&, &call = call] {
      const LoadResult own = RunThread(options, call, start, &next);
      absl::MutexLock lock(&mutex);
      MergeInto(own, &result);
      running.fetch_sub(1);
    });
  }
  while (progress && running.load() > 0) {
    progress(std::min(absl::Now() - start, options.duration));
    absl::SleepFor(absl::Milliseconds(100));
  }
  for (std::thread& thread : threads) thread.join();
  result.total = absl::Now() - start;
  return result;
}

std::string LoadSummary(const LoadResult& result) {
  const Histogram& latencies = result.latencies_ns;
  const auto time = [](double ns) { return HumanDuration(absl::Nanoseconds(ns)); };
  const double seconds = absl::ToDoubleSeconds(result.total);
  std::string text = "\nSummary:\n";
  text += "  Count:        " + std::to_string(result.count()) + "\n";
  text += "  Total:        " + HumanDuration(result.total) + "\n";
  text += "  Slowest:      " + time(static_cast<double>(latencies.max())) + "\n";
  text += "  Fastest:      " + time(static_cast<double>(latencies.min())) + "\n";
  text += "  Average:      " + time(latencies.mean()) + "\n";
  text += "  Requests/sec: " + Significant(result.count() / seconds, 5) + "\n";
  text += "\nResponse time histogram:\n";
  const Histogram::Bars bars = latencies.EqualBars(10);
  int64_t most = 1;
  for (const int64_t count : bars.counts) most = std::max(most, count);
  for (size_t i = 0; i < bars.marks.size(); ++i) {
    char line[64];
    std::snprintf(line, sizeof(line), "  %8.3f ms [%lld]", static_cast<double>(bars.marks[i]) / 1e6,
                  static_cast<long long>(bars.counts[i]));
    std::string bar;
    for (int64_t k = 0; k < std::llround(40.0 * bars.counts[i] / most); ++k) bar += "∎";
    std::string row = line;
    row.append(row.size() < 26 ? 26 - row.size() : 1, ' ');
    text.append(row).append("|").append(bar).append("\n");
  }
  text += "\nLatency distribution:\n";
  for (const double percentage : kPercentages) {
    if (latencies.count() == 0) break;
    text += "  " + Significant(percentage, percentage == 99.9 ? 3 : 2) + " % in " +
            time(static_cast<double>(latencies.Quantile(percentage / 100))) + "\n";
  }
  text += "\nStatus code distribution:\n";
  for (const auto& [code, count] : result.status_codes) {
    text += "  [" + code + "]   " + std::to_string(count) + " responses\n";
  }
  if (!result.errors.empty()) text += "\nError distribution:\n";
  for (const auto& [error, count] : result.errors) {
    text += "  [" + std::to_string(count) + "]   " + error + "\n";
  }
  return text;
}

std::string LoadJson(const LoadResult& result) {
  using Json = nlohmann::ordered_json;
  const Histogram& latencies = result.latencies_ns;
  Json distribution = Json::array(), histogram = Json::array();
  for (const double percentage : kPercentages) {
    if (latencies.count() == 0) break;
    // ghz writes whole percentages without a point.
    Json number = percentage == std::floor(percentage) ? Json(static_cast<int>(percentage))
                                                       : Json(percentage);
    distribution.push_back(
        {{"percentage", number}, {"latency", latencies.Quantile(percentage / 100)}});
  }
  const Histogram::Bars bars = latencies.EqualBars(10);
  for (size_t i = 0; i < bars.marks.size(); ++i) {
    histogram.push_back({{"mark", static_cast<double>(bars.marks[i]) / 1e9},
                         {"count", bars.counts[i]},
                         {"frequency", static_cast<double>(bars.counts[i]) / latencies.count()}});
  }
  const Json json = {{"count", result.count()},
                     {"total", absl::ToInt64Nanoseconds(result.total)},
                     {"average", std::llround(latencies.mean())},
                     {"fastest", latencies.min()},
                     {"slowest", latencies.max()},
                     {"rps", result.count() / absl::ToDoubleSeconds(result.total)},
                     {"errorDistribution", result.errors},
                     {"statusCodeDistribution", result.status_codes},
                     {"latencyDistribution", distribution},
                     {"histogram", histogram}};
  return json.dump(2) + "\n";
}

}  // namespace clusterkv::worker::ckv
