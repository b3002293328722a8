#!/usr/bin/env python3
"""Judges the runs of a load test: ghz says what was, not whether it was good enough.

Usage: gate.py [--p99_ms=N] [--min_rps=N] [--quiet] [--svg=FILE] LOAD.PHASE.run.json…
Prints a table. The knee of a load is its last step that was answered in time. Exit status 1, and a
line that says why, if
  - the soak, or with --min_rps any run, has a failed call or a p99 above --p99_ms;
  - a run reached less than 90 % of --min_rps;
  - a spike has failed calls other than RESOURCE_EXHAUSTED, UNAVAILABLE or DEADLINE_EXCEEDED: too
    much load may be refused, nothing else may go wrong;
  - a load has no step that was answered in time.
--svg draws p50 and p99 over the offered rate.
"""

import dataclasses
import json
import math
import pathlib
import sys

SHED = {"OK", "ResourceExhausted", "Unavailable", "DeadlineExceeded"}


@dataclasses.dataclass
class Run:
    load: str
    phase: str
    offered: float  # calls per second; 0: as fast as they were answered
    reached: float
    count: int
    codes: dict
    latency_ms: dict  # by percentile

    @property
    def failed(self):
        return self.count - self.codes.get("OK", 0)

    @property
    def p99(self):
        return self.latency_ms.get(99, math.inf)

    def in_time(self, p99_ms):
        return self.failed == 0 and self.p99 <= p99_ms and self.reached >= 0.9 * self.offered


def read_run(path):
    path = pathlib.Path(path)
    load, phase = path.name.split(".")[:2]
    report = json.loads(path.read_text(encoding="utf-8"))
    latency = {row["percentage"]: row["latency"] / 1e6
               for row in report.get("latencyDistribution") or []}
    return Run(load, phase, float(report.get("options", {}).get("rps", 0)), report["rps"],
               report["count"], report.get("statusCodeDistribution") or {}, latency)


def order(run):
    phases = {"warm": 0, "step": 1, "spike": 2, "soak": 3}
    return (run.load, phases.get(run.phase.split("-")[0], 4), run.offered)


def table(runs):
    lines = [f"{'load':<18} {'phase':<10} {'offered/s':>9} {'reached/s':>9} {'calls':>7} "
             f"{'failed':>7} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8}"]
    for run in runs:
        percentiles = " ".join(f"{run.latency_ms.get(p, math.nan):8.2f}" for p in (50, 95, 99))
        lines.append(f"{run.load:<18} {run.phase:<10} {run.offered:9.0f} {run.reached:9.1f} "
                     f"{run.count:7d} {run.failed:7d} {percentiles}")
        for code, count in sorted(run.codes.items()):
            if code != "OK":
                lines.append(f"{'':<18} {code}: {count}")
    return "\n".join(lines)


def judge(run, p99_ms, min_rps):
    """What is wrong with one run, or None."""
    if run.phase == "spike":
        wrong = set(run.codes) - SHED
        return f"failed with {', '.join(sorted(wrong))}" if wrong else None
    if min_rps is None and run.phase != "soak":
        return None
    if run.failed:
        return f"{run.failed} of {run.count} calls failed: {run.codes}"
    if not run.p99 <= p99_ms:
        return f"p99 {run.p99:.2f} ms, at most {p99_ms:g} ms"
    if min_rps is not None and run.reached < 0.9 * min_rps:
        return f"{run.reached:.0f} calls/s, asked for {min_rps:g}"
    return None


def knees(runs, p99_ms):
    """Of each load: its last step that was answered in time, or None."""
    found = {}
    for run in runs:
        if run.phase.startswith("step-"):
            found.setdefault(run.load, None)
            if run.in_time(p99_ms):
                found[run.load] = run
    return found


STYLE = """
svg { background: #ffffff }
text { fill: #1f2328 } .faint { stroke: #d8dee4 } .axis { stroke: #59636e }
.limit { stroke: #cf222e } .limit-text { fill: #cf222e }
.c0 { stroke: #2f5fd0; fill: #2f5fd0 } .c1 { stroke: #b35900; fill: #b35900 }
.c2 { stroke: #2a8a3e; fill: #2a8a3e } .c3 { stroke: #a03bc0; fill: #a03bc0 }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117 }
  text { fill: #e6edf3 } .faint { stroke: #30363d } .axis { stroke: #9198a1 }
  .limit { stroke: #ff7b72 } .limit-text { fill: #ff7b72 }
  .c0 { stroke: #79a7ff; fill: #79a7ff } .c1 { stroke: #f0a04b; fill: #f0a04b }
  .c2 { stroke: #56d364; fill: #56d364 } .c3 { stroke: #d898ff; fill: #d898ff }
}"""
COLORS = 4
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 560, 20, 360


class LogAxis:
    """Positions of values between `low` and `high` on a logarithmic axis."""

    def __init__(self, low, high, begin, end):
        self.low, self.high, self.begin, self.end = low, max(high, low * 1.01), begin, end

    def __call__(self, value):
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + part * (self.end - self.begin)

    def ticks(self):
        """1, 2 and 5 times the powers of ten within."""
        first, last = (math.floor(math.log10(end)) for end in (self.low, self.high))
        values = [digit * 10.0 ** power for power in range(first, last + 1) for digit in (1, 2, 5)]
        return [value for value in values if self.low <= value <= self.high]


def line(x1, y1, x2, y2, style):
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' class='{style}'/>"


def text(x, y, words, anchor="start", more=""):
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'{more}>{words}</text>"


def axes(x, y):
    parts = []
    for value in x.ticks():
        parts += [line(x(value), TOP, x(value), BOTTOM, "faint"),
                  text(x(value), BOTTOM + 18, f"{value:,.0f}", "middle")]
    for value in y.ticks():
        parts += [line(LEFT, y(value), RIGHT, y(value), "faint"),
                  text(LEFT - 8, y(value) + 4, f"{value:g}", "end")]
    middle = (TOP + BOTTOM) / 2
    return parts + [line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"),
                    line(LEFT, TOP, LEFT, BOTTOM, "axis"),
                    text((LEFT + RIGHT) / 2, BOTTOM + 42, "calls per second offered (open loop)",
                         "middle"),
                    text(18, middle, "latency, ms", "middle",
                         f" transform='rotate(-90 18 {middle:.0f})'")]


def curves(load, index, runs, x, y):
    """p50 dashed and p99 solid, a dot for each step, and the load's line in the legend."""
    style, row = f"c{index % COLORS}", TOP + 40 + 24 * index
    parts = [line(RIGHT + 20, row - 4, RIGHT + 48, row - 4, style + "' stroke-width='2.5"),
             text(RIGHT + 56, row, load)]
    for percentile, dashes in ((50, " stroke-dasharray='5 4'"), (99, "")):
        points = [(x(run.offered), y(run.latency_ms[percentile])) for run in runs]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f"<polyline points='{path}' style='fill:none' class='{style}' "
                     f"stroke-width='2'{dashes}/>")
        for (px, py), run in zip(points, runs):
            parts.append(f"<circle cx='{px:.1f}' cy='{py:.1f}' r='2.5' class='{style}'><title>"
                         f"{load} at {run.offered:.0f}/s: p{percentile} "
                         f"{run.latency_ms[percentile]:.2f} ms</title></circle>")
    return parts


def svg(runs, p99_ms):
    """p50 and p99 over the offered rate, both logarithmic, a colour for each load."""
    steps = [run for run in runs if run.phase.startswith("step-") and run.latency_ms]
    if not steps:
        return "<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>\n"
    rates = [run.offered for run in steps]
    times = [value for run in steps for value in (run.latency_ms[50], run.p99)] + [p99_ms]
    x = LogAxis(min(rates) * 0.9, max(rates) * 1.1, LEFT, RIGHT)
    y = LogAxis(min(times) * 0.8, max(times) * 1.25, BOTTOM, TOP)
    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' "
             "font-family='sans-serif' font-size='13' role='img' "
             "aria-label='Latency over calls per second'>", f"<style>{STYLE}</style>", *axes(x, y),
             line(LEFT, y(p99_ms), RIGHT, y(p99_ms), "limit' stroke-dasharray='2 3"),
             text(LEFT + 6, y(p99_ms) - 5, f"limit of p99: {p99_ms:g} ms", "start",
                  " class='limit-text'")]
    loads = sorted({run.load for run in steps})
    for index, load in enumerate(loads):
        mine = sorted((run for run in steps if run.load == load), key=lambda run: run.offered)
        parts += curves(load, index, mine, x, y)
    row = TOP + 52 + 24 * len(loads)
    for words, dashes in (("p99", ""), ("p50", "' stroke-dasharray='5 4")):
        parts += [line(RIGHT + 20, row - 4, RIGHT + 48, row - 4, "axis" + dashes),
                  text(RIGHT + 56, row, words)]
        row += 22
    return "\n".join(parts + ["</svg>"]) + "\n"


def main(arguments):
    options = {"p99_ms": "20", "min_rps": None, "quiet": None, "svg": None}
    files = []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            files.append(argument)
        elif name in options:
            options[name] = value
        else:
            files = []
            break
    if not files:
        print(__doc__, file=sys.stderr)
        return 2
    p99_ms = float(options["p99_ms"])
    min_rps = None if options["min_rps"] is None else float(options["min_rps"])
    runs = sorted(map(read_run, files), key=order)
    if options["quiet"] is None:
        print(table(runs))
    problems = [f"{run.load} {run.phase}: {problem}" for run in runs
                if (problem := judge(run, p99_ms, min_rps))]
    if min_rps is None:
        for load, knee in knees(runs, p99_ms).items():
            if knee is None:
                problems.append(f"{load}: no step was answered in time")
            else:
                print(f"{load}: the knee is at {knee.offered:.0f} calls/s or above "
                      f"(p99 {knee.p99:.2f} ms, at most {p99_ms:g} ms)")
    if options["svg"]:
        pathlib.Path(options["svg"]).write_text(svg(runs, p99_ms), encoding="utf-8")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
