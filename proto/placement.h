// Which shard a sequence belongs to: rendezvous hashing of names, the same for servers and clients.
//
// A shard that is added to the list takes the sequences that it wins and moves no others.
// Stateless.
#ifndef CLUSTERKV_PROTO_PLACEMENT_H_
#define CLUSTERKV_PROTO_PLACEMENT_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "clusterkv/v1/cache_service.pb.h"

namespace clusterkv {

// 1 to 253 of a-z, A-Z, 0-9, '.', '-', '_', ':'.
bool IsShardName(std::string_view name);
// "host:port".
bool IsShardAddress(std::string_view address);

// XXH3-64 of "SEQUENCE\nSHARD". The highest owns the sequence.
uint64_t PlacementScore(std::string_view sequence, std::string_view shard);

// The shards in the order in which they are asked for the sequence: the owner first. Of equal
// scores the name that comes first.
std::vector<v1::Shard> RankShards(std::string_view sequence, std::vector<v1::Shard> shards);

}  // namespace clusterkv

#endif  // CLUSTERKV_PROTO_PLACEMENT_H_
