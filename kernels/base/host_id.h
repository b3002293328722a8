// What processes on one host have in common.
#ifndef CLUSTERKV_KERNELS_BASE_HOST_ID_H_
#define CLUSTERKV_KERNELS_BASE_HOST_ID_H_

#include <string>

namespace clusterkv::kernels {

// The boot id of the host's kernel, the same in all its containers. Empty where it is not told.
std::string HostId();

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_BASE_HOST_ID_H_
