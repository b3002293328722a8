// Corrections: what the records of an exact zone lack, answered by the service.
//
// A coarse codec loses a little of every value, and a query that copies one token sees all of it.
// The remainders (kernels/codec/record_codec.h) stay at the service, which knows the exact zone and
// the queries, so it can answer what they would have added to the worker's attention: per query
// head the sum over the zone's tokens of exp(logit) * remainder, by the logits that the worker
// computes too. The worker adds that to the numerator of its merged attention; the denominator
// needs no correction. It is small beside the output, so that 8 bits carry it: head_dim codes and
// one scale per query head.
#ifndef CLUSTERKV_KERNELS_ATTENTION_CORRECTION_H_
#define CLUSTERKV_KERNELS_ATTENTION_CORRECTION_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/attention/attention.h"
#include "kernels/codec/record_codec.h"

namespace clusterkv::kernels {

// Tokens of one KV head where they lie. Host memory.
struct RemainderRun {
  const RecordCodec* codec = nullptr;             // with remainders
  absl::Span<const std::byte* const> records;     // [tokens]
  absl::Span<const std::byte* const> remainders;  // [tokens]
  absl::Span<const uint32_t> head_masks;          // [tokens] as in RecordRun; empty: all do
};

// Of the query heads of one KV head: exp(log_scales[g]) * codes[g, j].
struct Correction {
  std::vector<int8_t> codes;      // [group, head_dim], -127 to 127
  std::vector<float> log_scales;  // [group]; -infinity: nothing to add
};

// Fills `correction` (its vectors are reused) for queries [group, head_dim]. One pass over the
// tokens in their order: the same bits for every thread and run.
// Errors: InvalidArgument when spans do not fit the shapes, or when a logit overflows.
absl::Status ComputeCorrection(const AttentionParams& params, absl::Span<const float> queries,
                               const RemainderRun& run, Correction* correction);
absl::Status ComputeCorrectionReference(const AttentionParams& params,
                                        absl::Span<const float> queries, const RemainderRun& run,
                                        Correction* correction);

// Adds a correction to merged attention: output [group, head_dim] with log-sum-exp lse [group],
// that of all that was attended to, the corrected tokens among it. codes [group, head_dim],
// log_scales [group].
void AddCorrection(int64_t group, int64_t head_dim, absl::Span<const int8_t> codes,
                   absl::Span<const float> log_scales, absl::Span<const float> lse,
                   absl::Span<float> output);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_ATTENTION_CORRECTION_H_
