// An index part of a case file in device memory.
#ifndef CLUSTERKV_TESTS_GPU_INDEX_ON_DEVICE_H_
#define CLUSTERKV_TESTS_GPU_INDEX_ON_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/index/index_view_cuda.h"
#include "kernels/select/select_cuda.h"
#include "tests/gpu/case_file.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {

struct IndexOnDevice {
  std::unique_ptr<DeviceArray<unsigned char>> arena;
  std::vector<DeviceArray<uint32_t>> pages;
  std::vector<kernels::DeviceIndexPart> host_parts;
  std::unique_ptr<DeviceArray<kernels::DeviceIndexPart>> parts;
  int32_t clusters = 0;

  // The arena as the case has it, or, with `empty`, poisoned.
  IndexOnDevice(const CaseFile& file, int part_count, bool empty = false) {
    const auto bytes = file.Get<unsigned char>("arena");
    arena = empty ? std::make_unique<DeviceArray<unsigned char>>(bytes.size())
                  : std::make_unique<DeviceArray<unsigned char>>(bytes);
    const int64_t page_bytes = file.Value<int64_t>("page_bytes");
    for (int p = 0; p < part_count; ++p) {
      const std::string prefix = "part" + std::to_string(p) + ".";
      const auto meta = file.Get<int64_t>(prefix + "meta");
      const auto arrays = file.Get<int64_t>(prefix + "arrays");
      pages.emplace_back(file.Get<uint32_t>(prefix + "pages"));
      kernels::DeviceIndexPart part;
      part.first_token = meta[0];
      part.tokens = static_cast<int32_t>(meta[1]);
      part.clusters = static_cast<int32_t>(meta[2]);
      part.first_cluster = clusters;
      clusters += part.clusters;
      kernels::DevicePagedView* views[] = {&part.centroids, &part.value_means, &part.cluster_begin,
                                           &part.positions, &part.slots,       &part.codes,
                                           &part.records,   &part.channels,    &part.remainders};
      const uint32_t* list = pages.back().data();
      for (int i = 0; i < 9; ++i) {
        const int64_t element_bytes = arrays[2 * i], size = arrays[2 * i + 1];
        if (element_bytes == 0) continue;
        *views[i] = kernels::MakeDevicePagedView(arena->data(), list, page_bytes, element_bytes);
        const int64_t per_page = page_bytes / element_bytes;
        list += (size + per_page - 1) / per_page;
      }
      host_parts.push_back(part);
    }
    parts = std::make_unique<DeviceArray<kernels::DeviceIndexPart>>(host_parts);
  }
};

// What a select of such a case is asked with.
inline kernels::SelectCudaParams SelectParamsOf(const CaseFile& file, const IndexOnDevice& index) {
  const auto shape = file.Get<int64_t>("shape");
  const auto given = file.Get<int64_t>("params");
  kernels::SelectCudaParams params;
  params.group = static_cast<int32_t>(shape[1]);
  params.head_dim = static_cast<int32_t>(shape[2]);
  params.element_type = static_cast<kernels::ElementType>(shape[3]);
  params.scale = file.Value<float>("scale");
  params.code_bits = static_cast<int32_t>(shape[5]);
  params.group_channels = static_cast<int32_t>(shape[6]);
  params.budget_tokens = static_cast<int32_t>(given[0]);
  params.scored_tokens = static_cast<int32_t>(given[1]);
  params.answer_scored = given[2] != 0;
  params.estimated_fraction = file.Value<float>("fraction");
  params.max_clusters = index.clusters;
  params.max_sinks = static_cast<int32_t>(shape[4]);
  return params;
}

}  // namespace clusterkv::gpu_test

#endif  // CLUSTERKV_TESTS_GPU_INDEX_ON_DEVICE_H_
