// Child processes of a test: started, read line by line, killed. They die with their parent.
#ifndef CLUSTERKV_TESTS_INTEGRATION_PROCESS_H_
#define CLUSTERKV_TESTS_INTEGRATION_PROCESS_H_

#include <string>
#include <vector>

namespace clusterkv::integration {

// Move-only; the destructor kills and reaps. Not thread-safe but for Kill.
class Process {
 public:
  // argv[0] is the program's path.
  static Process Start(const std::vector<std::string>& argv);
  Process() = default;
  Process(Process&& other) noexcept;
  Process& operator=(Process&& other) noexcept;
  ~Process();

  int pid() const { return pid_; }
  void Kill(int signal) const;
  // The next line of its output; false at the end of it.
  bool ReadLine(std::string* line);
  // Waits for its end: waitpid's status.
  int Wait();

 private:
  int pid_ = -1;
  int output_ = -1;
  std::string buffer_;
};

}  // namespace clusterkv::integration

#endif  // CLUSTERKV_TESTS_INTEGRATION_PROCESS_H_
