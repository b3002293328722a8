#include "kernels/select/select_simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/check.h"
#include "kernels/base/element_type.h"
#include "kernels/codec/code_packing.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/select/select_simd.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// After foreach_target.h.
#include "hwy/contrib/math/math-inl.h"
#include "kernels/codec/code_packing-inl.h"

#ifndef CLUSTERKV_KERNELS_SELECT_SELECT_SIMD_ONCE_
#define CLUSTERKV_KERNELS_SELECT_SELECT_SIMD_ONCE_
namespace clusterkv::kernels {

// The arithmetic on one tile hides the fetching of a later one only if that is asked for: the loads
// of two tiles do not fit what the processor looks ahead.
// Inlined by force: a compiler that sees a call without effect on memory drops it.
HWY_INLINE void PrefetchBytes(const void* first, int64_t bytes) {
  constexpr uintptr_t kLineBytes = 64;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(first);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  for (uintptr_t line = begin & ~(kLineBytes - 1); line < end; line += kLineBytes) {
    hwy::Prefetch(reinterpret_cast<const std::byte*>(line));
  }
}

}  // namespace clusterkv::kernels
#endif  // CLUSTERKV_KERNELS_SELECT_SELECT_SIMD_ONCE_

HWY_BEFORE_NAMESPACE();
namespace clusterkv::kernels::HWY_NAMESPACE {

// The build leaves out targets whose vectors have no fixed size, so that arrays of vectors are
// allowed.
using Tag = CodeFloatTag;
using Vector = hn::Vec<Tag>;
using FourTag = hn::CappedTag<float, 4>;

constexpr int64_t kTileRows = 4;
constexpr int64_t kTileHeads = 4;
constexpr int64_t kMaxHeadDim = 512;

HWY_INLINE int64_t Lanes() { return static_cast<int64_t>(hn::Lanes(Tag())); }

#if HWY_TARGET != HWY_SCALAR
template <class D>
HWY_INLINE hn::Vec<FourTag> AddBlocks(D, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return AddBlocks(half, hn::Add(hn::UpperHalf(half, v), hn::LowerHalf(half, v)));
  }
}
#endif

// sums[i] = the sum of v[i]'s lanes, i < 4.
HWY_INLINE void SumOfFour(const Vector (&v)[kTileRows], float* HWY_RESTRICT sums) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t i = 0; i < kTileRows; ++i) sums[i] = hn::GetLane(v[i]);
#else
  const Tag d;
  const hn::Repartition<double, Tag> d64;  // pairs of lanes move together
  const auto fold = [&](Vector a, Vector b) HWY_ATTR {
    return hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  };
  const auto ab = hn::BitCast(d64, fold(v[0], v[1]));
  const auto ce = hn::BitCast(d64, fold(v[2], v[3]));
  const Vector blocks = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, ab, ce)),
                                hn::BitCast(d, hn::InterleaveUpper(d64, ab, ce)));
  hn::StoreU(AddBlocks(d, blocks), FourTag(), sums);
#endif
}

// Numbers of a row, floats or halves, as a vector.
HWY_INLINE Vector LoadRow(const float* row) { return hn::LoadU(Tag(), row); }
HWY_INLINE Vector LoadRow(const hwy::float16_t* row) {
  const hn::Rebind<hwy::float16_t, Tag> d16;
  return hn::PromoteTo(Tag(), hn::LoadU(d16, row));
}

// dots[h * 4 + r] = queries[h] · rows[r].
template <int kHeads, typename Element>
HWY_INLINE void DotTile(const Element* const (&rows)[kTileRows], const float* HWY_RESTRICT queries,
                        int64_t head_dim, float* HWY_RESTRICT dots) {
  const Tag d;
  Vector sums[kHeads][kTileRows];
  for (auto& of_head : sums) {
    for (auto& sum : of_head) sum = hn::Zero(d);
  }
  for (int64_t j = 0; j < head_dim; j += Lanes()) {
    const Vector row[kTileRows] = {LoadRow(rows[0] + j), LoadRow(rows[1] + j), LoadRow(rows[2] + j),
                                   LoadRow(rows[3] + j)};
    for (int h = 0; h < kHeads; ++h) {
      const Vector query = hn::LoadU(d, queries + h * head_dim + j);
      for (int r = 0; r < kTileRows; ++r) sums[h][r] = hn::MulAdd(query, row[r], sums[h][r]);
    }
  }
  for (int h = 0; h < kHeads; ++h) SumOfFour(sums[h], dots + h * kTileRows);
}

// dots [group, 4] of four rows.
template <typename Element>
HWY_INLINE void DotGroup(const Element* const (&rows)[kTileRows], const float* HWY_RESTRICT queries,
                         int64_t head_dim, int64_t group, float* HWY_RESTRICT dots) {
  int64_t g = 0;
  for (; g + kTileHeads <= group; g += kTileHeads) {
    DotTile<kTileHeads>(rows, queries + g * head_dim, head_dim, dots + g * kTileRows);
  }
  queries += g * head_dim;
  dots += g * kTileRows;
  switch (group - g) {
    case 3:
      return DotTile<3>(rows, queries, head_dim, dots);
    case 2:
      return DotTile<2>(rows, queries, head_dim, dots);
    case 1:
      return DotTile<1>(rows, queries, head_dim, dots);
    default:
      return;
  }
}

constexpr int64_t kMaxGroupHeads = 32;

template <typename Element>
HWY_INLINE void DotRowsOf(const Element* HWY_RESTRICT matrix, int64_t count, int64_t head_dim,
                          const float* HWY_RESTRICT queries, int64_t group,
                          float* HWY_RESTRICT logits, int64_t stride) {
  constexpr int64_t kAhead = 8 * kTileRows;
  HWY_ALIGN float dots[kMaxGroupHeads * kTileRows];
  for (int64_t r = 0; r < count; r += kTileRows) {
    if (r + kAhead < count) {
      const int64_t rows_ahead = std::min(kTileRows, count - r - kAhead);
      PrefetchBytes(matrix + (r + kAhead) * head_dim,
                    rows_ahead * head_dim * static_cast<int64_t>(sizeof(Element)));
    }
    const int64_t valid = std::min(kTileRows, count - r);
    const Element* rows[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      rows[i] = matrix + (r + std::min(i, valid - 1)) * head_dim;
    }
    DotGroup(rows, queries, head_dim, group, dots);
    for (int64_t g = 0; g < group; ++g) {
      float* HWY_RESTRICT out = logits + g * stride + r;
      if (valid == kTileRows) {
        std::memcpy(out, dots + g * kTileRows, kTileRows * sizeof(float));
      } else {
        std::copy_n(dots + g * kTileRows, valid, out);
      }
    }
  }
}

void DotRowsTarget(const float* rows, int64_t count, int64_t head_dim, const float* queries,
                   int64_t group, float* logits, int64_t stride) {
  DotRowsOf(rows, count, head_dim, queries, group, logits, stride);
}
void DotHalfRowsTarget(const uint16_t* rows, int64_t count, int64_t head_dim, const float* queries,
                       int64_t group, float* logits, int64_t stride) {
  DotRowsOf(reinterpret_cast<const hwy::float16_t*>(rows), count, head_dim, queries, group, logits,
            stride);
}

// Scales and lows of one token's K or V as floats.
struct Grid {
  HWY_ALIGN float steps[2 * kMaxHeadDim];
  const float* scales;
  const float* lows;
};

// `first` is 0 for K, 2 for V: of the four runs of groups K scales | K lows | V scales | V lows.
HWY_INLINE void LoadGrid(const std::byte* HWY_RESTRICT token, int64_t groups, int64_t first,
                         Grid* HWY_RESTRICT grid) {
  const FourTag d;
  const hn::Rebind<hwy::float16_t, FourTag> d16;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  // There are 4 * groups halves: whole vectors of four, starting at one, never leave them.
  const int64_t begin = first * groups / lanes * lanes;
  const int64_t end = (first + 2) * groups;
  const hwy::float16_t* halves = reinterpret_cast<const hwy::float16_t*>(token);
  for (int64_t i = begin; i < end; i += lanes) {
    hn::StoreU(hn::PromoteTo(d, hn::LoadU(d16, halves + i)), d, grid->steps + (i - begin));
  }
  grid->scales = grid->steps + (first * groups - begin);
  grid->lows = grid->scales + groups;
}

// y [head_dim] = low + scale code: one token's K or V, balanced.
template <int kBits>
HWY_INLINE void Dequantize(const std::byte* HWY_RESTRICT packed, const Grid& grid,
                           int64_t group_channels, int64_t head_dim, float* HWY_RESTRICT y) {
  const Tag d;
  const int64_t blocks = head_dim / kCodeBlockChannels;
  const int64_t group_blocks = group_channels / kCodeBlockChannels;
  if (group_channels % kCodeBlockChannels == 0) {
    for (int64_t g = 0; g * group_blocks < blocks; ++g) {
      const Vector scale = hn::Set(d, grid.scales[g]);
      const Vector low = hn::Set(d, grid.lows[g]);
      ForEachCodeVector<kBits>(packed, head_dim, g * group_blocks, (g + 1) * group_blocks,
                               [&](int64_t j, Vector codes) HWY_ATTR {
                                 hn::StoreU(hn::MulAdd(codes, scale, low), d, y + j);
                               });
    }
    return;
  }
  ForEachCodeVector<kBits>(packed, head_dim, 0, blocks,
                           [&](int64_t j, Vector codes) HWY_ATTR { hn::StoreU(codes, d, y + j); });
  for (int64_t j = 0; j < head_dim; ++j) {
    y[j] = y[j] * grid.scales[j / group_channels] + grid.lows[j / group_channels];
  }
}

// Calls tile(first, valid, rows) for every four tokens, rows being their dequantised K (half 0) or
// V (half 1). The last tile repeats its last token.
template <int kBits, class Tile>
HWY_INLINE void ForEachCodeTile(int64_t group_channels, int64_t head_dim, int64_t half,
                                const std::byte* const* HWY_RESTRICT tokens, int64_t count,
                                const Tile& tile) {
  HWY_ALIGN float y[kTileRows * kMaxHeadDim];
  Grid grid;
  const int64_t groups = head_dim / group_channels;
  const int64_t packed_at = 8 * groups + half * PackedCodeBytes(kBits, head_dim);
  const int64_t token_bytes = 8 * groups + 2 * PackedCodeBytes(kBits, head_dim);
  constexpr int64_t kAhead = 4 * kTileRows;
  const float* rows[kTileRows];
  for (int64_t t = 0; t < count; t += kTileRows) {
    for (int64_t i = t + kAhead; i < std::min(t + kAhead + kTileRows, count); ++i) {
      PrefetchBytes(tokens[i], token_bytes);
    }
    const int64_t valid = std::min(kTileRows, count - t);
    for (int64_t i = 0; i < valid; ++i) {
      LoadGrid(tokens[t + i], groups, 2 * half, &grid);
      Dequantize<kBits>(tokens[t + i] + packed_at, grid, group_channels, head_dim,
                        y + i * head_dim);
    }
    for (int64_t i = 0; i < kTileRows; ++i) rows[i] = y + std::min(i, valid - 1) * head_dim;
    tile(t, valid, rows);
  }
}

template <int kBits>
void AddCodeDotsOfBits(int64_t group_channels, int64_t head_dim, const std::byte* const* tokens,
                       int64_t count, const float* HWY_RESTRICT queries, int64_t group,
                       float* HWY_RESTRICT logits, int64_t stride) {
  HWY_ALIGN float dots[kMaxGroupHeads * kTileRows];
  ForEachCodeTile<kBits>(group_channels, head_dim, 0, tokens, count,
                         [&](int64_t t, int64_t valid, const float* const(&rows)[kTileRows])
                             HWY_ATTR {
                               DotGroup(rows, queries, head_dim, group, dots);
                               for (int64_t g = 0; g < group; ++g) {
                                 for (int64_t i = 0; i < valid; ++i) {
                                   logits[g * stride + t + i] += dots[g * kTileRows + i];
                                 }
                               }
                             });
}

void AddCodeDotsTarget(int bits, int64_t group_channels, int64_t head_dim,
                       const std::byte* const* tokens, int64_t count, const float* queries,
                       int64_t group, float* logits, int64_t stride) {
  const auto add = bits == 2   ? AddCodeDotsOfBits<2>
                   : bits == 3 ? AddCodeDotsOfBits<3>
                               : AddCodeDotsOfBits<4>;
  add(group_channels, head_dim, tokens, count, queries, group, logits, stride);
}

// sums[h] += Σ_r weights[h * stride + r] rows[r], over four rows.
template <int kHeads, typename Element>
HWY_INLINE void SumTile(const Element* const (&rows)[kTileRows], const float* HWY_RESTRICT weights,
                        int64_t stride, int64_t valid, int64_t head_dim, float* HWY_RESTRICT sums) {
  const Tag d;
  Vector weight[kHeads][kTileRows];
  for (int h = 0; h < kHeads; ++h) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      weight[h][r] = hn::Set(d, r < valid ? weights[h * stride + r] : 0.0f);
    }
  }
  for (int64_t j = 0; j < head_dim; j += Lanes()) {
    const Vector row[kTileRows] = {LoadRow(rows[0] + j), LoadRow(rows[1] + j), LoadRow(rows[2] + j),
                                   LoadRow(rows[3] + j)};
    for (int h = 0; h < kHeads; ++h) {
      Vector sum = hn::LoadU(d, sums + h * head_dim + j);
      for (int r = 0; r < kTileRows; ++r) sum = hn::MulAdd(weight[h][r], row[r], sum);
      hn::StoreU(sum, d, sums + h * head_dim + j);
    }
  }
}

template <typename Element>
HWY_INLINE void SumGroup(const Element* const (&rows)[kTileRows], const float* HWY_RESTRICT weights,
                         int64_t stride, int64_t valid, int64_t head_dim, int64_t group,
                         float* HWY_RESTRICT sums) {
  int64_t g = 0;
  for (; g + kTileHeads <= group; g += kTileHeads) {
    SumTile<kTileHeads>(rows, weights + g * stride, stride, valid, head_dim, sums + g * head_dim);
  }
  weights += g * stride;
  sums += g * head_dim;
  switch (group - g) {
    case 3:
      return SumTile<3>(rows, weights, stride, valid, head_dim, sums);
    case 2:
      return SumTile<2>(rows, weights, stride, valid, head_dim, sums);
    case 1:
      return SumTile<1>(rows, weights, stride, valid, head_dim, sums);
    default:
      return;
  }
}

void AddWeightedHalfRowsTarget(const uint16_t* const* HWY_RESTRICT matrix, int64_t count,
                               int64_t head_dim, const float* HWY_RESTRICT weights, int64_t stride,
                               int64_t group, float* HWY_RESTRICT sums) {
  constexpr int64_t kAhead = 4 * kTileRows;
  for (int64_t r = 0; r < count; r += kTileRows) {
    for (int64_t i = r + kAhead; i < std::min(r + kAhead + kTileRows, count); ++i) {
      PrefetchBytes(matrix[i], head_dim * static_cast<int64_t>(sizeof(uint16_t)));
    }
    const int64_t valid = std::min(kTileRows, count - r);
    const hwy::float16_t* rows[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      rows[i] = reinterpret_cast<const hwy::float16_t*>(matrix[r + std::min(i, valid - 1)]);
    }
    SumGroup(rows, weights + r, stride, valid, head_dim, group, sums);
  }
}

template <int kBits>
void AddWeightedCodesOfBits(int64_t group_channels, int64_t head_dim,
                            const std::byte* const* tokens, int64_t count,
                            const float* HWY_RESTRICT weights, int64_t stride, int64_t group,
                            float* HWY_RESTRICT sums) {
  ForEachCodeTile<kBits>(
      group_channels, head_dim, 1, tokens, count,
      [&](int64_t t, int64_t valid, const float* const(&rows)[kTileRows])
          HWY_ATTR { SumGroup(rows, weights + t, stride, valid, head_dim, group, sums); });
}

void AddWeightedCodesTarget(int bits, int64_t group_channels, int64_t head_dim,
                            const std::byte* const* tokens, int64_t count, const float* weights,
                            int64_t stride, int64_t group, float* sums) {
  const auto add = bits == 2   ? AddWeightedCodesOfBits<2>
                   : bits == 3 ? AddWeightedCodesOfBits<3>
                               : AddWeightedCodesOfBits<4>;
  add(group_channels, head_dim, tokens, count, weights, stride, group, sums);
}

// The vector at x + i, `fill` in lanes from count on.
HWY_INLINE Vector LoadOr(const float* HWY_RESTRICT x, int64_t i, int64_t count, float fill) {
  const Tag d;
  const Vector v = hn::LoadU(d, x + i);
  if (i + Lanes() <= count) return v;
  return hn::IfThenElse(hn::FirstN(d, static_cast<size_t>(count - i)), v, hn::Set(d, fill));
}

float MaxOfTarget(const float* HWY_RESTRICT x, int64_t count) {
  const Tag d;
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  Vector max = hn::Set(d, kMinusInfinity);
  for (int64_t i = 0; i < count; i += Lanes()) {
    max = hn::Max(max, LoadOr(x, i, count, kMinusInfinity));
  }
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

float ExpAndSumTarget(const float* x, int64_t count, float shift, float* out) {
  const Tag d;
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  Vector sum = hn::Zero(d);
  for (int64_t i = 0; i < count; i += Lanes()) {
    const Vector e = hn::Exp(d, hn::Sub(LoadOr(x, i, count, kMinusInfinity), hn::Set(d, shift)));
    hn::StoreU(e, d, out + i);
    sum = hn::Add(sum, e);
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

void AddLogsTarget(const int32_t* HWY_RESTRICT counts, int64_t count, float* HWY_RESTRICT x) {
  const Tag d;
  const hn::RebindToSigned<Tag> di;
  for (int64_t i = 0; i < count; i += Lanes()) {
    const Vector n = hn::ConvertTo(d, hn::Max(hn::LoadU(di, counts + i), hn::Set(di, 1)));
    hn::StoreU(hn::Add(hn::LoadU(d, x + i), hn::Log(d, n)), d, x + i);
  }
}

// Unsigned integers in the opposite order of floats.
HWY_INLINE hn::Vec<hn::RebindToUnsigned<Tag>> DescendingKey(Vector x) {
  const hn::RebindToUnsigned<Tag> du;
  const hn::RebindToSigned<Tag> di;
  // + 0: -0 and 0 are equal.
  const auto bits = hn::BitCast(di, hn::Add(x, hn::Zero(Tag())));
  const auto sign = hn::BroadcastSignBit(bits);
  const auto ascending = hn::Xor(bits, hn::Or(sign, hn::Set(di, static_cast<int32_t>(0x80000000))));
  return hn::Not(hn::BitCast(du, ascending));
}

void DescendingKeysTarget(const float* HWY_RESTRICT x, int64_t count, uint32_t* HWY_RESTRICT keys) {
  const hn::RebindToUnsigned<Tag> du;
  for (int64_t i = 0; i < count; i += Lanes()) {
    hn::StoreU(DescendingKey(hn::LoadU(Tag(), x + i)), du, keys + i);
  }
}

// log Σ_g exp(logits[g] - lse[g]), always negative here.
HWY_INLINE Vector LogMass(const float* HWY_RESTRICT logits, int64_t stride, int64_t group,
                          const float* HWY_RESTRICT lse) {
  const Tag d;
  const float kLowest = std::numeric_limits<float>::lowest();
  Vector max =
      hn::Set(d, kLowest);  // not -infinity: of an empty cluster it is subtracted from itself
  for (int64_t g = 0; g < group; ++g) {
    max = hn::Max(max, hn::Sub(hn::LoadU(d, logits + g * stride), hn::Set(d, lse[g])));
  }
  Vector sum = hn::Zero(d);
  for (int64_t g = 0; g < group; ++g) {
    const Vector log_weight = hn::Sub(hn::LoadU(d, logits + g * stride), hn::Set(d, lse[g]));
    sum = hn::Add(sum, hn::Exp(d, hn::Sub(log_weight, max)));
  }
  return hn::Add(max, hn::Log(d, hn::Max(sum, hn::Set(d, 1.0f))));
}

void MassKeysTarget(const float* HWY_RESTRICT logits, const float* HWY_RESTRICT exps,
                    int64_t stride, int64_t count, int64_t group, const float* HWY_RESTRICT max,
                    const float* HWY_RESTRICT inverse_sums, uint32_t* HWY_RESTRICT keys) {
  constexpr float kSmall =
      1e-30f;  // log is -69: every logarithm used below it sorts after every sum
  const Tag d;
  const hn::RebindToUnsigned<Tag> du;
  float lse[kMaxGroupHeads];
  for (int64_t g = 0; g < group; ++g) lse[g] = max[g] - std::log(inverse_sums[g]);
  for (int64_t i = 0; i < count; i += Lanes()) {
    Vector mass = hn::Zero(d);
    for (int64_t g = 0; g < group; ++g) {
      mass = hn::MulAdd(hn::LoadU(d, exps + g * stride + i), hn::Set(d, inverse_sums[g]), mass);
    }
    const auto small = hn::Lt(mass, hn::Set(d, kSmall));
    if (!hn::AllFalse(d, small)) {
      mass = hn::IfThenElse(small, LogMass(logits + i, stride, group, lse), mass);
    }
    hn::StoreU(DescendingKey(mass), du, keys + i);
  }
}

}  // namespace clusterkv::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterkv::kernels {

HWY_EXPORT(DotRowsTarget);
HWY_EXPORT(DotHalfRowsTarget);
HWY_EXPORT(AddCodeDotsTarget);
HWY_EXPORT(AddWeightedHalfRowsTarget);
HWY_EXPORT(AddWeightedCodesTarget);
HWY_EXPORT(MaxOfTarget);
HWY_EXPORT(ExpAndSumTarget);
HWY_EXPORT(AddLogsTarget);
HWY_EXPORT(DescendingKeysTarget);
HWY_EXPORT(MassKeysTarget);

namespace select_simd {

void DotRows(const float* rows, int64_t count, int64_t head_dim, const float* queries,
             int64_t group, float* logits, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(DotRowsTarget)(rows, count, head_dim, queries, group, logits, stride);
}

void DotHalfRows(const uint16_t* rows, int64_t count, int64_t head_dim, const float* queries,
                 int64_t group, float* logits, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(DotHalfRowsTarget)(rows, count, head_dim, queries, group, logits, stride);
}

void AddCodeDots(const CodesParams& codes, int64_t head_dim, const std::byte* const* tokens,
                 int64_t count, const float* queries, int64_t group, float* logits,
                 int64_t stride) {
  HWY_DYNAMIC_DISPATCH(AddCodeDotsTarget)
  (codes.bits, codes.group_channels, head_dim, tokens, count, queries, group, logits, stride);
}

void AddWeightedHalfRows(const uint16_t* const* rows, int64_t count, int64_t head_dim,
                         const float* weights, int64_t stride, int64_t group, float* sums) {
  HWY_DYNAMIC_DISPATCH(AddWeightedHalfRowsTarget)
  (rows, count, head_dim, weights, stride, group, sums);
}

void AddWeightedCodes(const CodesParams& codes, int64_t head_dim, const std::byte* const* tokens,
                      int64_t count, const float* weights, int64_t stride, int64_t group,
                      float* sums) {
  HWY_DYNAMIC_DISPATCH(AddWeightedCodesTarget)
  (codes.bits, codes.group_channels, head_dim, tokens, count, weights, stride, group, sums);
}

float MaxOf(const float* x, int64_t count) { return HWY_DYNAMIC_DISPATCH(MaxOfTarget)(x, count); }

float ExpAndSum(const float* x, int64_t count, float shift, float* out) {
  return HWY_DYNAMIC_DISPATCH(ExpAndSumTarget)(x, count, shift, out);
}

void AddLogs(const int32_t* counts, int64_t count, float* x) {
  HWY_DYNAMIC_DISPATCH(AddLogsTarget)(counts, count, x);
}

void MassKeys(const float* logits, const float* exps, int64_t stride, int64_t count, int64_t group,
              const float* max, const float* inverse_sums, uint32_t* keys) {
  HWY_DYNAMIC_DISPATCH(MassKeysTarget)
  (logits, exps, stride, count, group, max, inverse_sums, keys);
}

void DescendingKeys(const float* x, int64_t count, uint32_t* keys) {
  HWY_DYNAMIC_DISPATCH(DescendingKeysTarget)(x, count, keys);
}

}  // namespace select_simd
}  // namespace clusterkv::kernels
#endif  // HWY_ONCE
