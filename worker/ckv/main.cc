// ckv: the client tool of the ClusterKV cache service.
#include <csignal>

#include "worker/ckv/command.h"

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // `ckv … | head` ends by a failed write, not by a signal
  return clusterkv::worker::ckv::RunCkv(std::vector<std::string>(argv + 1, argv + argc));
}
