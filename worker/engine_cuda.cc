#include "worker/engine_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/attention/attention_cuda.h"
#include "kernels/base/status_macros.h"
#include "kernels/codec/record_codec.h"
#include "kernels/runtime/device.h"
#include "proto/error.h"
#include "worker/cuda_ingest_ring.h"
#include "worker/cuda_window.h"
#include "worker/engine_resident.h"
#include "worker/stream_cuda.h"

namespace clusterkv::worker {
namespace {

using kernels::AttentionCudaPair;
using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::DeviceRawRun;
using kernels::ElementType;
using kernels::PinnedBuffer;
using kernels::ScopedDevice;
using kernels::Stream;

constexpr int64_t kAlignment = 256;
// New rows of a layer that one step may bring, and how far the window may grow beyond what it
// should.
constexpr int64_t kStepRows = 64, kSpareRows = 256;
constexpr int32_t kRuns = 3;  // sinks, and the window's two pieces in its ring

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
cudaStream_t Cuda(EngineStream stream) { return static_cast<cudaStream_t>(stream); }

// Pinned memory that is used again and never freed before all of it is: to free some waits for the
// device, which may be waiting for a lane.
class PinnedPool {
 public:
  absl::StatusOr<std::shared_ptr<std::byte>> Take(int64_t bytes) {
    int64_t size = 4096;
    while (size < bytes) size *= 2;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::vector<std::byte*>& free = free_[size];
      if (!free.empty()) {
        std::byte* const at = free.back();
        free.pop_back();
        return Shared(at, size);
      }
    }
    CKV_ASSIGN_OR_RETURN(PinnedBuffer made, PinnedBuffer::Create(size));
    std::byte* const at = made.data();
    const std::lock_guard<std::mutex> lock(mutex_);
    all_.push_back(std::move(made));
    return Shared(at, size);
  }

 private:
  std::shared_ptr<std::byte> Shared(std::byte* at, int64_t size) {
    return std::shared_ptr<std::byte>(at, [this, size](std::byte* back) {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_[size].push_back(back);
    });
  }

  std::mutex mutex_;
  std::vector<PinnedBuffer> all_;
  std::map<int64_t, std::vector<std::byte*>> free_;  // by size
};

// What streams have not come to yet: a stream of a failed device never does. Streams carry numbers,
// not pointers, so that one that comes late finds nothing. One for the process, never freed.
class HeldBack {
 public:
  using Function = std::function<void(const absl::Status&)>;

  static HeldBack& Get() {
    static HeldBack& held = *new HeldBack;
    return held;
  }
  uint64_t Add(const void* device, Function f) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_.emplace(++last_, Entry{device, std::move(f)});
    return last_;
  }
  // Null: it was taken.
  Function Take(uint64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = held_.find(number);
    if (at == held_.end()) return nullptr;
    Function f = std::move(at->second.f);
    held_.erase(at);
    return f;
  }
  // In the order of Add.
  std::vector<Function> TakeAll(const void* device) {
    std::vector<Function> taken;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = held_.begin(); at != held_.end();) {
      const bool of_device = at->second.device == device;
      if (of_device) taken.push_back(std::move(at->second.f));
      at = of_device ? held_.erase(at) : std::next(at);
    }
    return taken;
  }

 private:
  struct Entry {
    const void* device;
    Function f;
  };
  std::mutex mutex_;
  uint64_t last_ = 0;
  std::map<uint64_t, Entry> held_;
};

// Where the arrays of an answer lie in what TakeKernel copies whole.
struct SmallLayout {
  int64_t queries, state_output, state_lse, log_scales, counts, runs, slots, masks, codes, bytes;
};

class CudaLayers : public EngineLayers {
 public:
  CudaLayers(int device, uint64_t timeout_ns, ElementType output_type)
      : device_(device), timeout_ns_(timeout_ns), output_type_(output_type) {}

  absl::Status Start(const DecodeSession& session) {
    const ScopedDevice scoped(device_);
    CKV_ASSIGN_OR_RETURN(const Stream stream, Stream::Create(device_));
    CKV_RETURN_IF_ERROR(Measure(session));
    CKV_RETURN_IF_ERROR(Fill(session, stream.get()));
    return stream.Synchronize();  // what is filled is there for every other stream
  }

  // From pageable memory: it may be used again when a copy's call returns.
  absl::Status Fill(const DecodeSession& session, cudaStream_t stream) {
    CKV_ASSIGN_OR_RETURN(pinned_, PinnedBuffer::Create(pinned_bytes_));
    std::memset(pinned_.data(), 0, static_cast<size_t>(pinned_bytes_));
    // Records that a link brings are where attention reads them.
    slots_ = session.window() == nullptr ? nullptr : session.window()->slots();
    if (slots_ == nullptr) {
      CKV_ASSIGN_OR_RETURN(own_slots_, Zeroed(stream, layers_ * kv_heads_ * head_slots_bytes_));
      slots_ = own_slots_.data();
    }
    CKV_ASSIGN_OR_RETURN(rows_, Zeroed(stream, layers_ * kv_heads_ * head_rows_bytes_));
    CKV_ASSIGN_OR_RETURN(small_, Zeroed(stream, layout_.bytes));
    CKV_ASSIGN_OR_RETURN(state_, Zeroed(stream, kAlignment));
    CKV_ASSIGN_OR_RETURN(attended_, Zeroed(stream, Align(elements_ * 4) + query_heads_ * 4));
    CKV_ASSIGN_OR_RETURN(workspace_,
                         Zeroed(stream, kernels::AttentionCudaWorkspaceBytes(
                                            attention_, static_cast<int32_t>(kv_heads_))));
    CKV_RETURN_IF_ERROR(MakePairs(stream));
    return UploadSteadyZone(session, stream);
  }

  absl::Status Begin(int64_t) override {
    if (__atomic_load_n(&package()->gave_up, __ATOMIC_ACQUIRE) != 0) {
      return Error(v1::QUEUE_DEADLINE,
                   "step: an earlier one was not answered in time, and the GPU went on without it");
    }
    ++begun_;
    return absl::OkStatus();
  }

  absl::Status Publish(int64_t layer, const std::byte* queries, DecodeSession* session,
                       const absl::Status& recalled) override;

  absl::Status Attend(int64_t layer, void* output, EngineStream stream) override {
    const ScopedDevice scoped(device_);
    StreamTake take = take_;
    take.records.base = reinterpret_cast<unsigned char*>(SlotsOf(layer, 0));
    take.rows.base = reinterpret_cast<unsigned char*>(RowsOf(layer, 0));
    CKV_RETURN_IF_ERROR(CudaStatus(LaunchTake(take, begun_, timeout_ns_, Cuda(stream)), "step"));
    const auto* pairs = reinterpret_cast<const AttentionCudaPair*>(pairs_.data());
    CKV_RETURN_IF_ERROR(
        CudaStatus(kernels::LaunchSparseAttention(attention_, pairs + layer * kv_heads_,
                                                  static_cast<int32_t>(kv_heads_),
                                                  workspace_.data(), Cuda(stream)),
                   "step: attention"));
    return CudaStatus(LaunchGive(give_, output, Cuda(stream)), "step: output");
  }

  int64_t held_bytes() const override {
    return layers_ * kv_heads_ * head_slots_bytes_ + rows_.bytes();
  }

 private:
  absl::Status Measure(const DecodeSession& session);
  absl::Status MakePairs(cudaStream_t stream);
  absl::Status UploadSteadyZone(const DecodeSession& session, cudaStream_t stream);
  void WriteSmall(int64_t layer, const std::byte* queries, const DecodeSession::Recalled& recalled);
  absl::Status WriteMoves(int64_t layer, const DecodeSession::Recalled& recalled);

  absl::StatusOr<DeviceBuffer> Zeroed(cudaStream_t stream, int64_t bytes) {
    CKV_ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Create(device_, bytes));
    if (bytes == 0) return buffer;
    CKV_RETURN_IF_ERROR(CudaStatus(
        cudaMemsetAsync(buffer.data(), 0, static_cast<size_t>(bytes), stream), "engine"));
    return buffer;
  }
  StreamPackage* package() { return reinterpret_cast<StreamPackage*>(pinned_.data()); }
  template <typename T>
  T* Small(int64_t offset) {
    return reinterpret_cast<T*>(pinned_.data() + small_at_ + offset);
  }
  template <typename T>
  T* SmallOnDevice(int64_t offset) {
    return reinterpret_cast<T*>(small_.data() + offset);
  }
  std::byte* SlotsOf(int64_t layer, int64_t head) {
    return slots_ + (layer * kv_heads_ + head) * head_slots_bytes_;
  }
  std::byte* RowsOf(int64_t layer, int64_t head) {
    return rows_.data() + (layer * kv_heads_ + head) * head_rows_bytes_;
  }
  // Of a token of the window, in its head's rows.
  int64_t RingRow(int64_t position) const { return sinks_ + position % ring_; }

  const int device_;
  const uint64_t timeout_ns_;
  const ElementType output_type_;
  ElementType type_ = ElementType::kBFloat16;
  int64_t layers_ = 0, kv_heads_ = 0, query_heads_ = 0, head_dim_ = 0, elements_ = 0;
  int64_t row_bytes_ = 0, pair_bytes_ = 0, record_bytes_ = 0, slot_count_ = 0, max_exact_ = 0;
  int64_t sinks_ = 0, ring_ = 0;  // rows of a head: the sinks, then a ring of the window's
  int64_t head_slots_bytes_ = 0, head_rows_bytes_ = 0;
  kernels::AttentionCudaParams attention_;
  SmallLayout layout_ = {};
  int64_t small_at_ = 0, records_at_ = 0, record_to_at_ = 0, new_rows_at_ = 0, row_to_at_ = 0,
          pinned_bytes_ = 0;
  PinnedBuffer pinned_;
  std::byte* slots_ = nullptr;  // laid out as a record window's
  DeviceBuffer own_slots_, rows_, small_, state_, attended_, workspace_, pairs_;
  StreamTake take_;
  StreamGive give_;
  uint64_t begun_ = 0;                 // the caller's
  uint64_t published_ = 0;             // the lane's
  std::vector<int64_t> uploaded_end_;  // [layers]: tokens before it are in the ring or clustered
};

absl::Status CudaLayers::Measure(const DecodeSession& session) {
  const v1::Sequence& sequence = session.sequence();
  const v1::KvShape& shape = sequence.shape();
  layers_ = shape.layers();
  kv_heads_ = shape.kv_heads();
  query_heads_ = shape.query_heads();
  head_dim_ = shape.head_dim();
  elements_ = query_heads_ * head_dim_;
  if (shape.element_type() != v1::ELEMENT_TYPE_UNSPECIFIED) {
    type_ = static_cast<ElementType>(shape.element_type());
  }
  row_bytes_ = head_dim_ * kernels::ElementBytes(type_);
  pair_bytes_ = 2 * row_bytes_;
  record_bytes_ = sequence.record_bytes();
  if (record_bytes_ % 8 != 0) {
    return Error(v1::UNSUPPORTED,
                 absl::StrCat("records: expected a multiple of 8 bytes, got ", record_bytes_));
  }
  slot_count_ = session.recalled(0).cache->slot_count();
  max_exact_ = session.max_exact_tokens();
  sinks_ = session.recalled(0).steady->sinks();
  int64_t held = 0;
  for (int64_t l = 0; l < layers_; ++l) {
    const SteadyRows& steady = *session.recalled(l).steady;
    held = std::max(held, steady.tokens() - steady.window_begin());
  }
  ring_ = held + 2 * static_cast<int64_t>(sequence.index().window_tokens()) + kSpareRows;
  head_slots_bytes_ = HeadSlotsBytes(slot_count_, record_bytes_);
  head_rows_bytes_ = Align((sinks_ + ring_) * pair_bytes_);
  attention_.group = static_cast<int32_t>(query_heads_ / kv_heads_);
  attention_.head_dim = static_cast<int32_t>(head_dim_);
  attention_.element_type = type_;
  attention_.format =
      sequence.codec() == "k8v4" ? kernels::RecordFormat::kK8V4 : kernels::RecordFormat::kRaw;
  attention_.scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
  attention_.max_tokens = sinks_ + ring_ + max_exact_;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) { return std::exchange(at, at + (bytes + 15) / 16 * 16); };
  layout_.queries = take(elements_ * 4);
  layout_.state_output = take(elements_ * 4);
  layout_.state_lse = take(query_heads_ * 4);
  layout_.log_scales = take(query_heads_ * 4);
  layout_.counts = take(kv_heads_ * 4);
  layout_.runs = take(kv_heads_ * kRuns * static_cast<int64_t>(sizeof(DeviceRawRun)));
  layout_.slots = take(kv_heads_ * max_exact_ * 4);
  layout_.masks = take(kv_heads_ * max_exact_ * 4);
  layout_.codes = take(elements_);
  layout_.bytes = at;
  small_at_ = Align(sizeof(StreamPackage));
  record_to_at_ = small_at_ + Align(layout_.bytes);
  records_at_ = record_to_at_ + Align(kv_heads_ * max_exact_ * 8);
  row_to_at_ = records_at_ + Align(kv_heads_ * max_exact_ * record_bytes_);
  new_rows_at_ = row_to_at_ + Align(kv_heads_ * kStepRows * 8);
  pinned_bytes_ = new_rows_at_ + kv_heads_ * kStepRows * pair_bytes_;
  return absl::OkStatus();
}

absl::Status CudaLayers::MakePairs(cudaStream_t stream) {
  auto* const pinned = reinterpret_cast<unsigned char*>(pinned_.data());
  take_.package = package();
  take_.state = reinterpret_cast<uint32_t*>(state_.data());
  take_.small = pinned + small_at_;
  take_.small_copy = reinterpret_cast<unsigned char*>(small_.data());
  take_.small_bytes = layout_.bytes;
  take_.records = {reinterpret_cast<const int64_t*>(pinned + record_to_at_), pinned + records_at_,
                   nullptr, static_cast<int32_t>(record_bytes_)};
  take_.rows = {reinterpret_cast<const int64_t*>(pinned + row_to_at_), pinned + new_rows_at_,
                nullptr, static_cast<int32_t>(pair_bytes_)};
  const auto* const lse = reinterpret_cast<float*>(attended_.data() + Align(elements_ * 4));
  give_.state = take_.state;
  give_.attended = reinterpret_cast<const float*>(attended_.data());
  give_.lse = lse;
  give_.heads = static_cast<int32_t>(query_heads_);
  give_.head_dim = static_cast<int32_t>(head_dim_);
  give_.output_type = output_type_;
  give_.codes = SmallOnDevice<int8_t>(layout_.codes);
  give_.log_scales = SmallOnDevice<float>(layout_.log_scales);
  std::vector<AttentionCudaPair> pairs;
  const int64_t group = query_heads_ / kv_heads_;
  for (int64_t i = 0; i < layers_ * kv_heads_; ++i) {
    const int64_t h = i % kv_heads_, first = h * group;
    AttentionCudaPair& pair = pairs.emplace_back();
    pair.queries = SmallOnDevice<float>(layout_.queries) + first * head_dim_;
    pair.raw = SmallOnDevice<DeviceRawRun>(layout_.runs) + h * kRuns;
    pair.raw_runs = kRuns;
    pair.record_tokens = static_cast<int32_t>(max_exact_);
    pair.record_count = SmallOnDevice<int32_t>(layout_.counts) + h;
    pair.slot_base = reinterpret_cast<const unsigned char*>(SlotsOf(i / kv_heads_, h));
    pair.slots = SmallOnDevice<int32_t>(layout_.slots) + h * max_exact_;
    pair.head_masks = SmallOnDevice<uint32_t>(layout_.masks) + h * max_exact_;
    pair.state_output = SmallOnDevice<float>(layout_.state_output) + first * head_dim_;
    pair.state_lse = SmallOnDevice<float>(layout_.state_lse) + first;
    pair.output = reinterpret_cast<float*>(attended_.data()) + first * head_dim_;
    pair.lse = const_cast<float*>(lse) + first;
  }
  const auto bytes = static_cast<int64_t>(pairs.size() * sizeof(AttentionCudaPair));
  CKV_ASSIGN_OR_RETURN(pairs_, DeviceBuffer::Create(device_, bytes));
  return CudaStatus(cudaMemcpyAsync(pairs_.data(), pairs.data(), static_cast<size_t>(bytes),
                                    cudaMemcpyHostToDevice, stream),
                    "engine");
}

absl::Status CudaLayers::UploadSteadyZone(const DecodeSession& session, cudaStream_t stream) {
  std::vector<std::byte> rows(static_cast<size_t>(head_rows_bytes_));
  for (int64_t l = 0; l < layers_; ++l) {
    const SteadyRows& steady = *session.recalled(l).steady;
    for (int64_t h = 0; h < kv_heads_; ++h) {
      int64_t position = 0;
      for (const kernels::RawRun& run : steady.Runs(h)) {
        if (position == sinks_) position = steady.window_begin();
        for (int64_t i = 0; i < run.tokens; ++i, ++position) {
          const int64_t row = position < sinks_ ? position : RingRow(position);
          std::memcpy(rows.data() + row * pair_bytes_, run.keys + i * run.key_stride_bytes,
                      static_cast<size_t>(pair_bytes_));
        }
      }
      CKV_RETURN_IF_ERROR(CudaStatus(
          cudaMemcpyAsync(RowsOf(l, h), rows.data(), rows.size(), cudaMemcpyHostToDevice, stream),
          "engine"));
    }
    uploaded_end_.push_back(steady.tokens());
  }
  return absl::OkStatus();
}

void CudaLayers::WriteSmall(int64_t layer, const std::byte* queries,
                            const DecodeSession::Recalled& recalled) {
  kernels::ToFloat(queries, type_, elements_, Small<float>(layout_.queries));
  float* const lse = Small<float>(layout_.state_lse);
  float* const log_scales = Small<float>(layout_.log_scales);
  std::fill_n(lse, query_heads_, -std::numeric_limits<float>::infinity());
  std::fill_n(log_scales, query_heads_, -std::numeric_limits<float>::infinity());
  std::copy(recalled.state_lse.begin(), recalled.state_lse.end(), lse);
  std::copy(recalled.state_output.begin(), recalled.state_output.end(),
            Small<float>(layout_.state_output));
  std::copy(recalled.correction_log_scales.begin(), recalled.correction_log_scales.end(),
            log_scales);
  std::copy(recalled.correction_codes.begin(), recalled.correction_codes.end(),
            Small<int8_t>(layout_.codes));
  const SteadyRows& steady = *recalled.steady;
  const int64_t first = steady.window_begin() % ring_;
  const int64_t tokens = steady.tokens() - steady.window_begin();
  const int64_t to_end = std::min(tokens, ring_ - first);
  for (int64_t h = 0; h < kv_heads_; ++h) {
    const auto run = [&](int64_t row, int64_t count) {
      const auto* at = reinterpret_cast<const unsigned char*>(RowsOf(layer, h)) + row * pair_bytes_;
      return DeviceRawRun{at, at + row_bytes_, pair_bytes_, pair_bytes_, count};
    };
    DeviceRawRun* const runs = Small<DeviceRawRun>(layout_.runs) + h * kRuns;
    runs[0] = run(0, sinks_);
    runs[1] = run(sinks_ + first, to_end);
    runs[2] = run(sinks_, tokens - to_end);
    const kernels::RecordRun records = recalled.cache->Run(h);
    const auto count = static_cast<int64_t>(records.slots.size());
    Small<int32_t>(layout_.counts)[h] = static_cast<int32_t>(count);
    std::copy(records.slots.begin(), records.slots.end(),
              Small<int32_t>(layout_.slots) + h * max_exact_);
    uint32_t* const masks = Small<uint32_t>(layout_.masks) + h * max_exact_;
    std::fill_n(masks, count, ~uint32_t{0});
    std::copy(records.head_masks.begin(), records.head_masks.end(), masks);
  }
}

// What the layer's slots and ring lack.
absl::Status CudaLayers::WriteMoves(int64_t layer, const DecodeSession::Recalled& recalled) {
  int32_t records = 0;
  auto* const record_to = reinterpret_cast<int64_t*>(pinned_.data() + record_to_at_);
  recalled.cache->ForEachReceivedSlot([&](size_t head, int64_t slot, const std::byte* record) {
    record_to[records] = static_cast<int64_t>(head) * head_slots_bytes_ + slot * record_bytes_;
    std::memcpy(pinned_.data() + records_at_ + records * record_bytes_, record,
                static_cast<size_t>(record_bytes_));
    ++records;
  });
  package()->records = records;
  package()->rows = 0;
  const SteadyRows& steady = *recalled.steady;
  const int64_t begin = std::max(uploaded_end_[layer], steady.window_begin());
  const int64_t held = steady.tokens() - steady.window_begin();
  if (held > ring_) {
    return Error(v1::LIMIT_EXCEEDED,
                 absl::StrCat("window: expected up to ", ring_, " tokens, got ", held));
  }
  const int64_t end = std::min(steady.tokens(), begin + kStepRows);
  int32_t rows = 0;
  auto* const row_to = reinterpret_cast<int64_t*>(pinned_.data() + row_to_at_);
  for (int64_t h = 0; h < kv_heads_; ++h) {
    if (begin == end) break;
    const kernels::RawRun window = steady.Runs(h).back();
    for (int64_t position = begin; position < end; ++position, ++rows) {
      row_to[rows] = h * head_rows_bytes_ + RingRow(position) * pair_bytes_;
      const std::byte* row =
          window.keys + (position - steady.window_begin()) * window.key_stride_bytes;
      std::memcpy(pinned_.data() + new_rows_at_ + rows * pair_bytes_, row,
                  static_cast<size_t>(pair_bytes_));
    }
  }
  package()->rows = rows;
  uploaded_end_[layer] = end;
  if (end == steady.tokens()) return absl::OkStatus();
  return Error(v1::LIMIT_EXCEEDED,
               absl::StrCat("append: expected up to ", kStepRows, " tokens between two steps, got ",
                            steady.tokens() - begin));
}

absl::Status CudaLayers::Publish(int64_t layer, const std::byte* queries, DecodeSession* session,
                                 const absl::Status& recalled) {
  package()->records = package()->rows = 0;
  absl::Status status = recalled;
  if (status.ok()) {
    const DecodeSession::Recalled answer = session->recalled(layer);
    WriteSmall(layer, queries, answer);
    status = WriteMoves(layer, answer);
  }
  package()->failed = status.ok() ? 0 : 1;
  __atomic_store_n(&package()->published, ++published_, __ATOMIC_RELEASE);
  return status;
}

class CudaDevice : public EngineDevice {
 public:
  CudaDevice(int device, uint64_t timeout_ns, Stream probe)
      : device_(device), timeout_ns_(timeout_ns), probe_(std::move(probe)) {}

  bool synchronous() const override { return false; }

  absl::StatusOr<std::shared_ptr<std::byte>> Staging(int64_t bytes) override {
    const ScopedDevice scoped(device_);
    return pool_.Take(bytes);
  }

  absl::Status Gather(const EngineRows& rows, std::byte* to, EngineStream stream) override {
    const ScopedDevice scoped(device_);
    const auto* from = static_cast<const std::byte*>(rows.data);
    const int64_t token_bytes = rows.heads * rows.row_bytes;
    const bool whole_tokens = rows.heads == 1 || rows.head_stride_bytes == rows.row_bytes;
    if (whole_tokens && (rows.tokens == 1 || rows.token_stride_bytes == token_bytes)) {
      return CudaStatus(cudaMemcpyAsync(to, from, static_cast<size_t>(rows.tokens * token_bytes),
                                        cudaMemcpyDefault, Cuda(stream)),
                        "rows");
    }
    const int64_t width = whole_tokens ? token_bytes : rows.row_bytes;
    for (int64_t h = 0; h < (whole_tokens ? 1 : rows.heads); ++h) {
      CKV_RETURN_IF_ERROR(CudaStatus(
          cudaMemcpy2DAsync(to + h * rows.row_bytes, static_cast<size_t>(token_bytes),
                            from + h * rows.head_stride_bytes,
                            static_cast<size_t>(std::max(rows.token_stride_bytes, width)),
                            static_cast<size_t>(width), static_cast<size_t>(rows.tokens),
                            cudaMemcpyDefault, Cuda(stream)),
          "rows"));
    }
    return absl::OkStatus();
  }

  absl::Status Then(EngineStream stream, HeldBack::Function f) override {
    const ScopedDevice scoped(device_);
    const uint64_t number = HeldBack::Get().Add(this, std::move(f));
    const auto run = [](void* data) {
      const HeldBack::Function given = HeldBack::Get().Take(reinterpret_cast<uintptr_t>(data));
      if (given) given(absl::OkStatus());
    };
    const cudaError_t error =
        cudaLaunchHostFunc(Cuda(stream), run, reinterpret_cast<void*>(uintptr_t{number}));
    if (error != cudaSuccess) HeldBack::Get().Take(number);
    return CudaStatus(error, "stream");
  }

  absl::Status Check() override {
    const ScopedDevice scoped(device_);
    const cudaError_t state = cudaStreamQuery(probe_.get());
    if (state == cudaSuccess || state == cudaErrorNotReady) return absl::OkStatus();
    const absl::Status failure = Error(
        v1::INTERNAL_ERROR, absl::StrCat("device cuda:", device_, ": ", cudaGetErrorString(state)));
    for (const HeldBack::Function& f : HeldBack::Get().TakeAll(this)) f(failure);
    return failure;
  }

  absl::StatusOr<std::unique_ptr<IngestRing>> MakeIngestRing(int slots,
                                                             int64_t slot_bytes) override {
    return MakeCudaIngestRing(device_, slots, slot_bytes);
  }
  RecordWindowMaker window_maker() const override {
    return [device = device_](const RecordWindow::Layout& layout) {
      return MakeCudaWindow(device, layout);
    };
  }

  absl::StatusOr<std::unique_ptr<EngineLayers>> MakeLayers(const DecodeSession& session,
                                                           v1::ElementType output_type) override {
    auto layers =
        std::make_unique<CudaLayers>(device_, timeout_ns_, static_cast<ElementType>(output_type));
    CKV_RETURN_IF_ERROR(layers->Start(session));
    return layers;
  }

  absl::StatusOr<std::unique_ptr<EngineGroup>> MakeGroup(absl::Span<DecodeSession* const> sessions,
                                                         v1::ElementType output_type) override {
    return MakeResidentGroup(device_, timeout_ns_, sessions, static_cast<ElementType>(output_type));
  }

 private:
  const int device_;
  const uint64_t timeout_ns_;
  const Stream probe_;  // has nothing to do: what it says is the device's own state
  PinnedPool pool_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<EngineDevice>> MakeCudaEngineDevice(int ordinal,
                                                                   absl::Duration step_timeout) {
  if (step_timeout <= absl::ZeroDuration()) {
    return Error(v1::INVALID_FIELD, absl::StrCat("step_timeout: expected more than 0, got ",
                                                 absl::FormatDuration(step_timeout)));
  }
  const int count = kernels::DeviceCount();
  if (ordinal < 0 || ordinal >= count) {
    return absl::UnavailableError(
        absl::StrCat("device cuda:", ordinal, ": this process sees ", count, " GPUs"));
  }
  CKV_ASSIGN_OR_RETURN(Stream probe, Stream::Create(ordinal));
  return std::make_unique<CudaDevice>(
      ordinal, static_cast<uint64_t>(absl::ToInt64Nanoseconds(step_timeout)), std::move(probe));
}

}  // namespace clusterkv::worker
