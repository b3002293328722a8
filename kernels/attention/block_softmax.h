// Online softmax over blocks of tokens, all query heads of one KV head: what exact attention and
// corrections are made of.
//
// Blocks of tokens are decoded to float once and serve the whole group; one pass over the tokens,
// running maximum and sum per query head, in the order of the tokens. Internal to this folder.
// Not thread-safe; one lives on a thread at a time, for its memory is the thread's.
#ifndef CLUSTERKV_KERNELS_ATTENTION_BLOCK_SOFTMAX_H_
#define CLUSTERKV_KERNELS_ATTENTION_BLOCK_SOFTMAX_H_

#include <cstdint>

#include "kernels/attention/attention.h"
#include "kernels/attention/attention_validate.h"

namespace clusterkv::kernels {

class BlockSoftmax {
 public:
  // queries [group, head_dim]; sums [group, head_dim] out. All outlive this.
  // REQUIRES: shapes that ValidateSparseAttention accepts.
  BlockSoftmax(const AttentionParams& params, const float* queries, float* sums);
  BlockSoftmax(const BlockSoftmax&) = delete;
  BlockSoftmax& operator=(const BlockSoftmax&) = delete;

  // Where the next token's key and value go, [head_dim] each.
  float* next_key() { return keys_ + tokens_ * params_.head_dim; }
  float* next_value() { return values_ + tokens_ * params_.head_dim; }
  // What was written to next_key and next_value is a token of these query heads.
  void Add(uint32_t heads) {
    masks_[tokens_] = heads;
    if (++tokens_ == kBlockTokens) Flush();
  }

  // Makes sums the softmax-weighted means of the values; lse [group] out: the log-sum-exps,
  // -infinity (and sums 0) for a head without tokens.
  void Finish(float* lse);
  // True if a logit of query head g was infinite or not a number: its sums say nothing.
  // REQUIRES: finished.
  bool overflowed(int64_t g) const { return overflowed_[g]; }

 private:
  static constexpr int64_t kBlockTokens = 32;

  void Flush();
  void FlushHead(int64_t g, float* logits);

  const AttentionParams& params_;
  const float* queries_;
  float* sums_;    // [group, head_dim], of exp(logit - highest) * value
  float* keys_;    // [kBlockTokens, head_dim]
  float* values_;  // [kBlockTokens, head_dim]
  float* logits_;  // [group, kBlockTokens]
  int64_t tokens_ = 0;
  uint32_t masks_[kBlockTokens];
  float highest_[kMaxAttentionGroup];
  float totals_[kMaxAttentionGroup];
  bool overflowed_[kMaxAttentionGroup];
};

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_ATTENTION_BLOCK_SOFTMAX_H_
