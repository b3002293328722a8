#include "cache_service/cuda_links.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/base/status_macros.h"
#include "kernels/comm/nccl_comm.h"
#include "kernels/comm/peer_window.h"
#include "kernels/gather/gather_cuda.h"
#include "kernels/runtime/device.h"

namespace clusterkv::cache_service {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::DevicePagedView;
using kernels::Event;
using kernels::NcclComm;
using kernels::PinnedBuffer;
using kernels::RecordMove;
using kernels::ScopedDevice;
using kernels::Stream;

constexpr int64_t kMoves = 1 << 14;  // of one launch
constexpr int64_t kViews = 1 << 10;  // parts of one layer
constexpr int64_t kMovesBytes = kMoves * static_cast<int64_t>(sizeof(RecordMove));
constexpr int64_t kListBytes = kMovesBytes + kViews * static_cast<int64_t>(sizeof(DevicePagedView));
// Meeting the worker; a message that it must take; how often a link is looked after.
constexpr absl::Duration kConnectTimeout = absl::Seconds(6);
constexpr absl::Duration kMessageTimeout = absl::Seconds(2);
constexpr absl::Duration kWatchPeriod = absl::Milliseconds(20);

// Moves records from parts to a place, on a stream of its own.
class Mover {
 public:
  absl::Status Start(int device) {
    CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(device, /*priority=*/-1));
    stream_.emplace(std::move(stream));
    CKV_ASSIGN_OR_RETURN(Event moved, Event::Create(device));
    moved_.emplace(std::move(moved));
    CKV_ASSIGN_OR_RETURN(host_, PinnedBuffer::Create(kListBytes));
    CKV_ASSIGN_OR_RETURN(device_, DeviceBuffer::Create(device, kListBytes));
    return absl::OkStatus();
  }
  cudaStream_t stream() const { return stream_->get(); }

  // Waits until the records are at `destination`. Errors: ResourceExhausted for more parts than it
  // takes, and nothing was moved; else as CudaStatus.
  absl::Status Move(absl::Span<const LinkRecord> records, int64_t record_bytes,
                    std::byte* destination) {
    while (!records.empty()) {
      const auto batch = records.first(std::min<size_t>(records.size(), kMoves));
      records.remove_prefix(batch.size());
      CKV_RETURN_IF_ERROR(MoveBatch(batch, record_bytes, destination));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status MoveBatch(absl::Span<const LinkRecord> records, int64_t record_bytes,
                         std::byte* destination) {
    auto* moves = reinterpret_cast<RecordMove*>(host_.data());
    auto* views = reinterpret_cast<DevicePagedView*>(host_.data() + kMovesBytes);
    parts_.clear();
    for (size_t i = 0; i < records.size(); ++i) {
      const LinkRecord& record = records[i];
      if (parts_.empty() || parts_.back() != record.part) {
        if (static_cast<int64_t>(parts_.size()) == kViews) {
          return absl::ResourceExhaustedError("link: records of too many parts");
        }
        views[parts_.size()] = static_cast<const CudaPartBase*>(record.part)->part.records;
        parts_.push_back(record.part);
      }
      moves[i] = {static_cast<uint32_t>(parts_.size() - 1), static_cast<uint32_t>(record.index),
                  record.destination};
    }
    const auto copy = [&](int64_t at, size_t bytes) {
      return CudaStatus(cudaMemcpyAsync(device_.data() + at, host_.data() + at, bytes,
                                        cudaMemcpyHostToDevice, stream()),
                        "link");
    };
    CKV_RETURN_IF_ERROR(copy(0, records.size() * sizeof(RecordMove)));
    CKV_RETURN_IF_ERROR(copy(kMovesBytes, parts_.size() * sizeof(DevicePagedView)));
    CKV_RETURN_IF_ERROR(
        CudaStatus(kernels::LaunchMoveRecords(
                       reinterpret_cast<const DevicePagedView*>(device_.data() + kMovesBytes),
                       reinterpret_cast<const RecordMove*>(device_.data()), nullptr,
                       static_cast<int32_t>(records.size()), static_cast<int32_t>(record_bytes),
                       reinterpret_cast<unsigned char*>(destination), stream()),
                   "link"));
    CKV_RETURN_IF_ERROR(moved_->Record(stream()));
    return moved_->Synchronize();
  }

  std::optional<Stream> stream_;
  std::optional<Event> moved_;
  PinnedBuffer host_;
  DeviceBuffer device_;
  std::vector<const DevicePart*> parts_;  // of the batch, a run of records each
};

class PeerLink : public RecordLink {
 public:
  PeerLink(int device, kernels::PeerWindow window) : device_(device), window_(std::move(window)) {}

  absl::Status Start() {
    absl::MutexLock lock(&mutex_);
    return mover_.Start(device_);
  }
  v1::Link kind() const override { return v1::LINK_PEER; }
  bool ready() const override { return failure().empty(); }
  std::string failure() const override {
    absl::MutexLock lock(&mutex_);
    return failure_;
  }

  absl::Status Send(absl::Span<const LinkRecord> records, int64_t record_bytes) override {
    const ScopedDevice scoped(device_);
    absl::MutexLock lock(&mutex_);
    for (const LinkRecord& record : records) {
      if (record.destination >= 0 && record.destination <= window_.bytes() - record_bytes) continue;
      return absl::ResourceExhaustedError("link: a record beyond the window");
    }
    absl::Status status = mover_.Move(records, record_bytes, window_.data());
    if (!status.ok() && !absl::IsResourceExhausted(status)) {
      failure_ = std::string(status.message());
    }
    return status;
  }

 private:
  const int device_;
  const kernels::PeerWindow window_;
  mutable absl::Mutex mutex_;
  Mover mover_ ABSL_GUARDED_BY(mutex_);
  std::string failure_ ABSL_GUARDED_BY(mutex_);
};

class NcclLink : public RecordLink {
 public:
  NcclLink(int device, std::string unique_id) : device_(device), unique_id_(std::move(unique_id)) {}
  ~NcclLink() override {
    ending_.store(true);
    if (watch_.joinable()) watch_.join();
    absl::MutexLock lock(&mutex_);
    comm_.reset();  // aborts: nothing reads the staging memory from here on
  }

  absl::Status Start(int64_t max_message_bytes) {
    {
      absl::MutexLock lock(&mutex_);
      CKV_RETURN_IF_ERROR(mover_.Start(device_));
      CKV_ASSIGN_OR_RETURN(Event sent, Event::Create(device_));
      sent_.emplace(std::move(sent));
      CKV_ASSIGN_OR_RETURN(staging_, DeviceBuffer::Create(device_, max_message_bytes));
    }
    watch_ = std::thread([this] { Watch(); });
    return absl::OkStatus();
  }

  v1::Link kind() const override { return v1::LINK_NCCL; }
  bool ready() const override { return ready_.load(); }
  std::string failure() const override {
    absl::MutexLock lock(&mutex_);
    return failure_;
  }

  absl::Status Send(absl::Span<const LinkRecord> records, int64_t record_bytes) override {
    const ScopedDevice scoped(device_);
    const int64_t bytes = static_cast<int64_t>(records.size()) * record_bytes;
    absl::MutexLock lock(&mutex_);
    if (comm_ == nullptr) return absl::UnavailableError(failure_);
    if (bytes > staging_.bytes()) {
      return absl::ResourceExhaustedError("link: more bytes than a message has");
    }
    if (records.empty()) return absl::OkStatus();
    // The last message's bytes lie in staging until it is sent.
    absl::Status status;
    if (pending_since_.has_value()) {
      status = comm_->Wait(mover_.stream(), *pending_since_ + kMessageTimeout);
      pending_since_.reset();
    }
    if (status.ok()) status = mover_.Move(records, record_bytes, staging_.data());
    if (status.ok()) status = comm_->Send(staging_.data(), bytes, mover_.stream());
    if (status.ok()) status = sent_->Record(mover_.stream());
    if (status.ok()) {
      pending_since_ = absl::Now();
      return status;
    }
    if (!absl::IsResourceExhausted(status)) Fail(status);
    return status;
  }

 private:
  void Fail(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    ready_.store(false);
    if (failure_.empty()) failure_ = std::string(status.message());
    comm_.reset();
  }

  void Watch() {
    auto comm = NcclComm::Connect(unique_id_, /*rank=*/0, device_, absl::Now() + kConnectTimeout);
    {
      absl::MutexLock lock(&mutex_);
      if (!comm.ok()) return Fail(comm.status());
      comm_ = *std::move(comm);
      ready_.store(true);
    }
    const ScopedDevice scoped(device_);
    while (!ending_.load() && LooksWell()) absl::SleepFor(kWatchPeriod);
  }

  // Whether the communicator and what it was given last are well; else ends the link.
  bool LooksWell() {
    absl::MutexLock lock(&mutex_);
    if (comm_ == nullptr) return false;
    absl::Status status = comm_->CheckAsync();
    if (status.ok() && pending_since_.has_value()) {
      const absl::StatusOr<bool> done = sent_->Done();
      if (!done.ok()) {
        status = done.status();
      } else if (*done) {
        pending_since_.reset();
      } else if (absl::Now() - *pending_since_ > kMessageTimeout) {
        status = absl::DeadlineExceededError("nccl: the worker did not take a message in time");
      }
    }
    if (!status.ok()) Fail(status);
    return status.ok();
  }

  const int device_;
  const std::string unique_id_;
  std::atomic<bool> ready_{false}, ending_{false};
  mutable absl::Mutex mutex_;
  std::unique_ptr<NcclComm> comm_ ABSL_GUARDED_BY(mutex_);  // null: not yet, or no more
  Mover mover_ ABSL_GUARDED_BY(mutex_);
  std::optional<Event> sent_ ABSL_GUARDED_BY(mutex_);
  DeviceBuffer staging_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Time> pending_since_ ABSL_GUARDED_BY(mutex_);  // of the last message
  std::string failure_ ABSL_GUARDED_BY(mutex_);
  std::thread watch_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RecordLink>> ConnectPeerLink(int device, const LinkSetup& setup) {
  CKV_ASSIGN_OR_RETURN(kernels::PeerWindow window,
                       kernels::PeerWindow::Open(device, setup.window_handle, setup.window_bytes));
  auto link = std::make_unique<PeerLink>(device, std::move(window));
  CKV_RETURN_IF_ERROR(link->Start());
  return std::unique_ptr<RecordLink>(std::move(link));
}

absl::StatusOr<std::unique_ptr<RecordLink>> ConnectNcclLink(int device, const LinkSetup& setup,
                                                            std::string* unique_id) {
  CKV_ASSIGN_OR_RETURN(*unique_id, NcclComm::MakeUniqueId());
  auto link = std::make_unique<NcclLink>(device, *unique_id);
  CKV_RETURN_IF_ERROR(link->Start(setup.max_message_bytes));
  return std::unique_ptr<RecordLink>(std::move(link));
}

}  // namespace clusterkv::cache_service
