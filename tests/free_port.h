// Ports for servers that tests start as processes of their own.
#ifndef CLUSTERKV_TESTS_FREE_PORT_H_
#define CLUSTERKV_TESTS_FREE_PORT_H_

#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdio>
#include <cstdlib>

namespace clusterkv {

// A TCP port of 127.0.0.1 that nobody else gets while this process lives, but for a server that
// listens on it (with SO_REUSEADDR, as servers do): a socket stays bound to it and never listens.
// So a server may be started there, killed and started again. Ends the process when there is none.
inline int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* const name = reinterpret_cast<sockaddr*>(&address);
  if (bind(fd, name, length) != 0 || getsockname(fd, name, &length) != 0) {
    std::perror("no free port on 127.0.0.1");
    std::abort();
  }
  return ntohs(address.sin_port);
}

}  // namespace clusterkv

#endif  // CLUSTERKV_TESTS_FREE_PORT_H_
