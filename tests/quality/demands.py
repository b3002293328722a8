"""Checks a report of run.py against what the service promises of quality.

    python tests/quality/demands.py FILE.json [--few]

1. Each preset gives what its float32 oracle gives over the same sequences, from the same start of k-means.
2. `default` at 64 is no worse than `clusterkv` at 1,024 in any column, near to full attention, with at most 1/20
   of the bytes.
3. Selections are the oracle's in at least 99.9 % of the tokens on every layer, and the same bit for bit under
   every codec.

--few is for a run of one or two sequences, where one code or one sequence's loss is more than a tolerance: needle may
differ by one code more, copy by .02, nll by .01; in return `default`'s error must be at most half of `clusterkv`'s.
Prints one line per demand; exits 1 where one does not hold or nothing could be compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

CODES_PER_SEQUENCE = 12
W_DEFAULT = 2048


@dataclasses.dataclass
class Verdict:
    text: str
    seen: str
    holds: bool


def fewer(text: str, seen: float, most: float) -> Verdict:
    """Holds where seen <= most; NaN does not."""
    return Verdict(text, f"{seen:.5f} (at most {most:.5f})", seen <= most + 1e-9)


class Report:
    def __init__(self, report: dict, few: bool):
        self.rows, self.few = report["rows"], few
        codes = CODES_PER_SEQUENCE * report["sequences"]
        self.slack = {"needle": 1 / codes, "copy": .02, "nll": .01} if few else dict.fromkeys(
            ("needle", "copy", "nll"), 0.0)

    def row(self, method: str, budget: int, codec: str = "", w: int | None = None) -> dict | None:
        """The row with the preset's own codes and start, and coded tokens w (None: the preset's)."""
        for row in self.rows:
            if (row["method"], row["budget"]) == (method, budget) and row["codec"] in (codec, "") and (
                    "seed" not in row and row["codes"] in (None, "2:32") and
                    (row["coded_tokens"] or W_DEFAULT) == (w or W_DEFAULT)):
                return row
        return None

    def served(self) -> list[dict]:
        return [row for row in self.rows if row["codec"]]

    def against_oracle(self) -> list[Verdict]:
        verdicts = []
        for row in self.served():
            twin = self.row(f"oracle-{row['method']}", row["budget"])
            if row["codec"] != "raw" or not twin or row is not self.row(row["method"], row["budget"], "raw"):
                continue
            name = f"{row['method']}@{row['budget']} as its oracle"
            for column, most in (("needle", .03), ("copy", .03), ("nll", .005)):
                most = max(most, self.slack[column])
                verdicts.append(fewer(f"{name}: {column}", abs(row[column] - twin[column]), most))
            for column in ("err_task", "err_text"):
                verdicts.append(fewer(f"{name}: {column}", abs(row[column] - twin[column]),
                                      max(.05 * twin[column], .002)))
        return verdicts

    def default_beside_others(self) -> list[Verdict]:
        verdicts = []
        full, ours = self.row("full", 0), self.row("default", 64, "raw")
        published = self.row("clusterkv", 1024, "raw")
        if ours and published:
            for column, way in (("needle", -1), ("copy", -1), ("nll", 1)):
                verdicts.append(fewer(f"default@64 no worse than clusterkv@1024: {column}",
                                      way * (ours[column] - published[column]), self.slack[column]))
            for column in ("err_task", "err_text"):
                verdicts.append(fewer(f"default@64 beside clusterkv@1024: {column}", ours[column],
                                      (.5 if self.few else 1) * published[column]))
            received = [row["recalled_bytes_per_step"] + row["state_bytes_per_step"] for row in (ours, published)]
            verdicts.append(fewer("default@64 beside clusterkv@1024: bytes", received[0], .05 * received[1]))
        for w, limits in ((None, {"needle": .04, "copy": .02, "nll": .005}),
                          (4096, {"needle": .01, "copy": .01, "nll": .003})):
            row = self.row("default", 64, "raw", w)
            for column, most in limits.items() if row and full else ():
                lost = row[column] - full[column] if column == "nll" else full[column] - row[column]
                verdicts.append(fewer(f"default@64, W = {w or W_DEFAULT}, from full attention: {column}", lost,
                                      most + self.slack[column]))
        return verdicts

    def selections(self) -> list[Verdict]:
        verdicts = []
        for row in self.served():
            name = f"{row['method']}@{row['budget']} {row['codec']} w={row['coded_tokens']} {row['codes']}"
            if "oracle_agreement_worst_layer" in row:
                verdicts.append(fewer(f"{name}: not the oracle's tokens, worst layer",
                                      1 - row["oracle_agreement_worst_layer"], .001))
            raw = next((r for r in self.served() if r["codec"] == "raw" and all(
                r.get(k) == row.get(k) for k in ("method", "budget", "coded_tokens", "codes", "seed"))), None)
            if row["codec"] != "raw" and raw and raw.get("selection"):
                verdicts.append(Verdict(f"{name}: selection as under raw, first served layer",
                                        str(row["selection"])[:16], row["selection"] == raw["selection"]))
                for column in ("err_task", "err_text"):
                    verdicts.append(fewer(f"{name}: {column} from raw's", abs(row[column] - raw[column]), .002))
        return verdicts


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report")
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args(argv)
    with open(options.report, encoding="utf-8") as file:
        report = Report(json.load(file), options.few)
    failed = 0
    for title, verdicts in (("1. Each preset equals its oracle", report.against_oracle()),
                            ("2. default@64 against clusterkv@1024 and full attention", report.default_beside_others()),
                            ("3. Selections", report.selections())):
        print(title)
        if not verdicts:
            print("  NOTHING TO COMPARE")
        failed += not verdicts
        for verdict in verdicts:
            print(f"  {'holds ' if verdict.holds else 'FAILED'}  {verdict.text}: {verdict.seen}")
            failed += not verdict.holds
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
