// Where records arrive that a link brings: a worker's hot-cache slots in GPU memory.
//
// One per decode session. Slot s of KV head h of layer l lies at l * layer_bytes + h * head_bytes +
// s * record_bytes, as PeerWindow (cache_service.proto) says. Not thread-safe.
#ifndef CLUSTERKV_WORKER_RECORD_WINDOW_H_
#define CLUSTERKV_WORKER_RECORD_WINDOW_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "clusterkv/v1/cache_service.pb.h"

namespace clusterkv::worker {

// A record that came over the link, by its slot.
struct LinkedRecord {
  int64_t kv_head = 0;
  int64_t slot = 0;
  std::byte* copy = nullptr;  // where the host wants it, [record_bytes]
};

class RecordWindow {
 public:
  struct Layout {
    int64_t layers = 0, kv_heads = 0, slots = 0, record_bytes = 0;
    int64_t max_records = 0;  // of one step of one layer
  };

  virtual ~RecordWindow() = default;
  // For ConnectLink. Errors: Unavailable where the memory cannot be shared.
  virtual absl::StatusOr<v1::PeerWindow> Export() const = 0;
  // Meets the service. Errors: DeadlineExceeded, Unavailable.
  virtual absl::Status ConnectNccl(const std::string& unique_id, absl::Time deadline) = 0;
  // The records of one step, in the order of the answer's chunks: takes the message that brings
  // them (NCCL; PEER: they are there, and nothing is left to be done). When it returns they are in
  // their slots. Errors: DeadlineExceeded, Unavailable: the link is broken.
  virtual absl::Status Receive(v1::Link link, int64_t layer, absl::Span<const LinkedRecord> records,
                               absl::Time deadline) = 0;
  // The same, and copies them to the host.
  virtual absl::Status Take(v1::Link link, int64_t layer, absl::Span<const LinkedRecord> records,
                            absl::Time deadline) = 0;
  // The first slot of the first layer's first head, in the GPU's memory.
  virtual std::byte* slots() const = 0;
};

using RecordWindowMaker =
    std::function<absl::StatusOr<std::unique_ptr<RecordWindow>>(const RecordWindow::Layout&)>;

// head_bytes of a window: those of a head's slots, to a multiple of 256.
inline int64_t HeadSlotsBytes(int64_t slots, int64_t record_bytes) {
  constexpr int64_t kAlignment = 256;
  return (slots * record_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Why there are no such links on `device` ("cpu", "cuda", "cuda:N"); empty: there are.
std::string WhyNoWindow(const std::string& device, v1::Link link);

// Errors: as WhyNoWindow: Unavailable; ResourceExhausted for memory.
absl::StatusOr<std::unique_ptr<RecordWindow>> MakeRecordWindow(const std::string& device,
                                                               const RecordWindow::Layout& layout);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_RECORD_WINDOW_H_
