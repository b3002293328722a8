#include "worker/kv_chunks.h"

#include <xxhash.h>

#include <algorithm>
#include <memory>

#include "kernels/base/check.h"

namespace clusterkv::worker {

void SetStatistics(int64_t layer, absl::Span<const float> query_rms,
                   v1::LayerStatistics* statistics) {
  statistics->set_layer(static_cast<uint32_t>(layer));
  statistics->mutable_query_rms()->set_type(v1::ELEMENT_TYPE_FLOAT32);
  statistics->mutable_query_rms()->set_data(query_rms.data(), query_rms.size() * sizeof(float));
}

std::vector<v1::PutKvRequest> CutIntoChunks(const KvRows& rows, int64_t chunk_bytes) {
  CKV_CHECK(rows.tokens >= 1 && rows.keys.size() == rows.values.size() &&
            rows.keys.size() % static_cast<size_t>(rows.tokens) == 0)
      << rows.tokens << " " << rows.keys.size() << " " << rows.values.size();
  std::vector<v1::PutKvRequest> requests;
  if (!rows.query_rms.empty()) {
    SetStatistics(rows.layer, rows.query_rms, requests.emplace_back().mutable_statistics());
  }
  const int64_t row_bytes = static_cast<int64_t>(rows.keys.size()) / rows.tokens;
  const int64_t step = std::max<int64_t>(1, chunk_bytes / std::max<int64_t>(1, 2 * row_bytes));
  for (int64_t begin = 0; begin < rows.tokens; begin += step) {
    const int64_t tokens = std::min(step, rows.tokens - begin);
    v1::KvChunk& chunk = *requests.emplace_back().mutable_chunk();
    chunk.set_layer(static_cast<uint32_t>(rows.layer));
    chunk.set_first_token(static_cast<uint32_t>(rows.first_token + begin));
    chunk.set_tokens(static_cast<uint32_t>(tokens));
    chunk.set_keys(rows.keys.data() + begin * row_bytes, static_cast<size_t>(tokens * row_bytes));
    chunk.set_values(rows.values.data() + begin * row_bytes,
                     static_cast<size_t>(tokens * row_bytes));
  }
  return requests;
}

uint64_t ChunkChecksum(const v1::KvChunk& chunk) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       &XXH3_freeState);
  XXH3_64bits_reset(state.get());
  XXH3_64bits_update(state.get(), chunk.keys().data(), chunk.keys().size());
  XXH3_64bits_update(state.get(), chunk.values().data(), chunk.values().size());
  return XXH3_64bits_digest(state.get());
}

}  // namespace clusterkv::worker
