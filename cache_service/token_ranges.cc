#include "cache_service/token_ranges.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace clusterkv::cache_service {

void TokenRanges::Add(TokenSpan span) {
  CKV_CHECK(span.begin <= span.end) << span.begin << " " << span.end;
  if (span.size() == 0) return;
  // The first range that touches or follows span.
  auto it = begin_to_end_.lower_bound(span.begin);
  if (it != begin_to_end_.begin() && std::prev(it)->second >= span.begin) --it;
  while (it != begin_to_end_.end() && it->first <= span.end) {
    span.begin = std::min(span.begin, it->first);
    span.end = std::max(span.end, it->second);
    tokens_ -= it->second - it->first;
    it = begin_to_end_.erase(it);
  }
  begin_to_end_.emplace_hint(it, span.begin, span.end);
  tokens_ += span.size();
}

std::vector<TokenSpan> TokenRanges::Present(TokenSpan span) const {
  std::vector<TokenSpan> present;
  auto it = begin_to_end_.upper_bound(span.begin);
  if (it != begin_to_end_.begin()) --it;
  for (; it != begin_to_end_.end() && it->first < span.end; ++it) {
    const TokenSpan common{std::max(span.begin, it->first), std::min(span.end, it->second)};
    if (common.begin < common.end) present.push_back(common);
  }
  return present;
}

std::vector<TokenSpan> TokenRanges::Missing(TokenSpan span) const {
  std::vector<TokenSpan> missing;
  int64_t at = span.begin;
  for (const TokenSpan& present : Present(span)) {
    if (at < present.begin) missing.push_back({at, present.begin});
    at = present.end;
  }
  if (at < span.end) missing.push_back({at, span.end});
  return missing;
}

bool TokenRanges::Covers(TokenSpan span) const { return Missing(span).empty(); }

std::string FormatSpans(const std::vector<TokenSpan>& spans, size_t limit) {
  std::string text;
  for (size_t i = 0; i < std::min(spans.size(), limit); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : " ", "[", spans[i].begin, ", ", spans[i].end, ")");
  }
  if (spans.size() > limit) absl::StrAppend(&text, " and ", spans.size() - limit, " more");
  return text;
}

}  // namespace clusterkv::cache_service
