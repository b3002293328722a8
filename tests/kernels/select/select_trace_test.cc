// Selection on real KV: traces of a model over a book. Select against its reference, and the
// presets' known answers: how far sparse attention is from full attention, and how many tokens a
// step recalls.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/index/index.h"
#include "kernels/select/select.h"
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

// A preset at a budget, with what may be set.
struct Setting {
  IndexParams index;
  SelectParams select;
  bool balanced = true;
};

Setting ClusterKv(int64_t budget) {
  Setting setting;
  setting.index.tokens_per_cluster = 80;
  setting.index.segment_tokens = 0;
  setting.index.init = KMeansInit::kRandom;
  setting.index.seed = 3;
  setting.index.iterations = 20;
  setting.index.codes.bits = 0;
  setting.select = {SelectMode::kPerQueryHead, budget, 0, false, 0.0f};
  setting.balanced = false;
  return setting;
}

Setting Recall(int64_t budget) {
  Setting setting;
  setting.select = {SelectMode::kSharedPerKvHead, budget, 8 * (budget - kSinks), false, 0.25f};
  return setting;
}

Setting Default(int64_t budget) {
  Setting setting;
  setting.select = {SelectMode::kSharedPerKvHead, budget, 2048, true, 0.25f};
  return setting;
}

// Counts what a hot cache of `capacity` tokens lacks, from the third step on.
class HotTokens {
 public:
  explicit HotTokens(size_t capacity) : capacity_(capacity) {}
  void Step(const std::vector<int32_t>& positions) {
    for (int32_t position : positions) {
      const auto found = places_.find(position);
      if (found != places_.end()) {
        order_.splice(order_.end(), order_, found->second);
        continue;
      }
      places_[position] = order_.insert(order_.end(), position);
      recalled_ += steps_ >= 2;
    }
    for (; places_.size() > capacity_; order_.pop_front()) places_.erase(order_.front());
    ++steps_;
  }
  double per_step() const { return static_cast<double>(recalled_) / (steps_ - 2); }

 private:
  size_t capacity_;
  std::list<int32_t> order_;  // least recently used first
  std::map<int32_t, std::list<int32_t>::iterator> places_;
  int64_t recalled_ = 0, steps_ = 0;
};

struct Figures {
  double error = 0;  // of the output, relative to full attention's
  double recalled_1024 = 0, recalled_256 = 0;
};

class SelectTraceTest : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    const std::string path =
        TracePath("moby_dick_8k.layer" + std::to_string(GetParam()) + ".safetensors");
    if (!std::filesystem::exists(path)) {
      GTEST_SKIP() << "no trace at " << path << "; set CLUSTERKV_SHARED to test on real KV";
    }
    trace_ = worker::ReadTraceLayer(path).value();
  }

  const KvShape& shape() const { return trace_.shape; }
  int64_t prompt_tokens() const { return trace_.tokens - trace_.queries; }
  int64_t row_bytes() const {
    return shape().kv_heads * shape().head_dim * ElementBytes(shape().element_type);
  }

  std::unique_ptr<TestPart> Build(const Setting& setting) {
    const int64_t tokens = prompt_tokens() - kSinks;
    const uint32_t page = 0;
    const auto rows = [&](const std::vector<std::byte>& bytes) -> PagedView {
      return MakePagedView(bytes.data() + kSinks * row_bytes(), &page, tokens * row_bytes(),
                           row_bytes(), tokens);
    };
    IndexInput input;
    input.keys = rows(trace_.keys);
    input.values = rows(trace_.values);
    if (setting.balanced) input.query_rms = trace_.query_rms;
    const RecordCodec& codec = *FindRecordCodec("raw");
    auto part =
        std::make_unique<TestPart>(shape(), setting.index, codec, kSinks, tokens, 65'536, 1);
    const absl::Status status =
        BuildIndexPart(shape(), setting.index, codec, input, part->view(), SerialFor);
    EXPECT_TRUE(status.ok()) << status;
    return part;
  }

  // The group's queries of a KV head at a decode step, [group, head_dim].
  std::vector<float> Queries(int64_t step, int64_t kv_head) const {
    const int64_t floats = shape().group() * shape().head_dim;
    std::vector<float> queries(floats);
    const int64_t first = (step * shape().kv_heads + kv_head) * floats;
    ToFloat(trace_.q.data() + first * ElementBytes(shape().element_type), shape().element_type,
            floats, queries.data());
    return queries;
  }

  SelectInput Input(const Setting& setting, const IndexPartView& part, int64_t kv_head,
                    const std::vector<float>& queries) const {
    SelectInput input;
    input.shape = shape();
    input.codes = setting.index.codes;
    input.kv_head = kv_head;
    input.scale = 1.0f / std::sqrt(static_cast<float>(shape().head_dim));
    input.queries = queries;
    input.parts = absl::MakeConstSpan(&part, 1);
    input.sink_keys = Row(trace_.keys, 0, kv_head);
    input.sink_key_stride_bytes = row_bytes();
    input.sink_tokens = kSinks;
    return input;
  }

  const std::byte* Row(const std::vector<std::byte>& rows, int64_t token, int64_t kv_head) const {
    return rows.data() + token * row_bytes() +
           kv_head * shape().head_dim * ElementBytes(shape().element_type);
  }

  RawRun Run(int64_t begin, int64_t end, int64_t kv_head) const {
    return {Row(trace_.keys, begin, kv_head), Row(trace_.values, begin, kv_head), row_bytes(),
            row_bytes(), end - begin};
  }

  // Attention of `group` query heads over runs and state.
  std::vector<float> Attend(absl::Span<const float> queries, const std::vector<RawRun>& runs,
                            const AttentionState& state) const {
    AttentionParams params;
    params.head_dim = shape().head_dim;
    params.group = static_cast<int64_t>(queries.size()) / params.head_dim;
    params.element_type = shape().element_type;
    params.scale = 1.0f / std::sqrt(static_cast<float>(shape().head_dim));
    std::vector<float> output(queries.size());
    const absl::Status status = SparseAttention(params, queries, runs, {}, state,
                                                absl::MakeSpan(output), absl::Span<float>());
    EXPECT_TRUE(status.ok()) << status;
    return output;
  }

  // What a decode worker computes: sinks, window and exact tokens, merged with the state.
  std::vector<float> SparseOutput(const HeadSelection& selection, absl::Span<const float> queries,
                                  int64_t step, int64_t kv_head) const {
    const std::vector<RawRun> held = {Run(0, kSinks, kv_head),
                                      Run(prompt_tokens(), prompt_tokens() + step + 1, kv_head)};
    const auto runs_of = [&](uint32_t heads) {
      std::vector<RawRun> runs = held;
      for (size_t i = 0; i < selection.positions.size(); ++i) {
        const int64_t position = selection.positions[i];
        const bool attends = selection.head_masks.empty() || (selection.head_masks[i] & heads) != 0;
        if (attends) runs.push_back(Run(position, position + 1, kv_head));
      }
      return runs;
    };
    if (selection.head_masks.empty()) {
      return Attend(queries, runs_of(~0u), {selection.state_output, selection.state_lse});
    }
    std::vector<float> output;
    for (int64_t g = 0; g < shape().group(); ++g) {
      const auto own =
          Attend(queries.subspan(g * shape().head_dim, shape().head_dim), runs_of(1u << g), {});
      output.insert(output.end(), own.begin(), own.end());
    }
    return output;
  }

  const std::vector<float>& FullOutput(int64_t step, int64_t kv_head) {
    std::vector<float>& output = full_[{step, kv_head}];
    if (output.empty()) {
      output = Attend(Queries(step, kv_head), {Run(0, prompt_tokens() + step + 1, kv_head)}, {});
    }
    return output;
  }

  Figures Replay(const Setting& setting) {
    const auto built = Build(setting);
    const IndexPartView part = built->view();
    SelectScratch scratch;
    HeadSelection selection;
    Figures figures;
    double difference = 0, norm = 0;
    for (int64_t kv_head = 0; kv_head < shape().kv_heads; ++kv_head) {
      HotTokens large(1024), small(256);
      for (int64_t step = 0; step < trace_.queries; ++step) {
        const std::vector<float> queries = Queries(step, kv_head);
        const absl::Status status =
            Select(setting.select, Input(setting, part, kv_head, queries), scratch, &selection);
        EXPECT_TRUE(status.ok()) << status;
        large.Step(selection.positions);
        small.Step(selection.positions);
        const std::vector<float> output = SparseOutput(selection, queries, step, kv_head);
        const std::vector<float>& full = FullOutput(step, kv_head);
        for (size_t i = 0; i < full.size(); ++i) {
          difference += std::pow(output[i] - full[i], 2);
          norm += std::pow(full[i], 2);
        }
      }
      figures.recalled_1024 += large.per_step() / static_cast<double>(shape().kv_heads);
      figures.recalled_256 += small.per_step() / static_cast<double>(shape().kv_heads);
    }
    figures.error = std::sqrt(difference / norm);
    return figures;
  }

  worker::TraceLayer trace_;
  std::map<std::pair<int64_t, int64_t>, std::vector<float>> full_;
};

TEST_P(SelectTraceTest, AgreesWithTheReference) {
  int64_t tokens = 0, equal = 0;
  for (const Setting& setting : {Default(64), Recall(128), ClusterKv(256)}) {
    const auto built = Build(setting);
    const IndexPartView part = built->view();
    SelectScratch scratch;
    for (int64_t step = 5; step < trace_.queries; step += 31) {
      for (int64_t kv_head = 0; kv_head < shape().kv_heads; ++kv_head) {
        const std::vector<float> queries = Queries(step, kv_head);
        const SelectInput input = Input(setting, part, kv_head, queries);
        HeadSelection fast, plain;
        ASSERT_TRUE(Select(setting.select, input, scratch, &fast).ok());
        ASSERT_TRUE(SelectReference(setting.select, input, &plain).ok());
        std::vector<int32_t> both;
        std::set_intersection(fast.positions.begin(), fast.positions.end(), plain.positions.begin(),
                              plain.positions.end(), std::back_inserter(both));
        tokens += static_cast<int64_t>(plain.positions.size());
        equal += static_cast<int64_t>(both.size());
        for (size_t g = 0; g < plain.state_lse.size(); ++g) {
          if (std::isinf(plain.state_lse[g])) {
            ASSERT_EQ(fast.state_lse[g], plain.state_lse[g]);
          } else {
            // Near ties may move a token between zones; its mass is small.
            ASSERT_FALSE(!(std::abs(fast.state_lse[g] - plain.state_lse[g]) <= 1e-3));
          }
        }
        for (size_t i = 0; i < plain.state_output.size(); ++i) {
          ASSERT_FALSE(!(std::abs(fast.state_output[i] - plain.state_output[i]) <= 2e-3));
        }
      }
    }
  }
  EXPECT_FALSE(!(static_cast<double>(equal) >= 0.999 * static_cast<double>(tokens)))
      << equal << " of " << tokens;
}

// Known answers of a float32 oracle of the presets on these traces.
struct KnownAnswer {
  const char* name;
  Setting setting;
  struct {
    double error, recalled_1024, recalled_256;
  } layer3, layer6;
  double tolerance;  // of the error
};

std::vector<KnownAnswer> KnownAnswers() {
  Setting four_bits = Default(64);
  four_bits.index.codes = {4, 128};
  Setting raw_metric = Default(64);
  raw_metric.balanced = false;
  Setting narrow = Default(64);
  narrow.select.scored_tokens = 512;
  std::vector<KnownAnswer> answers = {
      {"clusterkv@1024", ClusterKv(1024), {.0408, 866, 1574}, {.1465, 1491, 1988}, .15},
      {"recall@128", Recall(128), {.0730, 8.6, 32.3}, {.1101, 44.3, 68.8}, .05},
      {"recall@1024", Recall(1024), {.0275, 341, 785}, {.0190, 528, 869}, .05},
      {"default@32", Default(32), {.0218, 2.1, 3.5}, {.0458, 6.1, 8.4}, .05},
      {"default@64", Default(64), {.0188, 4.3, 11.5}, {.0352, 17.9, 28.9}, .05},
      {"default@128", Default(128), {.0176, 10.0, 34.4}, {.0346, 46.0, 70.3}, .05},
      {"default@64 codes=4:128", four_bits, {.0175, 4.0, 11.0}, {.0349, 18.3, 28.9}, .05},
      {"default@64 metric=raw", raw_metric, {.0187, 4.4, 11.6}, {.0388, 17.8, 28.5}, .05},
      {"default@64 W=512", narrow, {.0518, 3.5, 10.0}, {.1230, 17.2, 28.0}, .05},
  };
#ifdef CLUSTERKV_SANITIZED
  // Ten to thirty times slower there: the setting that runs through most of the code.
  answers = {answers[4]};
#endif
  return answers;
}

TEST_P(SelectTraceTest, PresetsGiveTheirKnownAnswers) {
  for (const KnownAnswer& known : KnownAnswers()) {
    SCOPED_TRACE(known.name);
    const auto& expected = GetParam() == 3 ? known.layer3 : known.layer6;
    const Figures figures = Replay(known.setting);
    std::printf("layer %d %-24s err %.4f (%.4f) recalled %.1f (%.1f) and %.1f (%.1f)\n", GetParam(),
                known.name, figures.error, expected.error, figures.recalled_1024,
                expected.recalled_1024, figures.recalled_256, expected.recalled_256);
    EXPECT_FALSE(!(std::abs(figures.error / expected.error - 1) <= known.tolerance));
    EXPECT_FALSE(!(std::abs(figures.recalled_1024 - expected.recalled_1024) <=
                   0.1 * expected.recalled_1024 + 1));
    EXPECT_FALSE(!(std::abs(figures.recalled_256 - expected.recalled_256) <=
                   0.1 * expected.recalled_256 + 1));
  }
}

// Channels of K scaled up and of Q down leave attention as it is; the balanced metric does not see
// them.
TEST_P(SelectTraceTest, OutlierChannelsChangeNothing) {
  const Figures before = Replay(Default(64));
  const int64_t dim = shape().head_dim;
  const auto scale = [&](std::vector<std::byte>& rows, float factor) {
    const int64_t element_bytes = ElementBytes(shape().element_type);
    const int64_t elements = static_cast<int64_t>(rows.size()) / element_bytes;
    for (int64_t i = 0; i < elements; ++i) {
      if (i % dim % 11 != 0) continue;
      std::byte* element = rows.data() + i * element_bytes;
      StoreElement(LoadElement(element, shape().element_type) * factor, element,
                   shape().element_type);
    }
  };
  scale(trace_.keys, 16.0f);
  scale(trace_.q, 1.0f / 16);
  for (size_t i = 0; i < trace_.query_rms.size(); ++i) {
    if (i % dim % 11 == 0) trace_.query_rms[i] /= 16;
  }
  const Figures after = Replay(Default(64));
  EXPECT_FALSE(!(std::abs(after.error / before.error - 1) <= 0.01))
      << before.error << " " << after.error;
}

INSTANTIATE_TEST_SUITE_P(Layers, SelectTraceTest, ::testing::Values(3, 6));

}  // namespace
}  // namespace clusterkv::kernels
