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

// How long a group's round takes. A pair's answer takes 6 + 8 / b with b blocks for a quad: what
// all of them do, and what they share out (as measured: kernels/select/DESIGN.md, rounds).
double Cost(const ResidentPlace& place, const ResidentRound& round) {
  const int turns = (round.pairs + place.clusters - 1) / place.clusters;
  return turns * (6 + 8.0 * round.quads / place.blocks_per_pair);
}

// The rounds of several groups of one kernel, one after the other.
double Cost(const ResidentPlace& place, const std::vector<int>& groups,
            const std::vector<ResidentRound>& rounds) {
  double cost = 0;
  for (const int group : groups) cost += Cost(place, rounds[group]);
  return cost;
}

// The place of one of so many kernels. `alike`: they all have the same.
ResidentPlace PlaceOf(const std::vector<int>& groups, int multiprocessors, int kernels, bool alike,
                      const std::vector<ResidentRound>& rounds) {
  int pairs = 0, quads = 1;  // of a group, at most; quads are one or two
  for (const int group : groups) {
    pairs = std::max(pairs, rounds[group].pairs);
    quads = std::max(quads, rounds[group].quads);
  }
  const int share =
      std::min(std::max(multiprocessors / 2, pairs * quads), SharedOut(multiprocessors) / kernels);
  const int free = multiprocessors - (kernels - 1) * share;
  ResidentPlace best;
  for (int blocks = quads; blocks <= kMaxBlocksPerPair; blocks += quads) {
    const int placed =
        alike ? SurelyPlacedAlone(multiprocessors, blocks) / kernels : SurelyPlaced(free, blocks);
    const int clusters = std::min({share / blocks, placed, pairs});
    if (clusters == 0) break;
    const ResidentPlace place = {blocks, clusters};
    if (blocks == quads || Cost(place, groups, rounds) < Cost(best, groups, rounds)) best = place;
  }
  return best;
}

// So many kernels, which have as many groups each, or one more.
std::vector<ResidentLaunch> Deal(int multiprocessors, int kernels,
                                 const std::vector<ResidentRound>& rounds) {
  std::vector<ResidentLaunch> launches(kernels);
  for (int group = 0; group < static_cast<int>(rounds.size()); ++group) {
    launches[group % kernels].groups.push_back(group);
  }
  const bool alike =
      kernels == 1 || std::all_of(rounds.begin(), rounds.end(), [&](const ResidentRound& round) {
        return round == rounds.front();
      });
  for (ResidentLaunch& launch : launches) {
    const std::vector<int>& groups = alike ? launches.front().groups : launch.groups;
    launch.place = PlaceOf(groups, multiprocessors, kernels, alike, rounds);
  }
  return launches;
}

}  // namespace

int MaxResidentGroups(int multiprocessors) {
  return SharedOut(multiprocessors) / kMaxBlocksPerPair;
}

std::vector<ResidentLaunch> PlaceGroups(int multiprocessors,
                                        const std::vector<ResidentRound>& rounds) {
  constexpr double kRounding = 1e-6;
  const int groups = static_cast<int>(rounds.size());
  std::vector<ResidentLaunch> own =
      groups == 0 ? std::vector<ResidentLaunch>() : Deal(multiprocessors, groups, rounds);
  const auto none_waits_longer = [&](const ResidentLaunch& launch) {
    const double cost = Cost(launch.place, launch.groups, rounds);
    return std::all_of(launch.groups.begin(), launch.groups.end(), [&](int group) {
      return cost <= Cost(own[group].place, rounds[group]) + kRounding;
    });
  };
  for (int kernels = 1; kernels < groups; ++kernels) {
    if ((groups + kernels - 1) / kernels > kMaxGroupsOfKernel) continue;
    std::vector<ResidentLaunch> launches = Deal(multiprocessors, kernels, rounds);
    if (std::all_of(launches.begin(), launches.end(), none_waits_longer)) return launches;
  }
  return own;
}

int SelectBlocksPerPair(int multiprocessors, int held, const ResidentRound& round) {
  if (held == 0) return 0;
  const int free = multiprocessors - held;
  int blocks = SurelyPlaced(free, round.quads) > 0 ? round.quads : 1;
  while (2 * blocks <= kMaxBlocksPerPair && 2 * blocks * round.pairs <= free &&
         SurelyPlaced(free, 2 * blocks) > 0) {
    blocks *= 2;
  }
  return blocks;
}

}  // namespace clusterkv::cache_service
