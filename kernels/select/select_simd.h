// The vector work of Select: dot products, weighted sums, softmax. Each call runs with the best
// instruction set of the machine; on one machine the bits are always the same, whatever the
// grouping of rows into calls. Arrays of logits and weights are per query head, `stride` floats
// apart, and may be read and written up to the next multiple of kLogitPadding.
#ifndef CLUSTERKV_KERNELS_SELECT_SELECT_SIMD_H_
#define CLUSTERKV_KERNELS_SELECT_SELECT_SIMD_H_

#include <cstddef>
#include <cstdint>

#include "kernels/codec/residual_codes.h"

namespace clusterkv::kernels::select_simd {

constexpr int64_t kLogitPadding = 16;

// logits[g * stride + r] = queries[g] · rows[r], for rows [count, head_dim] that lie one after
// another. queries [group, head_dim].
void DotRows(const float* rows, int64_t count, int64_t head_dim, const float* queries,
             int64_t group, float* logits, int64_t stride);
// The same of rows of halves.
void DotHalfRows(const uint16_t* rows, int64_t count, int64_t head_dim, const float* queries,
                 int64_t group, float* logits, int64_t stride);

// logits[g * stride + t] += queries[g] · (low + scale code of the K half of tokens[t]). `queries`
// are those of the balanced residuals: divided by the K balance.
void AddCodeDots(const CodesParams& codes, int64_t head_dim, const std::byte* const* tokens,
                 int64_t count, const float* queries, int64_t group, float* logits, int64_t stride);

// sums[g] += Σ_r weights[g * stride + r] rows[r] of rows of halves, sums [group, head_dim].
void AddWeightedHalfRows(const uint16_t* const* rows, int64_t count, int64_t head_dim,
                         const float* weights, int64_t stride, int64_t group, float* sums);

// The same of the V half of tokens' codes, balanced as they are.
void AddWeightedCodes(const CodesParams& codes, int64_t head_dim, const std::byte* const* tokens,
                      int64_t count, const float* weights, int64_t stride, int64_t group,
                      float* sums);

// The largest of x [count]; -infinity of none. x is finite or -infinity.
float MaxOf(const float* x, int64_t count);

// out[i] = exp(x[i] - shift) for i < count, 0 from there to the padding; returns their sum. x may
// be out.
float ExpAndSum(const float* x, int64_t count, float shift, float* out);

// x[i] += log(counts[i]), counts positive.
void AddLogs(const int32_t* counts, int64_t count, float* x);

// Sort keys of descending Σ_g exp(logits[g * stride + i] - lse[g]): keys[i] < keys[k] when i's sum
// is the larger. exps are exp(logits - max[g]), inverse_sums[g] = 1 / Σ exps[g], so that lse[g] =
// max[g] - log(inverse_sums[g]). Where the sum is too small for a float, its logarithm decides.
// Logits of -infinity have the last key.
void MassKeys(const float* logits, const float* exps, int64_t stride, int64_t count, int64_t group,
              const float* max, const float* inverse_sums, uint32_t* keys);

// Sort keys of descending x.
void DescendingKeys(const float* x, int64_t count, uint32_t* keys);

}  // namespace clusterkv::kernels::select_simd

#endif  // CLUSTERKV_KERNELS_SELECT_SELECT_SIMD_H_
