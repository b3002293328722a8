#include "worker/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/element_type.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"
#include "worker/shards.h"

namespace clusterkv::worker {
namespace {

// How often a device is looked after while a sequence's calls are waited for.
constexpr std::chrono::milliseconds kCheckPeriod(50);

// One thread that runs what it is given, in order.
class Lane {
 public:
  Lane() : thread_([this] { Run(); }) {}
  ~Lane() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  void Push(std::function<void()> job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    changed_.notify_one();  // under the lock: once the job is done, the lane may end
  }

 private:
  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;  // stopping
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

absl::Status NotAttached(const v1::Sequence& sequence) {
  return Error(v1::SEQUENCE_NOT_READY,
               absl::StrCat("sequence ", sequence.handle().name(), ": expected it attached"));
}

absl::Status NotJoined(const v1::Sequence& sequence) {
  return Error(v1::SEQUENCE_NOT_READY,
               absl::StrCat("sequence ", sequence.handle().name(), ": expected it in a group"));
}

}  // namespace

// Sequences that joined.
struct EngineMembers {
  std::vector<EngineSequence*> sequences;
  std::unique_ptr<EngineGroup> group;
  EngineStream stream = nullptr;  // the last one that it was given
};

class EngineSequence {
 public:
  // A job of the sequence is handed over.
  void Enter() {
    const std::lock_guard<std::mutex> lock(mutex);
    ++pending;
  }
  // It is done. untold: nobody else hears of the failure.
  void Leave(const absl::Status& status, bool untold) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (untold && failure.ok()) failure = status;
    if (--pending == 0) idle.notify_all();
  }
  // A stream of a failed device never comes to what it was given: Check ends that.
  void WaitUntilIdle(EngineDevice& device) {
    std::unique_lock<std::mutex> lock(mutex);
    while (!idle.wait_for(lock, kCheckPeriod, [this] { return pending == 0; })) {
      lock.unlock();
      device.Check().IgnoreError();
      lock.lock();
    }
  }
  absl::Status TakeFailure() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!lost.ok()) return lost;
    return std::exchange(failure, absl::OkStatus());
  }
  void Lose(const absl::Status& status) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (lost.ok()) lost = status;
  }

  Client* client = nullptr;
  Lane* lane = nullptr;
  v1::Sequence sequence;
  std::unique_ptr<PrefillWriter> writer;   // while it is filled
  WindowWriter* window = nullptr;          // on a GPU, while it is filled
  std::unique_ptr<DecodeSession> session;  // while it is attached
  std::unique_ptr<EngineLayers> layers;
  EngineMembers* joined = nullptr;  // null: single
  int64_t query_bytes = 0, row_bytes = 0, kv_heads = 0;
  std::vector<std::shared_ptr<std::byte>> queries;  // [layers]: of the step under way

 private:
  std::mutex mutex;
  std::condition_variable idle;
  int64_t pending = 0;
  absl::Status failure;  // the first that was not told
  absl::Status lost;     // why it can never be right again
};

struct Engine::Impl {
  // Lanes end before what their jobs use.
  ~Impl() {
    for (const auto& sequence : sequences) sequence->WaitUntilIdle(*device);
    lanes.clear();
    groups.clear();
    sequences.clear();
  }

  absl::StatusOr<EngineSequence*> Add(Client* client, v1::Sequence sequence);
  void Remove(EngineSequence* sequence);
  absl::Status AttachTo(EngineSequence* of);
  absl::Status CheckLayer(const EngineSequence& of, int64_t layer) const;
  // Whose group the batch is; it must be all of it, in its order.
  absl::StatusOr<EngineMembers*> GroupOf(absl::Span<EngineSequence* const> batch) const;
  absl::Status AppendJoined(int64_t layer, absl::Span<const EngineAppend> batch,
                            EngineStream stream);
  absl::Status StepJoined(int64_t layer, absl::Span<const EngineStep> batch, EngineStream stream);
  absl::Status Leave(EngineMembers* members, EngineStream stream);
  // Rows as a Gather wants them.
  EngineRows RowsOf(const EngineSequence& of, const void* data, const EngineKv& kv,
                    int64_t tokens) const;
  // A job of the sequence: how the stream came to it (else than OK: never), what came of it.
  using Job = std::function<absl::Status(const absl::Status& reached)>;
  // Lets the sequence's lane run `job` when the stream comes to it. untold: nobody else hears of
  // the job's failure. Errors: the stream did not take it.
  absl::Status HandOver(EngineSequence* of, EngineStream stream, bool untold, Job job);
  // Puts the first of the rows, which are left out of them then: none where there is no slot.
  static absl::Status IngestByWindow(EngineSequence* of, WindowWriter::Rows* rows,
                                     EngineStream stream);
  absl::Status IngestThroughHost(EngineSequence* of, const WindowWriter::Rows& rows,
                                 EngineStream stream);
  absl::Status Append(EngineSequence* of, int64_t layer, const EngineKv& kv, EngineStream stream);
  absl::Status BeginStep(EngineSequence* of, int64_t layer, const void* queries,
                         EngineStream stream);

  EngineOptions options;
  std::unique_ptr<EngineDevice> device;
  std::unique_ptr<Shards> shards;
  WindowWriters windows;
  std::atomic<int64_t> staged_bytes{0};
  std::mutex mutex;
  std::vector<std::unique_ptr<EngineSequence>> sequences;
  std::vector<std::unique_ptr<EngineMembers>> groups;
  size_t next_lane = 0;
  std::vector<std::unique_ptr<Lane>> lanes;
};

absl::StatusOr<EngineSequence*> Engine::Impl::Add(Client* client, v1::Sequence sequence) {
  auto added = std::make_unique<EngineSequence>();
  const v1::KvShape& shape = sequence.shape();
  const int64_t element_bytes =
      kernels::ElementBytes(static_cast<kernels::ElementType>(shape.element_type()));
  added->client = client;
  added->kv_heads = shape.kv_heads();
  added->row_bytes = shape.head_dim() * element_bytes;
  added->query_bytes = shape.query_heads() * added->row_bytes;
  added->sequence = std::move(sequence);
  const std::lock_guard<std::mutex> lock(mutex);
  added->lane = lanes[next_lane++ % lanes.size()].get();
  sequences.push_back(std::move(added));
  return sequences.back().get();
}

void Engine::Impl::Remove(EngineSequence* sequence) {
  std::unique_ptr<EngineSequence> removed;  // dies, and talks to the service, outside of the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = std::find_if(sequences.begin(), sequences.end(),
                               [&](const auto& of) { return of.get() == sequence; });
  if (at == sequences.end()) return;
  removed = std::move(*at);
  sequences.erase(at);
}

absl::Status Engine::Impl::AttachTo(EngineSequence* of) {
  CKV_ASSIGN_OR_RETURN(of->session,
                       DecodeSession::Attach(of->client, of->sequence.handle(), options.decode));
  of->sequence = of->session->sequence();
  CKV_ASSIGN_OR_RETURN(of->layers, device->MakeLayers(*of->session, options.output_type));
  of->queries.resize(of->sequence.shape().layers());
  for (std::shared_ptr<std::byte>& queries : of->queries) {
    CKV_ASSIGN_OR_RETURN(queries, device->Staging(of->query_bytes));
  }
  return absl::OkStatus();
}

absl::Status Engine::Impl::CheckLayer(const EngineSequence& of, int64_t layer) const {
  const int64_t layers = of.sequence.shape().layers();
  if (layer >= 0 && layer < layers) return absl::OkStatus();
  return Error(v1::LAYER_OUT_OF_RANGE,
               absl::StrCat("layer: expected 0 to ", layers - 1, ", got ", layer));
}

EngineRows Engine::Impl::RowsOf(const EngineSequence& of, const void* data, const EngineKv& kv,
                                int64_t tokens) const {
  EngineRows rows = {
      data, tokens, of.kv_heads, of.row_bytes, kv.token_stride_bytes, kv.head_stride_bytes};
  if (rows.head_stride_bytes == 0) rows.head_stride_bytes = of.row_bytes;
  if (rows.token_stride_bytes == 0) rows.token_stride_bytes = of.kv_heads * of.row_bytes;
  return rows;
}

absl::Status Engine::Impl::HandOver(EngineSequence* of, EngineStream stream, bool untold, Job job) {
  of->Enter();
  // Handed on, not copied: the lane's is the last to go, and goes before what it refers to.
  auto handed_on = std::make_shared<Job>(std::move(job));
  absl::Status handed = device->Then(
      stream, [of, untold, todo = std::move(handed_on)](const absl::Status& reached) mutable {
        of->lane->Push([of, untold, todo = std::move(todo), reached] {
          if (!reached.ok()) of->Lose(reached);
          of->Leave((*todo)(reached), untold);
        });
      });
  if (!handed.ok()) of->Leave(handed, false);
  return handed;
}

absl::Status Engine::Impl::Append(EngineSequence* of, int64_t layer, const EngineKv& kv,
                                  EngineStream stream) {
  CKV_RETURN_IF_ERROR(of->TakeFailure());
  if (of->session == nullptr) return NotAttached(of->sequence);
  CKV_RETURN_IF_ERROR(CheckLayer(*of, layer));
  const EngineRows keys = RowsOf(*of, kv.keys, kv, 1), values = RowsOf(*of, kv.values, kv, 1);
  const int64_t bytes = of->kv_heads * of->row_bytes;
  CKV_ASSIGN_OR_RETURN(const std::shared_ptr<std::byte> staged, device->Staging(2 * bytes));
  CKV_RETURN_IF_ERROR(device->Gather(keys, staged.get(), stream));
  CKV_RETURN_IF_ERROR(device->Gather(values, staged.get() + bytes, stream));
  const bool waits = device->synchronous();
  auto result = std::make_shared<absl::Status>();
  CKV_RETURN_IF_ERROR(HandOver(of, stream, !waits, [=](const absl::Status& reached) {
    const auto row = static_cast<size_t>(bytes);
    *result = reached;
    if (reached.ok()) {
      *result = of->session->Append(layer, absl::MakeConstSpan(staged.get(), row),
                                    absl::MakeConstSpan(staged.get() + bytes, row));
    }
    if (!waits && !result->ok()) of->Lose(*result);
    return *result;
  }));
  if (!waits) return absl::OkStatus();
  of->WaitUntilIdle(*device);
  return *result;
}

absl::Status Engine::Impl::BeginStep(EngineSequence* of, int64_t layer, const void* queries,
                                     EngineStream stream) {
  CKV_RETURN_IF_ERROR(of->TakeFailure());
  if (of->session == nullptr) return NotAttached(of->sequence);
  CKV_RETURN_IF_ERROR(CheckLayer(*of, layer));
  std::byte* const staged = of->queries[layer].get();
  CKV_RETURN_IF_ERROR(device->Gather(
      {queries, 1, 1, of->query_bytes, of->query_bytes, of->query_bytes}, staged, stream));
  CKV_RETURN_IF_ERROR(of->layers->Begin(layer));
  absl::Status handed =
      HandOver(of, stream, !device->synchronous(), [=](const absl::Status& reached) {
        const auto bytes = static_cast<size_t>(of->query_bytes);
        absl::Status recalled = reached;
        if (reached.ok()) {
          recalled = of->session->Recall(layer, absl::MakeConstSpan(staged, bytes), nullptr);
        }
        return of->layers->Publish(layer, staged, of->session.get(), recalled);
      });
  if (!handed.ok()) {
    of->layers->Publish(layer, staged, of->session.get(), handed).IgnoreError();
  }
  return handed;
}

absl::StatusOr<EngineMembers*> Engine::Impl::GroupOf(
    absl::Span<EngineSequence* const> batch) const {
  EngineMembers* const members = batch.front()->joined;
  if (members != nullptr && batch == absl::MakeConstSpan(members->sequences)) return members;
  return Error(v1::INVALID_FIELD, "batch: of a group: expected all its sequences, in their order");
}

absl::Status Engine::Impl::AppendJoined(int64_t layer, absl::Span<const EngineAppend> batch,
                                        EngineStream stream) {
  std::vector<EngineSequence*> sequences;
  std::vector<EngineRows> keys, values;
  for (const EngineAppend& append : batch) {
    sequences.push_back(append.sequence);
    keys.push_back(RowsOf(*append.sequence, append.kv.keys, append.kv, 1));
    values.push_back(RowsOf(*append.sequence, append.kv.values, append.kv, 1));
  }
  CKV_ASSIGN_OR_RETURN(EngineMembers* const members, GroupOf(sequences));
  CKV_RETURN_IF_ERROR(CheckLayer(*sequences.front(), layer));
  members->stream = stream;
  return members->group->Append(layer, keys, values, stream);
}

absl::Status Engine::Impl::StepJoined(int64_t layer, absl::Span<const EngineStep> batch,
                                      EngineStream stream) {
  std::vector<EngineSequence*> sequences;
  for (const EngineStep& step : batch) sequences.push_back(step.sequence);
  CKV_ASSIGN_OR_RETURN(EngineMembers* const members, GroupOf(sequences));
  CKV_RETURN_IF_ERROR(CheckLayer(*sequences.front(), layer));
  // Outputs are as large as queries: of the same type.
  const int64_t bytes = sequences.front()->query_bytes;
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto at = static_cast<int64_t>(i) * bytes;
    if (batch[i].queries == static_cast<const std::byte*>(batch[0].queries) + at &&
        batch[i].output == static_cast<std::byte*>(batch[0].output) + at) {
      continue;
    }
    return Error(v1::INVALID_FIELD,
                 "queries, output: of a group: expected them dense over its sequences");
  }
  members->stream = stream;
  return members->group->Step(layer, batch[0].queries, batch[0].output, stream);
}

absl::Status Engine::Impl::Leave(EngineMembers* members, EngineStream stream) {
  absl::Status status = members->group->Settle(stream);
  std::unique_ptr<EngineMembers> left;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto at = std::find_if(groups.begin(), groups.end(),
                                 [&](const auto& group) { return group.get() == members; });
    left = std::move(*at);
    groups.erase(at);
  }
  left->group.reset();
  for (EngineSequence* of : left->sequences) {
    of->joined = nullptr;
    of->session->ForgetRecords();  // they were in the layers that Join gave up
    absl::StatusOr<std::unique_ptr<EngineLayers>> layers =
        device->MakeLayers(*of->session, options.output_type);
    if (layers.ok()) {
      of->layers = *std::move(layers);
    } else {
      of->Lose(layers.status());
    }
  }
  return status;
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

absl::StatusOr<std::unique_ptr<Engine>> Engine::Open(const EngineOptions& options) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<EngineDevice> device,
                       MakeEngineDevice(options.device, options.step_timeout));
  return Open(options, std::move(device));
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Open(const EngineOptions& options,
                                                     std::unique_ptr<EngineDevice> device) {
  if (options.threads < 1 || options.staging_bytes < 1) {
    return Error(v1::INVALID_FIELD, absl::StrCat("threads, staging_bytes: expected 1 or more, got ",
                                                 options.threads, ", ", options.staging_bytes));
  }
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->options.decode.device = options.device;
  if (options.output_type == v1::ELEMENT_TYPE_UNSPECIFIED) {
    impl->options.output_type = v1::ELEMENT_TYPE_FLOAT32;
  }
  impl->options.decode.make_window = device->window_maker();
  if (!device->synchronous()) {
    // To take NCCL's messages needs CUDA's calls, which would wait for the stream that waits.
    std::vector<v1::Link>& links = impl->options.decode.links;
    links.erase(std::remove(links.begin(), links.end(), v1::LINK_NCCL), links.end());
  }
  impl->device = std::move(device);
  CKV_ASSIGN_OR_RETURN(impl->shards, Shards::Connect(options.target, options.client));
  for (int i = 0; i < options.threads; ++i) impl->lanes.push_back(std::make_unique<Lane>());
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

absl::StatusOr<EngineSequence*> Engine::Create(const v1::OpenSequenceRequest& request) {
  CKV_ASSIGN_OR_RETURN(PlacedSequence placed, impl_->shards->OpenSequence(request));
  CKV_ASSIGN_OR_RETURN(
      auto writer, PrefillWriter::Create(placed.client, placed.sequence, impl_->options.prefill));
  CKV_ASSIGN_OR_RETURN(EngineSequence* const added,
                       impl_->Add(placed.client, std::move(placed.sequence)));
  added->writer = std::move(writer);
  const IngestRingOptions& ring = impl_->options.ingest_ring;
  if (!impl_->device->synchronous() && ring.slots > 0 && ring.slot_bytes > 0) {
    added->window =
        impl_->windows.For(placed.client, /*gpu=*/0, [device = impl_->device.get(), ring] {
          return device->MakeIngestRing(ring.slots, ring.slot_bytes);
        });
  }
  return added;
}

absl::Status Engine::Ingest(EngineSequence* of, int64_t layer, int64_t first_token, int64_t tokens,
                            const EngineKv& kv, absl::Span<const float> query_rms,
                            EngineStream stream) {
  CKV_RETURN_IF_ERROR(of->TakeFailure());
  if (of->writer == nullptr) {
    return Error(v1::SEQUENCE_NOT_READY, absl::StrCat("sequence ", of->sequence.handle().name(),
                                                      ": expected one that is filled here"));
  }
  CKV_RETURN_IF_ERROR(impl_->CheckLayer(*of, layer));
  const int64_t prompt = of->sequence.prompt_tokens();
  if (first_token < 0 || tokens < 1 || first_token > prompt || tokens > prompt - first_token) {
    return Error(v1::TOKENS_OUT_OF_RANGE, absl::StrCat("tokens: expected some of 0 to ", prompt,
                                                       ", got ", tokens, " from ", first_token));
  }
  WindowWriter::Rows rows;
  rows.sequence = &of->sequence.handle();
  rows.layer = layer;
  rows.first_token = first_token;
  rows.keys = impl_->RowsOf(*of, kv.keys, kv, tokens);
  rows.values = impl_->RowsOf(*of, kv.values, kv, tokens);
  rows.query_rms.assign(query_rms.begin(), query_rms.end());
  rows.otherwise = of->writer.get();
  if (of->window != nullptr) CKV_RETURN_IF_ERROR(Impl::IngestByWindow(of, &rows, stream));
  if (rows.keys.tokens == 0) return absl::OkStatus();
  return impl_->IngestThroughHost(of, rows, stream);
}

absl::Status Engine::Impl::IngestByWindow(EngineSequence* of, WindowWriter::Rows* rows,
                                          EngineStream stream) {
  while (rows->keys.tokens > 0) {
    of->Enter();
    const absl::StatusOr<int64_t> taken =
        of->window->Put(*rows, stream, /*wait=*/false,
                        [of](const absl::Status& put) { of->Leave(put, /*untold=*/true); });
    if (!taken.ok() || *taken == 0) {
      of->Leave(taken.status(), /*untold=*/false);
      return taken.status();
    }
    rows->Skip(*taken);
  }
  return absl::OkStatus();
}

absl::Status Engine::Impl::IngestThroughHost(EngineSequence* of, const WindowWriter::Rows& rows,
                                             EngineStream stream) {
  const int64_t tokens = rows.keys.tokens, bytes = tokens * of->kv_heads * of->row_bytes;
  const int64_t before = staged_bytes.fetch_add(2 * bytes);
  const auto give_back = [this, bytes] { staged_bytes.fetch_sub(2 * bytes); };
  if (before > 0 && before + 2 * bytes > options.staging_bytes) {
    give_back();
    return Error(v1::LIMIT_EXCEEDED,
                 absl::StrCat("staging_bytes: expected up to ", options.staging_bytes, ", got ",
                              before + 2 * bytes),
                 {{"limit", "staging_bytes"}});
  }
  absl::StatusOr<std::shared_ptr<std::byte>> staging = device->Staging(2 * bytes);
  absl::Status handed = staging.status();
  if (handed.ok()) handed = device->Gather(rows.keys, staging->get(), stream);
  if (handed.ok()) handed = device->Gather(rows.values, staging->get() + bytes, stream);
  if (!handed.ok()) {
    give_back();
    return handed;
  }
  const auto put = [of, give_back, bytes, tokens, layer = rows.layer,
                    first_token = rows.first_token, rms = rows.query_rms,
                    packed = *std::move(staging)](const absl::Status& reached) {
    const auto size = static_cast<size_t>(bytes);
    absl::Status status = reached;
    if (status.ok()) {
      status = of->writer->PutWhenRoom(layer, first_token, tokens,
                                       absl::MakeConstSpan(packed.get(), size),
                                       absl::MakeConstSpan(packed.get() + bytes, size), rms);
    }
    if (of->window != nullptr) of->window->CountHostBytes(2 * bytes);
    give_back();
    return status;
  };
  handed = HandOver(of, stream, /*untold=*/true, put);
  if (!handed.ok()) give_back();
  return handed;
}

IngestCounts Engine::ingest_counts() const { return impl_->windows.counts(); }

absl::Status Engine::Seal(EngineSequence* of) {
  of->WaitUntilIdle(*impl_->device);
  CKV_RETURN_IF_ERROR(of->TakeFailure());
  if (of->writer == nullptr) {
    return Error(v1::SEQUENCE_NOT_READY, absl::StrCat("sequence ", of->sequence.handle().name(),
                                                      ": expected one that is filled here"));
  }
  CKV_ASSIGN_OR_RETURN(of->sequence, of->writer->Finish());
  of->writer.reset();
  return absl::OkStatus();
}

absl::Status Engine::Attach(EngineSequence* of) {
  CKV_RETURN_IF_ERROR(of->TakeFailure());
  if (of->writer != nullptr || of->session != nullptr) {
    return Error(v1::SEQUENCE_NOT_READY, absl::StrCat("sequence ", of->sequence.handle().name(),
                                                      ": expected one sealed and not attached"));
  }
  absl::Status attached = impl_->AttachTo(of);
  if (!attached.ok()) {
    of->layers.reset();
    of->session.reset();
  }
  return attached;
}

absl::StatusOr<EngineSequence*> Engine::Attach(const v1::SequenceHandle& handle) {
  CKV_ASSIGN_OR_RETURN(PlacedSequence placed, impl_->shards->FindSequence(handle));
  CKV_ASSIGN_OR_RETURN(EngineSequence* const added,
                       impl_->Add(placed.client, std::move(placed.sequence)));
  const absl::Status attached = Attach(added);
  if (attached.ok()) return added;
  impl_->Remove(added);
  return attached;
}

absl::Status Engine::Append(int64_t layer, absl::Span<const EngineAppend> batch,
                            EngineStream stream) {
  if (!batch.empty() && batch[0].sequence->joined != nullptr) {
    return impl_->AppendJoined(layer, batch, stream);
  }
  absl::Status first;
  for (const EngineAppend& append : batch) {
    first.Update(impl_->Append(append.sequence, layer, append.kv, stream));
  }
  return first;
}

absl::Status Engine::Step(int64_t layer, absl::Span<const EngineStep> batch, EngineStream stream) {
  if (!batch.empty() && batch[0].sequence->joined != nullptr) {
    absl::Status status = impl_->StepJoined(layer, batch, stream);
    for (const EngineStep& step : batch) {
      if (step.status != nullptr) *step.status = status;
    }
    return status;
  }
  std::vector<absl::Status> begun(batch.size());
  for (size_t i = 0; i < batch.size(); ++i) {
    begun[i] = impl_->BeginStep(batch[i].sequence, layer, batch[i].queries, stream);
  }
  absl::Status first;
  for (size_t i = 0; i < batch.size(); ++i) {
    const EngineStep& step = batch[i];
    absl::Status status = begun[i];
    if (status.ok()) status = step.sequence->layers->Attend(layer, step.output, stream);
    first.Update(status);
    if (step.status != nullptr) *step.status = std::move(status);
  }
  return first;
}

absl::Status Engine::Wait(EngineSequence* of) {
  of->WaitUntilIdle(*impl_->device);
  CKV_RETURN_IF_ERROR(of->TakeFailure());
  return of->joined == nullptr ? absl::OkStatus() : of->joined->group->Failure();
}

absl::Status Engine::Join(absl::Span<EngineSequence* const> batch) {
  std::vector<DecodeSession*> sessions;
  for (EngineSequence* of : batch) {
    of->WaitUntilIdle(*impl_->device);
    CKV_RETURN_IF_ERROR(of->TakeFailure());
    if (of->session == nullptr) return NotAttached(of->sequence);
    if (of->joined != nullptr || std::count(batch.begin(), batch.end(), of) > 1) {
      return Error(v1::INVALID_FIELD, absl::StrCat("batch: sequence ", of->sequence.handle().name(),
                                                   ": expected it once, and in no group"));
    }
    sessions.push_back(of->session.get());
  }
  if (batch.empty()) return Error(v1::INVALID_FIELD, "batch: expected 1 or more sequences, got 0");
  auto members = std::make_unique<EngineMembers>();
  members->sequences.assign(batch.begin(), batch.end());
  CKV_ASSIGN_OR_RETURN(members->group,
                       impl_->device->MakeGroup(sessions, impl_->options.output_type));
  for (EngineSequence* of : batch) {
    of->joined = members.get();
    of->layers.reset();  // of steps one by one
  }
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->groups.push_back(std::move(members));
  return absl::OkStatus();
}

absl::Status Engine::Settle(EngineSequence* of, EngineStream stream) {
  if (of->joined == nullptr) return NotJoined(of->sequence);
  of->joined->stream = stream;
  return of->joined->group->Settle(stream);
}

absl::Status Engine::Leave(EngineSequence* of, EngineStream stream) {
  if (of->joined == nullptr) return NotJoined(of->sequence);
  return impl_->Leave(of->joined, stream);
}

absl::Status Engine::Close(EngineSequence* of) {
  of->WaitUntilIdle(*impl_->device);
  absl::Status status = of->TakeFailure();
  if (of->joined != nullptr) status.Update(impl_->Leave(of->joined, of->joined->stream));
  if (of->session != nullptr) status.Update(of->session->Flush());
  impl_->Remove(of);
  return status;
}

absl::Status Engine::Release(EngineSequence* of) {
  of->WaitUntilIdle(*impl_->device);
  if (of->joined != nullptr) impl_->Leave(of->joined, of->joined->stream).IgnoreError();
  const v1::SequenceHandle handle = of->sequence.handle();
  Client* const client = of->client;
  impl_->Remove(of);
  return client->ReleaseSequence(handle);
}

const v1::Sequence& Engine::sequence(const EngineSequence& sequence) { return sequence.sequence; }

std::string Engine::link(const EngineSequence& sequence) {
  if (sequence.joined != nullptr) return "resident";
  return sequence.session == nullptr ? "" : LinkName(sequence.session->link());
}

std::string Engine::link_reason(const EngineSequence& sequence) {
  return sequence.session == nullptr ? "" : sequence.session->link_reason();
}

}  // namespace clusterkv::worker
