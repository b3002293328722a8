#include "worker/ckv/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/time/clock.h"

namespace clusterkv::worker::ckv {

std::string Significant(double value, int digits) {
  if (!std::isfinite(value)) return "–";
  if (value == 0) return "0";
  const int magnitude = static_cast<int>(std::floor(std::log10(std::fabs(value))));
  const int decimals = std::max(0, digits - 1 - magnitude);
  char buffer[64];
  if (decimals > 9) {
    std::snprintf(buffer, sizeof(buffer), "%.*e", digits - 1, value);
  } else {
    std::snprintf(buffer, sizeof(buffer), "%.*f", decimals, value);
  }
  return buffer;
}

std::string HumanBytes(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (std::fabs(bytes) >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  const bool whole = unit == 0 && bytes == std::floor(bytes);
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), whole ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
  return buffer;
}

std::string HumanDuration(absl::Duration duration) {
  const double ns = absl::ToDoubleNanoseconds(duration);
  if (std::fabs(ns) < 1e3) return Significant(ns, 3) + " ns";
  if (std::fabs(ns) < 1e6) return Significant(ns / 1e3, 3) + " µs";
  if (std::fabs(ns) < 1e9) return Significant(ns / 1e6, 3) + " ms";
  if (std::fabs(ns) < 60e9) return Significant(ns / 1e9, 3) + " s";
  const int64_t seconds = static_cast<int64_t>(std::llround(ns / 1e9));
  if (seconds < 3600) {
    return std::to_string(seconds / 60) + " m " + std::to_string(seconds % 60) + " s";
  }
  return std::to_string(seconds / 3600) + " h " + std::to_string(seconds / 60 % 60) + " m";
}

std::string HumanCount(int64_t count) {
  std::string text = std::to_string(count);
  const int first = count < 0 ? 1 : 0;
  for (int i = static_cast<int>(text.size()) - 3; i > first; i -= 3) text.insert(i, ",");
  return text;
}

bool IsTerminal(int fd) { return isatty(fd) == 1; }

std::string Colored(std::string_view text, Color color, int fd) {
  const char* no_color = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  const bool refused = (no_color != nullptr && *no_color != '\0') ||
                       (term != nullptr && std::strcmp(term, "dumb") == 0);
  if (color == Color::kPlain || refused || !IsTerminal(fd)) return std::string(text);
  const char* const codes[] = {"0", "1", "2", "32", "33", "31", "36"};
  return std::string("\x1b[") + codes[static_cast<int>(color)] + "m" + std::string(text) +
         "\x1b[0m";
}

int TerminalColumns(int fd) {
  winsize size{};
  if (ioctl(fd, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

size_t DisplayWidth(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char byte) { return (static_cast<uint8_t>(byte) & 0xC0) != 0x80; });
}

Table::Table(std::vector<std::string> header, size_t left_columns) : left_columns_(left_columns) {
  rows_.push_back(std::move(header));
}

void Table::AddRow(std::vector<std::string> cells) {
  cells.resize(rows_[0].size());
  rows_.push_back(std::move(cells));
}

std::vector<size_t> Table::Widths() const {
  std::vector<size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], DisplayWidth(row[i]));
  }
  return widths;
}

std::string Table::Line(const std::vector<std::string>& cells, const std::vector<size_t>& widths,
                        std::string_view separator) const {
  std::string line;
  for (size_t i = 0; i < cells.size(); ++i) {
    const std::string padding(widths[i] - DisplayWidth(cells[i]), ' ');
    if (i > 0) line += separator;
    line += i < left_columns_ ? cells[i] + padding : padding + cells[i];
  }
  return line;
}

std::string Table::Text() const {
  const std::vector<size_t> widths = Widths();
  std::string text = Colored(Line(rows_[0], widths, "  "), Color::kBold) + "\n";
  for (size_t i = 1; i < rows_.size(); ++i) {
    std::string line = Line(rows_[i], widths, "  ");
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string Table::Markdown() const {
  const std::vector<size_t> widths = Widths();
  std::string text = "| " + Line(rows_[0], widths, " | ") + " |\n|";
  for (size_t i = 0; i < widths.size(); ++i) {
    text += i < left_columns_ ? ":" + std::string(widths[i] + 1, '-') + "|"
                              : std::string(widths[i] + 1, '-') + ":|";
  }
  text += "\n";
  for (size_t i = 1; i < rows_.size(); ++i) text += "| " + Line(rows_[i], widths, " | ") + " |\n";
  return text;
}

std::string Bar(double fraction, int width) {
  const double clamped = std::isfinite(fraction) ? std::clamp(fraction, 0.0, 1.0) : 0.0;
  const int full = static_cast<int>(std::lround(clamped * width));
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < full ? "█" : "░";
  return bar;
}

Progress::Progress(std::string_view title)
    : title_(title), visible_(IsTerminal(2)), started_(absl::Now()) {}

Progress::~Progress() {
  if (drawn_) std::fprintf(stderr, "\r\x1b[K");
}

void Progress::SetTitle(std::string_view title) { title_ = std::string(title); }

void Progress::Update(int64_t done, int64_t total, std::string_view note) {
  const absl::Time now = absl::Now();
  if (!visible_ || (done < total && now - last_drawn_ < absl::Milliseconds(50))) return;
  last_drawn_ = now;
  drawn_ = true;
  const double fraction = total > 0 ? static_cast<double>(done) / total : 0;
  std::string line = title_ + " " + Bar(fraction, 24) + " " +
                     std::to_string(static_cast<int>(100 * fraction)) + " %  " + std::string(note);
  if (done > 0 && done < total && now - started_ > absl::Seconds(2)) {
    line += "  " + HumanDuration((now - started_) * ((1 - fraction) / fraction)) + " left";
  }
  if (static_cast<int>(DisplayWidth(line)) >= TerminalColumns(2)) line = title_;
  std::fprintf(stderr, "\r%s\x1b[K", line.c_str());
  std::fflush(stderr);
}

}  // namespace clusterkv::worker::ckv
