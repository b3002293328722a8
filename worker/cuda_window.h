// A record window (record_window.h) on a CUDA GPU.
#ifndef CLUSTERKV_WORKER_CUDA_WINDOW_H_
#define CLUSTERKV_WORKER_CUDA_WINDOW_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/record_window.h"

namespace clusterkv::worker {

// As WhyNoWindow and MakeRecordWindow, for GPU `ordinal` of those that this process sees.
std::string WhyNoCudaWindow(int ordinal, v1::Link link);
absl::StatusOr<std::unique_ptr<RecordWindow>> MakeCudaWindow(int ordinal,
                                                             const RecordWindow::Layout& layout);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_CUDA_WINDOW_H_
