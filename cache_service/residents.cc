#include "cache_service/residents.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {

Residents::Pause::Pause(Residents* residents) ABSL_NO_THREAD_SAFETY_ANALYSIS
    : residents_(*residents) {
  residents_.mutex_.Lock();
  for (ResidentEnd* end : residents_.all_) end->Stop().IgnoreError();
}

Residents::Pause::~Pause() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  const std::vector<ResidentLaunch> launches = residents_.Launches();
  residents_.Hold(launches);
  for (const ResidentLaunch& launch : launches) residents_.Start(launch).IgnoreError();
  residents_.mutex_.Unlock();
}

Residents::NcclPlace::~NcclPlace() {
  if (residents_ == nullptr) return;
  absl::MutexLock lock(&residents_->mutex_);
  --residents_->nccl_links_;
}

absl::Status Residents::CheckRoom() const ABSL_NO_THREAD_SAFETY_ANALYSIS {
  if (nccl_links_ > 0) {
    return absl::UnavailableError("resident: expected no links over nccl beside it");
  }
  const int most = MaxResidentGroups(multiprocessors_);
  if (static_cast<int>(all_.size()) < most) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("resident: at most ", most, " groups"));
}

absl::Status Residents::Add(ResidentEnd* end) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  all_.push_back(end);
  const std::vector<ResidentLaunch> launches = Launches();
  Hold(launches);
  const int last = static_cast<int>(all_.size()) - 1;
  const auto its = std::find_if(launches.begin(), launches.end(),
                                [&](const auto& launch) { return launch.groups.back() == last; });
  absl::Status started = Start(*its);
  if (!started.ok()) all_.pop_back();
  return started;
}

void Residents::Remove(ResidentEnd* end) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  all_.erase(std::remove(all_.begin(), all_.end(), end), all_.end());
}

absl::StatusOr<Residents::NcclPlace> Residents::TakeNcclPlace() {
  absl::MutexLock lock(&mutex_);
  if (!all_.empty()) {
    return absl::UnavailableError("nccl: expected no resident groups beside it");
  }
  ++nccl_links_;
  return NcclPlace(this);
}

std::vector<ResidentLaunch> Residents::Launches() const {
  std::vector<ResidentRound> rounds;
  for (const ResidentEnd* end : all_) rounds.push_back(end->round());
  return PlaceGroups(multiprocessors_, rounds);
}

absl::Status Residents::Start(const ResidentLaunch& launch) {
  std::vector<ResidentEnd*> others;
  for (size_t i = 1; i < launch.groups.size(); ++i) others.push_back(all_[launch.groups[i]]);
  return all_[launch.groups.front()]->Start(launch.place, others);
}

void Residents::Hold(const std::vector<ResidentLaunch>& launches) {
  int held = 0;
  for (const ResidentLaunch& launch : launches) held += launch.place.blocks();
  absl::MutexLock lock(&launch_mutex_);
  held_ = held;
}

}  // namespace clusterkv::cache_service
