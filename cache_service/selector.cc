#include "cache_service/selector.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cache_service/errors.h"
#include "cache_service/recall.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using kernels::HeadSelection;

// Work that one thread does by itself: it is done before others have woken up to help (some 50 us).
constexpr int64_t kWorkAlone = int64_t{1} << 20;

// Sinks' keys of one head as one strided run, which the kernel wants. Copied only when they lie in
// several pages.
class SinkKeys {
 public:
  SinkKeys(const LayerSnapshot& layer, const kernels::KvShape& shape, int64_t head) {
    if (layer.sinks == nullptr) return;
    const int64_t head_bytes = shape.head_dim * kernels::ElementBytes(shape.element_type);
    const kernels::MutablePagedView view = layer.sinks->Keys(layer.sink_tokens);
    if (layer.sink_tokens <= view.elements_per_page) {
      keys_ = view.At(0) + head * head_bytes;
      stride_bytes_ = view.element_bytes;
      return;
    }
    copy_.resize(static_cast<size_t>(layer.sink_tokens * head_bytes));
    for (int64_t i = 0; i < layer.sink_tokens; ++i) {
      std::memcpy(copy_.data() + i * head_bytes, view.At(i) + head * head_bytes,
                  static_cast<size_t>(head_bytes));
    }
    keys_ = copy_.data();
    stride_bytes_ = head_bytes;
  }
  const std::byte* keys() const { return keys_; }
  int64_t stride_bytes() const { return stride_bytes_; }

 private:
  std::vector<std::byte> copy_;
  const std::byte* keys_ = nullptr;
  int64_t stride_bytes_ = 0;
};

int64_t TokensOfClusters(const LayerSnapshot& layer, int64_t head,
                         const std::vector<int32_t>& clusters) {
  int64_t tokens = 0;
  size_t part = 0;
  for (int32_t cluster : clusters) {
    if (cluster < layer.first_cluster[part] || cluster >= layer.first_cluster[part + 1]) {
      const auto after =
          std::upper_bound(layer.first_cluster.begin(), layer.first_cluster.end(), cluster);
      part = static_cast<size_t>(after - layer.first_cluster.begin() - 1);
    }
    const kernels::IndexPartView& view = layer.views[part];
    const int64_t at = head * (view.clusters + 1) + cluster - layer.first_cluster[part];
    tokens += *view.cluster_begin.As<int32_t>(at + 1) - *view.cluster_begin.As<int32_t>(at);
  }
  return tokens;
}

int64_t RemainderBytes(const SequenceParams& params) {
  return params.codec->RemainderBytes(params.shape.element_type, params.shape.head_dim);
}

float LogitScale(const kernels::KvShape& shape) {
  return 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
}

// Those of the KV head's group.
absl::Span<const float> QueriesOf(const SelectCall& call, const kernels::KvShape& shape,
                                  int64_t head) {
  const int64_t numbers = shape.group() * shape.head_dim;
  return absl::MakeConstSpan(call.queries)
      .subspan(static_cast<size_t>(head * numbers), static_cast<size_t>(numbers));
}

// What a kernel that was given a checked call answers.
absl::Status KernelStatus(const absl::Status& status) {
  if (absl::IsInvalidArgument(status)) {  // finite queries, but their logits are not
    return Error(v1::NON_FINITE_QUERY, std::string(status.message()), {{"field", "queries"}});
  }
  if (!status.ok()) return Error(v1::INTERNAL_ERROR, std::string(status.message()));
  return absl::OkStatus();
}

}  // namespace

DeviceSelectItem DeviceItemOf(const LayerSnapshot& layer, const SequenceParams& params,
                              const kernels::SelectParams& select) {
  DeviceSelectItem item;
  item.shape = params.shape;
  item.codes = params.index.codes;
  item.select = select;
  for (const auto& part : layer.parts) item.parts.push_back(part->device_part());
  item.first_cluster = layer.first_cluster;
  item.clustered_tokens = layer.window_begin - layer.sink_tokens;
  if (layer.sinks != nullptr) {
    item.sink_tokens = layer.sink_tokens;
    item.sink_keys = layer.sinks->Keys(layer.sink_tokens);
  }
  return item;
}

struct Selector::Item {
  SelectCall call;
  SelectAnswer* answer = nullptr;
  SequenceRef sequence;
  std::shared_ptr<Attachment> attachment;  // null for calls by sequence
  kernels::SelectParams select;
  LayerResidency* residency = nullptr;  // not null: entered, to be left
  std::shared_ptr<const LayerSnapshot> snapshot;
  std::vector<absl::Status> head_status;
  std::atomic<int64_t> heads_left{0};
};

struct Selector::Batch {
  std::deque<Item> items;
  CallContext context;
  std::function<void(SelectBatchAnswer)> done;
  SelectBatchAnswer answer;
  const absl::Time created = absl::Now();
  std::atomic<int64_t> items_left{0};
  std::atomic<int64_t> refine_ns{0};    // of all heads, on the host
  std::atomic<int64_t> started_us{-1};  // after creation: when the first head's work began
  absl::Mutex mutex;
  bool collecting ABSL_GUARDED_BY(mutex) = true;
  std::vector<Item*> ready ABSL_GUARDED_BY(mutex);  // while collecting: may run at once
};

// --- queueing

void Selector::Select(std::vector<SelectCall> calls, const CallContext& context, bool inline_ok,
                      std::function<void(SelectBatchAnswer)> done) {
  auto batch = std::make_shared<Batch>();
  batch->context = context;
  batch->done = std::move(done);
  const size_t count = calls.size();
  batch->answer.items.resize(count);
  if (count == 0) return batch->done(std::move(batch->answer));
  batch->items_left.store(static_cast<int64_t>(count) + 1);  // one for this function
  const bool admitted = Admit(static_cast<int64_t>(count));
  const absl::Status context_status = CheckContext(context, batch->created);
  for (size_t i = 0; i < count; ++i) {
    Item& item = batch->items.emplace_back();
    item.call = std::move(calls[i]);
    item.answer = &batch->answer.items[i];
  }
  for (Item& item : batch->items) {
    absl::Status status = CopyOf(context_status);
    if (!admitted) {
      status = LimitError("max_queued_selects", options_.max_queued_selects,
                          executors_.queued_selects.load());
    }
    if (status.ok() && executors_.stopping()) status = ServerEnding();
    if (status.ok()) status = Resolve(item);
    if (!status.ok()) {
      Finish(batch, item, std::move(status));
      continue;
    }
    if (item.residency == nullptr) {
      Begin(batch, item);
    } else {
      item.residency->Enter([this, batch, &item] { Begin(batch, item); });
    }
  }
  std::vector<Item*> ready;
  {
    absl::MutexLock lock(&batch->mutex);
    batch->collecting = false;
    ready.swap(batch->ready);
  }
  if (!ready.empty()) Run(batch, ready, inline_ok);
  CountDown(batch);
}

bool Selector::Admit(int64_t items) {
  return executors_.queued_selects.fetch_add(items) + items <= options_.max_queued_selects;
}

absl::Status Selector::Resolve(Item& item) {
  const SelectCall& call = item.call;
  const SequenceParams* params = nullptr;
  if (call.attachment_id != 0 || call.recall) {
    CKV_ASSIGN_OR_RETURN(item.attachment, attachments_.Find(call.attachment_id));
    item.sequence = item.attachment->sequence;
    params = &item.attachment->params;
    item.select = item.attachment->select;
  } else {
    CKV_ASSIGN_OR_RETURN(item.sequence, store_.Find(call.sequence));
    params = &item.sequence->params();
    item.select = SelectParamsFor(*params);
  }
  if (call.layer < 0 || call.layer >= params->layers) {
    return LayerOutOfRange(call.layer, params->layers);
  }
  CKV_RETURN_IF_ERROR(CheckQueries(item));
  if (call.select.ByteSizeLong() > 0) {
    CKV_ASSIGN_OR_RETURN(const SequenceParams changed, WithSelectConfig(*params, call.select));
    item.select = SelectParamsFor(changed);
  }
  item.answer->generation = item.sequence->identity().generation;
  item.answer->layer = call.layer;
  item.answer->record_bytes =
      params->codec->RecordBytes(params->shape.element_type, params->shape.head_dim);
  if (call.recall) {
    item.answer->cluster_granular =
        item.attachment->hot_cache.policy == kernels::HotCachePolicy::kClusterLru;
    item.residency = item.attachment->layers[static_cast<size_t>(call.layer)].get();
  }
  return absl::OkStatus();
}

absl::Status Selector::CheckQueries(const Item& item) const {
  const kernels::KvShape& shape = item.sequence->params().shape;
  const std::vector<float>& queries = item.call.queries;
  const int64_t expected = shape.query_heads * shape.head_dim;
  if (static_cast<int64_t>(queries.size()) != expected) {
    return FieldError(v1::SHAPE_MISMATCH, "queries",
                      absl::StrCat(expected, " numbers, query_heads * head_dim"),
                      absl::StrCat(queries.size()));
  }
  const auto bad = std::find_if(queries.begin(), queries.end(),
                                [](float value) { return !std::isfinite(value); });
  if (bad == queries.end()) return absl::OkStatus();
  const int64_t index = bad - queries.begin();
  const std::string head = absl::StrCat(index / shape.head_dim);
  const std::string channel = absl::StrCat(index % shape.head_dim);
  return Error(v1::NON_FINITE_QUERY,
               absl::StrCat("queries: expected finite numbers, got NaN or infinity at query head ",
                            head, ", channel ", channel),
               {{"field", "queries"}, {"queryHead", head}, {"channel", channel}});
}

void Selector::Begin(const std::shared_ptr<Batch>& batch, Item& item) {
  if (item.residency != nullptr) {  // before any work is done for a step that cannot be taken
    absl::Status status = item.residency->CheckStep(item.call.step, item.call.reset_residency);
    if (!status.ok()) return Finish(batch, item, std::move(status));
  }
  item.sequence->WhenBuilt(item.call.layer, [this, batch, &item](Sequence::SnapshotOr snapshot) {
    Built(batch, item, std::move(snapshot));
  });
}

void Selector::Built(const std::shared_ptr<Batch>& batch, Item& item,
                     Sequence::SnapshotOr snapshot) {
  if (!snapshot.ok()) return Finish(batch, item, snapshot.status());
  item.snapshot = *std::move(snapshot);
  {
    absl::MutexLock lock(&batch->mutex);
    if (batch->collecting) {
      batch->ready.push_back(&item);
      return;
    }
  }
  Run(batch, {&item}, /*inline_ok=*/false);
}

int64_t Selector::Work(const Item& item) {
  const kernels::KvShape& shape = item.sequence->params().shape;
  const LayerSnapshot& layer = *item.snapshot;
  const int64_t scored = std::min(item.select.scored_tokens, layer.window_begin);
  const int64_t clusters = layer.parts.empty() ? 0 : layer.first_cluster.back();
  return shape.query_heads * shape.head_dim * (clusters + 2 * scored);
}

void Selector::Run(const std::shared_ptr<Batch>& batch, const std::vector<Item*>& items,
                   bool inline_ok) {
  std::vector<Item*> on_host, on_device;
  for (Item* item : items) {
    const int64_t kv_heads = item->sequence->params().shape.kv_heads;
    item->answer->heads.resize(static_cast<size_t>(kv_heads));
    item->answer->estimated_tokens.resize(static_cast<size_t>(kv_heads));
    if (RemainderBytes(item->sequence->params()) > 0) {
      item->answer->corrections.resize(static_cast<size_t>(kv_heads));
    }
    (FitsDevice(*item) ? on_device : on_host).push_back(item);
  }
  if (!on_device.empty()) {
    if (inline_ok && executors_.select_pool().Idle()) {
      RunOnDevice(batch, on_device);
    } else {
      executors_.select_pool().Schedule(
          [this, batch, on_device] { RunOnDevice(batch, on_device); });
    }
  }
  if (!on_host.empty()) RunOnHost(batch, on_host, inline_ok);
}

void Selector::RunOnHost(const std::shared_ptr<Batch>& batch, const std::vector<Item*>& items,
                         bool inline_ok) {
  auto heads = std::make_shared<Heads>();
  for (Item* item : items) {
    const int64_t kv_heads = item->sequence->params().shape.kv_heads;
    item->head_status.resize(static_cast<size_t>(kv_heads));
    item->heads_left.store(kv_heads);
    for (int64_t head = 0; head < kv_heads; ++head) heads->emplace_back(item, head);
  }
  int64_t work = 0;
  for (const Item* item : items) work += Work(*item);
  const bool alone = work <= kWorkAlone;
  const auto run = [this, batch, heads, alone] {
    const auto task = [&](int64_t i) {
      const auto& [item, head] = (*heads)[static_cast<size_t>(i)];
      RunHead(batch, *item, head);
    };
    const auto count = static_cast<int64_t>(heads->size());
    if (alone) {
      kernels::SerialFor(count, task);
    } else {
      executors_.select_pool().For(count, task);
    }
  };
  // More work than that would keep its caller, a thread that serves the network, from its own.
  if (inline_ok && alone && executors_.select_pool().Idle()) {
    run();
  } else {
    executors_.select_pool().Schedule(run);
  }
}

// --- working

absl::Status Selector::CheckStart(Batch& batch, const Item& item) const {
  const absl::Time now = absl::Now();
  int64_t not_started = -1;
  batch.started_us.compare_exchange_strong(
      not_started, std::max<int64_t>(absl::ToInt64Microseconds(now - batch.created), 0));
  CKV_RETURN_IF_ERROR(CheckContext(batch.context, now));
  if (executors_.stopping()) return ServerEnding();
  if (!item.sequence->ended()) return absl::OkStatus();
  const SequenceIdentity& identity = item.sequence->identity();
  return SequenceReleased(identity.name, identity.generation);
}

bool Selector::FitsDevice(const Item& item) const {
  if (device_ == nullptr || !device_->healthy() || item.snapshot->parts.empty()) return false;
  // Far beyond any model's: whether their logits overflow is for the host to tell.
  constexpr float kGreatQuery = 1e12f;
  const std::vector<float>& queries = item.call.queries;
  if (std::any_of(queries.begin(), queries.end(),
                  [](float q) { return std::abs(q) > kGreatQuery; })) {
    return false;
  }
  const LayerSnapshot& layer = *item.snapshot;
  return device_->CanSelect(item.sequence->params().shape, item.select,
                            layer.window_begin - layer.sink_tokens) &&
         std::all_of(layer.parts.begin(), layer.parts.end(),
                     [](const auto& part) { return part->device_part() != nullptr; });
}

void Selector::RunOnDevice(const std::shared_ptr<Batch>& batch, const std::vector<Item*>& items) {
  std::vector<Item*> asked;
  std::vector<DeviceSelectItem> device_items;
  for (Item* item : items) {
    if (absl::Status status = CheckStart(*batch, *item); !status.ok()) {
      Finish(batch, *item, std::move(status));
      continue;
    }
    asked.push_back(item);
    DeviceSelectItem& device_item = device_items.emplace_back(
        DeviceItemOf(*item->snapshot, item->sequence->params(), item->select));
    device_item.queries = item->call.queries;
    device_item.heads = item->answer->heads.data();
  }
  if (asked.empty()) return;
  device_->Select(absl::MakeSpan(device_items));
  std::vector<Item*> left;  // for the host
  for (size_t i = 0; i < asked.size(); ++i) {
    Item& item = *asked[i];
    if (!device_items[i].status.ok()) {
      left.push_back(&item);
      continue;
    }
    absl::Status status;
    for (size_t head = 0; head < item.answer->heads.size(); ++head) {
      const auto number = static_cast<int64_t>(head);
      item.answer->estimated_tokens[head] =
          TokensOfClusters(*item.snapshot, number, item.answer->heads[head].estimated_clusters);
      status.Update(CorrectHead(item, number));
    }
    counters_.device_selects.fetch_add(1);
    if (status.ok()) {
      Conclude(batch, item);
    } else {
      Finish(batch, item, std::move(status));
    }
  }
  counters_.device_fallbacks.fetch_add(left.size());
  if (!left.empty()) RunOnHost(batch, left, /*inline_ok=*/false);
}

void Selector::RunHead(const std::shared_ptr<Batch>& batch, Item& item, int64_t head) {
  absl::Status status = CheckStart(*batch, item);
  if (status.ok()) status = SelectHead(*batch, item, head);
  item.head_status[static_cast<size_t>(head)] = std::move(status);
  if (item.heads_left.fetch_sub(1) != 1) return;
  for (const absl::Status& failed : item.head_status) {
    if (!failed.ok()) return Finish(batch, item, failed);
  }
  Conclude(batch, item);
}

void Selector::Conclude(const std::shared_ptr<Batch>& batch, Item& item) {
  item.answer->window_begin = item.snapshot->window_begin;
  Finish(batch, item, item.residency != nullptr ? Recall(item) : absl::OkStatus());
}

absl::Status Selector::SelectHead(Batch& batch, Item& item, int64_t head) {
  const SequenceParams& params = item.sequence->params();
  const LayerSnapshot& layer = *item.snapshot;
  const int64_t group = params.shape.group(), head_dim = params.shape.head_dim;
  HeadSelection& selection = item.answer->heads[static_cast<size_t>(head)];
  if (layer.parts.empty()) {  // all of the prompt is sinks: nothing to choose from
    selection.state_output.assign(static_cast<size_t>(group * head_dim), 0);
    selection.state_lse.assign(static_cast<size_t>(group), -std::numeric_limits<float>::infinity());
    return CorrectHead(item, head);
  }
  const SinkKeys sinks(layer, params.shape, head);
  kernels::SelectInput input;
  input.shape = params.shape;
  input.codes = params.index.codes;
  input.kv_head = head;
  input.scale = LogitScale(params.shape);
  input.queries = QueriesOf(item.call, params.shape, head);
  input.parts = layer.views;
  input.sink_keys = sinks.keys();
  input.sink_key_stride_bytes = sinks.stride_bytes();
  input.sink_tokens = layer.sink_tokens;
  Executors::Scratch scratch(&executors_);
  CKV_RETURN_IF_ERROR(KernelStatus(kernels::Select(item.select, input, *scratch, &selection)));
  batch.refine_ns.fetch_add((*scratch).refine_time().count());
  item.answer->estimated_tokens[static_cast<size_t>(head)] =
      TokensOfClusters(layer, head, selection.estimated_clusters);
  return CorrectHead(item, head);
}

absl::Status Selector::CorrectHead(Item& item, int64_t head) {
  if (item.answer->corrections.empty()) return absl::OkStatus();
  const SequenceParams& params = item.sequence->params();
  const HeadSelection& selection = item.answer->heads[static_cast<size_t>(head)];
  std::vector<const std::byte*> records, remainders;
  records.reserve(selection.positions.size());
  remainders.reserve(selection.positions.size());
  for (size_t i = 0; i < selection.positions.size(); ++i) {
    const kernels::IndexPartView& part =
        item.snapshot->views[static_cast<size_t>(selection.parts[i])];
    const int64_t index = head * part.tokens + selection.slots[i];
    records.push_back(part.records.At(index));
    remainders.push_back(part.remainders.At(index));
  }
  const kernels::AttentionParams attention = {params.shape.group(), params.shape.head_dim,
                                              params.shape.element_type, LogitScale(params.shape)};
  return KernelStatus(
      kernels::ComputeCorrection(attention, QueriesOf(item.call, params.shape, head),
                                 {params.codec, records, remainders, selection.head_masks},
                                 &item.answer->corrections[static_cast<size_t>(head)]));
}

absl::Status Selector::Recall(Item& item) {
  SelectAnswer& answer = *item.answer;
  auto pins = std::make_shared<RecordPins>(item.sequence, item.snapshot, options_.verify_recalls);
  std::vector<std::vector<int32_t>> misses, slots;
  int64_t hits = 0;
  CKV_RETURN_IF_ERROR(item.residency->Resolve(item.call.step, item.call.reset_residency,
                                              answer.heads, &misses, &slots, &hits));
  // From here on an error leaves worker and residency apart: the worker's next step is refused as
  // stale, and it starts anew.
  answer.recalls.resize(answer.heads.size());
  for (size_t head = 0; head < misses.size(); ++head) {
    const HeadSelection& selection = answer.heads[head];
    HeadRecall& recall = answer.recalls[head];
    for (int32_t i : misses[head]) {
      const size_t at = static_cast<size_t>(i);
      const int64_t tokens = item.snapshot->views[static_cast<size_t>(selection.parts[at])].tokens;
      CKV_ASSIGN_OR_RETURN(const std::byte* record,
                           pins->Take(selection.parts[at],
                                      static_cast<int64_t>(head) * tokens + selection.slots[at]));
      recall.positions.push_back(selection.positions[at]);
      recall.records.push_back(record);
    }
    answer.misses += static_cast<int64_t>(misses[head].size());
  }
  answer.hits = hits;
  answer.pins = std::move(pins);
  SendByLink(item, misses, slots);
  return absl::OkStatus();
}

void Selector::SendByLink(Item& item, const std::vector<std::vector<int32_t>>& misses,
                          const std::vector<std::vector<int32_t>>& slots) {
  const Attachment::LinkInUse in_use = item.attachment->CurrentLink();
  if (in_use.link == nullptr || !in_use.link->ready()) return;
  const LayerSnapshot& layer = *item.snapshot;
  SelectAnswer& answer = *item.answer;
  const bool to_slots = in_use.link->kind() == v1::LINK_PEER;
  std::vector<LinkRecord> records;
  records.reserve(static_cast<size_t>(answer.misses));
  for (size_t head = 0; head < misses.size(); ++head) {
    const HeadSelection& selection = answer.heads[head];
    const int64_t head_at =
        item.call.layer * in_use.layer_bytes + static_cast<int64_t>(head) * in_use.head_bytes;
    for (size_t i = 0; i < misses[head].size(); ++i) {
      const auto at = static_cast<size_t>(misses[head][i]);
      const auto part = static_cast<size_t>(selection.parts[at]);
      LinkRecord& record = records.emplace_back();
      record.part = layer.parts[part]->device_part();
      if (record.part == nullptr) return;  // it is with the host alone
      record.index = static_cast<int64_t>(head) * layer.views[part].tokens + selection.slots[at];
      record.destination = to_slots
                               ? head_at + slots[head][i] * answer.record_bytes
                               : static_cast<int64_t>(records.size() - 1) * answer.record_bytes;
    }
  }
  if (const absl::Status sent = in_use.link->Send(records, answer.record_bytes); !sent.ok()) {
    counters_.link_failovers[in_use.link->kind()].fetch_add(1);  // the worker gets the bytes
    return;
  }
  counters_.link_bytes.fetch_add(static_cast<uint64_t>(answer.misses * answer.record_bytes));
  answer.by_link = true;
  answer.link_generation = in_use.generation;
  for (HeadRecall& recall : answer.recalls) recall.records.clear();
  answer.pins.reset();
}

void Selector::Finish(const std::shared_ptr<Batch>& batch, Item& item, absl::Status status) {
  SelectAnswer& answer = *item.answer;
  if (status.ok()) {
    const kernels::KvShape& shape = item.sequence->params().shape;
    counters_.selects.fetch_add(1);
    // As FLOAT16 with a FLOAT32 log-sum-exp, which is how states travel, and a code and scale.
    int64_t head_bytes = answer.answers() ? 2 * shape.head_dim + 4 : 0;
    if (!answer.corrections.empty()) head_bytes += shape.head_dim + 4;
    counters_.state_bytes.fetch_add(static_cast<uint64_t>(shape.query_heads * head_bytes));
    counters_.hits.fetch_add(static_cast<uint64_t>(answer.hits));
    counters_.misses.fetch_add(static_cast<uint64_t>(answer.misses));
    counters_.recalled_tokens.fetch_add(static_cast<uint64_t>(answer.misses));
    counters_.recalled_bytes.fetch_add(static_cast<uint64_t>(answer.misses * answer.record_bytes));
  } else {
    answer = SelectAnswer();
    answer.status = std::move(status);
    answer.layer = item.call.layer;
  }
  if (item.residency != nullptr) item.residency->Leave();
  // Nothing of the sequence is held once the answer is out, but by its pins.
  item.snapshot.reset();
  item.sequence = SequenceRef();
  item.attachment.reset();
  executors_.queued_selects.fetch_sub(1);
  CountDown(batch);
}

void Selector::CountDown(const std::shared_ptr<Batch>& batch) {
  if (batch->items_left.fetch_sub(1) != 1) return;
  const int64_t total_us = absl::ToInt64Microseconds(absl::Now() - batch->created);
  const int64_t started_us = batch->started_us.load();
  const int64_t queued_us = started_us < 0 ? total_us : std::min(started_us, total_us);
  batch->answer.queued = absl::Microseconds(queued_us);
  batch->answer.worked = absl::Microseconds(total_us - queued_us);
  batch->answer.refined = absl::Nanoseconds(batch->refine_ns.load());
  counters_.select_latency.Record(batch->answer.worked);
  batch->done(std::move(batch->answer));
}

}  // namespace clusterkv::cache_service
