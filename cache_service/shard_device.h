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
// Thread-safe. When it dies it has ended, and nothing that it was handed is used any more. What its
// items name lives until then or until the next Change.
class DeviceResident {
 public:
  virtual ~DeviceResident() = default;
  // Where the worker writes its queries; handle and bytes.
  virtual const v1::PeerWindow& requests() const = 0;
  // Goes on with other items, of the same number and layout. `rounds`: what the worker asked for so
  // far. Errors: FailedPrecondition when that is not what was answered, and nothing changed;
  // others: it has ended.
  virtual absl::Status Change(absl::Span<const DeviceSelectItem> items, uint64_t rounds) = 0;
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
