// The semantic index of one layer's KV over one run of tokens, and its building.
//
// An index part covers a run of tokens of one (sequence, layer) for all its KV heads: the prompt
// without its sinks, or one window of decoded tokens. Parts are built once and never change; a
// layer's index is the list of its parts in token order. Everything lies in pages; a part's arrays
// are views:
//
//   array          element            index                 size
//   centroids      [head_dim] half    h * clusters + c      kv_heads * clusters
//   value_means    [head_dim] half    h * clusters + c      kv_heads * clusters
//   cluster_begin  int32              h * (clusters+1) + c  kv_heads * (clusters + 1)
//   positions      int32              h * tokens + slot     kv_heads * tokens
//   slots          int32              h * tokens + (p - first_token)   kv_heads * tokens
//   codes          CodesBytes         h * tokens + slot     kv_heads * tokens, or 0 without codes
//   records        RecordBytes        h * tokens + slot     kv_heads * tokens
//   channels       [3, head_dim] float  h                 kv_heads: metric weight, K, V balance
//   remainders     RemainderBytes     h * tokens + slot     kv_heads * tokens, or 0 if the codec
//                                                           has none
//
// A *slot* is a token's place in cluster order: cluster c of head h holds slots [cluster_begin[c],
// cluster_begin[c+1]), by ascending position within the cluster. positions[slot] is the token's
// absolute position in the sequence; slots is its inverse. Centroids are in the metric's space (key
// times metric weight); an empty cluster has cluster_begin[c] == cluster_begin[c+1].
//
// Centroids and value means are IEEE half precision: k-means works in float, and what it ends with
// is rounded to the nearest half, ties to even; beyond the largest half, 65,504, it becomes that
// one. Everything that refers to them (residuals, codes, balances, logits, states) refers to the
// rounded numbers, so that codes take up the rounding.
//
// Thread-safety: views are values; building writes only what it is given.
#ifndef CLUSTERKV_KERNELS_INDEX_INDEX_H_
#define CLUSTERKV_KERNELS_INDEX_INDEX_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/base/element_type.h"
#include "kernels/base/paged.h"
#include "kernels/base/parallel.h"
#include "kernels/codec/record_codec.h"
#include "kernels/codec/residual_codes.h"
#include "kernels/kmeans/kmeans.h"

namespace clusterkv::kernels {

// Of the model and sequence; the same for every layer.
struct KvShape {
  int64_t kv_heads = 0;     // Hk, 1 to 256
  int64_t query_heads = 0;  // a multiple of kv_heads; query head h belongs to KV head h / group()
  int64_t head_dim = 0;     // D, 16 to 512, a multiple of 16
  ElementType element_type = ElementType::kBFloat16;

  int64_t group() const { return query_heads / kv_heads; }
  bool operator==(const KvShape&) const = default;
};

struct IndexParams {
  int64_t tokens_per_cluster = 16;  // a segment of n tokens has max(1, n / tokens_per_cluster)
  int64_t segment_tokens = 8192;    // clusters form inside runs of so many tokens; 0: one run
  KMeansInit init = KMeansInit::kStride;
  uint64_t seed = 0;  // of kRandom: segment s of KV head h starts with seed + h * 2^32 + s
  int iterations = 10;
  // Clusters over this multiple of tokens_per_cluster are split in two until none is; 0: never. A
  // split is k-means with 2 centers and a stride start; where it leaves one side less than a
  // quarter of the tokens, the earlier and the later half. The second side becomes a new cluster at
  // the segment's end.
  float split_over = 0;
  CodesParams codes = {};

  bool operator==(const IndexParams&) const = default;
};

// Errors: InvalidArgument naming the field: kv_heads, query_heads, head_dim, element_type.
absl::Status ValidateKvShape(const KvShape& shape);
// Errors: InvalidArgument naming the field. `shape` is valid.
absl::Status ValidateIndexParams(const KvShape& shape, const IndexParams& params);

// Clusters per KV head that a part of `tokens` tokens may have: sum over its segments, and when
// split_over > 0 the bound on what splitting can add. Heads with fewer leave empty clusters at the
// end.
int64_t ClusterCapacity(const IndexParams& params, int64_t tokens);

template <typename Byte>
struct BasicIndexPartView {
  int64_t first_token = 0;  // absolute position of the part's first token
  int64_t tokens = 0;       // T
  int64_t clusters = 0;     // C, per KV head
  BasicPagedView<Byte> centroids, value_means, cluster_begin, positions, slots, codes, records,
      channels, remainders;

  operator BasicIndexPartView<const std::byte>() const {  // NOLINT(google-explicit-constructor)
    return {first_token, tokens, clusters, centroids, value_means, cluster_begin,
            positions,   slots,  codes,    records,   channels,    remainders};
  }
};
using IndexPartView = BasicIndexPartView<const std::byte>;
using MutableIndexPartView = BasicIndexPartView<std::byte>;

// The element size and count of each array of a part, in the order of the table above: from these
// the service sizes its pages. element_bytes of an absent array is 0.
struct IndexArrayLayout {
  const char* name;
  int64_t element_bytes;
  int64_t size;
};
constexpr int kIndexArrays = 9;
struct IndexLayout {
  IndexArrayLayout arrays[kIndexArrays];
  // Pages of `page_bytes` that all arrays take, each array starting on a page of its own.
  int64_t Pages(int64_t page_bytes) const;
};
// REQUIRES: valid shape and params, tokens >= 1.
IndexLayout MakeIndexLayout(const KvShape& shape, const IndexParams& params,
                            const RecordCodec& codec, int64_t tokens);
// Lays the arrays out over `pages` [layout.Pages(page_bytes)] of the arena at `base`.
MutableIndexPartView MakeIndexPartView(const IndexLayout& layout, const KvShape& shape,
                                       const IndexParams& params, int64_t first_token,
                                       int64_t tokens, std::byte* base, const uint32_t* pages,
                                       int64_t page_bytes);

// What an index is built from: keys and values as they came, in token order.
//   keys, values: element t is token (first_token + t)'s rows of all KV heads, [kv_heads, head_dim]
//   of shape.element_type; size = tokens.
struct IndexInput {
  PagedView keys;
  PagedView values;
  // Balanced metric: RMS of the prompt's queries, [kv_heads, head_dim]; empty: raw metric.
  absl::Span<const float> query_rms;
  // Channels (metric weight, balances) of an earlier part, for windows of decoded tokens: when not
  // null, element h as in `channels`, used instead of computing them. query_rms is then ignored.
  const PagedView* inherited_channels = nullptr;
};

// Builds a whole part: metric, k-means per segment and head, cluster order, value means, codes,
// records and their remainders.
//
// Balanced metric: channel j of K is multiplied by w_j = sqrt(max(query_rms_j, 1e-6) / max(std_j,
// 1e-6)), std_j the (n - 1) standard deviation of the part's keys in that channel (0 for one
// token); raw metric: w = 1. k-means runs on the weighted keys, spread over threads by (head,
// segment) and within them by rows; scratch memory is what one (head, segment) needs per running
// task. Without codes the balances are 1. Every element of the part's arrays is written.
//
// Errors: InvalidArgument when shape or params are not valid, a view's size does not fit them, or
// query_rms is not finite. Nothing is written then.
absl::Status BuildIndexPart(const KvShape& shape, const IndexParams& params,
                            const RecordCodec& codec, const IndexInput& input,
                            const MutableIndexPartView& part, ParallelFor parallel_for);
absl::Status BuildIndexPartReference(const KvShape& shape, const IndexParams& params,
                                     const RecordCodec& codec, const IndexInput& input,
                                     const MutableIndexPartView& part);

// XXH3-64 over the part's arrays in logical order (not the pages' unused tails): equal for equal
// parts wherever they lie. Records and remainders are left out, so that it is the same under every
// codec.
uint64_t IndexDigest(const KvShape& shape, const IndexPartView& part);

}  // namespace clusterkv::kernels

#endif  // CLUSTERKV_KERNELS_INDEX_INDEX_H_
