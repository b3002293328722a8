#include "tests/integration/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "kernels/base/check.h"

namespace clusterkv::integration {

Process Process::Start(const std::vector<std::string>& argv) {
  std::vector<char*> arguments;
  for (const std::string& argument : argv) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);
  int ends[2];
  CKV_CHECK(pipe2(ends, O_CLOEXEC) == 0);
  const int parent = getpid();
  const int pid = fork();
  CKV_CHECK(pid >= 0);
  if (pid == 0) {
    // Only async-signal-safe calls: the parent has threads.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(126);
    dup2(ends[1], STDOUT_FILENO);
    execv(arguments[0], arguments.data());
    _exit(127);
  }
  close(ends[1]);
  Process process;
  process.pid_ = pid;
  process.output_ = ends[0];
  return process;
}

Process::Process(Process&& other) noexcept { *this = std::move(other); }

Process& Process::operator=(Process&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(output_, other.output_);
  std::swap(buffer_, other.buffer_);
  return *this;
}

Process::~Process() {
  if (pid_ > 0) {
    Kill(SIGKILL);
    Wait();
  }
  if (output_ >= 0) close(output_);
}

void Process::Kill(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

bool Process::ReadLine(std::string* line) {
  while (true) {
    const size_t end = buffer_.find('\n');
    if (end != std::string::npos) {
      *line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return true;
    }
    char bytes[4096];
    const ssize_t got = read(output_, bytes, sizeof(bytes));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    buffer_.append(bytes, static_cast<size_t>(got));
  }
}

int Process::Wait() {
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
  return status;
}

}  // namespace clusterkv::integration
