// The shard: puts its rooms together. What each does is written in its header.
#include "cache_service/shard.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/attachments.h"
#include "cache_service/errors.h"
#include "cache_service/executors.h"
#include "cache_service/ingest_windows.h"
#include "cache_service/ledger_check.h"
#include "cache_service/recall.h"
#include "cache_service/resident_groups.h"
#include "cache_service/selector.h"
#include "cache_service/sequence_store.h"
#include "cache_service/sessions.h"
#include "cache_service/shard_counters.h"
#include "kernels/base/host_id.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using Notice = v1::SessionResponse::Notice;

// Memory of builds beside the arena: resident memory stays under arena_bytes * 1.1 + 128 MiB.
int64_t BuildScratchBytes(const ShardOptions& options) {
  return std::max<int64_t>(int64_t{64} << 20, options.arena_bytes / 16);
}

// Of one window: no memory has more.
constexpr uint64_t kMostWindowBytes = uint64_t{1} << 40;

// Calls `tick` every `period` on a thread of its own until it dies.
class Ticker {
 public:
  Ticker(absl::Duration period, std::function<void()> tick)
      : thread_([this, period, tick = std::move(tick)] {
          std::unique_lock<std::mutex> lock(mutex_);
          while (!condition_.wait_for(lock, absl::ToChronoNanoseconds(period),
                                      [this] { return ending_; })) {
            lock.unlock();
            tick();
            lock.lock();
          }
        }) {}
  ~Ticker() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    condition_.notify_all();
    thread_.join();
  }

 private:
  // Not absl's: its waits follow the wall clock, which jumps.
  std::mutex mutex_;
  std::condition_variable condition_;
  bool ending_ = false;
  std::thread thread_;
};

class ShardImpl : public Shard {
 public:
  ShardImpl(const ShardOptions& options, std::unique_ptr<Arena> arena,
            std::unique_ptr<ShardDevice> device, std::unique_ptr<Executors> executors)
      : options_(options),
        boot_id_(RandomId()),
        start_(absl::Now()),
        arena_(std::move(arena)),
        device_(std::move(device)),
        executors_(std::move(executors)),
        sessions_(options.session_ttl),
        attachments_(options.max_attachments, options.residency_bytes, options.attachment_ttl),
        residents_(device_.get(), &attachments_, options.attachment_ttl),
        store_(options, boot_id_, arena_.get(), executors_.get(), device_.get(), &counters_,
               &calls_,
               [this](const std::shared_ptr<Sequence>& sequence, Notice::Kind kind) {
                 SequenceGone(sequence, kind);
               }),
        selector_(options, &store_, &attachments_, executors_.get(), device_.get(), &counters_),
        ticker_(std::make_unique<Ticker>(TickPeriod(options), [this] { Tick(); })) {}

  ~ShardImpl() override {
    ticker_.reset();
    executors_->Stop();
    store_.Clear(ServerEnding());
    executors_.reset();  // waits for what runs, gives up what is queued
    attachments_.Clear();
  }

  uint64_t boot_id() const override { return boot_id_; }
  const ShardOptions& options() const override { return options_; }
  std::string device_name() const override { return device_ == nullptr ? "cpu" : device_->name(); }
  int64_t page_bytes() const override { return arena_->page_bytes(); }

  // --- sequences

  absl::StatusOr<v1::Sequence> OpenSequence(const v1::OpenSequenceRequest& request) override {
    CKV_RETURN_IF_ERROR(CheckNew(request.session_id()));
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Open(request));
    return OwnedBy(request.session_id(), sequence);
  }

  absl::Status PutChunk(const v1::SequenceHandle& handle, const KvChunkView& chunk) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(handle));
    return sequence->PutChunk(chunk);
  }

  absl::StatusOr<v1::ConnectIngestResponse> ConnectIngest(
      const v1::ConnectIngestRequest& request) override;

  absl::Status PutWindow(const v1::PutWindowRequest& request) override {
    CKV_ASSIGN_OR_RETURN(const std::shared_ptr<RowWindow> window,
                         windows_.Find(request.window_id()));
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(request.sequence()));
    WindowChunkView chunk;
    chunk.layer = request.layer();
    chunk.first_token = request.first_token();
    chunk.tokens = request.tokens();
    chunk.window = window.get();
    // Beyond what is a number here is beyond every window.
    chunk.keys_offset = static_cast<int64_t>(request.keys_offset());
    chunk.values_offset = static_cast<int64_t>(request.values_offset());
    chunk.checksum = request.checksum();
    return sequence->PutWindow(chunk);
  }

  absl::Status PutStatistics(const v1::SequenceHandle& handle, int64_t layer,
                             absl::Span<const float> query_rms) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(handle));
    return sequence->PutStatistics(layer, query_rms);
  }

  std::vector<uint32_t> CompleteLayers(const v1::SequenceHandle& handle) override {
    const absl::StatusOr<SequenceRef> sequence = store_.Find(handle);
    if (!sequence.ok()) return {};
    return (*sequence)->CompleteLayers();
  }

  void Seal(const v1::SequenceHandle& handle, const CallContext& context,
            std::function<void(absl::StatusOr<v1::Sequence>)> done) override {
    absl::Status status = CheckContext(context, absl::Now());
    if (!status.ok()) return done(std::move(status));
    absl::StatusOr<SequenceRef> sequence = store_.Find(handle);
    if (!sequence.ok()) return done(sequence.status());
    // The reference goes with the callback: what waits for READY is in use, until it is answered.
    SequenceRef ref = *std::move(sequence);
    const std::shared_ptr<Sequence> target = ref.get();
    target->Seal(context, [ref = std::move(ref),
                           done = std::move(done)](absl::StatusOr<v1::Sequence> answer) mutable {
      ref = SequenceRef();
      done(std::move(answer));
    });
  }

  absl::StatusOr<v1::Sequence> GetSequence(const v1::SequenceHandle& handle) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(handle));
    return sequence->ToProto(/*with_layers=*/true);
  }

  std::vector<v1::Sequence> ListSequences(std::string_view prefix, std::string_view after,
                                          int64_t limit) override {
    std::vector<v1::Sequence> protos;
    for (const auto& sequence : store_.List(prefix, after, limit)) {
      protos.push_back(sequence->ToProto(/*with_layers=*/false));
      if (sequence->ended()) protos.pop_back();  // meanwhile
    }
    return protos;
  }

  absl::StatusOr<v1::Sequence> Fork(const v1::ForkSequenceRequest& request) override {
    CKV_RETURN_IF_ERROR(CheckNew(request.session_id()));
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Fork(request));
    return OwnedBy(request.session_id(), sequence);
  }

  absl::Status Release(const v1::SequenceHandle& handle) override { return store_.Release(handle); }

  absl::Status Evict(const v1::SequenceHandle& handle, bool force) override {
    return store_.Evict(handle, force);
  }

  std::vector<std::string> Evictable(std::string_view prefix) override {
    return store_.EvictableNames(prefix);
  }
  bool EvictOne(std::string_view prefix, std::string_view kept) override {
    return store_.EvictForQuota(prefix, kept);
  }

  absl::StatusOr<v1::AppendKvResponse> Append(const v1::AppendKvRequest& request) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(request.sequence()));
    return sequence->Append(request);
  }

  // --- decode

  absl::StatusOr<v1::AttachResponse> Attach(const v1::AttachRequest& request) override;

  std::string WhyNoLink(v1::Link link, const std::string& host) const override {
    const std::string name = link == v1::LINK_PEER   ? "peer"
                             : link == v1::LINK_NCCL ? "nccl"
                                                     : absl::StrCat("link ", int{link});
    if (device_ == nullptr && (link == v1::LINK_PEER || link == v1::LINK_NCCL)) {
      return name + ": this server has no GPU device";
    }
    std::string why = device_ == nullptr ? "unknown to this server" : device_->WhyNoLink(link);
    if (why.empty() && link == v1::LINK_PEER && host != kernels::HostId()) why = "another host";
    return why.empty() ? why : name + ": " + why;
  }

  absl::StatusOr<v1::ConnectLinkResponse> ConnectLink(
      const v1::ConnectLinkRequest& request) override;

  absl::StatusOr<v1::ConnectResidentResponse> ConnectResident(
      const v1::ConnectResidentRequest& request) override {
    CKV_ASSIGN_OR_RETURN(v1::ConnectResidentResponse response,
                         residents_.Connect(request, WhyNoLink(v1::LINK_PEER, request.host())));
    if (response.resident_id() == 0) counters_.link_fallbacks.fetch_add(1);
    return response;
  }

  absl::StatusOr<v1::RenewResidentResponse> RenewResident(
      const v1::RenewResidentRequest& request) override {
    return residents_.Renew(request);
  }

  void DisconnectResident(uint64_t resident_id) override { residents_.Disconnect(resident_id); }

  absl::Status Detach(uint64_t attachment_id) override {
    return attachments_.Detach(attachment_id);
  }

  void Select(std::vector<SelectCall> items, const CallContext& context, bool inline_ok,
              std::function<void(SelectBatchAnswer)> done) override {
    selector_.Select(std::move(items), context, inline_ok, std::move(done));
  }

  absl::StatusOr<RecallAnswer> Recall(const v1::RecallClustersRequest& request) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(request.sequence()));
    CKV_ASSIGN_OR_RETURN(auto snapshot, sequence->Snapshot(request.layer()));
    CKV_ASSIGN_OR_RETURN(RecallAnswer answer, RecallRecords(sequence, std::move(snapshot), request,
                                                            options_.verify_recalls));
    uint64_t records = 0;
    for (const Recalled& head : answer.heads) records += head.records.size();
    counters_.recalled_tokens.fetch_add(records);
    counters_.recalled_bytes.fetch_add(records * static_cast<uint64_t>(answer.record_bytes));
    return answer;
  }

  absl::StatusOr<struct SteadyZone> GetSteadyZone(const v1::SequenceHandle& handle,
                                                  int64_t layer) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(handle));
    return sequence->SteadyZone(layer);
  }

  absl::StatusOr<std::vector<v1::IndexChunk>> GetIndex(
      const v1::GetIndexRequest& request) override {
    CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(request.sequence()));
    CKV_ASSIGN_OR_RETURN(const auto snapshot, sequence->Snapshot(request.layer()));
    return DescribeIndex(sequence->params(), *snapshot, request);
  }

  // --- sessions

  absl::StatusOr<uint64_t> OpenSession(std::string_view worker, uint64_t resume_id,
                                       SessionEvents events, bool* resumed) override {
    // Who resumes is no new work.
    if (resume_id == 0 || !sessions_.CheckAlive(resume_id).ok()) {
      CKV_RETURN_IF_ERROR(CheckDraining());
    }
    return sessions_.Open(worker, resume_id, std::move(events), resumed);
  }

  absl::Status Heartbeat(uint64_t session_id) override { return sessions_.Heartbeat(session_id); }

  void CloseSession(uint64_t session_id, bool now) override {
    if (sessions_.Close(session_id, now)) EndSession(session_id);
  }

  // --- operation

  void StartDrain() override {
    if (draining_.exchange(true)) return;
    Notice notice;
    notice.set_kind(Notice::DRAINING);
    notice.set_detail("the server takes no new sequences, attachments or sessions");
    sessions_.NotifyAll(notice);
  }
  bool draining() const override { return draining_.load(); }
  bool Idle() const override { return executors_->Idle(); }
  bool InUse() const override { return attachments_.of_sessions() > 0 || store_.Filling(); }

  v1::Stats GetStats() override;

  v1::VerifyLedgerResponse VerifyLedger(bool checksums) override {
    const auto quiet_mark = [this] { return Idle() ? calls_.QuietMark() : std::nullopt; };
    return CheckLedger(*arena_, store_, quiet_mark, checksums);
  }

  void CountError(v1::ErrorReason reason) override { counters_.CountError(reason); }

 private:
  static absl::Duration TickPeriod(const ShardOptions& options) {
    const absl::Duration ttl = std::min(options.session_ttl, options.attachment_ttl);
    return std::clamp(ttl / 8, absl::Milliseconds(5), absl::Milliseconds(200));
  }

  absl::Status CheckDraining() const {
    if (!draining()) return absl::OkStatus();
    return Error(v1::DRAINING, "the server is draining and takes no new work");
  }

  absl::Status CheckNew(uint64_t session_id) const {
    CKV_RETURN_IF_ERROR(CheckDraining());
    if (session_id != 0) return sessions_.CheckAlive(session_id);
    return absl::OkStatus();
  }

  // The session may have ended while its sequence was opened: then nobody else would end it.
  absl::StatusOr<v1::Sequence> OwnedBy(uint64_t session_id, const SequenceRef& sequence) {
    if (session_id != 0) {
      if (absl::Status status = sessions_.CheckAlive(session_id); !status.ok()) {
        store_.EndSession(session_id);
        return status;
      }
    }
    return sequence->ToProto(/*with_layers=*/false);
  }

  void TellLost(const std::vector<std::shared_ptr<Attachment>>& lost, std::string_view why) {
    for (const auto& attachment : lost) {
      if (attachment->session_id == 0) continue;
      Notice notice;
      notice.set_kind(Notice::ATTACHMENT_LOST);
      notice.mutable_sequence()->set_name(attachment->sequence->identity().name);
      notice.mutable_sequence()->set_generation(attachment->sequence->identity().generation);
      notice.mutable_sequence()->set_boot_id(boot_id_);
      notice.set_detail(absl::StrCat("attachment ", attachment->id, ": ", std::string(why)));
      sessions_.Notify(attachment->session_id, notice);
    }
  }

  void SequenceGone(const std::shared_ptr<Sequence>& sequence, Notice::Kind kind) {
    TellLost(attachments_.DetachSequence(sequence.get()), "its sequence is gone");
    const uint64_t owner = sequence->session_id.load();
    if (owner == 0) return;
    Notice notice;
    notice.set_kind(kind);
    notice.mutable_sequence()->set_name(sequence->identity().name);
    notice.mutable_sequence()->set_generation(sequence->identity().generation);
    notice.mutable_sequence()->set_boot_id(boot_id_);
    sessions_.Notify(owner, notice);
  }

  void EndSession(uint64_t session_id) {
    windows_.EndSession(session_id);
    attachments_.DetachSession(session_id);
    residents_.EndSession(session_id);
    store_.EndSession(session_id);
  }

  void Tick() {
    for (uint64_t session_id : sessions_.TakeExpired()) EndSession(session_id);
    attachments_.Expire();
    residents_.Expire();
    store_.Expire();
  }

  const ShardOptions options_;
  const uint64_t boot_id_;
  const absl::Time start_;
  ShardCounters counters_;
  CallCounter calls_;
  std::atomic<bool> draining_{false};
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<ShardDevice> device_;  // may be null
  std::unique_ptr<Executors> executors_;
  Sessions sessions_;
  IngestWindows windows_;
  Attachments attachments_;
  ResidentGroups residents_;
  SequenceStore store_;
  Selector selector_;
  std::unique_ptr<Ticker> ticker_;
};

absl::StatusOr<v1::ConnectIngestResponse> ShardImpl::ConnectIngest(
    const v1::ConnectIngestRequest& request) {
  CKV_RETURN_IF_ERROR(sessions_.CheckAlive(request.session_id()));
  CKV_RETURN_IF_ERROR(CheckRange("bytes", 1, kMostWindowBytes, request.bytes()));
  v1::ConnectIngestResponse response;
  if (std::string why = WhyNoLink(v1::LINK_PEER, request.host()); !why.empty()) {
    response.set_reason(why);
    return response;
  }
  absl::StatusOr<std::shared_ptr<RowWindow>> window =
      device_->OpenWindow(request.handle(), static_cast<int64_t>(request.bytes()));
  if (!window.ok()) {
    response.set_reason(std::string(window.status().message()));
    return response;
  }
  response.set_window_id(windows_.Add(request.session_id(), *std::move(window)));
  // The session may have ended meanwhile: then nobody else would end its window.
  absl::Status alive = sessions_.CheckAlive(request.session_id());
  if (!alive.ok()) windows_.EndSession(request.session_id());
  return alive.ok() ? absl::StatusOr<v1::ConnectIngestResponse>(std::move(response)) : alive;
}

absl::Status CheckShape(const v1::KvShape& expected, const v1::KvShape& got) {
  const auto check = [](std::string_view field, uint32_t want, uint32_t have) -> absl::Status {
    if (want == have) return absl::OkStatus();
    return FieldError(v1::SHAPE_MISMATCH, field, absl::StrCat(want), absl::StrCat(have));
  };
  CKV_RETURN_IF_ERROR(check("shape.layers", expected.layers(), got.layers()));
  CKV_RETURN_IF_ERROR(check("shape.kv_heads", expected.kv_heads(), got.kv_heads()));
  CKV_RETURN_IF_ERROR(check("shape.query_heads", expected.query_heads(), got.query_heads()));
  CKV_RETURN_IF_ERROR(check("shape.head_dim", expected.head_dim(), got.head_dim()));
  v1::ElementType type = got.element_type();
  if (type == v1::ELEMENT_TYPE_UNSPECIFIED) type = v1::ELEMENT_TYPE_BFLOAT16;
  if (type == expected.element_type()) return absl::OkStatus();
  return FieldError(v1::DTYPE_MISMATCH, "shape.element_type",
                    v1::ElementType_Name(expected.element_type()), v1::ElementType_Name(type));
}

absl::StatusOr<v1::AttachResponse> ShardImpl::Attach(const v1::AttachRequest& request) {
  CKV_RETURN_IF_ERROR(CheckNew(request.session_id()));
  CKV_ASSIGN_OR_RETURN(const SequenceRef sequence, store_.Find(request.sequence()));
  CKV_RETURN_IF_ERROR(sequence->CheckReady());
  const SequenceParams& base = sequence->params();
  if (request.has_shape()) {
    CKV_RETURN_IF_ERROR(CheckShape(ShapeToProto(base), request.shape()));
  }
  if (!request.codec().empty() && request.codec() != base.codec->name()) {
    return FieldError(v1::INVALID_FIELD, "codec", base.codec->name(), request.codec());
  }
  CKV_ASSIGN_OR_RETURN(SequenceParams params, WithSelectConfig(base, request.select()));
  CKV_ASSIGN_OR_RETURN(
      const auto attachment,
      attachments_.Attach(sequence, std::move(params), request.hot_cache(), request.session_id()));
  // What ended since it was looked at would keep the attachment for ever.
  absl::Status status = sequence->CheckReady();
  if (status.ok() && request.session_id() != 0) status = sessions_.CheckAlive(request.session_id());
  if (!status.ok()) {
    attachments_.Detach(attachment->id).IgnoreError();
    return status;
  }
  v1::AttachResponse response;
  response.set_attachment_id(attachment->id);
  *response.mutable_sequence() = sequence->ToProto(/*with_layers=*/true);
  *response.mutable_sequence()->mutable_select() = SelectConfigOf(attachment->params);
  response.set_link(v1::LINK_GRPC);
  std::string reasons;
  for (const int number : request.links()) {
    const auto link = static_cast<v1::Link>(number);
    if (link == v1::LINK_GRPC) break;
    const std::string why = WhyNoLink(link, request.host());
    if (why.empty()) {
      response.set_link(link);
      break;
    }
    counters_.link_fallbacks.fetch_add(1);
    absl::StrAppend(&reasons, reasons.empty() ? "" : "; ", why);
  }
  response.set_link_reason(reasons);
  response.set_max_exact_tokens(static_cast<uint32_t>(attachment->hot_cache.step_tokens));
  return response;
}

// The window of a worker that is to have every slot of every layer.
absl::Status CheckWindow(const v1::PeerWindow& window, const Attachment& attachment,
                         int64_t record_bytes) {
  const absl::StatusOr<kernels::HotCache> cache = kernels::HotCache::Create(attachment.hot_cache);
  if (!cache.ok()) return cache.status();
  const auto head_bytes = static_cast<uint64_t>(cache->slot_count() * record_bytes);
  const auto kv_heads = static_cast<uint64_t>(attachment.params.shape.kv_heads);
  const auto layers = static_cast<uint64_t>(attachment.params.layers);
  const auto check = [](std::string_view field, uint64_t least, uint64_t got) {
    return CheckRange(field, least, kMostWindowBytes, got);
  };
  CKV_RETURN_IF_ERROR(check("window.head_bytes", head_bytes, window.head_bytes()));
  CKV_RETURN_IF_ERROR(
      check("window.layer_bytes", kv_heads * window.head_bytes(), window.layer_bytes()));
  return check("window.bytes", layers * window.layer_bytes(), window.bytes());
}

absl::StatusOr<v1::ConnectLinkResponse> ShardImpl::ConnectLink(
    const v1::ConnectLinkRequest& request) {
  CKV_ASSIGN_OR_RETURN(const std::shared_ptr<Attachment> attachment,
                       attachments_.Find(request.attachment_id()));
  const SequenceParams& params = attachment->params;
  const int64_t record_bytes =
      params.codec->RecordBytes(params.shape.element_type, params.shape.head_dim);
  if (request.link() == v1::LINK_PEER) {
    CKV_RETURN_IF_ERROR(CheckWindow(request.window(), *attachment, record_bytes));
  }
  v1::ConnectLinkResponse response;
  response.set_link(v1::LINK_GRPC);
  Attachment::LinkInUse in_use, before;
  {
    absl::MutexLock lock(&attachment->link_mutex);
    before = std::exchange(attachment->link_in_use, {});
    in_use.generation = attachment->link_in_use.generation = before.generation + 1;
  }
  before.link.reset();  // at most one per attachment; outside the lock
  response.set_generation(in_use.generation);
  if (request.link() == v1::LINK_GRPC || request.link() == v1::LINK_UNSPECIFIED) return response;
  LinkSetup setup;
  setup.kind = request.link();
  setup.window_handle = request.window().handle();
  setup.window_bytes = static_cast<int64_t>(request.window().bytes());
  setup.max_message_bytes =
      params.shape.kv_heads * attachment->hot_cache.step_tokens * record_bytes;
  absl::StatusOr<std::unique_ptr<RecordLink>> link = absl::UnavailableError(WhyNoLink(
      request.link(),
      kernels::HostId()));  // Attach looked at the host; another's memory cannot be mapped
  if (link.status().message().empty()) link = device_->Connect(setup, response.mutable_unique_id());
  if (!link.ok()) {
    counters_.link_fallbacks.fetch_add(1);
    response.set_link_reason(std::string(link.status().message()));
    return response;
  }
  in_use.link = *std::move(link);
  in_use.layer_bytes = static_cast<int64_t>(request.window().layer_bytes());
  in_use.head_bytes = static_cast<int64_t>(request.window().head_bytes());
  response.set_link(request.link());
  absl::MutexLock lock(&attachment->link_mutex);
  if (attachment->link_in_use.generation == in_use.generation) attachment->link_in_use = in_use;
  return response;
}

v1::Stats ShardImpl::GetStats() {
  v1::Stats stats;
  const PageLedger ledger = arena_->ledger();
  stats.set_boot_id(boot_id_);
  stats.set_uptime_ms(static_cast<uint64_t>(absl::ToInt64Milliseconds(absl::Now() - start_)));
  stats.set_draining(draining());
  LedgerToProto(ledger, stats.mutable_pages());
  stats.set_page_bytes(static_cast<uint64_t>(arena_->page_bytes()));
  stats.set_reserved_pages(static_cast<uint64_t>(ledger.reserved));
  stats.set_sequences(static_cast<uint32_t>(store_.size()));
  stats.set_attachments(static_cast<uint32_t>(attachments_.size()));
  stats.set_sessions(static_cast<uint32_t>(sessions_.size()));
  stats.set_queued_selects(static_cast<uint32_t>(executors_->queued_selects.load()));
  stats.set_queued_builds(static_cast<uint32_t>(executors_->queued_builds.load()));
  stats.set_resident_bytes(ResidentBytes());
  counters_.AddTo(stats);
  stats.set_ingest_windows(static_cast<uint32_t>(windows_.size()));
  if (device_ != nullptr) {
    const DeviceCopies copies = device_->copies();
    stats.set_device_uploaded_bytes(copies.uploaded_bytes);
    stats.set_device_fetched_bytes(copies.fetched_bytes);
    stats.set_device_memory_bytes(static_cast<uint64_t>(device_->memory_bytes()));
  }
  for (const v1::Link link : {v1::LINK_GRPC, v1::LINK_PEER, v1::LINK_NCCL}) {
    const auto count = static_cast<uint32_t>(attachments_.by_link(link));
    (*stats.mutable_attachments_by_link())[LinkName(link)] = count;
    if (link != v1::LINK_GRPC) stats.set_links(stats.links() + count);
  }
  if (const auto residents = static_cast<uint32_t>(residents_.attachments()); residents > 0) {
    (*stats.mutable_attachments_by_link())["resident"] = residents;
  }
  const bool failed = device_ != nullptr && !device_->healthy();
  stats.set_device(device_name() + (failed ? " failed" : ""));
  return stats;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Shard>> Shard::Create(const ShardOptions& options,
                                                     std::unique_ptr<ShardDevice> device) {
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Arena> arena,
                       Arena::Create(options.arena_bytes, options.page_bytes));
  if (device != nullptr) CKV_RETURN_IF_ERROR(device->Start(*arena, options.select_threads));
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<Executors> executors,
                       Executors::Create(options.build_threads, options.select_threads,
                                         BuildScratchBytes(options), options.selects_give_way));
  return std::make_unique<ShardImpl>(options, std::move(arena), std::move(device),
                                     std::move(executors));
}

}  // namespace clusterkv::cache_service
