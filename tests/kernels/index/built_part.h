// Inputs and parts for tests of the index: everything in pages at random places of a poisoned
// arena.
#ifndef CLUSTERKV_TESTS_KERNELS_INDEX_BUILT_PART_H_
#define CLUSTERKV_TESTS_KERNELS_INDEX_BUILT_PART_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/base/paged.h"
#include "kernels/index/index.h"

namespace clusterkv::kernels {

constexpr std::byte kPoison{0xA5};

// Pages of an arena with spare ones in between that nobody owns.
class TestPages {
 public:
  TestPages(int64_t pages, int64_t page_bytes, uint32_t seed)
      : page_bytes_(page_bytes), arena_((2 * pages + 1) * page_bytes, kPoison) {
    std::vector<uint32_t> all(2 * pages + 1);
    std::iota(all.begin(), all.end(), 0u);
    std::shuffle(all.begin(), all.end(), std::mt19937(seed));
    pages_.assign(all.begin(), all.begin() + pages);
  }

  std::byte* base() { return arena_.data(); }
  const uint32_t* pages() const { return pages_.data(); }
  int64_t page_bytes() const { return page_bytes_; }

  // True if the spare pages are as they were, and the tails of the views' pages too.
  template <typename Views>
  bool OnlyElementsWereWritten(const Views& views) const {
    std::vector<bool> element(arena_.size(), false);
    for (const PagedView& view : views) {
      ForEachRun(view, 0, view.size, [&](const std::byte* run, int64_t, int64_t count) {
        const int64_t at = run - arena_.data();
        std::fill_n(element.begin() + at, count * view.element_bytes, true);
      });
    }
    for (size_t i = 0; i < arena_.size(); ++i) {
      if (!element[i] && arena_[i] != kPoison) return false;
    }
    return true;
  }

 private:
  int64_t page_bytes_;
  std::vector<std::byte> arena_;
  std::vector<uint32_t> pages_;
};

// Keys or values, [tokens, kv_heads, head_dim], in pages.
class TestRows {
 public:
  TestRows(const KvShape& shape, const std::vector<float>& rows, int64_t page_rows, uint32_t seed)
      : row_bytes_(shape.kv_heads * shape.head_dim * ElementBytes(shape.element_type)),
        tokens_(rows.size() / (shape.kv_heads * shape.head_dim)),
        pages_((tokens_ + page_rows - 1) / page_rows, page_rows * row_bytes_ + 32, seed) {
    const auto view =
        MakePagedView(pages_.base(), pages_.pages(), pages_.page_bytes(), row_bytes_, tokens_);
    for (int64_t t = 0; t < tokens_; ++t) {
      const int64_t row = shape.kv_heads * shape.head_dim;
      for (int64_t i = 0; i < row; ++i) {
        StoreElement(rows[t * row + i], view.At(t) + i * ElementBytes(shape.element_type),
                     shape.element_type);
      }
    }
    view_ = view;
  }
  TestRows(const TestRows&) = delete;
  const PagedView& view() const { return view_; }

 private:
  int64_t row_bytes_, tokens_;
  TestPages pages_;
  PagedView view_;
};

// Room for a part, not built yet.
class TestPart {
 public:
  TestPart(const KvShape& shape, const IndexParams& params, const RecordCodec& codec,
           int64_t first_token, int64_t tokens, int64_t page_bytes, uint32_t seed)
      : layout_(MakeIndexLayout(shape, params, codec, tokens)),
        pages_(layout_.Pages(page_bytes), page_bytes, seed),
        view_(MakeIndexPartView(layout_, shape, params, first_token, tokens, pages_.base(),
                                pages_.pages(), page_bytes)) {}
  TestPart(const TestPart&) = delete;
  const MutableIndexPartView& view() const { return view_; }
  std::vector<PagedView> arrays() const {
    return {view_.centroids, view_.value_means, view_.cluster_begin, view_.positions, view_.slots,
            view_.codes,     view_.records,     view_.channels,      view_.remainders};
  }
  bool OnlyElementsWereWritten() const { return pages_.OnlyElementsWereWritten(arrays()); }

 private:
  IndexLayout layout_;
  TestPages pages_;
  MutableIndexPartView view_;
};

// The bytes of an array in logical order.
inline std::vector<std::byte> Bytes(const PagedView& view) {
  std::vector<std::byte> bytes;
  ForEachRun(view, 0, view.size, [&](const std::byte* run, int64_t, int64_t count) {
    bytes.insert(bytes.end(), run, run + count * view.element_bytes);
  });
  return bytes;
}

template <typename T>
std::vector<T> Elements(const PagedView& view) {
  const std::vector<std::byte> bytes = Bytes(view);
  std::vector<T> elements(bytes.size() / sizeof(T));
  std::memcpy(elements.data(), bytes.data(), bytes.size());
  return elements;
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_TESTS_KERNELS_INDEX_BUILT_PART_H_
