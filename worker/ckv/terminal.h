// What people see: tables, readable quantities, colours and progress bars.
//
// Colours and progress appear only on a terminal, and no colour where NO_COLOR is set.
#ifndef CLUSTERKV_WORKER_CKV_TERMINAL_H_
#define CLUSTERKV_WORKER_CKV_TERMINAL_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

namespace clusterkv::worker::ckv {

// "812 B", "3.4 KiB", "1.5 GiB".
std::string HumanBytes(double bytes);
// "0 ns" up to "1.21 s", "3 m 20 s": three significant digits.
std::string HumanDuration(absl::Duration duration);
// "1,234,567".
std::string HumanCount(int64_t count);
// A number with `digits` significant digits, without exponent where it fits in a table.
std::string Significant(double value, int digits);

enum class Color { kPlain, kBold, kDim, kGreen, kYellow, kRed, kCyan };
bool IsTerminal(int fd);
// `text` in the colour if `fd` is a terminal that wants colours, else as it is.
std::string Colored(std::string_view text, Color color, int fd = 1);
// Columns of the terminal at fd; 80 if unknown.
int TerminalColumns(int fd);

// Rows of text cells in aligned columns. Numbers to the right, the columns named in `left` to the
// left.
class Table {
 public:
  explicit Table(std::vector<std::string> header, size_t left_columns = 1);
  void AddRow(std::vector<std::string> cells);
  // Header, rule, rows.
  std::string Text() const;
  // The same as a Markdown table, aligned in source too.
  std::string Markdown() const;

 private:
  std::vector<size_t> Widths() const;
  std::string Line(const std::vector<std::string>& cells, const std::vector<size_t>& widths,
                   std::string_view separator) const;
  size_t left_columns_;
  std::vector<std::vector<std::string>> rows_;  // the header first
};

// Bytes that a terminal shows in one column each, UTF-8 continuation bytes left out.
size_t DisplayWidth(std::string_view text);

// "█████░░░░░" of `width` columns, `fraction` (0 to 1) of it full.
std::string Bar(double fraction, int width);

// One line on standard error that is redrawn as the work goes on; nothing at all off a terminal.
class Progress {
 public:
  explicit Progress(std::string_view title);
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // done of total; `note` is shown behind the bar.
  void Update(int64_t done, int64_t total, std::string_view note = "");
  void SetTitle(std::string_view title);

 private:
  std::string title_;
  bool visible_;
  bool drawn_ = false;
  absl::Time started_;
  absl::Time last_drawn_;
};

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_TERMINAL_H_
