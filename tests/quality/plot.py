"""A report of run.py as a picture and as a table.

    python tests/quality/plot.py REPORT.json --svg=FILE    quality against bytes: self-contained, no library
    python tests/quality/plot.py REPORT.json               the table, in Markdown
"""

from __future__ import annotations

import argparse
import json
import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 420, 70, 240, 56, 56
COLOURS = ("#47606e", "#c8553d", "#1b6ca8", "#2a9d63", "#8a5fbf", "#b8860b", "#d1477a", "#4fb3bf", "#7a4b2a",
           "#9aa0a6", "#6b8e23", "#000000")
DEFAULT_W, DEFAULT_CODES = 2048, "2:32"


def _ticks(low: float, high: float) -> list[float]:
    return [m * 10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in (1, 2, 5) if low <= m * 10.0 ** e <= high]


def _powers(low: float, high: float) -> list[float]:
    return [2.0 ** e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]


def _name(row: dict) -> str:
    name = f'{row["method"]}@{row["budget"]}'
    if row.get("codec") not in (None, "", "raw"):
        name += f', {row["codec"]}'
    if row.get("coded_tokens") not in (None, 0, DEFAULT_W):
        name += f', W = {row["coded_tokens"]:,}'
    if row.get("codes") not in (None, DEFAULT_CODES):
        name += f', codes {row["codes"]}'
    return name


def _bytes(number: float) -> str:
    return f"{number / 1024:g} KiB" if number >= 1024 else f"{number:g} B"


def write_plot(rows: list[dict], path: str) -> None:
    """err_task and err_text (log) against bytes received per step, KV head and layer (log): lower left is
    better. Rows without bytes (baselines computed in place) are left out."""
    points = []
    for row in rows:
        if row.get("recalled_bytes_per_step") is None or row.get("err_task") is None:
            continue
        received = row["recalled_bytes_per_step"] + row["state_bytes_per_step"]
        points.append((_name(row), max(received, 1.0), row["err_task"], row.get("err_text")))
    if not points:
        return
    xs = [p[1] for p in points]
    ys = [y for p in points for y in p[2:] if y]
    x0, x1, y0, y1 = min(xs) / 1.6, max(xs) * 1.6, min(ys) / 1.4, max(ys) * 1.4

    def at(x: float, y: float) -> tuple[float, float]:
        fx = math.log(x / x0) / math.log(x1 / x0)
        fy = math.log(y / y0) / math.log(y1 / y0)
        return LEFT + fx * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - fy * (HEIGHT - TOP - BOTTOM)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">Error of attention against bytes '
           'received</text>',
           f'<text x="{LEFT}" y="42" fill="#555">relative to full attention, over the same queries; lower '
           'left is better</text>']
    for x in _powers(x0, x1):
        px, _ = at(x, y0)
        out.append(f'<path d="M{px:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
                   f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_bytes(x)}</text>')
    for y in _ticks(y0, y1):
        _, py = at(x0, y)
        out.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>'
                   f'<text x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{y:g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">bytes per '
               'step, KV head and layer (records and states)</text>')
    for i, (name, x, task, text) in enumerate(points):
        colour = COLOURS[i % len(COLOURS)]
        px, py = at(x, task)
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{colour}"/>')
        if text:
            qx, qy = at(x, text)
            out.append(f'<rect x="{qx - 5:.1f}" y="{qy - 5:.1f}" width="10" height="10" fill="none" '
                       f'stroke="{colour}" stroke-width="2"/>')
        out.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{TOP + 14 + 20 * i}" r="5" fill="{colour}"/>'
                   f'<text x="{WIDTH - RIGHT + 32}" y="{TOP + 18 + 20 * i}">{escape(name)}</text>')
    out.append(f'<text x="{WIDTH - RIGHT + 16}" y="{TOP + 34 + 20 * len(points)}" fill="#555">● tasks  □ '
               'running text</text></svg>')
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(out))


def markdown(rows: list[dict]) -> str:
    def cell(row: dict, name: str, form: str) -> str:
        return "–" if row.get(name) is None else form.format(row[name])

    lines = ["| method | needle | copy | nll | error, tasks / text | tokens received | bytes received |",
             "|:--|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        received = None
        if row.get("recalled_bytes_per_step") is not None:
            received = (row["recalled_bytes_per_step"] + row["state_bytes_per_step"]) / 1024
        name = "full attention" if row["method"] == "full" else f"`{_name(row)}`"
        lines.append(f"| {name} | {cell(row, 'needle', '{:.3f}')} | {cell(row, 'copy', '{:.3f}')} | "
                     f"{cell(row, 'nll', '{:.4f}')} | {cell(row, 'err_task', '{:.3f}')} / "
                     f"{cell(row, 'err_text', '{:.3f}')} | {cell(row, 'recalled_tokens_per_step', '{:.1f}')} | "
                     f"{'–' if received is None else f'{received:.1f} KiB'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report")
    parser.add_argument("--svg")
    options = parser.parse_args()
    with open(options.report, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    if options.svg:
        write_plot(rows, options.svg)
    else:
        print(markdown(rows))


if __name__ == "__main__":
    main()
