#include "worker/steady_rows.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "proto/error.h"

namespace clusterkv::worker {
namespace {

absl::Status Lost(std::string_view message) { return Error(v1::CHECKSUM_MISMATCH, message); }

}  // namespace

SteadyRows::SteadyRows(int64_t kv_heads, int64_t row_bytes, int64_t sinks, int64_t tokens,
                       int64_t window_begin)
    : kv_heads_(kv_heads),
      row_bytes_(row_bytes),
      sinks_(sinks),
      tokens_(tokens),
      window_begin_(window_begin),
      rows_(kv_heads) {}

int64_t SteadyRows::PositionOf(int64_t row) const {
  return row < sinks_ ? row : row - sinks_ + window_begin_;
}

absl::Status SteadyRows::Add(const v1::RecordChunk& chunk) {
  if (chunk.kv_head() >= kv_heads_) {
    return Lost(absl::StrCat("steady zone: kv_head: expected below ", kv_heads_, ", got ",
                             chunk.kv_head()));
  }
  std::vector<std::byte>& rows = rows_[chunk.kv_head()];
  const std::string& bytes = chunk.records();
  if (bytes.size() != static_cast<size_t>(chunk.positions_size() * 2 * row_bytes_) ||
      XXH3_64bits(bytes.data(), bytes.size()) != chunk.checksum()) {
    return Lost(absl::StrCat("steady zone: ", bytes.size(), " bytes of ", chunk.positions_size(),
                             " tokens are not what their size and checksum say"));
  }
  const int64_t present = static_cast<int64_t>(rows.size()) / (2 * row_bytes_);
  for (int i = 0; i < chunk.positions_size(); ++i) {
    if (present + i >= held_tokens() || PositionOf(present + i) != chunk.positions(i)) {
      return Lost(absl::StrCat("steady zone: kv_head ", chunk.kv_head(), ": position ",
                               chunk.positions(i), " is not what follows"));
    }
  }
  const auto* first = reinterpret_cast<const std::byte*>(bytes.data());
  rows.insert(rows.end(), first, first + bytes.size());
  return absl::OkStatus();
}

absl::Status SteadyRows::CheckComplete() const {
  for (const std::vector<std::byte>& rows : rows_) {
    if (static_cast<int64_t>(rows.size()) != held_tokens() * 2 * row_bytes_) {
      return Lost(absl::StrCat("steady zone: expected ", held_tokens(), " tokens per KV head, got ",
                               static_cast<int64_t>(rows.size()) / (2 * row_bytes_)));
    }
  }
  return absl::OkStatus();
}

void SteadyRows::Append(absl::Span<const std::byte> key, absl::Span<const std::byte> value) {
  CKV_CHECK(static_cast<int64_t>(key.size()) == kv_heads_ * row_bytes_ &&
            key.size() == value.size());
  for (int64_t h = 0; h < kv_heads_; ++h) {
    const std::byte* k = key.data() + h * row_bytes_;
    const std::byte* v = value.data() + h * row_bytes_;
    rows_[h].insert(rows_[h].end(), k, k + row_bytes_);
    rows_[h].insert(rows_[h].end(), v, v + row_bytes_);
  }
  ++tokens_;
}

absl::Status SteadyRows::MoveWindow(int64_t window_begin) {
  if (window_begin < window_begin_ || window_begin > tokens_) {
    return Error(v1::INTERNAL_ERROR, absl::StrCat("window_begin: expected ", window_begin_, " to ",
                                                  tokens_, ", got ", window_begin));
  }
  dropped_ += window_begin - window_begin_;
  window_begin_ = window_begin;
  if (dropped_ < std::max<int64_t>(64, tokens_ - window_begin_)) return absl::OkStatus();
  for (std::vector<std::byte>& rows : rows_) {
    const auto front = rows.begin() + sinks_ * 2 * row_bytes_;
    rows.erase(front, front + dropped_ * 2 * row_bytes_);
  }
  dropped_ = 0;
  return absl::OkStatus();
}

std::vector<kernels::RawRun> SteadyRows::Runs(int64_t kv_head) const {
  const std::byte* rows = rows_[kv_head].data();
  const int64_t stride = 2 * row_bytes_;
  std::vector<kernels::RawRun> runs;
  const auto add = [&](int64_t first_row, int64_t tokens) {
    if (tokens == 0) return;
    const std::byte* first = rows + first_row * stride;
    runs.push_back({first, first + row_bytes_, stride, stride, tokens});
  };
  add(0, sinks_);
  add(sinks_ + dropped_, tokens_ - window_begin_);
  return runs;
}

}  // namespace clusterkv::worker
