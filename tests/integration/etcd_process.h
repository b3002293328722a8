// An etcd of a test's own: a real one, on free ports of the loopback, with a folder of its own.
#ifndef CLUSTERKV_TESTS_INTEGRATION_ETCD_PROCESS_H_
#define CLUSTERKV_TESTS_INTEGRATION_ETCD_PROCESS_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "etcd/rpc.grpc.pb.h"
#include "proto/client_credentials.h"
#include "tests/integration/process.h"

namespace clusterkv::integration {

// How long a test waits for what must come: a machine may be busy.
constexpr absl::Duration kLongEnough = absl::Minutes(2);
// Looks until `wanted` holds. Returns whether it did within kLongEnough.
bool Eventually(const std::function<bool()>& wanted);

// Skips the test loudly where there is no etcd. $CKV_ETCD or `etcd` of PATH.
#define CKV_SKIP_WITHOUT_ETCD()                                                                  \
  if (::clusterkv::integration::EtcdProcess::Program().empty())                                  \
  GTEST_SKIP() << "SKIPPED: no etcd here (Debian's etcd-server, or CKV_ETCD=PROGRAM); what the " \
                  "servers do with one was not tested"

// Not thread-safe. Dies with the test.
class EtcdProcess {
 public:
  // Its path; empty: there is none.
  static std::string Program();

  // tls: of certificate, key and who signs clients, all of them; without, plain text.
  struct ServerTls {
    std::string certificate_file, key_file, client_ca_file;
  };
  explicit EtcdProcess(std::optional<ServerTls> tls = std::nullopt, ClientTls client = {});
  ~EtcdProcess();
  EtcdProcess(const EtcdProcess&) = delete;
  EtcdProcess& operator=(const EtcdProcess&) = delete;

  const std::string& endpoint() const { return endpoint_; }  // host:port, the same for its life
  // SIGKILL; what was written stays.
  void Stop();
  // On `endpoint` again, or hidden: on another one, which only this object's calls know.
  void Start(bool hidden = false);
  // No answer and no end, until Continue.
  void Freeze() const;
  void Continue() const;

  // Of this moment.
  std::unique_ptr<etcdserverpb::KV::Stub> Kv() const;
  void Put(const std::string& key, const std::string& value, int64_t lease = 0) const;
  void Delete(const std::string& key) const;
  // Null: there is none.
  std::unique_ptr<mvccpb::KeyValue> Get(const std::string& key) const;
  // A lease that nobody keeps alive.
  int64_t Grant(absl::Duration ttl) const;
  void Revoke(int64_t lease) const;
  // All history before now is gone.
  void Compact() const;

 private:
  bool AwaitReady() const;

  const std::optional<ServerTls> tls_;
  const ClientTls client_tls_;
  const std::filesystem::path folder_;
  std::string endpoint_, current_endpoint_;
  std::shared_ptr<grpc::Channel> channel_;
  Process process_;
};

}  // namespace clusterkv::integration

#endif  // CLUSTERKV_TESTS_INTEGRATION_ETCD_PROCESS_H_
