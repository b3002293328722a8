#include "cache_service/residents.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {

Residents::Pause::Pause(Residents* residents) ABSL_NO_THREAD_SAFETY_ANALYSIS
    : residents_(*residents) {
  residents_.mutex_.Lock();
  for (ResidentKernel* kernel : residents_.all_) kernel->Stop().IgnoreError();
}

Residents::Pause::~Pause() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  residents_.Hold();
  for (ResidentKernel* kernel : residents_.all_) {
    kernel->Start(residents_.PlaceOf(*kernel)).IgnoreError();
  }
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

absl::Status Residents::Add(ResidentKernel* kernel) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  all_.push_back(kernel);
  Hold();
  absl::Status started = kernel->Start(PlaceOf(*kernel));
  if (!started.ok()) all_.pop_back();
  return started;
}

void Residents::Remove(ResidentKernel* kernel) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  all_.erase(std::remove(all_.begin(), all_.end(), kernel), all_.end());
}

absl::StatusOr<Residents::NcclPlace> Residents::TakeNcclPlace() {
  absl::MutexLock lock(&mutex_);
  if (!all_.empty()) {
    return absl::UnavailableError("nccl: expected no resident groups beside it");
  }
  ++nccl_links_;
  return NcclPlace(this);
}

ResidentPlace Residents::PlaceOf(const ResidentKernel& kernel) const {
  const bool alike = std::all_of(all_.begin(), all_.end(), [&](const ResidentKernel* other) {
    return other->pairs() == kernel.pairs();
  });
  return PlaceOfGroup(multiprocessors_, static_cast<int>(all_.size()), kernel.pairs(), alike);
}

void Residents::Hold() {
  int held = 0;
  for (const ResidentKernel* kernel : all_) held += PlaceOf(*kernel).blocks();
  absl::MutexLock lock(&launch_mutex_);
  held_ = held;
}

}  // namespace clusterkv::cache_service
