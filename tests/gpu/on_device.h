// Bytes of a test in device memory and back.
#ifndef CLUSTERKV_TESTS_GPU_ON_DEVICE_H_
#define CLUSTERKV_TESTS_GPU_ON_DEVICE_H_

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "kernels/runtime/device.h"

namespace clusterkv::worker {

inline kernels::DeviceBuffer OnDevice(const void* bytes, size_t count, int device = 0) {
  auto buffer = kernels::DeviceBuffer::Create(device, static_cast<int64_t>(count));
  EXPECT_TRUE(buffer.ok()) << buffer.status();
  const kernels::ScopedDevice scoped(device);
  EXPECT_EQ(cudaMemcpy(buffer->data(), bytes, count, cudaMemcpyHostToDevice), cudaSuccess);
  // From pageable memory a copy may still be on its way, and other streams do not wait for it.
  EXPECT_EQ(cudaStreamSynchronize(nullptr), cudaSuccess);
  return std::move(*buffer);
}
inline kernels::DeviceBuffer OnDevice(absl::Span<const std::byte> bytes) {
  return OnDevice(bytes.data(), bytes.size());
}

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_TESTS_GPU_ON_DEVICE_H_
