// "raw": the key's bytes, then the value's, as they came.
#include <cstring>

#include "kernels/codec/record_codec.h"

namespace clusterkv::kernels {
namespace {

class Raw final : public RecordCodec {
 public:
  std::string_view name() const override { return "raw"; }

  int64_t RecordBytes(ElementType type, int64_t head_dim) const override {
    return 2 * head_dim * ElementBytes(type);
  }

  void Encode(const std::byte* keys, int64_t key_stride_bytes, const std::byte* values,
              int64_t value_stride_bytes, ElementType type, int64_t head_dim, int64_t count,
              std::byte* records) const override {
    const int64_t row_bytes = head_dim * ElementBytes(type);
    for (int64_t i = 0; i < count; ++i) {
      std::byte* record = records + i * 2 * row_bytes;
      std::memcpy(record, keys + i * key_stride_bytes, row_bytes);
      std::memcpy(record + row_bytes, values + i * value_stride_bytes, row_bytes);
    }
  }

  void Decode(const std::byte* record, ElementType type, int64_t head_dim, float* key,
              float* value) const override {
    if (key != nullptr) ToFloat(record, type, head_dim, key);
    if (value == nullptr) return;
    ToFloat(record + head_dim * ElementBytes(type), type, head_dim, value);
  }

  bool lossless() const override { return true; }
};

}  // namespace

const RecordCodec* RawCodec() {
  static const Raw& codec = *new Raw;
  return &codec;
}

}  // namespace clusterkv::kernels
