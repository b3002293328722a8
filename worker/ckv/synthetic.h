// Made-up KV with the one property that matters here: keys form clusters and queries look for some.
//
// The same arguments give the same bytes on every machine: integer random numbers, and only sums
// and products of floats.
#ifndef CLUSTERKV_WORKER_CKV_SYNTHETIC_H_
#define CLUSTERKV_WORKER_CKV_SYNTHETIC_H_

#include <cstdint>
#include <vector>

#include "worker/trace.h"

namespace clusterkv::worker::ckv {

// A sequence of random numbers (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  // Uniform in [0, bound). REQUIRES: bound > 0.
  int64_t Below(int64_t bound) { return static_cast<int64_t>(Next() % bound); }
  // Nearly normal, mean 0, deviation 1: the sum of four uniforms.
  float Normal();

 private:
  uint64_t state_;
};

// One layer: tokens run through topics (a topic per ~24 tokens of the sequence, each of them
// visited again and again), a token's key and value are its topic's with noise, and query i is near
// the key of a random token's topic. query_rms is that of the made-up queries.
TraceLayer MakeSyntheticLayer(const kernels::KvShape& shape, int64_t tokens, int64_t queries,
                              uint64_t seed);

// Queries [query_heads, head_dim] as float, of the same kind as those of MakeSyntheticLayer(shape,
// …, seed): they look for topics of that layer.
std::vector<float> MakeSyntheticQuery(const kernels::KvShape& shape, int64_t tokens, uint64_t seed,
                                      uint64_t query_seed);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_SYNTHETIC_H_
