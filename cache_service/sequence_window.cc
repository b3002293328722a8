// How the prompt's bytes come into a sequence from a worker's window: by the device, past the host.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "cache_service/sequence.h"
#include "kernels/base/status_macros.h"
#include "kernels/ingest/rows_hash.h"

namespace clusterkv::cache_service {
namespace {

// Offsets in the window: kernels read 16 bytes at a time.
constexpr int64_t kOffsetUnit = 16;

absl::Status CheckOffset(std::string_view field, int64_t offset, int64_t bytes,
                         const RowWindow& window) {
  if (offset >= 0 && offset % kOffsetUnit == 0 && bytes <= window.bytes() &&
      offset <= window.bytes() - bytes) {
    return absl::OkStatus();
  }
  return FieldError(v1::INVALID_FIELD, field,
                    absl::StrCat("a multiple of ", kOffsetUnit, " with ", bytes,
                                 " bytes behind it in a window of ", window.bytes()),
                    absl::StrCat(offset));
}

}  // namespace

absl::Status Sequence::PutWindow(const WindowChunkView& chunk) {
  const CallCounter::Scope scope(services_.calls);
  CKV_RETURN_IF_ERROR(CheckLayer(chunk.layer));
  CKV_RETURN_IF_ERROR(CheckTokens(chunk.first_token, chunk.tokens));
  const int64_t bytes = chunk.tokens * row_bytes();
  CKV_RETURN_IF_ERROR(CheckOffset("keys_offset", chunk.keys_offset, bytes, *chunk.window));
  CKV_RETURN_IF_ERROR(CheckOffset("values_offset", chunk.values_offset, bytes, *chunk.window));
  CKV_RETURN_IF_ERROR(EnsureStaging(chunk.layer));
  const TokenSpan span{chunk.first_token, chunk.first_token + chunk.tokens};
  CKV_ASSIGN_OR_RETURN(const Claim claim, ClaimChunk(chunk.layer, span, /*by_window=*/true));
  if (claim.stored.on_device && claim.present.empty()) {
    ChunkHash hash;
    absl::Status status = TakeWindow(chunk, span, claim.stored, &hash);
    CommitChunk(chunk.layer, span, status.ok() ? std::make_optional(hash) : std::nullopt);
    return status;
  }
  // What is to be compared, and a layer that lies in host memory, want the bytes there.
  CommitChunk(chunk.layer, span, std::nullopt);
  std::string keys(static_cast<size_t>(bytes), 0), values(keys);
  if (!chunk.window->Read(WindowChunkOf(chunk), keys.data(), values.data()).ok()) {
    return DeviceLost();
  }
  if (const uint64_t hash = kernels::RowsHash(keys.data(), values.data(), keys.size());
      chunk.checksum != 0 && chunk.checksum != hash) {
    return ChecksumMismatch("checksum", chunk.layer, hash, chunk.checksum);
  }
  return PutChunk({chunk.layer, chunk.first_token, chunk.tokens, keys, values, 0});
}

WindowChunk Sequence::WindowChunkOf(const WindowChunkView& chunk) const {
  return {chunk.keys_offset, chunk.values_offset, chunk.tokens, row_bytes(),
          params_.shape.element_type};
}

absl::Status Sequence::TakeWindow(const WindowChunkView& chunk, TokenSpan span,
                                  const StoredRows& stored, ChunkHash* hash) const {
  std::vector<PagedRun> runs;
  for (const RowsRun& run : RunsOf(stored, span)) runs.push_back(run.paged());
  if (!services_.device->healthy()) return DeviceLost();
  const absl::StatusOr<TakenChunk> taken = chunk.window->Take(WindowChunkOf(chunk), runs);
  if (!taken.ok()) return DeviceLost();
  if (taken->bad_key >= 0) return NonFinite(chunk.layer, span, "keys", taken->bad_key);
  if (taken->bad_value >= 0) return NonFinite(chunk.layer, span, "values", taken->bad_value);
  if (chunk.checksum != 0 && chunk.checksum != taken->hash) {
    return ChecksumMismatch("checksum", chunk.layer, taken->hash, chunk.checksum);
  }
  *hash = {taken->hash, /*by_window=*/true};
  return absl::OkStatus();
}

}  // namespace clusterkv::cache_service
