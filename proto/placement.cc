#include "proto/placement.h"

#include <xxhash.h>

#include <algorithm>
#include <string>
#include <utility>

namespace clusterkv {

bool IsShardName(std::string_view name) {
  constexpr size_t kMaxBytes = 253;
  const bool letters = std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view(".-_:").find(c) != std::string_view::npos;
  });
  return letters && !name.empty() && name.size() <= kMaxBytes;
}

bool IsShardAddress(std::string_view address) {
  const size_t colon = address.rfind(':');
  return colon != std::string_view::npos && colon > 0 && colon + 1 < address.size();
}

uint64_t PlacementScore(std::string_view sequence, std::string_view shard) {
  std::string text(sequence);
  text += '\n';
  text += shard;
  return XXH3_64bits(text.data(), text.size());
}

std::vector<v1::Shard> RankShards(std::string_view sequence, std::vector<v1::Shard> shards) {
  std::vector<std::pair<uint64_t, size_t>> scores;
  for (size_t i = 0; i < shards.size(); ++i) {
    scores.emplace_back(PlacementScore(sequence, shards[i].name()), i);
  }
  std::sort(scores.begin(), scores.end(), [&](const auto& a, const auto& b) {
    if (a.first != b.first) return a.first > b.first;
    return shards[a.second].name() < shards[b.second].name();
  });
  std::vector<v1::Shard> ranked;
  ranked.reserve(shards.size());
  for (const auto& [score, i] : scores) ranked.push_back(std::move(shards[i]));
  return ranked;
}

}  // namespace clusterkv
