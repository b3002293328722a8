#include "cache_service/resident_shares.h"

#include <algorithm>

namespace clusterkv::cache_service {
namespace {

constexpr int kMaxBlocksPerPair = 8;
// Processing clusters of a device, at most: multiprocessors that are free may be spread over them.
constexpr int kProcessingClusters = 8;

// To all groups together: a thirty-second is left to selects, builds and links.
int SharedOut(int multiprocessors) { return multiprocessors - multiprocessors / 32; }

// Clusters of so many blocks that fit into the free multiprocessors however these are spread.
int SurelyPlaced(int free, int blocks) {
  return std::max(0, free - kProcessingClusters * (blocks - 1)) / blocks;
}

// The same of a whole device where there are no others: multiprocessors come in pairs.
int SurelyPlacedAlone(int multiprocessors, int blocks) {
  const int lost = (blocks - 1) / 2 * 2;  // the most that an even number leaves
  return std::max(0, multiprocessors - kProcessingClusters * lost) / blocks;
}

}  // namespace

int MaxResidentGroups(int multiprocessors) {
  return SharedOut(multiprocessors) / kMaxBlocksPerPair;
}

ResidentPlace PlaceOfGroup(int multiprocessors, int groups, int pairs, bool alike) {
  const int share =
      std::min(std::max(multiprocessors / 2, pairs), SharedOut(multiprocessors) / groups);
  const int free = multiprocessors - (groups - 1) * share;
  // A pair's answer takes 1 + 8 / b with b blocks: what all of them do, and what they share out.
  const auto cost = [pairs](const ResidentPlace& place) {
    const int turns = (pairs + place.clusters - 1) / place.clusters;
    return turns * (1 + 8.0 / place.blocks_per_pair);
  };
  ResidentPlace best = {1, std::min(std::max(1, share), pairs)};
  for (int blocks = 2; blocks <= kMaxBlocksPerPair; ++blocks) {
    const int placed =
        alike ? SurelyPlacedAlone(multiprocessors, blocks) / groups : SurelyPlaced(free, blocks);
    const int clusters = std::min({share / blocks, placed, pairs});
    if (clusters == 0) break;
    const ResidentPlace place = {blocks, clusters};
    if (cost(place) < cost(best)) best = place;
  }
  return best;
}

int SelectBlocksPerPair(int multiprocessors, int held, int pairs) {
  if (held == 0) return 0;
  const int free = multiprocessors - held;
  int blocks = 1;
  while (2 * blocks <= kMaxBlocksPerPair && 2 * blocks * pairs <= free &&
         SurelyPlaced(free, 2 * blocks) > 0) {
    blocks *= 2;
  }
  return blocks;
}

}  // namespace clusterkv::cache_service
