// The structured log: one line per event on standard error, JSON or text.
//
// {"time":"2026-01-02T03:04:05.678901Z","level":"info","message":"listening","port":7400}
//
// Thread-safe; a line is written by one write(2), so that lines of threads never mix.
#ifndef CLUSTERKV_CACHE_SERVICE_TELEMETRY_LOG_H_
#define CLUSTERKV_CACHE_SERVICE_TELEMETRY_LOG_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "absl/time/time.h"

namespace clusterkv::cache_service {

enum class LogLevel : int { kDebug = 0, kInfo = 1, kWarning = 2, kError = 3 };
enum class LogFormat : int { kJson, kText };

// A key and its value: text is quoted, numbers and booleans are not.
struct LogField {
  LogField(std::string_view key, std::string_view value) : key(key), value(value), quoted(true) {}
  LogField(std::string_view key, const std::string& value) : key(key), value(value), quoted(true) {}
  LogField(std::string_view key, const char* value) : key(key), value(value), quoted(true) {}
  LogField(std::string_view key, bool value) : key(key), value(value ? "true" : "false") {}
  LogField(std::string_view key, int64_t value) : key(key), value(std::to_string(value)) {}
  LogField(std::string_view key, uint64_t value) : key(key), value(std::to_string(value)) {}
  LogField(std::string_view key, int value) : key(key), value(std::to_string(value)) {}

  std::string_view key;
  std::string value;
  bool quoted = false;
};

// Process-wide, at start. Default: info, JSON.
void ConfigureLog(LogLevel level, LogFormat format);
bool LogEnabled(LogLevel level);

// Writes the line if `level` is enabled.
void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {});

// The line that Log would write at `time`, newline included.
std::string FormatLogLine(absl::Time time, LogLevel level, LogFormat format,
                          std::string_view message, std::initializer_list<LogField> fields);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_TELEMETRY_LOG_H_
