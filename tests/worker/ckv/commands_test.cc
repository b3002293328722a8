// The program itself, run as people and tools run it: words in, words, files and exit codes out.
#include <gmock/gmock.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "clusterkv/v1/admin_service.grpc.pb.h"
#include "clusterkv/v1/cache_service.grpc.pb.h"
#include "tests/free_port.h"
#include "tests/worker/ckv/processes.h"
#include "tests/worker/ckv/well_formed.h"
#include "worker/ckv/synthetic.h"

namespace clusterkv::worker::ckv {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

ProgramResult Ckv(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), CLUSTERKV_CKV);
  return RunProgram(arguments);
}

class CommandsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    server_ = ServerProcess::Start(CLUSTERKV_SERVER, {"--arena_bytes=64MiB"}).release();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void SetUp() override { ASSERT_NE(server_, nullptr); }

  std::string Server() const { return "--server=" + server_->target(); }
  std::string Admin() const { return "--admin=" + server_->admin(); }

  // Two layers of made-up KV in files.
  std::vector<std::string> WriteTraces() {
    std::vector<std::string> paths;
    for (int l = 0; l < 2; ++l) {
      paths.push_back(folder_.Path("layer" + std::to_string(l) + ".safetensors"));
      const TraceLayer layer =
          MakeSyntheticLayer({2, 4, 64, kernels::ElementType::kBFloat16}, 700, 12, 50 + l);
      EXPECT_TRUE(WriteTraceLayer(layer, paths.back()).ok());
    }
    return paths;
  }

  static ServerProcess* server_;
  TemporaryFolder folder_;
};
ServerProcess* CommandsTest::server_ = nullptr;

TEST_F(CommandsTest, HelpVersionAndCompletionNeedNoServer) {
  EXPECT_THAT(Ckv({"--version"}).out, HasSubstr("ckv "));
  const ProgramResult help = Ckv({"help"});
  EXPECT_EQ(help.exit_code, 0);
  for (const char* command : {"status", "sequences", "top", "seed", "replay", "inspect", "selftest",
                              "bench", "drain", "completion", "help"}) {
    EXPECT_THAT(help.out, HasSubstr(command));
    const ProgramResult one = Ckv({"help", command});
    EXPECT_EQ(one.exit_code, 0) << command;
    EXPECT_THAT(one.out, HasSubstr(std::string("usage: ckv ") + command));
    EXPECT_EQ(Ckv({command, "--help"}).out, one.out);
  }
  for (const char* shell : {"bash", "zsh"}) {
    const ProgramResult completion = Ckv({"completion", shell});
    EXPECT_EQ(completion.exit_code, 0);
    EXPECT_THAT(completion.out, HasSubstr("--preset=clusterkv"));
  }
}

TEST_F(CommandsTest, BashTakesTheCompletionAndItCompletes) {
  const std::string script =
      "set -eu; PATH=/nowhere; COMP_LINE='ckv sta'; COMP_POINT=7; COMP_CWORD=1; "
      "COMP_WORDS=(ckv sta); compopt() { :; }; source \"$1\"; _ckv; echo \"${COMPREPLY[0]}\"; "
      "COMP_LINE='ckv replay --pre'; COMP_POINT=16; COMP_CWORD=2; COMP_WORDS=(ckv replay --pre); "
      "_ckv; echo \"${COMPREPLY[*]}\"";
  const ProgramResult completion = Ckv({"completion", "bash"});
  const std::string path = folder_.Path("completion");
  std::FILE* file = std::fopen(path.c_str(), "w");
  std::fputs(completion.out.c_str(), file);
  std::fclose(file);
  const ProgramResult result = RunProgram({"/bin/bash", "-c", script, "bash", path});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.out, "status\n--preset=clusterkv --preset=recall --preset=default\n");
}

TEST_F(CommandsTest, WrongUsageEndsWith2AndNamesWhatWasMeant) {
  EXPECT_EQ(Ckv({}).exit_code, 2);
  const ProgramResult command = Ckv({"replya"});
  EXPECT_EQ(command.exit_code, 2);
  EXPECT_THAT(command.err, HasSubstr("did you mean replay?"));
  const ProgramResult flag = Ckv({"replay", "--bugdet=3", "x"});
  EXPECT_EQ(flag.exit_code, 2);
  EXPECT_THAT(flag.err, HasSubstr("did you mean --budget?"));
  EXPECT_EQ(Ckv({"replay"}).exit_code, 2);
  EXPECT_EQ(Ckv({"replay", "--codes=5:1", "x"}).exit_code, 2);
  EXPECT_EQ(Ckv({"inspect"}).exit_code, 2);
  EXPECT_THAT(flag.err, Not(HasSubstr("\x1b")));  // no colours off a terminal
}

TEST_F(CommandsTest, NoServerEndsWith3) {
  const std::string nowhere = "127.0.0.1:" + std::to_string(FreePort());
  for (const char* command : {"status", "sequences", "selftest"}) {
    const ProgramResult result = Ckv({command, "--server=" + nowhere, "--connect_timeout=200ms"});
    EXPECT_EQ(result.exit_code, 3) << command;
    EXPECT_THAT(result.err, HasSubstr("cannot connect to " + nowhere));
  }
}

TEST_F(CommandsTest, StatusSaysWhatTheServerIs) {
  const std::string path = folder_.Path("status.json");
  const ProgramResult result = Ckv({"status", Server(), Admin(), "--json=" + path});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("serving"));
  const auto json = nlohmann::json::parse(ReadFile(path));
  EXPECT_EQ(json["arena_bytes"], 64 << 20);
  EXPECT_THAT(json["presets"].get<std::vector<std::string>>(), ::testing::Contains("default"));
  EXPECT_THAT(json["codecs"].get<std::vector<std::string>>(), ::testing::Contains("k8v4"));
  const auto& pages = json["stats"]["pages"];
  EXPECT_EQ(pages["total"].get<uint64_t>(),
            pages["free"].get<uint64_t>() + pages["filling"].get<uint64_t>() +
                pages["ready"].get<uint64_t>() + pages["recalling"].get<uint64_t>() +
                pages["quarantined"].get<uint64_t>());
}

TEST_F(CommandsTest, SeedPutsSequencesInAndSequencesLists) {
  const ProgramResult seeded =
      Ckv({"seed", Server(), "--sequences=3", "--tokens=300", "--prefix=list"});
  ASSERT_EQ(seeded.exit_code, 0) << seeded.err;
  const ProgramResult listed = Ckv({"sequences", Server(), "--prefix=list-", "--json=-"});
  ASSERT_EQ(listed.exit_code, 0) << listed.err;
  const auto rows = nlohmann::json::parse(listed.out)["sequences"];
  ASSERT_EQ(rows.size(), 3u);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(rows[i]["name"], "list-" + std::to_string(i));
    EXPECT_EQ(rows[i]["state"], "READY");
    EXPECT_EQ(rows[i]["tokens"], 300);
    EXPECT_EQ(rows[i]["layers"], 2);
    EXPECT_GT(rows[i]["bytes"], 0);
  }
  const ProgramResult again = Ckv({"seed", Server(), "--tokens=300", "--prefix=list"});
  EXPECT_EQ(again.exit_code, 1);
  EXPECT_THAT(again.err, HasSubstr("SEQUENCE_EXISTS"));
  EXPECT_THAT(again.err, HasSubstr("--replace"));
  EXPECT_EQ(Ckv({"seed", Server(), "--tokens=300", "--prefix=list", "--replace"}).exit_code, 0);
}

TEST_F(CommandsTest, ThePrintedQueryIsOneLineOfJsonForTheFirstSequence) {
  const ProgramResult result =
      Ckv({"seed", Server(), "--tokens=200", "--prefix=query", "--print_query"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(std::count(result.out.begin(), result.out.end(), '\n'), 1);
  const auto query = nlohmann::json::parse(result.out);
  EXPECT_EQ(query["sequence"], "query-0");
  EXPECT_EQ(query["queries"]["values"].size(), 4u * 64u);
  EXPECT_LT(result.out.size(), 4096u);
  // As ghz does it: JSON to the request by the message's own mapping, then the call.
  v1::SelectClustersRequest request;
  ASSERT_TRUE(google::protobuf::util::JsonStringToMessage(result.out, &request).ok());
  const auto stub = v1::CacheService::NewStub(
      grpc::CreateChannel(server_->target(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::SelectClustersResponse response;
  const grpc::Status status = stub->SelectClusters(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.results_size(), 1);
  ASSERT_EQ(response.results(0).heads_size(), 2);
  EXPECT_EQ(response.results(0).heads(0).exact_positions_size(), 48);
  EXPECT_FALSE(response.results(0).state().output().empty());
}

TEST_F(CommandsTest, SelftestPasses) {
  const ProgramResult result = Ckv({"selftest", Server(), Admin()});
  EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, Not(HasSubstr("FAIL")));
  EXPECT_THAT(result.out, HasSubstr("PASS"));
}

TEST_F(CommandsTest, ReplayWritesTheKeysThatToolsRead) {
  const std::string json_path = folder_.Path("replay.json"), svg_path = folder_.Path("replay.svg");
  std::vector<std::string> arguments = {"replay",           Server(),    "--preset=default",
                                        "--budget=64",      "--steps=8", "--json=" + json_path,
                                        "--svg=" + svg_path};
  for (const std::string& path : WriteTraces()) arguments.push_back(path);
  const ProgramResult result = Ckv(arguments);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("default@64"));
  const auto layers = nlohmann::json::parse(ReadFile(json_path))["layers"];
  ASSERT_EQ(layers.size(), 2u);
  for (int l = 0; l < 2; ++l) {
    const auto& layer = layers[l];
    EXPECT_EQ(layer.size(), 20u);
    EXPECT_EQ(layer["layer"], l);
    EXPECT_EQ(layer["preset"], "default");
    EXPECT_EQ(layer["budget"], 64);
    EXPECT_EQ(layer["codec"], "raw");
    for (const char* key :
         {"mass", "output_error", "exact_tokens_per_step", "recalled_tokens_per_step",
          "recalled_bytes_per_step", "state_bytes_per_step", "correction_bytes_per_step",
          "hit_rate", "held_fraction"}) {
      EXPECT_TRUE(layer[key].is_number()) << key;
    }
    for (const char* key : {"select_us", "recall_us"}) {
      EXPECT_GE(layer[key]["p99"], layer[key]["p50"]) << key;
    }
    for (const char* key : {"index_digest", "selection_digest", "state_digest", "correction_digest",
                            "recalled_digest"}) {
      EXPECT_THAT(layer[key].get<std::string>(), ::testing::MatchesRegex("[0-9a-f]{16}")) << key;
    }
    EXPECT_EQ(layer["exact_tokens_per_step"], 48);
  }
  EXPECT_EQ(WellFormedError(ReadFile(svg_path)), "");
}

TEST_F(CommandsTest, CompareSetsThePresetsBesideFullAttention) {
  const std::string json_path = folder_.Path("compare.json"), svg_path = folder_.Path("c.svg");
  std::vector<std::string> arguments = {
      "replay", Server(), "--compare", "--steps=4", "--json=" + json_path, "--svg=" + svg_path};
  for (const std::string& path : WriteTraces()) arguments.push_back(path);
  const ProgramResult result = Ckv(arguments);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const char* method : {"clusterkv@1024", "recall@128", "default@64", "full attention"}) {
    EXPECT_THAT(result.out, HasSubstr(std::string("| ") + method));
  }
  EXPECT_EQ(nlohmann::json::parse(ReadFile(json_path))["layers"].size(), 8u);
  const std::string svg = ReadFile(svg_path);
  EXPECT_EQ(WellFormedError(svg), "");
  EXPECT_THAT(svg, HasSubstr("default@64"));
}

TEST_F(CommandsTest, ReplayTellsWhatIsWrongAndLeavesNothing) {
  const std::vector<std::string> traces = WriteTraces();
  const ProgramResult zero = Ckv({"replay", Server(), "--budget=0", traces[0]});
  EXPECT_EQ(zero.exit_code, 1);
  EXPECT_THAT(zero.err, HasSubstr("BUDGET_ZERO"));
  const ProgramResult missing = Ckv({"replay", Server(), folder_.Path("none.safetensors")});
  EXPECT_EQ(missing.exit_code, 1);
  EXPECT_THAT(missing.err, HasSubstr("none.safetensors"));
  const ProgramResult left = Ckv({"sequences", Server(), "--prefix=ckv-replay", "--json=-"});
  EXPECT_TRUE(nlohmann::json::parse(left.out)["sequences"].empty());
}

TEST_F(CommandsTest, InspectShowsClustersAndDrawsThem) {
  ASSERT_EQ(Ckv({"seed", Server(), "--tokens=640", "--prefix=look"}).exit_code, 0);
  const std::string path = folder_.Path("clusters.svg");
  const ProgramResult result =
      Ckv({"inspect", Server(), "--sequence=look-0", "--layer=1", "--svg=" + path});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("clusters by size"));
  EXPECT_EQ(WellFormedError(ReadFile(path)), "");
  const ProgramResult layer = Ckv({"inspect", Server(), "--sequence=look-0", "--layer=9"});
  EXPECT_EQ(layer.exit_code, 1);
  EXPECT_THAT(layer.err, HasSubstr("LAYER_OUT_OF_RANGE"));
  const ProgramResult unknown = Ckv({"inspect", Server(), "--sequence=nobody"});
  EXPECT_EQ(unknown.exit_code, 1);
  EXPECT_THAT(unknown.err, HasSubstr("SEQUENCE_NOT_FOUND"));
}

TEST_F(CommandsTest, BenchLoadsEveryMethodWithoutErrors) {
  ASSERT_EQ(Ckv({"seed", Server(), "--sequences=2", "--tokens=512", "--prefix=load"}).exit_code, 0);
  for (const char* method : {"select", "select_and_recall", "put"}) {
    const std::string path = folder_.Path("bench.json");
    const ProgramResult result =
        Ckv({"bench", Server(), "--sequences=load-*", std::string("--method=") + method, "--rps=50",
             "--duration=400ms", "--concurrency=3", "--json=" + path});
    ASSERT_EQ(result.exit_code, 0) << method << result.out << result.err;
    EXPECT_THAT(result.out, HasSubstr("Latency distribution:"));
    const auto json = nlohmann::json::parse(ReadFile(path));
    EXPECT_EQ(json["count"], 20) << method;
    EXPECT_EQ(json["statusCodeDistribution"]["OK"], 20) << method;
  }
  EXPECT_EQ(Ckv({"bench", Server(), "--sequences=nobody"}).exit_code, 1);
}

TEST_F(CommandsTest, TopOffATerminalShowsOneLook) {
  const ProgramResult result = Ckv({"top", Server(), Admin(), "--interval=100ms"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("arena"));
  EXPECT_THAT(result.out, Not(HasSubstr("\x1b")));
}

// Three shards that know each other.
class ShardsCommandsTest : public ::testing::Test {
 protected:
  static constexpr int kShards = 3;

  void SetUp() override {
    std::string list;
    for (int i = 0; i < kShards; ++i) list += "kv-" + std::to_string(i) + " 127.0.0.1:1\n";
    WriteList(list);
    list.clear();
    for (int i = 0; i < kShards; ++i) {
      const std::string name = "kv-" + std::to_string(i);
      servers_.push_back(ServerProcess::Start(
          CLUSTERKV_SERVER, {"--arena_bytes=64MiB", "--build_threads=1", "--select_threads=1",
                             "--shards_file=" + Path(), "--shard_name=" + name}));
      ASSERT_NE(servers_.back(), nullptr);
      list += name + " " + servers_.back()->target() + "\n";
    }
    WriteList(list);  // servers read it when it has changed
  }

  std::string Path() const { return folder_.Path("shards"); }
  void WriteList(const std::string& list) const {
    std::ofstream(Path() + ".new") << list;
    std::filesystem::rename(Path() + ".new", Path());
  }
  // Any shard tells the others.
  std::string Servers() const { return "--servers=" + servers_[1]->target(); }
  // The names of those that begin so, on one server alone.
  std::set<std::string> Held(int i, const std::string& prefix) const {
    const auto channel =
        grpc::CreateChannel(servers_[i]->target(), grpc::InsecureChannelCredentials());
    grpc::ClientContext context;
    v1::ListSequencesRequest request;
    request.set_prefix(prefix);
    v1::ListSequencesResponse response;
    EXPECT_TRUE(
        v1::CacheService::NewStub(channel)->ListSequences(&context, request, &response).ok());
    std::set<std::string> names;
    for (const v1::Sequence& sequence : response.sequences()) {
      names.insert(sequence.handle().name());
    }
    return names;
  }

  TemporaryFolder folder_;
  std::vector<std::unique_ptr<ServerProcess>> servers_;
};

TEST_F(ShardsCommandsTest, SelftestChecksEachShardAndAllTogether) {
  const ProgramResult result = Ckv({"selftest", Servers()});
  EXPECT_EQ(result.exit_code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, Not(HasSubstr("FAIL")));
  for (int i = 0; i < kShards; ++i) {
    EXPECT_THAT(result.out, HasSubstr("kv-" + std::to_string(i) + " at " + servers_[i]->target()));
    EXPECT_THAT(result.out, HasSubstr("kv-" + std::to_string(i) + " gets the sequences"));
    EXPECT_THAT(Held(i, ""), ::testing::IsEmpty());
  }
  EXPECT_EQ(Ckv({"selftest", Servers(), "--admin=" + servers_[0]->admin()}).exit_code, 2);
}

TEST_F(ShardsCommandsTest, BenchDrivesAllShards) {
  constexpr int kSequences = 12;
  ASSERT_EQ(Ckv({"seed", Servers(), "--sequences=" + std::to_string(kSequences), "--tokens=256",
                 "--layers=1", "--prefix=load"})
                .exit_code,
            0);
  size_t held = 0;
  for (int i = 0; i < kShards; ++i) {
    const std::set<std::string> names = Held(i, "load-");
    EXPECT_THAT(names, Not(::testing::IsEmpty())) << i;  // by their names: the same in every run
    held += names.size();
  }
  EXPECT_EQ(held, kSequences);
  for (const char* method : {"select", "select_and_recall", "put"}) {
    const std::string path = folder_.Path("bench.json");
    const ProgramResult result =
        Ckv({"bench", Servers(), "--sequences=load-*", std::string("--method=") + method,
             "--rps=100", "--duration=400ms", "--concurrency=6", "--connections=2", "--items=2",
             "--tokens=64", "--json=" + path});
    ASSERT_EQ(result.exit_code, 0) << method << result.out << result.err;
    const auto json = nlohmann::json::parse(ReadFile(path));
    EXPECT_EQ(json["count"], 40) << method;
    EXPECT_EQ(json["statusCodeDistribution"]["OK"], 40) << method;
  }
  // What was counted was asked of every one of them.
  for (int i = 0; i < kShards; ++i) {
    const auto channel =
        grpc::CreateChannel(servers_[i]->admin(), grpc::InsecureChannelCredentials());
    grpc::ClientContext context;
    v1::Stats stats;
    ASSERT_TRUE(
        v1::AdminService::NewStub(channel)->GetStats(&context, v1::GetStatsRequest(), &stats).ok());
    EXPECT_GT(stats.selects(), 0u) << i;
  }
  EXPECT_EQ(Ckv({"bench", Servers(), "--sequences=nobody"}).exit_code, 1);
}

TEST(DrainTest, ADrainedServerRefusesSequencesAndEndsWith0) {
  const auto server = ServerProcess::Start(CLUSTERKV_SERVER, {"--arena_bytes=32MiB"});
  ASSERT_NE(server, nullptr);
  const ProgramResult drained = Ckv({"drain", "--admin=" + server->admin()});
  EXPECT_EQ(drained.exit_code, 0) << drained.err;
  const ProgramResult refused = Ckv({"seed", "--server=" + server->target(), "--tokens=64"});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, HasSubstr("DRAINING"));
  EXPECT_EQ(server->Terminate(), 0);
}

}  // namespace
}  // namespace clusterkv::worker::ckv
