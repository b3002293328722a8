#include "cache_service/rpc/acceptor.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/time/clock.h"
#include "cache_service/telemetry/log.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

constexpr int kBacklog = 1024;

absl::Status Failed(const std::string& address, const char* what) {
  return absl::UnavailableError("cannot listen on " + address + ": " + what + ": " +
                                std::strerror(errno));
}

absl::StatusOr<FileDescriptor> ListenUnix(const std::string& address) {
  const std::string path = address.substr(5);
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.size() >= sizeof(name.sun_path)) {
    errno = ENAMETOOLONG;
    return Failed(address, "path");
  }
  std::memcpy(name.sun_path, path.c_str(), path.size() + 1);
  FileDescriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Failed(address, "socket");
  unlink(path.c_str());  // of a process that was killed
  if (bind(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof(name)) != 0) {
    return Failed(address, "bind");
  }
  if (listen(fd.get(), kBacklog) != 0) return Failed(address, "listen");
  return fd;
}

absl::StatusOr<FileDescriptor> ListenTcp(const std::string& address, std::string host,
                                         const std::string& port) {
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  if (host == "localhost") host = "127.0.0.1";  // by RFC 6761, hosts file or not
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
    return absl::UnavailableError("cannot listen on " + address + ": " + gai_strerror(error));
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  FileDescriptor fd(socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Failed(address, "socket");
  const int on = 1;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (bind(fd.get(), found->ai_addr, found->ai_addrlen) != 0) return Failed(address, "bind");
  if (listen(fd.get(), kBacklog) != 0) return Failed(address, "listen");
  return fd;
}

int BoundPort(int fd) {
  sockaddr_storage name = {};
  socklen_t size = sizeof(name);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size) != 0) return 0;
  if (name.ss_family == AF_INET) return ntohs(reinterpret_cast<sockaddr_in*>(&name)->sin_port);
  if (name.ss_family == AF_INET6) return ntohs(reinterpret_cast<sockaddr_in6*>(&name)->sin6_port);
  return 0;
}

}  // namespace

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    Reset();
    fd_ = other.Release();
  }
  return *this;
}

int FileDescriptor::Release() { return std::exchange(fd_, -1); }

void FileDescriptor::Reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

absl::StatusOr<ListenSocket> ListenSocket::Create(const std::string& address) {
  ListenSocket socket;
  if (address.compare(0, 5, "unix:") == 0) {
    CKV_ASSIGN_OR_RETURN(socket.fd_, ListenUnix(address));
    socket.address_ = address;
    return socket;
  }
  const size_t colon = address.rfind(':');
  const std::string host = address.substr(0, colon);
  CKV_ASSIGN_OR_RETURN(socket.fd_, ListenTcp(address, host, address.substr(colon + 1)));
  socket.port_ = BoundPort(socket.fd_.get());
  socket.address_ = host + ":" + std::to_string(socket.port_);
  return socket;
}

void RaiseOpenFileLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

Acceptor::Acceptor(std::vector<Listener> listeners, int64_t max_connections, ServerMetrics* metrics)
    : listeners_(std::move(listeners)),
      max_connections_(max_connections),
      metrics_(metrics),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      reserve_(open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

absl::StatusOr<std::unique_ptr<Acceptor>> Acceptor::Start(std::vector<Listener> listeners,
                                                          int64_t max_connections,
                                                          ServerMetrics* metrics) {
  std::unique_ptr<Acceptor> acceptor(new Acceptor(std::move(listeners), max_connections, metrics));
  if (!acceptor->wake_.valid()) return absl::UnavailableError("eventfd: no descriptor left");
  acceptor->thread_ = std::thread([raw = acceptor.get()] { raw->Loop(); });
  return acceptor;
}

Acceptor::~Acceptor() { Stop(); }

void Acceptor::Stop() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  thread_.join();
  listeners_.clear();
}

void Acceptor::Loop() {
  std::vector<pollfd> polled;
  for (const Listener& listener : listeners_) polled.push_back({listener.socket.fd(), POLLIN, 0});
  polled.push_back({wake_.get(), POLLIN, 0});
  while (true) {
    if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR) return;
    if (polled.back().revents != 0) return;
    for (size_t i = 0; i < listeners_.size(); ++i) {
      if (polled[i].revents == 0) continue;
      while (AcceptOne(listeners_[i])) {
      }
    }
  }
}

bool Acceptor::AcceptOne(Listener& listener) {
  const int fd = accept4(listener.socket.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) {
    if (errno == EINTR || errno == ECONNABORTED) return true;
    if (errno == EMFILE || errno == ENFILE) RefuseForWantOfDescriptors(listener);
    return false;
  }
  FileDescriptor connection(fd);
  if (!Admit(fd)) {
    metrics_->ConnectionRefused("limit");
    return true;
  }
  metrics_->ConnectionAccepted();
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // no-op on a Unix socket
  Handler::NewConnectionParameters parameters;
  parameters.listener_fd = listener.socket.fd();
  parameters.fd = connection.Release();
  listener.handler->HandleNewConnection(&parameters);
  return true;
}

void Acceptor::RefuseForWantOfDescriptors(Listener& listener) {
  // The connection would stay in the backlog and poll would say so for ever: take it with the
  // reserved descriptor and close it, so that its client learns of it.
  reserve_.Reset();
  FileDescriptor refused(accept4(listener.socket.fd(), nullptr, nullptr, SOCK_CLOEXEC));
  const bool took_one = refused.valid();
  refused.Reset();
  reserve_ = FileDescriptor(open("/dev/null", O_RDONLY | O_CLOEXEC));
  metrics_->ConnectionRefused("descriptors");
  if (!took_one || !reserve_.valid()) absl::SleepFor(absl::Milliseconds(10));
}

bool Acceptor::Admit(int fd) {
  struct stat status = {};
  if (fstat(fd, &status) != 0) return false;
  absl::MutexLock lock(&mutex_);
  if (static_cast<int64_t>(connections_.size()) >= max_connections_) ForgetClosed();
  if (static_cast<int64_t>(connections_.size()) >= max_connections_) return false;
  connections_.push_back({fd, status.st_dev, status.st_ino});
  return true;
}

void Acceptor::ForgetClosed() {
  std::erase_if(connections_, [](const Connection& connection) {
    struct stat status = {};
    return fstat(connection.fd, &status) != 0 || status.st_dev != connection.device ||
           status.st_ino != connection.inode;
  });
}

int64_t Acceptor::connections() {
  absl::MutexLock lock(&mutex_);
  ForgetClosed();
  return static_cast<int64_t>(connections_.size());
}

}  // namespace clusterkv::cache_service
