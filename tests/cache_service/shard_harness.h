// What the shard's tests share: small KV caches, and a shard whose ledger is checked after every
// test.
#ifndef CLUSTERKV_TESTS_CACHE_SERVICE_SHARD_HARNESS_H_
#define CLUSTERKV_TESTS_CACHE_SERVICE_SHARD_HARNESS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cache_service/shard.h"

namespace clusterkv::cache_service {

// K and V of a made-up model: tokens around a few directions per head, so that clusters mean
// something.
struct TestKv {
  v1::KvShape shape;
  int64_t tokens = 0;
  struct Layer {
    std::string keys, values;      // [tokens, kv_heads, head_dim] of the element type
    std::vector<float> query_rms;  // [kv_heads, head_dim]
  };
  std::vector<Layer> layers;

  int64_t row_bytes() const;
  KvChunkView Chunk(int64_t layer, int64_t first_token, int64_t count) const;
};
v1::KvShape TestShape(int64_t layers = 2, v1::ElementType type = v1::ELEMENT_TYPE_BFLOAT16);
TestKv MakeKv(const v1::KvShape& shape, int64_t tokens, uint64_t seed);
// [query_heads, head_dim], near some token's keys so that weights are not flat.
std::vector<float> MakeQueries(const v1::KvShape& shape, uint64_t seed);

ShardOptions TestOptions();
// Makes the device of every harness's shard; null: they have none. Set before the first test.
std::function<std::unique_ptr<ShardDevice>()>& TestDevice();
// `kv`'s shape and the first `prompt_tokens` tokens, default preset with small clusters.
v1::OpenSequenceRequest OpenRequest(const std::string& name, const TestKv& kv,
                                    int64_t prompt_tokens);
v1::SequenceHandle Handle(const std::string& name);
v1::AppendKvRequest AppendRequest(const std::string& name, const TestKv& kv, int64_t first_token,
                                  int64_t tokens);

// A shard with the calls that tests make over and over. On destruction it waits until the shard is
// idle and expects the ledger to balance.
class ShardHarness {
 public:
  explicit ShardHarness(const ShardOptions& options = TestOptions());
  ~ShardHarness();
  Shard* operator->() { return shard_.get(); }
  Shard& operator*() { return *shard_; }

  // Every layer, in chunks of `chunk_tokens`; statistics first if `statistics`.
  absl::Status Put(const std::string& name, const TestKv& kv, int64_t prompt_tokens,
                   int64_t chunk_tokens = 64, bool statistics = true);
  absl::StatusOr<v1::Sequence> Seal(const std::string& name,
                                    const CallContext& context = CallContext());
  // Open, put and seal.
  v1::Sequence Ready(const v1::OpenSequenceRequest& request, const TestKv& kv);
  SelectBatchAnswer Select(std::vector<SelectCall> items, const CallContext& context = {},
                           bool inline_ok = false);
  SelectAnswer SelectOne(const std::string& name, int64_t layer, std::vector<float> queries);
  void WaitIdle();
  void ExpectLedger(bool checksums = true);

 private:
  std::unique_ptr<Shard> shard_;
};

// The reason of a status, for EXPECT_EQ; OK is ERROR_REASON_UNSPECIFIED.
v1::ErrorReason Reason(const absl::Status& status);
std::string Metadata(const absl::Status& status, const std::string& key);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_TESTS_CACHE_SERVICE_SHARD_HARNESS_H_
