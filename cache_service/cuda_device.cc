#include "cache_service/cuda_device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "cache_service/cuda_ingest.h"
#include "cache_service/cuda_links.h"
#include "cache_service/cuda_resident.h"
#include "cache_service/errors.h"
#include "cache_service/range_allocator.h"
#include "cache_service/residents.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/codec/record_format.h"
#include "kernels/comm/nccl_comm.h"
#include "kernels/index/index_cuda.h"
#include "kernels/index/index_view_cuda.h"
#include "kernels/runtime/device.h"
#include "kernels/select/resident_clusters.h"
#include "kernels/select/select_cuda.h"

namespace clusterkv::cache_service {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::DeviceIndexPart;
using kernels::DevicePagedView;
using kernels::Event;
using kernels::IndexPartView;
using kernels::PagedView;
using kernels::PinnedBuffer;
using kernels::ScopedDevice;
using kernels::SelectCudaOutput;
using kernels::SelectCudaPair;
using kernels::SelectCudaParams;
using kernels::Stream;

constexpr int64_t kAlignment = 256;
constexpr int64_t kUploadBytes = 4 << 20;  // of each of the upload's two buffers
constexpr int64_t kInputBytes = 8 << 20;   // of a lane: pairs, parts, queries
constexpr int64_t kOutputBytes = 16 << 20;
constexpr int64_t kWorkspaceBytes = 64 << 20;
// Of builds, which run one after the other: at least this, or a sixteenth of the arena.
constexpr int64_t kMinBuildBytes = 256 << 20;
constexpr int kMaxLanes = 4;
// Of the kernel (select_cuda.h).
constexpr int64_t kMaxBudgetTokens = 65535, kMaxScoredTokens = 65535;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Arrays one after the other in a buffer.
class Bump {
 public:
  // Where the next array begins.
  int64_t Take(int64_t bytes) { return std::exchange(used_, used_ + Align(bytes)); }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

// What one select needs beside the arena.
struct Lane {
  std::optional<Stream> stream;
  PinnedBuffer host_input, host_output;
  DeviceBuffer input, output, workspace;
};

// Host memory to the device and back, through two pinned buffers: while the one is filled or
// emptied the other is under way.
class Uploader {
 public:
  absl::Status Start(int device) {
    CKV_ASSIGN_OR_RETURN(stream_, OptionalOf(Stream::Create(device)));
    for (Buffer& buffer : buffers_) {
      CKV_ASSIGN_OR_RETURN(buffer.pinned, PinnedBuffer::Create(kUploadBytes));
      CKV_ASSIGN_OR_RETURN(buffer.sent, OptionalOf(Event::Create(device)));
    }
    return absl::OkStatus();
  }

  // Copies `bytes` from `from` to `to` on the device, once Finish has returned.
  absl::Status Add(std::byte* to, const void* from, int64_t bytes) {
    const auto* source = static_cast<const std::byte*>(from);
    while (bytes > 0) {
      if (used_ == kUploadBytes) CKV_RETURN_IF_ERROR(Send());
      const int64_t piece = std::min(bytes, kUploadBytes - used_);
      std::memcpy(buffers_[current_].pinned.data() + used_, source, static_cast<size_t>(piece));
      if (runs_.empty() || runs_.back().to + runs_.back().bytes != to) runs_.push_back({to, 0});
      runs_.back().bytes += piece;
      used_ += piece;
      to += piece;
      source += piece;
      bytes -= piece;
    }
    return absl::OkStatus();
  }
  absl::Status Finish() {
    CKV_RETURN_IF_ERROR(Send());
    return stream_->Synchronize();
  }
  cudaStream_t stream() const { return stream_->get(); }
  // Sends what was added; what is launched on stream() from now on finds it there.
  absl::Status Flush() { return Send(); }

  // Copies `bytes` from the device to `to`. Blocks.
  absl::Status Read(void* to, const std::byte* from, int64_t bytes) {
    auto* destination = static_cast<std::byte*>(to);
    while (bytes > 0) {
      const auto piece = static_cast<size_t>(std::min(bytes, kUploadBytes));
      std::byte* const pinned = buffers_[current_].pinned.data();
      CKV_RETURN_IF_ERROR(CudaStatus(
          cudaMemcpyAsync(pinned, from, piece, cudaMemcpyDeviceToHost, stream_->get()), "rows"));
      CKV_RETURN_IF_ERROR(stream_->Synchronize());
      std::memcpy(destination, pinned, piece);
      destination += piece;
      from += piece;
      bytes -= static_cast<int64_t>(piece);
    }
    return absl::OkStatus();
  }

  // Copies the pages' contents from `device` to `host` (both arenas' bases), after all that was
  // launched on stream(). Blocks.
  absl::Status Fetch(absl::Span<const uint32_t> pages, int64_t page_bytes, const std::byte* device,
                     std::byte* host) {
    const auto per_buffer = static_cast<size_t>(kUploadBytes / page_bytes);
    std::array<absl::Span<const uint32_t>, 2> coming;
    while (!pages.empty() || !coming[0].empty() || !coming[1].empty()) {
      Buffer& buffer = buffers_[current_];
      absl::Span<const uint32_t>& batch = coming[current_];
      if (!batch.empty()) {
        CKV_RETURN_IF_ERROR(buffer.sent->Synchronize());
        const std::byte* from = buffer.pinned.data();
        for (uint32_t page : batch) {
          std::memcpy(host + page * page_bytes, from, static_cast<size_t>(page_bytes));
          from += page_bytes;
        }
      }
      batch = pages.first(std::min(per_buffer, pages.size()));
      pages.remove_prefix(batch.size());
      std::byte* to = buffer.pinned.data();
      for (size_t i = 0; i < batch.size();) {
        size_t end = i + 1;
        while (end < batch.size() && batch[end] == batch[end - 1] + 1) ++end;
        const size_t bytes = (end - i) * static_cast<size_t>(page_bytes);
        CKV_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(to, device + batch[i] * page_bytes, bytes,
                                                       cudaMemcpyDeviceToHost, stream_->get()),
                                       "download"));
        to += bytes;
        i = end;
      }
      CKV_RETURN_IF_ERROR(buffer.sent->Record(stream_->get()));
      current_ = 1 - current_;
    }
    return absl::OkStatus();
  }

 private:
  struct Buffer {
    PinnedBuffer pinned;
    std::optional<Event> sent;
    bool in_flight = false;
  };
  struct Run {
    std::byte* to;
    int64_t bytes;
  };

  template <typename T>
  static absl::StatusOr<std::optional<T>> OptionalOf(absl::StatusOr<T> value) {
    if (!value.ok()) return value.status();
    return std::optional<T>(*std::move(value));
  }

  // Sends what is in the current buffer and goes on to the other one, once that is free.
  absl::Status Send() {
    Buffer& buffer = buffers_[current_];
    int64_t at = 0;
    for (const Run& run : runs_) {
      CKV_RETURN_IF_ERROR(CudaStatus(
          cudaMemcpyAsync(run.to, buffer.pinned.data() + at, static_cast<size_t>(run.bytes),
                          cudaMemcpyHostToDevice, stream_->get()),
          "upload"));
      at += run.bytes;
    }
    CKV_RETURN_IF_ERROR(buffer.sent->Record(stream_->get()));
    buffer.in_flight = true;
    runs_.clear();
    used_ = 0;
    current_ = 1 - current_;
    Buffer& next = buffers_[current_];
    if (next.in_flight) CKV_RETURN_IF_ERROR(next.sent->Synchronize());
    next.in_flight = false;
    return absl::OkStatus();
  }

  std::optional<Stream> stream_;
  std::array<Buffer, 2> buffers_;
  size_t current_ = 0;
  int64_t used_ = 0;
  std::vector<Run> runs_;
};

class CudaDevice;

struct CudaPart : CudaPartBase {
  ~CudaPart() override;
  CudaDevice* device = nullptr;
  int64_t list_begin = 0, list_bytes = 0;  // of the page numbers, in the device's lists
};

constexpr int kMaxLinks = 64;
constexpr int64_t kMaxMessageBytes = 64 << 20;

// A link or window of the device, counted while it lives.
template <typename T>
class Counted {
 public:
  // residents: stopped while it ends, for that waits for the whole device; null: there are none.
  Counted(std::unique_ptr<T> counted, std::atomic<int>* count, Residents* residents)
      : counted_(std::move(counted)), count_(*count), residents_(residents) {}
  ~Counted() {
    std::optional<Residents::Pause> pause;
    if (residents_ != nullptr) pause.emplace(residents_);
    counted_.reset();
    count_.fetch_sub(1);
  }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  T* operator->() const { return counted_.get(); }

 private:
  std::unique_ptr<T> counted_;
  std::atomic<int>& count_;
  Residents* const residents_;
};

class CountedLink : public RecordLink {
 public:
  // nccl: its place, if it is one of NCCL's.
  CountedLink(std::unique_ptr<RecordLink> link, std::atomic<int>* links, Residents* residents,
              std::optional<Residents::NcclPlace> nccl)
      : nccl_(std::move(nccl)), link_(std::move(link), links, nccl_ ? nullptr : residents) {}
  v1::Link kind() const override { return link_->kind(); }
  bool ready() const override { return link_->ready(); }
  std::string failure() const override { return link_->failure(); }
  absl::Status Send(absl::Span<const LinkRecord> records, int64_t record_bytes) override {
    return link_->Send(records, record_bytes);
  }

 private:
  const std::optional<Residents::NcclPlace> nccl_;  // outlives the link
  Counted<RecordLink> link_;
};

class CountedWindow : public RowWindow {
 public:
  CountedWindow(std::unique_ptr<RowWindow> window, std::atomic<int>* links, Residents* residents)
      : window_(std::move(window), links, residents) {}
  int64_t bytes() const override { return window_->bytes(); }
  absl::StatusOr<TakenChunk> Take(const WindowChunk& chunk,
                                  absl::Span<const PagedRun> runs) override {
    return window_->Take(chunk, runs);
  }
  absl::Status Read(const WindowChunk& chunk, char* keys, char* values) override {
    return window_->Read(chunk, keys, values);
  }

 private:
  Counted<RowWindow> window_;
};

class CudaDevice : public ShardDevice {
 public:
  CudaDevice(int ordinal, std::string name, int multiprocessors)
      : ordinal_(ordinal), name_(std::move(name)), residents_(multiprocessors) {}

  const std::string& name() const override { return name_; }
  bool healthy() const override { return healthy_.load(); }
  void OnFailure(std::function<void(const absl::Status&)> told) override {
    on_failure_ = std::move(told);
  }
  absl::Status Start(const Arena& arena, int lanes) override;
  absl::Status Upload(absl::Span<const uint32_t> pages) override;
  absl::Status Fetch(absl::Span<const uint32_t> pages) override;
  absl::Status WriteRows(const PagedRun& run, const char* keys, const char* values) override;
  absl::Status ReadRows(const PagedRun& run, char* keys, char* values) override;
  DeviceCopies copies() const override { return {uploaded_bytes_.load(), fetched_bytes_.load()}; }
  int64_t memory_bytes() const override { return DeviceBuffer::TotalBytes(ordinal_); }
  absl::StatusOr<std::unique_ptr<DevicePart>> Mirror(const IndexPartView& view,
                                                     absl::Span<const uint32_t> pages) override;
  absl::StatusOr<std::unique_ptr<DevicePart>> Build(const DeviceBuild& build) override;
  bool CanSelect(const kernels::KvShape& shape, const kernels::SelectParams& select,
                 int64_t clustered_tokens) const override;
  void Select(absl::Span<DeviceSelectItem> items) override;

  std::string WhyNoLink(v1::Link kind) const override;
  absl::StatusOr<std::unique_ptr<RecordLink>> Connect(const LinkSetup& setup,
                                                      std::string* unique_id) override;
  absl::StatusOr<std::unique_ptr<DeviceResident>> StartResident(
      const ResidentSetup& setup, absl::Span<const DeviceSelectItem> items) override;
  // What a resident kernel answers these items from. The items live until it is filled.
  ResidentInput ResidentInputOf(absl::Span<const DeviceSelectItem> items) const;
  Residents& residents() { return residents_; }
  absl::StatusOr<std::unique_ptr<RowWindow>> OpenWindow(const std::string& handle,
                                                        int64_t bytes) override;

  void FreeList(int64_t begin, int64_t bytes) {
    absl::MutexLock lock(&lists_mutex_);
    list_ranges_->Free(begin, bytes);
  }

 private:
  // Items whose parameters are the same, so that one launch answers them.
  using Group = std::vector<DeviceSelectItem*>;

  // The part's arrays as kernels see them; null when there is no room for its page numbers.
  std::unique_ptr<CudaPart> MakePart(const IndexPartView& view, absl::Span<const uint32_t> pages);
  absl::Status RunBuild(const DeviceBuild& build, const kernels::IndexCudaParams& params,
                        const CudaPart& part);
  absl::Status UploadPages(Uploader& uploader, absl::Span<const uint32_t> pages);
  absl::Status FetchPages(Uploader& uploader, absl::Span<const uint32_t> pages);
  // Where the device has what lies at `host` in the host's arena.
  std::byte* OnDevice(const std::byte* host) const {
    return arena_.data() + (host - host_->base());
  }
  // Counts one more of the device's links and windows. Errors: ResourceExhausted.
  absl::Status TakeLinkPlace();
  // Notes a fault and gives it on.
  absl::Status Note(absl::Status status) {
    if (!status.ok() && healthy_.exchange(false) && on_failure_) on_failure_(status);
    return status;
  }
  Lane* TakeLane();
  void GiveLane(Lane* lane);
  static SelectCudaParams ParamsOf(absl::Span<DeviceSelectItem* const> items);
  void SelectGroup(absl::Span<DeviceSelectItem* const> items);
  // True if the batch fits a lane.
  bool Fits(absl::Span<DeviceSelectItem* const> items) const;
  absl::Status RunBatch(Lane& lane, absl::Span<DeviceSelectItem* const> items);
  const unsigned char* SinkKeys(const DeviceSelectItem& item) const;

  const int ordinal_;
  const std::string name_;
  std::atomic<bool> healthy_{true};
  std::function<void(const absl::Status&)> on_failure_;
  std::atomic<int> links_{0};  // and windows
  std::atomic<uint64_t> uploaded_bytes_{0}, fetched_bytes_{0};
  Residents residents_;
  const Arena* host_ = nullptr;
  DeviceBuffer arena_;
  DeviceBuffer lists_;  // page numbers of all parts
  absl::Mutex lists_mutex_;
  std::optional<RangeAllocator> list_ranges_ ABSL_GUARDED_BY(lists_mutex_);
  absl::Mutex upload_mutex_;
  Uploader uploader_ ABSL_GUARDED_BY(upload_mutex_);
  DeviceBuffer build_workspace_ ABSL_GUARDED_BY(upload_mutex_);
  // Of rows while they come in, which do not wait for builds.
  absl::Mutex rows_mutex_;
  Uploader rows_uploader_ ABSL_GUARDED_BY(rows_mutex_);
  std::vector<Lane> lanes_;
  absl::Mutex lanes_mutex_;
  std::vector<Lane*> free_lanes_ ABSL_GUARDED_BY(lanes_mutex_);
};

CudaPart::~CudaPart() {
  if (list_bytes > 0) device->FreeList(list_begin, list_bytes);
}

// --- memory

absl::Status CudaDevice::Start(const Arena& arena, int lanes) {
  const ScopedDevice scoped(ordinal_);
  host_ = &arena;
  (void)kernels::NcclComm::Available();  // loads the library now, not under a call
  CKV_ASSIGN_OR_RETURN(arena_,
                       DeviceBuffer::Create(ordinal_, arena.total_pages() * arena.page_bytes()));
  // Every page is in one list at most; the rest is for rounding.
  const int64_t list_bytes = Align(arena.total_pages() * 8) + (1 << 20);
  CKV_ASSIGN_OR_RETURN(lists_, DeviceBuffer::Create(ordinal_, list_bytes));
  {
    absl::MutexLock lock(&lists_mutex_);
    list_ranges_.emplace(list_bytes, kAlignment);
  }
  {
    absl::MutexLock lock(&upload_mutex_);
    CKV_RETURN_IF_ERROR(uploader_.Start(ordinal_));
    {
      absl::MutexLock rows_lock(&rows_mutex_);
      CKV_RETURN_IF_ERROR(rows_uploader_.Start(ordinal_));
    }
    CKV_ASSIGN_OR_RETURN(
        build_workspace_,
        DeviceBuffer::Create(ordinal_, std::max(kMinBuildBytes, arena_.bytes() / 16)));
  }
  lanes_.resize(static_cast<size_t>(std::clamp(lanes, 1, kMaxLanes)));
  for (Lane& lane : lanes_) {
    CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(ordinal_, /*priority=*/-1));
    lane.stream.emplace(std::move(stream));
    CKV_ASSIGN_OR_RETURN(lane.host_input, PinnedBuffer::Create(kInputBytes));
    CKV_ASSIGN_OR_RETURN(lane.host_output, PinnedBuffer::Create(kOutputBytes));
    CKV_ASSIGN_OR_RETURN(lane.input, DeviceBuffer::Create(ordinal_, kInputBytes));
    CKV_ASSIGN_OR_RETURN(lane.output, DeviceBuffer::Create(ordinal_, kOutputBytes));
    CKV_ASSIGN_OR_RETURN(lane.workspace, DeviceBuffer::Create(ordinal_, kWorkspaceBytes));
    absl::MutexLock lock(&lanes_mutex_);
    free_lanes_.push_back(&lane);
  }
  return absl::OkStatus();
}

absl::Status CudaDevice::UploadPages(Uploader& uploader, absl::Span<const uint32_t> pages) {
  const int64_t page_bytes = host_->page_bytes();
  uploaded_bytes_.fetch_add(pages.size() * static_cast<uint64_t>(page_bytes));
  for (uint32_t page : pages) {
    const int64_t at = static_cast<int64_t>(page) * page_bytes;
    CKV_RETURN_IF_ERROR(uploader.Add(arena_.data() + at, host_->base() + at, page_bytes));
  }
  return absl::OkStatus();
}

absl::Status CudaDevice::Upload(absl::Span<const uint32_t> pages) {
  const ScopedDevice scoped(ordinal_);
  absl::MutexLock lock(&upload_mutex_);
  CKV_RETURN_IF_ERROR(Note(UploadPages(uploader_, pages)));
  return Note(uploader_.Finish());
}

absl::Status CudaDevice::FetchPages(Uploader& uploader, absl::Span<const uint32_t> pages) {
  fetched_bytes_.fetch_add(pages.size() * static_cast<uint64_t>(host_->page_bytes()));
  return uploader.Fetch(pages, host_->page_bytes(), arena_.data(), host_->base());
}

absl::Status CudaDevice::Fetch(absl::Span<const uint32_t> pages) {
  const ScopedDevice scoped(ordinal_);
  absl::MutexLock lock(&rows_mutex_);
  return Note(FetchPages(rows_uploader_, pages));
}

// Calls f(at, offset, bytes) for each piece of the run's rows in `view` that lies in one page, with
// its place among the packed rows, until a call fails.
template <typename F>
absl::Status ForEachPiece(const kernels::MutablePagedView& view, const PagedRun& run, const F& f) {
  absl::Status status;
  kernels::ForEachRun(
      view, run.first, run.first + run.rows, [&](std::byte* at, int64_t first, int64_t count) {
        if (!status.ok()) return;
        status = f(at, (first - run.first) * view.element_bytes, count * view.element_bytes);
      });
  return status;
}

absl::Status CudaDevice::WriteRows(const PagedRun& run, const char* keys, const char* values) {
  const ScopedDevice scoped(ordinal_);
  absl::MutexLock lock(&rows_mutex_);
  for (const auto& [view, packed] : {std::pair(&run.keys, keys), std::pair(&run.values, values)}) {
    const auto add = [&, from = packed](const std::byte* at, int64_t offset, int64_t bytes)
                         ABSL_NO_THREAD_SAFETY_ANALYSIS {
                           uploaded_bytes_.fetch_add(static_cast<uint64_t>(bytes));
                           return rows_uploader_.Add(OnDevice(at), from + offset, bytes);
                         };
    CKV_RETURN_IF_ERROR(Note(ForEachPiece(*view, run, add)));
  }
  return Note(rows_uploader_.Finish());
}

absl::Status CudaDevice::ReadRows(const PagedRun& run, char* keys, char* values) {
  const ScopedDevice scoped(ordinal_);
  absl::MutexLock lock(&rows_mutex_);
  for (const auto& [view, packed] : {std::pair(&run.keys, keys), std::pair(&run.values, values)}) {
    const auto read = [&, to = packed](const std::byte* at, int64_t offset, int64_t bytes)
                          ABSL_NO_THREAD_SAFETY_ANALYSIS {
                            fetched_bytes_.fetch_add(static_cast<uint64_t>(bytes));
                            return rows_uploader_.Read(to + offset, OnDevice(at), bytes);
                          };
    CKV_RETURN_IF_ERROR(Note(ForEachPiece(*view, run, read)));
  }
  return absl::OkStatus();
}

std::unique_ptr<CudaPart> CudaDevice::MakePart(const IndexPartView& view,
                                               absl::Span<const uint32_t> pages) {
  auto part = std::make_unique<CudaPart>();
  part->device = this;
  const auto list_bytes = static_cast<int64_t>(pages.size() * sizeof(uint32_t));
  {
    absl::MutexLock lock(&lists_mutex_);
    const std::optional<int64_t> begin = list_ranges_->Allocate(list_bytes);
    if (!begin.has_value()) return nullptr;
    part->list_begin = *begin;
    part->list_bytes = list_bytes;
  }
  const auto* list = reinterpret_cast<const uint32_t*>(lists_.data() + part->list_begin);
  const auto view_of = [&](const PagedView& array) -> DevicePagedView {
    if (array.size == 0) return {};
    return kernels::MakeDevicePagedView(arena_.data(), list + (array.pages - pages.data()),
                                        array.page_bytes, array.element_bytes);
  };
  DeviceIndexPart& device_part = part->part;
  device_part.first_token = view.first_token;
  device_part.tokens = static_cast<int32_t>(view.tokens);
  device_part.clusters = static_cast<int32_t>(view.clusters);
  device_part.centroids = view_of(view.centroids);
  device_part.value_means = view_of(view.value_means);
  device_part.cluster_begin = view_of(view.cluster_begin);
  device_part.positions = view_of(view.positions);
  device_part.slots = view_of(view.slots);
  device_part.codes = view_of(view.codes);
  device_part.records = view_of(view.records);
  device_part.channels = view_of(view.channels);
  device_part.remainders = view_of(view.remainders);
  return part;
}

absl::StatusOr<std::unique_ptr<DevicePart>> CudaDevice::Mirror(const IndexPartView& view,
                                                               absl::Span<const uint32_t> pages) {
  const ScopedDevice scoped(ordinal_);
  std::unique_ptr<CudaPart> part = MakePart(view, pages);
  if (part == nullptr) return std::unique_ptr<DevicePart>();
  absl::MutexLock lock(&upload_mutex_);
  CKV_RETURN_IF_ERROR(
      Note(uploader_.Add(lists_.data() + part->list_begin, pages.data(), part->list_bytes)));
  CKV_RETURN_IF_ERROR(Note(UploadPages(uploader_, pages)));
  CKV_RETURN_IF_ERROR(Note(uploader_.Finish()));
  return std::unique_ptr<DevicePart>(std::move(part));
}

// --- build

std::optional<kernels::RecordFormat> FormatOf(const kernels::RecordCodec& codec) {
  if (codec.name() == "raw") return kernels::RecordFormat::kRaw;
  if (codec.name() == "k8v4") return kernels::RecordFormat::kK8V4;
  return std::nullopt;
}

// Pages of an array of rows.
absl::Span<const uint32_t> PagesOf(const PagedView& rows) {
  return absl::MakeConstSpan(rows.pages, static_cast<size_t>(kernels::PagesFor(
                                             rows.size, rows.element_bytes, rows.page_bytes)));
}

absl::StatusOr<std::unique_ptr<DevicePart>> CudaDevice::Build(const DeviceBuild& build) {
  const auto leave = [](const char* why) { return absl::UnavailableError(why); };
  const std::optional<kernels::RecordFormat> format = FormatOf(*build.codec);
  const int64_t tokens = build.part.tokens;
  if (!format.has_value()) return leave("no kernel for this codec");
  if (build.params.split_over > 0) return leave("no kernel that splits clusters");
  if (build.params.init != kernels::KMeansInit::kStride) return leave("a random start");
  if (build.input->inherited_channels != nullptr && build.inherited == nullptr) {
    return leave("the first part is not on the device");
  }
  kernels::IndexCudaParams params;
  params.kv_heads = static_cast<int32_t>(build.shape.kv_heads);
  params.head_dim = static_cast<int32_t>(build.shape.head_dim);
  params.element_type = build.shape.element_type;
  params.tokens_per_cluster =
      static_cast<int32_t>(std::min<int64_t>(build.params.tokens_per_cluster, INT32_MAX));
  params.segment_tokens =
      static_cast<int32_t>(std::min<int64_t>(build.params.segment_tokens, INT32_MAX));
  params.iterations = build.params.iterations;
  params.code_bits = build.params.codes.bits;
  params.group_channels = build.params.codes.group_channels;
  params.format = *format;
  if (kernels::IndexCudaClusters(params, tokens) != build.part.clusters) {
    return leave("other clusters than the part has");
  }
  const ScopedDevice scoped(ordinal_);
  std::unique_ptr<CudaPart> part = MakePart(build.part, build.pages);
  if (part == nullptr) return leave("no room for the part's page numbers");
  CKV_RETURN_IF_ERROR(RunBuild(build, params, *part));
  return std::unique_ptr<DevicePart>(std::move(part));
}

absl::Status CudaDevice::RunBuild(const DeviceBuild& build, const kernels::IndexCudaParams& params,
                                  const CudaPart& part) {
  const kernels::IndexInput& from = *build.input;
  absl::MutexLock lock(&upload_mutex_);
  // The rows' page numbers and the queries' RMS lie before the kernels' own memory.
  Bump bump;
  const absl::Span<const uint32_t> key_pages = PagesOf(from.keys),
                                   value_pages = PagesOf(from.values);
  const int64_t keys_at = bump.Take(static_cast<int64_t>(key_pages.size()) * 4);
  const int64_t values_at = bump.Take(static_cast<int64_t>(value_pages.size()) * 4);
  const int64_t rms_at = bump.Take(static_cast<int64_t>(from.query_rms.size()) * 4);
  const int64_t workspace_bytes = kernels::IndexCudaWorkspaceBytes(params, build.part.tokens);
  if (workspace_bytes == 0 || bump.used() + workspace_bytes > build_workspace_.bytes()) {
    return absl::UnavailableError("beyond what the device's kernels take");
  }
  std::byte* const scratch = build_workspace_.data();
  const auto rows = [&](const PagedView& view, int64_t list_at) {
    return kernels::MakeDevicePagedView(arena_.data(),
                                        reinterpret_cast<const uint32_t*>(scratch + list_at),
                                        view.page_bytes, view.element_bytes);
  };
  const auto add = [&](std::byte* to, const void* data,
                       size_t bytes) ABSL_NO_THREAD_SAFETY_ANALYSIS {  // under the lock
    return Note(uploader_.Add(to, data, static_cast<int64_t>(bytes)));
  };
  CKV_RETURN_IF_ERROR(add(scratch + keys_at, key_pages.data(), key_pages.size() * 4));
  CKV_RETURN_IF_ERROR(add(scratch + values_at, value_pages.data(), value_pages.size() * 4));
  CKV_RETURN_IF_ERROR(add(scratch + rms_at, from.query_rms.data(), from.query_rms.size() * 4));
  CKV_RETURN_IF_ERROR(
      add(lists_.data() + part.list_begin, build.pages.data(), build.pages.size() * 4));
  if (!build.rows_on_device) {
    CKV_RETURN_IF_ERROR(Note(UploadPages(uploader_, key_pages)));
    CKV_RETURN_IF_ERROR(Note(UploadPages(uploader_, value_pages)));
  }
  CKV_RETURN_IF_ERROR(Note(uploader_.Flush()));
  kernels::IndexCudaInput input;
  input.keys = rows(from.keys, keys_at);
  input.values = rows(from.values, values_at);
  if (!from.query_rms.empty()) input.query_rms = reinterpret_cast<const float*>(scratch + rms_at);
  if (from.inherited_channels != nullptr) {
    input.inherits_channels = true;
    input.inherited_channels = static_cast<const CudaPart*>(build.inherited)->part.channels;
  }
  const cudaError_t launched = kernels::LaunchBuildIndexPart(
      params, input, part.part, scratch + bump.used(), uploader_.stream());
  if (launched == cudaErrorInvalidValue) {  // nothing ran
    return absl::UnavailableError("parameters that the device's kernels do not take");
  }
  CKV_RETURN_IF_ERROR(Note(CudaStatus(launched, "build")));
  return Note(FetchPages(uploader_, build.pages));
}

// --- select

Lane* CudaDevice::TakeLane() {
  absl::MutexLock lock(&lanes_mutex_);
  const auto any = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !free_lanes_.empty(); };
  lanes_mutex_.Await(absl::Condition(&any));
  Lane* const lane = free_lanes_.back();
  free_lanes_.pop_back();
  return lane;
}

void CudaDevice::GiveLane(Lane* lane) {
  absl::MutexLock lock(&lanes_mutex_);
  free_lanes_.push_back(lane);
}

bool CudaDevice::CanSelect(const kernels::KvShape& shape, const kernels::SelectParams& select,
                           int64_t clustered_tokens) const {
  return select.mode == kernels::SelectMode::kSharedPerKvHead && shape.group() <= 32 &&
         std::min(select.budget_tokens, clustered_tokens) <= kMaxBudgetTokens &&
         std::min(select.scored_tokens, clustered_tokens) <= kMaxScoredTokens;
}

bool SameLaunch(const DeviceSelectItem& a, const DeviceSelectItem& b) {
  // Budgets beyond the context were cut to it, so that sequences of other lengths differ in them.
  return a.shape == b.shape && a.codes == b.codes && a.select == b.select;
}

SelectCudaParams CudaDevice::ParamsOf(absl::Span<DeviceSelectItem* const> items) {
  const DeviceSelectItem& first = *items.front();
  SelectCudaParams params;
  params.group = static_cast<int32_t>(first.shape.group());
  params.head_dim = static_cast<int32_t>(first.shape.head_dim);
  params.element_type = first.shape.element_type;
  params.scale = 1.0f / std::sqrt(static_cast<float>(first.shape.head_dim));
  params.code_bits = first.codes.bits;
  params.group_channels = first.codes.group_channels;
  // What exceeds the context of every item means all of it.
  int64_t most_tokens = 1;
  for (const DeviceSelectItem* item : items) {
    most_tokens = std::max(most_tokens, item->clustered_tokens + item->sink_tokens);
    params.max_clusters =
        std::max(params.max_clusters, static_cast<int32_t>(item->first_cluster.back()));
    params.max_sinks = std::max(params.max_sinks, static_cast<int32_t>(item->sink_tokens));
  }
  params.budget_tokens = static_cast<int32_t>(std::min(first.select.budget_tokens, most_tokens));
  params.scored_tokens = static_cast<int32_t>(std::min(first.select.scored_tokens, most_tokens));
  params.answer_scored = first.select.answer_scored;
  params.estimated_fraction = first.select.estimated_fraction;
  return params;
}

// Where a batch's arrays lie in a lane's buffers.
struct BatchLayout {
  BatchLayout(const SelectCudaParams& params, absl::Span<DeviceSelectItem* const> items) {
    int64_t part_count = 0, query_floats = 0;
    for (const DeviceSelectItem* item : items) {
      pairs += item->shape.kv_heads;
      part_count += static_cast<int64_t>(item->parts.size());
      query_floats += static_cast<int64_t>(item->queries.size());
    }
    const int64_t estimated =
        static_cast<int64_t>(static_cast<double>(params.estimated_fraction) * params.max_clusters);
    const int64_t scored =
        std::min(params.max_clusters, std::max(params.budget_tokens, params.scored_tokens));
    max_exact = kernels::ExactCapacity(params);
    max_listed = std::max<int64_t>(1, std::max(scored, estimated));
    Bump in;
    pair_array = in.Take(pairs * static_cast<int64_t>(sizeof(SelectCudaPair)));
    part_array = in.Take(part_count * static_cast<int64_t>(sizeof(DeviceIndexPart)));
    queries = in.Take(query_floats * 4);
    for (const DeviceSelectItem* item : items) {
      const PagedView& sinks = item->sink_keys;
      const bool copied = item->sink_tokens > sinks.elements_per_page;
      sink_keys.push_back(copied ? in.Take(item->sink_tokens * sinks.element_bytes) : -1);
    }
    input_bytes = in.used();
    Bump out;
    for (int64_t* counts : {&exact_count, &coded_tokens, &scored_count, &estimated_count}) {
      *counts = out.Take(pairs * 4);
    }
    for (int64_t* exact : {&positions, &parts, &slots, &clusters}) {
      *exact = out.Take(pairs * max_exact * 4);
    }
    for (int64_t* listed : {&scored_clusters, &estimated_clusters}) {
      *listed = out.Take(pairs * max_listed * 4);
    }
    state_lse = out.Take(pairs * params.group * 4);
    state_output = out.Take(pairs * params.group * params.head_dim * 4);
    output_bytes = out.used();
    workspace_bytes = kernels::SelectCudaWorkspaceBytes(params, static_cast<int32_t>(pairs));
  }
  // workspace_bytes 0: the kernel does not take these parameters.
  bool Fits() const {
    return workspace_bytes > 0 && workspace_bytes <= kWorkspaceBytes &&
           input_bytes <= kInputBytes && output_bytes <= kOutputBytes;
  }

  int64_t pairs = 0, max_exact = 0, max_listed = 0;
  int64_t pair_array, part_array, queries, input_bytes;
  std::vector<int64_t> sink_keys;  // [items]; -1: they lie in one page of the arena
  int64_t exact_count, coded_tokens, scored_count, estimated_count, positions, parts, slots,
      clusters, scored_clusters, estimated_clusters, state_lse, state_output, output_bytes;
  int64_t workspace_bytes = 0;
};

bool CudaDevice::Fits(absl::Span<DeviceSelectItem* const> items) const {
  return BatchLayout(ParamsOf(items), items).Fits();
}

void CudaDevice::Select(absl::Span<DeviceSelectItem> items) {
  std::vector<Group> groups;
  for (DeviceSelectItem& item : items) {
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
      return SameLaunch(*group.front(), item);
    });
    (same == groups.end() ? groups.emplace_back() : *same).push_back(&item);
  }
  for (const Group& group : groups) SelectGroup(group);
}

void CudaDevice::SelectGroup(absl::Span<DeviceSelectItem* const> items) {
  const ScopedDevice scoped(ordinal_);
  while (!items.empty()) {
    size_t count = items.size();
    while (count > 0 && !Fits(items.first(count))) count /= 2;
    const absl::Span<DeviceSelectItem* const> batch = items.first(std::max<size_t>(count, 1));
    items.remove_prefix(batch.size());
    absl::Status status = absl::UnavailableError("beyond what the device has room for");
    if (count > 0 && healthy()) {
      Lane* const lane = TakeLane();
      status = RunBatch(*lane, batch);
      GiveLane(lane);
    }
    if (status.ok()) continue;
    for (DeviceSelectItem* item : batch) item->status = absl::UnavailableError(status.message());
  }
}

const unsigned char* CudaDevice::SinkKeys(const DeviceSelectItem& item) const {
  if (item.sink_tokens == 0) return nullptr;
  return reinterpret_cast<const unsigned char*>(arena_.data() +
                                                (item.sink_keys.At(0) - host_->base()));
}

// The batch's input as the device reads it, written into `host`, which lies at `device` there.
void FillInput(const BatchLayout& layout, absl::Span<DeviceSelectItem* const> items,
               absl::Span<const unsigned char* const> sinks, std::byte* host, std::byte* device) {
  auto* pair = reinterpret_cast<SelectCudaPair*>(host + layout.pair_array);
  int64_t part_at = layout.part_array, query_at = layout.queries;
  for (size_t i = 0; i < items.size(); ++i) {
    const DeviceSelectItem& item = *items[i];
    const auto* parts = reinterpret_cast<const DeviceIndexPart*>(device + part_at);
    for (size_t p = 0; p < item.parts.size(); ++p) {
      DeviceIndexPart part = static_cast<const CudaPart*>(item.parts[p])->part;
      part.first_cluster = static_cast<int32_t>(item.first_cluster[p]);
      std::memcpy(host + part_at, &part, sizeof(part));
      part_at += static_cast<int64_t>(sizeof(part));
    }
    const unsigned char* sink_keys = sinks[i];
    if (layout.sink_keys[i] >= 0) {
      const PagedView& rows = item.sink_keys;
      std::byte* to = host + layout.sink_keys[i];
      for (int64_t t = 0; t < item.sink_tokens; ++t, to += rows.element_bytes) {
        std::memcpy(to, rows.At(t), static_cast<size_t>(rows.element_bytes));
      }
      sink_keys = reinterpret_cast<const unsigned char*>(device + layout.sink_keys[i]);
    }
    const int64_t head_floats = item.shape.group() * item.shape.head_dim;
    const int64_t head_bytes = item.shape.head_dim * kernels::ElementBytes(item.shape.element_type);
    if (!item.queries.empty()) {  // a resident kernel's come later
      std::memcpy(host + query_at, item.queries.data(), item.queries.size() * sizeof(float));
    }
    for (int64_t head = 0; head < item.shape.kv_heads; ++head, ++pair) {
      *pair = SelectCudaPair();
      pair->parts = parts;
      pair->part_count = static_cast<int32_t>(item.parts.size());
      pair->clusters = static_cast<int32_t>(item.first_cluster.back());
      pair->kv_head = static_cast<int32_t>(head);
      pair->sink_tokens = static_cast<int32_t>(item.sink_tokens);
      pair->queries = reinterpret_cast<const float*>(device + query_at) + head * head_floats;
      pair->sink_keys = sink_keys == nullptr ? nullptr : sink_keys + head * head_bytes;
      pair->sink_key_stride_bytes = item.sink_keys.element_bytes;
    }
    query_at += static_cast<int64_t>(item.queries.size() * sizeof(float));
  }
}

SelectCudaOutput OutputAt(const BatchLayout& layout, std::byte* base) {
  const auto ints = [&](int64_t at) { return reinterpret_cast<int32_t*>(base + at); };
  SelectCudaOutput out;
  out.max_exact = static_cast<int32_t>(layout.max_exact);
  out.exact_count = ints(layout.exact_count);
  out.positions = ints(layout.positions);
  out.parts = ints(layout.parts);
  out.slots = ints(layout.slots);
  out.clusters = ints(layout.clusters);
  out.coded_tokens = ints(layout.coded_tokens);
  out.max_listed = static_cast<int32_t>(layout.max_listed);
  out.scored_count = ints(layout.scored_count);
  out.scored_clusters = ints(layout.scored_clusters);
  out.estimated_count = ints(layout.estimated_count);
  out.estimated_clusters = ints(layout.estimated_clusters);
  out.state_output = reinterpret_cast<float*>(base + layout.state_output);
  out.state_lse = reinterpret_cast<float*>(base + layout.state_lse);
  return out;
}

// Pair `p` of the output. False when its numbers are none: queries whose logits overflow, which the
// host tells apart.
bool ReadHead(const SelectCudaOutput& out, int64_t p, int64_t group, int64_t head_dim,
              kernels::HeadSelection* head) {
  const auto read = [](const int32_t* row, int64_t count, std::vector<int32_t>* to) {
    to->assign(row, row + count);
  };
  const int64_t exact = out.exact_count[p];
  read(out.positions + p * out.max_exact, exact, &head->positions);
  read(out.parts + p * out.max_exact, exact, &head->parts);
  read(out.slots + p * out.max_exact, exact, &head->slots);
  read(out.clusters + p * out.max_exact, exact, &head->clusters);
  head->head_masks.clear();
  read(out.scored_clusters + p * out.max_listed, out.scored_count[p], &head->scored_clusters);
  read(out.estimated_clusters + p * out.max_listed, out.estimated_count[p],
       &head->estimated_clusters);
  head->coded_tokens = out.coded_tokens[p];
  const float* output = out.state_output + p * group * head_dim;
  const float* lse = out.state_lse + p * group;
  head->state_output.assign(output, output + group * head_dim);
  head->state_lse.assign(lse, lse + group);
  const auto finite = [](float number) { return std::isfinite(number); };
  const auto below_infinity = [](float number) {
    return number < std::numeric_limits<float>::infinity();  // false for NaN
  };
  return std::all_of(output, output + group * head_dim, finite) &&
         std::all_of(lse, lse + group, below_infinity);
}

absl::Status CudaDevice::RunBatch(Lane& lane, absl::Span<DeviceSelectItem* const> items) {
  const SelectCudaParams params = ParamsOf(items);
  const BatchLayout layout(params, items);
  std::vector<const unsigned char*> sinks;
  for (const DeviceSelectItem* item : items) sinks.push_back(SinkKeys(*item));
  FillInput(layout, items, sinks, lane.host_input.data(), lane.input.data());
  const cudaStream_t stream = lane.stream->get();
  CKV_RETURN_IF_ERROR(Note(CudaStatus(
      cudaMemcpyAsync(lane.input.data(), lane.host_input.data(),
                      static_cast<size_t>(layout.input_bytes), cudaMemcpyHostToDevice, stream),
      "queries")));
  const auto pairs = static_cast<int32_t>(layout.pairs);
  const auto launch = [&](int blocks_per_pair) {
    SelectCudaParams placed = params;
    placed.blocks_per_pair = blocks_per_pair;
    return kernels::LaunchSelect(
        placed, reinterpret_cast<const SelectCudaPair*>(lane.input.data() + layout.pair_array),
        pairs, OutputAt(layout, lane.output.data()), lane.workspace.data(), stream);
  };
  const cudaError_t launched =
      residents_.LaunchSelect({pairs, kernels::QuadsOf(params.group)}, launch);
  if (launched == cudaErrorInvalidValue) return CudaStatus(launched, "select");  // nothing ran
  CKV_RETURN_IF_ERROR(Note(CudaStatus(launched, "select")));
  CKV_RETURN_IF_ERROR(Note(CudaStatus(
      cudaMemcpyAsync(lane.host_output.data(), lane.output.data(),
                      static_cast<size_t>(layout.output_bytes), cudaMemcpyDeviceToHost, stream),
      "selection")));
  CKV_RETURN_IF_ERROR(Note(lane.stream->Synchronize()));
  const SelectCudaOutput out = OutputAt(layout, lane.host_output.data());
  int64_t pair = 0;
  for (DeviceSelectItem* item : items) {
    item->status = absl::OkStatus();
    for (int64_t head = 0; head < item->shape.kv_heads; ++head, ++pair) {
      if (ReadHead(out, pair, params.group, params.head_dim, &item->heads[head])) continue;
      item->status = absl::UnavailableError("the answer is not finite");
    }
  }
  return absl::OkStatus();
}

// --- links

std::string CudaDevice::WhyNoLink(v1::Link kind) const {
  if (!healthy()) return "this server's GPU device failed";
  if (kind == v1::LINK_PEER) return "";
  if (kind == v1::LINK_NCCL) return std::string(kernels::NcclComm::Available().message());
  return "unknown to this server";
}

absl::StatusOr<std::unique_ptr<RecordLink>> CudaDevice::Connect(const LinkSetup& setup,
                                                                std::string* unique_id) {
  const ScopedDevice scoped(ordinal_);
  if (std::string why = WhyNoLink(setup.kind); !why.empty()) return absl::UnavailableError(why);
  if (setup.max_message_bytes > kMaxMessageBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "messages: expected at most ", kMaxMessageBytes, " bytes, got ", setup.max_message_bytes));
  }
  std::optional<Residents::NcclPlace> nccl;
  if (setup.kind == v1::LINK_NCCL) {
    CKV_ASSIGN_OR_RETURN(Residents::NcclPlace place, residents_.TakeNcclPlace());
    nccl.emplace(std::move(place));
  }
  CKV_RETURN_IF_ERROR(TakeLinkPlace());
  const Residents::Pause pause(&residents_);
  absl::StatusOr<std::unique_ptr<RecordLink>> link =
      setup.kind == v1::LINK_PEER ? ConnectPeerLink(ordinal_, setup)
                                  : ConnectNcclLink(ordinal_, setup, unique_id);
  if (!link.ok()) {
    links_.fetch_sub(1);
    return link.status();
  }
  return std::unique_ptr<RecordLink>(
      std::make_unique<CountedLink>(*std::move(link), &links_, &residents_, std::move(nccl)));
}

absl::Status CudaDevice::TakeLinkPlace() {
  if (links_.fetch_add(1) < kMaxLinks) return absl::OkStatus();
  links_.fetch_sub(1);
  return absl::ResourceExhaustedError(absl::StrCat("links: at most ", kMaxLinks));
}

absl::StatusOr<std::unique_ptr<RowWindow>> CudaDevice::OpenWindow(const std::string& handle,
                                                                  int64_t bytes) {
  const ScopedDevice scoped(ordinal_);
  if (std::string why = WhyNoLink(v1::LINK_PEER); !why.empty()) return absl::UnavailableError(why);
  RowWindowSetup setup;
  setup.device = ordinal_;
  setup.handle = handle;
  setup.bytes = bytes;
  setup.arena = arena_.data();
  setup.page_bytes = host_->page_bytes();
  setup.failed = [this](const absl::Status& status) { Note(status).IgnoreError(); };
  CKV_RETURN_IF_ERROR(TakeLinkPlace());
  const Residents::Pause pause(&residents_);
  absl::StatusOr<std::unique_ptr<RowWindow>> window = OpenRowWindow(std::move(setup));
  if (!window.ok()) {
    links_.fetch_sub(1);
    return window.status();
  }
  return std::unique_ptr<RowWindow>(
      std::make_unique<CountedWindow>(*std::move(window), &links_, &residents_));
}

// --- resident kernels

// One of the device's, stopped and taken out when it dies.
class ListedResident : public DeviceResident {
 public:
  ListedResident(std::unique_ptr<CudaResident> resident, CudaDevice* device)
      : resident_(std::move(resident)), device_(*device) {}
  ~ListedResident() override {
    End();
    const Residents::Pause pause(&device_.residents());
    resident_.reset();
  }
  const v1::PeerWindow& requests() const override { return resident_->requests(); }
  absl::Status Change(absl::Span<const DeviceSelectItem> items, uint64_t rounds) override {
    const Residents::Pause pause(&device_.residents());
    if (resident_->rounds() != rounds) {
      return absl::FailedPreconditionError(
          absl::StrCat("rounds: expected ", resident_->rounds(), ", got ", rounds));
    }
    return resident_->SetInput(device_.ResidentInputOf(items));
  }
  void End() override {
    const Residents::Pause pause(&device_.residents());
    device_.residents().Remove(resident_.get());
    resident_->Free();
  }

 private:
  std::unique_ptr<CudaResident> resident_;
  CudaDevice& device_;
};

ResidentInput CudaDevice::ResidentInputOf(absl::Span<const DeviceSelectItem> items) const {
  auto copies = std::make_shared<std::vector<DeviceSelectItem>>(items.begin(), items.end());
  std::vector<DeviceSelectItem*> batch;
  for (DeviceSelectItem& item : *copies) batch.push_back(&item);
  ResidentInput input;
  input.select = ParamsOf(batch);
  const BatchLayout layout(input.select, batch);
  input.bytes = layout.input_bytes;
  input.pairs_at = layout.pair_array;
  input.fill = [this, copies, batch, layout](std::byte* host, std::byte* device) {
    std::vector<const unsigned char*> sinks;
    for (const DeviceSelectItem* item : batch) sinks.push_back(SinkKeys(*item));
    FillInput(layout, batch, sinks, host, device);
  };
  return input;
}

absl::StatusOr<std::unique_ptr<DeviceResident>> CudaDevice::StartResident(
    const ResidentSetup& setup, absl::Span<const DeviceSelectItem> items) {
  const ScopedDevice scoped(ordinal_);
  if (!healthy()) return absl::UnavailableError("resident: this server's GPU device failed");
  const DeviceSelectItem& first = items.front();
  kernels::ResidentShape shape;
  shape.layers = static_cast<int32_t>(setup.layers);
  shape.pairs = static_cast<int32_t>(static_cast<int64_t>(items.size()) / setup.layers *
                                     first.shape.kv_heads);
  shape.group = static_cast<int32_t>(first.shape.group());
  shape.head_dim = static_cast<int32_t>(first.shape.head_dim);
  shape.query_type = shape.element_type = first.shape.element_type;
  shape.max_exact = static_cast<int32_t>(setup.max_exact);
  shape.slots = static_cast<int32_t>(setup.slots);
  const Residents::Pause pause(&residents_);
  CKV_RETURN_IF_ERROR(residents_.CheckRoom());
  CKV_ASSIGN_OR_RETURN(std::unique_ptr<CudaResident> resident,
                       CudaResident::Create(ordinal_, shape, setup));
  CKV_RETURN_IF_ERROR(resident->SetInput(ResidentInputOf(items)));
  CKV_RETURN_IF_ERROR(residents_.Add(resident.get()));
  return std::unique_ptr<DeviceResident>(
      std::make_unique<ListedResident>(std::move(resident), this));
}

}  // namespace

absl::StatusOr<std::unique_ptr<ShardDevice>> CreateCudaDevice(int ordinal) {
  const int count = kernels::DeviceCount();
  if (ordinal >= count) {
    return absl::UnavailableError(
        absl::StrCat("device: cuda:", ordinal, ": this process sees ", count, " CUDA devices"));
  }
  const ScopedDevice scoped(ordinal);
  return std::unique_ptr<ShardDevice>(std::make_unique<CudaDevice>(
      ordinal, absl::StrCat("cuda:", ordinal), kernels::ReadLimits().multiprocessors));
}

}  // namespace clusterkv::cache_service
