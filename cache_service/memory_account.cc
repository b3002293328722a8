#include "cache_service/memory_account.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "kernels/base/paged.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using kernels::IndexLayout;
using kernels::PagesFor;

absl::Status CheckElements(const IndexLayout& layout, int64_t page_bytes) {
  for (const kernels::IndexArrayLayout& array : layout.arrays) {
    if (array.element_bytes <= page_bytes) continue;
    return FieldError(v1::INVALID_FIELD, "shape",
                      absl::StrCat("elements of at most ", page_bytes, " bytes, the page_bytes"),
                      absl::StrCat(array.element_bytes, " bytes in ", array.name));
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> PartPages(const SequenceParams& params, const kernels::IndexParams& index,
                                  int64_t tokens, int64_t page_bytes) {
  const IndexLayout layout = kernels::MakeIndexLayout(params.shape, index, *params.codec, tokens);
  CKV_RETURN_IF_ERROR(CheckElements(layout, page_bytes));
  return layout.Pages(page_bytes);
}

// Pages of K and V rows.
int64_t RowPages(const SequenceParams& params, int64_t rows, int64_t page_bytes) {
  return 2 * PagesFor(rows, RowBytes(params.shape), page_bytes);
}

}  // namespace

int64_t RowBytes(const kernels::KvShape& shape) {
  return shape.kv_heads * shape.head_dim * kernels::ElementBytes(shape.element_type);
}

absl::StatusOr<MemoryPlan> PlanDecode(const SequenceParams& params, int64_t window_rows,
                                      int64_t decoded_tokens, int64_t page_bytes) {
  MemoryPlan plan;
  const int64_t rows = window_rows + decoded_tokens;
  if (rows == 0) return plan;
  if (params.window_tokens == 0) {
    plan[MemoryUse::kWindow] = params.layers * RowPages(params, rows, page_bytes);
    return plan;
  }
  const int64_t windows = rows / params.window_tokens;
  if (windows > 0) {
    CKV_ASSIGN_OR_RETURN(const int64_t part_pages, PartPages(params, WindowIndexParams(params),
                                                             params.window_tokens, page_bytes));
    plan[MemoryUse::kParts] = params.layers * windows * part_pages;
  }
  // One window fills while the one before it is clustered.
  const int64_t buffers = rows > params.window_tokens ? 2 : 1;
  plan[MemoryUse::kWindow] =
      params.layers * buffers * RowPages(params, std::min(rows, params.window_tokens), page_bytes);
  return plan;
}

absl::StatusOr<MemoryPlan> PlanSequence(const SequenceParams& params, int64_t page_bytes) {
  if (RowBytes(params.shape) > page_bytes) {
    return FieldError(
        v1::INVALID_FIELD, "shape",
        absl::StrCat("kv_heads * head_dim of at most ", page_bytes, " bytes, the page_bytes"),
        absl::StrCat(RowBytes(params.shape), " bytes"));
  }
  CKV_ASSIGN_OR_RETURN(MemoryPlan plan,
                       PlanDecode(params, 0, params.max_decode_tokens, page_bytes));
  const int64_t sinks = std::min(params.sink_tokens, params.prompt_tokens);
  const int64_t clustered = params.prompt_tokens - sinks;
  int64_t part_pages = 0;
  if (clustered > 0) {
    CKV_ASSIGN_OR_RETURN(part_pages, PartPages(params, params.index, clustered, page_bytes));
  }
  plan[MemoryUse::kParts] += params.layers * (part_pages + RowPages(params, sinks, page_bytes));
  plan[MemoryUse::kStaging] =
      std::min<int64_t>(params.layers, 2) * RowPages(params, clustered, page_bytes);
  return plan;
}

absl::StatusOr<std::shared_ptr<MemoryAccount>> MemoryAccount::Open(Arena* arena,
                                                                   const MemoryPlan& plan) {
  // One step for the whole, so that two accounts cannot take half each.
  CKV_ASSIGN_OR_RETURN(PageReservation whole, arena->Reserve(plan.total()));
  auto account = std::shared_ptr<MemoryAccount>(new MemoryAccount(arena));
  absl::MutexLock lock(&account->mutex_);
  for (size_t i = 0; i < kMemoryUses; ++i) {
    Promise& promise = account->promises_[i];
    promise.total = plan.pages[i];
    promise.reservation = arena->Split(whole, plan.pages[i]);
  }
  return account;
}

absl::StatusOr<PageBlock> MemoryAccount::Allocate(MemoryUse use, int64_t pages) {
  absl::MutexLock lock(&mutex_);
  Promise& promise = promises_[static_cast<size_t>(use)];
  CKV_ASSIGN_OR_RETURN(PageBlock block, arena_->Allocate(pages, &promise.reservation));
  promise.taken += pages;
  return block;
}

void MemoryAccount::Free(MemoryUse use, PageBlock block) {
  if (block.empty()) return;
  absl::MutexLock lock(&mutex_);
  Promise& promise = promises_[static_cast<size_t>(use)];
  const int64_t pages = static_cast<int64_t>(block.pages().size());
  promise.taken -= pages;
  const int64_t owed = promise.total - promise.taken - promise.reservation.pages();
  arena_->Free(std::move(block), &promise.reservation, std::clamp<int64_t>(owed, 0, pages));
}

void MemoryAccount::Waive(MemoryUse use) {
  absl::MutexLock lock(&mutex_);
  Promise& promise = promises_[static_cast<size_t>(use)];
  promise.total = 0;
  promise.reservation = PageReservation();
}

void MemoryAccount::Close() {
  for (int use = 0; use < kMemoryUses; ++use) Waive(static_cast<MemoryUse>(use));
}

int64_t MemoryAccount::reserved_pages() const {
  absl::MutexLock lock(&mutex_);
  int64_t pages = 0;
  for (const Promise& promise : promises_) pages += promise.reservation.pages();
  return pages;
}

}  // namespace clusterkv::cache_service
