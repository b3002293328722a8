#include "worker/ckv/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <utility>

#include "worker/ckv/exit_code.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

std::string Joined(const std::vector<std::string>& words, std::string_view separator) {
  std::string text;
  for (const std::string& word : words) {
    if (!text.empty()) text += separator;
    text += word;
  }
  return text;
}

absl::Status Expected(std::string_view what, std::string_view got) {
  return UsageError("expected " + std::string(what) + ", got \"" + std::string(got) + "\"");
}

absl::Status ParseInt(std::string_view text, int64_t min, int64_t max, int64_t* value) {
  int64_t parsed = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || parsed < min || parsed > max) {
    return Expected("a whole number from " + std::to_string(min) + " to " + std::to_string(max),
                    text);
  }
  *value = parsed;
  return absl::OkStatus();
}

absl::Status ParseDouble(std::string_view text, double min, double max, double* value) {
  const std::string copy(text);
  char* end = nullptr;
  const double parsed = std::strtod(copy.c_str(), &end);
  if (copy.empty() || *end != '\0' || !(parsed >= min && parsed <= max)) {
    return Expected("a number from " + std::to_string(min) + " to " + std::to_string(max), text);
  }
  *value = parsed;
  return absl::OkStatus();
}

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t substituted = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j + 1] + 1, row[j] + 1, substituted});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string Nearest(std::string_view word, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, word.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(word, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

Flag& FlagSet::Add(Flag flag) { return flags_.emplace_back(std::move(flag)); }

Flag& FlagSet::Bool(std::string_view name, bool* value, std::string_view help) {
  Flag flag{.name = std::string(name), .help = std::string(help)};
  flag.parse = [value](std::string_view text) {
    if (text != "true" && text != "false") return Expected("true or false", text);
    *value = text == "true";
    return absl::OkStatus();
  };
  return Add(std::move(flag));
}

Flag& FlagSet::Int(std::string_view name, std::string_view meta, int64_t* value, int64_t min,
                   int64_t max, std::string_view help) {
  Flag flag{.name = std::string(name),
            .meta = std::string(meta),
            .help = std::string(help),
            .default_text = std::to_string(*value)};
  flag.parse = [=](std::string_view text) { return ParseInt(text, min, max, value); };
  return Add(std::move(flag));
}

Flag& FlagSet::OptionalInt(std::string_view name, std::string_view meta,
                           std::optional<int64_t>* value, int64_t min, int64_t max,
                           std::string_view help) {
  Flag flag{.name = std::string(name), .meta = std::string(meta), .help = std::string(help)};
  flag.parse = [=](std::string_view text) {
    int64_t parsed = 0;
    absl::Status status = ParseInt(text, min, max, &parsed);
    if (status.ok()) *value = parsed;
    return status;
  };
  return Add(std::move(flag));
}

Flag& FlagSet::Double(std::string_view name, std::string_view meta, double* value, double min,
                      double max, std::string_view help) {
  std::string default_text = std::to_string(*value);
  default_text.erase(default_text.find_last_not_of('0') + 1);
  if (default_text.back() == '.') default_text.pop_back();
  Flag flag{.name = std::string(name),
            .meta = std::string(meta),
            .help = std::string(help),
            .default_text = default_text};
  flag.parse = [=](std::string_view text) { return ParseDouble(text, min, max, value); };
  return Add(std::move(flag));
}

Flag& FlagSet::String(std::string_view name, std::string_view meta, std::string* value,
                      std::string_view help) {
  Flag flag{.name = std::string(name),
            .meta = std::string(meta),
            .help = std::string(help),
            .default_text = *value};
  flag.parse = [value](std::string_view text) {
    *value = std::string(text);
    return absl::OkStatus();
  };
  return Add(std::move(flag));
}

Flag& FlagSet::Strings(std::string_view name, std::string_view meta,
                       std::vector<std::string>* value, std::string_view help) {
  Flag flag{.name = std::string(name),
            .meta = std::string(meta),
            .help = std::string(help),
            .repeated = true};
  flag.parse = [value](std::string_view text) {
    size_t begin = 0;
    while (begin <= text.size()) {  // "a,b" is the same as giving the flag twice
      const size_t end = std::min(text.find(',', begin), text.size());
      if (end > begin) value->emplace_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
    return absl::OkStatus();
  };
  return Add(std::move(flag));
}

Flag& FlagSet::Choice(std::string_view name, std::vector<std::string> choices, std::string* value,
                      std::string_view help) {
  Flag flag{.name = std::string(name),
            .meta = Joined(choices, "|"),
            .help = std::string(help),
            .default_text = *value,
            .choices = choices};
  flag.parse = [value, choices](std::string_view text) {
    if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
      return Expected("one of " + Joined(choices, ", "), text);
    }
    *value = std::string(text);
    return absl::OkStatus();
  };
  return Add(std::move(flag));
}

Flag& FlagSet::Duration(std::string_view name, absl::Duration* value, std::string_view help) {
  Flag flag{.name = std::string(name),
            .meta = "DURATION",
            .help = std::string(help),
            .default_text = absl::FormatDuration(*value)};
  flag.parse = [value](std::string_view text) {
    absl::Duration parsed;
    if (!absl::ParseDuration(std::string(text), &parsed) || parsed <= absl::ZeroDuration()) {
      return Expected("a duration above 0, as 500ms, 10s or 1m30s", text);
    }
    *value = parsed;
    return absl::OkStatus();
  };
  return Add(std::move(flag));
}

void FlagSet::Positional(std::string_view meta, size_t min, std::vector<std::string>* values,
                         std::string_view help) {
  positional_meta_ = std::string(meta);
  positional_help_ = std::string(help);
  positional_min_ = min;
  positional_ = values;
}

Flag* FlagSet::Find(std::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

absl::Status FlagSet::ParseFlag(const std::vector<std::string>& arguments, size_t* index) {
  const std::string_view text = std::string_view(arguments[*index]).substr(2);
  const size_t equals = text.find('=');
  std::string name(text.substr(0, equals));
  std::replace(name.begin(), name.end(), '-', '_');
  Flag* flag = Find(name);
  std::string value = "true";
  if (flag == nullptr && name.rfind("no", 0) == 0 && equals == text.npos) {
    flag = Find(std::string_view(name).substr(2));
    if (flag != nullptr && !flag->meta.empty()) flag = nullptr;
    value = "false";
  }
  if (flag == nullptr) {
    std::vector<std::string> names;
    for (const Flag& known : flags_) names.push_back(known.name);
    const std::string nearest = Nearest(name, names);
    return UsageError("unknown flag --" + name +
                      (nearest.empty() ? "" : "; did you mean --" + nearest + "?"));
  }
  if (equals != text.npos) {
    value = std::string(text.substr(equals + 1));
  } else if (!flag->meta.empty()) {
    if (*index + 1 >= arguments.size()) {
      return UsageError("--" + name + " needs a value: --" + name + "=" + flag->meta);
    }
    value = arguments[++*index];
  }
  if (flag->seen && !flag->repeated) return UsageError("--" + name + " is given twice");
  flag->seen = true;
  if (absl::Status status = flag->parse(value); !status.ok()) {
    return UsageError("--" + name + ": " + std::string(status.message()));
  }
  return absl::OkStatus();
}

absl::Status FlagSet::Parse(const std::vector<std::string>& arguments) {
  bool flags_over = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (!flags_over && argument == "--") {
      flags_over = true;
    } else if (!flags_over && argument.size() > 2 && argument.rfind("--", 0) == 0) {
      if (absl::Status status = ParseFlag(arguments, &i); !status.ok()) return status;
    } else if (!flags_over && argument.size() > 1 && argument[0] == '-') {
      return UsageError("unknown flag " + argument + ": flags are --name=value");
    } else if (positional_ == nullptr) {
      return UsageError("unexpected argument \"" + argument + "\"");
    } else {
      positional_->push_back(argument);
    }
  }
  for (const Flag& flag : flags_) {
    if (flag.required && !flag.seen) {
      return UsageError("--" + flag.name + "=" + flag.meta + " is required: " + flag.help);
    }
  }
  if (positional_ != nullptr && positional_->size() < positional_min_) {
    return UsageError("expected " + positional_meta_ + ": " + positional_help_);
  }
  return absl::OkStatus();
}

std::string FlagSet::SynopsisText() const {
  std::string text;
  for (const Flag& flag : flags_) {
    if (flag.required) text += "--" + flag.name + "=" + flag.meta + " ";
  }
  text += "[flags]";
  return positional_ == nullptr ? text : text + " " + positional_meta_;
}

std::string FlagSet::HelpText() const {
  constexpr size_t kColumn = 34;
  std::string text;
  const auto line = [&](std::string left, const std::string& right) {
    left = "  " + left;
    const size_t width = DisplayWidth(left);
    left += width < kColumn ? std::string(kColumn - width, ' ') : "\n" + std::string(kColumn, ' ');
    text += left + right + "\n";
  };
  if (positional_ != nullptr) line(positional_meta_, positional_help_);
  for (const Flag& flag : flags_) {
    std::string right = flag.help;
    if (flag.required) right += " (required)";
    if (!flag.default_text.empty()) right += " (default " + flag.default_text + ")";
    line("--" + flag.name + (flag.meta.empty() ? "" : "=" + flag.meta), right);
  }
  return text;
}

}  // namespace clusterkv::worker::ckv
