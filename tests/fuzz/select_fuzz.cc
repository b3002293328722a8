// Select and recall requests, raw or nearly right, through validation, the shard and encoding.
#include <fuzzer/FuzzedDataProvider.h>

#include <cmath>

#include "cache_service/rpc/select_messages.h"
#include "kernels/base/element_type.h"
#include "tests/fuzz/fuzz_shard.h"

namespace clusterkv::cache_service::fuzz {
namespace {

void FillVector(FuzzedDataProvider& data, v1::Vector* vector) {
  constexpr size_t kNumbers = kQueryHeads * kHeadDim;
  vector->set_type(static_cast<v1::ElementType>(data.ConsumeIntegralInRange(0, 4)));
  const size_t bytes = data.PickValueInArray<size_t>({0, 1, 2 * kNumbers, 4 * kNumbers, 8});
  std::string numbers = data.ConsumeBytesAsString(bytes);
  numbers.resize(bytes, '\x3c');  // finite in every type
  vector->set_data(numbers);
  if (data.ConsumeIntegralInRange(0, 7) == 0)
    vector->add_values(data.ConsumeFloatingPoint<float>());
}

void FillConfig(FuzzedDataProvider& data, v1::SelectConfig* config) {
  if (data.ConsumeBool()) config->set_budget_tokens(data.ConsumeIntegral<uint32_t>());
  if (data.ConsumeBool()) config->set_coded_tokens(data.ConsumeIntegral<uint32_t>());
  if (data.ConsumeBool()) config->set_refine_factor(data.ConsumeIntegral<uint32_t>());
  if (data.ConsumeBool()) config->set_estimated_fraction(data.ConsumeFloatingPoint<float>());
  if (data.ConsumeBool()) {
    config->set_mode(static_cast<v1::SelectMode>(data.ConsumeIntegralInRange(0, 3)));
  }
}

v1::SelectClustersRequest NearlyRight(FuzzedDataProvider& data) {
  v1::SelectClustersRequest request;
  const int items = data.ConsumeIntegralInRange(0, 3);
  for (int i = 0; i < items; ++i) {
    v1::SelectItem* item = request.add_items();
    item->mutable_sequence()->set_name(data.ConsumeIntegralInRange(0, 7) == 0 ? "other" : "fuzz");
    item->set_layer(data.ConsumeIntegralInRange<uint32_t>(0, kLayers));
    FillVector(data, item->mutable_queries());
    FillConfig(data, item->mutable_select());
  }
  if (data.ConsumeBool()) request.set_sequence("fuzz");
  if (data.ConsumeBool()) FillVector(data, request.mutable_queries());
  if (data.ConsumeBool()) request.set_budget_tokens(data.ConsumeIntegral<uint32_t>());
  request.set_want_state(data.ConsumeBool());
  request.set_want_zones(data.ConsumeBool());
  request.set_state_type(static_cast<v1::ElementType>(data.ConsumeIntegralInRange(0, 4)));
  return request;
}

SelectBatchAnswer Answer(Shard& shard, ParsedSelect& parsed) {
  SelectBatchAnswer answer;
  if (parsed.calls.empty()) return answer;
  absl::Notification done;
  shard.Select(std::move(parsed.calls), {}, true, [&](SelectBatchAnswer answered) {
    answer = std::move(answered);
    done.Notify();
  });
  done.WaitForNotification();
  return answer;
}

void CheckResult(const v1::SelectResult& result) {
  if (result.has_error()) {
    CKV_CHECK(result.heads().empty() && !result.has_state());
    CKV_CHECK(result.error().details_size() == 1) << result.error().ShortDebugString();
    return;
  }
  CKV_CHECK(result.heads_size() == static_cast<int>(kKvHeads));
  for (const v1::HeadSelection& head : result.heads()) {
    for (int i = 0; i < head.exact_positions_size(); ++i) {
      CKV_CHECK(head.exact_positions(i) < kTokens);
      CKV_CHECK(i == 0 || head.exact_positions(i - 1) < head.exact_positions(i));
    }
  }
  if (!result.has_state()) return;
  const auto type = static_cast<kernels::ElementType>(result.state().type());
  const std::string& output = result.state().output();
  CKV_CHECK(output.size() == size_t{kQueryHeads} * kHeadDim * kernels::ElementBytes(type));
  CKV_CHECK(kernels::AllFinite(reinterpret_cast<const std::byte*>(output.data()), type,
                               kQueryHeads * kHeadDim, nullptr));
}

void RunSelect(FuzzShard& fuzz, const v1::SelectClustersRequest& request) {
  ParsedSelect parsed;
  const absl::Status status = ParseSelect(fuzz.rpc(), request, &parsed);
  FuzzShard::CheckError(status);
  if (!status.ok()) return;
  const SelectBatchAnswer answer = Answer(fuzz.shard(), parsed);
  for (const SelectAnswer& item : answer.items) FuzzShard::CheckError(item.status);
  v1::SelectClustersResponse response;
  EncodeSelection(fuzz.rpc(), Method::kSelectClusters, parsed, answer, &response);
  CKV_CHECK(response.results_size() == static_cast<int>(parsed.statuses.size()));
  for (const v1::SelectResult& result : response.results()) CheckResult(result);
}

void RunSelectAndRecall(FuzzShard& fuzz, uint64_t attachment, FuzzedDataProvider& data) {
  v1::SelectAndRecallRequest request;
  v1::SelectAndRecallItem* item = request.add_items();
  item->set_attachment_id(data.ConsumeIntegralInRange(0, 7) == 0 ? 17 : attachment);
  item->set_layer(data.ConsumeIntegralInRange<uint32_t>(0, kLayers));
  item->set_step(data.ConsumeIntegralInRange<uint64_t>(0, 3));
  item->set_reset_residency(data.ConsumeBool());
  FillVector(data, item->mutable_queries());
  ParsedSelect parsed;
  const absl::Status status = ParseSelect(fuzz.rpc(), request, &parsed);
  FuzzShard::CheckError(status);
  if (!status.ok()) return;
  const SelectBatchAnswer answer = Answer(fuzz.shard(), parsed);
  RecordPacker packer;
  AddRecalls(parsed, answer, &packer);
  while (!packer.done()) {
    v1::RecordChunk chunk;
    CKV_CHECK(packer.Next(512, &chunk) == static_cast<int64_t>(chunk.records().size()));
    CKV_CHECK(chunk.records().size() ==
              static_cast<size_t>(chunk.positions_size()) * 2 * kHeadDim * 4);
  }
}

void RunOne(const uint8_t* bytes, size_t size) {
  static auto& fuzz = *new FuzzShard;
  static const uint64_t attachment = [] {
    v1::AttachRequest request;
    *request.mutable_sequence() = fuzz.MakeReady("fuzz");
    request.mutable_hot_cache()->set_capacity_tokens(32);
    return fuzz.shard().Attach(request).value().attachment_id();
  }();
  static int runs = 0;
  FuzzedDataProvider data(bytes, size);
  switch (data.ConsumeIntegralInRange(0, 2)) {
    case 0: {
      v1::SelectClustersRequest request;
      if (request.ParseFromString(data.ConsumeRemainingBytesAsString())) RunSelect(fuzz, request);
      break;
    }
    case 1:
      RunSelect(fuzz, NearlyRight(data));
      break;
    default:
      RunSelectAndRecall(fuzz, attachment, data);
  }
  if (++runs % 4096 == 0) fuzz.CheckLedger();
}

}  // namespace
}  // namespace clusterkv::cache_service::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  clusterkv::cache_service::fuzz::RunOne(data, size);
  return 0;
}
