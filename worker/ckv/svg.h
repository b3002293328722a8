// A small writer of self-contained SVG pictures: no scripts, no fonts or files from elsewhere.
//
// Colours follow the reader's light or dark scheme through the classes "ink" (text and lines),
// "faint" (grid) and "c0" … "c5" (series). Not thread-safe.
#ifndef CLUSTERKV_WORKER_CKV_SVG_H_
#define CLUSTERKV_WORKER_CKV_SVG_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace clusterkv::worker::ckv {

class Svg {
 public:
  // `title` is the picture's accessible name.
  Svg(int width, int height, std::string_view title);

  struct Point {
    double x = 0, y = 0;
  };
  enum class Marker { kCircle, kSquare, kTriangle, kDiamond };
  enum class Anchor { kStart, kMiddle, kEnd };

  void Line(Point a, Point b, std::string_view style_class, double width = 1);
  void Polyline(const std::vector<Point>& points, std::string_view style_class, double width = 2);
  void Rectangle(Point corner, double width, double height, std::string_view style_class,
                 std::string_view tooltip = "");
  // A cell of a heat map: style_class's colour with the opacity.
  void Cell(Point corner, double width, double height, std::string_view style_class,
            double opacity);
  void Mark(Point center, Marker marker, std::string_view style_class, std::string_view tooltip);
  void Text(Point at, std::string_view text, Anchor anchor = Anchor::kStart, int size = 13,
            std::string_view style_class = "ink", double degrees = 0);

  std::string Finish() const;

 private:
  int width_, height_;
  std::string title_, body_;
};

// `text` with &, <, > and quotes escaped.
std::string XmlEscaped(std::string_view text);

// Ticks 1, 2, 5 times powers of ten within [low, high], 0 < low < high; over three decades, the
// powers alone.
std::vector<double> LogTicks(double low, double high);
// For bytes: powers of 4.
std::vector<double> ByteTicks(double low, double high);

absl::Status WriteFile(const std::string& path, std::string_view contents);

}  // namespace clusterkv::worker::ckv

#endif  // CLUSTERKV_WORKER_CKV_SVG_H_
