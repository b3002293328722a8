// K-means assignment against OpenBLAS sgemm of the same shape: the matrix product is all that the
// peer does, ours also normalises, packs and takes the argmax. The peer column names the kernel
// that OpenBLAS runs.
#include <cblas.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "kernels/base/check.h"
#include "kernels/base/thread_pool.h"
#include "kernels/kmeans/kmeans.h"
#include "tests/bench/bench.h"

namespace clusterkv {
namespace {

std::vector<float> Normal(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

void CompareAssign(bench::Report& report, int64_t rows, int64_t dim, int64_t clusters,
                   int threads) {
  const std::vector<float> keys = Normal(rows * dim, 1);
  const std::vector<float> centroids = Normal(clusters * dim, 2);
  std::vector<int32_t> labels(rows);
  std::vector<float> product(rows * clusters);
  auto helpers = kernels::ThreadPool::Create(std::max(1, threads - 1), "bench");
  CKV_CHECK(helpers.ok()) << helpers.status();
  const auto parallel_for = [&](int64_t count, absl::FunctionRef<void(int64_t)> task) {
    threads == 1 ? kernels::SerialFor(count, task) : (*helpers)->For(count, task);
  };
  openblas_set_num_threads(threads);
  const auto ours = [&] {
    CKV_CHECK(kernels::AssignRows(rows, dim, clusters, keys, centroids, absl::MakeSpan(labels),
                                  parallel_for)
                  .ok());
  };
  const auto peer = [&] {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, clusters, dim, 1.0f, keys.data(),
                dim, centroids.data(), dim, 0.0f, product.data(), clusters);
  };
  const bench::Comparison c = report.Compare(ours, peer);
  report.AddRate("assign n=" + std::to_string(rows) + " d=" + std::to_string(dim) +
                     " k=" + std::to_string(clusters) + ", threads: " + std::to_string(threads),
                 "GFLOP/s", 2e-9 * rows * dim * clusters,
                 std::string("sgemm, ") + openblas_get_corename(), c, ">= 0.8");
}

// OpenBLAS takes its AVX2 kernels on AVX-512 machines that it does not know; the peer shall be at
// its best. It reads the variable when it is loaded, so this starts the program anew, once.
void PreferAvx512Kernels(char** argv) {
#if defined(__x86_64__)
  const char* core = std::getenv("OPENBLAS_CORETYPE");
  if (!__builtin_cpu_supports("avx512f") || std::string_view(core ? core : "") == "SkylakeX")
    return;
  setenv("OPENBLAS_CORETYPE", "SkylakeX", 1);
  execv("/proc/self/exe", argv);
#endif
}

}  // namespace
}  // namespace clusterkv

int main(int argc, char** argv) {
  clusterkv::PreferAvx512Kernels(argv);
  clusterkv::bench::Report report("kmeans", argc, argv);
  for (int threads : {1, 2}) {
    clusterkv::CompareAssign(report, 8192, 128, 512, threads);
    clusterkv::CompareAssign(report, 32768, 128, 400, threads);
    clusterkv::CompareAssign(report, 8192, 64, 512, threads);
  }
  return report.Finish();
}
