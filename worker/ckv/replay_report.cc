#include "worker/ckv/replay_report.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "worker/ckv/svg.h"
#include "worker/ckv/terminal.h"

namespace clusterkv::worker::ckv {
namespace {

using Json = nlohmann::ordered_json;

Json Quantiles(const Percentiles& values) { return {{"p50", values.p50}, {"p99", values.p99}}; }

std::string Micros(const Percentiles& values) {
  if (values.p99 == 0) return "–";
  return Significant(values.p50, 3) + " / " + Significant(values.p99, 3);
}

std::string Percent(double fraction) { return Significant(100 * fraction, 3) + " %"; }

std::string MethodName(const LayerFigures& layer) {
  if (layer.preset == "full") return "full attention";
  return layer.preset + "@" + std::to_string(layer.budget) +
         (layer.codec == "raw" ? "" : " " + layer.codec);
}

double BytesPerStep(const LayerFigures& layer) {
  return layer.recalled_bytes_per_step + layer.state_bytes_per_step;
}

// Maps a positive value to a coordinate, logarithmically.
struct LogAxis {
  double low, high;   // of the value
  double begin, end;  // of the coordinate
  double At(double value) const {
    const double clamped = std::clamp(value, low, high);
    return begin + (end - begin) * std::log(clamped / low) / std::log(high / low);
  }
};

constexpr double kLeft = 74, kRight = 722, kTop = 62, kBottom = 404;
constexpr Svg::Marker kMarkers[] = {Svg::Marker::kCircle, Svg::Marker::kSquare,
                                    Svg::Marker::kTriangle, Svg::Marker::kDiamond};

void DrawAxes(const LogAxis& x, const LogAxis& y, Svg* svg) {
  for (const double tick : ByteTicks(x.low, x.high)) {
    svg->Line({x.At(tick), kTop}, {x.At(tick), kBottom}, "faint");
    std::string label = HumanBytes(tick);
    if (const size_t zero = label.find(".0 "); zero != label.npos) label.erase(zero, 2);
    svg->Text({x.At(tick), kBottom + 18}, label, Svg::Anchor::kMiddle, 12);
  }
  for (const double tick : LogTicks(y.low, y.high)) {
    svg->Line({kLeft, y.At(tick)}, {kRight, y.At(tick)}, "faint");
    svg->Text({kLeft - 8, y.At(tick) + 4}, Significant(tick, 1), Svg::Anchor::kEnd, 12);
  }
  svg->Line({kLeft, kBottom}, {kRight, kBottom}, "ink");
  svg->Line({kLeft, kTop}, {kLeft, kBottom}, "ink");
  svg->Text({(kLeft + kRight) / 2, kBottom + 42},
            "bytes received per decode step, layer and KV head (records + states)",
            Svg::Anchor::kMiddle);
  svg->Text({20, (kTop + kBottom) / 2}, "output error against full attention", Svg::Anchor::kMiddle,
            13, "ink", -90);
}

// Powers of two in bytes read better than 1, 2, 5 times powers of ten; the axis ends on them.
void WidenTo(double factor, double* low, double* high) {
  *low = std::pow(factor, std::floor(std::log(*low) / std::log(factor)));
  *high = std::pow(factor, std::ceil(std::log(*high) / std::log(factor) + 1e-9));
}

}  // namespace

std::string ReplayJson(const std::vector<ReplayResult>& runs) {
  Json layers = Json::array(), of_runs = Json::array();
  for (const ReplayResult& run : runs) {
    of_runs.push_back({{"prompt_tokens", run.prompt_tokens},
                       {"steps", run.steps},
                       {"ingest_seconds", run.ingest_seconds},
                       {"decode_seconds", run.decode_seconds},
                       {"link", run.link},
                       {"link_reason", run.link_reason}});
    for (const LayerFigures& layer : run.layers) {
      layers.push_back({{"layer", layer.layer},
                        {"preset", layer.preset},
                        {"budget", layer.budget},
                        {"codec", layer.codec},
                        {"mass", layer.mass},
                        {"output_error", layer.output_error},
                        {"exact_tokens_per_step", layer.exact_tokens_per_step},
                        {"recalled_tokens_per_step", layer.recalled_tokens_per_step},
                        {"recalled_bytes_per_step", layer.recalled_bytes_per_step},
                        {"state_bytes_per_step", layer.state_bytes_per_step},
                        {"correction_bytes_per_step", layer.correction_bytes_per_step},
                        {"hit_rate", layer.hit_rate},
                        {"held_fraction", layer.held_fraction},
                        {"select_us", Quantiles(layer.select_us)},
                        {"recall_us", Quantiles(layer.recall_us)},
                        {"index_digest", layer.index_digest},
                        {"selection_digest", layer.selection_digest},
                        {"state_digest", layer.state_digest},
                        {"correction_digest", layer.correction_digest},
                        {"recalled_digest", layer.recalled_digest}});
    }
  }
  return Json{{"layers", layers}, {"runs", of_runs}}.dump(2) + "\n";
}

std::string ReplayTable(const ReplayResult& run) {
  Table table(
      {"layer", "trace", "output error", "exact mass", "exact tokens", "received", "records",
       "states", "hit rate", "KV held", "select µs p50/p99", "recall µs p50/p99"},
      2);
  for (const LayerFigures& layer : run.layers) {
    table.AddRow({std::to_string(layer.layer), layer.trace, Significant(layer.output_error, 3),
                  Significant(layer.mass, 3), Significant(layer.exact_tokens_per_step, 4),
                  Significant(layer.recalled_tokens_per_step, 3),
                  HumanBytes(layer.recalled_bytes_per_step), HumanBytes(layer.state_bytes_per_step),
                  Percent(layer.hit_rate), Percent(layer.held_fraction), Micros(layer.select_us),
                  Micros(layer.recall_us)});
  }
  return table.Text();
}

std::string CompareTable(const std::vector<ReplayResult>& runs) {
  Table table({"method", "trace", "output error", "exact mass", "tokens received",
               "bytes received (records + states)", "hit rate", "KV held", "select µs p50 / p99",
               "recall µs p50 / p99"},
              2);
  for (const ReplayResult& run : runs) {
    for (const LayerFigures& layer : run.layers) {
      const bool full = layer.preset == "full";
      table.AddRow({MethodName(layer), layer.trace, Significant(layer.output_error, 3),
                    Significant(layer.mass, 3),
                    full ? "–" : Significant(layer.recalled_tokens_per_step, 3),
                    full ? "–"
                         : HumanBytes(BytesPerStep(layer)) + " (" +
                               HumanBytes(layer.recalled_bytes_per_step) + " + " +
                               HumanBytes(layer.state_bytes_per_step) + ")",
                    full ? "–" : Percent(layer.hit_rate), Percent(layer.held_fraction),
                    Micros(layer.select_us), Micros(layer.recall_us)});
    }
  }
  return table.Markdown();
}

std::string ReplayPicture(const std::vector<ReplayResult>& runs, double all_kv_bytes) {
  double low_x = all_kv_bytes, high_x = all_kv_bytes, low_y = 1, high_y = 1e-6;
  std::vector<std::string> methods, traces;
  const auto place = [](std::vector<std::string>& list, const std::string& name) {
    const auto at = std::find(list.begin(), list.end(), name);
    if (at != list.end()) return static_cast<size_t>(at - list.begin());
    list.push_back(name);
    return list.size() - 1;
  };
  for (const ReplayResult& run : runs) {
    for (const LayerFigures& layer : run.layers) {
      if (layer.preset == "full" || BytesPerStep(layer) <= 0 || layer.output_error <= 0) continue;
      low_x = std::min(low_x, BytesPerStep(layer));
      low_y = std::min(low_y, layer.output_error);
      high_y = std::max(high_y, layer.output_error);
    }
  }
  high_y = std::max(high_y, low_y);
  low_x /= 1.3, high_x *= 1.1, low_y /= 1.3, high_y *= 1.3;
  WidenTo(4, &low_x, &high_x);
  const LogAxis x{low_x, high_x, kLeft, kRight};
  const LogAxis y{low_y, high_y, kBottom, kTop};
  Svg svg(760, 470, "Output error against bytes received per decode step");
  DrawAxes(x, y, &svg);
  svg.Line({x.At(all_kv_bytes), kTop}, {x.At(all_kv_bytes), kBottom}, "c5", 2);
  svg.Text({x.At(all_kv_bytes) - 7, kTop + 16}, "all KV: " + HumanBytes(all_kv_bytes),
           Svg::Anchor::kEnd, 12);
  for (const ReplayResult& run : runs) {
    for (const LayerFigures& layer : run.layers) {
      if (layer.preset == "full" || BytesPerStep(layer) <= 0 || layer.output_error <= 0) continue;
      const size_t method = place(methods, MethodName(layer));
      const size_t trace = place(traces, layer.trace);
      const Svg::Point at{x.At(BytesPerStep(layer)), y.At(layer.output_error)};
      svg.Mark(at, kMarkers[trace % 4], "c" + std::to_string(method % 5),
               MethodName(layer) + ", " + layer.trace + ": error " +
                   Significant(layer.output_error, 3) + ", " + HumanBytes(BytesPerStep(layer)) +
                   " per step");
      const bool flip = at.x > kRight - 120;
      svg.Text({flip ? at.x - 11 : at.x + 11, at.y + 4}, MethodName(layer),
               flip ? Svg::Anchor::kEnd : Svg::Anchor::kStart, 12);
    }
  }
  svg.Text({kLeft, 26}, "Less error with less traffic: lower left is better", Svg::Anchor::kStart,
           15);
  double legend = kLeft + 6;
  for (size_t i = 0; i < traces.size() && i < 4; ++i) {
    svg.Mark({legend, 45}, kMarkers[i], "c5", traces[i]);
    svg.Text({legend + 11, 49}, traces[i], Svg::Anchor::kStart, 12);
    legend += 40 + 7.0 * static_cast<double>(DisplayWidth(traces[i]));
  }
  return svg.Finish();
}

}  // namespace clusterkv::worker::ckv
