// The presets `clusterkv`, `recall` and `default`, and how a request changes them.
//
// A preset is a full set of parameters; a request names one and says what differs. From here on
// nothing is "as the preset" any more: SequenceParams says everything.
#ifndef CLUSTERKV_CACHE_SERVICE_PRESETS_H_
#define CLUSTERKV_CACHE_SERVICE_PRESETS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clusterkv/v1/cache_service.pb.h"
#include "kernels/codec/record_codec.h"
#include "kernels/index/index.h"
#include "kernels/select/select.h"

namespace clusterkv::cache_service {

// Everything a sequence is built and answered by, a preset resolved: no "as the preset" left.
struct SequenceParams {
  std::string preset;
  kernels::KvShape shape;
  int64_t layers = 0;
  int64_t prompt_tokens = 0;
  int64_t max_decode_tokens = 0;
  int64_t sink_tokens = 16;
  int64_t window_tokens = 320;              // 0: decoded tokens are never clustered
  int64_t window_clusters = 0;              // 0: window_tokens / tokens_per_cluster
  v1::Metric metric = v1::METRIC_BALANCED;  // RAW or BALANCED (balanced only where query_rms came)
  bool metric_required = false;  // BALANCED was asked for by name: a layer without query_rms is an
                                 // error
  kernels::IndexParams index;
  // As asked; SelectParamsFor turns it into kernel parameters.
  kernels::SelectMode mode = kernels::SelectMode::kSharedPerKvHead;
  int64_t budget_tokens = 64, coded_tokens = 2048, refine_factor = 0;
  float estimated_fraction = 0.25f;
  const kernels::RecordCodec* codec = nullptr;
};

// The names of the presets, `default` last.
const std::vector<std::string>& PresetNames();

// A preset with what the request sets differently. Setting coded_tokens > 0 turns a preset's
// refine_factor off and the other way round.
// Errors: INVALID_FIELD, BUDGET_ZERO, UNSUPPORTED, naming the field.
absl::StatusOr<SequenceParams> ResolveParams(const v1::OpenSequenceRequest& request);
// `params` with what `config` sets differently. Errors: as above.
absl::StatusOr<SequenceParams> WithSelectConfig(SequenceParams params,
                                                const v1::SelectConfig& config);

// Kernel parameters: scored tokens = max(coded_tokens, budget - sinks), or refine_factor * (budget
// - sinks), or 0; all bounded by nothing but the context.
kernels::SelectParams SelectParamsFor(const SequenceParams& params);

// Parameters of a window of decoded tokens: `index` with the window's own clusters in one segment.
// REQUIRES: window_tokens > 0.
kernels::IndexParams WindowIndexParams(const SequenceParams& params);

// What is in force, in the shape of the API; the metric as asked.
v1::KvShape ShapeToProto(const SequenceParams& params);
v1::IndexConfig IndexConfigOf(const SequenceParams& params);
v1::SelectConfig SelectConfigOf(const SequenceParams& params);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_PRESETS_H_
