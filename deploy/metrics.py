#!/usr/bin/env python3
"""Writes the metrics' table of deploy/README.md and the Grafana dashboard from the server's own.

Usage: metrics.py [--check] SERVER
SERVER: clusterkv-server, whose --print_metrics describes every metric. Each has a row in the table
and a panel: gauges as they are, counters per second, histograms as quantiles, split by their first
label. Panels of more than one metric are listed here. --check: writes nothing, and says what would
change, with exit status 1.
"""

import argparse
import difflib
import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
DASHBOARD = HERE / "helm/clusterkv/dashboards/clusterkv.json"
README = HERE / "README.md"
BEGIN, END = "<!-- metrics -->", "<!-- /metrics -->"

WHERE = 'namespace="$namespace", pod=~"$pod"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"seconds": "s", "bytes": "bytes"}


def series(name, extra=""):
    return f"{name}{{{extra}{WHERE}}}"


def rate(name, by, extra=""):
    grouping = f"sum by ({by}) " if by else "sum"
    return f"{grouping}(rate({series(name, extra)}[$__rate_interval]))"


def quantile(q, name, by, extra=""):
    return f"histogram_quantile({q}, {rate(name + '_bucket', by + ', le', extra)})"


HITS = rate("clusterkv_hot_cache_hits_total", "")
MISSES = rate("clusterkv_hot_cache_misses_total", "")
HITS_BY_POD = rate("clusterkv_hot_cache_hits_total", "pod")
MISSES_BY_POD = rate("clusterkv_hot_cache_misses_total", "pod")
CALLS = "grpc_server_call_duration_seconds"

# (title, unit, expression)
OVERVIEW = [
    ("Shards that answer", "short", f"count({series('clusterkv_uptime_seconds')})"),
    ("Shards that drain", "short", f"sum({series('clusterkv_draining')})"),
    ("Sequences", "short", f"sum({series('clusterkv_sequences')})"),
    ("Decode workers attached", "short", f"sum({series('clusterkv_attachments')})"),
    ("Selects per second", "short", rate("clusterkv_selects_total", "")),
    ("Hot cache hits", "percentunit", f"{HITS} / ({HITS} + {MISSES})"),
]
# By section: panels of what several metrics say together. (title, unit, [(legend, expression)])
COMPOSED = {
    "Selection": [
        ("Time of a select", "s",
         [(f"p{q * 100:g} {{{{pod}}}}",
           quantile(q, "clusterkv_stage_seconds", "pod", 'stage="select", '))
          for q in (0.5, 0.99)]),
        ("Wait for a thread", "s",
         [(f"p{q * 100:g} {{{{pod}}}}",
           quantile(q, "clusterkv_stage_seconds", "pod", 'stage="queue", '))
          for q in (0.5, 0.99)]),
    ],
    "Recall": [
        ("Hot cache hit rate", "percentunit",
         [("{{pod}}", f"{HITS_BY_POD} / ({HITS_BY_POD} + {MISSES_BY_POD})")]),
    ],
    "Memory": [
        ("Arena in use or promised", "percentunit",
         [("{{pod}}",
           f"1 - ({series('clusterkv_arena_pages', 'state=' + chr(34) + 'free' + chr(34) + ', ')} "
           f"- ignoring(state) {series('clusterkv_arena_reserved_pages')}) / ignoring(state) "
           f"sum without (state) ({series('clusterkv_arena_pages')})")]),
    ],
    "gRPC": [
        ("Calls per second by status", "ops",
         [("{{grpc_status}}", rate(f"{CALLS}_count", "grpc_status"))]),
    ],
}


def targets_of(metric):
    """The (legend, expression) of a metric's own panel, and the panel's unit."""
    name, label = metric["name"], metric["label"].split(",")[0]
    by = label or "pod"
    unit = UNITS.get(metric["unit"], "short")
    if metric["type"] == "gauge":
        value = f"sum by ({label}) ({series(name)})" if label else series(name)
        return [("{{%s}}" % by, value)], unit
    if metric["type"] == "counter":
        return [("{{%s}}" % by, rate(name, by))], {"bytes": "Bps"}.get(unit, "ops")
    return [(f"p{q * 100:g} {{{{{by}}}}}", quantile(q, name, by)) for q in (0.5, 0.99)], unit


class Layout:
    """Panels from left to right, row by row, with ids in their order."""

    def __init__(self):
        self.panels, self.x, self.y, self.height = [], 0, 0, 0

    def section(self, title):
        self.new_line()
        self.place({"type": "row", "title": title, "collapsed": False, "panels": []}, 24, 1)
        self.new_line()

    def new_line(self):
        self.x, self.y, self.height = 0, self.y + self.height, 0

    def place(self, panel, width, height):
        if self.x + width > 24:
            self.new_line()
        panel = {"id": len(self.panels) + 1, **panel,
                 "gridPos": {"h": height, "w": width, "x": self.x, "y": self.y}}
        self.panels.append(panel)
        self.x, self.height = self.x + width, max(self.height, height)

    def stat(self, title, unit, expression):
        self.place({"type": "stat", "title": title, "datasource": DATASOURCE,
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value",
                                "graphMode": "area"},
                    "targets": targets([(title, expression)])}, 4, 5)

    def graph(self, title, description, unit, lines, stacked=False):
        custom = {"fillOpacity": 30 if stacked else 8, "showPoints": "never",
                  "stacking": {"mode": "normal" if stacked else "none"}}
        defaults = {"unit": unit, "custom": custom, "min": 0}
        if unit == "percentunit":
            defaults["max"] = 1
        self.place({"type": "timeseries", "title": title, "description": description,
                    "datasource": DATASOURCE,
                    "fieldConfig": {"defaults": defaults, "overrides": []},
                    "options": {"legend": {"displayMode": "list", "placement": "bottom"},
                                "tooltip": {"mode": "multi", "sort": "desc"}},
                    "targets": targets(lines)}, 8, 8)


def targets(lines):
    return [{"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend,
             "datasource": DATASOURCE} for i, (legend, expression) in enumerate(lines)]


def title_of(metric):
    words = metric["name"].removeprefix("clusterkv_").removesuffix("_total")
    words = words.removesuffix("_seconds").replace("grpc_server_call_", "call_").replace("_", " ")
    per = " per second" if metric["type"] == "counter" else ""
    return words.capitalize() + per


def dashboard(metrics):
    layout = Layout()
    layout.section("Overview")
    for title, unit, expression in OVERVIEW:
        layout.stat(title, unit, expression)
    for section in dict.fromkeys(metric["section"] for metric in metrics):
        layout.section(section)
        for title, unit, lines in COMPOSED.get(section, []):
            layout.graph(title, "", unit, lines)
        for metric in (m for m in metrics if m["section"] == section):
            only = f" Only with {metric['when']}." if metric["when"] else ""
            lines, unit = targets_of(metric)
            layout.graph(title_of(metric), metric["help"] + only, unit, lines,
                         stacked=metric["label"] == "state")
    variable = {"type": "query", "datasource": DATASOURCE, "refresh": 2, "sort": 1}
    return {
        "title": "ClusterKV", "uid": "clusterkv", "tags": ["clusterkv"], "schemaVersion": 38,
        "version": 1, "editable": True, "graphTooltip": 1, "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"}, "timezone": "",
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus",
             "label": "Data source"},
            {"name": "namespace", "label": "Namespace", **variable,
             "query": "label_values(clusterkv_uptime_seconds, namespace)"},
            {"name": "pod", "label": "Shard", **variable,
             "query": 'label_values(clusterkv_uptime_seconds{namespace="$namespace"}, pod)',
             "multi": True, "includeAll": True, "allValue": ".+",
             "current": {"text": "All", "value": "$__all"}}]},
        "annotations": {"list": []}, "panels": layout.panels}


def table(metrics):
    lines = ["| metric | type, unit | labels | what |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric["label"].split(",") if label)
        unit = "" if metric["unit"] == "1" else f", {metric['unit']}"
        only = f" Only with {metric['when']}." if metric["when"] else ""
        lines.append(f"| `{metric['name']}` | {metric['type']}{unit} | {labels} | "
                     f"{metric['help']}{only} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("server")
    options = parser.parse_args()
    printed = subprocess.run([options.server, "--print_metrics"], capture_output=True, text=True,
                             check=True).stdout
    metrics = [json.loads(line) for line in printed.splitlines()]
    readme = README.read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    wanted = {
        DASHBOARD: json.dumps(dashboard(metrics), indent=1) + "\n",
        README: f"{before}{BEGIN}\n{table(metrics)}\n{END}{rest.split(END)[1]}",
    }
    changed = False
    for path, text in wanted.items():
        old = path.read_text(encoding="utf-8")
        if old == text:
            continue
        changed = True
        if options.check:
            sys.stdout.writelines(list(difflib.unified_diff(
                old.splitlines(True), text.splitlines(True), str(path), "as generated"))[:40])
        else:
            path.write_text(text, encoding="utf-8")
    if options.check and changed:
        print(f"deploy/metrics.py {options.server} writes what is missing")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
