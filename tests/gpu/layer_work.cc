#include "tests/gpu/layer_work.h"

#include <dlfcn.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/runtime/device.h"

#if __has_include(<cublas_v2.h>)
#include <cublas_v2.h>
#define CLUSTERKV_HAS_CUBLAS 1
#endif

namespace clusterkv {
namespace {

class Busy : public LayerWork {
 public:
  explicit Busy(int64_t nanoseconds) : nanoseconds_(nanoseconds) {}
  void Launch(int64_t /*layer*/, cudaStream_t stream) override {
    CKV_CHECK(LaunchBusy(nanoseconds_, stream) == cudaSuccess);
  }

 private:
  const int64_t nanoseconds_;
};

}  // namespace

std::unique_ptr<LayerWork> MakeBusy(int64_t nanoseconds) {
  return std::make_unique<Busy>(nanoseconds);
}

#ifdef CLUSTERKV_HAS_CUBLAS

namespace {

using kernels::DeviceBuffer;

struct Cublas {
  decltype(&::cublasCreate_v2) create = nullptr;
  decltype(&::cublasDestroy_v2) destroy = nullptr;
  decltype(&::cublasSetStream_v2) set_stream = nullptr;
  decltype(&::cublasSetWorkspace_v2) set_workspace = nullptr;
  // Spelt out: cuBLAS overloads it in C++.
  using Gemm = cublasStatus_t (*)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int,
                                  int, const void*, const void*, cudaDataType, int, const void*,
                                  cudaDataType, int, const void*, void*, cudaDataType, int,
                                  cublasComputeType_t, cublasGemmAlgo_t);
  Gemm gemm = nullptr;

  // False where there is none.
  bool Load() {
    void* library =
        dlopen(absl::StrCat("libcublas.so.", CUBLAS_VER_MAJOR).c_str(), RTLD_NOW | RTLD_LOCAL);
    return library != nullptr && Find(library, "cublasCreate_v2", &create) &&
           Find(library, "cublasDestroy_v2", &destroy) &&
           Find(library, "cublasSetStream_v2", &set_stream) &&
           Find(library, "cublasSetWorkspace_v2", &set_workspace) &&
           Find(library, "cublasGemmEx", &gemm);
  }

 private:
  template <typename Function>
  static bool Find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
  }
};

// Queries, keys and values; output; gate and up; down: inputs and outputs of each.
constexpr std::array<std::pair<int, int>, 4> kProducts = {
    {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}}};
constexpr int64_t kWidest = 28672, kWorkspaceBytes = 32 << 20;

class MatrixProducts : public LayerWork {
 public:
  MatrixProducts(const Cublas& cublas, int64_t layers, int64_t sequences)
      : cublas_(cublas), sequences_(static_cast<int>(sequences)) {
    CKV_CHECK(cublas_.create(&handle_) == CUBLAS_STATUS_SUCCESS);
    for (int64_t i = 0; i < layers * static_cast<int64_t>(kProducts.size()); ++i) {
      const auto [in, out] = kProducts[i % kProducts.size()];
      weights_.push_back(Filled(int64_t{2} * in * out));
    }
    for (DeviceBuffer& activations : activations_) {
      activations = Filled(2 * kWidest * sequences);
    }
    workspace_ = Filled(kWorkspaceBytes);
  }
  ~MatrixProducts() override { cublas_.destroy(handle_); }

  void Launch(int64_t layer, cudaStream_t stream) override {
    CKV_CHECK(cublas_.set_stream(handle_, stream) == CUBLAS_STATUS_SUCCESS);
    CKV_CHECK(cublas_.set_workspace(handle_, workspace_.data(), kWorkspaceBytes) ==
              CUBLAS_STATUS_SUCCESS);
    const float one = 1, zero = 0;
    for (size_t i = 0; i < kProducts.size(); ++i) {
      const auto [in, out] = kProducts[i];
      const DeviceBuffer& weights = weights_[layer * kProducts.size() + i];
      CKV_CHECK(cublas_.gemm(handle_, CUBLAS_OP_N, CUBLAS_OP_N, out, sequences_, in, &one,
                             weights.data(), CUDA_R_16BF, out, activations_[i % 2].data(),
                             CUDA_R_16BF, in, &zero, activations_[1 - i % 2].data(), CUDA_R_16BF,
                             out, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS);
    }
  }

 private:
  // Small numbers, not zeros, which take less power.
  static DeviceBuffer Filled(int64_t bytes) {
    int device = 0;
    CKV_CHECK(cudaGetDevice(&device) == cudaSuccess);
    absl::StatusOr<DeviceBuffer> buffer = DeviceBuffer::Create(device, bytes);
    CKV_CHECK(buffer.ok()) << buffer.status();
    CKV_CHECK(cudaMemset(buffer->data(), 0x3b, static_cast<size_t>(bytes)) == cudaSuccess);
    return *std::move(buffer);
  }

  const Cublas cublas_;
  const int sequences_;
  cublasHandle_t handle_ = nullptr;
  std::vector<DeviceBuffer> weights_;
  std::array<DeviceBuffer, 2> activations_;
  DeviceBuffer workspace_;
};

}  // namespace

std::unique_ptr<LayerWork> MakeMatrixProducts(int64_t layers, int64_t sequences) {
  Cublas cublas;
  if (!cublas.Load()) return nullptr;
  return std::make_unique<MatrixProducts>(cublas, layers, sequences);
}

#else

std::unique_ptr<LayerWork> MakeMatrixProducts(int64_t, int64_t) { return nullptr; }

#endif

}  // namespace clusterkv
