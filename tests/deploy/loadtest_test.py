#!/usr/bin/env python3
"""Tests of deploy/loadtest: the gate's judgement on reports of ghz's form, and what ghz sends.

protoc, where there is one, reads the binary message back.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOADTEST = ROOT / "deploy/loadtest"


def run_script(name, *arguments, stdin=""):
    return subprocess.run([sys.executable, "-B", LOADTEST / name, *map(str, arguments)],
                          input=stdin, capture_output=True, text=True, check=False)


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


class GateTest(Folder):
    def report(self, load, phase, rps, p99_ms, codes=None, reached=None):
        """Writes a report as ghz does, and returns its path."""
        codes = codes or {"OK": 100}
        path = self.folder / f"{load}.{phase}.run.json"
        path.write_text(json.dumps({
            "count": sum(codes.values()), "rps": reached or rps, "options": {"rps": rps},
            "statusCodeDistribution": codes,
            "latencyDistribution": [{"percentage": p, "latency": int(ms * 1e6)}
                                    for p, ms in ((50, p99_ms / 2), (95, p99_ms), (99, p99_ms))]}))
        return path

    def ladder(self, **soak):
        return [self.report("select", "warm", 20, 900), self.report("select", "step-100", 100, 2),
                self.report("select", "step-200", 200, 8),
                self.report("select", "step-400", 400, 80),
                self.report("select", "soak", 140, **{"p99_ms": 5, **soak})]

    def test_passes_what_is_in_time_and_names_the_knee(self):
        run = run_script("gate.py", "--p99_ms=20", *self.ladder())
        self.assertEqual(run.returncode, 0, run.stdout)
        self.assertIn("select: the knee is at 200 calls/s", run.stdout)

    def test_fails_a_slow_soak(self):
        run = run_script("gate.py", "--p99_ms=20", *self.ladder(p99_ms=21))
        self.assertEqual(run.returncode, 1)
        self.assertIn("select soak: p99 21.00 ms", run.stdout)

    def test_fails_a_soak_with_one_failed_call(self):
        run = run_script("gate.py", "--p99_ms=20",
                         *self.ladder(codes={"OK": 99, "Unavailable": 1}))
        self.assertEqual(run.returncode, 1)
        self.assertIn("1 of 100 calls failed", run.stdout)

    def test_a_spike_may_be_shed_but_not_broken(self):
        steps = self.ladder()
        shed = self.report("select", "spike", 800, 500, {"OK": 1, "ResourceExhausted": 9})
        self.assertEqual(run_script("gate.py", *steps, shed).returncode, 0)
        broken = self.report("select", "spike", 800, 500, {"OK": 9, "Internal": 1})
        run = run_script("gate.py", *steps, broken)
        self.assertEqual(run.returncode, 1)
        self.assertIn("select spike: failed with Internal", run.stdout)

    def test_fails_a_load_without_a_step_in_time(self):
        run = run_script("gate.py", "--p99_ms=1", self.report("select", "step-100", 100, 2))
        self.assertEqual(run.returncode, 1)
        self.assertIn("no step was answered in time", run.stdout)

    def test_a_step_must_reach_its_rate(self):
        step = self.report("select", "step-100", 100, 2, reached=80)
        run = run_script("gate.py", "--quiet", "--min_rps=100", step)
        self.assertEqual(run.returncode, 1)
        self.assertEqual(run_script("gate.py", "--quiet", "--min_rps=88", step).returncode, 0)

    def test_a_report_without_latencies_fails(self):
        path = self.report("select", "soak", 100, 1, {"Unavailable": 10})
        report = json.loads(path.read_text())
        report["latencyDistribution"] = None
        path.write_text(json.dumps(report))
        self.assertEqual(run_script("gate.py", path).returncode, 1)

    def test_draws_the_curves(self):
        picture = self.folder / "curves.svg"
        run_script("gate.py", f"--svg={picture}", *self.ladder())
        lines = xml.etree.ElementTree.parse(picture).findall("{*}polyline")
        self.assertEqual([len(line.get("points").split()) for line in lines], [3, 3])

    def test_wrong_usage_is_told(self):
        self.assertEqual(run_script("gate.py").returncode, 2)
        self.assertEqual(run_script("gate.py", "--no_such=1", "x").returncode, 2)


class MessagesTest(Folder):
    query = {"sequence": "load-0", "layer": 3, "queries": {"values": [0.5, -1.25]},
             "want_state": True}

    def test_the_json_request_asks_all_sequences(self):
        run = run_script("messages.py", "select", self.folder, 16, stdin=json.dumps(self.query))
        self.assertEqual(run.returncode, 0, run.stderr)
        request = json.loads((self.folder / "select.json").read_text())
        self.assertEqual(request, {**self.query, "sequence": "load-{{randomInt 0 16}}"})

    def test_the_binary_request_is_the_same_one(self):
        protoc = shutil.which("protoc")
        if protoc is None:
            self.skipTest("no protoc here")
        run_script("messages.py", "select", self.folder, 16, stdin=json.dumps(self.query))
        run = subprocess.run(
            [protoc, f"-I{ROOT}/proto", "--decode=clusterkv.v1.SelectClustersRequest",
             "clusterkv/v1/cache_service.proto"],
            input=(self.folder / "select.bin").read_bytes(), capture_output=True, check=True)
        self.assertEqual(run.stdout.decode().split("\n"), [
            'sequence: "load-0"', "layer: 3", "queries {",
            '  data: "\\000\\000\\000?\\000\\000\\240\\277"', "}", "want_state: true", ""])

    def test_chunks_make_up_the_prompt(self):
        run_script("messages.py", "put", self.folder, "put", 7, 2, 64, "kv-1", "kv-2")
        opened = json.loads((self.folder / "open.json").read_text())
        self.assertEqual(opened["without_shards"], ["kv-1", "kv-2"])
        opened = json.loads((self.folder / "open.json").read_text())
        messages = json.loads((self.folder / "put_kv.json").read_text())
        self.assertEqual(opened["prompt_tokens"], 7)
        self.assertEqual([(m["chunk"]["first_token"], m["chunk"]["tokens"]) for m in messages],
                         [(0, 3), (3, 4)])
        for message in messages:
            self.assertEqual(message["sequence"]["name"], opened["name"])
            bytes_of_rows = message["chunk"]["tokens"] * 2 * 64 * 2
            self.assertEqual(len(message["chunk"]["keys"]), 4 * ((bytes_of_rows + 2) // 3))

    def test_every_load_has_its_data_and_a_call_of_the_contract(self):
        contract = (ROOT / "proto/clusterkv/v1/cache_service.proto").read_text(encoding="utf-8")
        loads = sorted((LOADTEST / "ghz").glob("*.json"))
        self.assertEqual([path.stem for path in loads],
                         ["put_kv", "select_and_recall", "select_binary", "select_json"])
        for path in loads:
            config = json.loads(path.read_text(encoding="utf-8"))
            self.assertIn(f"rpc {config['call'].split('/')[1]}(", contract)
            self.assertTrue("data-file" in config or "binary-file" in config)


if __name__ == "__main__":
    unittest.main()
