#include "kernels/index/index.h"

#include <xxhash.h>

#include <cmath>
#include <cstdint>
#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/index/index_internal.h"

namespace clusterkv::kernels {
namespace {

absl::Status OutOfRange(const char* field, const char* expected, double got) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": expected ", expected, ", got ", got));
}

}  // namespace

absl::Status ValidateKvShape(const KvShape& shape) {
  if (shape.kv_heads < 1 || shape.kv_heads > 256) {
    return OutOfRange("kv_heads", "1 to 256", shape.kv_heads);
  }
  if (shape.query_heads < shape.kv_heads || shape.query_heads % shape.kv_heads != 0 ||
      shape.group() > 32) {
    return OutOfRange("query_heads", "1 to 32 per KV head", shape.query_heads);
  }
  if (shape.head_dim < 16 || shape.head_dim > 512 || shape.head_dim % 16 != 0) {
    return OutOfRange("head_dim", "a multiple of 16 from 16 to 512", shape.head_dim);
  }
  switch (shape.element_type) {
    case ElementType::kFloat32:
    case ElementType::kFloat16:
    case ElementType::kBFloat16:
      return absl::OkStatus();
  }
  return OutOfRange("element_type", "fp32, fp16 or bf16", static_cast<int>(shape.element_type));
}

absl::Status ValidateIndexParams(const KvShape& shape, const IndexParams& params) {
  if (params.tokens_per_cluster < 1 || params.tokens_per_cluster > (int64_t{1} << 30)) {
    return OutOfRange("tokens_per_cluster", "1 to 2^30", params.tokens_per_cluster);
  }
  if (params.segment_tokens < 0) {
    return OutOfRange("segment_tokens", "at least 0", params.segment_tokens);
  }
  if (params.init != KMeansInit::kStride && params.init != KMeansInit::kRandom) {
    return OutOfRange("init", "kStride or kRandom", static_cast<int>(params.init));
  }
  if (params.iterations < 1 || params.iterations > 1000) {
    return OutOfRange("iterations", "1 to 1000", params.iterations);
  }
  if (!(params.split_over == 0 || (params.split_over >= 1 && std::isfinite(params.split_over)))) {
    return OutOfRange("split_over", "0, or at least 1", params.split_over);
  }
  if (params.codes.bits == 0) return absl::OkStatus();
  return ValidateCodesParams(params.codes, shape.head_dim);
}

int64_t ClusterCapacity(const IndexParams& params, int64_t tokens) {
  const auto segments = internal::Segments(params, tokens);
  return segments.empty() ? 0 : segments.back().first_cluster + segments.back().capacity;
}

int64_t IndexLayout::Pages(int64_t page_bytes) const {
  int64_t pages = 0;
  for (const IndexArrayLayout& array : arrays) {
    if (array.element_bytes > 0) pages += PagesFor(array.size, array.element_bytes, page_bytes);
  }
  return pages;
}

IndexLayout MakeIndexLayout(const KvShape& shape, const IndexParams& params,
                            const RecordCodec& codec, int64_t tokens) {
  CKV_CHECK(tokens >= 1) << tokens;
  const int64_t heads = shape.kv_heads;
  const int64_t clusters = ClusterCapacity(params, tokens);
  const int64_t row_bytes = shape.head_dim * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t channel_bytes = shape.head_dim * static_cast<int64_t>(sizeof(float));
  const int64_t index_bytes = sizeof(int32_t);
  const bool has_codes = params.codes.bits != 0;
  const int64_t remainder_bytes = codec.RemainderBytes(shape.element_type, shape.head_dim);
  return {{{"centroids", row_bytes, heads * clusters},
           {"value_means", row_bytes, heads * clusters},
           {"cluster_begin", index_bytes, heads * (clusters + 1)},
           {"positions", index_bytes, heads * tokens},
           {"slots", index_bytes, heads * tokens},
           {"codes", has_codes ? CodesBytes(params.codes, shape.head_dim) : 0,
            has_codes ? heads * tokens : 0},
           {"records", codec.RecordBytes(shape.element_type, shape.head_dim), heads * tokens},
           {"channels", 3 * channel_bytes, heads},
           {"remainders", remainder_bytes, remainder_bytes > 0 ? heads * tokens : 0}}};
}

MutableIndexPartView MakeIndexPartView(const IndexLayout& layout, const KvShape& shape,
                                       const IndexParams& params, int64_t first_token,
                                       int64_t tokens, std::byte* base, const uint32_t* pages,
                                       int64_t page_bytes) {
  MutableIndexPartView part;
  part.first_token = first_token;
  part.tokens = tokens;
  part.clusters = ClusterCapacity(params, tokens);
  CKV_CHECK(layout.arrays[0].size == shape.kv_heads * part.clusters) << "layout of other tokens";
  MutablePagedView* views[kIndexArrays] = {&part.centroids, &part.value_means, &part.cluster_begin,
                                           &part.positions, &part.slots,       &part.codes,
                                           &part.records,   &part.channels,    &part.remainders};
  for (int i = 0; i < kIndexArrays; ++i) {
    const IndexArrayLayout& array = layout.arrays[i];
    if (array.element_bytes == 0) continue;
    *views[i] = MakePagedView(base, pages, page_bytes, array.element_bytes, array.size);
    pages += PagesFor(array.size, array.element_bytes, page_bytes);
  }
  return part;
}

uint64_t IndexDigest(const KvShape& shape, const IndexPartView& part) {
  CKV_CHECK(part.channels.size == shape.kv_heads) << part.channels.size;
  XXH3_state_t* state = XXH3_createState();
  CKV_CHECK(state != nullptr) << "out of memory";
  XXH3_64bits_reset(state);
  const int64_t sizes[] = {shape.kv_heads, shape.head_dim, part.first_token, part.tokens,
                           part.clusters};
  XXH3_64bits_update(state, sizes, sizeof sizes);
  for (const PagedView* view : {&part.centroids, &part.value_means, &part.cluster_begin,
                                &part.positions, &part.slots, &part.codes, &part.channels}) {
    ForEachRun(*view, 0, view->size, [&](const std::byte* run, int64_t, int64_t count) {
      XXH3_64bits_update(state, run, count * view->element_bytes);
    });
  }
  const uint64_t digest = XXH3_64bits_digest(state);
  XXH3_freeState(state);
  return digest;
}

}  // namespace clusterkv::kernels
