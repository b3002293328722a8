#include "worker/engine_resident.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/comm/peer_window.h"
#include "kernels/resident/resident_cuda.h"
#include "kernels/runtime/device.h"
#include "proto/error.h"
#include "worker/append_cuda.h"
#include "worker/resident_link.h"

namespace clusterkv::worker {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::ElementType;
using kernels::PeerWindow;
using kernels::PinnedBuffer;
using kernels::ResidentShape;
using kernels::ScopedDevice;
using kernels::StepPair;
using kernels::Stream;

// Tokens that a window has room for after every Settle, at least.
constexpr int64_t kSettleTokens = 256;
constexpr int64_t kMaxSlots = 512, kSlotStep = 32, kMaxExact = 128;

cudaStream_t Cuda(EngineStream stream) { return static_cast<cudaStream_t>(stream); }

class ResidentGroup : public EngineGroup {
 public:
  ResidentGroup(int device, absl::Span<DecodeSession* const> sessions)
      : device_(device), sessions_(sessions.begin(), sessions.end()) {}
  // Nothing of the service's is mapped when it frees that, and it writes no more when the window
  // goes.
  ~ResidentGroup() override {
    requests_.reset();
    link_.reset();
  }

  absl::Status Start(uint64_t timeout_ns, ElementType output_type) {
    const ScopedDevice scoped(device_);
    CKV_RETURN_IF_ERROR(Measure(output_type));
    CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(device_));
    own_stream_.emplace(std::move(stream));
    for (DecodeSession* session : sessions_) CKV_RETURN_IF_ERROR(session->Flush());
    CKV_RETURN_IF_ERROR(Allocate());
    CKV_RETURN_IF_ERROR(Connect());
    CKV_RETURN_IF_ERROR(MakePairs(timeout_ns));
    CKV_RETURN_IF_ERROR(UploadSteadyZones());
    return own_stream_->Synchronize();
  }

  absl::Status Append(int64_t layer, absl::Span<const EngineRows> keys,
                      absl::Span<const EngineRows> values, EngineStream stream) override;

  absl::Status Step(int64_t layer, const void* queries, void* output,
                    EngineStream stream) override {
    const ScopedDevice scoped(device_);
    CKV_RETURN_IF_ERROR(Failure());
    if (layer != next_layer_) {
      return Error(v1::INVALID_FIELD, absl::StrCat("layer: of a group's steps: expected ",
                                                   next_layer_, ", got ", layer));
    }
    CKV_RETURN_IF_ERROR(
        CudaStatus(kernels::LaunchStep(step_, static_cast<int32_t>(layer), kernels::kStepWhole,
                                       queries, output, /*lse=*/nullptr, Cuda(stream)),
                   "step"));
    next_layer_ = (layer + 1) % shape_.layers;
    if (next_layer_ != 0) return absl::OkStatus();
    return CudaStatus(kernels::LaunchEndStep(shape_, Rounds(), Cuda(stream)), "step");
  }

  absl::Status Failure() const override {
    const uint32_t status = __atomic_load_n(Status(), __ATOMIC_ACQUIRE);
    if (status == 0) return absl::OkStatus();
    if (status & kWindowFull) {
      return Error(v1::LIMIT_EXCEEDED, absl::StrCat("window: expected a Settle at least every ",
                                                    kSettleTokens, " tokens"));
    }
    return Error(v1::QUEUE_DEADLINE, "step: the service's GPU did not answer in time");
  }

  absl::Status Settle(EngineStream stream) override {
    const ScopedDevice scoped(device_);
    CKV_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(Cuda(stream)), "settle"));
    CKV_RETURN_IF_ERROR(FetchCounts());
    CKV_RETURN_IF_ERROR(HandOver());
    for (DecodeSession* session : sessions_) CKV_RETURN_IF_ERROR(session->Flush());
    CKV_RETURN_IF_ERROR(Failure());
    const absl::Time deadline = absl::Now() + kClusterTimeout;
    while (true) {
      CKV_RETURN_IF_ERROR(link_->Renew(host_counts_.back()));
      CKV_RETURN_IF_ERROR(MoveWindows());
      if (HasRoom()) return absl::OkStatus();
      if (absl::Now() > deadline) break;
      absl::SleepFor(absl::Milliseconds(1));  // a window is being clustered
    }
    return Error(v1::LIMIT_EXCEEDED,
                 absl::StrCat("window: expected up to ", capacity_ - kSettleTokens,
                              " tokens that are not clustered"));
  }

 private:
  // How long Settle waits for the service to cluster what the windows have no room for.
  static constexpr absl::Duration kClusterTimeout = absl::Seconds(10);

  absl::Status Measure(ElementType output_type);
  absl::Status Allocate();
  absl::Status Connect();
  absl::Status MakePairs(uint64_t timeout_ns);
  absl::Status UploadSteadyZones();
  absl::Status FetchCounts();
  absl::Status HandOver();
  absl::Status MoveWindows();

  bool HasRoom() const {
    return *std::max_element(host_counts_.begin(), host_counts_.end() - 1) <=
           capacity_ - kSettleTokens;
  }
  int64_t sequences() const { return static_cast<int64_t>(sessions_.size()); }
  uint32_t* Status() const { return reinterpret_cast<uint32_t*>(status_.data()); }
  int64_t* Counts() const { return reinterpret_cast<int64_t*>(counts_.data()); }
  uint64_t* Rounds() const {
    return reinterpret_cast<uint64_t*>(Counts() + shape_.layers * sequences());
  }
  // Row `row` of a sequence: its sinks first, from first_row_ on its window.
  std::byte* Row(int64_t layer, int64_t sequence, int64_t row) const {
    return rows_.data() + (layer * sequences() + sequence) * sequence_bytes_ + row * token_bytes_;
  }
  absl::Status Copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) const {
    return CudaStatus(
        cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, own_stream_->get()), "group");
  }

  const int device_;
  const std::vector<DecodeSession*> sessions_;
  ResidentShape shape_;
  int64_t kv_heads_ = 0, row_bytes_ = 0, token_bytes_ = 0, sequence_bytes_ = 0;
  int64_t first_row_ = 0, capacity_ = 0;  // the window's, in a sequence's rows
  std::optional<Stream> own_stream_;      // for what is done between steps
  DeviceBuffer window_, rows_, counts_, pairs_, scratch_;
  PinnedBuffer status_;
  std::optional<PeerWindow> requests_;  // the service's
  std::unique_ptr<ResidentLink> link_;
  kernels::StepParams step_;
  int64_t next_layer_ = 0;
  std::vector<int64_t> host_counts_;  // [layers, sequences] in the windows; then the rounds
  std::vector<int64_t> begins_;       // [layers, sequences]: where the windows begin
};

absl::Status ResidentGroup::Measure(ElementType output_type) {
  const v1::Sequence& first = sessions_.front()->sequence();
  const v1::KvShape& shape = first.shape();
  int64_t window = 0, exact = 0, slots = 0;
  for (const DecodeSession* session : sessions_) {
    const v1::Sequence& sequence = session->sequence();
    if (sequence.shape().SerializeAsString() != shape.SerializeAsString()) {
      return absl::UnavailableError("resident: expected sequences of one shape");
    }
    window = std::max<int64_t>(window, sequence.index().window_tokens());
    exact = std::max<int64_t>(exact, sequence.select().budget_tokens());
    slots = std::max(slots, session->recalled(0).cache->slot_count());
    first_row_ = std::max(first_row_, session->recalled(0).steady->sinks());
    for (uint32_t l = 0; l < shape.layers(); ++l) {
      const SteadyRows& steady = *session->recalled(l).steady;
      capacity_ = std::max(capacity_, steady.tokens() - steady.window_begin());
    }
  }
  // What is filling, what is being clustered, and what comes until the next Settle.
  capacity_ += 2 * window + kSettleTokens;
  const auto type = static_cast<ElementType>(shape.element_type());
  if (type != output_type) {
    return absl::UnavailableError("resident: output_type: expected the sequences' element type");
  }
  if (exact > kMaxExact || sequences() > kMaxAppended) {
    return absl::UnavailableError(absl::StrCat("resident: expected a budget of up to ", kMaxExact,
                                               " and up to ", kMaxAppended, " sequences, got ",
                                               exact, " and ", sequences()));
  }
  kv_heads_ = shape.kv_heads();
  shape_.layers = static_cast<int32_t>(shape.layers());
  shape_.pairs = static_cast<int32_t>(sequences() * kv_heads_);
  shape_.group = static_cast<int32_t>(shape.query_heads() / shape.kv_heads());
  shape_.head_dim = static_cast<int32_t>(shape.head_dim());
  shape_.query_type = shape_.element_type = type;
  shape_.max_exact = static_cast<int32_t>(exact);
  slots = std::clamp(slots, exact, kMaxSlots);
  shape_.slots = static_cast<int32_t>((slots + kSlotStep - 1) / kSlotStep * kSlotStep);
  row_bytes_ = shape_.head_dim * kernels::ElementBytes(type);
  token_bytes_ = kv_heads_ * 2 * row_bytes_;
  sequence_bytes_ = (first_row_ + capacity_) * token_bytes_;
  return absl::OkStatus();
}

absl::Status ResidentGroup::Allocate() {
  const int64_t caches = shape_.layers * sequences();
  const int64_t window_bytes = kernels::ReplyWindowBytes(shape_) + kernels::HotCacheBytes(shape_);
  CKV_ASSIGN_OR_RETURN(
      window_,
      DeviceBuffer::Create(device_, (window_bytes + kernels::kExportedBytes - 1) /
                                        kernels::kExportedBytes * kernels::kExportedBytes));
  CKV_ASSIGN_OR_RETURN(rows_, DeviceBuffer::Create(device_, caches * sequence_bytes_));
  CKV_ASSIGN_OR_RETURN(counts_, DeviceBuffer::Create(device_, (caches + 1) * 8));
  CKV_ASSIGN_OR_RETURN(scratch_, DeviceBuffer::Create(device_, sequence_bytes_));
  CKV_ASSIGN_OR_RETURN(status_, PinnedBuffer::Create(sizeof(uint32_t)));
  *Status() = 0;
  for (const DeviceBuffer* zeroed : {&window_, &rows_, &counts_}) {
    CKV_RETURN_IF_ERROR(
        CudaStatus(cudaMemsetAsync(zeroed->data(), 0, static_cast<size_t>(zeroed->bytes()),
                                   own_stream_->get()),
                   "group"));
  }
  return own_stream_->Synchronize();  // before the service writes
}

absl::Status ResidentGroup::Connect() {
  ResidentLink::Offer offer;
  CKV_ASSIGN_OR_RETURN(*offer.window.mutable_handle(), kernels::ExportWindow(window_));
  offer.window.set_bytes(static_cast<uint64_t>(window_.bytes()));
  offer.slots = static_cast<uint32_t>(shape_.slots);
  offer.max_exact_tokens = static_cast<uint32_t>(shape_.max_exact);
  CKV_ASSIGN_OR_RETURN(link_, ResidentLink::Connect(sessions_, offer));
  CKV_ASSIGN_OR_RETURN(PeerWindow requests, PeerWindow::Open(device_, link_->requests().handle(),
                                                             kernels::RequestWindowBytes(shape_)));
  requests_.emplace(std::move(requests));
  begins_.assign(link_->window_begin().begin(), link_->window_begin().end());
  return absl::OkStatus();
}

absl::Status ResidentGroup::MakePairs(uint64_t timeout_ns) {
  std::vector<StepPair> pairs;
  for (int64_t l = 0; l < shape_.layers; ++l) {
    for (int64_t s = 0; s < sequences(); ++s) {
      for (int64_t h = 0; h < kv_heads_; ++h) {
        const auto run = [&](int64_t row, int64_t tokens) {
          const auto* at =
              reinterpret_cast<const unsigned char*>(Row(l, s, row)) + h * 2 * row_bytes_;
          return kernels::DeviceRawRun{at, at + row_bytes_, token_bytes_, token_bytes_, tokens};
        };
        pairs.push_back({run(0, sessions_[s]->recalled(l).steady->sinks()),
                         run(first_row_, capacity_), Counts() + l * sequences() + s});
      }
    }
  }
  const auto bytes = static_cast<int64_t>(pairs.size() * sizeof(StepPair));
  CKV_ASSIGN_OR_RETURN(pairs_, DeviceBuffer::Create(device_, bytes));
  CKV_RETURN_IF_ERROR(Copy(pairs_.data(), pairs.data(), bytes, cudaMemcpyHostToDevice));
  step_.shape = shape_;
  step_.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  step_.pairs = reinterpret_cast<const StepPair*>(pairs_.data());
  step_.requests = requests_->data();
  step_.replies = window_.data();
  step_.hot_cache = window_.data() + kernels::ReplyWindowBytes(shape_);
  step_.rounds = Rounds();
  step_.status = Status();
  step_.timeout_ns = timeout_ns;
  step_.lost = 0;
  return own_stream_->Synchronize();
}

// Sinks, and the windows from where the service's part ends.
absl::Status ResidentGroup::UploadSteadyZones() {
  std::vector<std::byte> rows(static_cast<size_t>(sequence_bytes_));
  host_counts_.assign(begins_.size() + 1, 0);
  for (int64_t l = 0; l < shape_.layers; ++l) {
    for (int64_t s = 0; s < sequences(); ++s) {
      const int64_t cache = l * sequences() + s;
      CKV_RETURN_IF_ERROR(sessions_[s]->MoveWindow(l, begins_[cache]));
      const SteadyRows& steady = *sessions_[s]->recalled(l).steady;
      for (int64_t h = 0; h < kv_heads_; ++h) {
        int64_t row = steady.sinks() == 0 ? first_row_ : 0;
        for (const kernels::RawRun& run : steady.Runs(h)) {
          for (int64_t i = 0; i < run.tokens; ++i, ++row) {
            std::memcpy(rows.data() + row * token_bytes_ + h * 2 * row_bytes_,
                        run.keys + i * run.key_stride_bytes, static_cast<size_t>(2 * row_bytes_));
          }
          row = first_row_;  // the sinks come first
        }
      }
      CKV_RETURN_IF_ERROR(Copy(Row(l, s, 0), rows.data(), sequence_bytes_, cudaMemcpyHostToDevice));
      CKV_RETURN_IF_ERROR(own_stream_->Synchronize());  // rows are written again
      host_counts_[cache] = steady.tokens() - begins_[cache];
    }
  }
  return Copy(Counts(), host_counts_.data(), static_cast<int64_t>(host_counts_.size()) * 8,
              cudaMemcpyHostToDevice);
}

absl::Status ResidentGroup::Append(int64_t layer, absl::Span<const EngineRows> keys,
                                   absl::Span<const EngineRows> values, EngineStream stream) {
  const ScopedDevice scoped(device_);
  CKV_RETURN_IF_ERROR(Failure());
  AppendCudaParams params;
  for (size_t s = 0; s < sessions_.size(); ++s) {
    const auto address = reinterpret_cast<uintptr_t>(keys[s].data) |
                         reinterpret_cast<uintptr_t>(values[s].data) |
                         static_cast<uintptr_t>(keys[s].head_stride_bytes);
    if (address % 16 != 0) {
      return Error(v1::INVALID_FIELD, "keys, values: of a group: expected multiples of 16 bytes");
    }
    params.tokens[s] = {static_cast<const unsigned char*>(keys[s].data),
                        static_cast<const unsigned char*>(values[s].data),
                        keys[s].head_stride_bytes};
  }
  params.rows = reinterpret_cast<unsigned char*>(Row(layer, 0, 0));
  params.sequence_bytes = sequence_bytes_;
  params.first_row = first_row_;
  params.capacity = capacity_;
  params.counts = Counts() + layer * sequences();
  params.status = Status();
  params.sequences = static_cast<int32_t>(sequences());
  params.kv_heads = static_cast<int32_t>(kv_heads_);
  params.row_bytes = static_cast<int32_t>(row_bytes_);
  return CudaStatus(LaunchAppend(params, Cuda(stream)), "append");
}

absl::Status ResidentGroup::FetchCounts() {
  CKV_RETURN_IF_ERROR(Copy(host_counts_.data(), Counts(),
                           static_cast<int64_t>(host_counts_.size()) * 8, cudaMemcpyDeviceToHost));
  return own_stream_->Synchronize();
}

// Tells the sessions of the tokens that they do not know yet, all layers of each in turn.
absl::Status ResidentGroup::HandOver() {
  const auto row = static_cast<size_t>(row_bytes_);
  std::vector<std::byte> key(kv_heads_ * row), value(kv_heads_ * row);
  for (int64_t s = 0; s < sequences(); ++s) {
    std::vector<std::vector<std::byte>> fresh(shape_.layers);
    int64_t most = 0;
    for (int64_t l = 0; l < shape_.layers; ++l) {
      const int64_t cache = l * sequences() + s;
      const int64_t known = sessions_[s]->recalled(l).steady->tokens() - begins_[cache];
      const int64_t tokens = host_counts_[cache] - known;
      most = std::max(most, tokens);
      fresh[l].resize(static_cast<size_t>(tokens * token_bytes_));
      if (tokens == 0) continue;
      CKV_RETURN_IF_ERROR(Copy(fresh[l].data(), Row(l, s, first_row_ + known),
                               tokens * token_bytes_, cudaMemcpyDeviceToHost));
    }
    CKV_RETURN_IF_ERROR(own_stream_->Synchronize());
    for (int64_t t = 0; t < most; ++t) {
      for (int64_t l = 0; l < shape_.layers; ++l) {
        const size_t at = static_cast<size_t>(t * token_bytes_);
        if (at >= fresh[l].size()) continue;
        for (size_t h = 0; h < static_cast<size_t>(kv_heads_); ++h) {
          const std::byte* const from = fresh[l].data() + at + h * 2 * row;
          std::memcpy(key.data() + h * row, from, row);
          std::memcpy(value.data() + h * row, from + row, row);
        }
        CKV_RETURN_IF_ERROR(sessions_[s]->Append(l, key, value));
      }
    }
  }
  return absl::OkStatus();
}

// Drops from the windows what is the service's by now. No step is under way.
absl::Status ResidentGroup::MoveWindows() {
  bool moved_any = false;
  for (int64_t l = 0; l < shape_.layers; ++l) {
    for (int64_t s = 0; s < sequences(); ++s) {
      const int64_t cache = l * sequences() + s;
      const int64_t begin = link_->window_begin()[cache];
      const int64_t moved = begin - begins_[cache];
      if (moved == 0) continue;
      CKV_RETURN_IF_ERROR(sessions_[s]->MoveWindow(l, begin));
      const int64_t left = host_counts_[cache] - moved;
      // What stays may overlap where it goes.
      const int64_t bytes = left * token_bytes_;
      CKV_RETURN_IF_ERROR(
          Copy(scratch_.data(), Row(l, s, first_row_ + moved), bytes, cudaMemcpyDeviceToDevice));
      CKV_RETURN_IF_ERROR(
          Copy(Row(l, s, first_row_), scratch_.data(), bytes, cudaMemcpyDeviceToDevice));
      begins_[cache] = begin;
      host_counts_[cache] = left;
      moved_any = true;
    }
  }
  if (!moved_any) return absl::OkStatus();
  CKV_RETURN_IF_ERROR(Copy(Counts(), host_counts_.data(),
                           static_cast<int64_t>(host_counts_.size()) * 8, cudaMemcpyHostToDevice));
  return own_stream_->Synchronize();
}

}  // namespace

absl::StatusOr<std::unique_ptr<EngineGroup>> MakeResidentGroup(
    int device, uint64_t timeout_ns, absl::Span<DecodeSession* const> sessions,
    ElementType output_type) {
  auto group = std::make_unique<ResidentGroup>(device, sessions);
  CKV_RETURN_IF_ERROR(group->Start(timeout_ns, output_type));
  return std::unique_ptr<EngineGroup>(std::move(group));
}

}  // namespace clusterkv::worker
