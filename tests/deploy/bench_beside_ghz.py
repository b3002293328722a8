#!/usr/bin/env python3
"""`ckv bench` beside ghz on the same load, in alternating rounds: do they tell the same?

Usage: bench_beside_ghz.py SERVER CKV GHZ [--rps=500] [--seconds=4] [--rounds=7] [--json=FILE]
Unary SelectClusters as protobuf, open loop, as many connections and workers on both sides. Prints
p50 and p99 of each, medians over the rounds, and the p50's ratio. Where there are two processors
or more the server has one for itself and the generators another.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import fairness  # its way to pin, its messages
from ports import free_port

CONNECTIONS, WORKERS = 4, 32


def percentiles(report, rps):
    codes = report["statusCodeDistribution"]
    if set(codes) != {"OK"} or report["rps"] < 0.9 * rps:
        raise RuntimeError(f"{codes} at {report['rps']:.0f} of {rps} calls/s")
    return fairness.percentiles(report)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("server", "ckv", "ghz"):
        parser.add_argument(name, type=lambda path: shutil.which(path) or path)
    parser.add_argument("--rps", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    server_on, generators_on = fairness.processors(1)
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        fairness.pinned(server_on, [options.server, f"--listen={address}",
                                    "--admin_listen=127.0.0.1:0", "--arena_bytes=512MiB",
                                    "--log_level=error"]), stdout=subprocess.DEVNULL)
    seen = {"ghz": [], "ckv bench": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            query = subprocess.run(
                [options.ckv, "seed", f"--server={address}", "--tokens=8192", "--print_query",
                 "--connect_timeout=20s"], check=True, capture_output=True, text=True).stdout
            request = pathlib.Path(folder) / "select.bin"
            request.write_bytes(fairness.messages.select_request(json.loads(query)))
            commands = {
                "ghz": [options.ghz, "--insecure", "--async", f"--rps={options.rps}",
                        f"--total={options.rps * options.seconds}", "-c", str(WORKERS),
                        f"--connections={CONNECTIONS}", "-O", "json", "-B", request,
                        "--call=clusterkv.v1.CacheService/SelectClusters", address],
                "ckv bench": [options.ckv, "bench", f"--server={address}", f"--rps={options.rps}",
                              f"--duration={options.seconds}s", f"--concurrency={WORKERS}",
                              f"--connections={CONNECTIONS}", "--json=-"]}
            for _ in range(options.rounds):
                for name, command in commands.items():
                    out = subprocess.run(fairness.pinned(generators_on, command), check=True,
                                         stdout=subprocess.PIPE, timeout=120).stdout
                    seen[name].append(percentiles(json.loads(out), options.rps))
    finally:
        server.terminate()
        server.wait(timeout=60)
    p50 = {}
    for name, rounds in seen.items():
        fifty, ninety_nine = zip(*rounds)
        p50[name] = statistics.median(fifty)
        print(f"{name:10} p50 {p50[name]:.3f} ({min(fifty):.3f} to {max(fifty):.3f}) ms, "
              f"p99 {statistics.median(ninety_nine):.3f} ({min(ninety_nine):.3f} to "
              f"{max(ninety_nine):.3f}) ms")
    print(f"p50 of ckv bench is {p50['ckv bench'] / p50['ghz']:.3f} of ghz's "
          f"({options.rps} calls/s, {options.rounds} rounds of {options.seconds} s)")
    if options.json:
        options.json.write_text(json.dumps(seen, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
