// Select and answer of one KV head and step, against a loop that only reads the same bytes:
// centroids, codes of the scored tokens, value means of the clusters that enter the state. 32k
// tokens, 2,048 clusters, 8 KV heads in turn, so that neither side finds its bytes in the nearest
// cache.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

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
  }
  return report.Finish();
}

}  // namespace
}  // namespace clusterkv::kernels

int main(int argc, char** argv) { return clusterkv::kernels::Main(argc, argv); }
