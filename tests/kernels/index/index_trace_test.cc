// The index of real keys and values: traces of a model over a book.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/index/index.h"
#include "tests/kernels/index/built_part.h"
#include "worker/trace.h"

namespace clusterkv::kernels {
namespace {

constexpr int64_t kSinks = 16;

// tests/data where the project ships the traces, else the folder of shared data.
std::string TracePath(const std::string& name) {
  const std::filesystem::path data =
      std::filesystem::path(CLUSTERKV_SOURCE_DIR) / "tests" / "data" / name;
  if (std::filesystem::exists(data)) return data;
  const char* shared = std::getenv("CLUSTERKV_SHARED");
  const std::filesystem::path root =
      shared != nullptr ? shared : std::filesystem::path(CLUSTERKV_SOURCE_DIR) / ".." / "shared";
  return root / "traces" / name;
}

class IndexTraceTest : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    const std::string path =
        TracePath("moby_dick_8k.layer" + std::to_string(GetParam()) + ".safetensors");
    if (!std::filesystem::exists(path)) {
      GTEST_SKIP() << "no trace at " << path << "; set CLUSTERKV_SHARED to test on real KV";
    }
    trace_ = worker::ReadTraceLayer(path).value();
  }

  // The prompt without sinks, under the balanced metric.
  std::unique_ptr<TestPart> BuildPrompt(const IndexParams& params, ParallelFor parallel_for) {
    const KvShape& shape = trace_.shape;
    const int64_t tokens = trace_.tokens - trace_.queries - kSinks;
    const int64_t row_bytes = shape.kv_heads * shape.head_dim * ElementBytes(shape.element_type);
    const uint32_t page = 0;
    const auto rows = [&](std::vector<std::byte>& bytes) -> PagedView {
      return MakePagedView(bytes.data() + kSinks * row_bytes, &page, tokens * row_bytes, row_bytes,
                           tokens);
    };
    const IndexInput input{
        .keys = rows(trace_.keys), .values = rows(trace_.values), .query_rms = trace_.query_rms};
    const RecordCodec& codec = *FindRecordCodec("raw");
    auto part = std::make_unique<TestPart>(shape, params, codec, kSinks, tokens, 65536, 1);
    const absl::Status status =
        BuildIndexPart(shape, params, codec, input, part->view(), parallel_for);
    EXPECT_TRUE(status.ok()) << status;
    return part;
  }

  // [.., head_dim] as float.
  std::vector<float> Floats(const std::vector<std::byte>& bytes) const {
    std::vector<float> floats(bytes.size() / ElementBytes(trace_.shape.element_type));
    ToFloat(bytes.data(), trace_.shape.element_type, floats.size(), floats.data());
    return floats;
  }

  worker::TraceLayer trace_;
};

TEST_P(IndexTraceTest, CentroidDotQueryIsTheMeanOfItsMembersLogits) {
  const auto built = BuildPrompt(IndexParams(), SerialFor);
  const IndexPartView part = built->view();
  const int64_t dim = trace_.shape.head_dim;
  const std::vector<float> keys = Floats(trace_.keys), queries = Floats(trace_.q);
  for (int64_t query = 0; query < trace_.queries; query += 97) {
    for (int64_t query_head = 0; query_head < trace_.shape.query_heads; ++query_head) {
      const int64_t head = query_head / trace_.shape.group();
      const float* weight = part.channels.As<float>(head);
      const float* q = &queries[(query * trace_.shape.query_heads + query_head) * dim];
      for (int64_t c = 0; c < part.clusters; ++c) {
        const int32_t begin = *part.cluster_begin.As<int32_t>(head * (part.clusters + 1) + c);
        const int32_t end = *part.cluster_begin.As<int32_t>(head * (part.clusters + 1) + c + 1);
        if (begin == end) continue;
        double mean = 0, size = 0, estimate = 0, rounding = 0;
        for (int32_t slot = begin; slot < end; ++slot) {
          const int32_t position = *part.positions.As<int32_t>(head * part.tokens + slot);
          const float* key = &keys[(position * trace_.shape.kv_heads + head) * dim];
          for (int64_t d = 0; d < dim; ++d) {
            const double product = static_cast<double>(q[d]) * key[d];
            mean += product / (end - begin);
            size += std::abs(product) / (end - begin);
          }
        }
        for (int64_t d = 0; d < dim; ++d) {
          const double centroid =
              HalfToFloat(part.centroids.As<uint16_t>(head * part.clusters + c)[d]);
          estimate += static_cast<double>(q[d]) / weight[d] * centroid;
          // Half of a half's last place, which of a subnormal one is 2^-24.
          rounding += std::abs(static_cast<double>(q[d]) / weight[d]) *
                      std::max(0x1p-11 * std::abs(centroid), 0x1p-25);
        }
        // Weighted keys and centroid are rounded to float once each, and so is the weight's
        // product; then the centroid to a half.
        ASSERT_FALSE(!(std::abs(estimate - mean) <= 4 * 0x1p-24 * size + rounding)) << c;
      }
    }
  }
}

TEST_P(IndexTraceTest, BuildsTheSameIndexOnEveryRun) {
  const auto a = BuildPrompt(IndexParams(), SerialFor);
  const auto backwards = [](int64_t count, absl::FunctionRef<void(int64_t)> task) {
    for (int64_t i = count - 1; i >= 0; --i) task(i);
  };
  const auto b = BuildPrompt(IndexParams(), backwards);
  EXPECT_EQ(IndexDigest(trace_.shape, a->view()), IndexDigest(trace_.shape, b->view()));
  EXPECT_TRUE(Bytes(a->view().records) == Bytes(b->view().records));
}

INSTANTIATE_TEST_SUITE_P(Layers, IndexTraceTest, ::testing::Values(3, 6));

}  // namespace
}  // namespace clusterkv::kernels
