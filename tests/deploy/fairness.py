#!/usr/bin/env python3
"""Two tenants of one server under ghz: how long the quiet one waits beside the loud one.

Usage: fairness.py SERVER CKV GHZ [--p99_ms=20] [--seconds=8] [--rounds=5]
       [--server_processors=1] [--json=FILE]
Starts a server with mutual TLS and the tenants quiet and loud. First the knee: the last rate of a
ladder, sent by both tenants, half each, whose p99 is within --p99_ms. Then, round by round, the
quiet one sends an eleventh of the knee: alone, beside as much of the loud one, and beside ten times
as much. Prints the medians over the rounds, their spread, and what the server says of its stages.

The server has --server_processors to itself and the generators have the others. Where it is allowed
the server has a raised priority, so that other programs of the machine do not get in, and the quiet
tenant's generator a real-time one: a generator that waits for its own processor measures itself.
--server_processors=0: none is anybody's.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "deploy" / "loadtest"))
import messages  # pylint: disable=wrong-import-position

from ports import free_port  # pylint: disable=wrong-import-position

LADDER = (250, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4500, 5000, 6000, 7000, 8000,
          10000, 12000, 14000, 17000, 20000, 24000, 28000, 33000, 40000)
TENANTS = ("quiet", "loud")
STAGES = ("queue", "select", "pack", "send")
REAL_TIME = ["chrt", "-f", "10"]
RAISED = ["nice", "-n", "-15"]


class TooFast(Exception):
    """The generator did not keep up with its own rate."""


def processors(servers):
    """`servers` of them for the server, the others for the generators; 0: none is anybody's."""
    there = sorted(os.sched_getaffinity(0))
    apart = 0 < servers < len(there)
    return (there[:servers], there[servers:]) if apart else (None, None)


def pinned(allowed, command, priority=()):
    """`command` on those processors alone; None: wherever it likes. `priority`: where allowed."""
    if allowed is not None:
        command = ["taskset", "-c", ",".join(map(str, allowed)), *command]
    if priority and not subprocess.run([*priority, "true"], capture_output=True,
                                       check=False).stderr:
        command = [*priority, *command]
    return command


def percentiles(report):
    """p50 and p99 in ms of a report by ghz or as ghz makes it."""
    ms = {row["percentage"]: row["latency"] / 1e6 for row in report["latencyDistribution"]}
    return ms[50], ms[99]


def quantile(buckets, part):
    """Of cumulative (upper bound, count), the bound below which `part` of the counts are."""
    total = buckets[-1][1] if buckets else 0
    return next((bound for bound, count in buckets if total and count >= part * total), math.nan)


class Bench:
    """A server, its certificates and its tenants' sequences, in a folder."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.address, self.metrics_port = f"localhost:{free_port()}", free_port()
        self.sign("ca", "basicConstraints=critical,CA:TRUE")
        self.sign("server", "subjectAltName=DNS:localhost")
        for tenant in TENANTS:
            self.sign(tenant, "extendedKeyUsage=clientAuth")
        (folder / "server.conf").write_text(
            f'listen: "{self.address}" admin_listen: "localhost:{free_port()}"\n'
            f'tls_certificate_file: "{folder}/server.crt" tls_key_file: "{folder}/server.key"\n'
            f'tls_client_ca_file: "{folder}/ca.crt" admin_identities: "nobody"\n'
            f'metrics_listen: "localhost:{self.metrics_port}"\n'
            'arena_bytes: "512MiB" log_level: "error"\n' +
            "".join(f'tenants {{ name: "{t}" identities: "{t}" }}\n' for t in TENANTS))

    def sign(self, name, extension):
        issuer = [] if name == "ca" else ["-CA", self.folder / "ca.crt",
                                          "-CAkey", self.folder / "ca.key"]
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "1", "-subj", f"/CN={name}", "-addext", extension, "-keyout",
             self.folder / f"{name}.key", "-out", self.folder / f"{name}.crt", *issuer],
            check=True, capture_output=True)

    def __enter__(self):
        self.server_on, self.generators_on = processors(self.options.server_processors)
        self.server = subprocess.Popen(
            pinned(self.server_on, [self.options.server, f"--config={self.folder}/server.conf"],
                   RAISED),
            stdout=subprocess.DEVNULL)
        if self.generators_on:
            os.sched_setaffinity(0, self.generators_on)
        for tenant in TENANTS:
            query = subprocess.run(
                [self.options.ckv, "seed", f"--server={self.address}", "--prefix=load",
                 "--tokens=8192", "--print_query", "--connect_timeout=20s",
                 f"--tls_ca={self.folder}/ca.crt", f"--tls_cert={self.folder}/{tenant}.crt",
                 f"--tls_key={self.folder}/{tenant}.key"],
                check=True, capture_output=True, text=True).stdout
            (self.folder / f"{tenant}.bin").write_bytes(
                messages.select_request(json.loads(query)))
        return self

    def __exit__(self, *_):
        self.server.terminate()
        self.server.wait(timeout=60)

    def stages(self):
        """{stage: cumulative [(seconds, count)]} of the server's life."""
        with urllib.request.urlopen(f"http://localhost:{self.metrics_port}/metrics",
                                    timeout=10) as answer:
            text = answer.read().decode()
        found = {stage: [] for stage in STAGES}
        for stage, bound, count in re.findall(
                r'clusterkv_stage_seconds_bucket\{stage="(\w+)",le="([^"]+)"\} (\d+)', text):
            if stage in found:
                found[stage].append((float(bound), int(count)))
        return found

    def run(self, rates):
        """{tenant: calls per second} at once, each call answered.

        Returns {tenant: (p50, p99) in ms} and {stage: p99 in ms} of all calls together.
        """
        before = self.stages()
        processes = {}
        for tenant, rate in rates.items():
            processes[tenant] = subprocess.Popen(
                pinned(self.generators_on,
                       [self.options.ghz, "--cacert", self.folder / "ca.crt", "--cert",
                        self.folder / f"{tenant}.crt", "--key", self.folder / f"{tenant}.key",
                        "--async", f"--rps={rate}", f"--total={rate * self.options.seconds}",
                        "-c", "64", "--connections=4",
                        "--call=clusterkv.v1.CacheService/SelectClusters", "-B",
                        self.folder / f"{tenant}.bin", "-O", "json", self.address],
                       REAL_TIME if tenant == "quiet" else ()),
                stdout=subprocess.PIPE)
        result = {}
        for tenant, process in processes.items():
            report = json.loads(process.communicate(timeout=120)[0])
            codes = report["statusCodeDistribution"]
            if set(codes) != {"OK"}:
                raise RuntimeError(f"{tenant} at {rates}: {codes} {report['errorDistribution']}")
            if report["rps"] < 0.9 * rates[tenant]:
                raise TooFast(f"{tenant}: {report['rps']:.0f} of {rates[tenant]} calls/s")
            result[tenant] = percentiles(report)
        stages = {}
        for stage, after in self.stages().items():
            grown = [(bound, count - was) for (bound, count), (_, was) in zip(after, before[stage])]
            stages[stage] = 1e3 * quantile(grown, 0.99)
        return result, stages

    def knee(self):
        knee = 0
        for rate in LADDER:
            try:
                both, stages = self.run({tenant: rate // 2 for tenant in TENANTS})
            except TooFast as late:
                print(f"  {rate:5} calls/s together: {late}", flush=True)
                break
            print(f"  {rate:5} calls/s together: " + ", ".join(
                f"{tenant} p50 {p50:.2f}, p99 {p99:.2f} ms" for tenant, (p50, p99) in both.items())
                + f"; {told(stages)}", flush=True)
            if max(p99 for _, p99 in both.values()) > self.options.p99_ms:
                break
            knee = rate
        return knee


def told(stages):
    return "stages' p99 " + ", ".join(
        f"{stage} {ms:.2f}" for stage, ms in stages.items() if not math.isnan(ms)) + " ms"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("server", "ckv", "ghz"):
        parser.add_argument(name, type=lambda path: shutil.which(path) or path)
    parser.add_argument("--p99_ms", type=float, default=20)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--knee", type=int, help="calls per second, where it is known already")
    parser.add_argument("--server_processors", type=int, default=1, help="0: none is anybody's")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Bench(options, pathlib.Path(folder)) as bench:
        bench.run({tenant: 50 for tenant in TENANTS})  # warm
        knee = options.knee or bench.knee()
        if knee == 0:
            print(f"not even {LADDER[0]} calls/s are within {options.p99_ms} ms")
            return 1
        rate = max(1, knee // 11)
        plans = {"alone": {"quiet": rate}, "beside as much": {"quiet": rate, "loud": rate},
                 "beside ten times as much": {"quiet": rate, "loud": 10 * rate}}
        seen = {name: [] for name in plans}
        for _ in range(options.rounds):
            for name, rates in plans.items():
                both, stages = bench.run(rates)
                seen[name].append((*both["quiet"], both.get("loud", (0, 0))[1]))
                print(f"  {name}: {both} {told(stages)}", flush=True)
                time.sleep(0.5)
        print(f"knee {knee} calls/s; quiet at {rate} calls/s, medians (least to most) of "
              f"{options.rounds} rounds of {options.seconds} s:")
        report = {}
        for name, rounds in seen.items():
            p50, p99, loud = zip(*rounds)
            report[name] = {"p50_ms": p50, "p99_ms": p99, "loud_p99_ms": loud}
            print(f"  {name:25} p50 {statistics.median(p50):6.2f} ({min(p50):.2f} to "
                  f"{max(p50):.2f}) ms, p99 {statistics.median(p99):6.2f} ({min(p99):.2f} to "
                  f"{max(p99):.2f}) ms; the loud one's p99 {statistics.median(loud):.2f} ms")
        if options.json:
            options.json.write_text(json.dumps(
                {"knee": knee, "quiet_rate": rate, "quiet": report,
                 "processors": None if bench.server_on is None else
                 {"server": len(bench.server_on), "generators": len(bench.generators_on)},
                 "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
