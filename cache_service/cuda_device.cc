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
#include "cache_service/range_allocator.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/index/index_view_cuda.h"
#include "kernels/runtime/device.h"
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

// Host memory to the device through two pinned buffers, the one filled while the other is sent.
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

struct CudaPart : DevicePart {
  ~CudaPart() override;
  CudaDevice* device = nullptr;
  int64_t list_begin = 0, list_bytes = 0;  // of the page numbers, in the device's lists
  DeviceIndexPart part;
};

class CudaDevice : public ShardDevice {
 public:
  CudaDevice(int ordinal, std::string name) : ordinal_(ordinal), name_(std::move(name)) {}

  const std::string& name() const override { return name_; }
  bool healthy() const override { return healthy_.load(); }
  absl::Status Start(const Arena& arena, int lanes) override;
  absl::Status Upload(absl::Span<const uint32_t> pages) override;
  absl::StatusOr<std::unique_ptr<DevicePart>> Mirror(const IndexPartView& view,
                                                     absl::Span<const uint32_t> pages) override;
  bool CanSelect(const kernels::KvShape& shape, const kernels::SelectParams& select,
                 int64_t clustered_tokens) const override;
  void Select(absl::Span<DeviceSelectItem> items) override;

  void FreeList(int64_t begin, int64_t bytes) {
    absl::MutexLock lock(&lists_mutex_);
    list_ranges_->Free(begin, bytes);
  }

 private:
  // Items whose parameters are the same, so that one launch answers them.
  using Group = std::vector<DeviceSelectItem*>;

  absl::Status UploadPages(Uploader& uploader, absl::Span<const uint32_t> pages) const;
  // Notes a fault and gives it on.
  absl::Status Note(absl::Status status) {
    if (!status.ok()) healthy_.store(false);
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
  const Arena* host_ = nullptr;
  DeviceBuffer arena_;
  DeviceBuffer lists_;  // page numbers of all parts
  absl::Mutex lists_mutex_;
  std::optional<RangeAllocator> list_ranges_ ABSL_GUARDED_BY(lists_mutex_);
  absl::Mutex upload_mutex_;
  Uploader uploader_ ABSL_GUARDED_BY(upload_mutex_);
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

absl::Status CudaDevice::UploadPages(Uploader& uploader, absl::Span<const uint32_t> pages) const {
  const int64_t page_bytes = host_->page_bytes();
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

absl::StatusOr<std::unique_ptr<DevicePart>> CudaDevice::Mirror(const IndexPartView& view,
                                                               absl::Span<const uint32_t> pages) {
  const ScopedDevice scoped(ordinal_);
  auto part = std::make_unique<CudaPart>();
  part->device = this;
  const auto list_bytes = static_cast<int64_t>(pages.size() * sizeof(uint32_t));
  {
    absl::MutexLock lock(&lists_mutex_);
    const std::optional<int64_t> begin = list_ranges_->Allocate(list_bytes);
    if (!begin.has_value()) return std::unique_ptr<DevicePart>();
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
  absl::MutexLock lock(&upload_mutex_);
  CKV_RETURN_IF_ERROR(
      Note(uploader_.Add(lists_.data() + part->list_begin, pages.data(), list_bytes)));
  CKV_RETURN_IF_ERROR(Note(UploadPages(uploader_, pages)));
  CKV_RETURN_IF_ERROR(Note(uploader_.Finish()));
  return std::unique_ptr<DevicePart>(std::move(part));
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
    std::memcpy(host + query_at, item.queries.data(), item.queries.size() * sizeof(float));
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
  const cudaError_t launched = kernels::LaunchSelect(
      params, reinterpret_cast<const SelectCudaPair*>(lane.input.data() + layout.pair_array),
      static_cast<int32_t>(layout.pairs), OutputAt(layout, lane.output.data()),
      lane.workspace.data(), stream);
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

}  // namespace

absl::StatusOr<std::unique_ptr<ShardDevice>> CreateCudaDevice(int ordinal) {
  const int count = kernels::DeviceCount();
  if (ordinal >= count) {
    return absl::UnavailableError(
        absl::StrCat("device: cuda:", ordinal, ": this process sees ", count, " CUDA devices"));
  }
  return std::unique_ptr<ShardDevice>(
      std::make_unique<CudaDevice>(ordinal, absl::StrCat("cuda:", ordinal)));
}

}  // namespace clusterkv::cache_service
