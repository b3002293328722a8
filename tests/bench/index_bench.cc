// Building an index part of the `default` preset, against memcpy of the K and V it is built from:
// how far clustering is from free.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/base/check.h"
#include "kernels/base/thread_pool.h"
#include "kernels/index/index.h"
#include "tests/bench/bench.h"

namespace clusterkv {
namespace {

constexpr int64_t kPageBytes = 65536;

void CompareBuild(bench::Report& report, int64_t tokens, int64_t window, int threads) {
  const kernels::KvShape shape{.kv_heads = 2,
                               .query_heads = 8,
                               .head_dim = 128,
                               .element_type = kernels::ElementType::kBFloat16};
  const kernels::IndexParams params;
  const kernels::RecordCodec& codec = *kernels::FindRecordCodec("raw");
  const int64_t row = shape.kv_heads * shape.head_dim;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> rows(2 * tokens * row), copy(rows.size());
  for (uint16_t& x : rows) x = kernels::FloatToBFloat16(normal(random));
  const std::vector<float> query_rms(row, 1.0f);

  const kernels::IndexLayout layout = MakeIndexLayout(shape, params, codec, window);
  std::vector<uint32_t> pages(layout.Pages(kPageBytes));
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = i;
  std::vector<std::byte> arena(pages.size() * kPageBytes);
  const auto part =
      MakeIndexPartView(layout, shape, params, 16, window, arena.data(), pages.data(), kPageBytes);
  auto helpers = kernels::ThreadPool::Create(std::max(1, threads - 1), "bench");
  CKV_CHECK(helpers.ok()) << helpers.status();
  const auto parallel_for = [&](int64_t count, absl::FunctionRef<void(int64_t)> task) {
    threads == 1 ? kernels::SerialFor(count, task) : (*helpers)->For(count, task);
  };
  const auto ours = [&] {
    for (int64_t first = 0; first + window <= tokens; first += window) {
      const uint32_t page = 0;
      const auto view = [&](int64_t from) {
        return kernels::PagedView(kernels::MakePagedView<const std::byte>(
            reinterpret_cast<const std::byte*>(&rows[(from + first) * row]), &page,
            window * row * 2, row * 2, window));
      };
      const kernels::IndexInput input{
          .keys = view(0), .values = view(tokens), .query_rms = query_rms};
      CKV_CHECK(BuildIndexPart(shape, params, codec, input, part, parallel_for).ok());
    }
  };
  const auto peer = [&] { std::memcpy(copy.data(), rows.data(), rows.size() * 2); };
  const bench::Comparison c = report.Compare(ours, peer);
  report.AddRate("build tokens=" + std::to_string(tokens) + " parts of " + std::to_string(window) +
                     ", threads: " + std::to_string(threads),
                 "tokens/s", tokens / window * window, "memcpy of K and V", c, "");
}

}  // namespace
}  // namespace clusterkv

int main(int argc, char** argv) {
  clusterkv::bench::Report report("index build, 2 KV heads of 128", argc, argv);
  for (int threads : {1, 2}) {
    clusterkv::CompareBuild(report, 8192, 8192, threads);
    clusterkv::CompareBuild(report, 32768, 32768, threads);
    clusterkv::CompareBuild(report, 320, 320, threads);
  }
  return report.Finish();
}
