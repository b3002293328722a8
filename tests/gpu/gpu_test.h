// The little that the GPU tests need of a test framework, and device memory with guard bands.
//
// A test is a function registered with GPU_TEST(name); EXPECT-like macros count failures and go on.
// Built with nvcc or against tests/gpu/emulator, linked with nothing but the C++ library.
#ifndef CLUSTERKV_TESTS_GPU_GPU_TEST_H_
#define CLUSTERKV_TESTS_GPU_GPU_TEST_H_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace clusterkv::gpu_test {

struct Registry {
  std::vector<std::pair<std::string, std::function<void()>>> tests;
  std::string cases;  // folder of the case files
  std::string filter;
  int failures = 0;
  static Registry& Get() {
    static Registry registry;
    return registry;
  }
};

struct Registrar {
  Registrar(const char* name, void (*test)()) { Registry::Get().tests.emplace_back(name, test); }
};

#define GPU_TEST(name)                                                   \
  static void name();                                                    \
  static ::clusterkv::gpu_test::Registrar name##_registrar(#name, name); \
  static void name()

#define GPU_CHECK(condition) \
  if (condition) {           \
  } else                     \
    ::clusterkv::gpu_test::Failure(), std::cerr << __FILE__ << ":" << __LINE__ << " " #condition " "

#define GPU_OK(expr)                                                                              \
  do {                                                                                            \
    const cudaError_t gpu_error = (expr);                                                         \
    if (gpu_error != cudaSuccess) {                                                               \
      std::cerr << __FILE__ << ":" << __LINE__ << " " #expr ": " << cudaGetErrorString(gpu_error) \
                << std::endl;                                                                     \
      std::abort();                                                                               \
    }                                                                                             \
  } while (false)

inline void Failure() { ++Registry::Get().failures; }

// An array in device memory with 256 poisoned bytes before and after it. `count` elements, poisoned
// with 0xff (NaN, -1) where nothing is put.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) { Allocate(); }
  explicit DeviceArray(const std::vector<T>& data) : count_(data.size()) {
    Allocate();
    if (count_ > 0) {
      GPU_OK(cudaMemcpy(data_, data.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
  }
  DeviceArray(DeviceArray&& other) noexcept
      : raw_(std::exchange(other.raw_, nullptr)), data_(other.data_), count_(other.count_) {}
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() {
    if (raw_ != nullptr) cudaFree(raw_);
  }

  T* data() const { return data_; }
  size_t size() const { return count_; }
  // Waits for the device.
  std::vector<T> Host() const {
    GPU_OK(cudaDeviceSynchronize());
    std::vector<T> out(count_);
    if (count_ > 0) {
      GPU_OK(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    }
    return out;
  }
  // False if a kernel wrote outside.
  bool GuardsHold() const {
    GPU_OK(cudaDeviceSynchronize());
    unsigned char guards[2 * kGuard];
    const size_t bytes = count_ * sizeof(T);
    GPU_OK(cudaMemcpy(guards, raw_, kGuard, cudaMemcpyDeviceToHost));
    GPU_OK(cudaMemcpy(guards + kGuard, raw_ + kGuard + bytes, kGuard, cudaMemcpyDeviceToHost));
    for (unsigned char guard : guards) {
      if (guard != 0xff) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 256;
  void Allocate() {
    const size_t bytes = count_ * sizeof(T) + 2 * kGuard;
    GPU_OK(cudaMalloc(&raw_, bytes));
    GPU_OK(cudaMemset(raw_, 0xff, bytes));
    data_ = reinterpret_cast<T*>(raw_ + kGuard);
  }
  unsigned char* raw_ = nullptr;
  T* data_ = nullptr;
  size_t count_ = 0;
};

// The Frobenius norm of a - b over that of b; 0 for equal zeros; NaN stays NaN.
inline double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    size += double{b[i]} * b[i];
  }
  if (difference == 0) return 0;
  return std::sqrt(difference / std::max(size, 1e-300));
}

// Runs the tests: [--cases=DIR] [--filter=SUBSTRING].
inline int RunTests(int argc, char** argv) {
  Registry& registry = Registry::Get();
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg.rfind("--cases=", 0) == 0) registry.cases = arg.substr(8);
    if (arg.rfind("--filter=", 0) == 0) registry.filter = arg.substr(9);
  }
  int run = 0;
  for (const auto& [name, test] : registry.tests) {
    if (name.find(registry.filter) == std::string::npos) continue;
    const int before = registry.failures;
    test();
    ++run;
    std::cout << (registry.failures == before ? "ok      " : "FAILED  ") << name << std::endl;
  }
  std::cout << run << " tests, " << registry.failures << " failures" << std::endl;
  return registry.failures == 0 && run > 0 ? 0 : 1;
}

}  // namespace clusterkv::gpu_test

#endif  // CLUSTERKV_TESTS_GPU_GPU_TEST_H_
