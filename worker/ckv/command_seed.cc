// ckv seed: sequences to try things on, made up or from traces, the same ones on every run.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "proto/grpc_status.h"
#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/prefill.h"
#include "worker/ckv/synthetic.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

class SeedCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    flags.Int("sequences", "N", &sequences_, 1, 1'000'000, "how many");
    flags.Int("tokens", "N", &tokens_, 1, int64_t{1} << 31, "of each, made-up ones");
    flags.String("prefix", "NAME", &prefix_, "they are called NAME-0, NAME-1, …");
    flags.Int("layers", "N", &layers_, 1, 1024, "of made-up sequences");
    flags.Int("kv_heads", "N", &kv_heads_, 1, 256, "of made-up sequences");
    flags.Int("query_heads", "N", &query_heads_, 1, 8192, "of made-up sequences");
    flags.Int("head_dim", "N", &head_dim_, 16, 512, "of made-up sequences");
    flags.Int("seed", "N", &seed_, 0, int64_t{1} << 62, "of the random numbers");
    flags.Choice("preset", {"clusterkv", "recall", "default"}, &preset_, "of the sequences");
    flags.OptionalInt("budget", "N", &budget_, 1, int64_t{1} << 31, "of the sequences");
    flags.Choice("codec", {"raw", "k8v4"}, &codec_, "of the records");
    flags.Int("max_decode_tokens", "N", &max_decode_tokens_, 0, int64_t{1} << 31,
              "memory kept for appended tokens");
    flags.Strings("trace", "FILE", &traces_, "take the prompt of these layers instead; repeatable");
    flags.Bool("replace", &replace_, "release sequences of the same names first");
    flags.Bool("print_query", &print_query_,
               "print a SelectClusters request for the first one as JSON, ready for ghz -d");
    flags.Int("print_recall", "N", &print_recall_, 0, 4096,
              "attach N times and print a SelectAndRecall request for each, as a JSON array");
  }

  absl::Status Run() override {
    CKV_RETURN_IF_ERROR(LoadTraces());
    if (print_recall_ > 0 && !server_.servers.empty()) {
      return UsageError("--print_recall is for one server: give --server");
    }
    if (query_heads_ % kv_heads_ != 0 || head_dim_ % 16 != 0) {
      return UsageError("--query_heads must be a multiple of --kv_heads, --head_dim one of 16");
    }
    // No session: what is seeded outlives this command.
    CKV_ASSIGN_OR_RETURN(const auto places, Places::Connect(server_, /*session=*/false));
    const absl::Time begin = absl::Now();
    {
      Progress progress("seed");
      for (int64_t i = 0; i < sequences_; ++i) {
        progress.Update(i, sequences_, Name(i));
        CKV_RETURN_IF_ERROR(SeedOne(places.get(), i));
      }
    }
    std::FILE* out = print_query_ || print_recall_ > 0 ? stderr : stdout;
    std::fprintf(out, "%s sequence%s of %s tokens, %lld layers, %s received in %s\n",
                 HumanCount(sequences_).c_str(), sequences_ == 1 ? "" : "s",
                 HumanCount(tokens_).c_str(), static_cast<long long>(layers_),
                 HumanBytes(static_cast<double>(bytes_)).c_str(),
                 HumanDuration(absl::Now() - begin).c_str());
    if (print_query_) std::printf("%s\n", QueryJson().dump().c_str());
    if (print_recall_ > 0) {
      CKV_ASSIGN_OR_RETURN(const auto client, ConnectClient(server_, /*session=*/false));
      CKV_RETURN_IF_ERROR(PrintRecalls(client.get()));
    }
    return absl::OkStatus();
  }

 private:
  std::string Name(int64_t i) const { return prefix_ + "-" + std::to_string(i); }

  kernels::KvShape Shape() const {
    return {kv_heads_, query_heads_, head_dim_, kernels::ElementType::kBFloat16};
  }

  // Reads the traces, whose shape and prompt then rule.
  absl::Status LoadTraces() {
    for (const std::string& path : traces_) {
      auto layer = ReadTraceLayer(path);
      if (!layer.ok()) {
        return absl::Status(layer.status().code(),
                            path + ": " + std::string(layer.status().message()));
      }
      trace_layers_.push_back(*std::move(layer));
      const TraceLayer& first = trace_layers_.front();
      if (trace_layers_.back().shape != first.shape ||
          trace_layers_.back().tokens != first.tokens) {
        return absl::InvalidArgumentError(path + " is of another shape than " + traces_[0]);
      }
      layers_ = static_cast<int64_t>(trace_layers_.size());
      kv_heads_ = first.shape.kv_heads;
      query_heads_ = first.shape.query_heads;
      head_dim_ = first.shape.head_dim;
      tokens_ = first.tokens - first.queries;
    }
    return absl::OkStatus();
  }

  // With --replace in place of one of the same name. Where shards come and go, the one that has it
  // may be known to others before it is to those that this command asks: until their lists meet,
  // what was nowhere when it was to be released is there when it is to be opened.
  absl::StatusOr<PlacedSequence> Open(Places* places, const v1::OpenSequenceRequest& request) {
    constexpr absl::Duration kListsMeet = absl::Seconds(10), kPause = absl::Milliseconds(200);
    v1::SequenceHandle handle;
    handle.set_name(request.name());
    const absl::Time deadline = absl::Now() + kListsMeet;
    for (;;) {
      if (replace_) CKV_RETURN_IF_ERROR(places->ReleaseSequence(handle));
      absl::StatusOr<PlacedSequence> opened = places->OpenSequence(request);
      const bool there = ReasonOf(opened.status()) == v1::SEQUENCE_EXISTS;
      if (!replace_ || !there || absl::Now() >= deadline) return opened;
      absl::SleepFor(kPause);
    }
  }

  absl::Status SeedOne(Places* places, int64_t i) {
    v1::OpenSequenceRequest request;
    request.set_name(Name(i));
    const kernels::KvShape shape = trace_layers_.empty() ? Shape() : trace_layers_[0].shape;
    request.mutable_shape()->set_layers(layers_);
    request.mutable_shape()->set_kv_heads(shape.kv_heads);
    request.mutable_shape()->set_query_heads(shape.query_heads);
    request.mutable_shape()->set_head_dim(shape.head_dim);
    request.mutable_shape()->set_element_type(static_cast<v1::ElementType>(shape.element_type));
    request.set_prompt_tokens(tokens_);
    request.set_max_decode_tokens(max_decode_tokens_);
    request.set_preset(preset_);
    request.set_codec(codec_);
    if (budget_.has_value()) request.mutable_select()->set_budget_tokens(*budget_);
    CKV_ASSIGN_OR_RETURN(const PlacedSequence opened, Open(places, request));
    SequenceGuard guard(opened.client, opened.sequence.handle());
    CKV_ASSIGN_OR_RETURN(auto writer, PrefillWriter::Create(opened.client, opened.sequence));
    for (int64_t l = 0; l < layers_; ++l) CKV_RETURN_IF_ERROR(PutLayer(writer.get(), i, l));
    CKV_RETURN_IF_ERROR(writer->Finish().status());
    bytes_ += writer->bytes_sent();
    guard.Dismiss();
    return absl::OkStatus();
  }

  uint64_t LayerSeed(int64_t sequence, int64_t layer) const {
    return static_cast<uint64_t>(seed_) * 1'000'003 + sequence * 1024 + layer;
  }

  absl::Status PutLayer(PrefillWriter* writer, int64_t sequence, int64_t l) const {
    if (!trace_layers_.empty()) return PutPrompt(writer, l, trace_layers_[l], tokens_);
    // The queries are there for their statistics alone.
    const TraceLayer layer = MakeSyntheticLayer(Shape(), tokens_, 64, LayerSeed(sequence, l));
    return PutPrompt(writer, l, layer, tokens_);
  }

  nlohmann::ordered_json QueryValues() const {
    std::vector<float> queries;
    if (trace_layers_.empty()) {
      queries = MakeSyntheticQuery(Shape(), tokens_, LayerSeed(0, 0), seed_);
    } else {
      const TraceLayer& layer = trace_layers_[0];
      queries.resize(layer.shape.query_heads * layer.shape.head_dim);
      kernels::ToFloat(layer.q.data(), layer.shape.element_type,
                       static_cast<int64_t>(queries.size()), queries.data());
    }
    nlohmann::ordered_json values = nlohmann::ordered_json::array();
    // Three decimals are enough for a load test and keep the line short.
    for (const float query : queries) values.push_back(std::round(query * 1000.0) / 1000.0);
    return values;
  }

  nlohmann::ordered_json QueryJson() const {
    return {{"sequence", Name(0)},
            {"layer", 0},
            {"queries", {{"values", QueryValues()}}},
            {"want_state", true}};
  }

  // One attachment per request, round the sequences. They belong to no session and end by their
  // own ttl. Each request forgets the residency, so that any of them can be sent at any time.
  absl::Status PrintRecalls(Client* client) const {
    nlohmann::ordered_json requests = nlohmann::ordered_json::array();
    for (int64_t i = 0; i < print_recall_; ++i) {
      v1::AttachRequest request;
      request.mutable_sequence()->set_name(Name(i % sequences_));
      v1::AttachResponse response;
      const grpc::Status status =
          client->cache().Attach(client->MakeContext().get(), request, &response);
      if (!status.ok()) return FromGrpcStatus(status);
      nlohmann::ordered_json item = {{"attachment_id", std::to_string(response.attachment_id())},
                                     {"layer", 0},
                                     {"queries", {{"values", QueryValues()}}},
                                     {"reset_residency", true}};
      requests.push_back({{"items", nlohmann::ordered_json::array({item})}});
    }
    std::printf("%s\n", requests.dump().c_str());
    return absl::OkStatus();
  }

  PlaceFlags server_;
  int64_t sequences_ = 1, tokens_ = 2048, layers_ = 2, kv_heads_ = 2, query_heads_ = 4;
  int64_t head_dim_ = 64, seed_ = 1, max_decode_tokens_ = 0;
  std::optional<int64_t> budget_;
  std::string prefix_ = "seed", preset_ = "default", codec_ = "raw";
  std::vector<std::string> traces_;
  std::vector<TraceLayer> trace_layers_;
  bool replace_ = false, print_query_ = false;
  int64_t print_recall_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace

std::unique_ptr<Command> MakeSeedCommand() { return std::make_unique<SeedCommand>(); }

}  // namespace clusterkv::worker::ckv
