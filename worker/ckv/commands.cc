#include <cstdio>

#include "worker/ckv/command.h"
#include "worker/ckv/exit_code.h"
#include "worker/ckv/terminal.h"

#ifndef CLUSTERKV_VERSION
#error "CLUSTERKV_VERSION is defined by the build"
#endif

namespace clusterkv::worker::ckv {

const std::vector<CommandEntry>& Commands() {
  static const auto* commands = new std::vector<CommandEntry>{
      {"status", "what a server is and how full it is",
       "ckv status --server=127.0.0.1:7400 --admin=127.0.0.1:7401", MakeStatusCommand},
      {"sequences", "what a server holds", "ckv sequences --prefix=chat- --json=sequences.json",
       MakeSequencesCommand},
      {"top", "watch a server live; q quits", "ckv top --admin=127.0.0.1:7401", MakeTopCommand},
      {"seed", "put sequences in, to try things on",
       "ckv seed --sequences=4 --tokens=4096 --prefix=demo\n"
       "  ghz --insecure --call clusterkv.v1.CacheService/SelectClusters \\\n"
       "    -d \"$(ckv seed --replace --print_query)\" 127.0.0.1:7400",
       MakeSeedCommand},
      {"replay", "decode a trace through a server and compare with full attention",
       "ckv replay --preset=default --budget=64 --json=replay.json layer3.safetensors "
       "layer6.safetensors\n"
       "  ckv replay --compare --svg=replay.svg layer3.safetensors layer6.safetensors",
       MakeReplayCommand},
      {"inspect", "the clusters of a sequence's layer",
       "ckv inspect --sequence=demo-0 --layer=1 --svg=clusters.svg", MakeInspectCommand},
      {"selftest", "check that a server keeps its promises",
       "ckv selftest --server=127.0.0.1:7400 --admin=127.0.0.1:7401", MakeSelftestCommand},
      {"bench", "load a server and show its latencies, as ghz does",
       "ckv bench --sequences='demo-*' --rps=500 --duration=10s --concurrency=16",
       MakeBenchCommand},
      {"drain", "tell a server to take no new work", "ckv drain --admin=127.0.0.1:7401",
       MakeDrainCommand},
      {"completion", "shell completion: bash or zsh", "source <(ckv completion bash)",
       MakeCompletionCommand},
      {"help", "explain ckv or one of its commands", "ckv help replay", MakeHelpCommand},
  };
  return *commands;
}

const CommandEntry* FindCommand(std::string_view name) {
  for (const CommandEntry& entry : Commands()) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

std::string HelpOf(const CommandEntry& entry) {
  FlagSet flags;
  const auto command = entry.make();
  command->Register(flags);
  const std::string name(entry.name);
  return "ckv " + name + ": " + std::string(entry.summary) + "\n\nusage: ckv " + name + " " +
         flags.SynopsisText() + "\n\n" + flags.HelpText() + "\nexample\n  " +
         std::string(entry.examples) + "\n";
}

namespace {

absl::Status RunCommand(const CommandEntry& entry, const std::vector<std::string>& arguments) {
  FlagSet flags;
  const auto command = entry.make();
  command->Register(flags);
  if (absl::Status status = flags.Parse(arguments); !status.ok()) return status;
  return command->Run();
}

int Fail(const std::string& context, const absl::Status& status) {
  std::fprintf(stderr, "%s %s\n", Colored(context + ":", Color::kRed, 2).c_str(),
               DescribeError(status).c_str());
  if (ExitCodeOf(status) == kExitUsage) {
    std::fprintf(stderr, "  see: %s\n",
                 context == "ckv" ? "ckv help" : ("ckv help" + context.substr(3)).c_str());
  }
  return ExitCodeOf(status);
}

}  // namespace

int RunCkv(const std::vector<std::string>& arguments) {
  if (arguments.empty()) return Fail("ckv", UsageError("which command?"));
  const std::string& name = arguments[0];
  if (name == "--version" || name == "version") {
    std::printf("ckv %s\n", CLUSTERKV_VERSION);
    return kExitOk;
  }
  if (name == "--help" || name == "-h") return RunCkv({"help"});
  const CommandEntry* entry = FindCommand(name);
  if (entry == nullptr) {
    std::vector<std::string> names;
    for (const CommandEntry& known : Commands()) names.emplace_back(known.name);
    const std::string nearest = Nearest(name, names);
    return Fail("ckv", UsageError("unknown command \"" + name + "\"" +
                                  (nearest.empty() ? "" : "; did you mean " + nearest + "?")));
  }
  const std::vector<std::string> rest(arguments.begin() + 1, arguments.end());
  for (const std::string& argument : rest) {
    if (argument == "--help" || argument == "-h") return RunCkv({"help", name});
    if (argument == "--") break;
  }
  const absl::Status status = RunCommand(*entry, rest);
  return status.ok() ? kExitOk : Fail("ckv " + name, status);
}

}  // namespace clusterkv::worker::ckv
