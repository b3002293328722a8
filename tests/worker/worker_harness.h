// A real server in this process, KV to put into it, and a connection that can be cut at any byte.
#ifndef CLUSTERKV_TESTS_WORKER_WORKER_HARNESS_H_
#define CLUSTERKV_TESTS_WORKER_WORKER_HARNESS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "cache_service/server.h"
#include "cache_service/shard_device.h"
#include "worker/client.h"
#include "worker/prefill_writer.h"
#include "worker/trace.h"

namespace clusterkv::worker {

// A server on ports of its own. Dies with a failure of the test if its ledger does not balance.
class Service {
 public:
  // port 0: any free one. device: null: none.
  explicit Service(int port = 0, const std::function<void(v1::ServerConfig&)>& change = nullptr,
                   std::unique_ptr<cache_service::ShardDevice> device = nullptr);
  ~Service();

  cache_service::Server& server() { return *server_; }
  std::string target() const { return server_->address(); }
  std::unique_ptr<Client> Connect(const ClientOptions& options = {}) const;

 private:
  std::unique_ptr<cache_service::Server> server_;
};

// Tokens that form clusters, queries that look for some of them. The same arguments, the same
// bytes.
TraceLayer MakeLayer(const kernels::KvShape& shape, int64_t tokens, int64_t queries, uint64_t seed);

// Rows [begin, end) of layer's keys or values.
absl::Span<const std::byte> Rows(const TraceLayer& layer, const std::vector<std::byte>& of,
                                 int64_t begin, int64_t end);
// Query i of the layer: [query_heads, head_dim].
absl::Span<const std::byte> Query(const TraceLayer& layer, int64_t i);

// An open request for these layers' prompts (tokens without the queries').
v1::OpenSequenceRequest OpenRequest(const std::string& name, const std::vector<TraceLayer>& layers);
// Opens, puts everything, seals.
absl::StatusOr<v1::Sequence> Prefill(Client* client, const v1::OpenSequenceRequest& request,
                                     const std::vector<TraceLayer>& layers,
                                     const PrefillWriterOptions& options = {});
absl::Status PutAll(PrefillWriter* writer, const std::vector<TraceLayer>& layers);

// Forwards connections to a server, and cuts them.
class CuttingProxy {
 public:
  explicit CuttingProxy(const std::string& target);  // "127.0.0.1:port"; may be away at times
  ~CuttingProxy();

  std::string address() const;
  // Cuts all connections once so many more bytes have passed, both ways counted; < 0: never. `then`
  // (may be null) runs between the last byte and the cut. New connections are accepted at once, and
  // those that come while `then` runs stay. gRPC sends bytes of its own: which call is hit by a cut
  // after few bytes is not known.
  void CutAfter(int64_t bytes, std::function<void()> then = nullptr);
  int64_t cuts() const { return cuts_; }
  // Cuts all connections and refuses new ones; from Restore on they are accepted again.
  void CutOff();
  void Restore();

 private:
  void Accept();
  void Pump(int from, int to);
  // The first `count` sockets.
  void Cut(size_t count);

  int listener_ = -1, port_ = 0, target_port_ = 0;
  std::atomic<int64_t> until_cut_{-1}, cuts_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::function<void()> then_;
  bool cut_off_ = false;
  std::vector<int> sockets_;
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_TESTS_WORKER_WORKER_HARNESS_H_
