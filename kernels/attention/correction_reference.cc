#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention/attention_validate.h"
#include "kernels/attention/correction.h"
#include "kernels/base/status_macros.h"

namespace clusterkv::kernels {

absl::Status ComputeCorrectionReference(const AttentionParams& params,
                                        absl::Span<const float> queries, const RemainderRun& run,
                                        Correction* correction) {
  CKV_RETURN_IF_ERROR(ValidateCorrection(params, queries, run));
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const int64_t head_dim = params.head_dim;
  correction->codes.assign(params.group * head_dim, 0);
  correction->log_scales.assign(params.group, -std::numeric_limits<float>::infinity());
  std::vector<float> key(head_dim), remainder(head_dim);
  for (int64_t g = 0; g < params.group; ++g) {
    std::vector<double> logits;
    double highest = kNothing;
    for (size_t i = 0; i < run.records.size(); ++i) {
      run.codec->Decode(run.records[i], params.element_type, head_dim, key.data(), nullptr);
      double dot = 0;
      for (int64_t j = 0; j < head_dim; ++j) dot += double{queries[g * head_dim + j]} * key[j];
      const bool attends = run.head_masks.empty() || (run.head_masks[i] >> g & 1) != 0;
      logits.push_back(attends ? dot * params.scale : kNothing);
      if (attends && logits.back() > std::numeric_limits<float>::max()) return LogitOverflows(g);
      highest = std::max(highest, logits.back());
    }
    if (highest == kNothing) continue;
    std::vector<double> sum(head_dim, 0);
    for (size_t i = 0; i < run.records.size(); ++i) {
      run.codec->DecodeRemainder(run.records[i], run.remainders[i], params.element_type, head_dim,
                                 remainder.data());
      const double weight = std::exp(logits[i] - highest);
      for (int64_t j = 0; j < head_dim; ++j) sum[j] += weight * remainder[j];
    }
    double largest = 0;
    for (const double x : sum) largest = std::max(largest, std::abs(x));
    if (largest == 0) continue;
    const double scale = largest / 127;
    for (int64_t j = 0; j < head_dim; ++j) {
      correction->codes[g * head_dim + j] = static_cast<int8_t>(std::nearbyint(sum[j] / scale));
    }
    correction->log_scales[g] = static_cast<float>(highest + std::log(scale));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::kernels
