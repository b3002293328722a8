#include "cache_service/sequence.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

// Windows up to so many tokens are clustered beside queries.
constexpr int64_t kShortWindowTokens = 4096;

uint64_t DigestOf(const LayerSnapshot& snapshot) {
  if (snapshot.parts.size() == 1) return snapshot.parts.front()->digest();
  std::vector<uint64_t> digests;
  for (const auto& part : snapshot.parts) digests.push_back(part->digest());
  return digests.empty() ? 0 : XXH3_64bits(digests.data(), digests.size() * sizeof(uint64_t));
}

// `before` (may be null) with one more part.
std::shared_ptr<const LayerSnapshot> WithPart(const LayerSnapshot* before,
                                              std::shared_ptr<const PagedRows> sinks,
                                              int64_t sink_tokens,
                                              std::shared_ptr<const IndexPart> part) {
  auto after = std::make_shared<LayerSnapshot>();
  if (before != nullptr) *after = *before;
  if (before == nullptr) {
    after->sinks = std::move(sinks);
    after->sink_tokens = sink_tokens;
    after->window_begin = sink_tokens;
    after->first_cluster.push_back(0);
  }
  if (part != nullptr) {
    after->views.push_back(part->view());
    after->first_cluster.push_back(after->first_cluster.back() + part->view().clusters);
    after->window_begin = part->end_token();
    after->parts.push_back(std::move(part));
  }
  return after;
}

}  // namespace

Sequence::Sequence(SequenceIdentity identity, SequenceParams params, SequenceServices services,
                   std::shared_ptr<MemoryAccount> account)
    : identity_(std::move(identity)),
      params_(std::move(params)),
      services_(services),
      account_(std::move(account)) {
  absl::MutexLock lock(&mutex_);
  layers_.resize(static_cast<size_t>(params_.layers));
}

Sequence::~Sequence() = default;

// --- state

absl::Status Sequence::CheckLayer(int64_t layer) const {
  if (layer >= 0 && layer < params_.layers) return absl::OkStatus();
  return LayerOutOfRange(layer, params_.layers);
}

v1::SequenceState Sequence::StateLocked() const {
  if (released()) return v1::SEQUENCE_STATE_RELEASED;
  bool any = false, all = true, built = true, pending = false;
  for (const Layer& layer : layers_) {
    any |= layer.received.tokens() > 0 || !layer.claims.empty();
    all &= layer.received.tokens() == params_.prompt_tokens;
    built &= layer.clustered();
    pending |= layer.builds_queued != layer.builds_done;
  }
  if (!any) return v1::SEQUENCE_STATE_OPEN;
  if (!all) return v1::SEQUENCE_STATE_FILLING;
  if (!built || !sealed_) return v1::SEQUENCE_STATE_CLUSTERING;
  return pending ? v1::SEQUENCE_STATE_APPENDING : v1::SEQUENCE_STATE_READY;
}

v1::SequenceState Sequence::state() const {
  absl::MutexLock lock(&mutex_);
  return StateLocked();
}

absl::Status Sequence::CheckReadyLocked() const {
  if (released()) return CopyOf(end_reason_);
  const v1::SequenceState state = StateLocked();
  if (state == v1::SEQUENCE_STATE_READY || state == v1::SEQUENCE_STATE_APPENDING) {
    return absl::OkStatus();
  }
  const std::string name = v1::SequenceState_Name(state).substr(sizeof("SEQUENCE_STATE_") - 1);
  return Error(v1::SEQUENCE_NOT_READY,
               absl::StrCat("sequence ", identity_.name, ": expected READY, got ", name,
                            "; put all chunks and seal it first"),
               {{"sequence", identity_.name}, {"expected", "READY"}, {"got", name}});
}

absl::Status Sequence::CheckReady() const {
  absl::MutexLock lock(&mutex_);
  return CheckReadyLocked();
}

absl::Status Sequence::CheckLayerIn(int64_t layer_index) const {
  if (released()) return CopyOf(end_reason_);
  const Layer& layer = layers_[static_cast<size_t>(layer_index)];
  if (!layer.failure.ok()) return CopyOf(layer.failure);
  const std::vector<TokenSpan> missing = layer.received.Missing(prompt());
  if (missing.empty()) return absl::OkStatus();
  const std::string gaps = FormatSpans(missing, 8);
  return Error(v1::LAYER_NOT_READY,
               absl::StrCat("layer ", layer_index, " of sequence ", identity_.name,
                            ": tokens are missing: ", gaps),
               {{"layer", absl::StrCat(layer_index)}, {"missing", gaps}});
}

int64_t Sequence::WindowBegin(const Layer& layer) const {
  if (layer.windows.empty()) return layer.end_token;
  // A full window counts as clustered: whoever asks again waits for it.
  const Window& last = layer.windows.back();
  return last.part == nullptr ? last.first_token : layer.end_token;
}

int64_t Sequence::TokensLocked() const {
  int64_t tokens = INT64_MAX;
  for (const Layer& layer : layers_) {
    tokens = std::min(tokens, std::max(layer.received.tokens(), layer.end_token));
  }
  return tokens;
}

int64_t Sequence::tokens() const {
  absl::MutexLock lock(&mutex_);
  return TokensLocked();
}

bool Sequence::quiet() const {
  absl::MutexLock lock(&mutex_);
  return seal_waiters_.empty() &&
         std::all_of(layers_.begin(), layers_.end(), [](const Layer& layer) {
           return layer.builds_queued == layer.builds_done && layer.claims.empty();
         });
}

// --- reading

Sequence::SnapshotOr Sequence::Snapshot(int64_t layer_index) const {
  CKV_RETURN_IF_ERROR(CheckLayer(layer_index));
  absl::MutexLock lock(&mutex_);
  CKV_RETURN_IF_ERROR(CheckLayerIn(layer_index));
  const Layer& layer = layers_[static_cast<size_t>(layer_index)];
  if (layer.snapshot != nullptr) return layer.snapshot;
  return Error(
      v1::LAYER_NOT_READY,
      absl::StrCat("layer ", layer_index, " of sequence ", identity_.name, " is being clustered"),
      {{"layer", absl::StrCat(layer_index)}});
}

void Sequence::WhenBuilt(int64_t layer_index, std::function<void(SnapshotOr)> then) {
  absl::Status status = CheckLayer(layer_index);
  std::shared_ptr<const LayerSnapshot> snapshot;
  if (status.ok()) {
    absl::MutexLock lock(&mutex_);
    Layer& layer = layers_[static_cast<size_t>(layer_index)];
    status = CheckLayerIn(layer_index);
    if (status.ok() && layer.builds_done < layer.builds_queued) {
      layer.waiters.push_back({layer.builds_queued, std::move(then)});
      return;
    }
    snapshot = layer.snapshot;
  }
  then(status.ok() ? SnapshotOr(std::move(snapshot)) : SnapshotOr(std::move(status)));
}

Sequence::Holdings Sequence::holdings() const {
  Holdings holdings;
  absl::MutexLock lock(&mutex_);
  const auto add_rows = [&](const std::shared_ptr<PagedRows>& rows) {
    if (rows != nullptr) holdings.rows.push_back(rows);
  };
  for (const Layer& layer : layers_) {
    add_rows(layer.sinks);
    add_rows(layer.staging);
    for (const Window& window : layer.windows) {
      add_rows(window.rows);
      if (window.part != nullptr) holdings.parts.push_back(window.part);
    }
    if (layer.snapshot == nullptr) continue;
    const auto& parts = layer.snapshot->parts;
    holdings.parts.insert(holdings.parts.end(), parts.begin(), parts.end());
  }
  return holdings;
}

int64_t Sequence::held_pages() const {
  // Counted under the lock and not from a copy: a copy would keep pages from those who evict.
  absl::MutexLock lock(&mutex_);
  int64_t pages = 0;
  const auto add_part = [&](const IndexPart& part) {
    pages += static_cast<int64_t>(part.block().pages().size());
  };
  for (const Layer& layer : layers_) {
    if (layer.sinks != nullptr) pages += layer.sinks->page_count();
    if (layer.staging != nullptr) pages += layer.staging->page_count();
    for (const Window& window : layer.windows) {
      pages += window.rows->page_count();
      if (window.part != nullptr) add_part(*window.part);
    }
    if (layer.snapshot == nullptr) continue;
    for (const auto& part : layer.snapshot->parts) add_part(*part);
  }
  return pages;
}

v1::Sequence Sequence::ToProto(bool with_layers) const {
  v1::Sequence proto;
  proto.mutable_handle()->set_name(identity_.name);
  proto.mutable_handle()->set_generation(identity_.generation);
  proto.mutable_handle()->set_boot_id(identity_.boot_id);
  *proto.mutable_shape() = ShapeToProto(params_);
  proto.set_prompt_tokens(static_cast<uint32_t>(params_.prompt_tokens));
  proto.set_preset(params_.preset);
  *proto.mutable_index() = IndexConfigOf(params_);
  *proto.mutable_select() = SelectConfigOf(params_);
  proto.set_codec(std::string(params_.codec->name()));
  proto.set_bytes(static_cast<uint64_t>(held_pages() * services_.arena->page_bytes()));
  proto.set_attachments(static_cast<uint32_t>(attachments.load()));
  proto.set_record_bytes(static_cast<uint32_t>(
      params_.codec->RecordBytes(params_.shape.element_type, params_.shape.head_dim)));
  absl::MutexLock lock(&mutex_);
  proto.set_state(StateLocked());
  proto.set_tokens(static_cast<uint32_t>(TokensLocked()));
  for (size_t i = 0; with_layers && i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    v1::LayerInfo& info = *proto.add_layers();
    const bool all_in = layer.received.tokens() == params_.prompt_tokens;
    info.set_layer(static_cast<uint32_t>(i));
    info.set_state(!all_in                     ? v1::LAYER_STATE_FILLING
                   : layer.snapshot == nullptr ? v1::LAYER_STATE_CLUSTERING
                                               : v1::LAYER_STATE_READY);
    info.set_tokens(static_cast<uint32_t>(std::max(layer.received.tokens(), layer.end_token)));
    if (layer.snapshot == nullptr) continue;
    info.set_clusters(static_cast<uint32_t>(layer.snapshot->first_cluster.back()));
    info.set_window_begin(static_cast<uint32_t>(WindowBegin(layer)));
    info.set_index_digest(DigestOf(*layer.snapshot));
  }
  return proto;
}

// --- builds

void Sequence::QueuePromptBuild(int64_t layer) {
  const int64_t scratch = IndexPart::TaskScratchBytes(params_.shape, params_.index,
                                                      params_.prompt_tokens - sink_tokens());
  services_.executors->ScheduleBuild(
      Executors::BuildLength::kLong, scratch,
      [self = shared_from_this(), layer](kernels::ParallelFor parallel_for) {
        self->BuildPrompt(layer, parallel_for);
      });
}

void Sequence::BuildPrompt(int64_t layer_index, kernels::ParallelFor parallel_for) {
  StoredRows stored;
  std::vector<float> query_rms;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    stored = StoredLocked(layer);
    query_rms = layer.query_rms;
  }
  auto part = ClusterPrompt(stored, query_rms, parallel_for);
  stored = StoredRows();  // who is answered finds the memory free
  PublishBuild(layer_index, std::move(part), /*is_window=*/false);
}

absl::Status Sequence::SealSinks(const StoredRows& stored) {
  ShardDevice* const device = services_.device;
  for (const PageBlock& block : stored.sinks->blocks()) {
    if (stored.on_device) {
      if (!device->healthy() || !device->Fetch(block.pages()).ok()) return DeviceLost();
    } else if (device != nullptr && device->healthy()) {
      // A failure is the device's end, after which the host answers.
      device->Upload(block.pages()).IgnoreError();
    }
  }
  stored.sinks->Seal();
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const IndexPart>> Sequence::ClusterPrompt(
    const StoredRows& stored, absl::Span<const float> query_rms,
    kernels::ParallelFor parallel_for) {
  if (stored.sinks != nullptr) CKV_RETURN_IF_ERROR(SealSinks(stored));
  const int64_t first = sink_tokens(), tokens = params_.prompt_tokens - first;
  if (tokens == 0) return std::shared_ptr<const IndexPart>();
  CKV_ASSIGN_OR_RETURN(
      std::shared_ptr<IndexPart> part,
      IndexPart::Allocate(account_, params_.shape, params_.index, *params_.codec, first, tokens));
  kernels::IndexInput input;
  input.keys = stored.staging->Keys(tokens);
  input.values = stored.staging->Values(tokens);
  if (params_.metric == v1::METRIC_BALANCED) input.query_rms = query_rms;
  CKV_RETURN_IF_ERROR(part->Build(input, parallel_for, services_.device, nullptr,
                                  stored.on_device ? absl::MakeConstSpan(stored.staging->blocks())
                                                   : absl::Span<const PageBlock>()));
  return part;
}

void Sequence::QueueWindowBuild(int64_t layer) {
  const bool is_short = params_.window_tokens <= kShortWindowTokens;
  const int64_t scratch =
      IndexPart::TaskScratchBytes(params_.shape, WindowIndexParams(params_), params_.window_tokens);
  services_.executors->ScheduleBuild(
      is_short ? Executors::BuildLength::kShort : Executors::BuildLength::kLong, scratch,
      [self = shared_from_this(), layer](kernels::ParallelFor parallel_for) {
        self->BuildWindow(layer, parallel_for);
      });
}

void Sequence::BuildWindow(int64_t layer_index, kernels::ParallelFor parallel_for) {
  Window window;
  std::shared_ptr<const LayerSnapshot> snapshot;
  std::vector<float> query_rms;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    window = layer.windows.front();
    snapshot = layer.snapshot;
    query_rms = layer.query_rms;
  }
  kernels::IndexInput input;
  input.keys = window.rows->Keys(params_.window_tokens);
  input.values = window.rows->Values(params_.window_tokens);
  // All parts of a layer share the metric and balances of its first one.
  const kernels::PagedView* channels =
      snapshot->parts.empty() ? nullptr : &snapshot->views.front().channels;
  input.inherited_channels = channels;
  if (channels == nullptr && params_.metric == v1::METRIC_BALANCED) input.query_rms = query_rms;
  absl::StatusOr<std::shared_ptr<const IndexPart>> part = window.part;
  const IndexPart* first = channels == nullptr ? nullptr : snapshot->parts.front().get();
  if (absl::Status status = window.part->Build(input, parallel_for, services_.device, first);
      !status.ok()) {
    part = status;
  }
  window = Window();  // who is answered finds the memory free
  snapshot.reset();
  PublishBuild(layer_index, std::move(part), /*is_window=*/true);
}

void Sequence::PublishBuild(int64_t layer, absl::StatusOr<std::shared_ptr<const IndexPart>> part,
                            bool is_window) {
  if (TakeBuild(layer, std::move(part), is_window)) CountBuild(layer);
}

bool Sequence::TakeBuild(int64_t layer_index, absl::StatusOr<std::shared_ptr<const IndexPart>> part,
                         bool is_window) {
  std::shared_ptr<PagedRows> freed;  // outside the lock
  bool all_clustered = false;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return false;
    Layer& layer = layers_[static_cast<size_t>(layer_index)];
    if (!part.ok()) {
      layer.failure = part.status();
    } else {
      layer.snapshot = WithPart(layer.snapshot.get(), layer.sinks, sink_tokens(), *std::move(part));
      if (is_window) {
        freed = std::move(layer.windows.front().rows);
        layer.windows.pop_front();
      } else {
        freed = std::move(layer.staging);
      }
    }
    all_clustered = !is_window && std::all_of(layers_.begin(), layers_.end(), [](const Layer& one) {
      return one.snapshot != nullptr;
    });
  }
  freed.reset();
  if (all_clustered) account_->Waive(MemoryUse::kStaging);
  return true;
}

void Sequence::CountBuild(int64_t layer_index) {
  std::vector<Waiter> waiters;
  std::vector<SealWaiter> seal_waiters;
  absl::Status layer_status, seal_status;
  std::shared_ptr<const LayerSnapshot> snapshot;
  bool build_next = false;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return;
    Layer& layer = layers_[static_cast<size_t>(layer_index)];
    ++layer.builds_done;
    build_next = layer.failure.ok() && layer.builds_done < layer.builds_queued;
    layer_status = CopyOf(layer.failure);
    waiters = TakeWaiters(layer);
    // A copy that nobody waits for would keep pages from those who evict.
    if (!waiters.empty()) snapshot = layer.snapshot;
    seal_waiters = TakeSealWaiters(&seal_status);
  }
  if (build_next) QueueWindowBuild(layer_index);
  while (!waiters.empty()) {
    const Waiter waiter = std::move(waiters.front());
    waiters.erase(waiters.begin());
    // The last one gets the only copy: pages are not held here once all are answered.
    SnapshotOr answer = waiters.empty() ? std::move(snapshot) : snapshot;
    waiter.then(layer_status.ok() ? std::move(answer) : SnapshotOr(CopyOf(layer_status)));
  }
  if (seal_waiters.empty()) return;
  const v1::Sequence proto = ToProto(/*with_layers=*/true);
  for (SealWaiter& waiter : seal_waiters) {
    waiter.done(seal_status.ok() ? absl::StatusOr<v1::Sequence>(proto)
                                 : absl::StatusOr<v1::Sequence>(CopyOf(seal_status)));
  }
}

std::vector<Sequence::Waiter> Sequence::TakeWaiters(Layer& layer) {
  std::vector<Waiter> taken;
  while (!layer.waiters.empty() &&
         (!layer.failure.ok() || layer.waiters.front().build <= layer.builds_done)) {
    taken.push_back(std::move(layer.waiters.front()));
    layer.waiters.pop_front();
  }
  return taken;
}

std::vector<Sequence::SealWaiter> Sequence::TakeSealWaiters(absl::Status* status) {
  bool built = true;
  for (const Layer& layer : layers_) {
    built &= layer.clustered();
    if (!layer.failure.ok()) *status = CopyOf(layer.failure);
  }
  if (!built && status->ok()) return {};
  return std::exchange(seal_waiters_, {});
}

// --- life

void Sequence::End(const absl::Status& reason) {
  CKV_CHECK(!reason.ok());
  const CallCounter::Scope scope(services_.calls);
  std::vector<Layer> layers;
  std::vector<SealWaiter> seal_waiters;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return;
    end_reason_ = CopyOf(reason);
    ended_.store(true);
    layers = std::exchange(layers_, std::vector<Layer>(layers_.size()));
    seal_waiters = std::exchange(seal_waiters_, {});
  }
  account_->Close();
  for (Layer& layer : layers) {
    for (Waiter& waiter : layer.waiters) waiter.then(CopyOf(reason));
  }
  for (SealWaiter& waiter : seal_waiters) waiter.done(CopyOf(reason));
}

// --- the log of chunks

void Sequence::ChunkLog::Add(TokenSpan span, ChunkHash hash) {
  hashes_.insert_or_assign({span.begin, span.end}, hash);
  if (hashes_.size() > kMaxEntries) hashes_.erase(hashes_.begin());
}

std::optional<Sequence::ChunkHash> Sequence::ChunkLog::Find(TokenSpan span) const {
  const auto it = hashes_.find({span.begin, span.end});
  if (it == hashes_.end()) return std::nullopt;
  return it->second;
}

}  // namespace clusterkv::cache_service
