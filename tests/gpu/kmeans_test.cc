#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/kmeans/kmeans_cuda.h"
#include "tests/gpu/case_file.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::KMeansCudaParams;
using kernels::KMeansCudaProblem;

class KMeansCase {
 public:
  explicit KMeansCase(const std::string& name)
      : name_(name),
        file_(CaseFile::Read(Registry::Get().cases + "/kmeans_" + name + ".case")),
        numbers_(file_.Get<int64_t>("numbers")),
        sizes_(file_.Get<int64_t>("problems")),
        want_labels_(file_.Get<int32_t>("labels")),
        want_centroids_(file_.Get<float>("centroids")),
        arena_(file_.Get<unsigned char>("arena")),
        pages_(file_.Get<uint32_t>("pages")),
        weights_(file_.Get<float>("weights")),
        initial_rows_(file_.Get<int32_t>("initial_rows")),
        labels_(want_labels_.size()),
        order_(want_labels_.size()),
        centroids_(want_centroids_.size()),
        begin_(initial_rows_.size() + sizes_.size() / 4) {
    params_.dim = static_cast<int32_t>(numbers_[0]);
    params_.element_type = static_cast<kernels::ElementType>(numbers_[2]);
    params_.iterations = static_cast<int32_t>(numbers_[3]);
    const int64_t row_bytes =
        numbers_[1] * params_.dim * kernels::ElementBytes(params_.element_type);
    const auto view = kernels::MakeDevicePagedView(arena_.data(), pages_.data(),
                                                   file_.Value<int64_t>("page_bytes"), row_bytes);
    int64_t row = 0, cluster = 0;
    for (size_t i = 0; i < sizes_.size(); i += 4) {
      KMeansCudaProblem problem;
      problem.rows = view;
      problem.first_row = static_cast<uint32_t>(sizes_[i]);
      problem.row_count = static_cast<int32_t>(sizes_[i + 1]);
      problem.cluster_count = static_cast<int32_t>(sizes_[i + 3]);
      const int64_t head = sizes_[i + 2];
      problem.row_offset = static_cast<uint32_t>(head * row_bytes / numbers_[1]);
      if (numbers_[4]) problem.weights = weights_.data() + head * params_.dim;
      if (numbers_[5]) problem.initial_rows = initial_rows_.data() + cluster;
      problem.labels = labels_.data() + row;
      problem.order = order_.data() + row;
      problem.centroids = centroids_.data() + cluster * params_.dim;
      problem.begin = begin_.data() + cluster + i / 4;
      row += problem.row_count;
      cluster += problem.cluster_count;
      params_.max_rows = std::max(params_.max_rows, problem.row_count);
      params_.max_clusters = std::max(params_.max_clusters, problem.cluster_count);
      problems_.push_back(problem);
    }
  }

  void Run(bool plain) {
    params_.plain = plain;
    DeviceArray<KMeansCudaProblem> problems(problems_);
    const int32_t count = static_cast<int32_t>(problems_.size());
    DeviceArray<unsigned char> workspace(kernels::KMeansCudaWorkspaceBytes(params_, count));
    GPU_OK(kernels::LaunchKMeans(params_, problems.data(), count, workspace.data(), nullptr));
    const auto labels = labels_.Host();
    size_t differ = 0;
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] == want_labels_[i]) continue;
      if (++differ == 1) {
        std::cout << name_ << ": label " << i << " is " << labels[i] << ", expected "
                  << want_labels_[i] << "\n";
      }
    }
    // Equal on processors with fused multiply-add; elsewhere near ties may differ.
    GPU_CHECK(differ * 1000 <= labels.size())
        << name_ << ": " << differ << " of " << labels.size() << " labels differ\n";
    const auto centroids = centroids_.Host();
    if (differ == 0) {
      GPU_CHECK(centroids == want_centroids_) << name_ << ": centroids differ\n";
    } else {
      std::cout << name_ << ": " << differ << " of " << labels.size() << " labels differ\n";
    }
    CheckOrder(labels);
    GPU_OK(kernels::LaunchKMeans(params_, problems.data(), count, workspace.data(), nullptr));
    GPU_CHECK(labels_.Host() == labels && centroids_.Host() == centroids) << name_ << " again\n";
    // One more assignment to the final centroids must not depend on how it came to them.
    GPU_OK(kernels::LaunchAssignRows(params_, problems.data(), count, workspace.data(), nullptr));
    GPU_CHECK(labels_.GuardsHold() && order_.GuardsHold() && centroids_.GuardsHold() &&
              begin_.GuardsHold() && workspace.GuardsHold())
        << name_;
  }

 private:
  void CheckOrder(const std::vector<int32_t>& labels) const {
    const auto order = order_.Host(), begin = begin_.Host();
    int64_t row = 0, cluster = 0;
    for (size_t p = 0; p < problems_.size(); ++p) {
      const KMeansCudaProblem& problem = problems_[p];
      std::vector<int32_t> want(problem.row_count);
      for (int32_t i = 0; i < problem.row_count; ++i) want[i] = i;
      std::stable_sort(want.begin(), want.end(),
                       [&](int32_t a, int32_t b) { return labels[row + a] < labels[row + b]; });
      GPU_CHECK(std::equal(want.begin(), want.end(), order.begin() + row)) << name_ << " order\n";
      const int32_t* from = &begin[cluster + static_cast<int64_t>(p)];
      for (int32_t c = 0; c <= problem.cluster_count; ++c) {
        const auto smaller =
            std::count_if(labels.begin() + row, labels.begin() + row + problem.row_count,
                          [&](int32_t label) { return label < c; });
        GPU_CHECK(from[c] == smaller) << name_ << " begin of " << c << "\n";
      }
      row += problem.row_count;
      cluster += problem.cluster_count;
    }
  }

  std::string name_;
  CaseFile file_;
  std::vector<int64_t> numbers_, sizes_;
  std::vector<int32_t> want_labels_;
  std::vector<float> want_centroids_;
  DeviceArray<unsigned char> arena_;
  DeviceArray<uint32_t> pages_;
  DeviceArray<float> weights_;
  DeviceArray<int32_t> initial_rows_, labels_, order_;
  DeviceArray<float> centroids_;
  DeviceArray<int32_t> begin_;
  KMeansCudaParams params_;
  std::vector<KMeansCudaProblem> problems_;
};

// Problems of one size over random rows: more blocks of rows than multiprocessors.
class KMeansBatch {
 public:
  KMeansBatch(int problems, int rows, int clusters)
      : problems_(problems),
        rows_(rows),
        clusters_(clusters),
        data_(RandomRows(int64_t{problems} * rows * kDim)),
        pages_(std::vector<uint32_t>(1)),
        labels_(static_cast<size_t>(problems) * rows),
        order_(labels_.size()),
        centroids_(static_cast<size_t>(problems) * clusters * kDim),
        begin_(static_cast<size_t>(problems) * (clusters + 1)) {
    params_.dim = kDim;
    params_.iterations = 3;
    params_.max_rows = rows;
    params_.max_clusters = clusters;
  }

  struct Result {
    std::vector<int32_t> labels;
    std::vector<float> centroids;
    bool operator==(const Result& other) const {
      return labels == other.labels && centroids == other.centroids;
    }
  };
  // So many problems a launch.
  Result Run(int at_once, bool plain) {
    params_.plain = plain;
    DeviceArray<unsigned char> workspace(kernels::KMeansCudaWorkspaceBytes(params_, at_once));
    for (int first = 0; first < problems_; first += at_once) {
      std::vector<KMeansCudaProblem> host;
      for (int i = first; i < std::min(problems_, first + at_once); ++i) {
        host.push_back(ProblemOf(i));
      }
      DeviceArray<KMeansCudaProblem> problems(host);
      GPU_OK(kernels::LaunchKMeans(params_, problems.data(), static_cast<int32_t>(host.size()),
                                   workspace.data(), nullptr));
      GPU_OK(cudaDeviceSynchronize());
    }
    GPU_CHECK(workspace.GuardsHold() && labels_.GuardsHold() && centroids_.GuardsHold());
    return {labels_.Host(), centroids_.Host()};
  }

 private:
  static constexpr int kDim = 128;

  static std::vector<uint16_t> RandomRows(int64_t numbers) {
    std::mt19937 generator(5);
    std::vector<uint16_t> rows(static_cast<size_t>(numbers));
    for (uint16_t& x : rows) {
      // A bf16 of [.5, 2) or its negative.
      x = static_cast<uint16_t>(0x3f00u + (generator() & 0xffu) + (generator() & 0x8000u));
    }
    return rows;
  }
  KMeansCudaProblem ProblemOf(int i) const {
    KMeansCudaProblem problem;
    problem.rows = kernels::MakeDevicePagedView(reinterpret_cast<unsigned char*>(data_.data()),
                                                pages_.data(), 2 * data_.size(), 2 * kDim);
    problem.first_row = static_cast<uint32_t>(i * rows_);
    problem.row_count = rows_;
    problem.cluster_count = clusters_;
    problem.labels = labels_.data() + int64_t{i} * rows_;
    problem.order = order_.data() + int64_t{i} * rows_;
    problem.centroids = centroids_.data() + int64_t{i} * clusters_ * kDim;
    problem.begin = begin_.data() + int64_t{i} * (clusters_ + 1);
    return problem;
  }

  const int problems_, rows_, clusters_;
  DeviceArray<uint16_t> data_;
  DeviceArray<uint32_t> pages_;
  DeviceArray<int32_t> labels_, order_;
  DeviceArray<float> centroids_;
  DeviceArray<int32_t> begin_;
  KMeansCudaParams params_;
};

void RunCase(const std::string& name) {
  for (const bool plain : {false, true}) KMeansCase(name).Run(plain);
}

GPU_TEST(KMeansOfSegmentsAndHeads) { RunCase("segments"); }
GPU_TEST(KMeansOfFewRows) { RunCase("small"); }
GPU_TEST(KMeansOfFloat16) { RunCase("fp16"); }
GPU_TEST(KMeansOfFloat32FromRandomRows) { RunCase("fp32"); }
GPU_TEST(KMeansOf256Channels) { RunCase("wide"); }
GPU_TEST(KMeansOf512Channels) { RunCase("widest"); }
GPU_TEST(KMeansTiesGoToTheLowerCluster) { RunCase("ties"); }
GPU_TEST(KMeansNearTiesOfAllKinds) { RunCase("near_ties"); }
GPU_TEST(KMeansOfManyClusters) { RunCase("many_clusters"); }

GPU_TEST(KMeansIsTheSameInAnyBatch) {
#ifdef CLUSTERKV_CUDA_EMULATOR
  KMeansBatch batch(3, 260, 70);
  constexpr int kFew = 2;
#else
  KMeansBatch batch(32, 8192, 512);  // 32k tokens of 8 heads by segments
  constexpr int kFew = 8;            // two blocks of rows for most multiprocessors
#endif
  const KMeansBatch::Result all = batch.Run(32, false);
  GPU_CHECK(batch.Run(32, false) == all) << "again\n";
  GPU_CHECK(batch.Run(kFew, false) == all) << "few at once\n";
  GPU_CHECK(batch.Run(1, false) == all) << "one at once\n";
  GPU_CHECK(batch.Run(32, true) == all) << "by the plain kernel\n";
}

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
