// ckv selftest: does this server do what it promises? A small made-up sequence goes through all of
// it. With --servers: each shard, and the shards together.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "kernels/base/status_macros.h"
#include "kernels/codec/record_codec.h"
#include "proto/grpc_status.h"
#include "proto/placement.h"
#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/prefill.h"
#include "worker/ckv/replay.h"
#include "worker/ckv/synthetic.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

constexpr int64_t kTokens = 1536, kQueries = 8, kLayers = 2;

// A shard says NOT_OWNER of a sequence that is not there where its name is another shard's.
v1::ErrorReason RefusalOf(const absl::Status& status) {
  const v1::ErrorReason reason = ReasonOf(status);
  return reason == v1::NOT_OWNER ? v1::SEQUENCE_NOT_FOUND : reason;
}

class SelftestCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    admin_.Register(flags, /*required=*/false, &server_);
  }

  absl::Status Run() override {
    MakeTrace();
    if (server_.servers.empty()) {
      CKV_RETURN_IF_ERROR(CheckServer(server_));
      CheckLedger();
    } else {
      if (!admin_.admin.empty()) return UsageError("--admin is of one server: give --server");
      CKV_RETURN_IF_ERROR(CheckShards());
    }
    std::printf("\n%d of %d checks passed\n", passed_, passed_ + failed_);
    if (failed_ > 0) {
      return absl::InternalError(std::to_string(failed_) + " of " +
                                 std::to_string(passed_ + failed_) + " checks failed");
    }
    return absl::OkStatus();
  }

 private:
  void Report(bool passed, const std::string& what, const std::string& figures) {
    ++(passed ? passed_ : failed_);
    std::printf(
        "%s  %-46s %s\n",
        passed ? Colored("PASS", Color::kGreen).c_str() : Colored("FAIL", Color::kRed).c_str(),
        what.c_str(), figures.c_str());
    std::fflush(stdout);
  }

  // All that one server promises.
  absl::Status CheckServer(const ServerFlags& flags) {
    CKV_ASSIGN_OR_RETURN(client_, ConnectClient(flags, /*session=*/true));
    places_ = std::make_unique<Places>(client_.get());
    const v1::ServerInfo info = client_->server_info();
    Report(info.boot_id() != 0 && !info.draining(), "server answers and takes work",
           info.version() + " on " + info.device());
    CheckFullBudget();
    CheckPresets();
    CheckRepeatable();
    CheckSequenceCalls();
    return absl::OkStatus();
  }

  // Each shard by itself, and that they are one service.
  absl::Status CheckShards() {
    CKV_ASSIGN_OR_RETURN(const auto places, Places::Connect(server_, /*session=*/true));
    const std::vector<v1::Shard> shards = places->shards()->members();
    for (const v1::Shard& shard : shards) {
      std::printf("%s at %s\n", shard.name().c_str(), shard.address().c_str());
      ServerFlags flags = server_;
      flags.server = shard.address();
      if (absl::Status status = CheckServer(flags); !status.ok()) {
        Report(false, "server answers and takes work", DescribeError(status));
      }
    }
    std::printf("%zu shards as one\n", shards.size());
    for (const v1::Shard& shard : shards) CheckPlacement(places->shards(), shard, shards);
    return absl::OkStatus();
  }

  // A sequence of the shard's own goes there, and by its name alone it is found.
  void CheckPlacement(Shards* all, const v1::Shard& shard, const std::vector<v1::Shard>& shards) {
    const std::string what = shard.name() + " gets the sequences that it owns";
    v1::OpenSequenceRequest request = Request();
    for (int64_t i = 0; request.name().empty(); ++i) {
      const std::string name = "ckv-selftest-" + std::to_string(getpid()) + "-" + std::to_string(i);
      if (RankShards(name, shards).front().name() == shard.name()) request.set_name(name);
    }
    v1::SequenceHandle handle;
    handle.set_name(request.name());
    const absl::StatusOr<PlacedSequence> opened = all->OpenSequence(std::move(request));
    if (!opened.ok()) return Report(false, what, DescribeError(opened.status()));
    SequenceGuard guard(opened->client, opened->sequence.handle());
    const absl::StatusOr<PlacedSequence> found = all->FindSequence(handle);
    if (!found.ok()) return Report(false, what, DescribeError(found.status()));
    ServerFlags flags = server_;
    flags.server = shard.address();
    const auto there = ConnectClient(flags, /*session=*/false);
    if (!there.ok()) return Report(false, what, DescribeError(there.status()));
    Report((*there)->GetSequence(handle).ok() && found->client == opened->client, what,
           handle.name());
  }

  void MakeTrace() {
    const kernels::KvShape shape{2, 4, 64, kernels::ElementType::kBFloat16};
    std::vector<TraceLayer> layers;
    std::vector<std::string> names;
    for (int64_t l = 0; l < kLayers; ++l) {
      layers.push_back(MakeSyntheticLayer(shape, kTokens, kQueries, 100 + l));
      names.push_back("made-up layer " + std::to_string(l));
    }
    trace_ = *MakeReplayTrace(std::move(layers), std::move(names), 0, 1);
  }

  static double WorstError(const ReplayResult& run) {
    double worst = 0;
    for (const LayerFigures& layer : run.layers) {
      if (!(layer.output_error <= worst)) worst = layer.output_error;
    }
    return worst;
  }

  // With every token exact there is nothing left to answer: decode must be full attention.
  void CheckFullBudget() {
    for (const v1::ElementType type : {v1::ELEMENT_TYPE_FLOAT16, v1::ELEMENT_TYPE_FLOAT32}) {
      ReplayOptions options;
      options.budget = kTokens;
      options.hot_tokens = kTokens;
      options.state_type = type;
      const auto run = Replay(places_.get(), trace_, options, nullptr);
      const std::string what = std::string("full budget equals full attention, ") +
                               (type == v1::ELEMENT_TYPE_FLOAT16 ? "fp16" : "fp32") + " state";
      const bool passed = run.ok() && WorstError(*run) <= 1e-3;
      Report(passed, what,
             run.ok() ? "error " + Significant(WorstError(*run), 3) : DescribeError(run.status()));
    }
  }

  void CheckPresets() {
    for (const char* preset : {"clusterkv", "recall", "default"}) {
      ReplayOptions options;
      options.preset = preset;
      options.budget = 256;
      const auto run = Replay(places_.get(), trace_, options, nullptr);
      Report(run.ok() && WorstError(*run) < 0.5, std::string("decodes with preset ") + preset,
             run.ok() ? "error " + Significant(WorstError(*run), 3) + " at 256 of " +
                            std::to_string(kTokens) + " tokens"
                      : DescribeError(run.status()));
    }
  }

  void CheckRepeatable() {
    ReplayOptions options;
    options.budget = 64;
    const auto first = Replay(places_.get(), trace_, options, nullptr);
    const auto second = Replay(places_.get(), trace_, options, nullptr);
    if (!first.ok() || !second.ok()) {
      Report(false, "two runs give the same bits",
             DescribeError(first.ok() ? second.status() : first.status()));
      return;
    }
    bool same = true;
    for (size_t l = 0; l < first->layers.size(); ++l) {
      const LayerFigures& a = first->layers[l];
      const LayerFigures& b = second->layers[l];
      same = same && a.index_digest == b.index_digest && a.selection_digest == b.selection_digest &&
             a.state_digest == b.state_digest && a.recalled_digest == b.recalled_digest;
    }
    Report(same, "two runs give the same bits", "selection " + first->layers[0].selection_digest);
  }

  // A sequence of its own for what Replay does not touch.
  void CheckSequenceCalls() {
    auto opened = Prefill();
    if (!opened.ok()) {
      Report(false, "a sequence opens, fills and seals", DescribeError(opened.status()));
      return;
    }
    Report(opened->state() == v1::SEQUENCE_STATE_READY, "a sequence opens, fills and seals",
           HumanBytes(static_cast<double>(opened->bytes())) + " held");
    SequenceGuard guard(client_.get(), opened->handle());
    CheckRecall(*opened);
    CheckErrors(*opened);
    const absl::Status released = guard.Release();
    const auto gone = client_->GetSequence(opened->handle());
    Report(released.ok() && RefusalOf(gone.status()) == v1::SEQUENCE_NOT_FOUND,
           "a released sequence is gone", v1::ErrorReason_Name(ReasonOf(gone.status())));
  }

  // Of the trace's sequence, without name and session.
  v1::OpenSequenceRequest Request() const {
    v1::OpenSequenceRequest request;
    request.mutable_shape()->set_layers(kLayers);
    request.mutable_shape()->set_kv_heads(trace_.shape().kv_heads);
    request.mutable_shape()->set_query_heads(trace_.shape().query_heads);
    request.mutable_shape()->set_head_dim(trace_.shape().head_dim);
    request.set_prompt_tokens(kTokens);
    return request;
  }

  absl::StatusOr<v1::Sequence> Prefill() {
    v1::OpenSequenceRequest request = Request();
    request.set_name("ckv-selftest-" + std::to_string(client_->session_id()));
    request.set_session_id(client_->session_id());
    CKV_ASSIGN_OR_RETURN(const v1::Sequence opened, client_->OpenSequence(request));
    SequenceGuard guard(client_.get(), opened.handle());
    CKV_ASSIGN_OR_RETURN(auto writer, PrefillWriter::Create(client_.get(), opened));
    for (int64_t l = 0; l < kLayers; ++l) {
      CKV_RETURN_IF_ERROR(PutPrompt(writer.get(), l, trace_.layers[l], kTokens));
    }
    CKV_ASSIGN_OR_RETURN(v1::Sequence ready, writer->Finish());
    guard.Dismiss();
    return ready;
  }

  // Records of scattered tokens must decode to the very bytes that were put.
  void CheckRecall(const v1::Sequence& sequence) {
    v1::RecallClustersRequest request;
    *request.mutable_sequence() = sequence.handle();
    request.set_layer(1);
    for (uint32_t h = 0; h < trace_.shape().kv_heads; ++h) {
      auto* head = request.add_heads();
      head->set_kv_head(h);
      for (uint32_t p = 16 + h; p < kTokens; p += 97) head->add_positions(p);
    }
    const auto context = client_->MakeContext();
    auto reader = client_->cache().RecallClusters(context.get(), request);
    v1::RecordChunk chunk;
    int64_t records = 0, wrong = 0, bytes = 0;
    while (reader->Read(&chunk)) {
      records += chunk.positions_size();
      bytes += static_cast<int64_t>(chunk.records().size());
      wrong += WrongRecords(chunk, sequence.record_bytes());
    }
    const grpc::Status status = reader->Finish();
    int64_t asked = 0;
    for (const auto& head : request.heads()) asked += head.positions_size();
    Report(status.ok() && records == asked && wrong == 0, "recalled records are bit-exact",
           status.ok() ? std::to_string(records) + " of " + std::to_string(asked) + " records, " +
                             HumanBytes(static_cast<double>(bytes)) + ", " + std::to_string(wrong) +
                             " wrong"
                       : DescribeError(FromGrpcStatus(status)));
  }

  int64_t WrongRecords(const v1::RecordChunk& chunk, int64_t record_bytes) const {
    const kernels::KvShape& shape = trace_.shape();
    const kernels::RecordCodec* raw = kernels::FindRecordCodec("raw");
    if (static_cast<int64_t>(chunk.records().size()) != record_bytes * chunk.positions_size() ||
        raw->RecordBytes(shape.element_type, shape.head_dim) != record_bytes) {
      return chunk.positions_size();
    }
    std::vector<float> key(shape.head_dim), value(shape.head_dim);
    int64_t wrong = 0;
    for (int i = 0; i < chunk.positions_size(); ++i) {
      raw->Decode(reinterpret_cast<const std::byte*>(chunk.records().data()) + i * record_bytes,
                  shape.element_type, shape.head_dim, key.data(), value.data());
      const FloatKv& kv = trace_.kv[chunk.layer()];
      const int64_t at = (chunk.kv_head() * kv.tokens + chunk.positions(i)) * shape.head_dim;
      const size_t size = key.size() * sizeof(float);
      wrong += std::memcmp(key.data(), kv.keys.data() + at, size) != 0 ||
               std::memcmp(value.data(), kv.values.data() + at, size) != 0;
    }
    return wrong;
  }

  // Each wrong call must be refused for its own reason.
  void CheckErrors(const v1::Sequence& sequence) {
    v1::SelectClustersRequest good;
    v1::SelectItem* item = good.add_items();
    *item->mutable_sequence() = sequence.handle();
    for (int64_t i = 0; i < trace_.shape().query_heads * trace_.shape().head_dim; ++i) {
      item->mutable_queries()->add_values(trace_.queries[0][i]);
    }
    const auto expect = [&](const char* what, v1::ErrorReason reason, auto change) {
      v1::SelectClustersRequest request = good;
      change(*request.mutable_items(0));
      const auto answer = client_->SelectClusters(request);
      absl::Status status = answer.status();
      if (answer.ok() && answer->results_size() == 1) {
        status = FromRpcStatus(answer->results(0).error());
      }
      const bool passed = !status.ok() && RefusalOf(status) == reason;
      Report(passed, std::string("refused: ") + what,
             status.ok() ? "accepted" : v1::ErrorReason_Name(ReasonOf(status)));
    };
    expect("unknown sequence", v1::SEQUENCE_NOT_FOUND, [](v1::SelectItem& bad) {
      bad.mutable_sequence()->Clear();
      bad.mutable_sequence()->set_name("ckv-selftest-no-such-sequence");
    });
    expect("generation of another sequence", v1::STALE_GENERATION, [](v1::SelectItem& bad) {
      bad.mutable_sequence()->set_generation(bad.sequence().generation() + 1);
    });
    expect("boot id of another server", v1::STALE_BOOT_ID, [](v1::SelectItem& bad) {
      bad.mutable_sequence()->set_boot_id(bad.sequence().boot_id() + 1);
    });
    expect("layer out of range", v1::LAYER_OUT_OF_RANGE,
           [](v1::SelectItem& bad) { bad.set_layer(kLayers); });
    expect("query of the wrong shape", v1::SHAPE_MISMATCH,
           [](v1::SelectItem& bad) { bad.mutable_queries()->mutable_values()->RemoveLast(); });
    expect("query with NaN", v1::NON_FINITE_QUERY, [](v1::SelectItem& bad) {
      bad.mutable_queries()->set_values(0, std::numeric_limits<float>::quiet_NaN());
    });
    expect("budget of 0", v1::BUDGET_ZERO,
           [](v1::SelectItem& bad) { bad.mutable_select()->set_budget_tokens(0); });
  }

  void CheckLedger() {
    if (admin_.admin.empty()) return;
    auto admin = AdminClient::Connect(admin_);
    if (!admin.ok()) {
      Report(false, "the ledger of pages balances", DescribeError(admin.status()));
      return;
    }
    const auto ledger = (*admin)->VerifyLedger(/*checksums=*/true);
    const bool passed = ledger.ok() && ledger->balanced() && ledger->problems_size() == 0;
    Report(passed, "the ledger of pages balances",
           !ledger.ok()                  ? DescribeError(ledger.status())
           : passed                      ? HumanCount(ledger->pages_checked()) + " pages checked"
           : ledger->problems_size() > 0 ? ledger->problems(0)
                                         : "not balanced");
  }

  PlaceFlags server_;
  AdminFlags admin_;
  std::unique_ptr<Client> client_;  // of the server that is checked now
  std::unique_ptr<Places> places_;  // the same, for Replay
  ReplayTrace trace_;
  int passed_ = 0, failed_ = 0;
};

}  // namespace

std::unique_ptr<Command> MakeSelftestCommand() { return std::make_unique<SelftestCommand>(); }

}  // namespace clusterkv::worker::ckv
