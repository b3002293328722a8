// Launches answer_pair.cuh for a batch: LaunchSelect's way for the usual shape.
#ifndef CLUSTERKV_KERNELS_SELECT_ANSWER_CUDA_H_
#define CLUSTERKV_KERNELS_SELECT_ANSWER_CUDA_H_

#include "kernels/select/select_cuda.h"

namespace clusterkv::kernels {

// Bytes of LaunchAnswer's workspace.
int64_t AnswerWorkspaceBytes(const SelectCudaParams& params, int32_t pairs);

// As LaunchSelect, which calls it first. False where the shape is not a usual one or
// params.general asks for the other kernel: nothing is launched then.
bool LaunchAnswer(const SelectCudaParams& params, const SelectCudaPair* pairs, int32_t pair_count,
                  const SelectCudaOutput& output, void* workspace, cudaStream_t stream,
                  cudaError_t* error);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_SELECT_ANSWER_CUDA_H_
