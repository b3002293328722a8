// How a device's multiprocessors are shared out: among its resident kernels, which keep theirs
// until they are stopped, and to all that is launched beside them. Numbers only; no CUDA.
//
// The blocks of a thread-block cluster are placed together, within one processing cluster of the
// device. One that finds no place waits for its kernel's neighbours to end, and what was launched
// after it waits too: for ever, beside resident kernels. So nothing asks for more than surely fits.
#ifndef CLUSTERKV_CACHE_SERVICE_RESIDENT_SHARES_H_
#define CLUSTERKV_CACHE_SERVICE_RESIDENT_SHARES_H_

namespace clusterkv::cache_service {

// What a resident kernel has: so many thread-block clusters of so many blocks, a multiprocessor
// each.
struct ResidentPlace {
  int blocks_per_pair = 1;
  int clusters = 0;
  int blocks() const { return blocks_per_pair * clusters; }
};

// Groups that a device takes: each has a thread-block cluster of the largest size at least.
int MaxResidentGroups(int multiprocessors);

// The place of one of so many groups, that answers so many pairs a round. `alike`: they all do. A
// group alone has half of the multiprocessors, or one for each pair if that is more, so that they
// take one turn; several share all but some, equally.
ResidentPlace PlaceOfGroup(int multiprocessors, int groups, int pairs, bool alike);

// Blocks per pair for a select of so many pairs while resident kernels hold `held` of the
// multiprocessors; 0: as the select's kernel likes.
int SelectBlocksPerPair(int multiprocessors, int held, int pairs);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_RESIDENT_SHARES_H_
