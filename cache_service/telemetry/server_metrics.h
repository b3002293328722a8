// What the server counts and how it is shown: counters and histograms of the hot path, and the
// metrics of metric_table.h.
//
// Figures that the shard keeps come from v1.Stats when somebody asks; the rest is counted here.
//
// Thread-safe. What handlers call per request takes no lock.
#ifndef CLUSTERKV_CACHE_SERVICE_TELEMETRY_SERVER_METRICS_H_
#define CLUSTERKV_CACHE_SERVICE_TELEMETRY_SERVER_METRICS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "cache_service/telemetry/bucket_histogram.h"
#include "cache_service/telemetry/metric_table.h"
#include "clusterkv/v1/admin_service.pb.h"

namespace prometheus {
struct MetricFamily;
}

namespace clusterkv::cache_service {

// Where time goes: a select waits, is worked on, of which refining (scoring tokens by codes,
// choosing the exact ones), is packed into messages, which are sent (until the transport took
// them); a chunk is put, decoded tokens are appended.
enum class Stage : int { kQueue, kSelect, kRefine, kPack, kSend, kPut, kAppend, kCount };
std::string_view StageName(Stage stage);

// Every RPC of the contract.
enum class Method : int {
  kGetServerInfo,
  kOpenSequence,
  kPutKv,
  kConnectIngest,
  kPutWindow,
  kSealSequence,
  kGetSequence,
  kListSequences,
  kForkSequence,
  kReleaseSequence,
  kAttach,
  kConnectLink,
  kConnectResident,
  kRenewResident,
  kDisconnectResident,
  kDetach,
  kSelectClusters,
  kStreamSelect,
  kRecallClusters,
  kSelectAndRecall,
  kStreamSelectAndRecall,
  kAppendKv,
  kGetIndex,
  kSession,
  kDrain,
  kGetStats,
  kVerifyLedger,
  kEvictSequence,
  kForceReleaseWorker,
  kCount
};
// "clusterkv.v1.CacheService/SelectClusters".
std::string_view MethodName(Method method);

class ServerMetrics {
 public:
  ServerMetrics() = default;
  ServerMetrics(const ServerMetrics&) = delete;
  ServerMetrics& operator=(const ServerMetrics&) = delete;

  void RecordStage(Stage stage, absl::Duration duration) {
    stages_[static_cast<int>(stage)].Record(duration);
  }
  void CallStarted(Method method) {
    started_[static_cast<int>(method)].fetch_add(1, std::memory_order_relaxed);
  }
  void CallEnded(Method method, absl::StatusCode code, absl::Duration duration);
  // Calls that started and have not ended.
  int64_t CallsInFlight(Method method) const;

  void ConnectionAccepted() { accepted_.fetch_add(1, std::memory_order_relaxed); }
  // reason: "limit" or "descriptors".
  void ConnectionRefused(std::string_view reason);
  uint64_t connections_refused() const;
  void AddStateBytes(int64_t bytes) {
    state_bytes_.fetch_add(static_cast<uint64_t>(bytes), std::memory_order_relaxed);
  }
  void CountLinkFallback(const std::string& reason) ABSL_LOCKS_EXCLUDED(mutex_);

  // Adds what is counted here to the shard's figures.
  void AddTo(v1::Stats* stats) const ABSL_LOCKS_EXCLUDED(mutex_);

  // Every metric of MetricTable(), in its order. stats: the shard's and AddTo; connections: open
  // ones.
  std::vector<prometheus::MetricFamily> Families(const v1::Stats& stats, int64_t connections) const;

 private:
  friend class MetricWriter;
  static constexpr int kMethods = static_cast<int>(Method::kCount);
  static constexpr int kCodes = 17;

  std::array<BucketHistogram, static_cast<int>(Stage::kCount)> stages_;
  std::array<std::atomic<uint64_t>, kMethods> started_{};
  std::array<std::atomic<uint64_t>, kMethods> ended_{};
  std::array<std::array<BucketHistogram, kCodes>, kMethods> calls_;
  std::atomic<uint64_t> accepted_{0}, refused_limit_{0}, refused_descriptors_{0};
  std::atomic<uint64_t> state_bytes_{0};
  mutable absl::Mutex mutex_;
  std::map<std::string, uint64_t> link_fallbacks_ ABSL_GUARDED_BY(mutex_);
};

// Serves /metrics over HTTP until it dies.
class MetricsEndpoint {
 public:
  // What a scrape needs; called on the endpoint's threads.
  struct Source {
    const ServerMetrics* metrics = nullptr;
    std::function<v1::Stats()> stats;
    std::function<int64_t()> connections;
  };
  // address: host:port, port 0: any free one. Errors: Unavailable when it cannot be bound.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Start(const std::string& address,
                                                                Source source);
  ~MetricsEndpoint();
  int port() const;

 private:
  struct Impl;
  explicit MetricsEndpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TELEMETRY_SERVER_METRICS_H_
