// ckv bench: load on a server, for those who have no ghz, and for calls that ghz cannot make.
#include <unistd.h>

#include <cstdio>

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

class SelectCaller : public Caller {
 public:
  SelectCaller(Client* client, const std::vector<v1::Sequence>* sequences, int64_t items,
               uint64_t seed)
      : client_(client), sequences_(sequences), items_(items), random_(seed) {}

  absl::Status Call() override {
    v1::SelectClustersRequest request;
    request.set_want_state(true);
    for (int64_t i = 0; i < items_; ++i) {
      const v1::Sequence& sequence =
          (*sequences_)[random_.Below(static_cast<int64_t>(sequences_->size()))];
      v1::SelectItem* item = request.add_items();
      *item->mutable_sequence() = sequence.handle();
      item->set_layer(random_.Below(sequence.shape().layers()));
      FillQueries(sequence.shape(), &random_, item->mutable_queries());
    }
    CKV_ASSIGN_OR_RETURN(const auto response, client_->SelectClusters(request));
    for (const v1::SelectResult& result : response.results()) {
      CKV_RETURN_IF_ERROR(FromRpcStatus(result.error()));
    }
    return absl::OkStatus();
  }

 private:
  Client* client_;
  const std::vector<v1::Sequence>* sequences_;
  int64_t items_;
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
  PutCaller(Client* client, int64_t thread, int64_t tokens)
      : client_(client),
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
    request.set_session_id(client_->session_id());
    CKV_ASSIGN_OR_RETURN(const v1::Sequence opened, client_->OpenSequence(request));
    SequenceGuard guard(client_, opened.handle());
    CKV_ASSIGN_OR_RETURN(auto writer, PrefillWriter::Create(client_, opened));
    CKV_RETURN_IF_ERROR(PutPrompt(writer.get(), 0, layer_, layer_.tokens));
    CKV_RETURN_IF_ERROR(writer->Finish().status());
    return guard.Release();
  }

 private:
  Client* client_;
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
    for (int64_t i = 0; i < std::min(connections_, load_.concurrency); ++i) {
      CKV_ASSIGN_OR_RETURN(auto client, ConnectClient(server_, /*session=*/true));
      clients_.push_back(std::move(client));
    }
    if (method_ != "put") CKV_RETURN_IF_ERROR(FindSequences());
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
  std::unique_ptr<Caller> MakeCaller(int64_t thread) {
    Client* client = clients_[thread % clients_.size()].get();
    const uint64_t seed = static_cast<uint64_t>(seed_) * 100'003 + thread;
    if (method_ == "put") return std::make_unique<PutCaller>(client, thread, tokens_);
    if (method_ == "select") {
      return std::make_unique<SelectCaller>(client, &sequences_, items_, seed);
    }
    return std::make_unique<SelectAndRecallCaller>(client, sequences_[thread % sequences_.size()],
                                                   seed);
  }

  absl::Status FindSequences() {
    if (patterns_.empty()) patterns_ = {"*"};
    for (const std::string& pattern : patterns_) {
      const bool all = pattern.back() == '*';
      const std::string name = all ? pattern.substr(0, pattern.size() - 1) : pattern;
      CKV_ASSIGN_OR_RETURN(const auto found, clients_[0]->ListSequences(name));
      const size_t before = sequences_.size();
      for (const v1::Sequence& sequence : found) {
        const bool ready = sequence.state() == v1::SEQUENCE_STATE_READY ||
                           sequence.state() == v1::SEQUENCE_STATE_APPENDING;
        if (ready && (all || sequence.handle().name() == name)) sequences_.push_back(sequence);
      }
      if (sequences_.size() == before) {
        return absl::NotFoundError("no READY sequence \"" + pattern +
                                   "\"; `ckv seed --prefix=NAME` puts some in");
      }
    }
    return absl::OkStatus();
  }

  ServerFlags server_;
  LoadOptions load_;
  std::vector<std::string> patterns_;
  std::string method_ = "select", json_;
  int64_t connections_ = 1, items_ = 1, tokens_ = 512, seed_ = 1;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<v1::Sequence> sequences_;
};

}  // namespace

std::unique_ptr<Command> MakeBenchCommand() { return std::make_unique<BenchCommand>(); }

}  // namespace clusterkv::worker::ckv
