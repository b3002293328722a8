#include "kernels/kmeans/kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/highway.h"
#include "kernels/base/thread_pool.h"
#include "kernels/kmeans/kmeans_internal.h"
#include "tests/test_seed.h"

namespace clusterkv::kernels {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

uint32_t Seed() {
  static const auto seed = static_cast<uint32_t>(TestSeed(20240917));
  return seed;
}

std::vector<float> Normal(int64_t count, uint32_t salt) {
  std::mt19937 random(Seed() + salt);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

constexpr int32_t kPoison = -77;
constexpr int64_t kGuard = 32;

// A KMeans result whose arrays stand between poisoned guards.
struct Result {
  explicit Result(const KMeansParams& p)
      : params(p),
        labels_room(p.rows + 2 * kGuard, kPoison),
        sizes_room(p.clusters + 2 * kGuard, kPoison),
        centroids_room(p.clusters * p.dim + 2 * kGuard, kPoison) {}

  absl::Span<int32_t> labels() { return absl::MakeSpan(labels_room).subspan(kGuard, params.rows); }
  absl::Span<int32_t> sizes() {
    return absl::MakeSpan(sizes_room).subspan(kGuard, params.clusters);
  }
  absl::Span<float> centroids() {
    return absl::MakeSpan(centroids_room).subspan(kGuard, params.clusters * params.dim);
  }
  template <typename T>
  static bool GuardsHold(const std::vector<T>& room) {
    const auto poisoned = [](T value) { return value == static_cast<T>(kPoison); };
    return std::all_of(room.begin(), room.begin() + kGuard, poisoned) &&
           std::all_of(room.end() - kGuard, room.end(), poisoned);
  }
  bool GuardsHold() const {
    return GuardsHold(labels_room) && GuardsHold(sizes_room) && GuardsHold(centroids_room);
  }

  KMeansParams params;
  std::vector<int32_t> labels_room, sizes_room;
  std::vector<float> centroids_room;
};

bool operator==(const Result& a, const Result& b) {
  return a.labels_room == b.labels_room && a.sizes_room == b.sizes_room &&
         a.centroids_room == b.centroids_room;
}

// On `threads` threads, the caller's included.
Result RunKMeans(const KMeansParams& params, const std::vector<float>& keys, int threads = 1) {
  Result result(params);
  absl::Status status;
  if (threads == 1) {
    status = KMeans(params, keys, result.labels(), result.centroids(), result.sizes(), SerialFor);
  } else {
    auto pool = ThreadPool::Create(threads - 1, "test").value();
    status = KMeans(
        params, keys, result.labels(), result.centroids(), result.sizes(),
        [&](int64_t count, absl::FunctionRef<void(int64_t)> task) { pool->For(count, task); });
  }
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(result.GuardsHold());
  return result;
}

Result RunReference(const KMeansParams& params, const std::vector<float>& keys) {
  Result result(params);
  const absl::Status status =
      KMeansReference(params, keys, result.labels(), result.centroids(), result.sizes());
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(result.GuardsHold());
  return result;
}

double Dot(const float* a, const float* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * b[d];
  return sum;
}

double Norm(const float* a, int64_t dim) { return std::sqrt(Dot(a, a, dim)); }

double Score(const float* row, const float* centroid, int64_t dim) {
  const double norm = Norm(centroid, dim);
  return norm > 0 ? Dot(row, centroid, dim) / norm : 0;
}

// Each label is the best, or so near that float cannot tell: a score is a chain of dim
// multiply-adds over a centroid rounded to float, so two of them are off by at most 2 (dim + 1) eps
// |row| together, |centroid| = 1 and sum |x_d c_d| <= |row|.
void ExpectLabelsAreBest(absl::Span<const float> keys, absl::Span<const float> centroids,
                         int64_t dim, absl::Span<const int32_t> labels) {
  const int64_t clusters = centroids.size() / dim;
  const double eps = std::numeric_limits<float>::epsilon();
  for (size_t row = 0; row < labels.size(); ++row) {
    const float* key = &keys[row * dim];
    ASSERT_GE(labels[row], 0);
    ASSERT_LT(labels[row], clusters);
    double best = -std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < clusters; ++c)
      best = std::max(best, Score(key, &centroids[c * dim], dim));
    const double ours = Score(key, &centroids[labels[row] * dim], dim);
    ASSERT_FALSE(!(best - ours <= 2 * (dim + 1) * eps * Norm(key, dim)))
        << "row " << row << " label " << labels[row] << " " << ours << " best " << best;
  }
}

// Centroids are, bit for bit, the means of the members in ascending order; sizes count them.
void ExpectCentroidsAreMeans(const std::vector<float>& keys, Result& result) {
  const int64_t dim = result.params.dim;
  std::vector<double> sums(result.params.clusters * dim, 0.0);
  std::vector<int32_t> sizes(result.params.clusters, 0);
  for (int64_t row = 0; row < result.params.rows; ++row) {
    const int32_t label = result.labels()[row];
    ++sizes[label];
    for (int64_t d = 0; d < dim; ++d) sums[label * dim + d] += keys[row * dim + d];
  }
  for (int64_t c = 0; c < result.params.clusters; ++c) {
    ASSERT_EQ(result.sizes()[c], sizes[c]);
    for (int64_t d = 0; sizes[c] > 0 && d < dim; ++d) {
      ASSERT_EQ(result.centroids()[c * dim + d], static_cast<float>(sums[c * dim + d] / sizes[c]));
    }
  }
}

// Unit directions far apart, `rows` keys near them in turn, row i near direction i % clusters.
std::vector<float> Planted(int64_t rows, int64_t dim, int64_t clusters, float noise) {
  std::vector<float> keys = Normal(rows * dim, 5);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < dim; ++d) keys[row * dim + d] *= noise;
    keys[row * dim + row % clusters] += 1.0f + 0.25f * static_cast<float>(row % 3);
  }
  return keys;
}

struct Shape {
  int64_t rows, dim, clusters;
};
const Shape kShapes[] = {{1, 1, 1},      {2, 1, 2},      {7, 3, 7},     {13, 16, 5},
                         {16, 17, 16},   {97, 31, 13},   {255, 64, 47}, {257, 128, 48},
                         {521, 128, 49}, {600, 80, 101}, {300, 1024, 3}};

TEST(KMeansTest, PlantedDirectionsAreRecoveredExactly) {
  const int64_t clusters = 12;
  const KMeansParams params{.rows = 600, .dim = 32, .clusters = clusters, .iterations = 10};
  std::vector<float> keys = Planted(params.rows, params.dim, clusters, 0.02f);
  // The stride start lands on one row of each direction when they come in runs.
  std::vector<float> sorted(keys.size());
  const int64_t run = params.rows / clusters;
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t to = (row % clusters) * run + row / clusters;
    std::copy_n(&keys[row * params.dim], params.dim, &sorted[to * params.dim]);
  }
  Result result = RunKMeans(params, sorted);
  for (int64_t row = 0; row < params.rows; ++row) EXPECT_EQ(result.labels()[row], row / run);
  EXPECT_EQ(std::vector<int32_t>(result.sizes().begin(), result.sizes().end()),
            std::vector<int32_t>(clusters, run));
}

TEST(KMeansTest, EqualsTheReferenceBitForBitOnSeparatedClusters) {
  for (KMeansInit init : {KMeansInit::kStride, KMeansInit::kRandom}) {
    const KMeansParams params{
        .rows = 500, .dim = 48, .clusters = 12, .iterations = 6, .init = init, .seed = Seed()};
    const std::vector<float> keys = Planted(params.rows, params.dim, 20, 0.03f);
    Result ours = RunKMeans(params, keys);
    EXPECT_TRUE(ours == RunReference(params, keys));
  }
}

TEST(KMeansTest, LabelsAreTheBestOfTheLastCentroidsAndCentroidsTheirMeans) {
  for (const Shape& s : kShapes) {
    for (KMeansInit init : {KMeansInit::kStride, KMeansInit::kRandom}) {
      SCOPED_TRACE(::testing::Message() << s.rows << "x" << s.dim << " k=" << s.clusters);
      KMeansParams params{.rows = s.rows,
                          .dim = s.dim,
                          .clusters = s.clusters,
                          .iterations = 3,
                          .init = init,
                          .seed = 11};
      const std::vector<float> keys = Normal(s.rows * s.dim, 7);
      Result before = RunKMeans(params, keys);
      params.iterations = 4;
      Result after = RunKMeans(params, keys);
      ExpectLabelsAreBest(keys, before.centroids(), s.dim, after.labels());
      ExpectCentroidsAreMeans(keys, after);
    }
  }
}

TEST(KMeansTest, EveryInstructionSetObeysTheRules) {
  const KMeansParams params{.rows = 263, .dim = 37, .clusters = 53, .iterations = 1};
  const std::vector<float> keys = Normal(params.rows * params.dim, 15);
  std::vector<float> start;
  for (int32_t row : internal::InitialRows(params)) {
    start.insert(start.end(), &keys[row * params.dim], &keys[row * params.dim] + params.dim);
  }
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    Result result = RunKMeans(params, keys);
    ExpectLabelsAreBest(keys, start, params.dim, result.labels());
    ExpectCentroidsAreMeans(keys, result);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

TEST(KMeansTest, ReferenceObeysTheSameRules) {
  KMeansParams params{.rows = 97, .dim = 31, .clusters = 13, .iterations = 2};
  const std::vector<float> keys = Normal(params.rows * params.dim, 8);
  Result before = RunReference(params, keys);
  params.iterations = 3;
  Result after = RunReference(params, keys);
  ExpectLabelsAreBest(keys, before.centroids(), params.dim, after.labels());
  ExpectCentroidsAreMeans(keys, after);
}

TEST(KMeansTest, SameBitsOnEveryThreadCountAndRun) {
  for (const Shape& s : kShapes) {
    const KMeansParams params{.rows = s.rows,
                              .dim = s.dim,
                              .clusters = s.clusters,
                              .init = KMeansInit::kRandom,
                              .seed = 3};
    const std::vector<float> keys = Normal(s.rows * s.dim, 9);
    Result one = RunKMeans(params, keys);
    for (int threads : {1, 2, 3, 5})
      EXPECT_TRUE(one == RunKMeans(params, keys, threads)) << threads;
  }
}

TEST(KMeansTest, SmallIntegersGiveTheReferencesLabels) {
  // Axis-aligned centroids have exact lengths and every product and sum is a small integer, so
  // float and double agree to the bit, ties included.
  const int64_t rows = 331, dim = 24;
  std::mt19937 random(Seed());
  std::vector<float> keys(rows * dim);
  for (float& key : keys) key = static_cast<float>(static_cast<int>(random() % 9) - 4);
  std::vector<float> centroids(dim * 2 * dim, 0.0f);
  for (int64_t c = 0; c < 2 * dim; ++c) centroids[c * dim + c / 2] = c % 2 == 0 ? 2.0f : -4.0f;
  std::vector<int32_t> labels(rows, kPoison);
  ASSERT_TRUE(
      AssignRows(rows, dim, 2 * dim, keys, centroids, absl::MakeSpan(labels), SerialFor).ok());
  for (int64_t row = 0; row < rows; ++row) {
    int32_t best = 0;
    for (int32_t c = 1; c < 2 * dim; ++c) {
      const auto score = [&](int32_t i) {
        return Score(&keys[row * dim], &centroids[i * dim], dim);
      };
      if (score(c) > score(best)) best = c;
    }
    ASSERT_EQ(labels[row], best) << row;
  }
}

TEST(KMeansTest, TheLowestIndexWinsTies) {
  // Every centroid the same: all rows tie everywhere, across lanes, vectors and panels.
  for (int64_t clusters : {1, 2, 15, 16, 17, 33, 47, 48, 49, 100, 150}) {
    const int64_t rows = 19, dim = 5;
    const std::vector<float> keys = Normal(rows * dim, 10);
    std::vector<float> centroids;
    for (int64_t c = 0; c < clusters; ++c) centroids.insert(centroids.end(), {1, -2, 3, 0.5, 0});
    std::vector<int32_t> labels(rows, kPoison);
    ASSERT_TRUE(
        AssignRows(rows, dim, clusters, keys, centroids, absl::MakeSpan(labels), SerialFor).ok());
    EXPECT_EQ(labels, std::vector<int32_t>(rows, 0)) << clusters;
  }
}

TEST(KMeansTest, AZeroCentroidScoresZero) {
  const std::vector<float> keys = {1, 0, -1, 0, 0, 0};
  const std::vector<float> centroids = {0, 0, 3, 0};
  std::vector<int32_t> labels(3);
  ASSERT_TRUE(AssignRows(3, 2, 2, keys, centroids, absl::MakeSpan(labels), SerialFor).ok());
  EXPECT_THAT(labels, ElementsAre(1, 0, 0));
}

TEST(KMeansTest, LengthOfACentroidDoesNotMatter) {
  const int64_t rows = 97, dim = 33, clusters = 29;
  const std::vector<float> keys = Normal(rows * dim, 12);
  std::vector<float> centroids = Normal(clusters * dim, 13);
  std::vector<int32_t> labels(rows), scaled(rows);
  ASSERT_TRUE(
      AssignRows(rows, dim, clusters, keys, centroids, absl::MakeSpan(labels), SerialFor).ok());
  for (int64_t i = 0; i < clusters * dim; ++i)
    centroids[i] *= std::ldexp(1.0f, (i / dim) % 40 - 20);
  ASSERT_TRUE(
      AssignRows(rows, dim, clusters, keys, centroids, absl::MakeSpan(scaled), SerialFor).ok());
  EXPECT_EQ(labels, scaled);
}

TEST(KMeansTest, AnEmptyClusterKeepsItsCentroid) {
  // Row 2 equals row 0, so cluster 1 (started at row 2) loses every row to cluster 0.
  const std::vector<float> keys = {1, 0, 1, 0, 1, 0, 0, 1, 0, 1};
  const KMeansParams params{.rows = 5, .dim = 2, .clusters = 3};
  Result result = RunKMeans(params, keys);
  EXPECT_THAT(result.labels(), ElementsAre(0, 0, 0, 2, 2));
  EXPECT_THAT(result.sizes(), ElementsAre(3, 0, 2));
  EXPECT_THAT(result.centroids(), ElementsAre(1, 0, 1, 0, 0, 1));
  EXPECT_TRUE(result == RunReference(params, keys));
}

TEST(KMeansTest, IdenticalRowsFormOneCluster) {
  const KMeansParams params{.rows = 53, .dim = 16, .clusters = 7};
  const std::vector<float> keys(params.rows * params.dim, 0.5f);
  Result result = RunKMeans(params, keys);
  EXPECT_THAT(result.sizes(), ElementsAre(53, 0, 0, 0, 0, 0, 0));
  EXPECT_TRUE(result == RunReference(params, keys));
}

TEST(KMeansTest, StrideStartsWhereTheContractSays) {
  const KMeansParams params{.rows = 100, .dim = 1, .clusters = 4};
  EXPECT_THAT(internal::InitialRows(params), ElementsAre(0, 33, 66, 99));
  EXPECT_THAT(internal::InitialRows({.rows = 100, .dim = 1, .clusters = 1}), ElementsAre(0));
}

TEST(KMeansTest, RandomStartDrawsDistinctRowsTheSameOnEveryPlatform) {
  KMeansParams params{
      .rows = 1000, .dim = 1, .clusters = 1000, .init = KMeansInit::kRandom, .seed = 3};
  const std::vector<int32_t> all = internal::InitialRows(params);
  EXPECT_EQ(std::set<int32_t>(all.begin(), all.end()).size(), 1000u);
  params.clusters = 5;
  const std::vector<int32_t> five = internal::InitialRows(params);
  EXPECT_TRUE(std::equal(five.begin(), five.end(), all.begin()));
  params.seed = 4;
  EXPECT_NE(internal::InitialRows(params), five);
  // SplitMix64's published first outputs for seed 1234567.
  internal::SplitMix64 random(1234567);
  EXPECT_EQ(random.Next(), 6457827717110365317u);
  EXPECT_EQ(random.Next(), 3203168211198807973u);
}

TEST(KMeansTest, RandomStartDrawsEveryRowEquallyOften) {
  const int64_t rows = 10;
  std::vector<int> drawn(rows, 0);
  const int trials = 20000;
  for (int seed = 0; seed < trials; ++seed) {
    for (int32_t row : internal::InitialRows({.rows = rows,
                       .dim = 1,
                       .clusters = 3,
                       .init = KMeansInit::kRandom,
                       .seed = static_cast<uint64_t>(seed)})) {
      ++drawn[row];
    }
  }
  // Binomial(20000, 0.3): standard deviation 65; six of them.
  for (int count : drawn) EXPECT_NEAR(count, trials * 0.3, 390);
}

// Spherical k-means (unit rows, centroids of which only the direction counts) can only gain: for
// unit rows the raw mean has the direction of the normalised sum.
TEST(KMeansTest, SumOfBestCosinesNeverFallsForUnitKeys) {
  KMeansParams params{.rows = 700, .dim = 24, .clusters = 31};
  std::vector<float> keys = Normal(params.rows * params.dim, 14);
  for (int64_t row = 0; row < params.rows; ++row) {
    const double norm = Norm(&keys[row * params.dim], params.dim);
    for (int64_t d = 0; d < params.dim; ++d) keys[row * params.dim + d] /= norm;
  }
  double last = -1e30;
  for (params.iterations = 1; params.iterations <= 12; ++params.iterations) {
    Result result = RunKMeans(params, keys);
    double objective = 0;
    for (int64_t row = 0; row < params.rows; ++row) {
      double best = -1;
      for (int64_t c = 0; c < params.clusters; ++c) {
        best = std::max(
            best, Score(&keys[row * params.dim], &result.centroids()[c * params.dim], params.dim));
      }
      objective += best;
    }
    // Up to float's rounding of a centroid and of near ties: rows * (dim + 1) * 2 eps.
    ASSERT_FALSE(!(objective >= last - 700 * 25 * 2 * 1.2e-7)) << params.iterations;
    last = objective;
  }
}

void ExpectInvalid(const absl::Status& status, const std::string& field) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(field));
}

TEST(KMeansTest, RefusesWhatDoesNotFitAndNamesIt) {
  const KMeansParams good{.rows = 4, .dim = 3, .clusters = 2};
  const auto check = [&](const KMeansParams& params, size_t keys, size_t labels, size_t centroids,
                         size_t sizes, const std::string& field) {
    std::vector<float> k(keys), c(centroids);
    std::vector<int32_t> l(labels), s(sizes);
    ExpectInvalid(
        KMeans(params, k, absl::MakeSpan(l), absl::MakeSpan(c), absl::MakeSpan(s), SerialFor),
        field);
    ExpectInvalid(
        KMeansReference(params, k, absl::MakeSpan(l), absl::MakeSpan(c), absl::MakeSpan(s)), field);
  };
  check(good, 11, 4, 6, 2, "keys");
  check(good, 12, 5, 6, 2, "labels");
  check(good, 12, 4, 7, 2, "centroids");
  check(good, 12, 4, 6, 3, "sizes");
  KMeansParams bad = good;
  bad.rows = 0;
  check(bad, 0, 0, 6, 2, "rows");
  bad.rows = int64_t{1} << 40;
  check(bad, 12, 4, 6, 2, "rows");
  bad = good;
  bad.dim = 0;
  check(bad, 0, 4, 0, 2, "dim");
  bad.dim = 1025;
  check(bad, 4100, 4, 2050, 2, "dim");
  bad = good;
  bad.clusters = 5;
  check(bad, 12, 4, 15, 5, "clusters");
  bad.clusters = 0;
  check(bad, 12, 4, 0, 0, "clusters");
  bad = good;
  bad.iterations = 0;
  check(bad, 12, 4, 6, 2, "iterations");
  bad = good;
  bad.init = static_cast<KMeansInit>(9);
  check(bad, 12, 4, 6, 2, "init");
}

TEST(KMeansTest, AssignRefusesWhatDoesNotFit) {
  std::vector<float> keys(6), centroids(9);
  std::vector<int32_t> labels(2);
  ExpectInvalid(AssignRows(2, 3, 2, keys, centroids, absl::MakeSpan(labels), SerialFor),
                "centroids");
  ExpectInvalid(AssignRows(3, 3, 3, keys, centroids, absl::MakeSpan(labels), SerialFor), "keys");
  ExpectInvalid(AssignRows(2, 3, 0, keys, {}, absl::MakeSpan(labels), SerialFor), "clusters");
}

}  // namespace
}  // namespace clusterkv::kernels
