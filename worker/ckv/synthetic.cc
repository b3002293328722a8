#include "worker/ckv/synthetic.h"

#include <algorithm>
#include <cmath>

namespace clusterkv::worker::ckv {
namespace {

constexpr float kTopicScale =
    1.6f;  // deviation of a topic's channels: logits spread over some units
constexpr float kNoise = 0.5f;
constexpr int64_t kTokensPerTopic = 24;

int64_t TopicsOf(int64_t tokens) { return std::max<int64_t>(1, tokens / kTokensPerTopic); }

// The topics of one KV head: their keys, then their values, each [topics, head_dim].
std::vector<float> MakeTopics(const kernels::KvShape& shape, int64_t tokens, uint64_t seed,
                              int64_t kv_head) {
  Random random(seed * 0x9E3779B97F4A7C15u + 2 * kv_head + 1);
  std::vector<float> topics(2 * TopicsOf(tokens) * shape.head_dim);
  for (float& channel : topics) channel = kTopicScale * random.Normal();
  return topics;
}

// The queries of one group, [group, head_dim]: all its heads look for one topic.
void FillQueries(const kernels::KvShape& shape, const std::vector<float>& topics,
                 int64_t topic_count, Random& random, float* queries) {
  const float* topic = topics.data() + random.Below(topic_count) * shape.head_dim;
  for (int64_t g = 0; g < shape.group(); ++g) {
    for (int64_t j = 0; j < shape.head_dim; ++j) {
      queries[g * shape.head_dim + j] = 0.5f * topic[j] + kNoise * random.Normal();
    }
  }
}

}  // namespace

uint64_t Random::Next() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

float Random::Normal() {
  const uint64_t bits = Next();
  int64_t sum = -2 * 65535;
  for (int i = 0; i < 4; ++i) sum += static_cast<int64_t>((bits >> (16 * i)) & 0xFFFF);
  // Four uniforms of 65,536 values have the variance 4 / 12 * 65536².
  return static_cast<float>(sum) * (1.7320508f / 65536.0f);
}

TraceLayer MakeSyntheticLayer(const kernels::KvShape& shape, int64_t tokens, int64_t queries,
                              uint64_t seed) {
  const int64_t dim = shape.head_dim;
  const int element = kernels::ElementBytes(shape.element_type);
  TraceLayer layer;
  layer.shape = shape;
  layer.tokens = tokens;
  layer.queries = queries;
  layer.keys.resize(tokens * shape.kv_heads * dim * element);
  layer.values.resize(layer.keys.size());
  layer.q.resize(queries * shape.query_heads * dim * element);
  std::vector<double> squares(shape.kv_heads * dim);
  std::vector<float> row(std::max(shape.group(), int64_t{2}) * dim);
  for (int64_t h = 0; h < shape.kv_heads; ++h) {
    const std::vector<float> topics = MakeTopics(shape, tokens, seed, h);
    const int64_t topic_count = TopicsOf(tokens);
    Random random(seed * 0x9E3779B97F4A7C15u + 2 * h + 2);
    int64_t topic = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (t == 0 || random.Below(8) == 0) topic = random.Below(topic_count);
      const float* key = topics.data() + topic * dim;
      const float* value = key + topic_count * dim;
      for (int64_t j = 0; j < dim; ++j) row[j] = key[j] + kNoise * random.Normal();
      for (int64_t j = 0; j < dim; ++j) row[dim + j] = value[j] + kNoise * random.Normal();
      const int64_t at = (t * shape.kv_heads + h) * dim * element;
      kernels::FromFloat(row.data(), shape.element_type, dim, layer.keys.data() + at);
      kernels::FromFloat(row.data() + dim, shape.element_type, dim, layer.values.data() + at);
    }
    for (int64_t i = 0; i < queries; ++i) {
      FillQueries(shape, topics, topic_count, random, row.data());
      const int64_t at = (i * shape.query_heads + h * shape.group()) * dim * element;
      kernels::FromFloat(row.data(), shape.element_type, shape.group() * dim, layer.q.data() + at);
      for (int64_t k = 0; k < shape.group() * dim; ++k) {
        squares[h * dim + k % dim] += static_cast<double>(row[k]) * row[k];
      }
    }
  }
  if (queries > 0) {
    for (const double sum : squares) {
      const double mean = sum / static_cast<double>(queries * shape.group());
      layer.query_rms.push_back(static_cast<float>(std::sqrt(mean)));
    }
  }
  return layer;
}

std::vector<float> MakeSyntheticQuery(const kernels::KvShape& shape, int64_t tokens, uint64_t seed,
                                      uint64_t query_seed) {
  std::vector<float> queries(shape.query_heads * shape.head_dim);
  for (int64_t h = 0; h < shape.kv_heads; ++h) {
    const std::vector<float> topics = MakeTopics(shape, tokens, seed, h);
    Random random(query_seed * 0xD1342543DE82EF95u + h);
    FillQueries(shape, topics, TopicsOf(tokens), random,
                queries.data() + h * shape.group() * shape.head_dim);
  }
  return queries;
}

}  // namespace clusterkv::worker::ckv
