// clusterkv-server: see --help.
#include <malloc.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cache_service/config.h"
#include "cache_service/rpc/network_threads.h"
#include "cache_service/server.h"
#include "cache_service/telemetry/log.h"
#include "cache_service/telemetry/metric_table.h"

namespace clusterkv::cache_service {
namespace {

constexpr int kConfigWrong = 2, kCouldNotStart = 1;

// Blocked in every thread, taken by WaitForStop: handlers run nothing.
sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// Receive buffers of a megabyte come and go with every chunk: kept by malloc, not mapped and
// faulted in anew each time. What it keeps is bounded by kKeptBytes per malloc arena.
void KeepBuffers() {
#ifdef __GLIBC__
  constexpr int kKeptBytes = 16 << 20, kMallocArenas = 4;
  mallopt(M_MMAP_THRESHOLD, kKeptBytes);
  mallopt(M_TRIM_THRESHOLD, kKeptBytes);
  mallopt(M_ARENA_MAX, kMallocArenas);
#endif
}

std::string WaitForStop(const sigset_t& signals) {
  int received = 0;
  while (sigwait(&signals, &received) != 0) {
  }
  return received == SIGTERM ? "SIGTERM" : "SIGINT";
}

int Serve(const Config& config) {
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  const std::unique_ptr<NetworkThreadLimit> limit =
      NetworkThreadLimit::Create(config.network_threads);
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(config);
  if (!server.ok()) {
    Log(LogLevel::kError, "could not start", {{"error", std::string(server.status().message())}});
    return kCouldNotStart;
  }
  // For people and scripts that asked for port 0; the log has the same.
  std::printf("listening on %s, admin on %s\n", (*server)->address().c_str(),
              (*server)->admin_address().c_str());
  std::fflush(stdout);
  Log(LogLevel::kInfo, "serving",
      {{"listen", (*server)->address()},
       {"admin_listen", (*server)->admin_address()},
       {"metrics_port", (*server)->metrics_port()},
       {"arena_bytes", config.shard.arena_bytes},
       {"boot_id", (*server)->shard().boot_id()}});
  const std::string received = WaitForStop(signals);
  Log(LogLevel::kInfo, "draining", {{"signal", received}});
  const bool idle = (*server)->Drain();
  if (!idle) Log(LogLevel::kWarning, "drain_timeout passed with work in flight");
  (*server)->Shutdown();
  Log(LogLevel::kInfo, "stopped", {{"drained", idle}});
  return 0;
}

int Main(const std::vector<std::string>& arguments) {
  const auto refuse = [](const absl::Status& status) {
    std::fprintf(stderr, "clusterkv-server: %s\n", std::string(status.message()).c_str());
    return kConfigWrong;
  };
  absl::StatusOr<CommandLine> line = ParseCommandLine(arguments);
  if (!line.ok()) return refuse(line.status());
  if (line->help) {
    std::fputs(ConfigHelp().c_str(), stdout);
    return 0;
  }
  if (line->version) {
    std::fputs(VersionText().c_str(), stdout);
    return 0;
  }
  if (line->print_metrics) {
    std::fputs(MetricTableJson().c_str(), stdout);
    return 0;
  }
  absl::StatusOr<Config> config = ResolveConfig(line->message, line->places);
  if (!config.ok()) return refuse(config.status());
  if (line->check_config) {
    std::puts("the configuration is good");
    return 0;
  }
  ConfigureLog(config->log_level, config->log_format);
  return Serve(*config);
}

}  // namespace
}  // namespace clusterkv::cache_service

int main(int argc, char** argv) {
  clusterkv::cache_service::KeepBuffers();
  // A kernel that is loaded when it is first called waits for all that run: for resident ones long.
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  return clusterkv::cache_service::Main(std::vector<std::string>(argv + 1, argv + argc));
}
