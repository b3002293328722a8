#include "proto/placement.h"

#include <xxhash.h>

#include <algorithm>
#include <string>
#include <utility>

namespace clusterkv {

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
