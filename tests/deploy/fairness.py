#!/usr/bin/env python3
"""Two tenants of one server under ghz: how long the quiet one waits beside the loud one.

Usage: fairness.py SERVER CKV GHZ [--p99_ms=20] [--seconds=8] [--rounds=3] [--json=FILE]
Starts a server with mutual TLS and the tenants quiet and loud. First the knee: the last rate of a
ladder, both tenants sending half of it, whose p99 is within --p99_ms. Then, round by round, the
quiet one sends an eleventh of the knee: alone, beside as much of the loud one, and beside ten times
as much. Prints the medians over the rounds. ghz and the server share this machine's processors: what
they take from each other counts too.
"""

import argparse
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

LADDER = (100, 200, 400, 600, 800, 1000, 1200, 1400, 1600, 2000, 2400)
TENANTS = ("quiet", "loud")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Bench:
    """A server, its certificates and its tenants' sequences, in a folder."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.address = f"localhost:{free_port()}"
        self.sign("ca", "basicConstraints=critical,CA:TRUE")
        self.sign("server", "subjectAltName=DNS:localhost")
        for tenant in TENANTS:
            self.sign(tenant, "extendedKeyUsage=clientAuth")
        (folder / "server.conf").write_text(
            f'listen: "{self.address}" admin_listen: "localhost:{free_port()}"\n'
            f'tls_certificate_file: "{folder}/server.crt" tls_key_file: "{folder}/server.key"\n'
            f'tls_client_ca_file: "{folder}/ca.crt" admin_identities: "nobody"\n'
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
        self.server = subprocess.Popen(
            [self.options.server, f"--config={self.folder}/server.conf"],
            stdout=subprocess.DEVNULL)
        for tenant in TENANTS:
            out = subprocess.run(
                [self.options.ckv, "seed", f"--server={self.address}", "--prefix=load",
                 "--sequences=4", "--tokens=8192", "--print_query", "--connect_timeout=20s",
                 f"--tls_ca={self.folder}/ca.crt", f"--tls_cert={self.folder}/{tenant}.crt",
                 f"--tls_key={self.folder}/{tenant}.key"],
                check=True, capture_output=True, text=True).stdout
            (self.folder / f"{tenant}.json").write_text(
                out.replace("load-0", "load-{{randomInt 0 4}}"))
        return self

    def __exit__(self, *_):
        self.server.terminate()
        self.server.wait(timeout=60)

    def run(self, rates):
        """{tenant: calls per second} at once; {tenant: (p50, p99) in ms}, each call answered."""
        processes = {}
        for tenant, rate in rates.items():
            processes[tenant] = subprocess.Popen(
                [self.options.ghz, "--cacert", self.folder / "ca.crt", "--cert",
                 self.folder / f"{tenant}.crt", "--key", self.folder / f"{tenant}.key", "--async",
                 f"--rps={rate}", f"--total={rate * self.options.seconds}", "-c", "64",
                 "--connections=4", "--call=clusterkv.v1.CacheService/SelectClusters", "-D",
                 self.folder / f"{tenant}.json", "-O", "json", self.address],
                stdout=subprocess.PIPE)
        result = {}
        for tenant, process in processes.items():
            report = json.loads(process.communicate(timeout=120)[0])
            codes = report["statusCodeDistribution"]
            if set(codes) != {"OK"}:
                raise RuntimeError(f"{tenant} at {rates}: {codes} {report['errorDistribution']}")
            ms = {row["percentage"]: row["latency"] / 1e6 for row in report["latencyDistribution"]}
            result[tenant] = (ms[50], ms[99])
        return result

    def knee(self):
        knee = 0
        for rate in LADDER:
            both = self.run({tenant: rate // 2 for tenant in TENANTS})
            print(f"  {rate:5} calls/s together: " + ", ".join(
                f"{tenant} p50 {p50:.2f}, p99 {p99:.2f} ms" for tenant, (p50, p99) in both.items()),
                flush=True)
            if max(p99 for _, p99 in both.values()) > self.options.p99_ms:
                break
            knee = rate
        return knee


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("server", "ckv", "ghz"):
        parser.add_argument(name)
    parser.add_argument("--p99_ms", type=float, default=20)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Bench(options, pathlib.Path(folder)) as bench:
        bench.run({tenant: 50 for tenant in TENANTS})  # warm
        knee = bench.knee()
        if knee == 0:
            print(f"not even {LADDER[0]} calls/s are within {options.p99_ms} ms")
            return 1
        rate = max(1, knee // 11)
        plans = {"alone": {"quiet": rate}, "beside as much": {"quiet": rate, "loud": rate},
                 "beside ten times as much": {"quiet": rate, "loud": 10 * rate}}
        seen = {name: [] for name in plans}
        for _ in range(options.rounds):
            for name, rates in plans.items():
                seen[name].append(bench.run(rates)["quiet"])
                time.sleep(0.5)
        print(f"knee {knee} calls/s; quiet at {rate} calls/s, medians of {options.rounds} rounds "
              f"of {options.seconds} s:")
        medians = {name: [statistics.median(v) for v in zip(*values)]
                   for name, values in seen.items()}
        for name, (p50, p99) in medians.items():
            print(f"  {name:25} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms")
        if options.json:
            options.json.write_text(json.dumps(
                {"knee": knee, "quiet_rate": rate, "quiet_ms": medians,
                 "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
