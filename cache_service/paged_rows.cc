#include "cache_service/paged_rows.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::cache_service {
namespace {

using kernels::MutablePagedView;
using kernels::PagesFor;

void CopyIn(const MutablePagedView& view, int64_t first, int64_t rows, const char* packed) {
  kernels::ForEachRun(view, first, first + rows, [&](std::byte* to, int64_t begin, int64_t count) {
    std::memcpy(to, packed + (begin - first) * view.element_bytes,
                static_cast<size_t>(count * view.element_bytes));
  });
}

}  // namespace

PagedRows::PagedRows(std::shared_ptr<MemoryAccount> account, MemoryUse use, int64_t row_bytes,
                     int64_t max_rows)
    : account_(std::move(account)), use_(use), row_bytes_(row_bytes), max_rows_(max_rows) {
  const int64_t pages = PagesFor(max_rows, row_bytes, account_->arena()->page_bytes());
  key_pages_.reserve(static_cast<size_t>(pages));
  value_pages_.reserve(static_cast<size_t>(pages));
}

PagedRows::~PagedRows() {
  for (PageBlock& block : blocks_) account_->Free(use_, std::move(block));
}

int64_t PagedRows::PagesToGrow(int64_t rows) const {
  const int64_t pages = PagesFor(rows, row_bytes_, account_->arena()->page_bytes());
  return std::max<int64_t>(0, 2 * (pages - static_cast<int64_t>(key_pages_.size())));
}

absl::Status PagedRows::Grow(int64_t rows, AllocatePages allocate) {
  CKV_CHECK(rows <= max_rows_) << rows << " of " << max_rows_;
  const int64_t pages = PagesToGrow(rows);
  if (pages > 0) {
    CKV_ASSIGN_OR_RETURN(PageBlock block, allocate(pages));
    const absl::Span<const uint32_t> numbers = block.pages();
    const auto half = numbers.begin() + pages / 2;
    key_pages_.insert(key_pages_.end(), numbers.begin(), half);
    value_pages_.insert(value_pages_.end(), half, numbers.end());
    blocks_.push_back(std::move(block));
    page_count_.fetch_add(pages);
  }
  capacity_.store(std::max(capacity(), rows));
  return absl::OkStatus();
}

void PagedRows::Seal() {
  for (PageBlock& block : blocks_) block.Seal();
}

MutablePagedView PagedRows::Keys(int64_t rows) const {
  CKV_CHECK(rows <= capacity()) << rows << " of " << capacity();
  const Arena& arena = *account_->arena();
  return kernels::MakePagedView(arena.base(), key_pages_.data(), arena.page_bytes(), row_bytes_,
                                rows);
}

MutablePagedView PagedRows::Values(int64_t rows) const {
  CKV_CHECK(rows <= capacity()) << rows << " of " << capacity();
  const Arena& arena = *account_->arena();
  return kernels::MakePagedView(arena.base(), value_pages_.data(), arena.page_bytes(), row_bytes_,
                                rows);
}

void PagedRows::Write(int64_t first, int64_t rows, const char* keys, const char* values) {
  CopyIn(Keys(first + rows), first, rows, keys);
  CopyIn(Values(first + rows), first, rows, values);
}

int64_t PagedRows::FirstDifference(int64_t first, int64_t rows, const char* keys,
                                   const char* values) const {
  const MutablePagedView key_view = Keys(first + rows), value_view = Values(first + rows);
  const size_t bytes = static_cast<size_t>(row_bytes_);
  for (int64_t i = 0; i < rows; ++i) {
    if (std::memcmp(key_view.At(first + i), keys + i * row_bytes_, bytes) != 0 ||
        std::memcmp(value_view.At(first + i), values + i * row_bytes_, bytes) != 0) {
      return i;
    }
  }
  return -1;
}

}  // namespace clusterkv::cache_service
