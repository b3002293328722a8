#include "tests/worker/ckv/processes.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string_view>
#include <thread>

namespace clusterkv::worker::ckv {
namespace {

constexpr std::string_view kListeningOn = "listening on ", kAdminOn = ", admin on ";

// Forks and runs; the child's standard output and error go to the files.
pid_t Spawn(const std::vector<std::string>& command, const std::vector<std::string>& environment,
            const std::string& out, const std::string& err) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  const pid_t pid = fork();
  if (pid != 0) return pid;
  for (const std::string& entry : environment) putenv(const_cast<char*>(entry.c_str()));
  const int nothing = open("/dev/null", O_RDONLY);
  dup2(nothing, 0);
  dup2(open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), 1);
  dup2(open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), 2);
  execv(arguments[0], arguments.data());
  std::cerr << "cannot run " << command[0] << ": " << std::strerror(errno) << std::endl;
  _exit(127);
}

int WaitFor(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "ckv-test-XXXXXX").string();
  path_ = mkdtemp(name.data());
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

ProgramResult RunProgram(const std::vector<std::string>& command,
                         const std::vector<std::string>& environment) {
  const TemporaryFolder folder;
  const pid_t pid = Spawn(command, environment, folder.Path("out"), folder.Path("err"));
  ProgramResult result;
  result.exit_code = WaitFor(pid);
  result.out = ReadFile(folder.Path("out"));
  result.err = ReadFile(folder.Path("err"));
  return result;
}

std::unique_ptr<ServerProcess> ServerProcess::Start(const std::string& program,
                                                    const std::vector<std::string>& flags) {
  const TemporaryFolder folder;
  auto server = std::unique_ptr<ServerProcess>(new ServerProcess());
  std::vector<std::string> command = {program, "--listen=127.0.0.1:0", "--admin_listen=127.0.0.1:0",
                                      "--metrics_listen="};
  command.insert(command.end(), flags.begin(), flags.end());
  server->pid_ = Spawn(command, {}, folder.Path("out"), folder.Path("err"));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (std::chrono::steady_clock::now() < deadline) {
    // Its first line: "listening on A, admin on B".
    const std::string out = ReadFile(folder.Path("out"));
    const size_t comma = out.find(kAdminOn), end = out.find('\n');
    if (out.starts_with(kListeningOn) && comma < end && end != std::string::npos) {
      server->target_ = out.substr(kListeningOn.size(), comma - kListeningOn.size());
      server->admin_ = out.substr(comma + kAdminOn.size(), end - comma - kAdminOn.size());
      return server;
    }
    if (waitpid(server->pid_, nullptr, WNOHANG) == server->pid_) {
      server->pid_ = -1;
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  std::cerr << "the server did not start:\n"
            << ReadFile(folder.Path("out")) << ReadFile(folder.Path("err"));
  return nullptr;
}

ServerProcess::~ServerProcess() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  WaitFor(pid_);
}

int ServerProcess::Terminate() {
  kill(pid_, SIGTERM);
  const int exit_code = WaitFor(pid_);
  pid_ = -1;
  return exit_code;
}

}  // namespace clusterkv::worker::ckv
