// The device of a shard: a mirror of the arena in its memory, and the work that it does there.
//
// The host's arena holds everything and decides everything; what selects read is mirrored on the
// device at the same page numbers, once, when a part is sealed. So whatever the device cannot take
// (a mode it has no kernel for, a batch beyond its lanes, a fault), the host answers from its own
// copy, with the same results.
//
// Thread-safe. Holds no lock while it waits for the device, but a lane's.
#ifndef CLUSTERKV_CACHE_SERVICE_SHARD_DEVICE_H_
#define CLUSTERKV_CACHE_SERVICE_SHARD_DEVICE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cache_service/arena.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "kernels/index/index.h"
#include "kernels/select/select.h"

namespace clusterkv::cache_service {

// What the device keeps of one index part beside its pages. Dies with the part.
class DevicePart {
 public:
  virtual ~DevicePart() = default;
};

// A part to be built from rows in the arena. All views are the host's.
struct DeviceBuild {
  kernels::KvShape shape;
  kernels::IndexParams params;
  const kernels::RecordCodec* codec = nullptr;
  const kernels::IndexInput* input = nullptr;
  // Of the part whose channels input->inherited_channels are.
  const DevicePart* inherited = nullptr;
  kernels::MutableIndexPartView part;
  absl::Span<const uint32_t> pages;  // where the part's arrays lie
  bool rows_on_device = false;       // the input's rows are there, and may be there alone
};

// A run of rows of K and V in the arena's pages, views of the host's: rows [first, first + rows).
struct PagedRun {
  kernels::MutablePagedView keys, values;
  int64_t first = 0, rows = 0;
};

// A chunk in a worker's window: [rows] of K from keys_offset on, of V from values_offset on, both
// multiples of 16.
struct WindowChunk {
  int64_t keys_offset = 0, values_offset = 0;
  int64_t rows = 0, row_bytes = 0;
  kernels::ElementType type = kernels::ElementType::kBFloat16;
};

// What was found in a chunk while it was taken.
struct TakenChunk {
  uint64_t hash = 0;  // RowsHash
  // The first element that is NaN or infinite, counted over the chunk's keys or values; -1: none.
  int64_t bad_key = -1, bad_value = -1;
};

// GPU memory of a prefill worker on this host, mapped for the device.
//
// Thread-safe; calls run one after the other. REQUIRES of each call: the chunk lies in bytes().
class RowWindow {
 public:
  virtual ~RowWindow() = default;
  virtual int64_t bytes() const = 0;
  // Copies the chunk's rows, in order, to the device's pages of `runs`, and looks at them. When it
  // returns they are there; the host's pages stay as they are. Errors: as ShardDevice::Upload.
  virtual absl::StatusOr<TakenChunk> Take(const WindowChunk& chunk,
                                          absl::Span<const PagedRun> runs) = 0;
  // Copies the chunk to host memory: keys, values [rows, row_bytes]. Errors: as Take.
  virtual absl::Status Read(const WindowChunk& chunk, char* keys, char* values) = 0;
};

// Contents of pages that were copied between host and device.
struct DeviceCopies {
  uint64_t uploaded_bytes = 0, fetched_bytes = 0;
};

// One (sequence, layer): all its KV heads.
struct DeviceSelectItem {
  kernels::KvShape shape;
  kernels::CodesParams codes;
  kernels::SelectParams select;
  std::vector<const DevicePart*> parts;  // in token order; at least one, none null
  std::vector<int64_t> first_cluster;    // [parts + 1]
  int64_t clustered_tokens = 0;          // over the parts
  int64_t sink_tokens = 0;
  kernels::PagedView sink_keys;             // [sink_tokens] of [kv_heads, head_dim], in the arena
  absl::Span<const float> queries;          // [query_heads, head_dim]
  kernels::HeadSelection* heads = nullptr;  // [kv_heads] out; zones' clusters ascending, not ranked
  // Unavailable: the host is to answer it; `heads` is undefined then.
  absl::Status status;
};

// One record to be sent: its place in the part, and where it goes.
struct LinkRecord {
  const DevicePart* part = nullptr;
  int64_t index = 0;        // of the part's records
  int64_t destination = 0;  // bytes from the window's begin; NCCL: from the message's
};

// The way of records to one worker, from device memory to device memory.
//
// Thread-safe; sends run one after the other. When it dies nothing it was handed is used any more.
class RecordLink {
 public:
  virtual ~RecordLink() = default;
  virtual v1::Link kind() const = 0;
  // False while it is being set up, and for good once it failed.
  virtual bool ready() const = 0;
  // Why it failed; empty before that.
  virtual std::string failure() const = 0;
  // Sends the records, each record_bytes long. When it returns they are in the window (PEER), or
  // read and on their way as one message (NCCL). Errors: the link failed; or ResourceExhausted:
  // more than it takes at a time, and nothing was sent.
  virtual absl::Status Send(absl::Span<const LinkRecord> records, int64_t record_bytes) = 0;
};

struct LinkSetup {
  v1::Link kind = v1::LINK_UNSPECIFIED;
  std::string window_handle;      // PEER
  int64_t window_bytes = 0;       // PEER
  int64_t max_message_bytes = 0;  // most that one Send sends
};

// A kernel that answers a batch's steps by itself (kernels/resident/resident_cuda.h).
//
// Thread-safe. What its items name lives until End or until the next Change. The window for
// requests lives as long as it: a worker that does not know of the end still writes there.
class DeviceResident {
 public:
  virtual ~DeviceResident() = default;
  // Where the worker writes its queries; handle and bytes.
  virtual const v1::PeerWindow& requests() const = 0;
  // Goes on with other items, of the same number and layout. `rounds`: what the worker asked for so
  // far. Errors: FailedPrecondition when that is not what was answered, and nothing changed;
  // others: it has ended.
  virtual absl::Status Change(absl::Span<const DeviceSelectItem> items, uint64_t rounds) = 0;
  // It has ended, and nothing that it was handed is used any more. Idempotent.
  virtual void End() = 0;
};

struct ResidentSetup {
  int64_t layers = 0;
  v1::PeerWindow window;  // the worker's
  int64_t slots = 0, max_exact = 0;
};

class ShardDevice {
 public:
  virtual ~ShardDevice() = default;
  // "cuda:0".
  virtual const std::string& name() const = 0;
  // Takes the device's memory: as much as the arena has, and lanes for `lanes` selects at a time.
  // Once, before everything else; `arena` outlives the device's last use.
  // Errors: ResourceExhausted, with what was asked and what is free; Unavailable.
  virtual absl::Status Start(const Arena& arena, int lanes) = 0;
  // False once the device failed: nothing is asked of it any more.
  virtual bool healthy() const = 0;
  // `told` is called once, with why, by whoever notices that the device failed; it must not block.
  // Before Start; without it nobody is told.
  virtual void OnFailure(std::function<void(const absl::Status&)> told) = 0;

  // Copies the pages' contents to the device. Blocks until they are there. An error ends the
  // device's health.
  virtual absl::Status Upload(absl::Span<const uint32_t> pages) = 0;
  // The other way: copies the pages' contents from the device to the host's.
  virtual absl::Status Fetch(absl::Span<const uint32_t> pages) = 0;
  // Copies packed rows [run.rows] in host memory to the run's rows on the device, and back. The
  // host's pages are left alone. Block. Errors: as Upload.
  virtual absl::Status WriteRows(const PagedRun& run, const char* keys, const char* values) = 0;
  virtual absl::Status ReadRows(const PagedRun& run, char* keys, char* values) = 0;
  // Since its start.
  virtual DeviceCopies copies() const = 0;
  // Its memory that this process has allocated: the arena, what kernels need, what links have.
  // Without the driver's and NCCL's own.
  virtual int64_t memory_bytes() const = 0;
  // Uploads a sealed part, whose arrays lie in `pages`. Null when the device keeps no more parts:
  // the host answers for it then. Errors: as Upload.
  virtual absl::StatusOr<std::unique_ptr<DevicePart>> Mirror(const kernels::IndexPartView& view,
                                                             absl::Span<const uint32_t> pages) = 0;
  // Builds the part, on the device and in the host's pages: as BuildIndexPart up to rounding edges
  // (index_cuda.h). Unavailable when the device does not take such a part: the host builds it then,
  // and Mirror takes it. Other errors: as Upload.
  virtual absl::StatusOr<std::unique_ptr<DevicePart>> Build(const DeviceBuild& build) = 0;
  // Whether Select may take a call of these parameters.
  virtual bool CanSelect(const kernels::KvShape& shape, const kernels::SelectParams& select,
                         int64_t clustered_tokens) const = 0;
  // Answers the items in as few launches as their parameters allow, and waits for them. Equal to
  // kernels::Select up to near ties of scores. Each item has a status.
  virtual void Select(absl::Span<DeviceSelectItem> items) = 0;

  // Why links of that kind cannot be had; empty: they can.
  virtual std::string WhyNoLink(v1::Link kind) const = 0;
  // Sets a link up. NCCL: it meets the worker on a thread of its own, who needs *unique_id. The
  // device outlives the link. Errors: InvalidArgument for a bad window; ResourceExhausted for
  // memory or too many links; Unavailable.
  virtual absl::StatusOr<std::unique_ptr<RecordLink>> Connect(const LinkSetup& setup,
                                                              std::string* unique_id) = 0;
  // Maps a worker's window. The device outlives it. Errors: as Connect.
  virtual absl::StatusOr<std::unique_ptr<RowWindow>> OpenWindow(const std::string& handle,
                                                                int64_t bytes) = 0;

  // Starts a kernel for items [layers, sequences], all of one shape, codes and selection, with no
  // queries and no heads. The device outlives it. Errors: INVALID_FIELD for the setup;
  // Unavailable for items that the kernel does not take; ResourceExhausted for memory or
  // multiprocessors.
  virtual absl::StatusOr<std::unique_ptr<DeviceResident>> StartResident(
      const ResidentSetup& setup, absl::Span<const DeviceSelectItem> items) = 0;
};

// "cpu", "cuda", "cuda:N".
bool IsDeviceName(const std::string& name);

// "cpu": null. "cuda", "cuda:N": that device, not yet started.
// Errors: InvalidArgument for other names; FailedPrecondition in a build without CUDA; Unavailable
// when there is no such device.
absl::StatusOr<std::unique_ptr<ShardDevice>> MakeShardDevice(const std::string& name);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SHARD_DEVICE_H_
