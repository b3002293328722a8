// How decoded tokens come into a sequence, how its steady zone is read, and how it is forked.
#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "cache_service/sequence.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {

// What an append does to one layer.
struct Sequence::AppendPlan {
  int64_t layer = 0;
  PackedRows rows;                  // all of the request
  TokenSpan fresh;                  // of them, to be written
  uint64_t hash = 0;                // of rows
  std::optional<ChunkHash> logged;  // of the same tokens, put before
  StoredRows stored;                // what the others are compared with
  // The windows that take `fresh`: the one that is filling (if any), then new ones. Those that
  // become full have their part.
  std::vector<Window> windows;
  bool replaces_last = false;  // windows.front() is the layer's last window
};

absl::StatusOr<v1::AppendKvResponse> Sequence::Append(const v1::AppendKvRequest& request) {
  const CallCounter::Scope scope(services_.calls);
  absl::MutexLock append_lock(&append_mutex_);
  std::vector<AppendPlan> plans;
  CKV_RETURN_IF_ERROR(PlanAppend(request, &plans));
  for (const AppendPlan& plan : plans) {
    const TokenSpan old{plan.rows.span.begin, plan.fresh.begin};
    if (old.size() == 0) continue;
    if (plan.logged.has_value() && SameBytes(*plan.logged, plan.hash, plan.rows)) continue;
    CKV_RETURN_IF_ERROR(CompareStored(plan.layer, plan.stored, plan.rows.Sub(old, row_bytes())));
  }
  CKV_RETURN_IF_ERROR(AllocateAppend(plans));
  WriteAppend(plans);
  v1::AppendKvResponse response;
  CKV_RETURN_IF_ERROR(PublishAppend(plans, &response));
  return response;
}

absl::Status Sequence::PlanAppend(const v1::AppendKvRequest& request,
                                  std::vector<AppendPlan>* plans) {
  const TokenSpan span{request.first_token(), int64_t{request.first_token()} + request.tokens()};
  const int64_t limit = params_.prompt_tokens + params_.max_decode_tokens;
  if (span.size() == 0 || span.end > limit) {
    return FieldError(
        v1::TOKENS_OUT_OF_RANGE, "tokens",
        absl::StrCat("at least 1, up to token ", limit, ", the prompt and max_decode_tokens"),
        absl::StrCat("[", span.begin, ", ", span.end, ")"));
  }
  for (const v1::AppendKvRequest::Layer& layer : request.layers()) {
    CKV_RETURN_IF_ERROR(CheckLayer(layer.layer()));
    const bool twice = std::any_of(plans->begin(), plans->end(), [&](const AppendPlan& plan) {
      return plan.layer == layer.layer();
    });
    if (twice) {
      return FieldError(v1::INVALID_FIELD, "layers.layer", "each layer once",
                        absl::StrCat(layer.layer(), " twice"));
    }
    CKV_RETURN_IF_ERROR(CheckRows(layer.layer(), span, layer.keys(), layer.values()));
    AppendPlan& plan = plans->emplace_back();
    plan.layer = layer.layer();
    plan.rows = {span, layer.keys().data(), layer.values().data()};
    plan.hash = HashRows(layer.keys(), layer.values());
  }
  absl::MutexLock lock(&mutex_);
  CKV_RETURN_IF_ERROR(CheckReadyLocked());
  for (AppendPlan& plan : *plans) {
    const Layer& layer = layers_[static_cast<size_t>(plan.layer)];
    CKV_RETURN_IF_ERROR(CopyOf(layer.failure));
    if (span.begin > layer.end_token) {
      return Error(v1::APPEND_OUT_OF_ORDER,
                   absl::StrCat("first_token: layer ", plan.layer, ": expected at most ",
                                layer.end_token, ", got ", span.begin),
                   {{"field", "first_token"},
                    {"layer", absl::StrCat(plan.layer)},
                    {"expected", absl::StrCat(layer.end_token)},
                    {"got", absl::StrCat(span.begin)}});
    }
    plan.fresh = {std::min(layer.end_token, span.end), span.end};
    plan.logged = layer.log.Find(span);
    plan.stored = StoredLocked(layer);
    plan.replaces_last = !layer.windows.empty() && layer.windows.back().part == nullptr;
    if (plan.replaces_last) plan.windows.push_back(layer.windows.back());
  }
  return absl::OkStatus();
}

absl::Status Sequence::AllocateAppend(std::vector<AppendPlan>& plans) const {
  const int64_t limit = params_.prompt_tokens + params_.max_decode_tokens;
  const auto allocate = [&](int64_t pages) { return AllocateEvicting(MemoryUse::kWindow, pages); };
  for (AppendPlan& plan : plans) {
    int64_t at = plan.fresh.begin;
    while (at < plan.fresh.end) {
      if (plan.windows.empty() || plan.windows.back().part != nullptr) {
        const int64_t max_rows =
            params_.window_tokens > 0 ? std::min(params_.window_tokens, limit - at) : limit - at;
        plan.windows.push_back(
            {at, std::make_shared<PagedRows>(account_, MemoryUse::kWindow, row_bytes(), max_rows),
             nullptr});
      }
      Window& window = plan.windows.back();
      const int64_t full =
          params_.window_tokens > 0 ? window.first_token + params_.window_tokens : limit;
      at = std::min(plan.fresh.end, full);
      CKV_RETURN_IF_ERROR(window.rows->Grow(at - window.first_token, allocate));
      if (params_.window_tokens == 0 || at < full) continue;
      do {
        auto part = IndexPart::Allocate(account_, params_.shape, WindowIndexParams(params_),
                                        *params_.codec, window.first_token, params_.window_tokens);
        if (part.ok()) {
          window.part = *std::move(part);
        } else if (ReasonOf(part.status()) != v1::ARENA_FULL || !services_.room->EvictOne()) {
          return part.status();
        }
      } while (window.part == nullptr);
    }
  }
  return absl::OkStatus();
}

void Sequence::WriteAppend(const std::vector<AppendPlan>& plans) const {
  for (const AppendPlan& plan : plans) {
    for (const Window& window : plan.windows) {
      const TokenSpan span{std::max(window.first_token, plan.fresh.begin),
                           std::min(window.first_token + window.rows->capacity(), plan.fresh.end)};
      if (span.begin >= span.end) continue;
      const PackedRows rows = plan.rows.Sub(span, row_bytes());
      window.rows->Write(span.begin - window.first_token, span.size(), rows.keys, rows.values);
    }
  }
}

absl::Status Sequence::PublishAppend(std::vector<AppendPlan>& plans,
                                     v1::AppendKvResponse* response) {
  std::vector<int64_t> to_build;
  uint64_t bytes = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return CopyOf(end_reason_);
    for (AppendPlan& plan : plans) {
      Layer& layer = layers_[static_cast<size_t>(plan.layer)];
      if (plan.fresh.size() > 0) {
        const bool was_idle = layer.builds_done == layer.builds_queued;
        if (plan.replaces_last) layer.windows.pop_back();
        for (Window& window : plan.windows) {
          if (window.part != nullptr) ++layer.builds_queued;
          layer.windows.push_back(std::move(window));
        }
        layer.end_token = plan.fresh.end;
        layer.log.Add(plan.rows.span, {plan.hash});
        bytes += static_cast<uint64_t>(2 * plan.fresh.size() * row_bytes());
        if (was_idle && layer.builds_done != layer.builds_queued) to_build.push_back(plan.layer);
      }
      v1::AppendKvResponse::Layer& answer = *response->add_layers();
      answer.set_layer(static_cast<uint32_t>(plan.layer));
      answer.set_tokens(static_cast<uint32_t>(layer.end_token));
      answer.set_window_begin(static_cast<uint32_t>(WindowBegin(layer)));
    }
  }
  services_.counters->ingested_bytes.fetch_add(bytes);
  for (int64_t layer : to_build) QueueWindowBuild(layer);
  return absl::OkStatus();
}

// --- steady zone

absl::StatusOr<Shard::SteadyZone> Sequence::SteadyZone(int64_t layer_index) const {
  CKV_RETURN_IF_ERROR(CheckLayer(layer_index));
  const CallCounter::Scope scope(services_.calls);
  StoredRows stored;
  int64_t end_token = 0;
  {
    absl::MutexLock lock(&mutex_);
    CKV_RETURN_IF_ERROR(CheckLayerIn(layer_index));
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    stored.sinks = layer.sinks;
    if (!layer.windows.empty() && layer.windows.back().part == nullptr) {
      stored.windows.push_back(layer.windows.back());
    }
    end_token = layer.end_token;
  }
  Shard::SteadyZone zone;
  zone.heads.resize(static_cast<size_t>(params_.shape.kv_heads));
  const int64_t head_bytes =
      params_.shape.head_dim * kernels::ElementBytes(params_.shape.element_type);
  const auto copy = [&](const PagedRows& rows, int64_t first_token, int64_t count) {
    const kernels::MutablePagedView keys = rows.Keys(count), values = rows.Values(count);
    for (int64_t i = 0; i < count; ++i) {
      zone.positions.push_back(static_cast<int32_t>(first_token + i));
      for (size_t head = 0; head < zone.heads.size(); ++head) {
        const int64_t offset = static_cast<int64_t>(head) * head_bytes;
        zone.heads[head].append(reinterpret_cast<const char*>(keys.At(i) + offset), head_bytes);
        zone.heads[head].append(reinterpret_cast<const char*>(values.At(i) + offset), head_bytes);
      }
    }
  };
  if (stored.sinks != nullptr) copy(*stored.sinks, 0, sink_tokens());
  for (const Window& window : stored.windows) {
    copy(*window.rows, window.first_token, end_token - window.first_token);
  }
  return zone;
}

// --- fork

absl::StatusOr<Sequence::ForkPlan> Sequence::PlanFork(int64_t decode_tokens) const {
  ForkPlan plan;
  int64_t window_rows = 0, end_token = 0;
  {
    absl::MutexLock lock(&mutex_);
    CKV_RETURN_IF_ERROR(CheckReadyLocked());
    if (StateLocked() != v1::SEQUENCE_STATE_READY) {
      return Error(
          v1::SEQUENCE_NOT_READY,
          absl::StrCat("sequence ", identity_.name, ": expected READY, got APPENDING; try again"),
          {{"sequence", identity_.name}, {"expected", "READY"}, {"got", "APPENDING"}});
    }
    for (const Layer& source : layers_) {
      end_token = std::max(end_token, source.end_token);
      window_rows = std::max(window_rows, source.end_token - WindowBegin(source));
      Layer& layer = plan.layers.emplace_back();
      layer.received = source.received;
      layer.log = source.log;
      layer.query_rms = source.query_rms;
      layer.sinks = source.sinks;
      layer.end_token = source.end_token;
      layer.windows = source.windows;
      layer.builds_queued = layer.builds_done = 1;
      layer.snapshot = source.snapshot;
    }
  }
  plan.params = params_;
  plan.params.max_decode_tokens = end_token - params_.prompt_tokens + decode_tokens;
  CKV_ASSIGN_OR_RETURN(plan.memory, PlanDecode(plan.params, window_rows, decode_tokens,
                                               services_.arena->page_bytes()));
  return plan;
}

absl::StatusOr<std::shared_ptr<Sequence>> Sequence::Fork(
    SequenceIdentity identity, ForkPlan plan, std::shared_ptr<MemoryAccount> account) const {
  auto fork = std::make_shared<Sequence>(std::move(identity), std::move(plan.params), services_,
                                         std::move(account));
  for (Layer& layer : plan.layers) {
    if (layer.windows.empty()) continue;
    CKV_RETURN_IF_ERROR(fork->CopyWindow(layer.windows.back(), layer.end_token));
  }
  absl::MutexLock lock(&fork->mutex_);
  fork->layers_ = std::move(plan.layers);
  fork->sealed_ = true;
  return fork;
}

absl::Status Sequence::CopyWindow(Window& window, int64_t end_token) const {
  const int64_t rows = end_token - window.first_token;
  const int64_t limit = params_.prompt_tokens + params_.max_decode_tokens;
  const int64_t max_rows = params_.window_tokens > 0
                               ? std::min(params_.window_tokens, limit - window.first_token)
                               : limit - window.first_token;
  auto copy = std::make_shared<PagedRows>(account_, MemoryUse::kWindow, row_bytes(), max_rows);
  CKV_RETURN_IF_ERROR(
      copy->Grow(rows, [&](int64_t pages) { return AllocateEvicting(MemoryUse::kWindow, pages); }));
  const kernels::MutablePagedView keys = window.rows->Keys(rows),
                                  values = window.rows->Values(rows);
  for (int64_t i = 0; i < rows; ++i) {
    copy->Write(i, 1, reinterpret_cast<const char*>(keys.At(i)),
                reinterpret_cast<const char*>(values.At(i)));
  }
  window.rows = std::move(copy);
  return absl::OkStatus();
}

}  // namespace clusterkv::cache_service
