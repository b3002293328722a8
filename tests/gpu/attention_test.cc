#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention/attention_cuda.h"
#include "tests/gpu/case_file.h"
#include "tests/gpu/gpu_test.h"

namespace clusterkv::gpu_test {
namespace {

using kernels::AttentionCudaPair;
using kernels::AttentionCudaParams;
using kernels::DeviceRawRun;
using kernels::ElementType;

constexpr int kPairs = 3;  // the same thing thrice

class AttentionCase {
 public:
  explicit AttentionCase(const std::string& name)
      : name_(name),
        file_(CaseFile::Read(Registry::Get().cases + "/attention_" + name + ".case")),
        numbers_(file_.Get<int64_t>("numbers")),
        slots_memory_(file_.Get<unsigned char>("slots_memory")),
        slots_(file_.Get<int32_t>("slots")),
        masks_(file_.Get<uint32_t>("masks")),
        queries_(file_.Get<float>("queries")),
        state_(file_.Get<float>("state")),
        state_lse_(file_.Get<float>("state_lse")),
        want_(file_.Get<float>("output")),
        want_lse_(file_.Get<float>("lse")),
        output_(kPairs * want_.size()),
        lse_(kPairs * want_lse_.size()) {
    params_.head_dim = static_cast<int32_t>(numbers_[0]);
    params_.group = static_cast<int32_t>(numbers_[1]);
    params_.element_type = static_cast<ElementType>(numbers_[2]);
    params_.format = numbers_[3] ? kernels::RecordFormat::kK8V4 : kernels::RecordFormat::kRaw;
    params_.scale = file_.Value<float>("scale");
    params_.max_tokens = 400;
    const int64_t row_bytes = params_.head_dim * kernels::ElementBytes(params_.element_type);
    const auto run_tokens = file_.Get<int64_t>("run_tokens");
    std::vector<DeviceRawRun> runs;
    for (size_t i = 0; i < run_tokens.size(); ++i) {
      rows_.emplace_back(file_.Get<unsigned char>("keys" + std::to_string(i)));
      rows_.emplace_back(file_.Get<unsigned char>("values" + std::to_string(i)));
      runs.push_back({rows_[2 * i].data(), rows_[2 * i + 1].data(), 2 * row_bytes, 2 * row_bytes,
                      run_tokens[i]});
    }
    runs_ = std::make_unique<DeviceArray<DeviceRawRun>>(runs);
    pairs_ = std::make_unique<DeviceArray<AttentionCudaPair>>(Pairs());
  }

  void Run(int splits) {
    params_.splits = splits;
    const int64_t bytes = kernels::AttentionCudaWorkspaceBytes(params_, kPairs);
    DeviceArray<unsigned char> workspace(bytes);
    GPU_OK(cudaMemset(workspace.data(), 0, bytes));
    std::vector<float> first;
    for (int round = 0; round < 2; ++round) {
      GPU_OK(kernels::LaunchSparseAttention(params_, pairs_->data(), kPairs, workspace.data(),
                                            nullptr));
      Compare();
      const std::vector<float> got = output_.Host();
      GPU_CHECK(round == 0 || got == first) << name_ << " is not reproducible\n";
      first = got;
    }
    GPU_CHECK(output_.GuardsHold() && lse_.GuardsHold() && workspace.GuardsHold()) << name_;
  }

 private:
  std::vector<AttentionCudaPair> Pairs() const {
    std::vector<AttentionCudaPair> pairs(kPairs);
    for (int i = 0; i < kPairs; ++i) {
      AttentionCudaPair& pair = pairs[i];
      pair.queries = queries_.data();
      pair.raw = runs_->data();
      pair.raw_runs = static_cast<int32_t>(numbers_[4]);
      pair.record_tokens = static_cast<int32_t>(slots_.size());
      pair.slot_base = slots_memory_.data();
      pair.slots = slots_.data();
      if (numbers_[6]) pair.head_masks = masks_.data();
      if (numbers_[5]) {
        pair.state_output = state_.data();
        pair.state_lse = state_lse_.data();
      }
      pair.output = output_.data() + i * want_.size();
      pair.lse = lse_.data() + i * want_lse_.size();
    }
    return pairs;
  }

  void Compare() const {
    const auto got = output_.Host(), got_lse = lse_.Host();
    for (int i = 0; i < kPairs; ++i) {
      const std::vector<float> one(got.begin() + i * want_.size(),
                                   got.begin() + (i + 1) * want_.size());
      const double error = RelativeError(one, want_);
      GPU_CHECK(error <= 1e-4) << name_ << " splits " << params_.splits << ": error " << error
                               << "\n";
      for (size_t g = 0; g < want_lse_.size(); ++g) {
        const float lse = got_lse[i * want_lse_.size() + g];
        GPU_CHECK(lse == want_lse_[g] || std::abs(lse - want_lse_[g]) <= 1e-3)
            << name_ << " lse " << lse << " expected " << want_lse_[g] << "\n";
      }
    }
  }

  std::string name_;
  CaseFile file_;
  std::vector<int64_t> numbers_;
  AttentionCudaParams params_;
  DeviceArray<unsigned char> slots_memory_;
  DeviceArray<int32_t> slots_;
  DeviceArray<uint32_t> masks_;
  DeviceArray<float> queries_, state_, state_lse_;
  std::vector<float> want_, want_lse_;
  DeviceArray<float> output_, lse_;
  std::vector<DeviceArray<unsigned char>> rows_;
  std::unique_ptr<DeviceArray<DeviceRawRun>> runs_;
  std::unique_ptr<DeviceArray<AttentionCudaPair>> pairs_;
};

void RunCase(const std::string& name) {
  AttentionCase test(name);
  for (int splits : {1, 2, 7, 0}) test.Run(splits);
}

GPU_TEST(AttentionBFloat16) { RunCase("bf16"); }
GPU_TEST(AttentionFloat16) { RunCase("fp16"); }
GPU_TEST(AttentionFloat32) { RunCase("fp32"); }
GPU_TEST(AttentionK8V4) { RunCase("k8v4"); }
GPU_TEST(AttentionK8V4BesideFloat32) { RunCase("k8v4_fp32"); }
GPU_TEST(AttentionHeadsOf512InTwoHeadBlocks) { RunCase("wide"); }
GPU_TEST(AttentionHeadMasks) { RunCase("masks"); }
GPU_TEST(AttentionOfNothingButAState) { RunCase("only_state"); }
GPU_TEST(AttentionOfNothingIsZero) { RunCase("nothing"); }
GPU_TEST(AttentionPeakedQueries) { RunCase("peaked"); }

}  // namespace
}  // namespace clusterkv::gpu_test

int main(int argc, char** argv) { return clusterkv::gpu_test::RunTests(argc, argv); }
