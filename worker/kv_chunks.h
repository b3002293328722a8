// Cuts a run of tokens of one layer into messages of PutKv.
#ifndef CLUSTERKV_WORKER_KV_CHUNKS_H_
#define CLUSTERKV_WORKER_KV_CHUNKS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "clusterkv/v1/cache_service.pb.h"

namespace clusterkv::worker {

struct KvRows {
  int64_t layer = 0;
  int64_t first_token = 0;
  int64_t tokens = 0;
  absl::Span<const std::byte> keys, values;  // [tokens, kv_heads, head_dim]
  absl::Span<const float> query_rms;         // [kv_heads, head_dim], or empty
};

// query_rms [kv_heads, head_dim] of a layer as messages carry it.
void SetStatistics(int64_t layer, absl::Span<const float> query_rms,
                   v1::LayerStatistics* statistics);

// Statistics first (the layer's last chunk may complete it), then chunks of at most chunk_bytes of
// K and V together, at least one token each, in token order. The rows are copied; checksums are
// left at 0. REQUIRES: tokens >= 1; keys and values of equal size, a multiple of tokens.
std::vector<v1::PutKvRequest> CutIntoChunks(const KvRows& rows, int64_t chunk_bytes);

// XXH3-64 of keys then values.
uint64_t ChunkChecksum(const v1::KvChunk& chunk);

}  // namespace clusterkv::worker

#endif  // CLUSTERKV_WORKER_KV_CHUNKS_H_
