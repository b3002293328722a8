// How the prompt's bytes come into a sequence.
// The state of a streamed hash on the stack needs its size.
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cache_service/errors.h"
#include "cache_service/sequence.h"
#include "kernels/base/status_macros.h"
#include "kernels/ingest/rows_hash.h"

namespace clusterkv::cache_service {
namespace {

// Scattered chunks cost memory beside the arena; nobody sends so many pieces in good faith.
constexpr int64_t kMaxRanges = 16384;

absl::Status Conflict(int64_t layer, int64_t token, std::string_view why) {
  return Error(v1::CHUNK_CONFLICT,
               absl::StrCat("layer ", layer, ", token ", token, ": ", std::string(why)),
               {{"layer", absl::StrCat(layer)}, {"token", absl::StrCat(token)}});
}

constexpr std::string_view kOtherBytes = "put before, with other bytes";

}  // namespace

uint64_t Sequence::HashRows(std::string_view keys, std::string_view values) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, keys.data(), keys.size());
  XXH3_64bits_update(&state, values.data(), values.size());
  return XXH3_64bits_digest(&state);
}

Sequence::PackedRows Sequence::PackedRows::Sub(TokenSpan sub, int64_t row_bytes) const {
  const int64_t skip = (sub.begin - span.begin) * row_bytes;
  return {sub, keys + skip, values + skip};
}

// --- validation: what needs no lock

absl::Status Sequence::CheckFinite(int64_t layer, TokenSpan span, std::string_view rows,
                                   std::string_view field) const {
  const kernels::KvShape& shape = params_.shape;
  int64_t bad = 0;
  if (kernels::AllFinite(reinterpret_cast<const std::byte*>(rows.data()), shape.element_type,
                         span.size() * shape.kv_heads * shape.head_dim, &bad)) {
    return absl::OkStatus();
  }
  return NonFinite(layer, span, field, bad);
}

absl::Status Sequence::NonFinite(int64_t layer, TokenSpan span, std::string_view field,
                                 int64_t bad) const {
  const kernels::KvShape& shape = params_.shape;
  const int64_t channel = bad % shape.head_dim, head = bad / shape.head_dim % shape.kv_heads;
  const int64_t token = span.begin + bad / (shape.head_dim * shape.kv_heads);
  return Error(v1::NON_FINITE_KEY,
               absl::StrCat(std::string(field),
                            ": expected finite numbers, got NaN or infinity at "
                            "layer ",
                            layer, ", token ", token, ", KV head ", head, ", channel ", channel),
               {{"field", std::string(field)},
                {"layer", absl::StrCat(layer)},
                {"token", absl::StrCat(token)},
                {"head", absl::StrCat(head)},
                {"channel", absl::StrCat(channel)}});
}

absl::Status Sequence::CheckTokens(int64_t first_token, int64_t tokens) const {
  if (tokens >= 1 && first_token >= 0 && first_token <= params_.prompt_tokens - tokens) {
    return absl::OkStatus();
  }
  // Numbers of the caller's, whose sum may be none.
  int64_t end = 0;
  const bool ends = !__builtin_add_overflow(first_token, tokens, &end);
  return FieldError(v1::TOKENS_OUT_OF_RANGE, "tokens",
                    absl::StrCat("a range in [0, ", params_.prompt_tokens, ")"),
                    absl::StrCat("[", first_token, ", ",
                                 ends ? absl::StrCat(end) : std::string("2^63 or more"), ")"));
}

absl::Status Sequence::CheckRows(int64_t layer, TokenSpan span, std::string_view keys,
                                 std::string_view values) const {
  const int64_t expected = span.size() * row_bytes();
  for (const auto& [field, rows] : {std::pair("keys", keys), std::pair("values", values)}) {
    if (static_cast<int64_t>(rows.size()) == expected) continue;
    return FieldError(v1::SHAPE_MISMATCH, field,
                      absl::StrCat(expected, " bytes for ", span.size(), " tokens"),
                      absl::StrCat(rows.size()));
  }
  CKV_RETURN_IF_ERROR(CheckFinite(layer, span, keys, "keys"));
  return CheckFinite(layer, span, values, "values");
}

// --- memory

absl::StatusOr<PageBlock> Sequence::AllocateEvicting(MemoryUse use, int64_t pages) const {
  while (true) {
    absl::StatusOr<PageBlock> block = account_->Allocate(use, pages);
    if (block.ok() || ReasonOf(block.status()) != v1::ARENA_FULL) return block;
    if (!services_.room->EvictOne()) return block;
  }
}

absl::Status Sequence::EnsureStaging(int64_t layer_index) {
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return CopyOf(end_reason_);
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    if (layer.received.Covers(prompt()) || layer.sinks != nullptr || layer.staging != nullptr) {
      return absl::OkStatus();
    }
  }
  const auto make = [&](MemoryUse use, int64_t rows) -> absl::StatusOr<std::shared_ptr<PagedRows>> {
    if (rows == 0) return nullptr;
    auto paged = std::make_shared<PagedRows>(account_, use, row_bytes(), rows);
    const absl::Status status =
        paged->Grow(rows, [&](int64_t pages) { return AllocateEvicting(use, pages); });
    if (ReasonOf(status) == v1::ARENA_FULL) {
      return LimitError("staging", account_->arena()->ledger().free, paged->PagesToGrow(rows));
    }
    if (!status.ok()) return status;
    return paged;
  };
  CKV_ASSIGN_OR_RETURN(std::shared_ptr<PagedRows> sinks, make(MemoryUse::kParts, sink_tokens()));
  CKV_ASSIGN_OR_RETURN(std::shared_ptr<PagedRows> staging,
                       make(MemoryUse::kStaging, params_.prompt_tokens - sink_tokens()));
  absl::MutexLock lock(&mutex_);
  if (released()) return CopyOf(end_reason_);
  Layer& layer = layers_[static_cast<size_t>(layer_index)];
  if (layer.sinks != nullptr || layer.staging != nullptr || layer.received.Covers(prompt())) {
    return absl::OkStatus();  // another chunk of the layer was faster
  }
  layer.sinks = std::move(sinks);
  layer.staging = std::move(staging);
  return absl::OkStatus();
}

// --- chunks

absl::Status Sequence::PutChunk(const KvChunkView& chunk) {
  const CallCounter::Scope scope(services_.calls);
  CKV_RETURN_IF_ERROR(CheckLayer(chunk.layer));
  CKV_RETURN_IF_ERROR(CheckTokens(chunk.first_token, chunk.tokens));
  const TokenSpan span{chunk.first_token, chunk.first_token + chunk.tokens};
  CKV_RETURN_IF_ERROR(CheckRows(chunk.layer, span, chunk.keys, chunk.values));
  const uint64_t hash = HashRows(chunk.keys, chunk.values);
  if (chunk.checksum != 0 && chunk.checksum != hash) {
    return ChecksumMismatch("chunk.checksum", chunk.layer, hash, chunk.checksum);
  }
  CKV_RETURN_IF_ERROR(EnsureStaging(chunk.layer));

  CKV_ASSIGN_OR_RETURN(const Claim claim, ClaimChunk(chunk.layer, span, /*by_window=*/false));
  const PackedRows rows{span, chunk.keys.data(), chunk.values.data()};
  absl::Status status;
  if (claim.logged.has_value()) {
    if (!SameBytes(*claim.logged, hash, rows)) {
      status = Conflict(chunk.layer, span.begin, kOtherBytes);
    }
  } else {
    for (const TokenSpan& sub : claim.present) {
      status = CompareStored(chunk.layer, claim.stored, rows.Sub(sub, row_bytes()));
      if (!status.ok()) break;
    }
  }
  for (size_t i = 0; status.ok() && i < claim.missing.size(); ++i) {
    status = WriteRows(claim.stored, rows.Sub(claim.missing[i], row_bytes()));
  }
  CommitChunk(chunk.layer, span, status.ok() ? std::make_optional(ChunkHash{hash}) : std::nullopt);
  return status;
}

bool Sequence::SameBytes(const ChunkHash& logged, uint64_t hash, const PackedRows& rows) const {
  if (!logged.by_window) return logged.hash == hash;
  const auto bytes = static_cast<size_t>(rows.span.size() * row_bytes());
  return logged.hash == kernels::RowsHash(rows.keys, rows.values, bytes);
}

absl::StatusOr<Sequence::Claim> Sequence::ClaimChunk(int64_t layer_index, TokenSpan span,
                                                     bool by_window) {
  absl::MutexLock lock(&mutex_);
  // Who holds a claim on these tokens is copying them: microseconds.
  const auto unclaimed = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (released()) return true;
    const auto& claims = layers_[static_cast<size_t>(layer_index)].claims;
    return std::none_of(claims.begin(), claims.end(),
                        [&](const TokenSpan& claim) { return claim.Overlaps(span); });
  };
  mutex_.Await(absl::Condition(&unclaimed));
  if (released()) return CopyOf(end_reason_);
  Layer& layer = layers_[static_cast<size_t>(layer_index)];
  Claim claim;
  claim.present = layer.received.Present(span);
  claim.missing = layer.received.Missing(span);
  if (claim.missing.empty()) claim.logged = layer.log.Find(span);
  if (layer.received.ranges() + static_cast<int64_t>(layer.claims.size()) >= kMaxRanges &&
      !claim.missing.empty()) {
    return LimitError("ranges of a layer", kMaxRanges, kMaxRanges + 1);
  }
  int64_t claimed = 0;
  for (const TokenSpan& other : layer.claims) claimed += other.size();
  int64_t new_tokens = 0;
  for (const TokenSpan& sub : claim.missing) new_tokens += sub.size();
  const bool last =
      new_tokens > 0 && layer.received.tokens() + claimed + new_tokens >= params_.prompt_tokens;
  if (last && params_.metric_required && layer.query_rms.empty()) {
    return FieldError(v1::INVALID_FIELD, "statistics.query_rms",
                      "one before the layer's last chunk, for METRIC_BALANCED was asked for",
                      absl::StrCat("none for layer ", layer_index));
  }
  if (layer.received.tokens() == 0 && layer.claims.empty()) {
    layer.on_device = by_window && services_.device->healthy();
  }
  claim.stored = StoredLocked(layer);
  layer.claims.push_back(span);
  return claim;
}

void Sequence::CommitChunk(int64_t layer_index, TokenSpan span, std::optional<ChunkHash> hash) {
  bool complete = false;
  {
    absl::MutexLock lock(&mutex_);
    if (released()) return;
    Layer& layer = layers_[static_cast<size_t>(layer_index)];
    layer.claims.erase(std::find(layer.claims.begin(), layer.claims.end(), span));
    if (!hash.has_value()) return;
    const bool was_complete = layer.received.tokens() == params_.prompt_tokens;
    layer.received.Add(span);
    layer.log.Add(span, *hash);
    complete = !was_complete && layer.received.tokens() == params_.prompt_tokens;
    if (complete) {
      layer.end_token = params_.prompt_tokens;
      ++layer.builds_queued;
    }
  }
  const auto bytes = static_cast<uint64_t>(2 * span.size() * row_bytes());
  services_.counters->ingested_bytes.fetch_add(bytes);
  if (hash->by_window) services_.counters->window_bytes.fetch_add(bytes);
  if (complete) QueuePromptBuild(layer_index);
}

std::vector<Sequence::RowsRun> Sequence::RunsOf(const StoredRows& stored, TokenSpan span) const {
  const int64_t sinks = sink_tokens();
  std::vector<RowsRun> runs;
  if (stored.sinks != nullptr && span.begin < sinks) {
    runs.push_back({stored.sinks.get(), {span.begin, std::min(span.end, sinks)}, span.begin});
  }
  if (stored.staging != nullptr && span.end > sinks) {
    const int64_t begin = std::max(span.begin, sinks);
    runs.push_back({stored.staging.get(), {begin, span.end}, begin - sinks});
  }
  return runs;
}

PagedRun Sequence::RowsRun::paged() const {
  const int64_t end = first + span.size();
  return {rows->Keys(end), rows->Values(end), first, span.size()};
}

absl::Status Sequence::WriteRows(const StoredRows& stored, const PackedRows& rows) const {
  for (const RowsRun& run : RunsOf(stored, rows.span)) {
    const PackedRows packed = rows.Sub(run.span, row_bytes());
    if (!stored.on_device) {
      run.rows->Write(run.first, run.span.size(), packed.keys, packed.values);
    } else if (!services_.device->healthy() ||
               !services_.device->WriteRows(run.paged(), packed.keys, packed.values).ok()) {
      return DeviceLost();
    }
  }
  return absl::OkStatus();
}

// --- comparing with what is stored

Sequence::StoredRows Sequence::StoredLocked(const Layer& layer) const {
  // Once it is clustered the host has the sinks too.
  const bool on_device = layer.on_device && layer.snapshot == nullptr;
  return {layer.sinks,
          layer.staging,
          on_device,
          {layer.windows.begin(), layer.windows.end()},
          layer.snapshot};
}

absl::StatusOr<int64_t> Sequence::FirstDifference(const StoredRows& stored, const RowsRun& run,
                                                  const PackedRows& rows) const {
  const int64_t count = run.span.size();
  if (!stored.on_device) {
    return run.rows->FirstDifference(run.first, count, rows.keys, rows.values);
  }
  const auto bytes = static_cast<size_t>(row_bytes());
  std::string keys(static_cast<size_t>(count) * bytes, 0), values(keys);
  if (!services_.device->healthy() ||
      !services_.device->ReadRows(run.paged(), keys.data(), values.data()).ok()) {
    return DeviceLost();
  }
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    if (std::memcmp(keys.data() + i * bytes, rows.keys + i * bytes, bytes) != 0 ||
        std::memcmp(values.data() + i * bytes, rows.values + i * bytes, bytes) != 0) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

absl::Status Sequence::CompareStored(int64_t layer, const StoredRows& stored,
                                     const PackedRows& rows) const {
  for (const RowsRun& run : RunsOf(stored, rows.span)) {
    CKV_ASSIGN_OR_RETURN(const int64_t differs,
                         FirstDifference(stored, run, rows.Sub(run.span, row_bytes())));
    if (differs >= 0) return Conflict(layer, run.span.begin + differs, kOtherBytes);
  }
  for (const Window& window : stored.windows) {
    const TokenSpan common{std::max(rows.span.begin, window.first_token),
                           std::min(rows.span.end, window.first_token + window.rows->capacity())};
    if (common.begin >= common.end) continue;
    const PackedRows sub = rows.Sub(common, row_bytes());
    const int64_t differs = window.rows->FirstDifference(common.begin - window.first_token,
                                                         common.size(), sub.keys, sub.values);
    if (differs >= 0) return Conflict(layer, common.begin + differs, kOtherBytes);
  }
  if (stored.snapshot == nullptr) return absl::OkStatus();
  for (const auto& part : stored.snapshot->parts) {
    const TokenSpan common{std::max(rows.span.begin, part->first_token()),
                           std::min(rows.span.end, part->end_token())};
    if (common.begin >= common.end) continue;
    CKV_RETURN_IF_ERROR(CompareRecords(layer, *part, rows.Sub(common, row_bytes())));
  }
  return absl::OkStatus();
}

absl::Status Sequence::CompareRecords(int64_t layer, const IndexPart& part,
                                      const PackedRows& rows) const {
  const kernels::KvShape& shape = params_.shape;
  const int64_t head_bytes = shape.head_dim * kernels::ElementBytes(shape.element_type);
  std::vector<std::byte> record(
      static_cast<size_t>(params_.codec->RecordBytes(shape.element_type, shape.head_dim)));
  for (int64_t i = 0; i < rows.span.size(); ++i) {
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      const int64_t offset = i * row_bytes() + head * head_bytes;
      params_.codec->Encode(reinterpret_cast<const std::byte*>(rows.keys + offset), head_bytes,
                            reinterpret_cast<const std::byte*>(rows.values + offset), head_bytes,
                            shape.element_type, shape.head_dim, 1, record.data());
      const int64_t position = rows.span.begin + i;
      const std::byte* stored = part.view().records.At(part.RecordIndex(head, position));
      if (std::memcmp(stored, record.data(), record.size()) != 0) {
        return Conflict(layer, position, kOtherBytes);
      }
    }
  }
  // Equal records say equal bytes only if the codec keeps them all.
  if (params_.codec->lossless()) return absl::OkStatus();
  return Conflict(layer, rows.span.begin,
                  "put before and clustered; under this codec other ranges than those that were "
                  "put cannot be compared");
}

// --- statistics and seal

absl::Status Sequence::PutStatistics(int64_t layer_index, absl::Span<const float> query_rms) {
  CKV_RETURN_IF_ERROR(CheckLayer(layer_index));
  const int64_t expected = params_.shape.kv_heads * params_.shape.head_dim;
  if (static_cast<int64_t>(query_rms.size()) != expected) {
    return FieldError(v1::SHAPE_MISMATCH, "statistics.query_rms",
                      absl::StrCat(expected, " numbers, kv_heads * head_dim"),
                      absl::StrCat(query_rms.size()));
  }
  for (size_t i = 0; i < query_rms.size(); ++i) {
    if (std::isfinite(query_rms[i]) && query_rms[i] >= 0) continue;
    return FieldError(v1::INVALID_FIELD, "statistics.query_rms", "finite numbers of 0 or more",
                      absl::StrCat(query_rms[i], " at index ", i));
  }
  absl::MutexLock lock(&mutex_);
  if (released()) return CopyOf(end_reason_);
  Layer& layer = layers_[static_cast<size_t>(layer_index)];
  const bool same = std::equal(layer.query_rms.begin(), layer.query_rms.end(), query_rms.begin(),
                               query_rms.end());
  if (same) return absl::OkStatus();
  if (!layer.query_rms.empty()) {
    return Conflict(layer_index, 0, "statistics put before, with other numbers");
  }
  if (layer.received.tokens() == params_.prompt_tokens && params_.metric != v1::METRIC_RAW) {
    return Conflict(
        layer_index, 0,
        "statistics came after the layer's last chunk, when its metric was raw already");
  }
  layer.query_rms.assign(query_rms.begin(), query_rms.end());
  return absl::OkStatus();
}

std::vector<uint32_t> Sequence::CompleteLayers() const {
  std::vector<uint32_t> complete;
  absl::MutexLock lock(&mutex_);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].received.tokens() == params_.prompt_tokens) {
      complete.push_back(static_cast<uint32_t>(i));
    }
  }
  return complete;
}

absl::Status Sequence::MissingChunks() const {
  std::string gaps;
  int64_t layers = 0;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const std::vector<TokenSpan> missing = layers_[i].received.Missing(prompt());
    if (missing.empty()) continue;
    if (++layers <= 8) {
      absl::StrAppend(&gaps, gaps.empty() ? "" : "; ", "layer ", i, ": ", FormatSpans(missing, 8));
    }
  }
  if (layers == 0) return absl::OkStatus();
  if (layers > 8) absl::StrAppend(&gaps, "; and ", layers - 8, " more layers");
  return Error(v1::CHUNKS_MISSING,
               absl::StrCat("sequence ", identity_.name, ": chunks are missing: ", gaps),
               {{"sequence", identity_.name}, {"missing", gaps}, {"layers", absl::StrCat(layers)}});
}

void Sequence::Seal(const CallContext& context,
                    std::function<void(absl::StatusOr<v1::Sequence>)> done) {
  absl::Status status;
  {
    absl::MutexLock lock(&mutex_);
    status = released() ? CopyOf(end_reason_) : MissingChunks();
    if (status.ok()) {
      sealed_ = true;
      seal_waiters_.push_back({context, std::move(done)});
      std::vector<SealWaiter> ready = TakeSealWaiters(&status);
      if (ready.empty()) return;
      // Another's wait may end here too, if it came between the last build and its answer.
      done = [ready = std::move(ready)](absl::StatusOr<v1::Sequence> answer) {
        for (const SealWaiter& waiter : ready) waiter.done(answer);
      };
    }
  }
  if (!status.ok()) return done(status);
  done(ToProto(/*with_layers=*/true));
}

void Sequence::SweepWaiters() {
  std::vector<std::pair<SealWaiter, absl::Status>> over;
  {
    absl::MutexLock lock(&mutex_);
    const absl::Time now = absl::Now();
    for (size_t i = 0; i < seal_waiters_.size();) {
      SealWaiter& waiter = seal_waiters_[i];
      const absl::Status status = CheckContext(waiter.context, now);
      if (status.ok()) {
        ++i;
        continue;
      }
      over.emplace_back(std::move(waiter), status);
      seal_waiters_.erase(seal_waiters_.begin() + static_cast<int64_t>(i));
    }
  }
  for (auto& [waiter, status] : over) waiter.done(status);
}

}  // namespace clusterkv::cache_service
