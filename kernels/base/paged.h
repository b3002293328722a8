// Arrays that lie in pages of an arena: the one addressing of everything the service stores.
//
// Element i lies at base + pages[i / elements_per_page] * page_bytes + (i % elements_per_page) *
// element_bytes. Elements never straddle pages; a page's tail that holds no whole element is
// unused. A view owns nothing: arena and page list must outlive it. Views are values, safe to share
// between threads as long as nobody writes.
#ifndef CLUSTERKV_KERNELS_BASE_PAGED_H_
#define CLUSTERKV_KERNELS_BASE_PAGED_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/base/check.h"

namespace clusterkv::kernels {

template <typename Byte>  // std::byte or const std::byte
struct BasicPagedView {
  Byte* base = nullptr;             // start of the arena
  const uint32_t* pages = nullptr;  // [ceil(size / elements_per_page)] page numbers in the arena
  int64_t page_bytes = 0;
  int64_t element_bytes = 0;
  int64_t elements_per_page = 0;  // page_bytes / element_bytes, at least 1
  int64_t size = 0;               // elements

  Byte* At(int64_t index) const {
    const int64_t page = index / elements_per_page;
    return base + static_cast<int64_t>(pages[page]) * page_bytes +
           (index - page * elements_per_page) * element_bytes;
  }
  template <typename T>
  auto* As(int64_t index) const {
    using Pointer = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    return reinterpret_cast<Pointer*>(At(index));
  }
  // NOLINTNEXTLINE(google-explicit-constructor): as a pointer to non-const becomes one to const.
  operator BasicPagedView<const std::byte>() const {  // NOLINT(google-explicit-constructor)
    return {base, pages, page_bytes, element_bytes, elements_per_page, size};
  }
};

using PagedView = BasicPagedView<const std::byte>;
using MutablePagedView = BasicPagedView<std::byte>;

// Pages that `size` elements of `element_bytes` take. REQUIRES: 0 < element_bytes <= page_bytes.
inline int64_t PagesFor(int64_t size, int64_t element_bytes, int64_t page_bytes) {
  CKV_CHECK(element_bytes > 0 && element_bytes <= page_bytes) << element_bytes << " " << page_bytes;
  const int64_t per_page = page_bytes / element_bytes;
  return (size + per_page - 1) / per_page;
}

// A view of `size` elements over pages[0 .. PagesFor(size, ...)).
template <typename Byte>
BasicPagedView<Byte> MakePagedView(Byte* base, const uint32_t* pages, int64_t page_bytes,
                                   int64_t element_bytes, int64_t size) {
  CKV_CHECK(element_bytes > 0 && element_bytes <= page_bytes) << element_bytes << " " << page_bytes;
  return {base, pages, page_bytes, element_bytes, page_bytes / element_bytes, size};
}

// Calls f(pointer, first, count) for each run of elements of [begin, end) that lies in one page.
template <typename Byte, typename F>
void ForEachRun(const BasicPagedView<Byte>& view, int64_t begin, int64_t end, F&& f) {
  while (begin < end) {
    const int64_t in_page = view.elements_per_page - begin % view.elements_per_page;
    const int64_t count = std::min(in_page, end - begin);
    f(view.At(begin), begin, count);
    begin += count;
  }
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_PAGED_H_
