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


def svg(runs):
    """p50 and p99 over the offered rate, both logarithmic, a line for each load."""
    steps = [run for run in runs if run.phase.startswith("step-") and run.latency_ms]
    if not steps:
        return "<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>\n"
    width, height, left, bottom = 720, 360, 60, 40
    rates = [run.offered for run in steps]
    times = [value for run in steps for value in (run.latency_ms[50], run.p99)]
    x_low, x_high = math.log10(min(rates)), math.log10(max(rates) * 1.1)
    y_low, y_high = math.log10(min(times) * 0.8), math.log10(max(times) * 1.25)

    def x(rate):
        return left + (math.log10(rate) - x_low) / ((x_high - x_low) or 1) * (width - left - 170)

    def y(milliseconds):
        return height - bottom - (math.log10(milliseconds) - y_low) / (y_high - y_low) * (
            height - bottom - 20)

    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
             "font-family='sans-serif' font-size='12'>",
             f"<rect width='{width}' height='{height}' fill='white'/>",
             f"<text x='{left}' y='14'>latency in ms over calls per second (open loop); "
             "line p99, dashes p50</text>"]
    for rate in sorted(set(rates)):
        parts.append(f"<text x='{x(rate):.0f}' y='{height - 22}' text-anchor='middle'>"
                     f"{rate:.0f}</text><line x1='{x(rate):.0f}' x2='{x(rate):.0f}' y1='20' "
                     f"y2='{height - bottom}' stroke='#eee'/>")
    for exponent in range(math.floor(y_low), math.ceil(y_high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0 ** exponent
            if y_low <= math.log10(value) <= y_high:
                parts.append(f"<text x='{left - 6}' y='{y(value) + 4:.0f}' text-anchor='end'>"
                             f"{value:g}</text><line x1='{left}' x2='{width - 170}' "
                             f"y1='{y(value):.0f}' y2='{y(value):.0f}' stroke='#eee'/>")
    colors = ("#4269d0", "#efb118", "#ff725c", "#3ca951")
    for index, load in enumerate(sorted({run.load for run in steps})):
        color = colors[index % len(colors)]
        mine = sorted((run for run in steps if run.load == load), key=lambda run: run.offered)
        for percentile, dashes in ((50, " stroke-dasharray='4 3'"), (99, "")):
            points = " ".join(f"{x(run.offered):.1f},{y(run.latency_ms[percentile]):.1f}"
                              for run in mine)
            parts.append(f"<polyline points='{points}' fill='none' stroke='{color}' "
                         f"stroke-width='2'{dashes}/>")
        parts.append(f"<text x='{width - 160}' y='{40 + 18 * index}' fill='{color}'>{load}</text>")
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
        pathlib.Path(options["svg"]).write_text(svg(runs), encoding="utf-8")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
