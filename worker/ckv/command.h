// One command of ckv: its flags and what it does. The table of all commands is in commands.cc; a
// new one is a file of its own and one line there.
#ifndef CLUSTERKV_WORKER_CKV_COMMAND_H_
#define CLUSTERKV_WORKER_CKV_COMMAND_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "worker/ckv/flags.h"

namespace clusterkv::worker::ckv {

class Command {
 public:
  virtual ~Command() = default;
  // Binds the command's flags to its members. Called once, before Run.
  virtual void Register(FlagSet& flags) = 0;
  // Errors: end the program; exit_code.h tells with which code.
  virtual absl::Status Run() = 0;
};

struct CommandEntry {
  std::string_view name;
  std::string_view summary;   // one line
  std::string_view examples;  // lines for `ckv help NAME`
  std::unique_ptr<Command> (*make)();
};

const std::vector<CommandEntry>& Commands();
const CommandEntry* FindCommand(std::string_view name);

std::unique_ptr<Command> MakeBenchCommand();
std::unique_ptr<Command> MakeCompletionCommand();
std::unique_ptr<Command> MakeDrainCommand();
std::unique_ptr<Command> MakeHelpCommand();
std::unique_ptr<Command> MakeInspectCommand();
std::unique_ptr<Command> MakeReplayCommand();
std::unique_ptr<Command> MakeSeedCommand();
std::unique_ptr<Command> MakeSelftestCommand();
std::unique_ptr<Command> MakeSequencesCommand();
std::unique_ptr<Command> MakeStatusCommand();
std::unique_ptr<Command> MakeTopCommand();

// What `ckv help NAME` prints.
std::string HelpOf(const CommandEntry& entry);

// Runs `ckv ARGUMENTS…` and answers the exit code. Errors go to standard error.
int RunCkv(const std::vector<std::string>& arguments);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_COMMAND_H_
