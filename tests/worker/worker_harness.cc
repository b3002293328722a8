#include "tests/worker/worker_harness.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cache_service/config.h"
#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::worker {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

}  // namespace

Service::Service(int port, const std::function<void(v1::ServerConfig&)>& change,
                 std::unique_ptr<cache_service::ShardDevice> device) {
  v1::ServerConfig message;
  message.set_listen(absl::StrCat("127.0.0.1:", port));
  message.set_admin_listen("127.0.0.1:0");
  message.set_metrics_listen("");
  message.set_arena_bytes("64MiB");
  message.set_build_threads(1);
  message.set_select_threads(1);
  message.set_log_level("error");
  if (change) change(message);
  auto config = cache_service::ResolveConfig(message);
  CKV_CHECK(config.ok()) << config.status();
  config->metrics_listen.clear();
  auto server = cache_service::Server::Start(*config, std::move(device));
  CKV_CHECK(server.ok()) << server.status();
  server_ = std::move(*server);
}

Service::~Service() {
  const v1::VerifyLedgerResponse ledger = server_->shard().VerifyLedger(/*checksums=*/true);
  EXPECT_TRUE(ledger.balanced()) << ledger.ShortDebugString();
  EXPECT_TRUE(ledger.problems().empty()) << absl::StrJoin(ledger.problems(), "\n");
  server_->Shutdown();
}

std::unique_ptr<Client> Service::Connect(const ClientOptions& options) const {
  auto client = Client::Connect(target(), options);
  CKV_CHECK(client.ok()) << client.status();
  return std::move(*client);
}

TraceLayer MakeLayer(const kernels::KvShape& shape, int64_t tokens, int64_t queries,
                     uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  const int64_t kv_row = shape.kv_heads * shape.head_dim;
  const int64_t topics = std::max<int64_t>(1, tokens / 20);
  std::vector<float> topic_keys(topics * kv_row), topic_values(topics * kv_row);
  for (float& number : topic_keys) number = 1.5f * normal(random);
  for (float& number : topic_values) number = normal(random);
  std::vector<float> keys, values, q;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t topic = static_cast<int64_t>(random() % topics);
    for (int64_t j = 0; j < kv_row; ++j) {
      keys.push_back(topic_keys[topic * kv_row + j] + 0.4f * normal(random));
      values.push_back(topic_values[topic * kv_row + j] + 0.4f * normal(random));
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t topic = static_cast<int64_t>(random() % std::min<int64_t>(topics, 5 + i / 8));
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      const float* key = &topic_keys[topic * kv_row + h / shape.group() * shape.head_dim];
      for (int64_t j = 0; j < shape.head_dim; ++j) q.push_back(key[j] + 0.5f * normal(random));
    }
  }
  TraceLayer layer;
  layer.shape = shape;
  layer.tokens = tokens;
  layer.queries = queries;
  const auto store = [&](const std::vector<float>& numbers, std::vector<std::byte>& bytes) {
    bytes.resize(numbers.size() * kernels::ElementBytes(shape.element_type));
    kernels::FromFloat(numbers.data(), shape.element_type, static_cast<int64_t>(numbers.size()),
                       bytes.data());
  };
  store(keys, layer.keys);
  store(values, layer.values);
  store(q, layer.q);
  layer.query_rms.assign(kv_row, 1.0f);
  for (int64_t j = 0; j < kv_row; ++j) layer.query_rms[j] += 0.01f * static_cast<float>(j % 7);
  return layer;
}

absl::Span<const std::byte> Rows(const TraceLayer& layer, const std::vector<std::byte>& of,
                                 int64_t begin, int64_t end) {
  const int64_t row = static_cast<int64_t>(of.size()) / layer.tokens;
  return absl::MakeConstSpan(of).subspan(begin * row, (end - begin) * row);
}

absl::Span<const std::byte> Query(const TraceLayer& layer, int64_t i) {
  const int64_t row = static_cast<int64_t>(layer.q.size()) / layer.queries;
  return absl::MakeConstSpan(layer.q).subspan(i * row, row);
}

v1::OpenSequenceRequest OpenRequest(const std::string& name,
                                    const std::vector<TraceLayer>& layers) {
  v1::OpenSequenceRequest request;
  request.set_name(name);
  const kernels::KvShape& shape = layers[0].shape;
  request.mutable_shape()->set_layers(static_cast<uint32_t>(layers.size()));
  request.mutable_shape()->set_kv_heads(static_cast<uint32_t>(shape.kv_heads));
  request.mutable_shape()->set_query_heads(static_cast<uint32_t>(shape.query_heads));
  request.mutable_shape()->set_head_dim(static_cast<uint32_t>(shape.head_dim));
  request.mutable_shape()->set_element_type(static_cast<v1::ElementType>(shape.element_type));
  request.set_prompt_tokens(static_cast<uint32_t>(layers[0].tokens - layers[0].queries));
  request.set_max_decode_tokens(static_cast<uint32_t>(layers[0].queries));
  return request;
}

absl::Status PutAll(PrefillWriter* writer, const std::vector<TraceLayer>& layers) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const TraceLayer& layer = layers[l];
    const int64_t prompt = layer.tokens - layer.queries;
    const auto keys = Rows(layer, layer.keys, 0, prompt);
    const auto values = Rows(layer, layer.values, 0, prompt);
    CKV_RETURN_IF_ERROR(writer->WaitForRoom(static_cast<int64_t>(keys.size() + values.size())));
    CKV_RETURN_IF_ERROR(
        writer->Put(static_cast<int64_t>(l), 0, prompt, keys, values, layer.query_rms));
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Sequence> Prefill(Client* client, const v1::OpenSequenceRequest& request,
                                     const std::vector<TraceLayer>& layers,
                                     const PrefillWriterOptions& options) {
  CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence, client->OpenSequence(request));
  CKV_ASSIGN_OR_RETURN(const auto writer, PrefillWriter::Create(client, sequence, options));
  CKV_RETURN_IF_ERROR(PutAll(writer.get(), layers));
  return writer->Finish();
}

CuttingProxy::CuttingProxy(const std::string& target)
    : target_port_(std::stoi(target.substr(target.rfind(':') + 1))) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  CKV_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  CKV_CHECK(listen(listener_, 64) == 0);
  socklen_t size = sizeof(address);
  getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
  port_ = ntohs(address.sin_port);
  acceptor_ = std::thread([this] { Accept(); });
}

CuttingProxy::~CuttingProxy() {
  stopping_ = true;
  shutdown(listener_, SHUT_RDWR);
  acceptor_.join();
  CutOff();
  for (std::thread& thread : threads_) thread.join();
  for (const int socket : sockets_) close(socket);
  close(listener_);
}

std::string CuttingProxy::address() const { return absl::StrCat("127.0.0.1:", port_); }

void CuttingProxy::CutAfter(int64_t bytes, std::function<void()> then) {
  until_cut_ = -1;
  {
    std::lock_guard lock(mutex_);
    then_ = std::move(then);
  }
  until_cut_ = bytes;
}

void CuttingProxy::CutOff() {
  std::lock_guard lock(mutex_);
  cut_off_ = true;
  Cut(sockets_.size());
}

void CuttingProxy::Restore() {
  std::lock_guard lock(mutex_);
  cut_off_ = false;
}

void CuttingProxy::Accept() {
  while (!stopping_) {
    const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (client < 0) continue;
    const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in address = Loopback(target_port_);
    const int one = 1;
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      close(client);
      close(server);
      continue;
    }
    std::lock_guard lock(mutex_);
    if (cut_off_) {
      close(client);
      close(server);
      continue;
    }
    sockets_.push_back(client);
    sockets_.push_back(server);
    threads_.emplace_back([=, this] { Pump(client, server); });
    threads_.emplace_back([=, this] { Pump(server, client); });
  }
}

void CuttingProxy::Pump(int from, int to) {
  std::vector<char> buffer(1 << 16);
  while (true) {
    ssize_t got = recv(from, buffer.data(), buffer.size(), 0);
    if (got <= 0) break;
    int64_t left = until_cut_.load();
    bool cut = false;
    while (left >= 0) {
      cut = left <= got;
      if (until_cut_.compare_exchange_weak(left, cut ? -1 : left - got)) break;
    }
    if (left < 0) cut = false;
    if (cut) got = left;  // the bytes before the cut still arrive
    for (ssize_t sent = 0; sent < got;) {
      const ssize_t n =
          send(to, buffer.data() + sent, static_cast<size_t>(got - sent), MSG_NOSIGNAL);
      if (n <= 0) break;
      sent += n;
    }
    if (cut) {
      std::function<void()> then;
      size_t open = 0;
      {
        std::lock_guard lock(mutex_);
        then.swap(then_);
        open = sockets_.size();
      }
      if (then) then();
      ++cuts_;
      std::lock_guard lock(mutex_);
      Cut(open);
      return;
    }
  }
  shutdown(to, SHUT_RDWR);
  shutdown(from, SHUT_RDWR);
}

void CuttingProxy::Cut(size_t count) {
  for (size_t i = 0; i < count; ++i) shutdown(sockets_[i], SHUT_RDWR);
}

}  // namespace clusterkv::worker
