#include "tests/integration/kill_job.h"

#include <xxhash.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "tests/worker/worker_harness.h"

namespace clusterkv::integration {

const std::vector<worker::TraceLayer>& JobLayers() {
  static const auto* const layers = [] {
    const kernels::KvShape shape = {2, 4, 32, kernels::ElementType::kBFloat16};
    auto* made = new std::vector<worker::TraceLayer>();
    for (uint64_t l = 0; l < 2; ++l) {
      made->push_back(worker::MakeLayer(shape, kJobPrompt + kJobSteps, kJobSteps, l + 1));
    }
    return made;
  }();
  return *layers;
}

v1::OpenSequenceRequest JobRequest(const std::string& name) {
  v1::OpenSequenceRequest request = worker::OpenRequest(name, JobLayers());
  request.mutable_index()->set_window_tokens(8);
  request.mutable_index()->set_tokens_per_cluster(8);
  request.mutable_select()->set_budget_tokens(40);
  request.mutable_select()->set_coded_tokens(100);
  return request;
}

std::string JobDigest(const v1::Sequence& sequence) {
  std::string text;
  for (const v1::LayerInfo& layer : sequence.layers()) {
    absl::StrAppend(&text, absl::Hex(layer.index_digest()), " ");
  }
  return text;
}

absl::StatusOr<int64_t> NextStep(worker::Client* client, const v1::SequenceHandle& sequence) {
  CKV_ASSIGN_OR_RETURN(const v1::Sequence found, client->GetSequence(sequence));
  int64_t tokens = INT64_MAX;
  for (const v1::LayerInfo& layer : found.layers()) {
    tokens = std::min<int64_t>(tokens, layer.tokens());
  }
  return tokens - kJobPrompt;
}

absl::Status DecodeJob(worker::Client* client, const v1::SequenceHandle& sequence,
                       int64_t first_step,
                       const std::function<void(int64_t, int64_t, uint64_t)>& told) {
  worker::DecodeOptions options;
  options.hot_cache.set_capacity_tokens(64);
  CKV_ASSIGN_OR_RETURN(const auto session,
                       worker::DecodeSession::Attach(client, sequence, options));
  CKV_ASSIGN_OR_RETURN(const v1::Sequence found, client->GetSequence(sequence));
  for (int64_t step = 0; step < kJobSteps; ++step) {
    for (int64_t l = 0; l < found.layers_size(); ++l) {
      const worker::TraceLayer& layer = JobLayers()[l];
      const int64_t token = kJobPrompt + step;
      if (token >= found.layers(static_cast<int>(l)).tokens()) {
        CKV_RETURN_IF_ERROR(session->Append(l, worker::Rows(layer, layer.keys, token, token + 1),
                                            worker::Rows(layer, layer.values, token, token + 1)));
      }
      if (step < first_step) continue;
      std::vector<float> output(layer.shape.query_heads * layer.shape.head_dim);
      CKV_RETURN_IF_ERROR(
          session->Step(l, worker::Query(layer, step), absl::MakeSpan(output), nullptr));
      told(step, l, XXH3_64bits(output.data(), output.size() * sizeof(float)));
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::integration
