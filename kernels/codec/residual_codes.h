// Residual codes: 2, 3 or 4 bits per channel of every token's K and V, relative to its cluster.
//
// What is coded is the residual r = x - base (base: the cluster's centroid for K, its value mean
// for V), per channel multiplied by a balance u_j = 1 / sqrt(RMS_j of the residuals over the
// tokens), then asymmetric min/max per token in groups of channels: code = round((r u - low) /
// scale), scale = (high - low) / (2^bits - 1), low and scale kept as fp16. K is coded in the
// metric's space (see index.h), V as it came. Codes serve scoring and the attention state; they are
// never sent as records. Source: ../../README.md names the measurements; LeanKV (arXiv 2412.03131)
// for min/max per token.
#ifndef CLUSTERKV_KERNELS_CODEC_RESIDUAL_CODES_H_
#define CLUSTERKV_KERNELS_CODEC_RESIDUAL_CODES_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace clusterkv::kernels {

struct CodesParams {
  int bits = 2;             // 2, 3 or 4; 0: the index has no codes
  int group_channels = 32;  // divides head_dim; channels that share a scale

  bool operator==(const CodesParams&) const = default;
};

// Errors: InvalidArgument, naming codes.bits or codes.group_channels.
absl::Status ValidateCodesParams(const CodesParams& params, int64_t head_dim);

// Bytes of one token's codes, K and V: 2 * (ceil(head_dim * bits / 8) + 4 * head_dim /
// group_channels), with each of the two halves' packed bits rounded up to 4 bytes. 2:32 at head_dim
// 128: 96. Layout: K scales | K lows | V scales | V lows (fp16 each, [head_dim / group_channels]) |
// K bits | V bits. Bits are packed so that both the reference and SIMD code unpack them: see
// code_packing.h.
int64_t CodesBytes(const CodesParams& params, int64_t head_dim);

// u_j = 1 / sqrt(max(RMS_j, 1e-9)) over `rows` residual rows: balance [head_dim] out, residuals
// [rows, head_dim]. Rows are summed in order, in double: reproducible. rows == 0 gives 1.
void ResidualBalance(const float* residuals, int64_t rows, int64_t head_dim, float* balance);

// Encodes `rows` tokens: K residuals and V residuals [rows, head_dim] (not yet balanced) to
// codes [rows, CodesBytes]. SIMD and reference give the same bytes.
void EncodeResiduals(const CodesParams& params, int64_t head_dim, int64_t rows,
                     const float* key_residuals, const float* value_residuals,
                     const float* key_balance, const float* value_balance, std::byte* codes);
void EncodeResidualsReference(const CodesParams& params, int64_t head_dim, int64_t rows,
                              const float* key_residuals, const float* value_residuals,
                              const float* key_balance, const float* value_balance,
                              std::byte* codes);

// Decodes one token's codes to residuals as they were before the balance, [head_dim] each; either
// may be null.
void DecodeResiduals(const CodesParams& params, int64_t head_dim, const std::byte* codes,
                     const float* key_balance, const float* value_balance, float* key_residual,
                     float* value_residual);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_CODEC_RESIDUAL_CODES_H_
