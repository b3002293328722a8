// Record codecs: a unit of lanes (record_codec.cuh) per half of a record, halves beside each other.
#include "kernels/codec/record_codec.cuh"
#include "kernels/codec/record_codec_cuda.h"

namespace clusterkv::kernels {
namespace {

using namespace cuda;  // NOLINT: device helpers

constexpr int kThreads = 256;

// The half of a record that this lane works on: unit `at.unit` of the warp; -1: none.
__device__ __forceinline__ int64_t HalfOfLane(const UnitLane& at, int64_t count) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t half = warp * at.per_warp + at.unit;
  return at.unit < at.per_warp && half < 2 * count ? half : -1;
}

template <RecordFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    EncodeKernel(const RecordCodecCudaParams p, const DeviceRows keys, const DeviceRows values,
                 int64_t count, int64_t record_bytes, unsigned char* records) {
  const UnitLane at(p.head_dim);
  const int64_t half = HalfOfLane(at, count);
  // Idle lanes take part in what is collective with a row of their own choice.
  const int64_t token = half < 0 ? 0 : half / 2;
  const DeviceRows& rows = half % 2 == 1 ? values : keys;
  RowBlock row;
  row.Load(rows.rows + token * rows.stride_bytes, p.element_type, at.block);
  EncodeRecordHalf<kFormat>(at, row, static_cast<int>(half & 1), p.element_type, p.head_dim,
                            half < 0 ? nullptr : records + token * record_bytes);
}

template <RecordFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    DecodeKernel(const RecordCodecCudaParams p, const unsigned char* records, const int32_t* slots,
                 int64_t count, int64_t record_bytes, float* keys, float* values) {
  const UnitLane at(p.head_dim);
  const int64_t half = HalfOfLane(at, count);
  if (half < 0) return;
  const int64_t token = half / 2;
  const int64_t slot = slots == nullptr ? token : slots[token];
  const unsigned char* record = records + slot * record_bytes;
  float x[kCodeBlock];
  if constexpr (kFormat == RecordFormat::kRaw) {
    RowBlock row;
    row.Load(record + half % 2 * p.head_dim * DeviceElementBytes(p.element_type), p.element_type,
             at.block);
    row.ToFloats(p.element_type, x);
  } else {
    const uint32_t meta = reinterpret_cast<const uint32_t*>(record)[half % 2];
    const float scale = HalfBitsToFloat(static_cast<uint16_t>(meta));
    const float zero = HalfBitsToFloat(static_cast<uint16_t>(meta >> 16));
    const unsigned char* codes = record + 8 + (half % 2 == 1 ? p.head_dim : 0);
    uint32_t words[4];
    const uint2* from =
        reinterpret_cast<const uint2*>(codes + (half % 2 == 1 ? 8 : kCodeBlock) * at.block);
    words[0] = from[0].x;
    words[1] = from[0].y;
    words[2] = half % 2 == 1 ? 0 : from[1].x;
    words[3] = half % 2 == 1 ? 0 : from[1].y;
#pragma unroll
    for (int i = 0; i < kCodeBlock; ++i) {
      const uint32_t code = half % 2 == 1 ? words[i % 2] >> (4 * (i / 2)) & 15u
                                          : words[i / 4] >> (8 * (i % 4)) & 255u;
      x[i] = __fadd_rn(__fmul_rn(static_cast<float>(code), scale), zero);
    }
  }
  float4* to = reinterpret_cast<float4*>((half % 2 == 1 ? values : keys) + token * p.head_dim +
                                         kCodeBlock * at.block);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

bool Valid(const RecordCodecCudaParams& p, int64_t count) {
  return p.head_dim >= 16 && p.head_dim <= 512 && p.head_dim % 16 == 0 && count >= 0 &&
         count < int64_t{1} << 31 &&
         (p.format == RecordFormat::kRaw || p.format == RecordFormat::kK8V4);
}

int64_t RecordBytes(const RecordCodecCudaParams& p) {
  return RecordFormatBytes(p.format, p.element_type, p.head_dim);
}

dim3 Grid(const RecordCodecCudaParams& p, int64_t count) {
  const int64_t per_block = kWarp / (p.head_dim / kCodeBlock) * (kThreads / kWarp);
  return dim3(static_cast<unsigned>((2 * count + per_block - 1) / per_block));
}

}  // namespace

cudaError_t LaunchEncodeRecords(const RecordCodecCudaParams& params, const DeviceRows& keys,
                                const DeviceRows& values, int64_t count, unsigned char* records,
                                cudaStream_t stream) {
  if (!Valid(params, count)) return cudaErrorInvalidValue;
  const auto kernel = params.format == RecordFormat::kRaw ? EncodeKernel<RecordFormat::kRaw>
                                                          : EncodeKernel<RecordFormat::kK8V4>;
  return cuda::Launch(kernel, Grid(params, count), dim3(kThreads), 0, 1, stream, params, keys,
                      values, count, RecordBytes(params), records);
}

cudaError_t LaunchDecodeRecords(const RecordCodecCudaParams& params, const unsigned char* records,
                                const int32_t* slots, int64_t count, float* keys, float* values,
                                cudaStream_t stream) {
  if (!Valid(params, count)) return cudaErrorInvalidValue;
  const auto kernel = params.format == RecordFormat::kRaw ? DecodeKernel<RecordFormat::kRaw>
                                                          : DecodeKernel<RecordFormat::kK8V4>;
  return cuda::Launch(kernel, Grid(params, count), dim3(kThreads), 0, 1, stream, params, records,
                      slots, count, RecordBytes(params), keys, values);
}

}  // namespace clusterkv::kernels
