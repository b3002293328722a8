// ckv bench: load on a server, for those who have no ghz, and for calls that ghz cannot make.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "kernels/base/status_macros.h"
#include "proto/grpc_status.h"
#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/load.h"
#include "worker/ckv/prefill.h"
#include "worker/ckv/svg.h"
#include "worker/ckv/synthetic.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

// Queries of the sequence's shape, normal, as packed floats.
void FillQueries(const v1::KvShape& shape, Random* random, v1::Vector* queries) {
  std::vector<float> numbers(shape.query_heads() * shape.head_dim());
  for (float& number : numbers) number = random->Normal();
  queries->set_type(v1::ELEMENT_TYPE_FLOAT32);
  queries->set_data(numbers.data(), numbers.size() * sizeof(float));
}

// What a thread calls with: each has one of its own.
class Caller {
 public:
  virtual ~Caller() = default;
  virtual absl::Status Prepare() { return absl::OkStatus(); }
  virtual absl::Status Call() = 0;
};

// The sequences that one server has.
struct ServerSequences {
  Client* client = nullptr;
  std::vector<v1::Sequence> sequences;
};

// Each call goes to one server, as often as it has sequences.
class SelectCaller : public Caller {
 public:
  SelectCaller(const std::vector<ServerSequences>* servers, int64_t items, uint64_t seed)
      : servers_(servers), items_(items), random_(seed) {
    for (const ServerSequences& server : *servers) {
      sequences_ += static_cast<int64_t>(server.sequences.size());
    }
  }

  absl::Status Call() override {
    const ServerSequences& server = Next();
    v1::SelectClustersRequest request;
    request.set_want_state(true);
    for (int64_t i = 0; i < items_; ++i) {
      const v1::Sequence& sequence =
          server.sequences[random_.Below(static_cast<int64_t>(server.sequences.size()))];
      v1::SelectItem* item = request.add_items();
      *item->mutable_sequence() = sequence.handle();
      item->set_layer(random_.Below(sequence.shape().layers()));
      FillQueries(sequence.shape(), &random_, item->mutable_queries());
    }
    CKV_ASSIGN_OR_RETURN(const auto response, server.client->SelectClusters(request));
    for (const v1::SelectResult& result : response.results()) {
      CKV_RETURN_IF_ERROR(FromRpcStatus(result.error()));
    }
    return absl::OkStatus();
  }

 private:
  const ServerSequences& Next() {
    if (servers_->size() == 1) return servers_->front();
    int64_t at = random_.Below(sequences_);
    for (const ServerSequences& server : *servers_) {
      at -= static_cast<int64_t>(server.sequences.size());
      if (at < 0) return server;
    }
    return servers_->back();
  }

  const std::vector<ServerSequences>* servers_;
  int64_t items_, sequences_ = 0;
  Random random_;
};

// A decode worker of its own: attached to one sequence, layer after layer.
class SelectAndRecallCaller : public Caller {
 public:
  SelectAndRecallCaller(Client* client, const v1::Sequence& sequence, uint64_t seed)
      : client_(client), sequence_(sequence), random_(seed), steps_(sequence.shape().layers()) {}

  ~SelectAndRecallCaller() override {
    if (attachment_ == 0) return;
    v1::DetachRequest request;
    request.set_attachment_id(attachment_);
    v1::DetachResponse response;
    // Best effort: the attachment would end with the session anyway.
    (void)client_->cache().Detach(client_->MakeContext().get(), request, &response);
  }

  absl::Status Prepare() override {
    v1::AttachRequest request;
    *request.mutable_sequence() = sequence_.handle();
    request.set_session_id(client_->session_id());
    request.mutable_hot_cache()->set_capacity_tokens(1024);
    v1::AttachResponse response;
    const grpc::Status status =
        client_->cache().Attach(client_->MakeContext().get(), request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    attachment_ = response.attachment_id();
    return absl::OkStatus();
  }

  absl::Status Call() override {
    const uint32_t layer = calls_++ % sequence_.shape().layers();
    v1::SelectAndRecallRequest request;
    v1::SelectAndRecallItem* item = request.add_items();
    item->set_attachment_id(attachment_);
    item->set_layer(layer);
    item->set_step(steps_[layer]);
    item->set_reset_residency(reset_);
    FillQueries(sequence_.shape(), &random_, item->mutable_queries());
    const auto context = client_->MakeContext();
    auto reader = client_->cache().SelectAndRecall(context.get(), request);
    absl::Status refused;
    v1::SelectAndRecallResponse response;
    while (reader->Read(&response)) {
      for (const v1::SelectResult& result : response.selection().results()) {
        refused.Update(FromRpcStatus(result.error()));
      }
    }
    refused.Update(FromGrpcStatus(reader->Finish()));
    // After a failure the two sides may have counted differently: start anew.
    reset_ = !refused.ok();
    steps_[layer] += refused.ok();
    return refused;
  }

 private:
  Client* client_;
  const v1::Sequence& sequence_;
  Random random_;
  std::vector<uint64_t> steps_;
  uint64_t attachment_ = 0, calls_ = 0;
  bool reset_ = false;
};

// Opens, fills, seals and releases a sequence of one layer.
class PutCaller : public Caller {
 public:
  PutCaller(Places* places, int64_t thread, int64_t tokens)
      : places_(places),
        thread_(thread),
        layer_(MakeSyntheticLayer({2, 4, 64, kernels::ElementType::kBFloat16}, tokens, 0,
                                  static_cast<uint64_t>(thread))) {}

  absl::Status Call() override {
    v1::OpenSequenceRequest request;
    request.set_name("ckv-bench-" + std::to_string(getpid()) + "-" + std::to_string(thread_) + "-" +
                     std::to_string(calls_++));
    request.mutable_shape()->set_layers(1);
    request.mutable_shape()->set_kv_heads(layer_.shape.kv_heads);
    request.mutable_shape()->set_query_heads(layer_.shape.query_heads);
    request.mutable_shape()->set_head_dim(layer_.shape.head_dim);
    request.set_prompt_tokens(layer_.tokens);
    CKV_ASSIGN_OR_RETURN(const PlacedSequence opened, places_->OpenSequence(std::move(request)));
    SequenceGuard guard(opened.client, opened.sequence.handle());
    CKV_ASSIGN_OR_RETURN(auto writer, PrefillWriter::Create(opened.client, opened.sequence));
    CKV_RETURN_IF_ERROR(PutPrompt(writer.get(), 0, layer_, layer_.tokens));
    CKV_RETURN_IF_ERROR(writer->Finish().status());
    return guard.Release();
  }

 private:
  Places* places_;
  int64_t thread_, calls_ = 0;
  TraceLayer layer_;
};

class BenchCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    flags.Strings("sequences", "NAME,…", &patterns_,
                  "which to ask; NAME* for all that begin so (default: all READY ones)");
    flags.Choice("method", {"select", "select_and_recall", "put"}, &method_, "what to call");
    flags.Double("rps", "N", &load_.rps, 0, 1e6,
                 "calls per second, sent when due; 0: each thread as fast as it is answered");
    flags.Duration("duration", &load_.duration, "how long to call");
    flags.Int("concurrency", "N", &load_.concurrency, 1, 1024, "most calls in flight");
    flags.Int("connections", "N", &connections_, 1, 256, "that the threads share");
    flags.Int("items", "N", &items_, 1, 4096, "queries in one select");
    flags.Int("tokens", "N", &tokens_, 1, 1 << 20, "of the sequences that put makes");
    flags.Int("seed", "N", &seed_, 0, int64_t{1} << 62, "of the random queries");
    flags.String("json", "FILE", &json_,
                 "write the result as JSON, as ghz does; - for standard output");
  }

  absl::Status Run() override {
    if (patterns_.empty()) patterns_ = {"*"};
    for (int64_t i = 0; i < std::min(connections_, load_.concurrency); ++i) {
      CKV_ASSIGN_OR_RETURN(auto places, Places::Connect(server_, /*session=*/true));
      made_.push_back({std::move(places), {}});
      if (method_ != "put") CKV_RETURN_IF_ERROR(FindSequences(&made_.back()));
    }
    std::vector<std::unique_ptr<Caller>> callers;
    std::vector<LoadCall> calls;
    for (int64_t i = 0; i < load_.concurrency; ++i) {
      callers.push_back(MakeCaller(i));
      CKV_RETURN_IF_ERROR(callers.back()->Prepare());
      calls.emplace_back([caller = callers.back().get()] { return caller->Call(); });
    }
    LoadResult result;
    {
      Progress progress("bench " + method_);
      result = RunLoad(load_, calls, [&](absl::Duration done) {
        progress.Update(absl::ToInt64Milliseconds(done), absl::ToInt64Milliseconds(load_.duration));
      });
    }
    if (json_ != "-") std::printf("%s", LoadSummary(result).c_str());
    if (!json_.empty()) CKV_RETURN_IF_ERROR(WriteFile(json_, LoadJson(result)));
    if (result.failed() > 0) {
      return absl::InternalError(std::to_string(result.failed()) + " of " +
                                 std::to_string(result.count()) + " calls failed");
    }
    return absl::OkStatus();
  }

 private:
  struct Connection {
    std::unique_ptr<Places> places;
    std::vector<ServerSequences> servers;  // with sequences to ask
  };

  std::unique_ptr<Caller> MakeCaller(int64_t thread) {
    const Connection& connection = made_[thread % made_.size()];
    const uint64_t seed = static_cast<uint64_t>(seed_) * 100'003 + thread;
    if (method_ == "put") {
      return std::make_unique<PutCaller>(connection.places.get(), thread, tokens_);
    }
    if (method_ == "select") {
      return std::make_unique<SelectCaller>(&connection.servers, items_, seed);
    }
    // Threads go round the servers, and round the sequences of each.
    const size_t servers = connection.servers.size();
    const ServerSequences& server = connection.servers[thread % servers];
    const size_t sequence = thread / servers % server.sequences.size();
    return std::make_unique<SelectAndRecallCaller>(server.client, server.sequences[sequence], seed);
  }

  absl::Status FindSequences(Connection* connection) {
    std::map<Client*, std::vector<v1::Sequence>> by_client;
    for (const std::string& pattern : patterns_) {
      const bool all = pattern.back() == '*';
      const std::string name = all ? pattern.substr(0, pattern.size() - 1) : pattern;
      CKV_ASSIGN_OR_RETURN(auto found, connection->places->ListPlaced(name));
      int64_t ready = 0;
      for (PlacedSequence& placed : found) {
        const v1::SequenceState state = placed.sequence.state();
        if (state != v1::SEQUENCE_STATE_READY && state != v1::SEQUENCE_STATE_APPENDING) continue;
        if (!all && placed.sequence.handle().name() != name) continue;
        by_client[placed.client].push_back(std::move(placed.sequence));
        ++ready;
      }
      if (ready == 0) {
        return absl::NotFoundError("no READY sequence \"" + pattern +
                                   "\"; `ckv seed --prefix=NAME` puts some in");
      }
    }
    for (auto& [client, sequences] : by_client) {
      connection->servers.push_back({client, std::move(sequences)});
    }
    // By name, not by where in memory a client lies: the same arguments ask the same.
    std::sort(connection->servers.begin(), connection->servers.end(),
              [](const ServerSequences& a, const ServerSequences& b) {
                return a.sequences[0].handle().name() < b.sequences[0].handle().name();
              });
    return absl::OkStatus();
  }

  PlaceFlags server_;
  LoadOptions load_;
  std::vector<std::string> patterns_;
  std::string method_ = "select", json_;
  int64_t connections_ = 1, items_ = 1, tokens_ = 512, seed_ = 1;
  std::vector<Connection> made_;
};

}  // namespace

std::unique_ptr<Command> MakeBenchCommand() { return std::make_unique<BenchCommand>(); }

}  // namespace clusterkv::worker::ckv
