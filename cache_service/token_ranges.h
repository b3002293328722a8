// A set of token positions as disjoint ranges: what of a layer has arrived.
#ifndef CLUSTERKV_CACHE_SERVICE_TOKEN_RANGES_H_
#define CLUSTERKV_CACHE_SERVICE_TOKEN_RANGES_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace clusterkv::cache_service {

// Tokens [begin, end).
struct TokenSpan {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
  bool Overlaps(const TokenSpan& other) const { return begin < other.end && other.begin < end; }
  bool operator==(const TokenSpan&) const = default;
};

// Not thread-safe. Adding costs the logarithm of the number of ranges, which touch nowhere.
class TokenRanges {
 public:
  // REQUIRES: span.begin <= span.end.
  void Add(TokenSpan span);
  // What of `span` is not in the set, ascending.
  std::vector<TokenSpan> Missing(TokenSpan span) const;
  // What of `span` is, ascending.
  std::vector<TokenSpan> Present(TokenSpan span) const;
  bool Covers(TokenSpan span) const;
  int64_t tokens() const { return tokens_; }
  int64_t ranges() const { return static_cast<int64_t>(begin_to_end_.size()); }

 private:
  std::map<int64_t, int64_t> begin_to_end_;
  int64_t tokens_ = 0;
};

// "[0, 512) [1024, 2048)", the first `limit` of them, and how many more there are.
std::string FormatSpans(const std::vector<TokenSpan>& spans, size_t limit);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TOKEN_RANGES_H_
