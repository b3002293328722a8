// ckv help and completion.
#include <cstdio>

#include "worker/ckv/command.h"
#include "worker/ckv/exit_code.h"

namespace clusterkv::worker::ckv {
namespace {

class HelpCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    flags.Positional("[COMMAND]", 0, &commands_, "the command to explain");
  }

  absl::Status Run() override {
    if (commands_.size() > 1) return UsageError("expected one command");
    if (commands_.empty()) {
      std::printf("%s", HelpOfAll().c_str());
      return absl::OkStatus();
    }
    const CommandEntry* entry = FindCommand(commands_[0]);
    if (entry == nullptr) return UsageError("unknown command \"" + commands_[0] + "\"");
    std::printf("%s", HelpOf(*entry).c_str());
    return absl::OkStatus();
  }

 private:
  static std::string HelpOfAll() {
    std::string text =
        "ckv: the client tool of the ClusterKV cache service\n\n"
        "usage: ckv COMMAND [flags]\n\ncommands\n";
    for (const CommandEntry& entry : Commands()) {
      std::string name(entry.name);
      name.append(12 - name.size(), ' ');
      text += "  " + name + std::string(entry.summary) + "\n";
    }
    return text +
           "\n`ckv help COMMAND` explains its flags.\n"
           "exit codes: 0 done, 1 a check failed or the server said no, 2 wrong usage, 3 no server "
           "answers\n"
           "NO_COLOR=1 leaves out colours; progress is shown on terminals only.\n";
  }

  std::vector<std::string> commands_;
};

std::string Names(char separator) {
  std::string text;
  for (const CommandEntry& entry : Commands()) {
    if (!text.empty()) text += separator;
    text += entry.name;
  }
  return text;
}

// The words that may follow a command: its flags, with their choices where they have some.
std::string FlagWords(const CommandEntry& entry) {
  FlagSet flags;
  const auto command = entry.make();
  command->Register(flags);
  std::string words;
  for (const Flag& flag : flags.flags()) {
    if (!words.empty()) words += ' ';
    if (flag.choices.empty()) {
      words += "--" + flag.name + (flag.meta.empty() ? "" : "=");
      continue;
    }
    for (const std::string& choice : flag.choices) {
      words += (words.empty() || words.back() == ' ' ? "" : " ");
      words += "--" + flag.name + "=" + choice;
    }
  }
  return words;
}

std::string BashCompletion() {
  std::string text =
      "# bash completion of ckv: source <(ckv completion bash)\n"
      "_ckv() {\n"
      "  local cur=\"${COMP_LINE:0:COMP_POINT}\"; cur=\"${cur##*[[:space:]]}\"\n"
      "  local words=''\n"
      "  if [ \"$COMP_CWORD\" -le 1 ]; then\n"
      "    words='" +
      Names(' ') +
      "'\n"
      "  else\n"
      "    case \"${COMP_WORDS[1]}\" in\n";
  for (const CommandEntry& entry : Commands()) {
    text += "      " + std::string(entry.name) + ") words='" + FlagWords(entry) + "' ;;\n";
  }
  text +=
      "    esac\n"
      "  fi\n"
      "  case \"$cur\" in\n"
      "    --*=*) ;;\n"
      "    --*|'') compopt -o nospace ;;\n"
      "    *) if [ \"$COMP_CWORD\" -gt 1 ]; then COMPREPLY=($(compgen -f -- \"$cur\")); return; fi "
      ";;\n"
      "  esac\n"
      "  COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
      "  # bash splits words at '=': only what follows it may be answered.\n"
      "  case \"$cur\" in --*=*) COMPREPLY=(\"${COMPREPLY[@]#*=}\") ;; esac\n"
      "}\n"
      "complete -F _ckv ckv\n";
  return text;
}

std::string ZshCompletion() {
  std::string text =
      "#compdef ckv\n"
      "# zsh completion of ckv: ckv completion zsh > \"${fpath[1]}/_ckv\"\n"
      "_ckv() {\n"
      "  if (( CURRENT == 2 )); then\n"
      "    compadd -- " +
      Names(' ') +
      "\n"
      "    return\n"
      "  fi\n"
      "  local -a flags\n"
      "  case \"$words[2]\" in\n";
  for (const CommandEntry& entry : Commands()) {
    text += "    " + std::string(entry.name) + ") flags=(" + FlagWords(entry) + ") ;;\n";
  }
  text +=
      "  esac\n"
      "  if [[ \"$PREFIX\" == -* ]]; then compadd -S '' -- $flags; else _files; fi\n"
      "}\n"
      "if [ \"$funcstack[1]\" = \"_ckv\" ]; then _ckv \"$@\"; else compdef _ckv ckv; fi\n";
  return text;
}

class CompletionCommand : public Command {
 public:
  void Register(FlagSet& flags) override {
    flags.Positional("bash|zsh", 1, &shells_, "for which shell");
  }

  absl::Status Run() override {
    if (shells_.size() == 1 && shells_[0] == "bash") {
      std::printf("%s", BashCompletion().c_str());
    } else if (shells_.size() == 1 && shells_[0] == "zsh") {
      std::printf("%s", ZshCompletion().c_str());
    } else {
      return UsageError("expected bash or zsh");
    }
    return absl::OkStatus();
  }

 private:
  std::vector<std::string> shells_;
};

}  // namespace

std::unique_ptr<Command> MakeHelpCommand() { return std::make_unique<HelpCommand>(); }
std::unique_ptr<Command> MakeCompletionCommand() { return std::make_unique<CompletionCommand>(); }

}  // namespace clusterkv::worker::ckv
