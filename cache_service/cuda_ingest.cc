#include "cache_service/cuda_ingest.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/comm/peer_window.h"
#include "kernels/ingest/ingest_cuda.h"
#include "kernels/runtime/device.h"

namespace clusterkv::cache_service {
namespace {

using kernels::CudaStatus;
using kernels::DeviceBuffer;
using kernels::PinnedBuffer;
using kernels::RowsFound;
using kernels::ScopedDevice;
using kernels::Stream;

// What Read brings to the host at a time.
constexpr int64_t kReadBytes = 4 << 20;

class CudaRowWindow : public RowWindow {
 public:
  CudaRowWindow(RowWindowSetup setup, kernels::PeerWindow window)
      : setup_(std::move(setup)), window_(std::move(window)) {}

  absl::Status Start() {
    const ScopedDevice scoped(setup_.device);
    absl::MutexLock lock(&mutex_);
    CKV_ASSIGN_OR_RETURN(Stream stream, Stream::Create(setup_.device, /*priority=*/-1));
    stream_.emplace(std::move(stream));
    // A page holds rows of half its size or more; a run begins and ends within one.
    const int64_t pages = 2 * setup_.bytes / setup_.page_bytes + 16;
    CKV_ASSIGN_OR_RETURN(page_numbers_,
                         PinnedBuffer::Create(pages * static_cast<int64_t>(sizeof(uint32_t))));
    CKV_ASSIGN_OR_RETURN(found_, DeviceBuffer::Create(setup_.device, sizeof(RowsFound)));
    CKV_ASSIGN_OR_RETURN(host_, PinnedBuffer::Create(kReadBytes));
    return absl::OkStatus();
  }

  int64_t bytes() const override { return setup_.bytes; }

  absl::StatusOr<TakenChunk> Take(const WindowChunk& chunk,
                                  absl::Span<const PagedRun> runs) override {
    const ScopedDevice scoped(setup_.device);
    absl::MutexLock lock(&mutex_);
    CKV_RETURN_IF_ERROR(Note(Launch(chunk, runs)));
    RowsFound found;
    std::memcpy(&found, host_.data(), sizeof(found));
    TakenChunk taken;
    taken.hash = found.hash;
    if (found.not_first_bad_key != 0)
      taken.bad_key = static_cast<int64_t>(~found.not_first_bad_key);
    if (found.not_first_bad_value != 0) {
      taken.bad_value = static_cast<int64_t>(~found.not_first_bad_value);
    }
    return taken;
  }

  absl::Status Read(const WindowChunk& chunk, char* keys, char* values) override {
    const ScopedDevice scoped(setup_.device);
    absl::MutexLock lock(&mutex_);
    const int64_t bytes = chunk.rows * chunk.row_bytes;
    CKV_RETURN_IF_ERROR(Note(ReadBytes(chunk.keys_offset, bytes, keys)));
    return Note(ReadBytes(chunk.values_offset, bytes, values));
  }

 private:
  absl::Status Note(absl::Status status) const {
    if (!status.ok()) setup_.failed(status);
    return status;
  }

  // The pages of rows [first, first + rows) as the kernel sees them, their numbers written behind
  // the *used ones: it reads them from the host's memory.
  kernels::DevicePagedView PagesOf(const kernels::MutablePagedView& view, const PagedRun& run,
                                   int64_t* used) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    auto* const numbers = reinterpret_cast<uint32_t*>(page_numbers_.data()) + *used;
    const int64_t begin = run.first / view.elements_per_page;
    const int64_t end = (run.first + run.rows - 1) / view.elements_per_page + 1;
    *used += end - begin;
    CKV_CHECK(*used * static_cast<int64_t>(sizeof(uint32_t)) <= page_numbers_.bytes()) << *used;
    std::copy(view.pages + begin, view.pages + end, numbers);
    return kernels::MakeDevicePagedView(setup_.arena, numbers, view.page_bytes, view.element_bytes);
  }

  // A launch per run; then what they found is brought to host_.
  absl::Status Launch(const WindowChunk& chunk, absl::Span<const PagedRun> runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    CKV_RETURN_IF_ERROR(
        CudaStatus(cudaMemsetAsync(found_.data(), 0, sizeof(RowsFound), stream_->get()), "ingest"));
    kernels::TakeRows take;
    take.slot_keys = reinterpret_cast<const unsigned char*>(window_.data() + chunk.keys_offset);
    take.slot_values = reinterpret_cast<const unsigned char*>(window_.data() + chunk.values_offset);
    take.rows = chunk.rows;
    take.type = chunk.type;
    take.found = reinterpret_cast<RowsFound*>(found_.data());
    int64_t used = 0;
    for (const PagedRun& run : runs) {
      take.end = take.begin + run.rows;
      take.keys = PagesOf(run.keys, run, &used);
      take.values = PagesOf(run.values, run, &used);
      take.first = static_cast<uint32_t>(run.first % run.keys.elements_per_page);
      CKV_RETURN_IF_ERROR(CudaStatus(kernels::LaunchTakeRows(take, stream_->get()), "ingest"));
      take.begin = take.end;
    }
    CKV_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(host_.data(), found_.data(), sizeof(RowsFound),
                                                   cudaMemcpyDeviceToHost, stream_->get()),
                                   "ingest"));
    return stream_->Synchronize();
  }

  absl::Status ReadBytes(int64_t offset, int64_t bytes, char* to)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    while (bytes > 0) {
      const auto piece = static_cast<size_t>(std::min(bytes, kReadBytes));
      CKV_RETURN_IF_ERROR(CudaStatus(cudaMemcpyAsync(host_.data(), window_.data() + offset, piece,
                                                     cudaMemcpyDeviceToHost, stream_->get()),
                                     "window"));
      CKV_RETURN_IF_ERROR(stream_->Synchronize());
      std::memcpy(to, host_.data(), piece);
      to += piece;
      offset += static_cast<int64_t>(piece);
      bytes -= static_cast<int64_t>(piece);
    }
    return absl::OkStatus();
  }

  const RowWindowSetup setup_;
  const kernels::PeerWindow window_;
  absl::Mutex mutex_;
  std::optional<Stream> stream_ ABSL_GUARDED_BY(mutex_);
  PinnedBuffer page_numbers_ ABSL_GUARDED_BY(mutex_);
  DeviceBuffer found_ ABSL_GUARDED_BY(mutex_);
  PinnedBuffer host_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<RowWindow>> OpenRowWindow(RowWindowSetup setup) {
  CKV_ASSIGN_OR_RETURN(kernels::PeerWindow mapped,
                       kernels::PeerWindow::Open(setup.device, setup.handle, setup.bytes));
  auto window = std::make_unique<CudaRowWindow>(std::move(setup), std::move(mapped));
  CKV_RETURN_IF_ERROR(window->Start());
  return std::unique_ptr<RowWindow>(std::move(window));
}

}  // namespace clusterkv::cache_service
