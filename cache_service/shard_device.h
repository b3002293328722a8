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
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cache_service/arena.h"
#include "kernels/index/index.h"
#include "kernels/select/select.h"

namespace clusterkv::cache_service {

// What the device keeps of one index part beside its pages. Dies with the part.
class DevicePart {
 public:
  virtual ~DevicePart() = default;
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

  // Copies the pages' contents to the device. Blocks until they are there. An error ends the
  // device's health.
  virtual absl::Status Upload(absl::Span<const uint32_t> pages) = 0;
  // Uploads a sealed part, whose arrays lie in `pages`. Null when the device keeps no more parts:
  // the host answers for it then. Errors: as Upload.
  virtual absl::StatusOr<std::unique_ptr<DevicePart>> Mirror(const kernels::IndexPartView& view,
                                                             absl::Span<const uint32_t> pages) = 0;
  // Whether Select may take a call of these parameters.
  virtual bool CanSelect(const kernels::KvShape& shape, const kernels::SelectParams& select,
                         int64_t clustered_tokens) const = 0;
  // Answers the items in as few launches as their parameters allow, and waits for them. Equal to
  // kernels::Select up to near ties of scores. Each item has a status.
  virtual void Select(absl::Span<DeviceSelectItem> items) = 0;
};

// "cpu", "cuda", "cuda:N".
bool IsDeviceName(const std::string& name);

// "cpu": null. "cuda", "cuda:N": that device, not yet started.
// Errors: InvalidArgument for other names; FailedPrecondition in a build without CUDA; Unavailable
// when there is no such device.
absl::StatusOr<std::unique_ptr<ShardDevice>> MakeShardDevice(const std::string& name);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_SHARD_DEVICE_H_
