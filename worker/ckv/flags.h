// The flags of one command, as a table: parsing, defaults, help and shell completion come from it.
//
// A flag is --name=value or --name value; a boolean one is --name, --name=true|false or --noname.
// "--" ends the flags. Everything else is a positional argument. Not thread-safe.
#ifndef CLUSTERKV_WORKER_CKV_FLAGS_H_
#define CLUSTERKV_WORKER_CKV_FLAGS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace clusterkv::worker::ckv {

struct Flag {
  std::string name = {};
  std::string meta = {};  // "N", "FILE"; empty: a boolean
  std::string help = {};
  std::string default_text = {};          // shown in help; empty: none
  std::vector<std::string> choices = {};  // of a value; empty: free
  bool required = false;
  bool repeated = false;
  std::function<absl::Status(std::string_view value)> parse = {};
  bool seen = false;
};

// A table of flags bound to variables, which hold the defaults and must outlive the set.
class FlagSet {
 public:
  // Each adds a flag and answers it, for what is not given here. Bounds are inclusive.
  Flag& Bool(std::string_view name, bool* value, std::string_view help);
  Flag& Int(std::string_view name, std::string_view meta, int64_t* value, int64_t min, int64_t max,
            std::string_view help);
  Flag& OptionalInt(std::string_view name, std::string_view meta, std::optional<int64_t>* value,
                    int64_t min, int64_t max, std::string_view help);
  Flag& Double(std::string_view name, std::string_view meta, double* value, double min, double max,
               std::string_view help);
  Flag& String(std::string_view name, std::string_view meta, std::string* value,
               std::string_view help);
  Flag& Strings(std::string_view name, std::string_view meta, std::vector<std::string>* value,
                std::string_view help);
  Flag& Choice(std::string_view name, std::vector<std::string> choices, std::string* value,
               std::string_view help);
  // "10s", "1m30s", "250ms".
  Flag& Duration(std::string_view name, absl::Duration* value, std::string_view help);
  // Positional arguments, in order; at least `min` of them.
  void Positional(std::string_view meta, size_t min, std::vector<std::string>* values,
                  std::string_view help);

  // Errors: a UsageError that names the flag, what was expected and got, and the nearest known
  // flag.
  absl::Status Parse(const std::vector<std::string>& arguments);

  // "[flags] TRACE.safetensors…" and the lines of all flags, aligned.
  std::string SynopsisText() const;
  std::string HelpText() const;
  const std::vector<Flag>& flags() const { return flags_; }

 private:
  Flag& Add(Flag flag);
  Flag* Find(std::string_view name);
  absl::Status ParseFlag(const std::vector<std::string>& arguments, size_t* index);

  std::vector<Flag> flags_;
  std::string positional_meta_, positional_help_;
  size_t positional_min_ = 0;
  std::vector<std::string>* positional_ = nullptr;
};

// The candidate nearest to `word` by edit distance, or empty when none is near.
std::string Nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_FLAGS_H_
