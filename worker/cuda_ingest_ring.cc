#include "worker/cuda_ingest_ring.h"

#include <cuda_runtime.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/comm/peer_window.h"
#include "kernels/ingest/ingest_cuda.h"
#include "kernels/runtime/device.h"

namespace clusterkv::worker {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::Event;
using kernels::PinnedBuffer;
using kernels::ScopedDevice;
using kernels::Stream;

using Hash = unsigned long long;  // NOLINT(runtime/int): atomics' type

class CudaIngestRing : public IngestRing {
 public:
  CudaIngestRing(int device, int64_t slot_bytes)
      : device_(device), slot_bytes_((slot_bytes + 511) / 512 * 512) {}

  absl::Status Start(int slots) {
    const ScopedDevice scoped(device_);
    const int64_t hash_bytes = slots * static_cast<int64_t>(sizeof(Hash));
    CKV_ASSIGN_OR_RETURN(memory_, DeviceBuffer::Create(device_, slots * slot_bytes_));
    CKV_ASSIGN_OR_RETURN(hashes_, DeviceBuffer::Create(device_, hash_bytes));
    CKV_ASSIGN_OR_RETURN(host_hashes_, PinnedBuffer::Create(hash_bytes));
    CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(device_));
    stream_.emplace(std::move(stream));
    for (int i = 0; i < slots; ++i) {
      CKV_ASSIGN_OR_RETURN(Event packed, Event::Create(device_));
      packed_.push_back(std::move(packed));
    }
    return absl::OkStatus();
  }

  int slots() const override { return static_cast<int>(packed_.size()); }
  int64_t slot_bytes() const override { return slot_bytes_; }
  absl::StatusOr<std::string> Export() const override { return kernels::ExportWindow(memory_); }

  absl::Status Pack(int slot, const EngineRows& keys, const EngineRows& values,
                    EngineStream stream) override {
    CKV_CHECK(keys.tokens * keys.heads * keys.row_bytes <= slot_bytes_ / 2) << keys.tokens;
    const ScopedDevice scoped(device_);
    auto* const cuda = static_cast<cudaStream_t>(stream);
    kernels::PackRows rows;
    rows.keys = Strided(keys);
    rows.values = Strided(values);
    rows.tokens = keys.tokens;
    rows.heads = static_cast<int32_t>(keys.heads);
    rows.head_bytes = static_cast<int32_t>(keys.row_bytes);
    rows.slot_keys = reinterpret_cast<unsigned char*>(KeysOf(slot));
    rows.slot_values = reinterpret_cast<unsigned char*>(ValuesOf(slot));
    rows.hash = reinterpret_cast<Hash*>(hashes_.data()) + slot;
    CKV_RETURN_IF_ERROR(CudaStatus(kernels::LaunchPackRows(rows, cuda), "ingest"));
    CKV_RETURN_IF_ERROR(CudaStatus(
        cudaMemcpyAsync(HostHash(slot), rows.hash, sizeof(Hash), cudaMemcpyDeviceToHost, cuda),
        "ingest"));
    return EventOf(slot).Record(cuda);
  }

  absl::StatusOr<uint64_t> AwaitPacked(int slot) override {
    CKV_RETURN_IF_ERROR(EventOf(slot).Synchronize());
    return *HostHash(slot);
  }

  absl::Status Read(int slot, int64_t bytes, std::byte* keys, std::byte* values) override {
    const ScopedDevice scoped(device_);
    const auto copy = [&](std::byte* to, const std::byte* from) {
      return CudaStatus(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes),
                                        cudaMemcpyDeviceToHost, stream_->get()),
                        "ingest");
    };
    CKV_RETURN_IF_ERROR(copy(keys, KeysOf(slot)));
    CKV_RETURN_IF_ERROR(copy(values, ValuesOf(slot)));
    return stream_->Synchronize();
  }

 private:
  static kernels::StridedRows Strided(const EngineRows& rows) {
    return {static_cast<const unsigned char*>(rows.data), rows.token_stride_bytes,
            rows.head_stride_bytes};
  }
  const Event& EventOf(int slot) const { return packed_[static_cast<size_t>(slot)]; }
  std::byte* KeysOf(int slot) const { return memory_.data() + slot * slot_bytes_; }
  std::byte* ValuesOf(int slot) const { return KeysOf(slot) + slot_bytes_ / 2; }
  Hash* HostHash(int slot) const { return reinterpret_cast<Hash*>(host_hashes_.data()) + slot; }

  const int device_;
  const int64_t slot_bytes_;
  DeviceBuffer memory_, hashes_;
  PinnedBuffer host_hashes_;
  std::optional<Stream> stream_;
  std::vector<Event> packed_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<IngestRing>> MakeCudaIngestRing(int device, int slots,
                                                               int64_t slot_bytes) {
  auto ring = std::make_unique<CudaIngestRing>(device, slot_bytes);
  CKV_RETURN_IF_ERROR(ring->Start(slots));
  return std::unique_ptr<IngestRing>(std::move(ring));
}

}  // namespace clusterkv::worker
