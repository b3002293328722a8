// A Select call over hand-built parts: queries, sinks and input in one place.
#ifndef CLUSTERKV_TESTS_KERNELS_TESTING_SELECT_FIXTURE_H_
#define CLUSTERKV_TESTS_KERNELS_TESTING_SELECT_FIXTURE_H_

#include <cmath>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "kernels/select/select.h"
#include "tests/kernels/testing/test_index_part.h"

namespace clusterkv::kernels::testing {

class SelectFixture {
 public:
  static constexpr int64_t kSinks = 16;

  // Parts in token order, the first token after the sinks. Queries and sinks are random.
  SelectFixture(std::vector<TestPartSpec> specs, uint32_t seed) : random_(seed) {
    for (TestPartSpec& spec : specs) {
      parts_.push_back(std::make_unique<TestIndexPart>(spec));
      views_.push_back(parts_.back()->view());
    }
    const KvShape& shape = specs[0].shape;
    std::normal_distribution<float> normal;
    sinks_.resize(kSinks * shape.head_dim);
    for (float& x : sinks_) x = 0.5f * normal(random_);
    input_.shape = shape;
    input_.codes = specs[0].codes;
    input_.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    input_.parts = views_;
    input_.sink_keys = reinterpret_cast<const std::byte*>(sinks_.data());
    input_.sink_key_stride_bytes = shape.head_dim * static_cast<int64_t>(sizeof(float));
    input_.sink_tokens = kSinks;
    NewQueries(1.0f);
  }

  // Each query head near the keys of a random token, times `scale`.
  void NewQueries(float scale) {
    const KvShape& shape = input_.shape;
    std::normal_distribution<float> normal;
    queries_.resize(shape.group() * shape.head_dim);
    const TestPartSpec& spec = parts_[random_() % parts_.size()]->spec();
    for (int64_t g = 0; g < shape.group(); ++g) {
      const int64_t token = static_cast<int64_t>(random_() % spec.tokens);
      const float* key =
          spec.keys.data() + (token * shape.kv_heads + input_.kv_head) * shape.head_dim;
      for (int64_t j = 0; j < shape.head_dim; ++j) {
        queries_[g * shape.head_dim + j] = scale * (key[j] + 0.5f * normal(random_));
      }
    }
    input_.queries = queries_;
  }

  SelectInput& input() { return input_; }
  std::vector<float>& queries() { return queries_; }
  const std::vector<float>& sinks() const { return sinks_; }
  const TestIndexPart& part(int64_t p) const { return *parts_[p]; }
  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }
  std::mt19937& random() { return random_; }

  int64_t clusters() const {
    int64_t clusters = 0;
    for (const IndexPartView& view : views_) clusters += view.clusters;
    return clusters;
  }
  int64_t tokens() const {
    int64_t tokens = 0;
    for (const IndexPartView& view : views_) tokens += view.tokens;
    return tokens;
  }

  // The key and value of a token as they came.
  const float* Key(int64_t position) const { return Row(position, true); }
  const float* Value(int64_t position) const { return Row(position, false); }

  double Logit(int64_t g, const float* key) const {
    double sum = 0;
    for (int64_t j = 0; j < input_.shape.head_dim; ++j) {
      sum += static_cast<double>(queries_[g * input_.shape.head_dim + j]) * key[j];
    }
    return sum * input_.scale;
  }

 private:
  const float* Row(int64_t position, bool key) const {
    for (const auto& part : parts_) {
      const TestPartSpec& spec = part->spec();
      const int64_t t = position - spec.first_token;
      if (t < 0 || t >= spec.tokens) continue;
      const std::vector<float>& rows = key ? spec.keys : spec.values;
      return rows.data() + (t * spec.shape.kv_heads + input_.kv_head) * spec.shape.head_dim;
    }
    return nullptr;
  }

  std::mt19937 random_;
  std::vector<std::unique_ptr<TestIndexPart>> parts_;
  std::vector<IndexPartView> views_;
  std::vector<float> queries_, sinks_;
  SelectInput input_;
};

inline KvShape MakeShape(int64_t kv_heads, int64_t group, int64_t head_dim,
                         ElementType type = ElementType::kFloat32) {
  KvShape shape;
  shape.kv_heads = kv_heads;
  shape.query_heads = kv_heads * group;
  shape.head_dim = head_dim;
  shape.element_type = type;
  return shape;
}

}  // namespace clusterkv::kernels::testing

#endif  // CLUSTERKV_TESTS_KERNELS_TESTING_SELECT_FIXTURE_H_
