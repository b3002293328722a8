// Which layout of windows, lines and directory the two ends of a link speak (windows.h, lines.cuh).
#ifndef CLUSTERKV_KERNELS_RESIDENT_LAYOUT_VERSION_H_
#define CLUSTERKV_KERNELS_RESIDENT_LAYOUT_VERSION_H_

#include <cstdint>

namespace clusterkv::kernels {

// Goes up whenever one end would misread the other. ConnectResidentRequest.layout_version.
constexpr uint32_t kResidentLayoutVersion = 1;

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_RESIDENT_LAYOUT_VERSION_H_
