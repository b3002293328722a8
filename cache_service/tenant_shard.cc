#include "cache_service/tenant_shard.h"

#include <sched.h>

#include <charconv>
#include <limits>
#include <map>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "cache_service/errors.h"
#include "cache_service/memory_account.h"
#include "cache_service/sessions.h"
#include "cache_service/tenant_names.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using Notice = v1::SessionResponse::Notice;

// A permutation of the 64-bit numbers by a key, 0 left where it is.
class Permutation {
 public:
  Permutation() : before_(RandomId()), after_(RandomId()) {}
  uint64_t Show(uint64_t x) const {
    if (x == 0) return 0;
    x = Fold(x ^ before_) * kFirst;
    x = Fold(x) * kSecond;
    return Fold(x) ^ after_;
  }
  uint64_t Read(uint64_t x) const {
    if (x == 0) return 0;
    x = Fold(x ^ after_) * Inverse(kSecond);
    x = Fold(x) * Inverse(kFirst);
    return Fold(x) ^ before_;
  }

 private:
  static constexpr uint64_t kFirst = 0xbf58476d1ce4e5b9u, kSecond = 0x94d049bb133111ebu;
  static uint64_t Fold(uint64_t x) { return x ^ (x >> 32); }  // its own inverse
  static constexpr uint64_t Inverse(uint64_t odd) {           // modulo 2^64, by Newton
    uint64_t inverse = odd;
    for (int i = 0; i < 5; ++i) inverse *= 2 - odd * inverse;
    return inverse;
  }
  const uint64_t before_, after_;
};

std::string Without(std::string text, std::string_view part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
  return text;
}

uint64_t Number(const std::string& text) {
  uint64_t number = 0;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

std::string& Value(ErrorMetadata& metadata, std::string_view key) {
  for (auto& [name, value] : metadata) {
    if (name == key) return value;
  }
  return metadata.emplace_back(std::string(key), "").second;
}

class TenantShard : public Shard {
 public:
  TenantShard(int index, const TenantOptions& options, Shard* shard, FairQueue* queue)
      : scope_(TenantScope(index)),
        quota_bytes_(options.arena_bytes),
        shard_(*shard),
        queue_(*queue),
        line_(queue->AddLine(options.weight)) {}

  uint64_t boot_id() const override { return shard_.boot_id(); }
  const ShardOptions& options() const override { return shard_.options(); }
  std::string device_name() const override { return shard_.device_name(); }
  int64_t page_bytes() const override { return shard_.page_bytes(); }

  // --- sequences

  absl::StatusOr<v1::Sequence> OpenSequence(const v1::OpenSequenceRequest& request) override {
    return Opened(request.name(), "", request, [&]() -> absl::StatusOr<v1::Sequence> {
      v1::OpenSequenceRequest own = request;
      CKV_RETURN_IF_ERROR(CheckName(request.name()));
      own.set_name(scope_ + request.name());
      own.set_session_id(ids_.Read(request.session_id()));
      return shard_.OpenSequence(own);
    });
  }

  absl::Status PutChunk(const v1::SequenceHandle& sequence, const KvChunkView& chunk) override {
    return Clean(shard_.PutChunk(Own(sequence), chunk));
  }
  absl::Status PutStatistics(const v1::SequenceHandle& sequence, int64_t layer,
                             absl::Span<const float> query_rms) override {
    return Clean(shard_.PutStatistics(Own(sequence), layer, query_rms));
  }
  std::vector<uint32_t> CompleteLayers(const v1::SequenceHandle& sequence) override {
    return shard_.CompleteLayers(Own(sequence));
  }
  void Seal(const v1::SequenceHandle& sequence, const CallContext& context,
            std::function<void(absl::StatusOr<v1::Sequence>)> done) override {
    shard_.Seal(Own(sequence), context,
                [this, done = std::move(done)](absl::StatusOr<v1::Sequence> answer) {
                  done(Shown(std::move(answer)));
                });
  }
  absl::StatusOr<v1::Sequence> GetSequence(const v1::SequenceHandle& sequence) override {
    return Shown(shard_.GetSequence(Own(sequence)));
  }

  std::vector<v1::Sequence> ListSequences(std::string_view prefix, std::string_view after,
                                          int64_t limit) override {
    std::vector<v1::Sequence> sequences =
        shard_.ListSequences(scope_ + std::string(prefix),
                             after.empty() ? std::string() : scope_ + std::string(after), limit);
    for (v1::Sequence& sequence : sequences) Show(sequence.mutable_handle());
    return sequences;
  }

  absl::StatusOr<v1::Sequence> Fork(const v1::ForkSequenceRequest& request) override {
    CKV_ASSIGN_OR_RETURN(const v1::Sequence source, GetSequence(request.source()));
    v1::OpenSequenceRequest alike;
    alike.set_name(request.name());
    *alike.mutable_shape() = source.shape();
    *alike.mutable_index() = source.index();
    alike.set_prompt_tokens(source.tokens());
    alike.set_max_decode_tokens(request.max_decode_tokens());
    alike.set_codec(source.codec());
    return Opened(request.name(), request.source().name(), alike,
                  [&]() -> absl::StatusOr<v1::Sequence> {
                    v1::ForkSequenceRequest own = request;
                    CKV_RETURN_IF_ERROR(CheckName(request.name()));
                    *own.mutable_source() = Own(request.source());
                    own.set_name(scope_ + request.name());
                    own.set_session_id(ids_.Read(request.session_id()));
                    return shard_.Fork(own);
                  });
  }

  absl::Status Release(const v1::SequenceHandle& sequence) override {
    return Clean(shard_.Release(Own(sequence)));
  }
  absl::Status Evict(const v1::SequenceHandle& sequence, bool force) override {
    return Clean(shard_.Evict(Own(sequence), force));
  }
  std::vector<std::string> Evictable(std::string_view prefix) override {
    std::vector<std::string> names = shard_.Evictable(scope_ + std::string(prefix));
    for (std::string& name : names) name.erase(0, scope_.size());
    return names;
  }
  bool EvictOne(std::string_view prefix, std::string_view kept) override {
    return shard_.EvictOne(scope_ + std::string(prefix), scope_ + std::string(kept));
  }
  absl::StatusOr<v1::ConnectIngestResponse> ConnectIngest(
      const v1::ConnectIngestRequest& request) override {
    v1::ConnectIngestRequest own = request;
    own.set_session_id(ids_.Read(request.session_id()));
    absl::StatusOr<v1::ConnectIngestResponse> response = Cleaned(shard_.ConnectIngest(own));
    if (response.ok() && response->window_id() != 0) {
      response->set_window_id(ids_.Show(response->window_id()));
    }
    return response;
  }
  absl::Status PutWindow(const v1::PutWindowRequest& request) override {
    v1::PutWindowRequest own = request;
    *own.mutable_sequence() = Own(request.sequence());
    own.set_window_id(ids_.Read(request.window_id()));
    return Clean(shard_.PutWindow(own));
  }
  absl::StatusOr<v1::AppendKvResponse> Append(const v1::AppendKvRequest& request) override {
    v1::AppendKvRequest own = request;
    *own.mutable_sequence() = Own(request.sequence());
    return Cleaned(shard_.Append(own));
  }

  // --- decode

  absl::StatusOr<v1::AttachResponse> Attach(const v1::AttachRequest& request) override {
    v1::AttachRequest own = request;
    *own.mutable_sequence() = Own(request.sequence());
    own.set_session_id(ids_.Read(request.session_id()));
    absl::StatusOr<v1::AttachResponse> response = Cleaned(shard_.Attach(own));
    if (!response.ok()) return response;
    response->set_attachment_id(ids_.Show(response->attachment_id()));
    Show(response->mutable_sequence()->mutable_handle());
    return response;
  }
  std::string WhyNoLink(v1::Link link, const std::string& host) const override {
    return shard_.WhyNoLink(link, host);
  }
  absl::StatusOr<v1::ConnectLinkResponse> ConnectLink(
      const v1::ConnectLinkRequest& request) override {
    v1::ConnectLinkRequest own = request;
    own.set_attachment_id(ids_.Read(request.attachment_id()));
    return Cleaned(shard_.ConnectLink(own));
  }
  absl::StatusOr<v1::ConnectResidentResponse> ConnectResident(
      const v1::ConnectResidentRequest& request) override {
    v1::ConnectResidentRequest own = request;
    for (uint64_t& id : *own.mutable_attachment_ids()) id = ids_.Read(id);
    absl::StatusOr<v1::ConnectResidentResponse> response = Cleaned(shard_.ConnectResident(own));
    if (response.ok() && response->resident_id() != 0) {
      response->set_resident_id(ids_.Show(response->resident_id()));
    }
    return response;
  }
  absl::StatusOr<v1::RenewResidentResponse> RenewResident(
      const v1::RenewResidentRequest& request) override {
    v1::RenewResidentRequest own = request;
    own.set_resident_id(ids_.Read(request.resident_id()));
    return Cleaned(shard_.RenewResident(own));
  }
  void DisconnectResident(uint64_t resident_id) override {
    shard_.DisconnectResident(ids_.Read(resident_id));
  }
  absl::Status Detach(uint64_t attachment_id) override {
    return Clean(shard_.Detach(ids_.Read(attachment_id)));
  }
  void Select(std::vector<SelectCall> items, const CallContext& context, bool inline_ok,
              std::function<void(SelectBatchAnswer)> done) override;
  absl::StatusOr<RecallAnswer> Recall(const v1::RecallClustersRequest& request) override {
    v1::RecallClustersRequest own = request;
    *own.mutable_sequence() = Own(request.sequence());
    return Cleaned(shard_.Recall(own));
  }
  absl::StatusOr<struct SteadyZone> GetSteadyZone(const v1::SequenceHandle& sequence,
                                                  int64_t layer) override {
    return Cleaned(shard_.GetSteadyZone(Own(sequence), layer));
  }
  absl::StatusOr<std::vector<v1::IndexChunk>> GetIndex(
      const v1::GetIndexRequest& request) override {
    v1::GetIndexRequest own = request;
    *own.mutable_sequence() = Own(request.sequence());
    return Cleaned(shard_.GetIndex(own));
  }

  // --- sessions

  absl::StatusOr<uint64_t> OpenSession(std::string_view worker, uint64_t resume_id,
                                       SessionEvents events, bool* resumed) override {
    if (events.notice != nullptr) {
      events.notice = [this, notice = std::move(events.notice)](const Notice& raw) {
        notice(Shown(raw));
      };
    }
    CKV_ASSIGN_OR_RETURN(
        const uint64_t id,
        Cleaned(shard_.OpenSession(worker, ids_.Read(resume_id), std::move(events), resumed)));
    return ids_.Show(id);
  }
  absl::Status Heartbeat(uint64_t session_id) override {
    return Clean(shard_.Heartbeat(ids_.Read(session_id)));
  }
  void CloseSession(uint64_t session_id, bool now) override {
    shard_.CloseSession(ids_.Read(session_id), now);
  }

  // --- operation

  void StartDrain() override { shard_.StartDrain(); }
  bool draining() const override { return shard_.draining(); }
  bool Idle() const override { return shard_.Idle(); }
  bool InUse() const override { return shard_.InUse(); }
  v1::VerifyLedgerResponse VerifyLedger(bool checksums) override {
    return shard_.VerifyLedger(checksums);
  }
  void CountError(v1::ErrorReason reason) override { shard_.CountError(reason); }

  v1::Stats GetStats() override {
    absl::MutexLock lock(&mutex_);
    v1::Stats stats;
    const int64_t planned = ForgetEnded();
    stats.set_sequences(static_cast<uint32_t>(planned_.size()));
    stats.set_page_bytes(static_cast<uint64_t>(page_bytes()));
    stats.set_reserved_pages(static_cast<uint64_t>(planned / page_bytes()));
    stats.set_queued_selects(static_cast<uint32_t>(queue_.waiting(line_)));
    return stats;
  }

 private:
  struct Planned {
    uint64_t generation;
    int64_t bytes;
  };

  static absl::Status CheckName(const std::string& name) {
    if (!name.empty() && name.size() <= kMaxNameBytes) return absl::OkStatus();
    return FieldError(v1::INVALID_FIELD, "sequence.name",
                      absl::StrCat("1 to ", kMaxNameBytes, " bytes"),
                      absl::StrCat(name.size(), " bytes"));
  }

  v1::SequenceHandle Own(const v1::SequenceHandle& handle) const {
    v1::SequenceHandle own = handle;
    // No name stays no name, which the shard refuses.
    if (!handle.name().empty()) own.set_name(scope_ + handle.name());
    own.set_generation(generations_.Read(handle.generation()));
    return own;
  }
  void Show(v1::SequenceHandle* handle) const {
    if (handle->name().compare(0, scope_.size(), scope_) == 0) {
      handle->mutable_name()->erase(0, scope_.size());
    }
    handle->set_generation(generations_.Show(handle->generation()));
  }
  absl::StatusOr<v1::Sequence> Shown(absl::StatusOr<v1::Sequence> sequence) const {
    if (!sequence.ok()) return Clean(std::move(sequence).status());
    Show(sequence->mutable_handle());
    return sequence;
  }
  Notice Shown(const Notice& raw) const;

  absl::Status Clean(absl::Status status) const;
  template <typename T>
  absl::StatusOr<T> Cleaned(absl::StatusOr<T> answer) const {
    if (!answer.ok()) return Clean(std::move(answer).status());
    return answer;
  }

  // Opens by `open` if the quota has room for a sequence of the request's shape, or gets it by
  // evicting others than `source`.
  absl::StatusOr<v1::Sequence> Opened(const std::string& name, const std::string& source,
                                      const v1::OpenSequenceRequest& shape,
                                      absl::FunctionRef<absl::StatusOr<v1::Sequence>()> open)
      ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status MakeRoom(int64_t bytes, const std::string& name, const std::string& source)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Forgets sequences that the shard no longer has; the bytes of the others.
  int64_t ForgetEnded() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string scope_;
  const int64_t quota_bytes_;  // 0: none
  Shard& shard_;
  FairQueue& queue_;
  const int line_;
  const Permutation generations_, ids_;
  absl::Mutex mutex_;  // before the shard's
  std::map<std::string, Planned, std::less<>> planned_ ABSL_GUARDED_BY(mutex_);  // by scoped name
};

// --- what is told

absl::Status TenantShard::Clean(absl::Status status) const {
  if (status.ok()) return status;
  const v1::ErrorReason reason = ReasonOf(status);
  ErrorMetadata metadata = MetadataOf(status);
  for (auto& [key, value] : metadata) value = Without(std::move(value), scope_);
  std::string message = Without(std::string(status.message()), scope_);
  const auto shown = [&](const Permutation& permutation, std::string_view key) {
    std::string& value = Value(metadata, key);
    value = absl::StrCat(permutation.Show(Number(value)));
    return value;
  };
  switch (reason) {
    case v1::STALE_GENERATION: {
      const std::string expected = shown(generations_, "expected"),
                        got = shown(generations_, "got");
      message = absl::StrCat("sequence ", Value(metadata, "sequence"), ": generation: expected ",
                             expected, ", got ", got);
      break;
    }
    case v1::SEQUENCE_EXISTS:
      message = absl::StrCat("name: a sequence named ", Value(metadata, "sequence"),
                             " is live in generation ", shown(generations_, "generation"));
      break;
    case v1::SEQUENCE_RELEASED:
      return SequenceReleased(Value(metadata, "sequence"),
                              generations_.Show(Number(Value(metadata, "generation"))));
    case v1::ATTACHMENT_NOT_FOUND:
      message = absl::StrCat("no attachment has the id ", shown(ids_, "attachmentId"));
      break;
    case v1::SESSION_NOT_FOUND:
      message = absl::StrCat("no session has the id ", shown(ids_, "sessionId"));
      break;
    case v1::ARENA_FULL: {
      const std::string needed = Value(metadata, "neededPages");
      message = absl::StrCat("the arena has no room: needed ", needed, " pages");
      metadata = {{"neededPages", needed}};
      break;
    }
    default:
      break;
  }
  return ErrorFromParts(status.code(), reason, message, metadata);
}

Notice TenantShard::Shown(const Notice& raw) const {
  Notice notice = raw;
  if (notice.has_sequence()) Show(notice.mutable_sequence());
  notice.set_detail(Without(notice.detail(), scope_));
  constexpr std::string_view kAttachment = "attachment ";
  if (notice.kind() == Notice::ATTACHMENT_LOST &&
      notice.detail().compare(0, kAttachment.size(), kAttachment) == 0) {
    const std::string rest = notice.detail().substr(kAttachment.size());
    const size_t colon = std::min(rest.find(':'), rest.size());
    notice.set_detail(
        absl::StrCat("attachment ", ids_.Show(Number(rest.substr(0, colon))), rest.substr(colon)));
  }
  return notice;
}

// --- quota

int64_t TenantShard::ForgetEnded() {
  std::map<std::string, uint64_t> live;
  for (const v1::Sequence& sequence :
       shard_.ListSequences(scope_, "", std::numeric_limits<int64_t>::max())) {
    live[sequence.handle().name()] = sequence.handle().generation();
  }
  int64_t bytes = 0;
  for (auto it = planned_.begin(); it != planned_.end();) {
    const auto found = live.find(it->first);
    if (found != live.end() && found->second == it->second.generation) {
      bytes += (it++)->second.bytes;
    } else {
      it = planned_.erase(it);
    }
  }
  return bytes;
}

absl::Status TenantShard::MakeRoom(int64_t bytes, const std::string& name,
                                   const std::string& source) {
  if (quota_bytes_ == 0) return absl::OkStatus();
  int64_t used = ForgetEnded();
  const auto planned = [this](const std::string& of) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto found = planned_.find(scope_ + of);
    return found == planned_.end() ? 0 : found->second.bytes;
  };
  int64_t evictable = 0;
  for (const std::string& one : Evictable("")) evictable += one == source ? 0 : planned(one);
  // Nobody leaves for what does not fit anyway, or is refused for another reason.
  const bool hopeful =
      used + bytes - evictable <= quota_bytes_ && !draining() && planned(name) == 0;
  while (hopeful && used + bytes > quota_bytes_ && EvictOne("", source)) used = ForgetEnded();
  if (used + bytes <= quota_bytes_) return absl::OkStatus();
  constexpr int kRetryAfterMs = 1000;  // others of the tenant must be released first
  return Error(v1::TENANT_QUOTA,
               absl::StrCat("arena_bytes of the tenant: expected at most ", quota_bytes_,
                            " bytes in all its sequences, got ", used, " and ", bytes, " more"),
               {{"limit", "arena_bytes"},
                {"expected", absl::StrCat(quota_bytes_)},
                {"used", absl::StrCat(used)},
                {"needed", absl::StrCat(bytes)},
                {"retryAfterMs", absl::StrCat(kRetryAfterMs)}});
}

absl::StatusOr<v1::Sequence> TenantShard::Opened(
    const std::string& name, const std::string& source, const v1::OpenSequenceRequest& shape,
    absl::FunctionRef<absl::StatusOr<v1::Sequence>()> open) {
  CKV_ASSIGN_OR_RETURN(const SequenceParams params, ResolveParams(shape));
  CKV_ASSIGN_OR_RETURN(const MemoryPlan plan, PlanSequence(params, page_bytes()));
  const int64_t bytes = plan.total() * page_bytes();
  absl::MutexLock lock(&mutex_);  // so that two that fit alone do not both get in
  CKV_RETURN_IF_ERROR(MakeRoom(bytes, name, source));
  absl::StatusOr<v1::Sequence> sequence = open();
  if (sequence.ok()) planned_[scope_ + name] = {sequence->handle().generation(), bytes};
  return Shown(std::move(sequence));
}

// --- turns

void TenantShard::Select(std::vector<SelectCall> items, const CallContext& context, bool inline_ok,
                         std::function<void(SelectBatchAnswer)> done) {
  struct Pending {
    std::vector<SelectCall> items;
    CallContext context;
    std::function<void(SelectBatchAnswer)> done;
    absl::Time entered;
  };
  if (items.empty()) return done({});
  for (SelectCall& item : items) {
    item.sequence = Own(item.sequence);
    item.attachment_id = ids_.Read(item.attachment_id);
  }
  const auto count = static_cast<int64_t>(items.size());
  auto pending =
      std::make_shared<Pending>(Pending{std::move(items), context, std::move(done), absl::Now()});
  const bool entered = queue_.Enter(line_, count, [this, pending, inline_ok](bool at_once) {
    const absl::Duration waited = at_once ? absl::ZeroDuration() : absl::Now() - pending->entered;
    shard_.Select(std::move(pending->items), pending->context, inline_ok && at_once,
                  [this, pending, waited](SelectBatchAnswer answer) {
                    answer.queued += waited;
                    for (SelectAnswer& item : answer.items) {
                      item.generation = generations_.Show(item.generation);
                      item.status = Clean(std::move(item.status));
                    }
                    pending->done(std::move(answer));
                    // A turn is given once those calls are known that have come by now: whoever
                    // reads the network waits for this CPU.
                    sched_yield();
                    queue_.Leave();
                  });
  });
  if (entered) return;
  SelectBatchAnswer refused;
  refused.items.resize(static_cast<size_t>(count));
  for (size_t i = 0; i < refused.items.size(); ++i) {
    const int64_t limit = options().max_queued_selects;
    refused.items[i].status = LimitError("max_queued_selects", limit, limit + 1);
    refused.items[i].layer = pending->items[i].layer;
  }
  pending->done(std::move(refused));
}

}  // namespace

std::unique_ptr<Shard> MakeTenantShard(int index, const TenantOptions& options, Shard* shard,
                                       FairQueue* queue) {
  return std::make_unique<TenantShard>(index, options, shard, queue);
}

}  // namespace clusterkv::cache_service
