// An index part built by hand from given clusters: what tests of selection select from. Its arrays
// lie in pages of a chosen size, in shuffled order, with poison between them, so that an address
// computed wrongly reads NaN.
#ifndef CLUSTERKV_TESTS_KERNELS_TESTING_TEST_INDEX_PART_H_
#define CLUSTERKV_TESTS_KERNELS_TESTING_TEST_INDEX_PART_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "kernels/index/index.h"

namespace clusterkv::kernels::testing {

struct TestPartSpec {
  KvShape shape;
  CodesParams codes;
  int64_t first_token = 0;
  int64_t tokens = 0;
  int64_t clusters = 0;
  std::vector<float> keys, values;           // [tokens, kv_heads, head_dim]
  std::vector<std::vector<int32_t>> labels;  // [kv_heads][tokens], each below clusters
  std::vector<float> metric_weight;          // [kv_heads, head_dim]; empty: 1
  std::vector<float> key_balance;            // [kv_heads, head_dim]; empty: from the residuals
  std::vector<float> value_balance;
  int64_t page_bytes = 8192;
  uint32_t seed = 1;  // of the pages' order
};

class TestIndexPart {
 public:
  explicit TestIndexPart(const TestPartSpec& spec) : spec_(spec) {
    for (int64_t h = 0; h < spec_.shape.kv_heads; ++h) BuildHead(h);
    view_.first_token = spec_.first_token;
    view_.tokens = spec_.tokens;
    view_.clusters = spec_.clusters;
    const int64_t row = spec_.shape.head_dim * static_cast<int64_t>(sizeof(uint16_t));
    view_.centroids = Place(centroids_, row);
    view_.value_means = Place(value_means_, row);
    view_.cluster_begin = Place(cluster_begin_, 4);
    view_.positions = Place(positions_, 4);
    view_.slots = Place(slots_, 4);
    if (spec_.codes.bits != 0) {
      view_.codes = Place(codes_, CodesBytes(spec_.codes, spec_.shape.head_dim));
    }
    view_.channels = Place(channels_, 3 * spec_.shape.head_dim * int64_t{sizeof(float)});
  }
  TestIndexPart(const TestIndexPart&) = delete;
  TestIndexPart& operator=(const TestIndexPart&) = delete;

  const TestPartSpec& spec() const { return spec_; }
  const IndexPartView& view() const { return view_; }
  // [kv_heads, 3, head_dim]
  const std::vector<float>& channels() const { return channels_; }

 private:
  const float* KeyOf(int64_t t, int64_t h) const {
    return spec_.keys.data() + (t * spec_.shape.kv_heads + h) * spec_.shape.head_dim;
  }
  const float* ValueOf(int64_t t, int64_t h) const {
    return spec_.values.data() + (t * spec_.shape.kv_heads + h) * spec_.shape.head_dim;
  }

  void BuildHead(int64_t h) {
    const int64_t d = spec_.shape.head_dim;
    const auto given = [&](const std::vector<float>& all, int64_t j) {
      return all.empty() ? 1.0f : all[h * d + j];
    };
    std::vector<int32_t> order(spec_.tokens);
    std::iota(order.begin(), order.end(), 0);
    const std::vector<int32_t>& labels = spec_.labels[h];
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return labels[a] < labels[b]; });
    std::vector<int32_t> slots(spec_.tokens);
    for (int64_t slot = 0; slot < spec_.tokens; ++slot) {
      positions_.push_back(static_cast<int32_t>(spec_.first_token + order[slot]));
      slots[order[slot]] = static_cast<int32_t>(slot);
    }
    slots_.insert(slots_.end(), slots.begin(), slots.end());

    std::vector<float> key_residuals, value_residuals;
    int64_t slot = 0;
    for (int64_t c = 0; c < spec_.clusters; ++c) {
      cluster_begin_.push_back(static_cast<int32_t>(slot));
      const int64_t begin = slot;
      while (slot < spec_.tokens && labels[order[slot]] == c) ++slot;
      std::vector<double> key_sum(d, 0.0), value_sum(d, 0.0);
      for (int64_t s = begin; s < slot; ++s) {
        for (int64_t j = 0; j < d; ++j) {
          key_sum[j] += KeyOf(order[s], h)[j] * given(spec_.metric_weight, j);
          value_sum[j] += ValueOf(order[s], h)[j];
        }
      }
      const double size = static_cast<double>(std::max<int64_t>(1, slot - begin));
      for (int64_t j = 0; j < d; ++j) {
        // An empty cluster keeps a centroid that would win every ranking.
        const double key_mean = slot == begin ? 6e4 : key_sum[j] / size;
        centroids_.push_back(FloatToHalfSaturated(static_cast<float>(key_mean)));
        value_means_.push_back(FloatToHalfSaturated(static_cast<float>(value_sum[j] / size)));
      }
      const uint16_t* centroid = centroids_.data() + centroids_.size() - d;
      const uint16_t* value_mean = value_means_.data() + value_means_.size() - d;
      for (int64_t s = begin; s < slot; ++s) {
        for (int64_t j = 0; j < d; ++j) {
          key_residuals.push_back(KeyOf(order[s], h)[j] * given(spec_.metric_weight, j) -
                                  HalfToFloat(centroid[j]));
          value_residuals.push_back(ValueOf(order[s], h)[j] - HalfToFloat(value_mean[j]));
        }
      }
    }
    cluster_begin_.push_back(static_cast<int32_t>(slot));
    Encode(h, key_residuals, value_residuals);
  }

  void Encode(int64_t h, const std::vector<float>& key_residuals,
              const std::vector<float>& value_residuals) {
    const int64_t d = spec_.shape.head_dim;
    std::vector<float> balance[2] = {std::vector<float>(d), std::vector<float>(d)};
    ResidualBalance(key_residuals.data(), spec_.tokens, d, balance[0].data());
    ResidualBalance(value_residuals.data(), spec_.tokens, d, balance[1].data());
    for (int64_t j = 0; j < d; ++j) {
      channels_.push_back(spec_.metric_weight.empty() ? 1.0f : spec_.metric_weight[h * d + j]);
      if (!spec_.key_balance.empty()) balance[0][j] = spec_.key_balance[h * d + j];
      if (!spec_.value_balance.empty()) balance[1][j] = spec_.value_balance[h * d + j];
    }
    for (const auto& of_half : balance) {
      channels_.insert(channels_.end(), of_half.begin(), of_half.end());
    }
    if (spec_.codes.bits == 0) return;
    const int64_t bytes = spec_.tokens * CodesBytes(spec_.codes, d);
    codes_.resize(codes_.size() + bytes);
    EncodeResidualsReference(spec_.codes, d, spec_.tokens, key_residuals.data(),
                             value_residuals.data(), balance[0].data(), balance[1].data(),
                             codes_.data() + codes_.size() - bytes);
  }

  // Copies an array to pages of its own.
  template <typename T>
  PagedView Place(const std::vector<T>& array, int64_t element_bytes) {
    const int64_t bytes = static_cast<int64_t>(array.size() * sizeof(T));
    const int64_t page_bytes = std::max(spec_.page_bytes, element_bytes);
    const int64_t size = bytes / element_bytes;
    const int64_t pages = PagesFor(size, element_bytes, page_bytes);
    auto numbers = std::make_unique<std::vector<uint32_t>>(pages);
    for (int64_t i = 0; i < pages; ++i) (*numbers)[i] = static_cast<uint32_t>(2 * i);
    std::mt19937 random(spec_.seed + static_cast<uint32_t>(arenas_.size()));
    std::shuffle(numbers->begin(), numbers->end(), random);
    // Every other page of the arena is poison, and so is what an element leaves of its page.
    auto arena = std::make_unique<std::vector<std::byte>>(2 * pages * page_bytes, std::byte{0xFF});
    const MutablePagedView view =
        MakePagedView(arena->data(), numbers->data(), page_bytes, element_bytes, size);
    for (int64_t i = 0; i < size; ++i) {
      std::memcpy(view.At(i), reinterpret_cast<const std::byte*>(array.data()) + i * element_bytes,
                  element_bytes);
    }
    arenas_.push_back(std::move(arena));
    pages_.push_back(std::move(numbers));
    return view;
  }

  const TestPartSpec spec_;
  std::vector<uint16_t> centroids_, value_means_;  // halves
  std::vector<float> channels_;
  std::vector<int32_t> cluster_begin_, positions_, slots_;
  std::vector<std::byte> codes_;
  std::vector<std::unique_ptr<std::vector<std::byte>>> arenas_;
  std::vector<std::unique_ptr<std::vector<uint32_t>>> pages_;
  IndexPartView view_;
};

// `clusters` directions with noise around them, tokens of a cluster spread over the whole run,
// values that go with the cluster. Labels are the planted ones; every seventh cluster is empty when
// asked.
inline TestPartSpec PlantedPart(const KvShape& shape, const CodesParams& codes, int64_t tokens,
                                int64_t clusters, uint32_t seed, bool empty_clusters = false) {
  TestPartSpec spec;
  spec.shape = shape;
  spec.codes = codes;
  spec.tokens = tokens;
  spec.clusters = clusters;
  spec.seed = seed;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int64_t row = shape.kv_heads * shape.head_dim;
  std::vector<float> key_centers(clusters * row), value_centers(clusters * row);
  for (float& x : key_centers) x = normal(random);
  for (float& x : value_centers) x = normal(random);
  spec.labels.assign(shape.kv_heads, std::vector<int32_t>(tokens));
  spec.keys.resize(tokens * row);
  spec.values.resize(tokens * row);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      int32_t label = static_cast<int32_t>(random() % clusters);
      if (empty_clusters && label % 7 == 3) label = (label + 1) % static_cast<int32_t>(clusters);
      spec.labels[h][t] = label;
      for (int64_t j = 0; j < shape.head_dim; ++j) {
        const int64_t i = (t * shape.kv_heads + h) * shape.head_dim + j;
        const int64_t center = (label * shape.kv_heads + h) * shape.head_dim + j;
        spec.keys[i] = key_centers[center] + 0.4f * normal(random);
        spec.values[i] = value_centers[center] + 0.5f * normal(random);
      }
    }
  }
  return spec;
}

}  // namespace clusterkv::kernels::testing

#endif  // CLUSTERKV_TESTS_KERNELS_TESTING_TEST_INDEX_PART_H_
