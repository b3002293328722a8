#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/index/index_cuda.h"
#include "tests/gpu/gpu_test.h"
#include "tests/gpu/index_on_device.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::IndexCudaInput;
using kernels::IndexCudaParams;
using kernels::RecordFormat;

constexpr const char* kArrayNames[] = {"centroids", "value_means", "cluster_begin",
                                       "positions", "slots",       "codes",
                                       "records",   "channels",    "remainders"};

// The parts of a select case, built anew over an arena that is poisoned.
class IndexCase {
 public:
  explicit IndexCase(const std::string& name)
      : name_(name),
        file_(CaseFile::Read(Registry::Get().cases + "/select_" + name + ".case")),
        shape_(file_.Get<int64_t>("shape")),
        part_count_(static_cast<int>(shape_[7])),
        page_bytes_(file_.Value<int64_t>("page_bytes")),
        index_(file_, part_count_, true),
        query_rms_(file_.Get<float>("query_rms")) {
    params_.kv_heads = static_cast<int32_t>(shape_[0]);
    params_.head_dim = static_cast<int32_t>(shape_[2]);
    params_.element_type = static_cast<kernels::ElementType>(shape_[3]);
    params_.segment_tokens = 1024;
    params_.iterations = 4;
    params_.code_bits = static_cast<int32_t>(shape_[5]);
    params_.group_channels = static_cast<int32_t>(shape_[6]);
    const int64_t raw_bytes =
        kernels::RecordFormatBytes(RecordFormat::kRaw, params_.element_type, params_.head_dim);
    if (file_.Get<int64_t>("part0.arrays")[2 * 6] != raw_bytes) {
      params_.format = RecordFormat::kK8V4;
    }
  }

  void Run() {
    Build();
    const auto first = index_.arena->Host();
    Compare(first);
    Build();
    GPU_CHECK(index_.arena->Host() == first) << name_ << " is not reproducible\n";
    GPU_CHECK(index_.arena->GuardsHold()) << name_;
  }

  void Refuses() {
    DeviceArray<unsigned char> rows(16);
    kernels::DeviceIndexPart part = index_.host_parts[0];
    const IndexCudaInput input;
    const auto launch = [&](const IndexCudaParams& params) {
      return kernels::LaunchBuildIndexPart(params, input, part, nullptr, nullptr);
    };
    IndexCudaParams params = params_;
    params.head_dim = 24;
    GPU_CHECK(launch(params) == cudaErrorInvalidValue);
    params = params_;
    params.group_channels = 8;
    GPU_CHECK(launch(params) == cudaErrorInvalidValue);
    params = params_;
    params.code_bits = 5;
    GPU_CHECK(launch(params) == cudaErrorInvalidValue);
    part.clusters += 1;
    GPU_CHECK(launch(params_) == cudaErrorInvalidValue);
    part = index_.host_parts[0];
    part.tokens = 0;
    GPU_CHECK(launch(params_) == cudaErrorInvalidValue);
    GPU_CHECK(kernels::IndexCudaClusters(params_, 1) == 1);
    GPU_CHECK(kernels::IndexCudaClusters(params_, 1023) == 63);
    GPU_CHECK(kernels::IndexCudaClusters(params_, 2049) == 129);
  }

 private:
  void Build() {
    for (int p = 0; p < part_count_; ++p) {
      const std::string prefix = "part" + std::to_string(p) + ".";
      const kernels::DeviceIndexPart& part = index_.host_parts[p];
      DeviceArray<unsigned char> keys(file_.Get<unsigned char>(prefix + "keys"));
      DeviceArray<unsigned char> values(file_.Get<unsigned char>(prefix + "values"));
      DeviceArray<uint32_t> zero(std::vector<uint32_t>{0});
      const int64_t bytes = static_cast<int64_t>(keys.size());
      IndexCudaInput input;
      input.keys =
          kernels::MakeDevicePagedView(keys.data(), zero.data(), bytes, bytes / part.tokens);
      input.values =
          kernels::MakeDevicePagedView(values.data(), zero.data(), bytes, bytes / part.tokens);
      if (shape_[8]) input.query_rms = query_rms_.data();
      if (p > 0) {
        input.inherits_channels = true;
        input.inherited_channels = index_.host_parts[0].channels;
      }
      GPU_CHECK(part.clusters == kernels::IndexCudaClusters(params_, part.tokens)) << name_;
      DeviceArray<unsigned char> workspace(kernels::IndexCudaWorkspaceBytes(params_, part.tokens));
      GPU_OK(kernels::LaunchBuildIndexPart(params_, input, part, workspace.data(), nullptr));
      GPU_CHECK(workspace.GuardsHold()) << name_;
    }
  }

  // Every array is the reference's, byte for byte, and nothing else is written.
  void Compare(std::vector<unsigned char> got) const {
    const auto want = file_.Get<unsigned char>("arena");
    for (int p = 0; p < part_count_; ++p) {
      const std::string prefix = "part" + std::to_string(p) + ".";
      const auto arrays = file_.Get<int64_t>(prefix + "arrays");
      const auto pages = file_.Get<uint32_t>(prefix + "pages");
      const uint32_t* list = pages.data();
      for (int i = 0; i < 9; ++i) {
        const int64_t element_bytes = arrays[2 * i], size = arrays[2 * i + 1];
        if (element_bytes == 0) continue;
        const int64_t per_page = page_bytes_ / element_bytes;
        int64_t differ = 0;
        for (int64_t e = 0; e < size; ++e) {
          const int64_t at = list[e / per_page] * page_bytes_ + e % per_page * element_bytes;
          differ += std::memcmp(&got[at], &want[at], element_bytes) != 0;
          std::memset(&got[at], 0xff, element_bytes);
        }
        GPU_CHECK(differ == 0) << name_ << " part " << p << ": " << differ << " of " << size << " "
                               << kArrayNames[i] << " differ\n";
        list += (size + per_page - 1) / per_page;
      }
    }
    const auto stray = std::count_if(got.begin(), got.end(), [](auto x) { return x != 0xff; });
    GPU_CHECK(stray == 0) << name_ << ": " << stray << " bytes between arrays were written\n";
  }

  std::string name_;
  CaseFile file_;
  std::vector<int64_t> shape_;
  int part_count_;
  int64_t page_bytes_;
  IndexOnDevice index_;
  DeviceArray<float> query_rms_;
  IndexCudaParams params_;
};

void RunCase(const std::string& name) { IndexCase(name).Run(); }

GPU_TEST(IndexOfTwoSegmentsAndAWindow) { RunCase("default"); }
GPU_TEST(IndexFourBitsOfFloat16RawMetric) { RunCase("four_bits"); }
GPU_TEST(IndexThreeBitsAndK8V4OverThreeParts) { RunCase("three_bits"); }
GPU_TEST(IndexHeadsOf256) { RunCase("odd_group"); }
GPU_TEST(IndexHeadsOf16Float32) { RunCase("everything_scored"); }
GPU_TEST(IndexWithoutCodes) { RunCase("no_codes"); }
GPU_TEST(IndexHeadsOf512) { RunCase("wide"); }
GPU_TEST(IndexHeadsOf48ThreeBits) { RunCase("many_heads"); }
GPU_TEST(IndexFewTokens) { RunCase("nothing_left"); }
GPU_TEST(IndexOfEqualKeys) { RunCase("ties"); }
GPU_TEST(IndexRoundsCentroidsAndMeansAsTheHostDoes) { RunCase("half_edges"); }
GPU_TEST(IndexRefusesWhatItCannotBuild) { IndexCase("nothing_left").Refuses(); }

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
