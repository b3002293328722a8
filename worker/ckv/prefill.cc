#include "worker/ckv/prefill.h"

#include <algorithm>

#include "kernels/base/status_macros.h"

namespace clusterkv::worker::ckv {
namespace {

constexpr int64_t kPieceBytes = 16 << 20;  // K and V together

}  // namespace

absl::Status PutPrompt(PrefillWriter* writer, int64_t index, const TraceLayer& layer,
                       int64_t tokens) {
  const int64_t token_bytes =
      layer.shape.kv_heads * layer.shape.head_dim * kernels::ElementBytes(layer.shape.element_type);
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / (2 * token_bytes));
  const auto keys = absl::MakeConstSpan(layer.keys);
  const auto values = absl::MakeConstSpan(layer.values);
  absl::Span<const float> query_rms = layer.query_rms;
  for (int64_t first = 0; first < tokens; first += piece) {
    const int64_t count = std::min(piece, tokens - first);
    const int64_t at = first * token_bytes, bytes = count * token_bytes;
    CKV_RETURN_IF_ERROR(writer->WaitForRoom(2 * bytes));
    CKV_RETURN_IF_ERROR(writer->Put(index, first, count, keys.subspan(at, bytes),
                                    values.subspan(at, bytes), query_rms));
    query_rms = {};  // once per layer
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::worker::ckv
