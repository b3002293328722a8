// Ends a benchmark at the first call of CUDA's runtime that fails.
#ifndef CLUSTERKV_TESTS_GPU_BENCH_BENCH_OK_H_
#define CLUSTERKV_TESTS_GPU_BENCH_BENCH_OK_H_

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define BENCH_OK(expr)                                                          \
  do {                                                                          \
    if (const cudaError_t bench_error = (expr); bench_error != cudaSuccess) {   \
      std::fprintf(stderr, "%s: %s\n", #expr, cudaGetErrorString(bench_error)); \
      std::abort();                                                             \
    }                                                                           \
  } while (false)

#endif  // CLUSTERKV_TESTS_GPU_BENCH_BENCH_OK_H_
