// Select and answer of one KV head and step, against a loop that only reads the same bytes:
// centroids, codes of the scored tokens, value means of the clusters that enter the state. 32k
// tokens, 2,048 clusters, 8 KV heads in turn, so that neither side finds its bytes in the nearest
// cache. Then select and answer over an index in huge pages, as the arena has them, against small
// ones; and the correction of an exact zone under k8v4 against reading its records and remainders.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention/correction.h"
#include "kernels/base/check.h"
#include "kernels/select/select.h"
#include "tests/bench/bench.h"
#include "tests/kernels/testing/select_fixture.h"

namespace clusterkv::kernels {
namespace {

using testing::MakeShape;
using testing::PlantedPart;
using testing::SelectFixture;
using testing::TestPartSpec;

constexpr int64_t kKvHeads = 8;
constexpr int64_t kGroup = 4;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kTokens = 32'768 - SelectFixture::kSinks;
constexpr int64_t kClusters = 2'048;
constexpr int64_t kScored = 2'048;
constexpr uint32_t kSeed = 5;

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define CLUSTERKV_EVERY_TARGET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLUSTERKV_EVERY_TARGET
#endif

// The or of all bytes: what the compiler makes of it is bound by loads.
CLUSTERKV_EVERY_TARGET uint64_t Read(const std::byte* bytes, int64_t count) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(bytes);
  uint64_t all = 0;
  for (int64_t i = 0; i < count / 8; ++i) all |= words[i];
  return all;
}

volatile uint64_t sink;

// Reads what a selection of that head must read.
void ReadTheSame(SelectFixture& f, int64_t head, const HeadSelection& selection, bool answer) {
  const IndexPartView& view = f.part(0).view();
  uint64_t all = 0;
  const auto read = [&](const PagedView& array, int64_t begin, int64_t end) {
    ForEachRun(array, begin, end, [&](const std::byte* run, int64_t, int64_t count) {
      all |= Read(run, count * array.element_bytes);
    });
  };
  read(view.centroids, head * kClusters, (head + 1) * kClusters);
  for (int32_t cluster : selection.scored_clusters) {
    const int64_t row = head * (kClusters + 1) + cluster;
    read(view.codes, head * kTokens + *view.cluster_begin.As<int32_t>(row),
         head * kTokens + *view.cluster_begin.As<int32_t>(row + 1));
    if (answer) read(view.value_means, head * kClusters + cluster, head * kClusters + cluster + 1);
  }
  for (int32_t cluster : selection.estimated_clusters) {
    read(view.value_means, head * kClusters + cluster, head * kClusters + cluster + 1);
  }
  sink = all;
}

void Measure(bench::Report& report, const CodesParams& codes, SelectFixture& f, bool answer) {
  SelectParams params;
  params.budget_tokens = 64;
  params.scored_tokens = kScored;
  params.answer_scored = answer;
  params.estimated_fraction = answer ? 0.25f : 0.0f;
  // Queries of their own for every head; what they select is what the peer reads.
  std::vector<std::vector<float>> queries(kKvHeads);
  std::vector<HeadSelection> selections(kKvHeads);
  SelectScratch scratch;
  for (int64_t head = 0; head < kKvHeads; ++head) {
    f.input().kv_head = head;
    f.NewQueries(1.0f);
    queries[head] = f.queries();
    const absl::Status status = Select(params, f.input(), scratch, &selections[head]);
    if (!status.ok()) std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  }
  HeadSelection selection;
  int64_t ours = 0, peer = 0;
  const bench::Comparison comparison = report.Compare(
      [&] {
        const int64_t head = ours++ % kKvHeads;
        f.input().kv_head = head;
        f.input().queries = queries[head];
        const absl::Status status = Select(params, f.input(), scratch, &selection);
        sink = selection.positions.size() + status.ok();
      },
      [&] {
        const int64_t head = peer++ % kKvHeads;
        ReadTheSame(f, head, selections[head], answer);
      });
  report.AddTime(std::string(answer ? "select + answer" : "select") + " W=2048 codes=" +
                     std::to_string(codes.bits) + ":" + std::to_string(codes.group_channels),
                 "us", 1e6, "reads the same bytes", comparison, "");
}

// A copy of `view` in memory of its own with `advice`; never unmapped.
IndexPartView CopyWithAdvice(IndexPartView view, int advice) {
  PagedView* arrays[] = {&view.centroids, &view.value_means, &view.cluster_begin, &view.positions,
                         &view.slots,     &view.codes,       &view.channels};
  for (PagedView* array : arrays) {
    uint32_t top = 0;
    for (int64_t i = 0; i < PagesFor(array->size, array->element_bytes, array->page_bytes); ++i) {
      top = std::max(top, array->pages[i]);
    }
    const size_t bytes = (top + size_t{1}) * array->page_bytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CKV_CHECK(memory != MAP_FAILED) << bytes;
    madvise(memory, bytes, advice);
    std::memcpy(memory, array->base, bytes);
    array->base = static_cast<const std::byte*>(memory);
  }
  return view;
}

void MeasurePages(bench::Report& report, SelectFixture& f) {
  SelectParams params;
  params.budget_tokens = 64;
  params.scored_tokens = kScored;
  const std::vector<IndexPartView> small = {CopyWithAdvice(f.part(0).view(), MADV_NOHUGEPAGE)};
  const std::vector<IndexPartView> huge = {CopyWithAdvice(f.part(0).view(), MADV_HUGEPAGE)};
  f.NewQueries(1.0f);
  SelectScratch scratch;
  HeadSelection selection;
  int64_t calls[2] = {0, 0};
  const auto select = [&](const std::vector<IndexPartView>& parts, int64_t* call) {
    f.input().parts = parts;
    f.input().kv_head = (*call)++ % kKvHeads;
    sink = Select(params, f.input(), scratch, &selection).ok();
  };
  const bench::Comparison comparison =
      report.Compare([&] { select(huge, &calls[0]); }, [&] { select(small, &calls[1]); });
  report.AddTime("select + answer in huge pages", "us", 1e6, "in pages of 4 KiB", comparison, "");
}

// `zone` tokens anywhere in the records of one KV head.
void MeasureCorrection(bench::Report& report, int64_t zone) {
  const RecordCodec& codec = *FindRecordCodec("k8v4");
  constexpr ElementType kType = ElementType::kBFloat16;
  const int64_t record_bytes = codec.RecordBytes(kType, kHeadDim);
  const int64_t remainder_bytes = codec.RemainderBytes(kType, kHeadDim);
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(2 * kTokens * kHeadDim), queries(kGroup * kHeadDim);
  for (float& x : numbers) x = normal(random);
  for (float& x : queries) x = normal(random);
  const int64_t row = kHeadDim * ElementBytes(kType);
  std::vector<std::byte> rows(2 * kTokens * row), records(kTokens * record_bytes);
  std::vector<std::byte> remainders(kTokens * remainder_bytes);
  FromFloat(numbers.data(), kType, static_cast<int64_t>(numbers.size()), rows.data());
  codec.Encode(rows.data(), 2 * row, rows.data() + row, 2 * row, kType, kHeadDim, kTokens,
               records.data());
  codec.EncodeRemainders(rows.data() + row, 2 * row, kType, kHeadDim, kTokens, records.data(),
                         remainders.data());
  std::vector<const std::byte*> at_record, at_remainder;
  for (int64_t i = 0; i < 64 * zone; ++i) {  // 64 zones in turn
    const int64_t token = static_cast<int64_t>(random() % kTokens);
    at_record.push_back(&records[token * record_bytes]);
    at_remainder.push_back(&remainders[token * remainder_bytes]);
  }
  const AttentionParams params = {kGroup, kHeadDim, kType,
                                  1.0f / std::sqrt(static_cast<float>(kHeadDim))};
  Correction correction;
  int64_t ours = 0, peer = 0;
  const bench::Comparison comparison = report.Compare(
      [&] {
        const int64_t first = ours++ % 64 * zone;
        const RemainderRun run = {&codec,
                                  absl::MakeConstSpan(at_record).subspan(first, zone),
                                  absl::MakeConstSpan(at_remainder).subspan(first, zone),
                                  {}};
        sink = ComputeCorrection(params, queries, run, &correction).ok();
      },
      [&] {
        const int64_t first = peer++ % 64 * zone;
        uint64_t all = 0;
        for (int64_t i = first; i < first + zone; ++i) {
          all |= Read(at_record[i], record_bytes) | Read(at_remainder[i], remainder_bytes);
        }
        sink = all;
      });
  report.AddTime("correction of " + std::to_string(zone) + " tokens", "us", 1e6,
                 "reads the same bytes", comparison, "");
}

int Main(int argc, char** argv) {
  bench::Report report("select (D=128, G=4, C=2048, 32k tokens)", argc, argv);
  for (const CodesParams& codes : {CodesParams{2, 32}, CodesParams{4, 128}}) {
    TestPartSpec spec =
        PlantedPart(MakeShape(kKvHeads, kGroup, kHeadDim), codes, kTokens, kClusters, kSeed);
    spec.first_token = SelectFixture::kSinks;
    spec.page_bytes = 64 * 1024;
    SelectFixture f({spec}, kSeed);
    Measure(report, codes, f, false);
    Measure(report, codes, f, true);
    if (codes.bits == 2) MeasurePages(report, f);
  }
  for (const int64_t zone : {48, 1008}) MeasureCorrection(report, zone);
  return report.Finish();
}

}  // namespace
}  // namespace clusterkv::kernels

int main(int argc, char** argv) { return clusterkv::kernels::Main(argc, argv); }
