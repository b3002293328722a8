#include <cstring>
#include <iostream>
#include <random>
#include <vector>

#include "kernels/base/finite_cuda.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::ElementType;

constexpr int64_t kPageBytes = 4096;

// Rows of `elements` over pages in reverse order, all finite.
class Rows {
 public:
  Rows(ElementType type, int64_t elements, int64_t rows)
      : type_(type), elements_(elements), row_bytes_(elements * kernels::ElementBytes(type)) {
    per_page_ = kPageBytes / row_bytes_;
    const int64_t pages = (rows + per_page_ - 1) / per_page_;
    for (int64_t p = pages; p > 0; --p) pages_.push_back(static_cast<uint32_t>(p - 1));
    arena_.assign(pages * kPageBytes, 0xff);  // NaN where no row lies
    std::mt19937 generator(5);
    for (int64_t i = 0; i < rows * elements; ++i) {
      // Any bits but an exponent of ones.
      uint32_t bits = static_cast<uint32_t>(generator());
      if ((bits & Exponent()) == Exponent()) bits ^= Exponent() & (0u - Exponent());
      Set(i, bits);
    }
  }
  uint32_t Exponent() const {
    return type_ == ElementType::kFloat32   ? 0x7f800000u
           : type_ == ElementType::kFloat16 ? 0x7c00u
                                            : 0x7f80u;
  }
  void Set(int64_t element, uint32_t bits) {
    const int64_t row = element / elements_, bytes = kernels::ElementBytes(type_);
    const int64_t at = pages_[row / per_page_] * kPageBytes + row % per_page_ * row_bytes_ +
                       element % elements_ * bytes;
    std::memcpy(&arena_[at], &bits, bytes);
  }
  // What is found in rows [first, first + count).
  int64_t Find(uint32_t first, int64_t count) const {
    DeviceArray<unsigned char> arena(arena_);
    DeviceArray<uint32_t> pages(pages_);
    DeviceArray<int64_t> found(1);
    const auto view =
        kernels::MakeDevicePagedView(arena.data(), pages.data(), kPageBytes, row_bytes_);
    GPU_OK(
        kernels::LaunchFindNonFinite(view, first, count, elements_, type_, found.data(), nullptr));
    return found.Host()[0];
  }

 private:
  ElementType type_;
  int64_t elements_, row_bytes_, per_page_;
  std::vector<uint32_t> pages_;
  std::vector<unsigned char> arena_;
};

void FindsTheFirst(ElementType type, int64_t elements, int64_t rows) {
  Rows clean(type, elements, rows);
  GPU_CHECK(clean.Find(0, rows) == kernels::kAllFinite) << "all are finite\n";
  GPU_CHECK(clean.Find(0, 0) == kernels::kAllFinite) << "there is none\n";
  const int64_t total = elements * rows;
  for (const int64_t bad : {int64_t{0}, int64_t{1}, elements - 1, elements, total / 2, total - 1}) {
    Rows marred = clean;
    // Infinity, and beyond it two NaNs.
    marred.Set(bad, marred.Exponent());
    if (bad + 1 < total) marred.Set(bad + 1, marred.Exponent() | 1u);
    marred.Set(total - 1, marred.Exponent());
    GPU_CHECK(marred.Find(0, rows) == bad) << bad << " is " << marred.Find(0, rows) << "\n";
    const int64_t row = bad / elements;
    GPU_CHECK(marred.Find(static_cast<uint32_t>(row), 1) == bad % elements) << bad << "\n";
  }
}

GPU_TEST(FiniteBFloat16) { FindsTheFirst(ElementType::kBFloat16, 128, 67); }
GPU_TEST(FiniteFloat16) { FindsTheFirst(ElementType::kFloat16, 8, 1000); }
GPU_TEST(FiniteFloat32) { FindsTheFirst(ElementType::kFloat32, 1024, 3); }

GPU_TEST(FiniteRefusesRowsOfOddBytes) {
  DeviceArray<int64_t> found(1);
  const kernels::DevicePagedView view;
  GPU_CHECK(kernels::LaunchFindNonFinite(view, 0, 1, 7, ElementType::kFloat16, found.data(),
                                         nullptr) == cudaErrorInvalidValue);
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
