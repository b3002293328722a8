// The correction is the attention of block_softmax.h with remainders for values, coded.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/correction_cpu.cc"
#include <cmath>
#include <limits>

#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "kernels/attention/attention_validate.h"
#include "kernels/attention/block_softmax.h"
#include "kernels/attention/correction.h"
#include "kernels/base/status_macros.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// head_dim is a multiple of 16, so that whole vectors of at most 16 lanes cover it.
using Floats = HWY_CAPPED(float, 16);

// codes [head_dim] of x [head_dim]: its largest element's is 127. Returns the scale; 0: x is
// nothing that a code could say.
float EncodeRow(int64_t head_dim, const float* HWY_RESTRICT x, int8_t* HWY_RESTRICT codes) {
  const Floats d;
  const hn::RebindToSigned<Floats> di;
  const hn::Rebind<int8_t, Floats> di8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  auto largest = hn::Zero(d);
  for (int64_t j = 0; j < head_dim; j += lanes) {
    largest = hn::Max(largest, hn::Abs(hn::LoadU(d, x + j)));
  }
  const float scale = hn::GetLane(hn::MaxOfLanes(d, largest)) / 127;
  for (int64_t j = 0; j < head_dim; j += lanes) {
    auto code = hn::Zero(d);
    if (scale > 0) code = hn::Round(hn::Div(hn::LoadU(d, x + j), hn::Set(d, scale)));
    hn::StoreU(hn::DemoteTo(di8, hn::ConvertTo(di, code)), di8, codes + j);
  }
  return scale;
}

// output[j] += factor * codes[j].
void AddRow(int64_t head_dim, const int8_t* HWY_RESTRICT codes, float factor,
            float* HWY_RESTRICT output) {
  const Floats d;
  const hn::RebindToSigned<Floats> di;
  const hn::Rebind<int8_t, Floats> di8;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t j = 0; j < head_dim; j += lanes) {
    const auto code = hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(di8, codes + j)));
    hn::StoreU(hn::MulAdd(hn::Set(d, factor), code, hn::LoadU(d, output + j)), d, output + j);
  }
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace clusterkv::kernels {
namespace {

HWY_EXPORT(EncodeRow);
HWY_EXPORT(AddRow);

constexpr float kNothing = -std::numeric_limits<float>::infinity();

}  // namespace

absl::Status ComputeCorrection(const AttentionParams& params, absl::Span<const float> queries,
                               const RemainderRun& run, Correction* correction) {
  CKV_RETURN_IF_ERROR(ValidateCorrection(params, queries, run));
  const int64_t elements = params.group * params.head_dim;
  correction->codes.resize(elements);
  correction->log_scales.resize(params.group);
  thread_local std::vector<float> means;
  means.resize(elements);
  BlockSoftmax softmax(params, queries.data(), means.data());
  for (size_t i = 0; i < run.records.size(); ++i) {
    run.codec->Decode(run.records[i], params.element_type, params.head_dim, softmax.next_key(),
                      nullptr);
    run.codec->DecodeRemainder(run.records[i], run.remainders[i], params.element_type,
                               params.head_dim, softmax.next_value());
    softmax.Add(run.head_masks.empty() ? ~uint32_t{0} : run.head_masks[i]);
  }
  softmax.Finish(correction->log_scales.data());
  for (int64_t g = 0; g < params.group; ++g) {
    float& log_scale = correction->log_scales[g];
    if (softmax.overflowed(g)) return LogitOverflows(g);
    const float scale =
        HWY_DYNAMIC_DISPATCH(EncodeRow)(params.head_dim, means.data() + g * params.head_dim,
                                        correction->codes.data() + g * params.head_dim);
    log_scale = scale > 0 ? log_scale + std::log(scale) : kNothing;
  }
  return absl::OkStatus();
}

void AddCorrection(int64_t group, int64_t head_dim, absl::Span<const int8_t> codes,
                   absl::Span<const float> log_scales, absl::Span<const float> lse,
                   absl::Span<float> output) {
  for (int64_t g = 0; g < group; ++g) {
    if (log_scales[g] == kNothing) continue;
    HWY_DYNAMIC_DISPATCH(AddRow)
    (head_dim, codes.data() + g * head_dim, std::exp(log_scales[g] - lse[g]),
     output.data() + g * head_dim);
  }
}

}  // namespace clusterkv::kernels

#endif  // HWY_ONCE
