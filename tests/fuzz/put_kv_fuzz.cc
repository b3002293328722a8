// PutKv's messages, as they come off the wire or nearly right, field by field, on a stream.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>

#include "tests/fuzz/fuzz_shard.h"

namespace clusterkv::cache_service::fuzz {
namespace {

// A message whose fields are near what is right.
v1::PutKvRequest NearlyRight(FuzzedDataProvider& data) {
  v1::PutKvRequest request;
  if (data.ConsumeBool()) {
    request.mutable_sequence()->set_name(data.ConsumeBool() ? "fuzz" : "other");
    if (data.ConsumeBool())
      request.mutable_sequence()->set_generation(data.ConsumeIntegral<uint8_t>());
  }
  if (data.ConsumeBool()) {
    v1::LayerStatistics* statistics = request.mutable_statistics();
    statistics->set_layer(data.ConsumeIntegralInRange<uint32_t>(0, kLayers));
    v1::Vector* rms = statistics->mutable_query_rms();
    rms->set_type(static_cast<v1::ElementType>(data.ConsumeIntegralInRange(0, 5)));
    rms->set_data(data.ConsumeBytesAsString(
        data.PickValueInArray<size_t>({0, 1, kRowBytes / 2, kRowBytes, 2 * kRowBytes})));
  }
  if (data.ConsumeBool()) {
    v1::KvChunk* chunk = request.mutable_chunk();
    chunk->set_layer(data.ConsumeIntegralInRange<uint32_t>(0, kLayers));
    chunk->set_first_token(data.ConsumeBool() ? data.ConsumeIntegralInRange<uint32_t>(0, kTokens)
                                              : data.ConsumeIntegral<uint32_t>());
    const auto tokens = data.ConsumeIntegralInRange<uint32_t>(0, kTokens);
    chunk->set_tokens(data.ConsumeBool() ? tokens : data.ConsumeIntegral<uint32_t>());
    std::string keys = FuzzShard::Rows(tokens), values = keys;
    const int wrong = data.ConsumeIntegralInRange(0, 7);
    if (wrong == 1 && !keys.empty()) keys.pop_back();
    if (wrong == 2) values.append("x");
    if (wrong == 3 && keys.size() >= 4) {
      const auto number = data.ConsumeIntegral<uint32_t>();
      std::memcpy(keys.data() + 4 * (number % (keys.size() / 4)), &number, 4);
    }
    if (wrong == 4) chunk->set_checksum(data.ConsumeIntegral<uint64_t>());
    chunk->set_keys(keys);
    chunk->set_values(values);
  }
  return request;
}

void RunOne(const uint8_t* bytes, size_t size) {
  static auto& fuzz = *new FuzzShard;
  static int runs = 0;
  const v1::SequenceHandle handle = fuzz.Open("fuzz");
  FuzzedDataProvider data(bytes, size);
  PutKvTaker taker(fuzz.rpc(), {fuzz.rpc().shard, nullptr});
  absl::Status status;
  while (status.ok() && data.remaining_bytes() > 0) {
    v1::PutKvRequest request;
    if (data.ConsumeBool()) {
      request = NearlyRight(data);
    } else {
      const std::string raw = data.ConsumeBytesAsString(data.ConsumeIntegral<uint16_t>());
      if (!request.ParseFromString(raw)) continue;
    }
    status = taker.Take(request);
    FuzzShard::CheckError(status);
  }
  v1::PutKvResponse response;
  if (status.ok()) FuzzShard::CheckError(taker.End(&response));
  CKV_CHECK(fuzz.shard().Release(handle).ok());
  if (++runs % 1024 == 0) fuzz.CheckLedger();
}

}  // namespace
}  // namespace clusterkv::cache_service::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  clusterkv::cache_service::fuzz::RunOne(data, size);
  return 0;
}
