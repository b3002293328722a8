#include "cache_service/resident_groups.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "cache_service/selector.h"
#include "cache_service/sessions.h"
#include "kernels/base/status_macros.h"
#include "kernels/resident/layout_version.h"

namespace clusterkv::cache_service {
namespace {

constexpr int kMaxMembers = 64;
constexpr uint32_t kMinSlots = 32, kMaxSlots = 512, kMaxExact = 128;

absl::Status CheckRequest(const v1::ConnectResidentRequest& request) {
  CKV_RETURN_IF_ERROR(CheckRange("attachment_ids", 1, kMaxMembers,
                                 static_cast<uint32_t>(request.attachment_ids_size())));
  CKV_RETURN_IF_ERROR(CheckRange("slots", kMinSlots, kMaxSlots, request.slots()));
  if (request.slots() % kMinSlots != 0) {
    return FieldError(v1::INVALID_FIELD, "slots", absl::StrCat("a multiple of ", kMinSlots),
                      absl::StrCat(request.slots()));
  }
  return CheckRange("max_exact_tokens", 1, std::min(kMaxExact, request.slots()),
                    request.max_exact_tokens());
}

bool SameSelection(const SequenceParams& a, const SequenceParams& b) {
  return a.mode == b.mode && a.budget_tokens == b.budget_tokens &&
         a.coded_tokens == b.coded_tokens && a.refine_factor == b.refine_factor &&
         a.estimated_fraction == b.estimated_fraction;
}

// The members' selection, which each has cut to its own context: that of the longest means all of
// it to the others.
kernels::SelectParams WidestSelection(const std::vector<std::shared_ptr<Attachment>>& members) {
  kernels::SelectParams widest = members.front()->select;
  for (const auto& member : members) {
    widest.budget_tokens = std::max(widest.budget_tokens, member->select.budget_tokens);
    widest.scored_tokens = std::max(widest.scored_tokens, member->select.scored_tokens);
  }
  return widest;
}

// Why these cannot be one group; OK: they can.
absl::Status CheckAlike(const std::vector<std::shared_ptr<Attachment>>& members) {
  const Attachment& first = *members.front();
  for (const auto& member : members) {
    if (member->params.shape == first.params.shape &&
        member->params.layers == first.params.layers &&
        member->params.index.codes == first.params.index.codes &&
        SameSelection(member->params, first.params)) {
      continue;
    }
    return absl::UnavailableError(
        "resident: expected attachments of one shape, codes and selection");
  }
  for (const auto& member : members) {
    const std::string codec(member->params.codec->name());
    if (codec == "raw") continue;
    return absl::UnavailableError(absl::StrCat("resident: expected codec raw, got ", codec));
  }
  if (first.params.shape.element_type == kernels::ElementType::kFloat16) {
    return absl::UnavailableError("resident: expected bfloat16 or float32, got float16");
  }
  return absl::OkStatus();
}

std::vector<uint32_t> WindowBegins(
    const std::vector<std::shared_ptr<const LayerSnapshot>>& snapshots) {
  std::vector<uint32_t> begins;
  begins.reserve(snapshots.size());
  for (const auto& layer : snapshots) begins.push_back(static_cast<uint32_t>(layer->window_begin));
  return begins;
}

}  // namespace

// --- ResidentGroup

absl::StatusOr<std::vector<uint32_t>> ResidentGroup::Start(
    ShardDevice* device, std::vector<std::shared_ptr<Sequence>> members,
    const kernels::SelectParams& select, const ResidentSetup& setup) {
  absl::MutexLock lock(&mutex_);
  members_ = std::move(members);
  select_ = select;
  layers_ = setup.layers;
  CKV_ASSIGN_OR_RETURN(Snapshots snapshots, TakeSnapshots());
  CKV_ASSIGN_OR_RETURN(kernel_, device->StartResident(setup, ItemsOf(snapshots)));
  snapshots_ = std::move(snapshots);
  running_.store(true);
  return WindowBegins(snapshots_);
}

absl::StatusOr<std::vector<uint32_t>> ResidentGroup::Renew(uint64_t rounds) {
  absl::MutexLock lock(&mutex_);
  if (!running()) return absl::FailedPreconditionError("resident: the group has ended");
  CKV_ASSIGN_OR_RETURN(Snapshots snapshots, TakeSnapshots());
  if (snapshots == snapshots_) return WindowBegins(snapshots_);
  CKV_RETURN_IF_ERROR(kernel_->Change(ItemsOf(snapshots), rounds));
  snapshots_ = std::move(snapshots);
  return WindowBegins(snapshots_);
}

void ResidentGroup::End() {
  int64_t not_ended = 0;
  ended_ns_.compare_exchange_strong(not_ended, SteadyNow());
  running_.store(false);
  absl::MutexLock lock(&mutex_);
  if (kernel_ != nullptr) kernel_->End();
  snapshots_.clear();
}

v1::PeerWindow ResidentGroup::requests() const {
  absl::MutexLock lock(&mutex_);
  return kernel_ == nullptr ? v1::PeerWindow() : kernel_->requests();
}

absl::StatusOr<ResidentGroup::Snapshots> ResidentGroup::TakeSnapshots() const {
  Snapshots snapshots;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (const auto& member : members_) {
      CKV_ASSIGN_OR_RETURN(snapshots.emplace_back(), member->Snapshot(layer));
      const auto& parts = snapshots.back()->parts;
      const bool mirrored = std::all_of(parts.begin(), parts.end(), [](const auto& part) {
        return part->device_part() != nullptr;
      });
      if (parts.empty() || !mirrored) {
        return absl::UnavailableError(absl::StrCat("resident: sequence ", member->identity().name,
                                                   ", layer ", layer,
                                                   ": no clusters on the device"));
      }
    }
  }
  return snapshots;
}

std::vector<DeviceSelectItem> ResidentGroup::ItemsOf(const Snapshots& snapshots) const {
  std::vector<DeviceSelectItem> items;
  for (size_t i = 0; i < snapshots.size(); ++i) {
    const Sequence& member = *members_[i % members_.size()];
    items.push_back(DeviceItemOf(*snapshots[i], member.params(), select_));
  }
  return items;
}

// --- ResidentGroups

absl::StatusOr<std::vector<std::shared_ptr<Attachment>>> ResidentGroups::Find(
    const v1::ConnectResidentRequest& request) const {
  std::vector<std::shared_ptr<Attachment>> members;
  for (const uint64_t id : request.attachment_ids()) {
    CKV_ASSIGN_OR_RETURN(members.emplace_back(), attachments_.Find(id));
    if (std::count(members.begin(), members.end(), members.back()) > 1) {
      return FieldError(v1::INVALID_FIELD, "attachment_ids", "each once",
                        absl::StrCat(id, " twice"));
    }
  }
  return members;
}

absl::StatusOr<v1::ConnectResidentResponse> ResidentGroups::Connect(
    const v1::ConnectResidentRequest& request, const std::string& why_not) {
  CKV_RETURN_IF_ERROR(CheckRequest(request));
  CKV_ASSIGN_OR_RETURN(const auto members, Find(request));
  v1::ConnectResidentResponse response;
  absl::Status why = CheckAlike(members);
  if (!why_not.empty()) why = absl::UnavailableError(why_not);
  if (why.ok() && request.layout_version() != kernels::kResidentLayoutVersion) {
    why = absl::UnavailableError(absl::StrCat("resident: layout_version: expected ",
                                              kernels::kResidentLayoutVersion, ", got ",
                                              request.layout_version()));
  }
  if (!why.ok()) {
    response.set_reason(std::string(why.message()));
    return response;
  }
  auto group = std::make_shared<ResidentGroup>(RandomId(), members.front()->session_id);
  std::vector<std::shared_ptr<Sequence>> sequences;
  for (const auto& member : members) sequences.push_back(member->sequence.get());
  ResidentSetup setup;
  setup.layers = members.front()->params.layers;
  setup.window = request.window();
  setup.slots = request.slots();
  setup.max_exact = request.max_exact_tokens();
  // The old kernels end first: a member's steps are answered by one.
  for (const auto& member : members) member->SetResident(nullptr);
  absl::StatusOr<std::vector<uint32_t>> begins =
      group->Start(device_, std::move(sequences), WidestSelection(members), setup);
  if (!begins.ok()) {
    if (ReasonOf(begins.status()) == v1::INVALID_FIELD) return begins.status();
    response.set_reason(std::string(begins.status().message()));
    return response;
  }
  response.set_resident_id(group->id);
  *response.mutable_requests() = group->requests();
  response.mutable_window_begin()->Add(begins->begin(), begins->end());
  {
    absl::MutexLock lock(&mutex_);
    groups_.emplace(group->id, group);
  }
  for (const auto& member : members) member->SetResident(group);
  return response;
}

absl::StatusOr<v1::RenewResidentResponse> ResidentGroups::Renew(
    const v1::RenewResidentRequest& request) {
  std::shared_ptr<ResidentGroup> group;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = groups_.find(request.resident_id());
    if (it != groups_.end()) group = it->second;
  }
  if (group == nullptr || !group->running()) {
    return Error(v1::ATTACHMENT_NOT_FOUND,
                 absl::StrCat("no resident group has the id ", request.resident_id(),
                              "; it ends with its first attachment"),
                 {{"attachmentId", absl::StrCat(request.resident_id())}});
  }
  const absl::StatusOr<std::vector<uint32_t>> begins = group->Renew(request.rounds());
  if (!begins.ok()) {
    Disconnect(request.resident_id());
    return FieldError(v1::INVALID_FIELD, "rounds", "a group that can go on",
                      std::string(begins.status().message()));
  }
  v1::RenewResidentResponse response;
  response.mutable_window_begin()->Add(begins->begin(), begins->end());
  return response;
}

void ResidentGroups::Forget(const std::function<bool(const ResidentGroup&)>& leaves) {
  std::vector<std::shared_ptr<ResidentGroup>> left;  // end outside of the lock
  {
    absl::MutexLock lock(&mutex_);
    for (auto it = groups_.begin(); it != groups_.end();) {
      const auto here = it++;
      if (!leaves(*here->second)) continue;
      left.push_back(std::move(here->second));
      groups_.erase(here);
    }
  }
  for (const auto& group : left) group->End();
}

void ResidentGroups::Disconnect(uint64_t id) {
  Forget([id](const ResidentGroup& group) { return group.id == id; });
}

void ResidentGroups::EndSession(uint64_t session_id) {
  Forget([=](const ResidentGroup& group) { return group.session_id == session_id; });
}

void ResidentGroups::Expire() {
  const int64_t before = SteadyNow() - absl::ToInt64Nanoseconds(ttl_);
  Forget([before](const ResidentGroup& group) {
    return group.session_id == 0 && group.ended_ns() != 0 && group.ended_ns() < before;
  });
}

int64_t ResidentGroups::attachments() const {
  return attachments_.CountIf([](const Attachment& attachment) {
    const std::shared_ptr<ResidentGroup> group = attachment.resident();
    return group != nullptr && group->running();
  });
}

}  // namespace clusterkv::cache_service
