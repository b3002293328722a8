#include "worker/ckv/svg.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace clusterkv::worker::ckv {
namespace {

constexpr char kStyle[] =
    "<style>"
    "svg{background:#ffffff}"
    ".ink{stroke:#1f2328;fill:#1f2328}.faint{stroke:#d8dee4;fill:#d8dee4}"
    ".c0{stroke:#0969da;fill:#0969da}.c1{stroke:#bc4c00;fill:#bc4c00}"
    ".c2{stroke:#1a7f37;fill:#1a7f37}.c3{stroke:#8250df;fill:#8250df}"
    ".c4{stroke:#cf222e;fill:#cf222e}.c5{stroke:#57606a;fill:#57606a}"
    "text[x]{stroke:none;font-family:system-ui,-apple-system,'Segoe UI',sans-serif}"
    "rect[x]{stroke:none}"
    "@media (prefers-color-scheme:dark){svg{background:#0d1117}"
    ".ink{stroke:#e6edf3;fill:#e6edf3}.faint{stroke:#30363d;fill:#30363d}"
    ".c0{stroke:#58a6ff;fill:#58a6ff}.c1{stroke:#f0883e;fill:#f0883e}"
    ".c2{stroke:#3fb950;fill:#3fb950}.c3{stroke:#bc8cff;fill:#bc8cff}"
    ".c4{stroke:#ff7b72;fill:#ff7b72}.c5{stroke:#8b949e;fill:#8b949e}"
    "}"
    "</style>";

std::string Number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.2f", value);
  std::string text = buffer;
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

std::string Attribute(std::string_view name, double value) {
  std::string text(1, ' ');
  text.append(name).append("=\"").append(Number(value)).append("\"");
  return text;
}

std::string Class(std::string_view style_class) {
  std::string text(" class=\"");
  return text.append(XmlEscaped(style_class)).append("\"");
}

std::string Closed(std::string_view element, std::string_view tooltip) {
  if (tooltip.empty()) return "/>\n";
  return "><title>" + XmlEscaped(tooltip) + "</title></" + std::string(element) + ">\n";
}

}  // namespace

std::string XmlEscaped(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return escaped;
}

Svg::Svg(int width, int height, std::string_view title)
    : width_(width), height_(height), title_(title) {}

void Svg::Line(Point a, Point b, std::string_view style_class, double width) {
  body_ += "<line" + Class(style_class) + Attribute("x1", a.x) + Attribute("y1", a.y) +
           Attribute("x2", b.x) + Attribute("y2", b.y) + Attribute("stroke-width", width) + "/>\n";
}

void Svg::Polyline(const std::vector<Point>& points, std::string_view style_class, double width) {
  std::string list;
  for (const Point& point : points) list += Number(point.x) + "," + Number(point.y) + " ";
  // The class colours stroke and fill; the element's own style keeps the area empty.
  body_ += "<polyline" + Class(style_class) + " style=\"fill:none\"" +
           Attribute("stroke-width", width) + " points=\"" + list + "\"/>\n";
}

void Svg::Rectangle(Point corner, double width, double height, std::string_view style_class,
                    std::string_view tooltip) {
  body_ += "<rect" + Class(style_class) + Attribute("x", corner.x) + Attribute("y", corner.y) +
           Attribute("width", width) + Attribute("height", height) + Closed("rect", tooltip);
}

void Svg::Cell(Point corner, double width, double height, std::string_view style_class,
               double opacity) {
  body_ += "<rect" + Class(style_class) + Attribute("x", corner.x) + Attribute("y", corner.y) +
           Attribute("width", width) + Attribute("height", height) +
           Attribute("fill-opacity", opacity) + "/>\n";
}

void Svg::Mark(Point center, Marker marker, std::string_view style_class,
               std::string_view tooltip) {
  const double x = center.x, y = center.y, r = 6;
  if (marker == Marker::kCircle) {
    body_ += "<circle" + Class(style_class) + Attribute("cx", x) + Attribute("cy", y) +
             Attribute("r", r) + Closed("circle", tooltip);
    return;
  }
  std::vector<Point> corners;
  if (marker == Marker::kSquare) {
    corners = {{x - r, y - r}, {x + r, y - r}, {x + r, y + r}, {x - r, y + r}};
  } else if (marker == Marker::kTriangle) {
    corners = {{x, y - 1.2 * r}, {x + 1.1 * r, y + 0.9 * r}, {x - 1.1 * r, y + 0.9 * r}};
  } else {
    corners = {{x, y - 1.3 * r}, {x + 1.3 * r, y}, {x, y + 1.3 * r}, {x - 1.3 * r, y}};
  }
  std::string list;
  for (const Point& point : corners) list += Number(point.x) + "," + Number(point.y) + " ";
  body_ +=
      "<polygon" + Class(style_class) + " points=\"" + list + "\"" + Closed("polygon", tooltip);
}

void Svg::Text(Point at, std::string_view text, Anchor anchor, int size,
               std::string_view style_class, double degrees) {
  const char* const anchors[] = {"start", "middle", "end"};
  body_ += "<text" + Class(style_class) + Attribute("x", at.x) + Attribute("y", at.y) +
           Attribute("font-size", size) + " text-anchor=\"" + anchors[static_cast<int>(anchor)] +
           "\"";
  if (degrees != 0) {
    body_ +=
        " transform=\"rotate(" + Number(degrees) + " " + Number(at.x) + " " + Number(at.y) + ")\"";
  }
  body_ += ">" + XmlEscaped(text) + "</text>\n";
}

std::string Svg::Finish() const {
  const std::string size = std::to_string(width_) + " " + std::to_string(height_);
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" width=\"" +
         std::to_string(width_) + "\" height=\"" + std::to_string(height_) + "\" viewBox=\"0 0 " +
         size + "\">\n<title>" + XmlEscaped(title_) + "</title>\n" + kStyle + "\n" + body_ +
         "</svg>\n";
}

std::vector<double> LogTicks(double low, double high) {
  std::vector<double> ticks;
  const bool wide = std::log10(high / low) > 3;
  const int first = static_cast<int>(std::floor(std::log10(low)));
  const int last = static_cast<int>(std::ceil(std::log10(high)));
  for (int exponent = first; exponent <= last; ++exponent) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (wide && factor != 1.0) continue;
      const double tick = factor * std::pow(10.0, exponent);
      if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push_back(tick);
    }
  }
  return ticks;
}

std::vector<double> ByteTicks(double low, double high) {
  std::vector<double> ticks;
  for (double tick = 1; tick <= high * (1 + 1e-9); tick *= 4) {
    if (tick >= low * (1 - 1e-9)) ticks.push_back(tick);
  }
  return ticks;
}

absl::Status WriteFile(const std::string& path, std::string_view contents) {
  std::FILE* file = path == "-" ? stdout : std::fopen(path.c_str(), "wb");
  const auto failed = [&](const char* what) {
    return absl::UnknownError("cannot " + std::string(what) + " " + path + ": " +
                              std::strerror(errno));
  };
  if (file == nullptr) return failed("open");
  const bool written = std::fwrite(contents.data(), 1, contents.size(), file) == contents.size();
  const bool closed = file == stdout ? std::fflush(file) == 0 : std::fclose(file) == 0;
  return written && closed ? absl::OkStatus() : failed("write");
}

}  // namespace clusterkv::worker::ckv
