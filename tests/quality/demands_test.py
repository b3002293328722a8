"""Of demands.py: a report that keeps every promise passes, and each broken promise is told by name."""

import copy
import math
import unittest

import demands


def row(method, budget, codec="", **columns):
    return {"method": method, "budget": budget, "codec": codec, "coded_tokens": None, "codes": None,
            "needle": 1.0, "copy": .95, "nll": 3.0, "err_task": .1, "err_text": .05, **columns}


def served(method, budget, codec="raw", **columns):
    return row(method, budget, codec, **{
        "recalled_bytes_per_step": 1000.0, "state_bytes_per_step": 1000.0,
        "oracle_agreement_worst_layer": 1.0, "selection": "abc", **columns})


GOOD = {"sequences": 8, "rows": [
    row("full", 0),
    served("clusterkv", 1024, recalled_bytes_per_step=500e3, state_bytes_per_step=0.0, nll=3.01, err_task=.3),
    served("default", 64, coded_tokens=2048, codes="2:32"),
    served("default", 64, "k8v4", coded_tokens=2048, codes="2:32"),
    served("default", 64, coded_tokens=4096, codes="2:32"),
    row("oracle-clusterkv", 1024, nll=3.01, err_task=.3),
    row("oracle-default", 64, coded_tokens=2048, codes="2:32")]}
CLUSTERKV, DEFAULT, K8V4, WIDE = range(1, 5)


def failures(report, few=False):
    checks = demands.Report(report, few)
    return [v.text for v in (*checks.against_oracle(), *checks.default_beside_others(), *checks.selections())
            if not v.holds]


def changed(index, **columns):
    report = copy.deepcopy(GOOD)
    report["rows"][index].update(columns)
    return report


class DemandsTest(unittest.TestCase):
    def test_what_keeps_every_promise_passes(self):
        self.assertEqual(failures(GOOD), [])

    def test_each_broken_promise_is_named(self):
        for index, columns, expected in (
                (DEFAULT, {"needle": .95}, "default@64 as its oracle: needle"),
                (DEFAULT, {"nll": 3.02}, "default@64 no worse than clusterkv@1024: nll"),
                (DEFAULT, {"copy": .92}, "default@64, W = 2048, from full attention: copy"),
                (DEFAULT, {"err_task": .31}, "default@64 beside clusterkv@1024: err_task"),
                (DEFAULT, {"recalled_bytes_per_step": 25e3}, "default@64 beside clusterkv@1024: bytes"),
                (WIDE, {"copy": .93}, "default@64, W = 4096, from full attention: copy"),
                (CLUSTERKV, {"oracle_agreement_worst_layer": .998},
                 "clusterkv@1024 raw w=None None: not the oracle's tokens, worst layer"),
                (K8V4, {"selection": "abd"},
                 "default@64 k8v4 w=2048 2:32: selection as under raw, first served layer"),
                (K8V4, {"err_text": .053}, "default@64 k8v4 w=2048 2:32: err_text from raw's")):
            with self.subTest(expected):
                self.assertIn(expected, failures(changed(index, **columns)))

    def test_nan_keeps_no_promise(self):
        self.assertIn("default@64 as its oracle: nll", failures(changed(DEFAULT, nll=math.nan)))

    def test_few_sequences_have_slack_but_must_halve_the_error(self):
        report = {**changed(DEFAULT, needle=1 - 1 / 12, err_task=.16, err_text=.02), "sequences": 1}
        self.assertEqual(failures(report, few=True), [
            "default@64 as its oracle: err_task", "default@64 as its oracle: err_text",
            "default@64 beside clusterkv@1024: err_task",
            "default@64 k8v4 w=2048 2:32: err_task from raw's",
            "default@64 k8v4 w=2048 2:32: err_text from raw's"])


if __name__ == "__main__":
    unittest.main()
