// What every benchmark here shares: ours and a peer in alternating rounds of the same run, medians
// and their spread, one printed table, and the same as JSON.
//
//   bench::Report report("kmeans", argc, argv);
//   const bench::Comparison c = report.Compare([&] { Ours(); }, [&] { Peer(); });
//   report.AddRate("assign n=8192", "GFLOP/s", gflop_per_call, "OpenBLAS sgemm", c, ">= 0.8");
//   return report.Finish();
//
// Flags: --json=FILE writes the JSON; --rounds=N (default 5, at least 3); --seconds=S of each side
// in each round (default 0.2). A missed target is printed, not an error: a benchmark is no test.
#ifndef CLUSTERKV_TESTS_BENCH_BENCH_H_
#define CLUSTERKV_TESTS_BENCH_BENCH_H_

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"

namespace clusterkv::bench {

inline double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The q-quantile (0 to 1) of `values`, interpolated between neighbours; 0.5 is the median. 0 of
// none.
inline double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const size_t low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (values[high] - values[low]) * (at - static_cast<double>(low));
}

// Of alternating rounds. `speedup` is the peer's time over ours, taken round by round.
struct Comparison {
  double ours_seconds = 0;  // per call, median over rounds
  double peer_seconds = 0;
  double speedup = 0;  // median
  double speedup_low = 0, speedup_high = 0;
};

// One row of the table. `ratio` is value over peer_value, and `target` what it shall be: ">= 0.8",
// "<= 3", or empty. A row without a peer leaves `peer` empty.
struct Row {
  std::string name;
  double value = 0;
  std::string unit;
  std::string peer;
  double peer_value = 0;
  double ratio = 0;
  double ratio_low = 0, ratio_high = 0;  // over the rounds
  std::string target;
};

inline std::string Machine() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string model = "unknown CPU";
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos) {
      model = line.substr(line.find(": ") + 2);
      break;
    }
  }
  return model + ", " + std::to_string(std::thread::hardware_concurrency()) + " CPUs";
}

// Whether `ratio` is what `target` (">= X", "<= X" or empty) says.
inline bool Meets(double ratio, const std::string& target) {
  if (target.size() < 3) return true;
  const double bound = std::strtod(target.c_str() + 2, nullptr);
  return target[0] == '>' ? ratio >= bound : ratio <= bound;
}

class Report {
 public:
  Report(std::string title, int argc, char** argv) : title_(std::move(title)) {
    for (int i = 1; i < argc; ++i) {
      const std::string_view arg = argv[i];
      const std::string value(arg.substr(std::min(arg.size(), arg.find('=') + 1)));
      if (arg.rfind("--json=", 0) == 0) {
        json_path_ = value;
      } else if (arg.rfind("--rounds=", 0) == 0) {
        rounds_ = std::max(3, std::atoi(value.c_str()));
      } else if (arg.rfind("--seconds=", 0) == 0) {
        seconds_ = std::atof(value.c_str());
      } else {
        std::fprintf(stderr, "usage: %s [--json=FILE] [--rounds=N] [--seconds=S]\n", argv[0]);
        std::exit(2);
      }
    }
  }

  int rounds() const { return rounds_; }
  double seconds() const { return seconds_; }

  // Seconds per call of `f`, called until seconds() have passed and at least once.
  double TimePerCall(absl::FunctionRef<void()> f) const {
    const double start = Now();
    int64_t calls = 0;
    double elapsed = 0;
    do {
      f();
      ++calls;
      elapsed = Now() - start;
    } while (elapsed < seconds_);
    return elapsed / static_cast<double>(calls);
  }

  // Both once to warm up, then in alternating rounds, taking turns in going first.
  Comparison Compare(absl::FunctionRef<void()> ours, absl::FunctionRef<void()> peer) const {
    ours();
    peer();
    std::vector<double> ours_seconds, peer_seconds, speedups;
    for (int round = 0; round < rounds_; ++round) {
      double a = 0, b = 0;
      if (round % 2 == 0) a = TimePerCall(ours);
      b = TimePerCall(peer);
      if (round % 2 != 0) a = TimePerCall(ours);
      ours_seconds.push_back(a);
      peer_seconds.push_back(b);
      speedups.push_back(b / a);
    }
    return {Quantile(ours_seconds, 0.5), Quantile(peer_seconds, 0.5), Quantile(speedups, 0.5),
            Quantile(speedups, 0), Quantile(speedups, 1)};
  }

  // `work` per call in `unit` times seconds (say GFLOP for "GFLOP/s"): more is better.
  void AddRate(std::string name, std::string unit, double work, std::string peer,
               const Comparison& c, std::string target) {
    Add({std::move(name), work / c.ours_seconds, std::move(unit), std::move(peer),
         work / c.peer_seconds, c.speedup, c.speedup_low, c.speedup_high, std::move(target)});
  }

  // Times per call; `per_second` is the unit's share of a second (1e6 for "us"): less is better.
  void AddTime(std::string name, std::string unit, double per_second, std::string peer,
               const Comparison& c, std::string target) {
    Add({std::move(name), c.ours_seconds * per_second, std::move(unit), std::move(peer),
         c.peer_seconds * per_second, 1 / c.speedup, 1 / c.speedup_high, 1 / c.speedup_low,
         std::move(target)});
  }

  void Add(Row row) {
    std::fprintf(stderr, "%s: %s done\n", title_.c_str(), row.name.c_str());
    rows_.push_back(std::move(row));
  }

  // Prints the table, writes the JSON when asked, and returns main's exit status.
  int Finish() const {
    std::printf("%s: %s, %s, %d alternating rounds\n", title_.c_str(), Machine().c_str(),
                Date().c_str(), rounds_);
    std::printf("%-44s %12s %-10s %12s %-22s %7s %-15s %-8s\n", "", "ours", "", "peer", "", "ratio",
                "(low, high)", "target");
    for (const Row& row : rows_) {
      std::printf("%-44s %12.4g %-10s", row.name.c_str(), row.value, row.unit.c_str());
      if (!row.peer.empty()) {
        std::printf(" %12.4g %-22s %7.3f (%.3f, %.3f)  %-8s %s", row.peer_value, row.peer.c_str(),
                    row.ratio, row.ratio_low, row.ratio_high, row.target.c_str(),
                    row.target.empty()             ? ""
                    : Meets(row.ratio, row.target) ? "met"
                                                   : "MISSED");
      }
      std::printf("\n");
    }
    return WriteJson();
  }

 private:
  static std::string Date() {
    char text[32];
    const std::time_t now = std::time(nullptr);
    std::tm utc;
    gmtime_r(&now, &utc);
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return text;
  }

  int WriteJson() const {
    if (json_path_.empty()) return 0;
    nlohmann::ordered_json rows = nlohmann::ordered_json::array();
    for (const Row& row : rows_) {
      rows.push_back({{"name", row.name},
                      {"value", row.value},
                      {"unit", row.unit},
                      {"peer", row.peer},
                      {"peer_value", row.peer_value},
                      {"ratio", row.ratio},
                      {"ratio_low", row.ratio_low},
                      {"ratio_high", row.ratio_high},
                      {"target", row.target}});
    }
    std::ofstream file(json_path_);
    const nlohmann::ordered_json report = {
        {"machine", Machine()}, {"date", Date()}, {"rows", rows}};
    file << report.dump(1) << "\n";
    file.close();
    if (!file) std::fprintf(stderr, "cannot write %s\n", json_path_.c_str());
    return file ? 0 : 1;
  }

  std::string title_;
  std::string json_path_;
  int rounds_ = 5;
  double seconds_ = 0.2;
  std::vector<Row> rows_;
};

}  // namespace clusterkv::bench

#endif  // CLUSTERKV_TESTS_BENCH_BENCH_H_
