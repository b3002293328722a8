// One immutable part of a layer's index, with its pages: the prompt without sinks, or one window.
//
// Made by Allocate, written once by Build, and from then on only read, by any number of threads and
// sequences: a fork shares the parts of its source. Its pages are free when the last owner is gone.
#ifndef CLUSTERKV_CACHE_SERVICE_INDEX_PART_H_
#define CLUSTERKV_CACHE_SERVICE_INDEX_PART_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cache_service/arena.h"
#include "cache_service/memory_account.h"
#include "cache_service/shard_device.h"
#include "kernels/index/index.h"

namespace clusterkv::cache_service {

class IndexPart {
 public:
  // Frees the pages into the account.
  ~IndexPart();
  IndexPart(const IndexPart&) = delete;
  IndexPart& operator=(const IndexPart&) = delete;

  // Pages for a part of `tokens` tokens from `first_token` on, out of `account`'s kParts.
  // Errors: ARENA_FULL.
  static absl::StatusOr<std::shared_ptr<IndexPart>> Allocate(std::shared_ptr<MemoryAccount> account,
                                                             const kernels::KvShape& shape,
                                                             const kernels::IndexParams& params,
                                                             const kernels::RecordCodec& codec,
                                                             int64_t first_token, int64_t tokens);

  // Memory beside the arena that one task of Build takes: the keys of one (head, segment) and what
  // k-means keeps of them.
  static int64_t TaskScratchBytes(const kernels::KvShape& shape, const kernels::IndexParams& params,
                                  int64_t tokens);

  // Builds the index, seals the pages and takes the digest; on `device` too, if that is neither
  // null nor failed. `first` is the part whose channels the input inherits, or null. `device_rows`:
  // pages of the input's rows that lie on the device alone; they are fetched if the host builds.
  // Once. Errors: INTERNAL_ERROR when the kernel refuses what this service gave it; DEVICE_LOST
  // when the rows are gone with the device.
  absl::Status Build(const kernels::IndexInput& input, kernels::ParallelFor parallel_for,
                     ShardDevice* device, const IndexPart* first,
                     absl::Span<const PageBlock> device_rows = {});

  const kernels::IndexPartView& view() const { return view_; }
  const kernels::IndexParams& params() const { return params_; }
  int64_t first_token() const { return view_.first_token; }
  int64_t end_token() const { return view_.first_token + view_.tokens; }
  // Of IndexDigest. REQUIRES: built.
  uint64_t digest() const { return digest_; }
  const PageBlock& block() const { return block_; }
  // Null: the part is not on the device.
  const DevicePart* device_part() const { return device_part_.get(); }

  // The record of a token. REQUIRES: first_token() <= position < end_token().
  int64_t RecordIndex(int64_t kv_head, int64_t position) const {
    const int64_t slot =
        *view_.slots.As<int32_t>(kv_head * view_.tokens + (position - view_.first_token));
    return kv_head * view_.tokens + slot;
  }
  // The place in block() of the page that holds record `index`.
  int64_t RecordPage(int64_t index) const {
    return (view_.records.pages - block_.pages().data()) + index / view_.records.elements_per_page;
  }

 private:
  IndexPart(std::shared_ptr<MemoryAccount> account, PageBlock block, const kernels::KvShape& shape,
            const kernels::IndexParams& params, const kernels::RecordCodec& codec)
      : account_(std::move(account)),
        block_(std::move(block)),
        shape_(shape),
        params_(params),
        codec_(codec) {}

  const std::shared_ptr<MemoryAccount> account_;
  PageBlock block_;
  const kernels::KvShape shape_;
  const kernels::IndexParams params_;
  const kernels::RecordCodec& codec_;
  kernels::MutableIndexPartView mutable_view_;
  kernels::IndexPartView view_;
  uint64_t digest_ = 0;
  std::unique_ptr<DevicePart> device_part_;
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_INDEX_PART_H_
