#include "cache_service/index_part.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cache_service/errors.h"
#include "kernels/base/status_macros.h"
#include "proto/error.h"

namespace clusterkv::cache_service {

IndexPart::~IndexPart() {
  device_part_.reset();
  account_->Free(MemoryUse::kParts, std::move(block_));
}

absl::StatusOr<std::shared_ptr<IndexPart>> IndexPart::Allocate(
    std::shared_ptr<MemoryAccount> account, const kernels::KvShape& shape,
    const kernels::IndexParams& params, const kernels::RecordCodec& codec, int64_t first_token,
    int64_t tokens) {
  const Arena& arena = *account->arena();
  const kernels::IndexLayout layout = kernels::MakeIndexLayout(shape, params, codec, tokens);
  CKV_ASSIGN_OR_RETURN(PageBlock block,
                       account->Allocate(MemoryUse::kParts, layout.Pages(arena.page_bytes())));
  auto part = std::shared_ptr<IndexPart>(
      new IndexPart(std::move(account), std::move(block), shape, params, codec));
  part->mutable_view_ =
      kernels::MakeIndexPartView(layout, shape, params, first_token, tokens, arena.base(),
                                 part->block_.pages().data(), arena.page_bytes());
  part->view_ = part->mutable_view_;
  return part;
}

int64_t IndexPart::TaskScratchBytes(const kernels::KvShape& shape,
                                    const kernels::IndexParams& params, int64_t tokens) {
  const int64_t segment =
      params.segment_tokens == 0 ? tokens : std::min(tokens, params.segment_tokens);
  // Keys and residuals of K and V as float, labels and orders.
  return segment * (3 * shape.head_dim * 4 + 16);
}

absl::Status IndexPart::Build(const kernels::IndexInput& input, kernels::ParallelFor parallel_for,
                              ShardDevice* device, const IndexPart* first,
                              absl::Span<const PageBlock> device_rows) {
  if (device != nullptr && !device->healthy()) device = nullptr;
  if (device != nullptr) {
    DeviceBuild build{shape_, params_, &codec_, &input, nullptr, mutable_view_, block_.pages()};
    build.rows_on_device = !device_rows.empty();
    if (first != nullptr) build.inherited = first->device_part();
    if (auto built = device->Build(build); built.ok()) device_part_ = *std::move(built);
  }
  if (device_part_ == nullptr) {
    for (const PageBlock& block : device_rows) {
      if (device == nullptr || !device->Fetch(block.pages()).ok()) return DeviceLost();
    }
    const absl::Status status =
        kernels::BuildIndexPart(shape_, params_, codec_, input, mutable_view_, parallel_for);
    if (!status.ok()) return Error(v1::INTERNAL_ERROR, std::string(status.message()));
  }
  block_.Seal();
  digest_ = kernels::IndexDigest(shape_, view_);
  if (device == nullptr || device_part_ != nullptr || !device->healthy()) return absl::OkStatus();
  // What is not mirrored is answered by the host.
  if (auto mirrored = device->Mirror(view_, block_.pages()); mirrored.ok()) {
    device_part_ = *std::move(mirrored);
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::cache_service
