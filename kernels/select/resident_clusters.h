// How many thread-block clusters a device runs at once: for the launchers of this folder.
#ifndef CLUSTERKV_KERNELS_SELECT_RESIDENT_CLUSTERS_H_
#define CLUSTERKV_KERNELS_SELECT_RESIDENT_CLUSTERS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace clusterkv::kernels {

// Properties of the current device that a launch depends on.
struct DeviceLimits {
  int multiprocessors = 132;
  int64_t shared_bytes = 227 * 1024;
  bool clusters = true;
};
inline DeviceLimits ReadLimits() {
  DeviceLimits limits;
#ifndef CLUSTERKV_CUDA_EMULATOR
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return limits;
  if (cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) {
    limits.multiprocessors = value;
  }
  if (cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
      cudaSuccess) {
    limits.shared_bytes = value;
  }
  if (cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess) {
    limits.clusters = value >= 9;
  }
#endif
  return limits;
}

// What ResidentClusters was told of one kernel, by device and blocks: 0: not asked yet; else the
// number + 1.
struct KnownClusters {
  static constexpr int kDevices = 64, kSizes = 17;
  std::atomic<int> numbers[kDevices][kSizes] = {};
};

// How many clusters of `blocks` blocks of `threads` threads of `kernel` the device runs at once, a
// block per multiprocessor. Fewer than multiprocessors / blocks where a cluster does not fit what
// is left of a processing cluster: asking for one more than that doubles the time. Asked once per
// device and size.
inline int ResidentClusters(const DeviceLimits& limits, const void* kernel, int threads, int blocks,
                            KnownClusters& known) {
  const int ideal = limits.multiprocessors / blocks;
#ifdef CLUSTERKV_CUDA_EMULATOR
  (void)kernel;
  (void)threads;
  (void)known;
  return ideal;
#else
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= KnownClusters::kDevices ||
      blocks >= KnownClusters::kSizes) {
    return ideal;
  }
  std::atomic<int>& answer = known.numbers[device][blocks];
  if (const int number = answer.load(std::memory_order_relaxed); number > 0) return number - 1;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ideal * blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(limits.shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int number = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(limits.shared_bytes)) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&number, kernel, &config) != cudaSuccess) {
    (void)cudaGetLastError();  // it is no launch that failed
    number = ideal;
  }
  number = std::min(number, ideal);
  answer.store(number + 1, std::memory_order_relaxed);
  return number;
#endif
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_SELECT_RESIDENT_CLUSTERS_H_
