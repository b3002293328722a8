#include "cache_service/attachments.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "cache_service/resident_groups.h"
#include "cache_service/sequence_store.h"
#include "cache_service/sessions.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using kernels::HotCache;
using kernels::HotCacheParams;
using kernels::HotCachePolicy;

absl::StatusOr<HotCacheParams> HotCacheParamsOf(const v1::HotCacheConfig& config,
                                                const SequenceParams& params) {
  HotCacheParams hot;
  switch (config.policy()) {
    case v1::HOT_CACHE_POLICY_UNSPECIFIED:
    case v1::HOT_CACHE_POLICY_TOKEN_LRU:
      hot.policy = HotCachePolicy::kTokenLru;
      break;
    case v1::HOT_CACHE_POLICY_CLUSTER_LRU:
      hot.policy = HotCachePolicy::kClusterLru;
      break;
    case v1::HOT_CACHE_POLICY_LAST_STEPS:
      hot.policy = HotCachePolicy::kLastSteps;
      break;
    default:
      return FieldError(v1::INVALID_FIELD, "hot_cache.policy",
                        "TOKEN_LRU, CLUSTER_LRU or LAST_STEPS", absl::StrCat(int{config.policy()}));
  }
  constexpr uint32_t kMaxTokens = 1 << 24, kMaxSteps = 1024;
  if (config.capacity_tokens() >= kMaxTokens) {
    return FieldError(v1::INVALID_FIELD, "hot_cache.capacity_tokens",
                      absl::StrCat("0 to ", kMaxTokens - 1),
                      absl::StrCat(config.capacity_tokens()));
  }
  if (config.steps() > kMaxSteps) {
    return FieldError(v1::INVALID_FIELD, "hot_cache.steps", absl::StrCat("0 to ", kMaxSteps),
                      absl::StrCat(config.steps()));
  }
  hot.capacity_tokens = config.capacity_tokens();
  hot.steps = static_cast<int>(std::max(config.steps(), 1u));
  hot.step_tokens = std::min<int64_t>(MaxExactTokens(params), kMaxTokens - 1);
  return hot;
}

absl::Status NotFound(uint64_t id) {
  return Error(v1::ATTACHMENT_NOT_FOUND, absl::StrCat("no attachment has the id ", id),
               {{"attachmentId", absl::StrCat(id)}});
}

}  // namespace

int64_t MaxExactTokens(const SequenceParams& params) {
  const kernels::SelectParams select = SelectParamsFor(params);
  const int64_t sinks = std::min(params.sink_tokens, params.prompt_tokens);
  const int64_t clustered = params.prompt_tokens + params.max_decode_tokens - sinks;
  int64_t exact = std::max<int64_t>(select.budget_tokens - sinks, 0);
  if (params.mode == kernels::SelectMode::kPerQueryHead) exact *= params.shape.group();
  return std::max<int64_t>(std::min(exact, clustered), 1);
}

// --- ResidencyBudget

absl::Status ResidencyBudget::Take(int64_t bytes) {
  const int64_t before = used_.fetch_add(bytes);
  if (before + bytes <= limit_) return absl::OkStatus();
  used_.fetch_sub(bytes);
  return LimitError("residency_bytes", limit_, before + bytes);
}

// --- LayerResidency

LayerResidency::~LayerResidency() {
  absl::MutexLock lock(&mutex_);
  budget_->Give(bytes_);
}

void LayerResidency::Enter(std::function<void()> step) {
  {
    absl::MutexLock lock(&mutex_);
    if (busy_) {
      queue_.push_back(std::move(step));
      return;
    }
    busy_ = true;
  }
  step();
}

void LayerResidency::Leave() {
  std::function<void()> next;
  {
    absl::MutexLock lock(&mutex_);
    CKV_CHECK(busy_);
    if (queue_.empty()) {
      busy_ = false;
      return;
    }
    next = std::move(queue_.front());
    queue_.pop_front();
  }
  next();
}

absl::Status LayerResidency::CheckStepLocked(uint64_t step, bool reset) const {
  if (reset || step == next_step_) return absl::OkStatus();
  return Error(
      v1::RESIDENCY_STALE,
      absl::StrCat("step: expected ", next_step_, ", got ", step,
                   "; reset the residency and the hot cache"),
      {{"field", "step"}, {"expectedStep", absl::StrCat(next_step_)}, {"got", absl::StrCat(step)}});
}

absl::Status LayerResidency::CheckStep(uint64_t step, bool reset) const {
  absl::MutexLock lock(&mutex_);
  return CheckStepLocked(step, reset);
}

absl::Status LayerResidency::CreateCaches() {
  const int64_t bytes = kv_heads_ * HotCache::MemoryBytes(params_);
  CKV_RETURN_IF_ERROR(budget_->Take(bytes));
  std::vector<HotCache> caches;
  for (int64_t head = 0; head < kv_heads_; ++head) {
    absl::StatusOr<HotCache> cache = HotCache::Create(params_);
    CKV_CHECK(cache.ok()) << cache.status();  // Attach checked the parameters
    caches.push_back(*std::move(cache));
  }
  caches_ = std::move(caches);
  bytes_ = bytes;
  return absl::OkStatus();
}

absl::Status LayerResidency::Resolve(uint64_t step, bool reset,
                                     const std::vector<kernels::HeadSelection>& selections,
                                     std::vector<std::vector<int32_t>>* misses,
                                     std::vector<std::vector<int32_t>>* miss_slots, int64_t* hits) {
  absl::MutexLock lock(&mutex_);
  CKV_RETURN_IF_ERROR(CheckStepLocked(step, reset));
  for (const kernels::HeadSelection& selection : selections) {
    const int64_t tokens = static_cast<int64_t>(selection.positions.size());
    if (tokens <= params_.step_tokens) continue;
    return Error(v1::INTERNAL_ERROR, absl::StrCat("a selection of ", tokens, " tokens, more than ",
                                                  params_.step_tokens));
  }
  if (caches_.empty()) CKV_RETURN_IF_ERROR(CreateCaches());
  misses->assign(selections.size(), {});
  miss_slots->assign(selections.size(), {});
  std::vector<int32_t> slots;
  std::vector<uint8_t> hit;
  for (size_t head = 0; head < selections.size(); ++head) {
    const kernels::HeadSelection& selection = selections[head];
    HotCache& cache = caches_[head];
    if (reset) cache.Clear();
    slots.resize(selection.positions.size());
    hit.resize(selection.positions.size());
    const bool by_cluster = params_.policy == HotCachePolicy::kClusterLru;
    const absl::Status status = cache.Resolve(
        selection.positions,
        by_cluster ? absl::MakeConstSpan(selection.clusters) : absl::Span<const int32_t>(),
        absl::MakeSpan(slots), absl::MakeSpan(hit));
    CKV_CHECK(status.ok()) << status;
    for (size_t i = 0; i < hit.size(); ++i) {
      if (hit[i] != 0) continue;
      (*misses)[head].push_back(static_cast<int32_t>(i));
      (*miss_slots)[head].push_back(slots[i]);
    }
    *hits += static_cast<int64_t>(hit.size() - (*misses)[head].size());
  }
  next_step_ = step + 1;
  return absl::OkStatus();
}

// --- Attachment

Attachment::Attachment(uint64_t id, SequenceRef sequence, SequenceParams params,
                       const HotCacheParams& hot_cache, uint64_t session_id,
                       ResidencyBudget* budget)
    : id(id),
      sequence(std::move(sequence)),
      params(std::move(params)),
      select(SelectParamsFor(this->params)),
      hot_cache(hot_cache),
      session_id(session_id),
      last_use_ns(SteadyNow()) {
  for (int64_t i = 0; i < this->params.layers; ++i) {
    layers.push_back(
        std::make_unique<LayerResidency>(hot_cache, this->params.shape.kv_heads, budget));
  }
  this->sequence->attachments.fetch_add(1);
}

Attachment::~Attachment() {
  SetResident(nullptr);
  sequence->attachments.fetch_sub(1);
}

void Attachment::SetResident(std::shared_ptr<ResidentGroup> group) {
  {
    absl::MutexLock lock(&link_mutex);
    resident_group.swap(group);
  }
  if (group != nullptr) group->End();
}

// --- Attachments

absl::StatusOr<std::shared_ptr<Attachment>> Attachments::Attach(SequenceRef sequence,
                                                                SequenceParams params,
                                                                const v1::HotCacheConfig& hot_cache,
                                                                uint64_t session_id) {
  CKV_ASSIGN_OR_RETURN(const HotCacheParams hot, HotCacheParamsOf(hot_cache, params));
  // A layer whose caches can never be had is refused now, not at its first step.
  const int64_t layer_bytes = params.shape.kv_heads * HotCache::MemoryBytes(hot);
  CKV_RETURN_IF_ERROR(budget_.Take(layer_bytes));
  budget_.Give(layer_bytes);
  auto attachment = std::make_shared<Attachment>(RandomId(), std::move(sequence), std::move(params),
                                                 hot, session_id, &budget_);
  absl::MutexLock lock(&mutex_);
  const int64_t count = static_cast<int64_t>(attachments_.size());
  if (count >= max_attachments_) return LimitError("max_attachments", max_attachments_, count + 1);
  attachments_.emplace(attachment->id, attachment);
  return attachment;
}

absl::StatusOr<std::shared_ptr<Attachment>> Attachments::Find(uint64_t id) {
  absl::MutexLock lock(&mutex_);
  const auto it = attachments_.find(id);
  if (it == attachments_.end()) return NotFound(id);
  it->second->last_use_ns.store(SteadyNow());
  return it->second;
}

absl::Status Attachments::Detach(uint64_t id) {
  std::shared_ptr<Attachment> gone;  // dies outside the lock
  absl::MutexLock lock(&mutex_);
  const auto it = attachments_.find(id);
  if (it == attachments_.end()) return NotFound(id);
  gone = std::move(it->second);
  attachments_.erase(it);
  return absl::OkStatus();
}

std::vector<std::shared_ptr<Attachment>> Attachments::TakeIf(
    const std::function<bool(const Attachment&)>& leaves) {
  std::vector<std::shared_ptr<Attachment>> taken;
  absl::MutexLock lock(&mutex_);
  for (auto it = attachments_.begin(); it != attachments_.end();) {
    const auto here = it++;
    if (!leaves(*here->second)) continue;
    taken.push_back(std::move(here->second));
    attachments_.erase(here);
  }
  return taken;
}

std::vector<std::shared_ptr<Attachment>> Attachments::DetachSession(uint64_t session_id) {
  return TakeIf([&](const Attachment& attachment) { return attachment.session_id == session_id; });
}

std::vector<std::shared_ptr<Attachment>> Attachments::DetachSequence(const Sequence* sequence) {
  return TakeIf(
      [&](const Attachment& attachment) { return attachment.sequence.get().get() == sequence; });
}

std::vector<std::shared_ptr<Attachment>> Attachments::Expire() {
  const int64_t now = SteadyNow();
  return TakeIf([&](const Attachment& attachment) {
    return attachment.session_id == 0 &&
           absl::Nanoseconds(now - attachment.last_use_ns.load()) > ttl_;
  });
}

void Attachments::Clear() {
  TakeIf([](const Attachment&) { return true; });
}

int64_t Attachments::size() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(attachments_.size());
}

int64_t Attachments::CountIf(const std::function<bool(const Attachment&)>& counts) const {
  absl::MutexLock lock(&mutex_);
  return std::count_if(attachments_.begin(), attachments_.end(),
                       [&counts](const auto& entry) { return counts(*entry.second); });
}

int64_t Attachments::by_link(v1::Link link) const {
  return CountIf([link](const Attachment& attachment) {
    const std::shared_ptr<RecordLink> standing = attachment.CurrentLink().link;
    const bool ready = standing != nullptr && standing->ready();
    return (ready ? standing->kind() : v1::LINK_GRPC) == link;
  });
}

int64_t Attachments::of_sessions() const {
  return CountIf([](const Attachment& attachment) { return attachment.session_id != 0; });
}

}  // namespace clusterkv::cache_service
