// What a model's GPU does between the attention of two layers: for resident_loop.
#ifndef CLUSTERKV_TESTS_GPU_LAYER_WORK_H_
#define CLUSTERKV_TESTS_GPU_LAYER_WORK_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

namespace clusterkv {

class LayerWork {
 public:
  virtual ~LayerWork() = default;
  // May be captured in a graph.
  virtual void Launch(int64_t layer, cudaStream_t stream) = 0;
};

// Llama-3.1-8B's matrix products of a layer for so many sequences, by cuBLAS, which is looked for
// when it is asked for. On the current device. Null: there is no cuBLAS.
std::unique_ptr<LayerWork> MakeMatrixProducts(int64_t layers, int64_t sequences);

// So long on one multiprocessor, which stands for work that takes as long and leaves the others to
// a second loop.
std::unique_ptr<LayerWork> MakeBusy(int64_t nanoseconds);

// One block that runs so long.
cudaError_t LaunchBusy(int64_t nanoseconds, cudaStream_t stream);

}  // namespace clusterkv

#endif  // CLUSTERKV_TESTS_GPU_LAYER_WORK_H_
