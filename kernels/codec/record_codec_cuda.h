// Record codecs (record_codec.h) on a GPU: the same bytes as RecordCodec::Encode, the same floats
// as RecordCodec::Decode.
#ifndef CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_CUDA_H_
#define CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_CUDA_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/base/element_type.h"
#include "kernels/codec/record_format.h"

namespace clusterkv::kernels {

struct RecordCodecCudaParams {
  RecordFormat format = RecordFormat::kRaw;
  ElementType element_type = ElementType::kBFloat16;
  int32_t head_dim = 0;  // a multiple of 16, 16 to 512
};

// Rows [head_dim] of the element type in device memory: row i at rows + i * stride_bytes; both are
// multiples of 16.
struct DeviceRows {
  const unsigned char* rows = nullptr;
  int64_t stride_bytes = 0;
};

// Encodes `count` tokens to records [count, RecordFormatBytes()], aligned to 16 (raw) or 8 bytes.
// Asynchronous on `stream`; may be captured in a graph. Inputs are finite. Errors:
// cudaErrorInvalidValue for parameters out of the ranges above; whatever the launch reports.
cudaError_t LaunchEncodeRecords(const RecordCodecCudaParams& params, const DeviceRows& keys,
                                const DeviceRows& values, int64_t count, unsigned char* records,
                                cudaStream_t stream);

// Decodes records slots[i] (null: i), i in [0, count), to keys and values [count, head_dim],
// aligned to 16. Otherwise as above.
cudaError_t LaunchDecodeRecords(const RecordCodecCudaParams& params, const unsigned char* records,
                                const int32_t* slots, int64_t count, float* keys, float* values,
                                cudaStream_t stream);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_CODEC_RECORD_CODEC_CUDA_H_
