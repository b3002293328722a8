// Real programs in tests: a clusterkv-server of one's own, and commands with what they print.
#ifndef CLUSTERKV_TESTS_WORKER_CKV_PROCESSES_H_
#define CLUSTERKV_TESTS_WORKER_CKV_PROCESSES_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

namespace clusterkv::worker::ckv {

struct ProgramResult {
  int exit_code = -1;  // 128 + signal when killed by one
  std::string out, err;
};

// Runs a program to its end. environment: "NAME=value" entries that are added.
ProgramResult RunProgram(const std::vector<std::string>& command,
                         const std::vector<std::string>& environment = {});

// A server process with ports of its own; killed when it goes out of scope.
class ServerProcess {
 public:
  // Starts `program` with flags added, waits until it listens. Null, with the server's output on
  // standard error, when it does not within 60 s.
  static std::unique_ptr<ServerProcess> Start(const std::string& program,
                                              const std::vector<std::string>& flags);
  ~ServerProcess();

  const std::string& target() const { return target_; }
  const std::string& admin() const { return admin_; }
  pid_t pid() const { return pid_; }
  // Sends SIGTERM and waits; the exit code.
  int Terminate();

 private:
  pid_t pid_ = -1;
  std::string target_, admin_;
};

// A folder that is removed, with all in it, when it goes out of scope.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  std::string Path(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

std::string ReadFile(const std::string& path);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_TESTS_WORKER_CKV_PROCESSES_H_
