// Writes the GPU tests' cases: inputs and what the references make of them. Usage: make_cases DIR
#include <cmath>
#include <cstdint>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/base/parallel.h"
#include "kernels/codec/record_codec.h"
#include "kernels/index/index.h"
#include "kernels/kmeans/kmeans.h"
#include "kernels/kmeans/kmeans_internal.h"
#include "kernels/select/select.h"
#include "tests/gpu/case_file.h"

namespace clusterkv::kernels {
namespace {

using gpu_test::CaseFile;

std::mt19937_64 generator(20240607);

float Normal() {
  static std::normal_distribution<float> normal;
  return normal(generator);
}

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::cerr << status << std::endl;
  std::abort();
}

struct SelectCase {
  const char* name;
  int64_t head_dim, group, kv_heads;
  std::vector<int64_t> parts;
  CodesParams codes;
  SelectParams params;
  int64_t sinks = 16;
  int64_t page_bytes = 8192;
  ElementType type = ElementType::kBFloat16;
  bool balanced = true;
  bool equal_keys = false;
  bool half_edges = false;  // rows equal their center, which is what halves can hardly hold
  float spread = 1.0f;      // of the logits
  const char* codec = "raw";
};

// A number that a half rounds: of any size from below the smallest half to beyond the largest, near
// a tie as often as not.
float HalfEdge() {
  constexpr uint32_t kTails[] = {0, 1, 0xfff, 0x1000, 0x1001, 0x1fff};
  const auto random = static_cast<uint32_t>(generator());
  const uint32_t of_half = 0x400u | (random & 0x3ffu);
  const uint32_t mantissa = of_half << 13 | kTails[(random >> 10 & 0x3fu) % std::size(kTails)];
  const int exponent = static_cast<int>((random >> 16 & 0x7fffu) % 46) - 27;
  const float magnitude = std::ldexp(static_cast<float>(mantissa), exponent - 23);
  return random >> 31 != 0 ? -magnitude : magnitude;
}

// Tokens around random centers; channels of different size; [tokens, kv_heads, head_dim] of the
// type.
std::vector<std::byte> Rows(const SelectCase& c, int64_t tokens, float noise) {
  const int64_t width = c.kv_heads * c.head_dim;
  const int64_t centers = std::max<int64_t>(1, tokens / 20);
  std::vector<float> center(centers * width), rows(tokens * width);
  for (float& x : center) x = c.half_edges ? HalfEdge() : Normal();
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t from = static_cast<int64_t>(generator() % static_cast<uint64_t>(centers));
    for (int64_t j = 0; j < width; ++j) {
      const float size = j % 11 == 3 ? 8.0f : 1.0f;
      const float of_center = center[from * width + j];
      rows[t * width + j] = c.equal_keys   ? 1.0f
                            : c.half_edges ? of_center
                                           : size * (of_center + noise * Normal());
    }
  }
  std::vector<std::byte> out(rows.size() * ElementBytes(c.type));
  FromFloat(rows.data(), c.type, static_cast<int64_t>(rows.size()), out.data());
  return out;
}

// An arena whose pages are handed out in a scattered order.
class Pages {
 public:
  Pages(int64_t page_bytes, int64_t pages) : arena_(page_bytes * pages) {
    for (int64_t i = 0; i < pages; ++i) free_.push_back(static_cast<uint32_t>(i));
    std::shuffle(free_.begin(), free_.end(), generator);
  }
  std::vector<uint32_t> Take(int64_t count) {
    std::vector<uint32_t> pages(free_.end() - count, free_.end());
    free_.resize(free_.size() - count);
    return pages;
  }
  std::byte* base() { return arena_.data(); }
  const std::vector<std::byte>& bytes() const { return arena_; }

 private:
  std::vector<std::byte> arena_;
  std::vector<uint32_t> free_;
};

KvShape ShapeOf(const SelectCase& c) {
  return {.kv_heads = c.kv_heads,
          .query_heads = c.kv_heads * c.group,
          .head_dim = c.head_dim,
          .element_type = c.type};
}

// The parts of a case's index, built over a scattered arena.
struct BuiltIndex {
  std::vector<IndexPartView> views;
  std::vector<std::vector<uint32_t>> page_lists;
};

void BuildPart(const SelectCase& c, const IndexParams& index, const IndexLayout& layout,
               const std::vector<float>& query_rms, int64_t first_token, int64_t tokens,
               Pages& arena, BuiltIndex* built, CaseFile* file) {
  const KvShape shape = ShapeOf(c);
  const int64_t row_bytes = c.kv_heads * c.head_dim * ElementBytes(c.type);
  const size_t p = built->views.size();
  built->page_lists.push_back(arena.Take(layout.Pages(c.page_bytes)));
  const MutableIndexPartView part =
      MakeIndexPartView(layout, shape, index, first_token, tokens, arena.base(),
                        built->page_lists.back().data(), c.page_bytes);
  const std::vector<std::byte> keys = Rows(c, tokens, 0.5f), values = Rows(c, tokens, 0.5f);
  const uint32_t zero = 0;
  IndexInput input;
  input.keys = MakePagedView(keys.data(), &zero, tokens * row_bytes, row_bytes, tokens);
  input.values = MakePagedView(values.data(), &zero, tokens * row_bytes, row_bytes, tokens);
  if (c.balanced) input.query_rms = query_rms;
  PagedView channels;
  if (p > 0) {
    channels = built->views[0].channels;
    input.inherited_channels = &channels;
  }
  Check(BuildIndexPart(shape, index, *FindRecordCodec(c.codec), input, part, SerialFor));
  built->views.push_back(part);
  const std::string prefix = "part" + std::to_string(p) + ".";
  const int64_t meta[] = {first_token, tokens, part.clusters};
  file->Put(prefix + "meta", meta, 3);
  file->Put(prefix + "pages", built->page_lists.back());
  std::vector<int64_t> arrays;
  for (const IndexArrayLayout& array : layout.arrays) {
    arrays.push_back(array.element_bytes);
    arrays.push_back(array.size);
  }
  file->Put(prefix + "arrays", arrays);
  file->Put(prefix + "keys", keys);
  file->Put(prefix + "values", values);
}

void PutSelection(const std::string& prefix, HeadSelection selection, CaseFile* file) {
  std::sort(selection.scored_clusters.begin(), selection.scored_clusters.end());
  std::sort(selection.estimated_clusters.begin(), selection.estimated_clusters.end());
  file->Put(prefix + "positions", selection.positions);
  file->Put(prefix + "parts", selection.parts);
  file->Put(prefix + "slots", selection.slots);
  file->Put(prefix + "clusters", selection.clusters);
  file->Put(prefix + "scored_clusters", selection.scored_clusters);
  file->Put(prefix + "estimated_clusters", selection.estimated_clusters);
  file->PutValue<int64_t>(prefix + "coded_tokens", selection.coded_tokens);
  file->Put(prefix + "state_output", selection.state_output);
  file->Put(prefix + "state_lse", selection.state_lse);
}

// What SelectReference answers to random queries, per KV head.
void PutAnswers(const SelectCase& c, const BuiltIndex& built, CaseFile* file) {
  const KvShape shape = ShapeOf(c);
  std::vector<float> queries(shape.query_heads * c.head_dim);
  for (float& x : queries) x = c.spread * Normal();
  const std::vector<std::byte> sinks = Rows(c, std::max<int64_t>(1, c.sinks), 0.5f);
  file->Put("queries", queries);
  file->Put("sinks", sinks);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  file->PutValue<float>("scale", scale);
  const int64_t floats = c.group * c.head_dim;
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    SelectInput input;
    input.shape = shape;
    input.codes = c.codes;
    input.kv_head = h;
    input.scale = scale;
    input.queries = absl::MakeConstSpan(queries).subspan(h * floats, floats);
    input.parts = built.views;
    input.sink_keys = sinks.data() + h * c.head_dim * ElementBytes(c.type);
    input.sink_key_stride_bytes = c.kv_heads * c.head_dim * ElementBytes(c.type);
    input.sink_tokens = c.sinks;
    HeadSelection selection;
    Check(SelectReference(c.params, input, &selection));
    PutSelection("head" + std::to_string(h) + ".", std::move(selection), file);
  }
}

void WriteSelectCase(const SelectCase& c, const std::string& folder) {
  IndexParams index;
  index.codes = c.codes;
  index.segment_tokens = 1024;
  index.iterations = 4;
  CaseFile file;
  int64_t pages_needed = 7;
  std::vector<IndexLayout> layouts;
  for (int64_t tokens : c.parts) {
    layouts.push_back(MakeIndexLayout(ShapeOf(c), index, *FindRecordCodec(c.codec), tokens));
    pages_needed += layouts.back().Pages(c.page_bytes);
  }
  Pages arena(c.page_bytes, pages_needed);
  std::vector<float> query_rms(c.kv_heads * c.head_dim);
  for (float& x : query_rms) x = 0.5f + std::abs(Normal());
  BuiltIndex built;
  int64_t first_token = c.sinks;
  for (size_t p = 0; p < c.parts.size(); ++p) {
    BuildPart(c, index, layouts[p], query_rms, first_token, c.parts[p], arena, &built, &file);
    first_token += c.parts[p];
  }
  file.Put("arena", arena.bytes());
  file.PutValue<int64_t>("page_bytes", c.page_bytes);
  file.Put("query_rms", query_rms);
  const int64_t shape_numbers[] = {c.kv_heads,
                                   c.group,
                                   c.head_dim,
                                   static_cast<int64_t>(c.type),
                                   c.sinks,
                                   c.codes.bits,
                                   c.codes.group_channels,
                                   static_cast<int64_t>(c.parts.size()),
                                   c.balanced};
  file.Put("shape", shape_numbers, 9);
  const int64_t params[] = {c.params.budget_tokens, c.params.scored_tokens, c.params.answer_scored};
  file.Put("params", params, 3);
  file.PutValue<float>("fraction", c.params.estimated_fraction);
  PutAnswers(c, built, &file);
  file.Write(folder + "/select_" + c.name + ".case");
}

SelectParams Params(int64_t budget, int64_t scored, float fraction, bool answer = true) {
  SelectParams params;
  params.budget_tokens = budget;
  params.scored_tokens = scored;
  params.estimated_fraction = fraction;
  params.answer_scored = answer;
  return params;
}

// clang-format off
const SelectCase kSelectCases[] = {
    {.name = "default", .head_dim = 128, .group = 4, .kv_heads = 2, .parts = {2003, 320},
     .codes = {2, 32}, .params = Params(64, 512, 0.25f)},
    {.name = "four_bits", .head_dim = 64, .group = 1, .kv_heads = 1, .parts = {257},
     .codes = {4, 64}, .params = Params(20, 100, 0.25f), .sinks = 3, .page_bytes = 4096,
     .type = ElementType::kFloat16, .balanced = false},
    {.name = "three_bits", .head_dim = 128, .group = 8, .kv_heads = 1, .parts = {1000, 320, 321},
     .codes = {3, 32}, .params = Params(100, 400, 0.5f), .codec = "k8v4"},
    {.name = "odd_group", .head_dim = 256, .group = 7, .kv_heads = 1, .parts = {531},
     .codes = {2, 16}, .params = Params(33, 129, 0.1f), .sinks = 1},
    {.name = "everything_scored", .head_dim = 16, .group = 3, .kv_heads = 2, .parts = {50},
     .codes = {2, 16}, .params = Params(8, 4096, 0.25f), .page_bytes = 4096,
     .type = ElementType::kFloat32},
    {.name = "no_codes", .head_dim = 128, .group = 4, .kv_heads = 1, .parts = {700, 17},
     .codes = {0, 32}, .params = Params(100, 0, 0.25f)},
    {.name = "recall", .head_dim = 128, .group = 4, .kv_heads = 2, .parts = {1500},
     .codes = {2, 32}, .params = Params(64, 384, 0.25f, false)},
    {.name = "wide", .head_dim = 512, .group = 2, .kv_heads = 1, .parts = {300},
     .codes = {4, 128}, .params = Params(40, 90, 0.25f)},
    {.name = "many_heads", .head_dim = 48, .group = 32, .kv_heads = 1, .parts = {400},
     .codes = {3, 48}, .params = Params(40, 111, 0.3f), .sinks = 0},
    {.name = "nothing_left", .head_dim = 64, .group = 2, .kv_heads = 1, .parts = {40},
     .codes = {2, 32}, .params = Params(200, 64, 0.0f)},
    {.name = "ties", .head_dim = 64, .group = 2, .kv_heads = 1, .parts = {300},
     .codes = {2, 32}, .params = Params(30, 100, 0.25f), .balanced = false, .equal_keys = true},
    {.name = "peaked", .head_dim = 128, .group = 4, .kv_heads = 1, .parts = {1200},
     .codes = {2, 32}, .params = Params(64, 512, 0.25f), .spread = 20.0f},
    {.name = "one_token", .head_dim = 128, .group = 1, .kv_heads = 2, .parts = {1},
     .codes = {2, 32}, .params = Params(17, 100, 0.25f)},
    {.name = "three_heads", .head_dim = 128, .group = 3, .kv_heads = 1,
     .parts = {401, 17, 16, 33, 18, 19, 20, 21, 22}, .codes = {2, 32},
     .params = Params(97, 211, 1.0f), .sinks = 5, .page_bytes = 4096,
     .type = ElementType::kFloat16},
    {.name = "equal_tokens", .head_dim = 128, .group = 2, .kv_heads = 1, .parts = {1000},
     .codes = {2, 32}, .params = Params(30, 700, 0.25f), .balanced = false, .equal_keys = true},
    {.name = "odd_tokens", .head_dim = 128, .group = 4, .kv_heads = 1, .parts = {1300},
     .codes = {2, 32}, .params = Params(64, 1003, 0.25f)},
    {.name = "flat", .head_dim = 128, .group = 4, .kv_heads = 1, .parts = {8700},
     .codes = {2, 32}, .params = Params(64, 800, 0.25f), .spread = 0.01f},
    {.name = "half_edges", .head_dim = 128, .group = 4, .kv_heads = 2, .parts = {1100},
     .codes = {2, 32}, .params = Params(64, 512, 0.25f), .type = ElementType::kFloat32,
     .balanced = false, .half_edges = true},
    {.name = "small", .head_dim = 128, .group = 4, .kv_heads = 1, .parts = {150},
     .codes = {2, 32}, .params = Params(20, 80, 0.25f), .sinks = 2, .page_bytes = 4096},
    {.name = "small_eight", .head_dim = 128, .group = 8, .kv_heads = 1, .parts = {150},
     .codes = {2, 32}, .params = Params(20, 80, 0.25f), .sinks = 2, .page_bytes = 4096},
    {.name = "eight_heads", .head_dim = 128, .group = 8, .kv_heads = 2, .parts = {1103, 320},
     .codes = {2, 32}, .params = Params(64, 512, 0.25f)},
    {.name = "seven_heads", .head_dim = 128, .group = 7, .kv_heads = 1,
     .parts = {401, 17, 16, 33, 18, 19, 20, 21, 22}, .codes = {2, 32},
     .params = Params(97, 211, 1.0f), .sinks = 5, .page_bytes = 4096},
    {.name = "five_heads", .head_dim = 128, .group = 5, .kv_heads = 1, .parts = {700, 17},
     .codes = {0, 32}, .params = Params(100, 0, 0.25f)},
    {.name = "eight_equal", .head_dim = 128, .group = 8, .kv_heads = 1, .parts = {1000},
     .codes = {2, 32}, .params = Params(30, 700, 0.25f), .balanced = false, .equal_keys = true},
};
// clang-format on

void WriteSelectCases(const std::string& folder) {
  for (const SelectCase& c : kSelectCases) WriteSelectCase(c, folder);
}

struct AttentionCase {
  const char* name;
  int64_t head_dim, group;
  std::vector<int64_t> runs;
  int64_t records;
  ElementType type = ElementType::kBFloat16;
  const char* codec = "raw";
  bool state = true;
  bool masks = false;
  float spread = 1.0f;
};

std::vector<std::byte> RandomElements(int64_t count, ElementType type) {
  std::vector<float> x(count);
  for (float& v : x) v = Normal();
  std::vector<std::byte> out(count * ElementBytes(type));
  FromFloat(x.data(), type, count, out.data());
  return out;
}

void WriteAttentionCase(const AttentionCase& c, const std::string& folder) {
  CaseFile file;
  const RecordCodec& codec = *FindRecordCodec(c.codec);
  const int64_t row_bytes = c.head_dim * ElementBytes(c.type);
  const int64_t record_bytes = codec.RecordBytes(c.type, c.head_dim);
  std::vector<std::vector<std::byte>> keys, values;
  std::vector<RawRun> runs;
  // Rows of two heads beside each other: this case's is the first.
  for (int64_t tokens : c.runs) {
    keys.push_back(RandomElements(tokens * 2 * c.head_dim, c.type));
    values.push_back(RandomElements(tokens * 2 * c.head_dim, c.type));
    runs.push_back(
        {keys.back().data(), values.back().data(), 2 * row_bytes, 2 * row_bytes, tokens});
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    file.Put("keys" + std::to_string(i), keys[i]);
    file.Put("values" + std::to_string(i), values[i]);
  }
  const int64_t slot_count = c.records + 5;
  const std::vector<std::byte> k = RandomElements(slot_count * c.head_dim, c.type);
  const std::vector<std::byte> v = RandomElements(slot_count * c.head_dim, c.type);
  std::vector<std::byte> slots_memory(slot_count * record_bytes);
  codec.Encode(k.data(), row_bytes, v.data(), row_bytes, c.type, c.head_dim, slot_count,
               slots_memory.data());
  std::vector<int32_t> slots(slot_count);
  for (int64_t i = 0; i < slot_count; ++i) slots[i] = static_cast<int32_t>(i);
  std::shuffle(slots.begin(), slots.end(), generator);
  slots.resize(c.records);
  std::vector<uint32_t> masks;
  for (int64_t i = 0; c.masks && i < c.records; ++i)
    masks.push_back(static_cast<uint32_t>(generator()));
  std::vector<float> queries(c.group * c.head_dim), state(c.group * c.head_dim), state_lse(c.group);
  for (float& x : queries) x = c.spread * Normal();
  for (float& x : state) x = Normal();
  for (float& x : state_lse) x = 3 * Normal();
  if (c.state) state_lse[0] = -INFINITY;
  std::vector<float> output(c.group * c.head_dim), lse(c.group);
  const AttentionParams params{.group = c.group,
                               .head_dim = c.head_dim,
                               .element_type = c.type,
                               .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim))};
  RecordRun records;
  records.codec = &codec;
  records.slot_base = slots_memory.data();
  records.slots = slots;
  records.head_masks = masks;
  AttentionState attention_state;
  if (c.state) attention_state = {state, state_lse};
  Check(SparseAttentionReference(params, queries, runs, records, attention_state,
                                 absl::MakeSpan(output), absl::MakeSpan(lse)));
  const int64_t numbers[] = {c.head_dim,
                             c.group,
                             static_cast<int64_t>(c.type),
                             codec.name() == "k8v4",
                             static_cast<int64_t>(runs.size()),
                             c.state,
                             c.masks};
  file.Put("numbers", numbers, 7);
  file.PutValue<float>("scale", params.scale);
  file.Put("run_tokens", c.runs);
  file.Put("slots_memory", slots_memory);
  file.Put("slots", slots);
  file.Put("masks", masks);
  file.Put("queries", queries);
  file.Put("state", state);
  file.Put("state_lse", state_lse);
  file.Put("output", output);
  file.Put("lse", lse);
  file.Write(folder + "/attention_" + c.name + ".case");
}

void WriteAttentionCases(const std::string& folder) {
  const AttentionCase cases[] = {
      {.name = "bf16", .head_dim = 128, .group = 4, .runs = {16, 301}, .records = 48},
      {.name = "fp16",
       .head_dim = 64,
       .group = 8,
       .runs = {17},
       .records = 1000,
       .type = ElementType::kFloat16},
      {.name = "fp32",
       .head_dim = 80,
       .group = 3,
       .runs = {1, 2, 15},
       .records = 97,
       .type = ElementType::kFloat32,
       .state = false},
      {.name = "k8v4",
       .head_dim = 128,
       .group = 4,
       .runs = {16, 33},
       .records = 211,
       .codec = "k8v4"},
      {.name = "k8v4_fp32",
       .head_dim = 16,
       .group = 1,
       .runs = {3},
       .records = 31,
       .type = ElementType::kFloat32,
       .codec = "k8v4"},
      {.name = "wide", .head_dim = 512, .group = 9, .runs = {16}, .records = 50, .masks = true},
      {.name = "masks",
       .head_dim = 256,
       .group = 32,
       .runs = {},
       .records = 77,
       .codec = "k8v4",
       .masks = true},
      {.name = "only_state", .head_dim = 48, .group = 2, .runs = {}, .records = 0},
      {.name = "nothing", .head_dim = 48, .group = 2, .runs = {0}, .records = 0, .state = false},
      {.name = "peaked", .head_dim = 128, .group = 4, .runs = {64}, .records = 64, .spread = 30.0f},
  };
  for (const AttentionCase& c : cases) WriteAttentionCase(c, folder);
}

struct KMeansCase {
  const char* name;
  int64_t head_dim, heads;
  std::vector<std::pair<int64_t, int64_t>> problems;  // rows, clusters; each for every head
  int iterations = 3;
  ElementType type = ElementType::kBFloat16;
  bool weighted = true;
  int64_t copies = 1;  // of each row, so that there are ties
  bool near_copies = false;
  KMeansInit init = KMeansInit::kStride;
};

// Rows of head h repeat after 8^(h + 1), but for the last bit of one channel.
void MakeNearCopies(const KMeansCase& c, int64_t rows, std::vector<std::byte>& data) {
  const int64_t element = ElementBytes(c.type), head_bytes = c.head_dim * element;
  int64_t period = 1;
  for (int64_t h = 0; h < c.heads; ++h) {
    period *= 8;
    for (int64_t i = period; i < rows; ++i) {
      std::byte* row = &data[(i * c.heads + h) * head_bytes];
      std::copy_n(&data[(i % period * c.heads + h) * head_bytes], head_bytes, row);
      row[i % c.head_dim * element] ^= std::byte{1};
    }
  }
}

// Rows of all problems one after another, [rows, heads, head_dim], over scattered pages.
void WriteKMeansCase(const KMeansCase& c, const std::string& folder) {
  CaseFile file;
  SelectCase rows_of;
  rows_of.head_dim = c.head_dim;
  rows_of.kv_heads = c.heads;
  rows_of.type = c.type;
  constexpr int64_t kPageBytes = 65536;
  const int64_t row_bytes = c.heads * c.head_dim * ElementBytes(c.type);
  int64_t total = 0;
  for (const auto& [rows, clusters] : c.problems) total += rows;
  std::vector<std::byte> data = Rows(rows_of, total, 0.7f);
  for (int64_t i = 0; i < total; ++i) {
    std::copy_n(&data[i / c.copies * c.copies * row_bytes], row_bytes, &data[i * row_bytes]);
  }
  if (c.near_copies) MakeNearCopies(c, total, data);
  Pages arena(kPageBytes, PagesFor(total, row_bytes, kPageBytes) + 3);
  const auto pages = arena.Take(PagesFor(total, row_bytes, kPageBytes));
  const auto view = MakePagedView(arena.base(), pages.data(), kPageBytes, row_bytes, total);
  for (int64_t i = 0; i < total; ++i) std::copy_n(&data[i * row_bytes], row_bytes, view.At(i));
  std::vector<float> weights(c.heads * c.head_dim, 1.0f);
  for (float& w : weights) w = c.weighted ? 0.2f + std::abs(Normal()) : 1.0f;
  std::vector<int64_t> sizes;
  std::vector<int32_t> labels, start;
  std::vector<float> centroids;
  int64_t first = 0;
  for (const auto& [rows, clusters] : c.problems) {
    for (int64_t h = 0; h < c.heads; ++h) {
      KMeansParams params{.rows = rows, .dim = c.head_dim, .clusters = clusters};
      params.iterations = c.iterations;
      params.init = c.init;
      std::vector<float> keys(rows * c.head_dim);
      for (int64_t i = 0; i < rows; ++i) {
        ToFloat(&data[(first + i) * row_bytes + h * c.head_dim * ElementBytes(c.type)], c.type,
                c.head_dim, &keys[i * c.head_dim]);
        for (int64_t j = 0; j < c.head_dim; ++j) {
          keys[i * c.head_dim + j] *= weights[h * c.head_dim + j];
        }
      }
      std::vector<int32_t> one_labels(rows), one_sizes(clusters);
      std::vector<float> one_centroids(clusters * c.head_dim);
      Check(KMeans(params, keys, absl::MakeSpan(one_labels), absl::MakeSpan(one_centroids),
                   absl::MakeSpan(one_sizes), SerialFor));
      sizes.insert(sizes.end(), {first, rows, h, clusters});
      labels.insert(labels.end(), one_labels.begin(), one_labels.end());
      centroids.insert(centroids.end(), one_centroids.begin(), one_centroids.end());
      const auto initial = internal::InitialRows(params);
      start.insert(start.end(), initial.begin(), initial.end());
    }
    first += rows;
  }
  const int64_t numbers[] = {c.head_dim,   c.heads,    static_cast<int64_t>(c.type),
                             c.iterations, c.weighted, c.init == KMeansInit::kRandom};
  file.Put("numbers", numbers, 6);
  file.PutValue<int64_t>("page_bytes", kPageBytes);
  file.Put("arena", arena.bytes());
  file.Put("pages", pages);
  file.Put("weights", weights);
  file.Put("problems", sizes);
  file.Put("labels", labels);
  file.Put("centroids", centroids);
  file.Put("initial_rows", start);
  file.Write(folder + "/kmeans_" + c.name + ".case");
}

void WriteKMeansCases(const std::string& folder) {
  const KMeansCase cases[] = {
      {.name = "segments", .head_dim = 128, .heads = 2, .problems = {{1024, 64}, {977, 61}}},
      {.name = "small",
       .head_dim = 16,
       .heads = 1,
       .problems = {{1, 1}, {2, 2}, {37, 5}, {260, 1}}},
      {.name = "fp16",
       .head_dim = 64,
       .heads = 3,
       .problems = {{513, 100}},
       .type = ElementType::kFloat16,
       .weighted = false},
      {.name = "fp32",
       .head_dim = 80,
       .heads = 1,
       .problems = {{300, 40}, {64, 64}},
       .type = ElementType::kFloat32,
       .init = KMeansInit::kRandom},
      {.name = "wide", .head_dim = 256, .heads = 1, .problems = {{300, 19}}},
      {.name = "widest", .head_dim = 512, .heads = 1, .problems = {{200, 13}}},
      {.name = "ties", .head_dim = 128, .heads = 1, .problems = {{400, 150}}, .copies = 4},
      {.name = "near_ties",
       .head_dim = 128,
       .heads = 2,
       .problems = {{192, 192}},
       .iterations = 2,
       .near_copies = true},
      {.name = "many_clusters",
       .head_dim = 32,
       .heads = 1,
       .problems = {{1500, 900}, {600, 300}, {520, 70}},
       .iterations = 2},
  };
  for (const KMeansCase& c : cases) WriteKMeansCase(c, folder);
}

struct CodecCase {
  const char* name;
  const char* codec;
  int64_t head_dim, count;
  ElementType type = ElementType::kBFloat16;
};

// Tokens beside each other's heads: rows of twice head_dim, of which the first half is coded.
void WriteCodecCase(const CodecCase& c, const std::string& folder) {
  const RecordCodec& codec = *FindRecordCodec(c.codec);
  const int64_t element = ElementBytes(c.type), stride = 2 * c.head_dim * element;
  const int64_t bytes = codec.RecordBytes(c.type, c.head_dim);
  std::vector<std::byte> rows[2];
  for (int half = 0; half < 2; ++half) {
    std::vector<float> x(2 * c.count * c.head_dim);
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t token = i / (2 * c.head_dim);
      x[i] = Normal();
      if (token % 7 == 3) x[i] = half == 0 ? -1.5f : 0.0f;  // constant
      if (token % 7 == 5 && i % 2 == 0) x[i] = -0.0f;       // zeros of both signs
      if (token % 7 == 6 && i % 5 == 0) x[i] *= 60000.0f;   // beyond fp16's range
      if (token % 7 == 1) x[i] *= 1e-7f;                    // scales are subnormal halves
      if (c.type == ElementType::kFloat16) x[i] = std::clamp(x[i], -65504.0f, 65504.0f);
    }
    rows[half].resize(x.size() * element);
    FromFloat(x.data(), c.type, static_cast<int64_t>(x.size()), rows[half].data());
  }
  std::vector<std::byte> records(c.count * bytes);
  codec.Encode(rows[0].data(), stride, rows[1].data(), stride, c.type, c.head_dim, c.count,
               records.data());
  std::vector<float> keys(c.count * c.head_dim), values(keys.size());
  std::vector<int32_t> slots(c.count);
  for (int64_t i = 0; i < c.count; ++i) {
    codec.Decode(&records[i * bytes], c.type, c.head_dim, &keys[i * c.head_dim],
                 &values[i * c.head_dim]);
    slots[i] = static_cast<int32_t>(generator() % static_cast<uint64_t>(c.count));
  }
  CaseFile file;
  const int64_t numbers[] = {c.head_dim, static_cast<int64_t>(c.type), codec.name() == "k8v4",
                             c.count, stride};
  file.Put("numbers", numbers, 5);
  file.Put("keys", rows[0]);
  file.Put("values", rows[1]);
  file.Put("records", records);
  file.Put("slots", slots);
  file.Put("decoded_keys", keys);
  file.Put("decoded_values", values);
  file.Write(folder + "/codec_" + c.name + ".case");
}

void WriteCodecCases(const std::string& folder) {
  const CodecCase cases[] = {
      {"raw_bf16", "raw", 128, 257},
      {"raw_fp32", "raw", 16, 31, ElementType::kFloat32},
      {"k8v4_bf16", "k8v4", 128, 257},
      {"k8v4_fp16", "k8v4", 48, 97, ElementType::kFloat16},
      {"k8v4_fp32", "k8v4", 80, 65, ElementType::kFloat32},
      {"k8v4_wide", "k8v4", 512, 19},
      {"k8v4_one", "k8v4", 16, 1},
  };
  for (const CodecCase& c : cases) WriteCodecCase(c, folder);
}

}  // namespace
}  // namespace clusterkv::kernels

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: make_cases DIR" << std::endl;
    return 2;
  }
  clusterkv::kernels::WriteSelectCases(argv[1]);
  clusterkv::kernels::WriteAttentionCases(argv[1]);
  clusterkv::kernels::WriteKMeansCases(argv[1]);
  clusterkv::kernels::WriteCodecCases(argv[1]);
  return 0;
}
