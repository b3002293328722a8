// The record codecs that kernels on a GPU know, by number.
#ifndef CLUSTERKV_KERNELS_CODEC_RECORD_FORMAT_H_
#define CLUSTERKV_KERNELS_CODEC_RECORD_FORMAT_H_

#include <cstdint>

#include "kernels/base/element_type.h"

namespace clusterkv::kernels {

enum class RecordFormat : uint8_t { kRaw = 1, kK8V4 = 2 };

// As RecordCodec::RecordBytes of the codec of that name.
constexpr int64_t RecordFormatBytes(RecordFormat format, ElementType type, int64_t head_dim) {
  return format == RecordFormat::kK8V4 ? 8 + head_dim + head_dim / 2
                                       : 2 * head_dim * ElementBytes(type);
}

// Likewise of RecordCodec::RemainderBytes.
constexpr int64_t RemainderFormatBytes(RecordFormat format, int64_t head_dim) {
  return format == RecordFormat::kK8V4 ? head_dim / 2 : 0;
}

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_CODEC_RECORD_FORMAT_H_
