// How a device's multiprocessors are shared out: among its resident kernels, which keep theirs
// until they are stopped, and to all that is launched beside them. Numbers only; no CUDA.
//
// The blocks of a thread-block cluster are placed together, within one processing cluster of the
// device. One that finds no place waits for its kernel's neighbours to end, and what was launched
// after it waits too: for ever, beside resident kernels. So nothing asks for more than surely fits.
#ifndef CLUSTERKV_CACHE_SERVICE_RESIDENT_SHARES_H_
#define CLUSTERKV_CACHE_SERVICE_RESIDENT_SHARES_H_

#include <vector>

namespace clusterkv::cache_service {

// What a group asks for in a round.
struct ResidentRound {
  int pairs = 0;
  int quads = 1;  // of four query heads, of a pair: its blocks are a multiple of them

  bool operator==(const ResidentRound&) const = default;
};

// What a resident kernel has: so many thread-block clusters of so many blocks, a multiprocessor
// each.
struct ResidentPlace {
  int blocks_per_pair = 1;
  int clusters = 0;
  int blocks() const { return blocks_per_pair * clusters; }
};

// Groups that a device takes: each has a thread-block cluster of the largest size at least.
int MaxResidentGroups(int multiprocessors);

// Groups that a kernel serves at most.
constexpr int kMaxGroupsOfKernel = 8;

// A kernel, and the groups that it serves.
struct ResidentLaunch {
  std::vector<int> groups;
  ResidentPlace place;
};

// The kernels of groups with such rounds. A kernel alone has half of the multiprocessors, or one
// for each quad of a group if that is more, so that they take one turn; several share all but some,
// equally. There are as few as make no group's
// round longer than a kernel for each would, even when all groups ask at once: where they ask at
// different times each has all of its kernel.
std::vector<ResidentLaunch> PlaceGroups(int multiprocessors,
                                        const std::vector<ResidentRound>& rounds);

// Blocks per pair for such a select while resident kernels hold `held` of the multiprocessors; 0:
// as the select's kernel likes.
int SelectBlocksPerPair(int multiprocessors, int held, const ResidentRound& round);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RESIDENT_SHARES_H_
