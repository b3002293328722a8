// ckv replay: a real model's KV through a server, and how near its answers come to full attention.
#include <charconv>
#include <cstdio>
#include <thread>

#include "worker/ckv/command.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/replay.h"
#include "worker/ckv/replay_report.h"
#include "worker/ckv/svg.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 31;

// "BITS:GROUP" or "BITS".
absl::Status ParseCodes(const std::string& text, ReplayOptions* options) {
  int64_t bits = 0, group = 0;
  const char* end = text.data() + text.size();
  auto [at, error] = std::from_chars(text.data(), end, bits);
  bool valid = error == std::errc() && (bits == 0 || (bits >= 2 && bits <= 4));
  if (valid && at != end) {
    const auto [rest, group_error] = std::from_chars(at + 1, end, group);
    valid = *at == ':' && group_error == std::errc() && rest == end && group >= 0;
  }
  if (!valid) {
    return UsageError(
        "--codes: expected BITS:GROUP with 2, 3 or 4 bits (0: none), as 2:32, got \"" + text +
        "\"");
  }
  options->code_bits = bits;
  options->code_group = group;
  return absl::OkStatus();
}

class ReplayCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    server_.Register(flags);
    flags.Choice("preset", {"clusterkv", "recall", "default"}, &options_.preset,
                 "how to select and answer");
    flags.OptionalInt("budget", "N", &options_.budget, 0, kMaxTokens,
                      "exact tokens per KV head, sinks included (default: the preset's)");
    flags.OptionalInt("coded_tokens", "N", &options_.coded_tokens, 0, kMaxTokens,
                      "tokens answered from codes (default: the preset's)");
    flags.String("codes", "BITS:GROUP", &codes_, "residual codes (default: the preset's)");
    flags.Choice("metric", {"auto", "raw", "balanced"}, &metric_,
                 "of clustering and ranking; balanced needs the trace's q_rms");
    flags.Choice("codec", {"raw", "k8v4"}, &options_.codec, "of the records");
    flags.Int("hot_tokens", "N", &options_.hot_tokens, 0, kMaxTokens,
              "tokens per KV head that the hot cache holds");
    flags.Int("window_tokens", "N", &options_.window_tokens, 0, kMaxTokens,
              "decoded tokens that are clustered together; 0: they stay in the window");
    flags.Int("steps", "N", &options_.steps, 0, kMaxTokens,
              "tokens to decode; 0: all of the trace");
    flags.Choice("hot_policy", {"token_lru", "cluster_lru", "last_steps"}, &hot_policy_,
                 "what leaves the hot cache first");
    flags.Choice("link", {"auto", "peer", "nccl", "grpc"}, &link_, "how records travel");
    flags.String("device", "cpu|cuda[:N]", &options_.device,
                 "whose memory this worker's hot cache is in; peer and nccl need a GPU's");
    flags.Choice("state", {"fp16", "fp32"}, &state_, "element type of the attention state");
    flags.Bool(
        "compare", &compare_,
        "run clusterkv@1024, recall@128 and default@64 and print them beside full attention");
    flags.String("name", "NAME", &options_.sequence_name,
                 "of the sequence (default: one of its own)");
    flags.String("json", "FILE", &json_, "write the figures as JSON; - for standard output");
    flags.String("selections", "FILE", &options_.selections_file,
                 "write the selected positions: a line per step, layer and KV head");
    flags.String("svg", "FILE", &svg_, "write a picture of error against traffic");
    flags.Positional("TRACE.safetensors…", 1, &traces_, "trace files, the layers of one sequence");
  }

  absl::Status Run() override {
    if (absl::Status status = Interpret(); !status.ok()) return status;
    auto places = Places::Connect(server_, /*session=*/true);
    if (!places.ok()) return places.status();
    Progress progress("full attention");
    progress.Update(0, 1);
    const int threads = std::max(1u, std::min(4u, std::thread::hardware_concurrency()));
    auto trace = LoadReplayTrace(traces_, options_.steps, threads);
    if (!trace.ok()) return trace.status();
    const bool quiet = json_ == "-";
    std::vector<ReplayResult> runs;
    for (const ReplayOptions& options : Plan()) {
      const auto show = [&](std::string_view stage, int64_t done, int64_t total) {
        progress.SetTitle(options.preset + ": " + std::string(stage));
        progress.Update(done, total);
      };
      auto run = Replay(places->get(), *trace, options, show);
      if (!run.ok()) return run.status();
      runs.push_back(*std::move(run));
    }
    progress.Update(1, 1);
    if (compare_) runs.push_back(FullAttentionResult(*trace));
    if (!quiet) Print(runs);
    return WriteFiles(*trace, runs);
  }

 private:
  absl::Status Interpret() {
    if (!codes_.empty()) {
      if (absl::Status status = ParseCodes(codes_, &options_); !status.ok()) return status;
    }
    if (compare_ && options_.budget.has_value()) {
      return UsageError("--compare chooses the budgets itself: leave out --budget");
    }
    if (metric_ != "auto") {
      options_.metric = metric_ == "raw" ? v1::METRIC_RAW : v1::METRIC_BALANCED;
    }
    options_.hot_policy = hot_policy_ == "token_lru"     ? v1::HOT_CACHE_POLICY_TOKEN_LRU
                          : hot_policy_ == "cluster_lru" ? v1::HOT_CACHE_POLICY_CLUSTER_LRU
                                                         : v1::HOT_CACHE_POLICY_LAST_STEPS;
    options_.state_type = state_ == "fp32" ? v1::ELEMENT_TYPE_FLOAT32 : v1::ELEMENT_TYPE_FLOAT16;
    const bool cuda = options_.device == "cuda" || options_.device.rfind("cuda:", 0) == 0;
    if (!cuda && options_.device != "cpu") {
      return UsageError("--device: expected cpu, cuda or cuda:N, got \"" + options_.device + "\"");
    }
    if (link_ == "auto") options_.links = {v1::LINK_PEER, v1::LINK_NCCL, v1::LINK_GRPC};
    if (link_ == "peer") options_.links = {v1::LINK_PEER};
    if (link_ == "nccl") options_.links = {v1::LINK_NCCL};
    if (link_ == "grpc") options_.links = {v1::LINK_GRPC};
    return absl::OkStatus();
  }

  std::vector<ReplayOptions> Plan() const {
    if (!compare_) return {options_};
    std::vector<ReplayOptions> plan;
    const std::pair<const char*, int64_t> runs[] = {
        {"clusterkv", 1024}, {"recall", 128}, {"default", 64}};
    for (const auto& [preset, budget] : runs) {
      plan.push_back(options_);
      plan.back().preset = preset;
      plan.back().budget = budget;
    }
    return plan;
  }

  void Print(const std::vector<ReplayResult>& runs) const {
    const ReplayResult& first = runs[0];
    std::printf("%s tokens prefilled in %s, %s decoded by the %s link%s\n\n",
                HumanCount(first.prompt_tokens).c_str(),
                HumanDuration(absl::Seconds(first.ingest_seconds)).c_str(),
                HumanCount(first.steps).c_str(), first.link.c_str(),
                link_ == "auto" || first.link_reason.empty()
                    ? ""
                    : (" (" + first.link_reason + ")").c_str());
    if (compare_) {
      std::printf("%s", CompareTable(runs).c_str());
    } else {
      const LayerFigures& layer = first.layers[0];
      std::printf(
          "%s\n%s",
          Colored(layer.preset + "@" + std::to_string(layer.budget) + ", codec " + layer.codec,
                  Color::kBold)
              .c_str(),
          ReplayTable(first).c_str());
    }
    std::printf(
        "\nTokens and bytes are means per decode step, layer and KV head, sinks left out.\n");
  }

  absl::Status WriteFiles(const ReplayTrace& trace, const std::vector<ReplayResult>& runs) const {
    if (!json_.empty()) {
      if (absl::Status status = WriteFile(json_, ReplayJson(runs)); !status.ok()) return status;
    }
    if (svg_.empty()) return absl::OkStatus();
    const double record =
        2.0 * trace.shape().head_dim * kernels::ElementBytes(trace.shape().element_type);
    const double tokens = trace.prompt_tokens() + (trace.steps + 1) / 2.0;
    return WriteFile(svg_, ReplayPicture(runs, record * tokens));
  }

  PlaceFlags server_;
  ReplayOptions options_;
  std::string codes_, metric_ = "auto", hot_policy_ = "token_lru", link_ = "auto", state_ = "fp16";
  bool compare_ = false;
  std::string json_, svg_;
  std::vector<std::string> traces_;
};

}  // namespace

std::unique_ptr<Command> MakeReplayCommand() { return std::make_unique<ReplayCommand>(); }

}  // namespace clusterkv::worker::ckv
