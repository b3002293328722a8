#include "worker/cuda_window.h"

#include <cuda_runtime.h>

#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/paged_cuda.h"
#include "kernels/base/status_macros.h"
#include "kernels/comm/nccl_comm.h"
#include "kernels/comm/peer_window.h"
#include "kernels/gather/gather_cuda.h"
#include "kernels/runtime/device.h"

namespace clusterkv::worker {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::DevicePagedView;
using kernels::NcclComm;
using kernels::PinnedBuffer;
using kernels::RecordMove;
using kernels::ScopedDevice;
using kernels::Stream;

constexpr int64_t kAlignment = 256;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

class CudaWindow : public RecordWindow {
 public:
  CudaWindow(int device, const Layout& layout)
      : device_(device),
        layout_(layout),
        head_bytes_(HeadSlotsBytes(layout.slots, layout.record_bytes)),
        layer_bytes_(layout.kv_heads * head_bytes_),
        page_at_(Align((layout.kv_heads + 1) * static_cast<int64_t>(sizeof(DevicePagedView)))),
        moves_at_(page_at_ + kAlignment),
        moves_bytes_(Align(layout.max_records * static_cast<int64_t>(sizeof(RecordMove)))) {}

  absl::Status Start() {
    const ScopedDevice scoped(device_);
    const int64_t message_bytes = layout_.max_records * layout_.record_bytes;
    const int64_t list_bytes = moves_at_ + 2 * moves_bytes_;
    CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(device_));
    stream_.emplace(std::move(stream));
    CKV_ASSIGN_OR_RETURN(slots_, DeviceBuffer::Create(device_, layout_.layers * layer_bytes_));
    CKV_ASSIGN_OR_RETURN(message_, DeviceBuffer::Create(device_, message_bytes));
    CKV_ASSIGN_OR_RETURN(list_, DeviceBuffer::Create(device_, list_bytes));
    CKV_ASSIGN_OR_RETURN(host_message_, PinnedBuffer::Create(message_bytes));
    CKV_ASSIGN_OR_RETURN(host_list_, PinnedBuffer::Create(list_bytes));
    return absl::OkStatus();
  }

  absl::StatusOr<v1::PeerWindow> Export() const override {
    v1::PeerWindow window;
    CKV_ASSIGN_OR_RETURN(*window.mutable_handle(), kernels::ExportWindow(slots_));
    window.set_bytes(static_cast<uint64_t>(slots_.bytes()));
    window.set_layer_bytes(static_cast<uint64_t>(layer_bytes_));
    window.set_head_bytes(static_cast<uint64_t>(head_bytes_));
    return window;
  }

  absl::Status ConnectNccl(const std::string& unique_id, absl::Time deadline) override {
    comm_.reset();
    CKV_ASSIGN_OR_RETURN(comm_, NcclComm::Connect(unique_id, /*rank=*/1, device_, deadline));
    return absl::OkStatus();
  }

  absl::Status Receive(v1::Link link, int64_t layer, absl::Span<const LinkedRecord> records,
                       absl::Time deadline) override {
    if (records.empty() || link != v1::LINK_NCCL) return absl::OkStatus();
    const ScopedDevice scoped(device_);
    CKV_RETURN_IF_ERROR(Queue(link, layer, records));
    return comm_->Wait(stream_->get(), deadline);
  }

  absl::Status Take(v1::Link link, int64_t layer, absl::Span<const LinkedRecord> records,
                    absl::Time deadline) override {
    if (records.empty()) return absl::OkStatus();
    const ScopedDevice scoped(device_);
    CKV_RETURN_IF_ERROR(Queue(link, layer, records));
    // From the slots to the host: what it gets is what they hold.
    const auto count = static_cast<int64_t>(records.size());
    CKV_RETURN_IF_ERROR(Move(1, count, message_.data()));
    CKV_RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(host_message_.data(), message_.data(),
                                   static_cast<size_t>(count * layout_.record_bytes),
                                   cudaMemcpyDeviceToHost, stream_->get()),
                   "link"));
    CKV_RETURN_IF_ERROR(link == v1::LINK_NCCL ? comm_->Wait(stream_->get(), deadline)
                                              : stream_->Synchronize());
    const std::byte* from = host_message_.data();
    for (const LinkedRecord& record : records) {
      std::memcpy(record.copy, from, static_cast<size_t>(layout_.record_bytes));
      from += layout_.record_bytes;
    }
    return absl::OkStatus();
  }

  std::byte* slots() const override { return slots_.data(); }

 private:
  // Makes the lists, and has a message taken (NCCL) and moved to the slots.
  absl::Status Queue(v1::Link link, int64_t layer, absl::Span<const LinkedRecord> records) {
    const auto count = static_cast<int64_t>(records.size());
    if (count > layout_.max_records) {
      return absl::UnavailableError(absl::StrCat("link: ", count, " records in one step"));
    }
    if (link != v1::LINK_NCCL) return MakeLists(layer, records);
    if (comm_ == nullptr) return absl::UnavailableError("nccl: not connected");
    CKV_RETURN_IF_ERROR(
        comm_->Receive(message_.data(), count * layout_.record_bytes, stream_->get()));
    CKV_RETURN_IF_ERROR(MakeLists(layer, records));
    return Move(0, count, slots_.data() + layer * layer_bytes_);
  }

  // Views of the layer's slots by head, and last of the message; moves from the message to the
  // slots, and from the slots to the message. Sent to the device.
  absl::Status MakeLists(int64_t layer, absl::Span<const LinkedRecord> records) {
    auto* views = reinterpret_cast<DevicePagedView*>(host_list_.data());
    const auto* page = reinterpret_cast<const uint32_t*>(list_.data() + page_at_);
    *reinterpret_cast<uint32_t*>(host_list_.data() + page_at_) = 0;  // of every view: its only one
    std::byte* const slots = slots_.data() + layer * layer_bytes_;
    for (int64_t head = 0; head < layout_.kv_heads; ++head) {
      views[head] = kernels::MakeDevicePagedView(slots + head * head_bytes_, page, head_bytes_,
                                                 layout_.record_bytes);
    }
    views[layout_.kv_heads] =
        kernels::MakeDevicePagedView(message_.data(), page, message_.bytes(), layout_.record_bytes);
    auto* to_slots = reinterpret_cast<RecordMove*>(host_list_.data() + moves_at_);
    auto* to_message = reinterpret_cast<RecordMove*>(host_list_.data() + moves_at_ + moves_bytes_);
    int64_t at = 0;
    for (const LinkedRecord& record : records) {
      if (record.slot >= layout_.slots || record.kv_head >= layout_.kv_heads) {
        return absl::UnavailableError("link: a record beyond the window");
      }
      to_slots[at] = {static_cast<uint32_t>(layout_.kv_heads), static_cast<uint32_t>(at),
                      record.kv_head * head_bytes_ + record.slot * layout_.record_bytes};
      to_message[at] = {static_cast<uint32_t>(record.kv_head), static_cast<uint32_t>(record.slot),
                        at * layout_.record_bytes};
      ++at;
    }
    return CudaStatus(
        cudaMemcpyAsync(list_.data(), host_list_.data(), static_cast<size_t>(host_list_.bytes()),
                        cudaMemcpyHostToDevice, stream_->get()),
        "link");
  }

  absl::Status Move(int64_t list, int64_t count, std::byte* destination) {
    return CudaStatus(
        kernels::LaunchMoveRecords(
            reinterpret_cast<const DevicePagedView*>(list_.data()),
            reinterpret_cast<const RecordMove*>(list_.data() + moves_at_ + list * moves_bytes_),
            nullptr, static_cast<int32_t>(count), static_cast<int32_t>(layout_.record_bytes),
            reinterpret_cast<unsigned char*>(destination), stream_->get()),
        "link");
  }

  const int device_;
  const Layout layout_;
  const int64_t head_bytes_, layer_bytes_;
  const int64_t page_at_, moves_at_, moves_bytes_;  // in the lists
  std::optional<Stream> stream_;
  DeviceBuffer slots_, message_, list_;
  PinnedBuffer host_message_, host_list_;
  std::unique_ptr<NcclComm> comm_;  // last: aborted before its buffers die
};

}  // namespace

std::string WhyNoCudaWindow(int ordinal, v1::Link link) {
  const int count = kernels::DeviceCount();
  if (ordinal >= count) return absl::StrCat("this worker sees ", count, " GPUs");
  if (link == v1::LINK_NCCL) return std::string(NcclComm::Available().message());
  return "";
}

absl::StatusOr<std::unique_ptr<RecordWindow>> MakeCudaWindow(int ordinal,
                                                             const RecordWindow::Layout& layout) {
  if (layout.slots * layout.record_bytes >= (int64_t{1} << 31) ||
      layout.max_records * layout.record_bytes >= (int64_t{1} << 31)) {
    return absl::ResourceExhaustedError("window: 2 GiB or more of one KV head or message");
  }
  auto window = std::make_unique<CudaWindow>(ordinal, layout);
  CKV_RETURN_IF_ERROR(window->Start());
  return std::unique_ptr<RecordWindow>(std::move(window));
}

}  // namespace clusterkv::worker
