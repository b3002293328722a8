// How many threads of this process wait for the network in the callback API.
//
// gRPC up to 1.5x starts one for every two CPUs, at least two, and offers no choice. Each event is
// handled by the thread that got it, which first wakes another one to wait for the next: a wake-up
// and, where CPUs are few, a thread that is in the way. Threads too many are parked: each is lent
// to an in-process call whose handler does not return until the limit is lifted. Later versions
// have a pool that grows and shrinks by itself; there this does nothing.
#ifndef CLUSTERKV_CACHE_SERVICE_RPC_NETWORK_THREADS_H_
#define CLUSTERKV_CACHE_SERVICE_RPC_NETWORK_THREADS_H_

#include <memory>

namespace clusterkv::cache_service {

class NetworkThreadLimit {
 public:
  // Leaves `threads` of them, or as many as there are; 0: all. Process-wide, so for programs alone,
  // and one at a time.
  static std::unique_ptr<NetworkThreadLimit> Create(int threads);
  ~NetworkThreadLimit();

  int parked() const;

 private:
  struct Impl;
  explicit NetworkThreadLimit(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RPC_NETWORK_THREADS_H_
