// K and V of a run of tokens of one layer as they came, in pages: staging, sinks and windows.
//
// Row i is one token's [kv_heads, head_dim] of the element type; keys and values lie in arrays of
// their own. Rows are written once, through the views; who writes and who reads is the owner's
// business. Memory grows page by page up to max_rows, without moving a row or a view.
#ifndef CLUSTERKV_CACHE_SERVICE_PAGED_ROWS_H_
#define CLUSTERKV_CACHE_SERVICE_PAGED_ROWS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_service/arena.h"
#include "cache_service/memory_account.h"
#include "kernels/base/paged.h"

namespace clusterkv::cache_service {

class PagedRows {
 public:
  using AllocatePages = absl::FunctionRef<absl::StatusOr<PageBlock>(int64_t pages)>;

  // Holds nothing yet. REQUIRES: row_bytes <= page_bytes.
  PagedRows(std::shared_ptr<MemoryAccount> account, MemoryUse use, int64_t row_bytes,
            int64_t max_rows);
  // Frees the pages into the account.
  ~PagedRows();
  PagedRows(const PagedRows&) = delete;
  PagedRows& operator=(const PagedRows&) = delete;

  // Room for rows [0, rows). REQUIRES: rows <= max_rows; not sealed; one caller at a time.
  // Errors: those of allocate; nothing is changed then.
  absl::Status Grow(int64_t rows, AllocatePages allocate);
  // Pages that Grow(rows) would take.
  int64_t PagesToGrow(int64_t rows) const;
  // Contents are final: page checksums are recorded.
  void Seal();

  int64_t capacity() const { return capacity_.load(); }
  int64_t row_bytes() const { return row_bytes_; }
  MemoryUse use() const { return use_; }
  int64_t page_count() const { return page_count_.load(); }
  const std::vector<PageBlock>& blocks() const { return blocks_; }

  // Views of the first `rows` rows. They stay valid while Grow adds others.
  // REQUIRES: rows <= capacity().
  kernels::MutablePagedView Keys(int64_t rows) const;
  kernels::MutablePagedView Values(int64_t rows) const;

  // Copies packed rows [rows, row_bytes] to rows [first, first + rows).
  void Write(int64_t first, int64_t rows, const char* keys, const char* values);
  // The first of `rows` packed rows whose bytes differ from those at `first`, or -1.
  int64_t FirstDifference(int64_t first, int64_t rows, const char* keys, const char* values) const;

 private:
  const std::shared_ptr<MemoryAccount> account_;
  const MemoryUse use_;
  const int64_t row_bytes_, max_rows_;
  std::atomic<int64_t> capacity_{0}, page_count_{0};  // read while another thread grows
  std::vector<PageBlock> blocks_;
  std::vector<uint32_t> key_pages_, value_pages_;  // reserved for max_rows: they never move
};

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_PAGED_ROWS_H_
