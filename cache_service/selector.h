// Select: batches of queries, spread over the select pool by (item, KV head).
//
// The way of an item: it is resolved (sequence or attachment, parameters, queries checked), enters
// its residency's queue if it recalls, waits for the builds of its layer that were queued before
// it, has its heads answered by whatever threads are free, or by the device, takes its residency's
// step, and is done.
// A batch is answered when its last item is done. An item's error is its own.
//
// Thread-safe. Holds no lock while it calls out.
#ifndef CLUSTERKV_CACHE_SERVICE_SELECTOR_H_
#define CLUSTERKV_CACHE_SERVICE_SELECTOR_H_

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "cache_service/attachments.h"
#include "cache_service/executors.h"
#include "cache_service/sequence_store.h"
#include "cache_service/shard.h"
#include "cache_service/shard_counters.h"

namespace clusterkv::cache_service {

// What the device is asked about a layer; the caller adds queries and where the answer goes. Valid
// while the layer lives. REQUIRES: all its parts are on the device.
DeviceSelectItem DeviceItemOf(const LayerSnapshot& layer, const SequenceParams& params,
                              const kernels::SelectParams& select);

class Selector {
 public:
  // Everything outlives the selector, and the selector what it was asked.
  Selector(const ShardOptions& options, SequenceStore* store, Attachments* attachments,
           Executors* executors, ShardDevice* device, ShardCounters* counters)
      : options_(options),
        store_(*store),
        attachments_(*attachments),
        executors_(*executors),
        device_(device),
        counters_(*counters) {}

  // As Shard::Select.
  void Select(std::vector<SelectCall> calls, const CallContext& context, bool inline_ok,
              std::function<void(SelectBatchAnswer)> done);

 private:
  struct Item;
  struct Batch;
  // The heads of some items of one batch, to be answered together.
  using Heads = std::vector<std::pair<Item*, int64_t>>;

  absl::Status Resolve(Item& item);
  absl::Status CheckQueries(const Item& item) const;
  bool Admit(int64_t items);
  void Begin(const std::shared_ptr<Batch>& batch, Item& item);
  void Built(const std::shared_ptr<Batch>& batch, Item& item, Sequence::SnapshotOr snapshot);
  // Multiplications that all heads of the item take, about.
  static int64_t Work(const Item& item);
  void Run(const std::shared_ptr<Batch>& batch, const std::vector<Item*>& items, bool inline_ok);
  void RunOnHost(const std::shared_ptr<Batch>& batch, const std::vector<Item*>& items,
                 bool inline_ok);
  bool FitsDevice(const Item& item) const;
  void RunOnDevice(const std::shared_ptr<Batch>& batch, const std::vector<Item*>& items);
  // Whether work on the item may start now. Errors: its call is over, or its sequence, or the
  // server.
  absl::Status CheckStart(Batch& batch, const Item& item) const;
  void RunHead(const std::shared_ptr<Batch>& batch, Item& item, int64_t head);
  absl::Status SelectHead(Batch& batch, Item& item, int64_t head);
  // What the records of the head's exact zone lack. The selection is there.
  absl::Status CorrectHead(Item& item, int64_t head);
  // All heads are answered: the rest of the item.
  void Conclude(const std::shared_ptr<Batch>& batch, Item& item);
  absl::Status Recall(Item& item);
  // Sends the misses over the attachment's link, if there is one that can; else they stay in the
  // answer.
  void SendByLink(Item& item, const std::vector<std::vector<int32_t>>& misses,
                  const std::vector<std::vector<int32_t>>& slots);
  void Finish(const std::shared_ptr<Batch>& batch, Item& item, absl::Status status);
  // One of the batch's items is done, or all are queued: the last one answers.
  void CountDown(const std::shared_ptr<Batch>& batch);

  const ShardOptions options_;
  SequenceStore& store_;
  Attachments& attachments_;
  Executors& executors_;
  ShardDevice* const device_;  // may be null
  ShardCounters& counters_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SELECTOR_H_
