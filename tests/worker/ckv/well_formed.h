// A check that a text is one well-formed XML element: tags nest, attributes are quoted, ampersands
// are entities. No namespaces, comments or CDATA: what the project writes has none.
#ifndef CLUSTERKV_TESTS_WORKER_CKV_WELL_FORMED_H_
#define CLUSTERKV_TESTS_WORKER_CKV_WELL_FORMED_H_

#include <regex>
#include <string>
#include <string_view>
#include <vector>

namespace clusterkv::worker::ckv {

// Empty if `text` is well-formed, else what is wrong and where.
inline std::string WellFormedError(const std::string& text) {
  static const std::regex tag(
      R"(^<(/?)([A-Za-z][A-Za-z0-9]*)((?:\s+[A-Za-z][A-Za-z0-9:-]*="[^"<>]*")*)\s*(/?)>)");
  static const std::regex entity("^&(amp|lt|gt|quot);");
  std::vector<std::string> open;
  bool had_root = false;
  const auto wrong = [&](const char* what, size_t at) {
    return std::string(what) + " at " + std::to_string(at) + ": " + text.substr(at, 40);
  };
  for (size_t at = 0; at < text.size();) {
    std::smatch match;
    const auto begin = text.begin() + static_cast<std::ptrdiff_t>(at);
    if (text[at] == '<') {
      if (!std::regex_search(begin, text.end(), match, tag)) return wrong("no tag", at);
      if (open.empty() && had_root) return wrong("second root", at);
      had_root = true;
      if (match[1].length() > 0) {
        if (open.empty() || open.back() != match[2]) return wrong("closes what is not open", at);
        open.pop_back();
      } else if (match[4].length() == 0) {
        open.push_back(match[2]);
      }
      at += match[0].length();
    } else if (text[at] == '&') {
      if (!std::regex_search(begin, text.end(), match, entity)) return wrong("no entity", at);
      at += match[0].length();
    } else {
      const bool blank = text[at] == '\n' || text[at] == ' ';
      if (open.empty() && !blank) return wrong("text outside of the root", at);
      ++at;
    }
  }
  if (!had_root) return "no element";
  return open.empty() ? "" : "not closed: " + open.back();
}

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_TESTS_WORKER_CKV_WELL_FORMED_H_
