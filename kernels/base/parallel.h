// How a kernel borrows threads: it is handed a ParallelFor and never makes threads of its own.
#ifndef CLUSTERKV_KERNELS_BASE_PARALLEL_H_
#define CLUSTERKV_KERNELS_BASE_PARALLEL_H_

#include <cstdint>

#include "absl/functional/function_ref.h"

namespace clusterkv::kernels {

// Calls task(i) once for every i in [0, count), in any order, on any threads, and returns when all
// are done. Kernels give the same bits for every implementation: no result depends on which thread
// ran what. A task may call the same ParallelFor again.
using ParallelFor =
    absl::FunctionRef<void(int64_t count, absl::FunctionRef<void(int64_t index)> task)>;

// Runs everything on the calling thread, in order.
inline void SerialFor(int64_t count, absl::FunctionRef<void(int64_t index)> task) {
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_PARALLEL_H_
