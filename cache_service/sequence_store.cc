#include "cache_service/sequence_store.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "cache_service/tenant_names.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using Notice = v1::SessionResponse::Notice;

const EvictionPolicy& RequiredPolicy(std::string_view name) {
  const EvictionPolicy* policy = FindEvictionPolicy(name);
  CKV_CHECK(policy != nullptr) << name;
  return *policy;
}

absl::Duration Milliseconds(uint32_t ms) { return absl::Milliseconds(int64_t{ms}); }

}  // namespace

int64_t SteadyNow() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

SequenceStore::SequenceStore(const ShardOptions& options, uint64_t boot_id, Arena* arena,
                             Executors* executors, ShardDevice* device, ShardCounters* counters,
                             CallCounter* calls, Gone gone)
    : options_(options),
      boot_id_(boot_id),
      services_{arena, executors, this, counters, calls, device},
      gone_(std::move(gone)),
      eviction_(RequiredPolicy("lru")) {}

void SequenceStore::Touch(Sequence& sequence) {
  sequence.last_use.store(uses_.fetch_add(1));
  sequence.last_use_ns.store(SteadyNow());
}

SequenceIdentity SequenceStore::NewIdentity(const std::string& name) {
  return {name, next_generation_.fetch_add(1), boot_id_};
}

int64_t SequenceStore::size() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(sequences_.size());
}

bool SequenceStore::Filling() const {
  absl::MutexLock lock(&mutex_);
  return std::any_of(sequences_.begin(), sequences_.end(), [](const auto& entry) {
    const v1::SequenceState state = entry.second->state();
    return entry.second->session_id.load() != 0 && state != v1::SEQUENCE_STATE_READY &&
           state != v1::SEQUENCE_STATE_APPENDING;
  });
}

// --- finding

absl::Status SequenceStore::CheckName(const std::string& name) const {
  if (!name.empty() && OwnNameBytes(name) <= kMaxNameBytes) return absl::OkStatus();
  return FieldError(v1::INVALID_FIELD, "sequence.name",
                    absl::StrCat("1 to ", kMaxNameBytes, " bytes"),
                    absl::StrCat(OwnNameBytes(name), " bytes"));
}

absl::StatusOr<SequenceRef> SequenceStore::Find(const v1::SequenceHandle& handle) {
  CKV_RETURN_IF_ERROR(CheckName(handle.name()));
  if (handle.boot_id() != 0 && handle.boot_id() != boot_id_) {
    return Error(v1::STALE_BOOT_ID,
                 absl::StrCat("sequence ", handle.name(), ": boot_id: expected ",
                              absl::Hex(boot_id_), ", got ", absl::Hex(handle.boot_id())),
                 {{"sequence", handle.name()},
                  {"expected", absl::StrCat(boot_id_)},
                  {"got", absl::StrCat(handle.boot_id())}});
  }
  absl::MutexLock lock(&mutex_);
  const auto it = sequences_.find(handle.name());
  if (it == sequences_.end()) {
    return Error(v1::SEQUENCE_NOT_FOUND, absl::StrCat("no sequence is named ", handle.name()),
                 {{"sequence", handle.name()}});
  }
  const uint64_t live = it->second->identity().generation;
  if (handle.generation() != 0 && handle.generation() != live) {
    return Error(v1::STALE_GENERATION,
                 absl::StrCat("sequence ", handle.name(), ": generation: expected ", live, ", got ",
                              handle.generation()),
                 {{"sequence", handle.name()},
                  {"expected", absl::StrCat(live)},
                  {"got", absl::StrCat(handle.generation())}});
  }
  Touch(*it->second);
  return SequenceRef(it->second);
}

std::vector<std::shared_ptr<Sequence>> SequenceStore::List(std::string_view prefix,
                                                           std::string_view after, int64_t limit) {
  std::vector<std::shared_ptr<Sequence>> listed;
  absl::MutexLock lock(&mutex_);
  auto it = after < prefix ? sequences_.lower_bound(prefix) : sequences_.upper_bound(after);
  for (; it != sequences_.end() && static_cast<int64_t>(listed.size()) < limit; ++it) {
    if (std::string_view(it->first).substr(0, prefix.size()) != prefix) break;
    listed.push_back(it->second);
  }
  return listed;
}

// --- admission

absl::Status SequenceStore::CheckNew(const std::string& name) const {
  const auto it = sequences_.find(name);
  if (it != sequences_.end()) {
    return Error(
        v1::SEQUENCE_EXISTS,
        absl::StrCat("name: a sequence named ", name, " is live in generation ",
                     it->second->identity().generation),
        {{"sequence", name}, {"generation", absl::StrCat(it->second->identity().generation)}});
  }
  const int64_t count = static_cast<int64_t>(sequences_.size());
  if (count < options_.max_sequences) return absl::OkStatus();
  return LimitError("max_sequences", options_.max_sequences, count + 1);
}

absl::Status SequenceStore::Admit(const std::string& name) {
  while (true) {
    absl::Status status;
    {
      absl::MutexLock lock(&mutex_);
      status = CheckNew(name);
    }
    if (ReasonOf(status) != v1::LIMIT_EXCEEDED || !EvictOne()) return status;
  }
}

absl::Status SequenceStore::CheckRoom(int64_t pages) {
  const PageLedger ledger = services_.arena->ledger();
  int64_t evictable = 0;
  absl::MutexLock lock(&mutex_);
  if (ledger.free - ledger.reserved >= pages) return absl::OkStatus();
  for (const auto& [name, sequence] : sequences_) {
    if (!Evictable(*sequence)) continue;
    evictable += sequence->held_pages() + sequence->reserved_pages();
  }
  if (ledger.free - ledger.reserved + evictable >= pages) return absl::OkStatus();
  return Error(v1::ARENA_FULL,
               absl::StrCat("the arena has no room: needed ", pages, " pages, free ", ledger.free,
                            ", of these reserved ", ledger.reserved, ", could evict ", evictable,
                            ", of ", ledger.total),
               {{"neededPages", absl::StrCat(pages)},
                {"freePages", absl::StrCat(ledger.free)},
                {"reservedPages", absl::StrCat(ledger.reserved)},
                {"evictablePages", absl::StrCat(evictable)},
                {"totalPages", absl::StrCat(ledger.total)}});
}

absl::StatusOr<std::shared_ptr<MemoryAccount>> SequenceStore::OpenAccount(const MemoryPlan& plan) {
  // Nobody is evicted for what cannot fit anyway.
  CKV_RETURN_IF_ERROR(CheckRoom(plan.total()));
  while (true) {
    auto account = MemoryAccount::Open(services_.arena, plan);
    if (account.ok() || !EvictOne()) return account;
  }
}

absl::StatusOr<SequenceRef> SequenceStore::Insert(std::shared_ptr<Sequence> sequence) {
  Touch(*sequence);
  absl::MutexLock lock(&mutex_);
  CKV_RETURN_IF_ERROR(CheckNew(sequence->identity().name));
  sequences_.emplace(sequence->identity().name, sequence);
  return SequenceRef(std::move(sequence));
}

absl::StatusOr<SequenceRef> SequenceStore::Open(const v1::OpenSequenceRequest& request) {
  const CallCounter::Scope scope(services_.calls);
  CKV_ASSIGN_OR_RETURN(SequenceParams params, ResolveParams(request));
  const int64_t tokens = params.prompt_tokens + params.max_decode_tokens;
  if (tokens > options_.max_sequence_tokens) {
    return LimitError("max_sequence_tokens", options_.max_sequence_tokens, tokens);
  }
  const int64_t scratch =
      IndexPart::TaskScratchBytes(params.shape, params.index, params.prompt_tokens);
  if (scratch > services_.executors->scratch_bytes()) {
    return LimitError("build scratch bytes of one segment (index.segment_tokens)",
                      services_.executors->scratch_bytes(), scratch);
  }
  CKV_ASSIGN_OR_RETURN(const MemoryPlan plan, PlanSequence(params, services_.arena->page_bytes()));
  CKV_RETURN_IF_ERROR(Admit(request.name()));
  CKV_ASSIGN_OR_RETURN(std::shared_ptr<MemoryAccount> account, OpenAccount(plan));
  auto sequence = std::make_shared<Sequence>(NewIdentity(request.name()), std::move(params),
                                             services_, std::move(account));
  sequence->session_id.store(request.session_id());
  sequence->ttl = Milliseconds(request.ttl_ms());
  return Insert(std::move(sequence));
}

absl::StatusOr<SequenceRef> SequenceStore::Fork(const v1::ForkSequenceRequest& request) {
  const CallCounter::Scope scope(services_.calls);
  CKV_ASSIGN_OR_RETURN(const SequenceRef source, Find(request.source()));
  CKV_RETURN_IF_ERROR(CheckName(request.name()));
  CKV_ASSIGN_OR_RETURN(Sequence::ForkPlan plan, source->PlanFork(request.max_decode_tokens()));
  CKV_ASSIGN_OR_RETURN(plan.params, WithSelectConfig(std::move(plan.params), request.select()));
  const int64_t tokens = plan.params.prompt_tokens + plan.params.max_decode_tokens;
  if (tokens > options_.max_sequence_tokens) {
    return LimitError("max_sequence_tokens", options_.max_sequence_tokens, tokens);
  }
  CKV_RETURN_IF_ERROR(Admit(request.name()));
  CKV_ASSIGN_OR_RETURN(std::shared_ptr<MemoryAccount> account, OpenAccount(plan.memory));
  CKV_ASSIGN_OR_RETURN(
      std::shared_ptr<Sequence> fork,
      source->Fork(NewIdentity(request.name()), std::move(plan), std::move(account)));
  fork->session_id.store(request.session_id());
  fork->ttl = Milliseconds(request.ttl_ms());
  return Insert(std::move(fork));
}

// --- leaving

bool SequenceStore::Evictable(const Sequence& sequence) const {
  return sequence.references.load() == 0 && sequence.state() == v1::SEQUENCE_STATE_READY &&
         sequence.quiet();
}

bool SequenceStore::EvictOne() { return EvictOneOf("", "", &services_.counters->evicted_for_room); }

std::vector<std::string> SequenceStore::EvictableNames(std::string_view prefix) {
  absl::MutexLock lock(&mutex_);
  std::vector<std::string> names;
  for (auto it = sequences_.lower_bound(prefix); it != sequences_.end(); ++it) {
    if (it->first.compare(0, prefix.size(), prefix) != 0) break;
    if (Evictable(*it->second)) names.push_back(it->first);
  }
  return names;
}

bool SequenceStore::EvictForQuota(std::string_view prefix, std::string_view kept) {
  return EvictOneOf(prefix, kept, &services_.counters->evicted_for_quota);
}

bool SequenceStore::EvictOneOf(std::string_view prefix, std::string_view kept,
                               std::atomic<uint64_t>* counter) {
  const CallCounter::Scope scope(services_.calls);  // from the name's end to the memory's
  std::shared_ptr<Sequence> chosen;
  {
    absl::MutexLock lock(&mutex_);
    std::vector<EvictionCandidate> candidates;
    std::vector<std::map<std::string, std::shared_ptr<Sequence>>::iterator> places;
    for (auto it = sequences_.lower_bound(prefix); it != sequences_.end(); ++it) {
      if (it->first.compare(0, prefix.size(), prefix) != 0) break;
      if (!Evictable(*it->second) || it->first == kept) continue;
      candidates.push_back({it->second->last_use.load(), it->second->held_pages()});
      places.push_back(it);
    }
    if (candidates.empty()) return false;
    const auto place = places[eviction_.Choose(candidates)];
    chosen = std::move(place->second);
    sequences_.erase(place);
  }
  counter->fetch_add(1);
  End(chosen, Notice::SEQUENCE_EVICTED);
  return true;
}

void SequenceStore::End(const std::shared_ptr<Sequence>& sequence, Notice::Kind kind) {
  sequence->End(SequenceReleased(sequence->identity().name, sequence->identity().generation));
  gone_(sequence, kind);
}

int64_t SequenceStore::Remove(const std::function<bool(const Sequence&)>& leaves,
                              Notice::Kind kind) {
  const CallCounter::Scope scope(services_.calls);
  std::vector<std::shared_ptr<Sequence>> removed;
  {
    absl::MutexLock lock(&mutex_);
    for (auto it = sequences_.begin(); it != sequences_.end();) {
      if (!leaves(*it->second)) {
        ++it;
        continue;
      }
      removed.push_back(std::move(it->second));
      it = sequences_.erase(it);
    }
  }
  for (const auto& sequence : removed) End(sequence, kind);
  return static_cast<int64_t>(removed.size());
}

absl::Status SequenceStore::Release(const v1::SequenceHandle& handle) {
  CKV_RETURN_IF_ERROR(CheckName(handle.name()));
  if (handle.boot_id() != 0 && handle.boot_id() != boot_id_) return absl::OkStatus();
  const CallCounter::Scope scope(services_.calls);
  std::shared_ptr<Sequence> sequence;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = sequences_.find(handle.name());
    if (it == sequences_.end()) return absl::OkStatus();
    const uint64_t live = it->second->identity().generation;
    if (handle.generation() != 0 && handle.generation() != live) return absl::OkStatus();
    sequence = std::move(it->second);
    sequences_.erase(it);
  }
  End(sequence, Notice::SEQUENCE_RELEASED);
  return absl::OkStatus();
}

absl::Status SequenceStore::Evict(const v1::SequenceHandle& handle, bool force) {
  const CallCounter::Scope scope(services_.calls);
  CKV_ASSIGN_OR_RETURN(const SequenceRef found, Find(handle));
  {
    absl::MutexLock lock(&mutex_);
    const auto it = sequences_.find(handle.name());
    if (it == sequences_.end() || it->second != found.get()) return absl::OkStatus();
    const int64_t others = found->references.load() - 1;
    if (!force && others > 0) {
      return Error(v1::SEQUENCE_NOT_READY,
                   absl::StrCat("sequence ", handle.name(), " is in use by ", others,
                                " attachments and calls; set force to evict it all the same"),
                   {{"sequence", handle.name()}, {"references", absl::StrCat(others)}});
    }
    sequences_.erase(it);
  }
  services_.counters->evicted_by_admin.fetch_add(1);
  End(found.get(), Notice::SEQUENCE_EVICTED);
  return absl::OkStatus();
}

void SequenceStore::Expire() {
  const int64_t now = SteadyNow();
  const int64_t expired = Remove(
      [now](const Sequence& sequence) {
        return sequence.ttl > absl::ZeroDuration() && sequence.session_id.load() == 0 &&
               sequence.references.load() == 0 &&
               absl::Nanoseconds(now - sequence.last_use_ns.load()) > sequence.ttl;
      },
      Notice::SEQUENCE_EVICTED);
  services_.counters->evicted_by_ttl.fetch_add(static_cast<uint64_t>(expired));
  for (const auto& sequence : All()) sequence->SweepWaiters();
}

void SequenceStore::EndSession(uint64_t session_id) {
  std::vector<std::shared_ptr<Sequence>> kept;
  Remove(
      [&](const Sequence& sequence) {
        if (sequence.session_id.load() != session_id) return false;
        const v1::SequenceState state = sequence.state();
        return state != v1::SEQUENCE_STATE_READY && state != v1::SEQUENCE_STATE_APPENDING;
      },
      Notice::SEQUENCE_RELEASED);
  absl::MutexLock lock(&mutex_);
  for (const auto& [name, sequence] : sequences_) {
    if (sequence->session_id.load() != session_id) continue;
    sequence->session_id.store(0);
    Touch(*sequence);  // its ttl begins
  }
}

void SequenceStore::Clear(const absl::Status& reason) {
  std::map<std::string, std::shared_ptr<Sequence>, std::less<>> all;
  {
    absl::MutexLock lock(&mutex_);
    all.swap(sequences_);
  }
  for (const auto& [name, sequence] : all) sequence->End(reason);
}

}  // namespace clusterkv::cache_service
