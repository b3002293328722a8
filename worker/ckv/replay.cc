#include "worker/ckv/replay.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>

#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "worker/ckv/connection.h"
#include "worker/ckv/prefill.h"
#include "worker/decode_session.h"

namespace clusterkv::worker::ckv {
namespace {

constexpr int64_t kWarmSteps = 2;  // figures per step count from the third step on

std::string Hex(uint64_t digest) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(digest));
  return text;
}

std::string UniqueName() {
  static std::atomic<int> count{0};
  return "ckv-replay-" + std::to_string(getpid()) + "-" + std::to_string(count.fetch_add(1));
}

absl::Status CheckLayersFit(const std::vector<TraceLayer>& layers,
                            const std::vector<std::string>& names) {
  const auto text = [](const TraceLayer& layer) {
    return std::to_string(layer.tokens) + " tokens, " + std::to_string(layer.queries) +
           " queries, " + std::to_string(layer.shape.kv_heads) + " KV heads, " +
           std::to_string(layer.shape.query_heads) + " query heads of " +
           std::to_string(layer.shape.head_dim) + " " +
           std::string(kernels::ElementTypeName(layer.shape.element_type));
  };
  const TraceLayer& first = layers[0];
  for (size_t i = 1; i < layers.size(); ++i) {
    const bool same = layers[i].shape == first.shape && layers[i].tokens == first.tokens &&
                      layers[i].queries == first.queries;
    if (!same) {
      return absl::InvalidArgumentError("the traces are not layers of one sequence: " + names[i] +
                                        " has " + text(layers[i]) + ", but " + names[0] + " has " +
                                        text(first));
    }
  }
  if (first.queries < 1 || first.tokens <= first.queries) {
    return absl::InvalidArgumentError(names[0] +
                                      " has nothing to prefill or to decode: " + text(first));
  }
  return absl::OkStatus();
}

v1::OpenSequenceRequest OpenRequest(const ReplayTrace& trace, const ReplayOptions& options) {
  v1::OpenSequenceRequest request;
  request.set_name(options.sequence_name.empty() ? UniqueName() : options.sequence_name);
  v1::KvShape& shape = *request.mutable_shape();
  shape.set_layers(trace.layers.size());
  shape.set_kv_heads(trace.shape().kv_heads);
  shape.set_query_heads(trace.shape().query_heads);
  shape.set_head_dim(trace.shape().head_dim);
  shape.set_element_type(static_cast<v1::ElementType>(trace.shape().element_type));
  request.set_prompt_tokens(trace.prompt_tokens());
  request.set_max_decode_tokens(trace.steps);
  request.set_preset(options.preset);
  request.set_codec(options.codec);
  request.mutable_index()->set_window_tokens(options.window_tokens);
  request.mutable_index()->set_metric(options.metric);
  if (options.code_bits.has_value()) {
    request.mutable_index()->mutable_codes()->set_bits(*options.code_bits);
    request.mutable_index()->mutable_codes()->set_group_channels(options.code_group);
  }
  if (options.budget.has_value()) request.mutable_select()->set_budget_tokens(*options.budget);
  if (options.coded_tokens.has_value()) {
    request.mutable_select()->set_coded_tokens(*options.coded_tokens);
  }
  return request;
}

// Streams the prompt in, layer by layer, and seals.
absl::StatusOr<v1::Sequence> Prefill(Client* client, const ReplayTrace& trace,
                                     const v1::Sequence& opened, const ReplayProgress& progress) {
  CKV_ASSIGN_OR_RETURN(auto writer, PrefillWriter::Create(client, opened));
  const int64_t layers = static_cast<int64_t>(trace.layers.size());
  for (int64_t l = 0; l < layers; ++l) {
    if (progress) progress("prefill", l, layers);
    CKV_RETURN_IF_ERROR(PutPrompt(writer.get(), l, trace.layers[l], trace.prompt_tokens()));
  }
  if (progress) progress("cluster", layers, layers);
  return writer->Finish();
}

// Sums over the steps of one layer.
struct LayerSums {
  double difference = 0, full = 0;  // squares
  double mass = 0;
  StepFigures figures;  // of the steps from the third on
  std::vector<double> select_us, recall_us;
};

// Decodes all steps through one session and compares each with full attention.
class Decoder {
 public:
  // selections: where what was selected is written; may be null.
  Decoder(const ReplayTrace& trace, DecodeSession* session, int64_t sinks, std::ostream* selections)
      : trace_(trace),
        session_(session),
        sinks_(sinks),
        selections_(selections),
        sums_(trace.layers.size()) {}

  absl::Status Run(const ReplayProgress& progress) {
    for (int64_t i = 0; i < trace_.steps; ++i) {
      if (progress) progress("decode", i, trace_.steps);
      for (size_t l = 0; l < trace_.layers.size(); ++l) CKV_RETURN_IF_ERROR(Step(i, l));
    }
    return absl::OkStatus();
  }

  const LayerSums& sums(size_t layer) const { return sums_[layer]; }
  double seconds() const { return absl::ToDoubleSeconds(busy_); }

 private:
  absl::Status Step(int64_t i, size_t l) {
    const TraceLayer& layer = trace_.layers[l];
    const int64_t token_bytes = layer.keys.size() / layer.tokens;
    const int64_t query_bytes = layer.q.size() / layer.queries;
    const int64_t row = layer.shape.query_heads * layer.shape.head_dim;
    const int64_t at = (trace_.prompt_tokens() + i) * token_bytes;
    output_.resize(row);
    StepFigures figures;
    const absl::Time begin = absl::Now();
    CKV_RETURN_IF_ERROR(
        session_->Append(l, absl::MakeConstSpan(layer.keys).subspan(at, token_bytes),
                         absl::MakeConstSpan(layer.values).subspan(at, token_bytes)));
    CKV_RETURN_IF_ERROR(
        session_->Step(l, absl::MakeConstSpan(layer.q).subspan(i * query_bytes, query_bytes),
                       absl::MakeSpan(output_), &figures));
    busy_ += absl::Now() - begin;
    if (selections_ != nullptr) WriteSelections(i, l);
    Compare(i, l);
    sums_[l].mass += ExactMass(i, l);
    Count(i, figures, &sums_[l]);
    return absl::OkStatus();
  }

  void WriteSelections(int64_t i, size_t l) {
    const auto& heads = session_->last_positions(static_cast<int64_t>(l));
    for (size_t h = 0; h < heads.size(); ++h) {
      *selections_ << i << " " << l << " " << h << ":";
      for (const int32_t position : heads[h]) *selections_ << " " << position;
      *selections_ << "\n";
    }
  }

  void Compare(int64_t i, size_t l) {
    const float* full = trace_.full[l].output.data() + i * output_.size();
    for (size_t k = 0; k < output_.size(); ++k) {
      const double difference = static_cast<double>(output_[k]) - full[k];
      sums_[l].difference += difference * difference;
      sums_[l].full += static_cast<double>(full[k]) * full[k];
    }
  }

  // Mean over the query heads of full attention's weight on sinks, exact zone and window.
  double ExactMass(int64_t i, size_t l) {
    const kernels::KvShape& shape = trace_.shape();
    const auto& positions = session_->last_positions(l);
    const auto& masks = session_->last_head_masks(l);
    double mass = 0;
    for (int64_t q = 0; q < shape.query_heads; ++q) {
      const int64_t h = q / shape.group(), g = q % shape.group();
      attended_.clear();
      for (int64_t t = 0; t < sinks_; ++t) attended_.push_back(t);
      for (size_t k = 0; k < positions[h].size(); ++k) {
        const bool all = static_cast<size_t>(h) >= masks.size() || masks[h].empty();
        if (all || (masks[h][k] >> g & 1u) != 0) attended_.push_back(positions[h][k]);
      }
      for (int64_t t = session_->window_begin(l); t <= trace_.prompt_tokens() + i; ++t) {
        attended_.push_back(t);
      }
      const int64_t at = i * shape.query_heads + q;
      mass += AttentionWeight(trace_.kv[l], h, trace_.queries[l].data() + at * shape.head_dim,
                              trace_.full[l].lse[at], attended_);
    }
    return mass / static_cast<double>(shape.query_heads);
  }

  void Count(int64_t i, const StepFigures& figures, LayerSums* sums) const {
    sums->select_us.push_back(figures.select_us);
    sums->recall_us.push_back(figures.recall_us);
    if (i < kWarmSteps && trace_.steps > kWarmSteps) return;
    sums->figures.exact_tokens += figures.exact_tokens;
    sums->figures.recalled_tokens += figures.recalled_tokens;
    sums->figures.recalled_bytes += figures.recalled_bytes;
    sums->figures.state_bytes += figures.state_bytes;
    sums->figures.correction_bytes += figures.correction_bytes;
    sums->figures.hits += figures.hits;
  }

  const ReplayTrace& trace_;
  DecodeSession* session_;
  int64_t sinks_;
  std::ostream* selections_;
  std::vector<LayerSums> sums_;
  std::vector<float> output_;
  std::vector<int32_t> attended_;
  absl::Duration busy_;
};

// All KV that the trace's layers have at the end of the decode.
double FullBytes(const ReplayTrace& trace) {
  return 2.0 * (trace.prompt_tokens() + trace.steps) * trace.shape().kv_heads *
         trace.shape().head_dim * kernels::ElementBytes(trace.shape().element_type) *
         trace.layers.size();
}

LayerFigures MakeFigures(const ReplayTrace& trace, const v1::Sequence& sequence, size_t layer,
                         const LayerSums& sums, const DecodeSession& session) {
  const int64_t counted = trace.steps > kWarmSteps ? trace.steps - kWarmSteps : trace.steps;
  const double per_step = 1.0 / static_cast<double>(counted * trace.shape().kv_heads);
  const StepFigures& total = sums.figures;
  LayerFigures figures;
  figures.layer = static_cast<int64_t>(layer);
  figures.trace = trace.names[layer];
  figures.preset = sequence.preset();
  figures.budget = sequence.select().budget_tokens();
  figures.codec = sequence.codec();
  figures.mass = sums.mass / static_cast<double>(trace.steps);
  figures.output_error = std::sqrt(sums.difference / sums.full);
  figures.exact_tokens_per_step = total.exact_tokens * per_step;
  figures.recalled_tokens_per_step = total.recalled_tokens * per_step;
  figures.recalled_bytes_per_step = total.recalled_bytes * per_step;
  figures.state_bytes_per_step = total.state_bytes * per_step;
  figures.correction_bytes_per_step = total.correction_bytes * per_step;
  figures.hit_rate =
      total.exact_tokens == 0 ? 0 : static_cast<double>(total.hits) / total.exact_tokens;
  figures.held_fraction = static_cast<double>(session.held_bytes()) / FullBytes(trace);
  figures.select_us = PercentilesOf(sums.select_us);
  figures.recall_us = PercentilesOf(sums.recall_us);
  for (const v1::LayerInfo& info : sequence.layers()) {
    if (info.layer() == layer) figures.index_digest = Hex(info.index_digest());
  }
  const LayerDigests digests = session.digests(static_cast<int64_t>(layer));
  figures.selection_digest = Hex(digests.selection);
  figures.state_digest = Hex(digests.state);
  figures.correction_digest = Hex(digests.correction);
  figures.recalled_digest = Hex(digests.recalled);
  return figures;
}

}  // namespace

Percentiles PercentilesOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double quantile) {
    const size_t rank = static_cast<size_t>(std::ceil(quantile * values.size()));
    return values[std::clamp<size_t>(rank, 1, values.size()) - 1];
  };
  return {at(0.50), at(0.99)};
}

absl::StatusOr<ReplayTrace> LoadReplayTrace(const std::vector<std::string>& paths, int64_t steps,
                                            int threads) {
  std::vector<TraceLayer> layers;
  std::vector<std::string> names;
  for (const std::string& path : paths) {
    auto layer = ReadTraceLayer(path);
    if (!layer.ok()) {
      return absl::Status(layer.status().code(),
                          path + ": " + std::string(layer.status().message()));
    }
    layers.push_back(*std::move(layer));
    names.push_back(std::filesystem::path(path).stem().string());
  }
  return MakeReplayTrace(std::move(layers), std::move(names), steps, threads);
}

absl::StatusOr<ReplayTrace> MakeReplayTrace(std::vector<TraceLayer> layers,
                                            std::vector<std::string> names, int64_t steps,
                                            int threads) {
  if (layers.empty()) return absl::InvalidArgumentError("no trace is given");
  CKV_RETURN_IF_ERROR(CheckLayersFit(layers, names));
  ReplayTrace trace;
  trace.layers = std::move(layers);
  trace.names = std::move(names);
  const kernels::KvShape& shape = trace.shape();
  const int64_t queries = trace.layers[0].queries;
  trace.steps = steps <= 0 ? queries : std::min(steps, queries);
  for (const TraceLayer& layer : trace.layers) {
    trace.kv.push_back(MakeFloatKv(shape, layer.tokens, layer.keys, layer.values));
    std::vector<float> rows(trace.steps * shape.query_heads * shape.head_dim);
    kernels::ToFloat(layer.q.data(), shape.element_type, static_cast<int64_t>(rows.size()),
                     rows.data());
    trace.full.push_back(
        ComputeFullAttention(trace.kv.back(), rows, trace.prompt_tokens(), threads));
    trace.queries.push_back(std::move(rows));
  }
  return trace;
}

absl::StatusOr<ReplayResult> Replay(Places* places, const ReplayTrace& trace,
                                    const ReplayOptions& options, const ReplayProgress& progress) {
  CKV_ASSIGN_OR_RETURN(const PlacedSequence placed,
                       places->OpenSequence(OpenRequest(trace, options)));
  Client* const client = placed.client;
  const v1::Sequence& opened = placed.sequence;
  SequenceGuard guard(client, opened.handle());
  const absl::Time begin = absl::Now();
  CKV_ASSIGN_OR_RETURN(const v1::Sequence sequence, Prefill(client, trace, opened, progress));
  ReplayResult result;
  result.ingest_seconds = absl::ToDoubleSeconds(absl::Now() - begin);

  DecodeOptions decode;
  decode.hot_cache.set_policy(options.hot_policy);
  decode.hot_cache.set_capacity_tokens(options.hot_tokens);
  decode.state_type = options.state_type;
  decode.links = options.links;
  decode.device = options.device;
  decode.digests = true;
  CKV_ASSIGN_OR_RETURN(auto session, DecodeSession::Attach(client, sequence.handle(), decode));
  std::ofstream selections;
  if (!options.selections_file.empty()) selections.open(options.selections_file);
  Decoder decoder(trace, session.get(), sequence.index().sink_tokens(),
                  selections.is_open() ? &selections : nullptr);
  CKV_RETURN_IF_ERROR(decoder.Run(progress));

  for (size_t l = 0; l < trace.layers.size(); ++l) {
    result.layers.push_back(MakeFigures(trace, sequence, l, decoder.sums(l), *session));
  }
  result.prompt_tokens = trace.prompt_tokens();
  result.steps = trace.steps;
  result.record_bytes = sequence.record_bytes();
  result.decode_seconds = decoder.seconds();
  result.link = LinkName(session->link());
  result.link_reason = session->link_reason();
  session.reset();
  CKV_RETURN_IF_ERROR(guard.Release());
  return result;
}

ReplayResult FullAttentionResult(const ReplayTrace& trace) {
  ReplayResult result;
  result.prompt_tokens = trace.prompt_tokens();
  result.steps = trace.steps;
  for (size_t l = 0; l < trace.layers.size(); ++l) {
    LayerFigures figures;
    figures.layer = static_cast<int64_t>(l);
    figures.trace = trace.names[l];
    figures.preset = "full";
    figures.budget = trace.prompt_tokens() + trace.steps;
    figures.codec = "raw";
    figures.mass = 1;
    figures.exact_tokens_per_step = trace.prompt_tokens() + (trace.steps + 1) / 2.0;
    figures.hit_rate = 1;
    figures.held_fraction = 1;
    result.layers.push_back(figures);
  }
  return result;
}

}  // namespace clusterkv::worker::ckv
