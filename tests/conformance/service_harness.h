// A server in this process, and clients of it over each transport: what the wire's tests start
// from.
#ifndef CLUSTERKV_TESTS_CONFORMANCE_SERVICE_HARNESS_H_
#define CLUSTERKV_TESTS_CONFORMANCE_SERVICE_HARNESS_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "cache_service/server.h"
#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "clusterkv/v1/cache_service.grpc.pb.h"
#include "clusterkv/v1/session_service.grpc.pb.h"
#include "proto/grpc_status.h"

namespace clusterkv::cache_service::testing {

// kTenant: in process, on a server with tenants, as its default tenant: nothing may differ.
enum class Transport { kInProcess, kTcp, kUnix, kTenant };
const char* TransportName(Transport transport);

// A small sequence whose every number follows from (seed, layer, token, head, channel).
struct TestSequence {
  std::string name = "sequence";
  uint32_t layers = 2, kv_heads = 2, query_heads = 4, head_dim = 32;
  uint32_t tokens = 300;
  uint32_t max_decode_tokens = 64;
  v1::ElementType element_type = v1::ELEMENT_TYPE_FLOAT32;
  uint64_t seed = 1;
  uint32_t tokens_per_cluster = 0;  // 0: the preset's
  std::string codec;                // empty: the server's choice

  v1::OpenSequenceRequest OpenRequest() const;
  // Tokens [first, first + count) of `layer`, keys or values: [count, kv_heads, head_dim].
  std::string Keys(uint32_t layer, uint32_t first, uint32_t count) const;
  std::string Values(uint32_t layer, uint32_t first, uint32_t count) const;
  v1::PutKvRequest Chunk(uint32_t layer, uint32_t first, uint32_t count) const;
  // [query_heads, head_dim], other numbers for each step.
  std::vector<float> Queries(uint32_t step) const;
  v1::Vector QueryVector(uint32_t step) const;
  int64_t row_bytes() const;  // of one token's K or V

 private:
  std::string Rows(uint64_t salt, uint32_t layer, uint32_t first, uint32_t count) const;
};

class ServiceHarness {
 public:
  // `change` (may be null) edits the configuration: 64 MiB arena, ports of 127.0.0.1.
  explicit ServiceHarness(Transport transport = Transport::kInProcess,
                          const std::function<void(Config*)>& change = nullptr);
  ~ServiceHarness();

  // A new server process, as it were: another boot id, and nothing of what was.
  void Restart();

  Server& server() { return *server_; }
  v1::CacheService::Stub& cache() { return *cache_; }
  v1::SessionService::Stub& session() { return *session_; }
  v1::AdminService::Stub& admin() { return *admin_; }
  std::shared_ptr<grpc::Channel> channel() { return channel_; }
  std::shared_ptr<grpc::Channel> admin_channel() { return admin_channel_; }

  // Every call converts errors and has a deadline of 30 s.
  absl::StatusOr<v1::Sequence> Open(const v1::OpenSequenceRequest& request);
  absl::StatusOr<v1::PutKvResponse> Put(const std::vector<v1::PutKvRequest>& messages);
  absl::StatusOr<v1::Sequence> Seal(const v1::SequenceHandle& sequence);
  absl::StatusOr<v1::SelectClustersResponse> Select(const v1::SelectClustersRequest& request);
  absl::StatusOr<v1::AttachResponse> Attach(const v1::AttachRequest& request);
  absl::StatusOr<v1::AppendKvResponse> Append(const v1::AppendKvRequest& request);
  absl::StatusOr<std::vector<v1::RecordChunk>> Recall(const v1::RecallClustersRequest& request);
  absl::StatusOr<std::vector<v1::SelectAndRecallResponse>> SelectAndRecall(
      const v1::SelectAndRecallRequest& request);
  absl::StatusOr<std::vector<v1::IndexChunk>> Index(const v1::GetIndexRequest& request);
  absl::Status Release(const v1::SequenceHandle& sequence);
  // Opens, puts every layer in chunks of 100 tokens, seals. Fails the test when it cannot.
  v1::Sequence MakeReady(const TestSequence& sequence);

  // The ledger balances and every page's checksum is right; otherwise what is wrong.
  std::string LedgerProblems();

 private:
  void Connect();

  const Transport transport_;
  std::string unix_path_;
  Config config_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_, admin_channel_;
  std::unique_ptr<v1::CacheService::Stub> cache_;
  std::unique_ptr<v1::SessionService::Stub> session_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

// A context that ends after `timeout`.
std::unique_ptr<grpc::ClientContext> MakeContext(absl::Duration timeout = absl::Seconds(30));

}  // namespace clusterkv::cache_service::testing

#endif  // CLUSTERKV_TESTS_CONFORMANCE_SERVICE_HARNESS_H_
