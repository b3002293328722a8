// Paged arrays in device memory: PagedView's addressing for kernels.
#ifndef CLUSTERKV_KERNELS_BASE_PAGED_CUDA_H_
#define CLUSTERKV_KERNELS_BASE_PAGED_CUDA_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace clusterkv::kernels {

// As PagedView (paged.h), with `base` and `pages` in memory that the device reads, fewer than 2^31
// elements, and a division by multiplication: index / elements_per_page = (index * divide_factor)
// >> 32
// >> divide_shift.
struct DevicePagedView {
  unsigned char* base = nullptr;
  const uint32_t* pages = nullptr;  // [ceil(size / elements_per_page)]
  int64_t page_bytes = 0;
  uint32_t element_bytes = 0;
  uint32_t elements_per_page = 0;
  uint32_t divide_factor = 0;
  uint32_t divide_shift = 0;

  // Which of `pages` has element `index`.
  __host__ __device__ uint32_t PageOf(uint32_t index) const {
    return divide_factor == 0
               ? index >> divide_shift
               : static_cast<uint32_t>((static_cast<uint64_t>(index) * divide_factor) >> 32) >>
                     divide_shift;
  }
  __host__ __device__ unsigned char* At(uint32_t index) const {
    const uint32_t page = PageOf(index);
    return base + static_cast<int64_t>(pages[page]) * page_bytes +
           (index - page * elements_per_page) * static_cast<int64_t>(element_bytes);
  }
  template <typename T>
  __host__ __device__ T* As(uint32_t index) const {
    return reinterpret_cast<T*>(At(index));
  }
};

// Elements of `element_bytes` in pages of `page_bytes`: `base` the arena's start in device memory,
// `pages` page numbers in device memory. REQUIRES: 0 < element_bytes <= page_bytes < 2^31.
inline DevicePagedView MakeDevicePagedView(void* base, const uint32_t* pages, int64_t page_bytes,
                                           int64_t element_bytes) {
  DevicePagedView view;
  view.base = static_cast<unsigned char*>(base);
  view.pages = pages;
  view.page_bytes = page_bytes;
  view.element_bytes = static_cast<uint32_t>(element_bytes);
  const uint32_t per_page = static_cast<uint32_t>(page_bytes / element_bytes);
  view.elements_per_page = per_page;
  uint32_t log2 = 0;
  while ((uint64_t{1} << log2) < per_page) ++log2;
  if ((uint64_t{1} << log2) == per_page) {
    view.divide_shift = log2;
  } else {
    // Exact below 2^31: the factor is 2^(31 + log2) / per_page rounded up, and its error times 2^31
    // stays below 2^(31 + log2) / per_page (Granlund and Montgomery).
    const uint64_t power = uint64_t{1} << (31 + log2);
    view.divide_factor = static_cast<uint32_t>((power + per_page - 1) / per_page);
    view.divide_shift = log2 - 1;
  }
  return view;
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_PAGED_CUDA_H_
