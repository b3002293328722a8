// The main path on real KV: `replay` through a server over the wire gives the known answers.
#include "worker/ckv/replay.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "cache_service/config.h"
#include "cache_service/server.h"
#include "tests/worker/ckv/processes.h"
#include "worker/ckv/connection.h"

namespace clusterkv::worker::ckv {
namespace {

// Under a sanitizer everything is ten to thirty times slower: fewer steps and a shorter prompt
// there (still longer than what is scored by codes), and no known answers, which are means over all
// steps.
#ifdef CLUSTERKV_SANITIZED
constexpr int64_t kSteps = 24;
constexpr int64_t kWindowTokens = 8;
constexpr int64_t kMaxPromptTokens = 3072;
#else
constexpr int64_t kSteps = 0;  // all
constexpr int64_t kWindowTokens = 40;
constexpr int64_t kMaxPromptTokens = 1 << 30;
#endif

std::vector<std::string> TracePaths() {
  const char* shared = std::getenv("CLUSTERKV_SHARED");
  const std::filesystem::path source(CLUSTERKV_SOURCE_DIR);
  const std::filesystem::path folders[] = {
      source / "tests/data/traces", source / "tests/data",
      (shared != nullptr ? std::filesystem::path(shared) : source / ".." / "shared") / "traces"};
  for (const auto& folder : folders) {
    const auto layer3 = folder / "moby_dick_8k.layer3.safetensors";
    const auto layer6 = folder / "moby_dick_8k.layer6.safetensors";
    if (std::filesystem::exists(layer3) && std::filesystem::exists(layer6)) {
      return {layer3.string(), layer6.string()};
    }
  }
  return {};
}

// The same queries after the prompt's last tokens alone.
void KeepLastPromptTokens(int64_t count, TraceLayer* layer) {
  const int64_t dropped = std::max<int64_t>(0, layer->tokens - layer->queries - count);
  const int64_t bytes = dropped * layer->shape.kv_heads * layer->shape.head_dim *
                        kernels::ElementBytes(layer->shape.element_type);
  for (std::vector<std::byte>* rows : {&layer->keys, &layer->values}) {
    rows->erase(rows->begin(), rows->begin() + bytes);
  }
  layer->tokens -= dropped;
}

absl::StatusOr<ReplayTrace> LoadTrace(const std::vector<std::string>& paths) {
  std::vector<TraceLayer> layers;
  for (const std::string& path : paths) {
    absl::StatusOr<TraceLayer> layer = ReadTraceLayer(path);
    if (!layer.ok()) return layer.status();
    KeepLastPromptTokens(kMaxPromptTokens, &*layer);
    layers.push_back(*std::move(layer));
  }
  return MakeReplayTrace(std::move(layers), paths, kSteps, 2);
}

// The trace with every eleventh channel of K times 16 and of Q divided by 16: full attention is the
// same bit for bit, keys have channels as large as those of larger models.
ReplayTrace WithOutlierChannels(const ReplayTrace& trace) {
  std::vector<TraceLayer> layers = trace.layers;
  const kernels::KvShape& shape = trace.shape();
  const int element = kernels::ElementBytes(shape.element_type);
  const auto scale = [&](std::vector<std::byte>* rows, float factor) {
    const int64_t count = static_cast<int64_t>(rows->size()) / element;
    for (int64_t k = 0; k < count; ++k) {
      if (k % shape.head_dim % 11 != 0) continue;
      std::byte* at = rows->data() + k * element;
      kernels::StoreElement(factor * kernels::LoadElement(at, shape.element_type), at,
                            shape.element_type);
    }
  };
  for (TraceLayer& layer : layers) {
    scale(&layer.keys, 16);
    scale(&layer.q, 1.0f / 16);
    for (size_t k = 0; k < layer.query_rms.size(); ++k) {
      if (k % shape.head_dim % 11 == 0) layer.query_rms[k] /= 16;
    }
  }
  return *MakeReplayTrace(std::move(layers), trace.names, trace.steps, 2);
}

class ReplayTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::vector<std::string> paths = TracePaths();
    if (paths.empty()) return;
    auto trace = LoadTrace(paths);
    ASSERT_TRUE(trace.ok()) << trace.status();
    trace_ = new ReplayTrace(*std::move(trace));
    server_ = ServerProcess::Start(CLUSTERKV_SERVER, {"--arena_bytes=256MiB"}).release();
    ASSERT_NE(server_, nullptr);
    places_ = Connect(*server_).release();
  }
  static void TearDownTestSuite() {
    delete places_;
    delete server_;
    delete trace_;
    places_ = nullptr;
    server_ = nullptr;
    trace_ = nullptr;
  }
  void SetUp() override {
    if (trace_ == nullptr) {
      GTEST_SKIP()
          << "no traces in tests/data or ../shared/traces; set CLUSTERKV_SHARED to test on "
             "the KV of a real model";
    }
    ASSERT_NE(places_, nullptr);
  }

  // The first steps alone, for what does not hang on their number.
  static ReplayTrace FirstSteps(int64_t steps) {
    ReplayTrace few = *trace_;
    few.steps = std::min(steps, few.steps);
    return few;
  }

  static std::unique_ptr<Places> Connect(const ServerProcess& server) {
    PlaceFlags flags;
    flags.server = server.target();
    auto places = Places::Connect(flags, /*session=*/true);
    EXPECT_TRUE(places.ok()) << places.status();
    return places.ok() ? *std::move(places) : nullptr;
  }

  static ReplayResult Run(const ReplayOptions& options, const ReplayTrace& trace = *trace_,
                          Places* places = places_) {
    auto result = Replay(places, trace, options, nullptr);
    EXPECT_TRUE(result.ok()) << result.status();
    if (!result.ok()) {
      ReplayResult failed;
      failed.layers.resize(trace.layers.size());
      for (LayerFigures& layer : failed.layers) layer.output_error = NAN;
      return failed;
    }
    return *std::move(result);
  }

  static ReplayTrace* trace_;
  static ServerProcess* server_;
  static Places* places_;
};
ReplayTrace* ReplayTest::trace_ = nullptr;
ServerProcess* ReplayTest::server_ = nullptr;
Places* ReplayTest::places_ = nullptr;

struct KnownAnswer {
  const char* name;
  ReplayOptions options;
  double error[2];         // of layers 3 and 6
  double recalled[2];      // per step and KV head, LRU of 1,024 tokens
  double recalled_256[2];  // LRU of 256
};

ReplayOptions Preset(const char* preset, int64_t budget) {
  ReplayOptions options;
  options.preset = preset;
  options.budget = budget;
  return options;
}

std::vector<KnownAnswer> KnownAnswers() {
  ReplayOptions four_bits = Preset("default", 64), raw = four_bits, narrow = four_bits;
  four_bits.code_bits = 4;
  four_bits.code_group = 128;
  raw.metric = v1::METRIC_RAW;
  narrow.coded_tokens = 512;
  return {
      {"clusterkv@128", Preset("clusterkv", 128), {.145, .467}, {33, 138}, {119, 223}},
      {"clusterkv@256", Preset("clusterkv", 256), {.108, .350}, {100, 296}, {290, 482}},
      {"clusterkv@1024", Preset("clusterkv", 1024), {.0408, .1465}, {866, 1491}, {1574, 1988}},
      {"recall@128", Preset("recall", 128), {.0730, .1101}, {8.6, 44.3}, {32.3, 68.8}},
      {"recall@256", Preset("recall", 256), {.0584, .0557}, {27.9, 102}, {101, 160}},
      {"recall@1024", Preset("recall", 1024), {.0275, .0190}, {341, 528}, {785, 869}},
      {"default@32", Preset("default", 32), {.0218, .0458}, {2.1, 6.1}, {3.5, 8.4}},
      {"default@64", Preset("default", 64), {.0188, .0352}, {4.3, 17.9}, {11.5, 28.9}},
      {"default@128", Preset("default", 128), {.0176, .0346}, {10.0, 46.0}, {34.4, 70.3}},
      {"default@64, codes=4:128", four_bits, {.0175, .0349}, {4.0, 18.3}, {11.0, 28.9}},
      {"default@64, metric=raw", raw, {.0187, .0388}, {4.4, 17.8}, {11.6, 28.5}},
      {"default@64, W = 512", narrow, {.0518, .1230}, {3.5, 17.2}, {10.0, 28.0}},
  };
}

TEST_F(ReplayTest, EveryKnownAnswerComesOut) {
  if (kSteps != 0) GTEST_SKIP() << "known answers are means over all steps: see the release preset";
  for (KnownAnswer known : KnownAnswers()) {
    SCOPED_TRACE(known.name);
    const double tolerance = known.options.preset == "clusterkv" ? 0.15 : 0.05;
    for (const int64_t hot_tokens : {1024, 256}) {
      known.options.hot_tokens = hot_tokens;
      const double* recalled = hot_tokens == 1024 ? known.recalled : known.recalled_256;
      const ReplayResult result = Run(known.options);
      for (int l = 0; l < 2; ++l) {
        const LayerFigures& layer = result.layers[l];
        EXPECT_FALSE(!(std::fabs(layer.output_error / known.error[l] - 1) <= tolerance))
            << "layer " << l << ": error " << layer.output_error << ", known " << known.error[l];
        EXPECT_FALSE(
            !(std::fabs(layer.recalled_tokens_per_step - recalled[l]) <= 0.10 * recalled[l] + 1))
            << "layer " << l << ", hot cache of " << hot_tokens << ": recalled "
            << layer.recalled_tokens_per_step << ", known " << recalled[l];
      }
      if (hot_tokens == 1024) {
        std::printf("%-24s error %.4f %.4f, recalled %.1f %.1f, mass %.3f %.3f\n", known.name,
                    result.layers[0].output_error, result.layers[1].output_error,
                    result.layers[0].recalled_tokens_per_step,
                    result.layers[1].recalled_tokens_per_step, result.layers[0].mass,
                    result.layers[1].mass);
      }
    }
  }
}

TEST_F(ReplayTest, DefaultAt64HasAtMostHalfOfPublishedClusterKvsErrorAt1024) {
  if (kSteps != 0) GTEST_SKIP() << "known answers are means over all steps: see the release preset";
  const ReplayResult published = Run(Preset("clusterkv", 1024));
  const ReplayResult ours = Run(Preset("default", 64));
  const double masses[2][2] = {{.944, .907}, {.877, .878}};
  for (int l = 0; l < 2; ++l) {
    EXPECT_FALSE(!(ours.layers[l].output_error <= 0.5 * published.layers[l].output_error)) << l;
    EXPECT_FALSE(!(std::fabs(published.layers[l].mass - masses[0][l]) <= 0.02)) << l;
    EXPECT_FALSE(!(std::fabs(ours.layers[l].mass - masses[1][l]) <= 0.02)) << l;
  }
}

TEST_F(ReplayTest, AllTokensExactIsFullAttention) {
  for (const v1::ElementType type : {v1::ELEMENT_TYPE_FLOAT16, v1::ELEMENT_TYPE_FLOAT32}) {
    for (const char* preset : {"clusterkv", "recall", "default"}) {
      ReplayOptions options = Preset(preset, 1 << 20);
      options.state_type = type;
      options.hot_tokens = 8192;
      for (const LayerFigures& layer : Run(options, FirstSteps(24)).layers) {
        EXPECT_FALSE(!(layer.output_error <= 1e-3)) << preset << " layer " << layer.layer;
        EXPECT_FALSE(!(std::fabs(layer.mass - 1) <= 1e-3)) << preset << " layer " << layer.layer;
      }
    }
  }
}

TEST_F(ReplayTest, TheStatesElementTypeDoesNotShowInTheError) {
  ReplayOptions options = Preset("default", 64);
  const ReplayResult half = Run(options);
  options.state_type = v1::ELEMENT_TYPE_FLOAT32;
  const ReplayResult full = Run(options);
  for (int l = 0; l < 2; ++l) {
    EXPECT_FALSE(
        !(std::fabs(full.layers[l].output_error / half.layers[l].output_error - 1) <= 1e-3));
    EXPECT_EQ(full.layers[l].selection_digest, half.layers[l].selection_digest);
  }
}

TEST_F(ReplayTest, OutlierChannelsDoNotChangeTheError) {
  const ReplayTrace outliers = WithOutlierChannels(*trace_);
  EXPECT_EQ(outliers.full[0].output, trace_->full[0].output);
  const ReplayResult plain = Run(Preset("default", 64));
  const ReplayResult scaled = Run(Preset("default", 64), outliers);
  for (int l = 0; l < 2; ++l) {
    const double ratio = scaled.layers[l].output_error / plain.layers[l].output_error;
    EXPECT_FALSE(!(std::fabs(ratio - 1) <= 0.01)) << "layer " << l << ": " << ratio;
  }
}

TEST_F(ReplayTest, CodecsChangeTheRecordsAndNothingElse) {
  for (const auto& [preset, budget] :
       {std::pair("default", 64), {"recall", 128}, {"clusterkv", 1024}}) {
    SCOPED_TRACE(preset);
    ReplayOptions options = Preset(preset, budget);
    const ReplayResult raw = Run(options);
    options.codec = "k8v4";
    const ReplayResult coded = Run(options);
    EXPECT_LE(coded.record_bytes, 208);
    for (int l = 0; l < 2; ++l) {
      const LayerFigures& a = raw.layers[l];
      const LayerFigures& b = coded.layers[l];
      EXPECT_EQ(b.index_digest, a.index_digest);
      EXPECT_EQ(b.selection_digest, a.selection_digest);
      EXPECT_EQ(b.state_digest, a.state_digest);
      EXPECT_NE(b.recalled_digest, a.recalled_digest);
      EXPECT_EQ(b.recalled_tokens_per_step, a.recalled_tokens_per_step);
      EXPECT_LE(b.recalled_bytes_per_step, 208 * b.recalled_tokens_per_step + 1e-6);
      EXPECT_EQ(a.correction_bytes_per_step, 0);
      EXPECT_EQ(b.correction_bytes_per_step, b.state_bytes_per_step - a.state_bytes_per_step);
      EXPECT_LE(b.recalled_bytes_per_step + b.state_bytes_per_step,
                a.recalled_bytes_per_step + a.state_bytes_per_step);
      // Layer 6 copies single tokens, which show their values' rounding whole: without corrections
      // its error would double.
      EXPECT_FALSE(!(b.output_error <= 1.1 * a.output_error))
          << "layer " << l << ": " << b.output_error << " under k8v4, " << a.output_error;
      std::printf(
          "%s layer %d: error %.5f raw, %.5f k8v4; bytes %.0f + %.0f raw, %.0f + %.0f k8v4\n",
          preset, l, a.output_error, b.output_error, a.recalled_bytes_per_step,
          a.state_bytes_per_step, b.recalled_bytes_per_step, b.state_bytes_per_step);
    }
  }
}

void ExpectSameBits(const ReplayResult& a, const ReplayResult& b) {
  for (size_t l = 0; l < a.layers.size(); ++l) {
    SCOPED_TRACE("layer " + std::to_string(l));
    EXPECT_EQ(a.layers[l].index_digest, b.layers[l].index_digest);
    EXPECT_EQ(a.layers[l].selection_digest, b.layers[l].selection_digest);
    EXPECT_EQ(a.layers[l].state_digest, b.layers[l].state_digest);
    EXPECT_EQ(a.layers[l].correction_digest, b.layers[l].correction_digest);
    EXPECT_EQ(a.layers[l].recalled_digest, b.layers[l].recalled_digest);
    EXPECT_EQ(a.layers[l].output_error, b.layers[l].output_error);
  }
}

TEST_F(ReplayTest, RunsAndThreadCountsGiveTheSameBits) {
  std::vector<std::pair<const char*, const char*>> settings = {{"clusterkv", "raw"},
                                                               {"default", "k8v4"}};
  if (kSteps == 0) {
    settings.insert(settings.end(), {{"recall", "raw"}, {"default", "raw"}, {"clusterkv", "k8v4"}});
  }
  for (const auto& [preset, codec] : settings) {
    SCOPED_TRACE(testing::Message() << preset << " " << codec);
    ReplayOptions options = Preset(preset, 128);
    options.codec = codec;
    const ReplayTrace few = FirstSteps(64);
    const ReplayResult first = Run(options, few);
    ExpectSameBits(first, Run(options, few));
    for (const char* threads : {"1", "2"}) {
      const auto server = ServerProcess::Start(
          CLUSTERKV_SERVER, {"--arena_bytes=128MiB", std::string("--build_threads=") + threads,
                             std::string("--select_threads=") + threads});
      ASSERT_NE(server, nullptr);
      const auto places = Connect(*server);
      ASSERT_NE(places, nullptr);
      ExpectSameBits(first, Run(options, few, places.get()));
    }
  }
}

TEST_F(ReplayTest, AServerInThisProcessGivesTheSameBitsAsOneOverTheWire) {
  const auto line =
      cache_service::ParseCommandLine({"--listen=127.0.0.1:0", "--admin_listen=127.0.0.1:0",
                                       "--metrics_listen=", "--arena_bytes=128MiB"});
  ASSERT_TRUE(line.ok()) << line.status();
  const auto config = cache_service::ResolveConfig(line->message, line->places);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto server = cache_service::Server::Start(*config);
  ASSERT_TRUE(server.ok()) << server.status();
  const auto client = Client::Connect((*server)->InProcessChannel());
  ASSERT_TRUE(client.ok()) << client.status();
  Places places(client->get());
  ReplayOptions options = Preset("default", 64);
  const ReplayTrace few = FirstSteps(64);
  for (const char* codec : {"raw", "k8v4"}) {
    options.codec = codec;
    ExpectSameBits(Run(options, few), Run(options, few, &places));
  }
}

TEST_F(ReplayTest, ClusteredWindowsStayNearFullAttention) {
  ReplayOptions options = Preset("default", 64);
  options.window_tokens = kWindowTokens;
  const ReplayResult windows = Run(options);
  const ReplayResult none = Run(Preset("default", 64));
  for (int l = 0; l < 2; ++l) {
    // Decoded tokens are answered from codes too then: a little more error, and less is held.
    EXPECT_FALSE(!(windows.layers[l].output_error <= 2 * none.layers[l].output_error)) << l;
    EXPECT_LT(windows.layers[l].held_fraction, none.layers[l].held_fraction);
    EXPECT_LE(windows.layers[l].mass, 1.0001);
  }
}

// Their values' remainders are kept and answered, too.
TEST_F(ReplayTest, ClusteredWindowsAreAsNearUnderACoarseCodec) {
  ReplayOptions options = Preset("default", 64);
  options.window_tokens = kWindowTokens;
  const ReplayResult raw = Run(options);
  options.codec = "k8v4";
  const ReplayResult coded = Run(options);
  for (int l = 0; l < 2; ++l) {
    EXPECT_FALSE(!(coded.layers[l].output_error <= 1.1 * raw.layers[l].output_error)) << l;
    EXPECT_EQ(coded.layers[l].selection_digest, raw.layers[l].selection_digest);
    EXPECT_EQ(coded.layers[l].state_digest, raw.layers[l].state_digest);
  }
}

TEST_F(ReplayTest, EveryHotCachePolicyAnswersTheSame) {
  ReplayOptions options = Preset("recall", 128);
  options.codec = "k8v4";  // corrections are of what is hit and of what is missed alike
  const ReplayResult token_lru = Run(options);
  for (const auto policy : {v1::HOT_CACHE_POLICY_CLUSTER_LRU, v1::HOT_CACHE_POLICY_LAST_STEPS}) {
    options.hot_policy = policy;
    const ReplayResult other = Run(options);
    for (int l = 0; l < 2; ++l) {
      EXPECT_EQ(other.layers[l].selection_digest, token_lru.layers[l].selection_digest);
      EXPECT_EQ(other.layers[l].output_error, token_lru.layers[l].output_error) << policy;
      EXPECT_GT(other.layers[l].hit_rate, 0);
    }
  }
  options.hot_tokens = 0;
  for (const LayerFigures& layer : Run(options).layers) {
    EXPECT_EQ(layer.hit_rate, 0);
    EXPECT_EQ(layer.recalled_tokens_per_step, layer.exact_tokens_per_step);
  }
}

TEST_F(ReplayTest, TheServersMemoryStaysWithinItsArenaAndATenth) {
  if (kSteps != 0) GTEST_SKIP() << "a sanitizer's shadow memory is not the server's";
  Run(Preset("clusterkv", 1024), FirstSteps(64));
  const std::string status = ReadFile("/proc/" + std::to_string(server_->pid()) + "/status");
  const size_t at = status.find("VmHWM:");
  ASSERT_NE(at, status.npos);
  const int64_t peak_kib = std::atoll(status.c_str() + at + 6);
  EXPECT_GT(peak_kib, 0);
  EXPECT_LE(peak_kib, static_cast<int64_t>(256 * 1024 * 1.1) + 128 * 1024);
}

TEST_F(ReplayTest, NothingIsLeftBehind) {
  Run(Preset("default", 64));
  const auto left = places_->ListSequences("");
  ASSERT_TRUE(left.ok()) << left.status();
  EXPECT_TRUE(left->empty());
  AdminFlags flags;
  flags.admin = server_->admin();
  auto admin = AdminClient::Connect(flags);
  ASSERT_TRUE(admin.ok()) << admin.status();
  const auto ledger = (*admin)->VerifyLedger(/*checksums=*/true);
  ASSERT_TRUE(ledger.ok()) << ledger.status();
  EXPECT_TRUE(ledger->balanced()) << ledger->DebugString();
  EXPECT_EQ(ledger->recorded().free(), ledger->recorded().total());
}

}  // namespace
}  // namespace clusterkv::worker::ckv
