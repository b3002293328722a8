#!/usr/bin/env python3
"""Two processes and no host between them: a server on one GPU, an engine on another whose steps the
server's GPU answers by itself (resident_loop).

Usage: resident.py --bin=DIR --out=DIR [--kills=N] [--only=compare,measure | --only=kills]
Outputs must be those of a DecodeSession over gRPC; a step's layer is timed beside the same engine
over gRPC; and a worker that is killed in the middle of a step must cost others no more than 3 s and
no GPU memory. Writes DIR/resident.json, as gpu.json.
"""
import argparse
import datetime
import json
import os
import pathlib
import random
import subprocess
import sys
import time

from links import RECOVERY_SECONDS, Server, gpus, replay, settled_memory

# (sequences, tokens) of what is timed, four layers each.
SHAPES = ((1, 32768), (4, 32768), (16, 8192))


def loop_command(server, worker, *more):
    return [server.args.bin / "resident_loop", f"--server={server.address}", f"--device={worker}",
            *more]


def run_loop(server, worker, name, failures, *more):
    """What it prints; empty after a failure."""
    done = subprocess.run(loop_command(server, worker, *more), capture_output=True, text=True,
                          timeout=200)
    print(f"{name}: {done.stdout.strip()} {done.stderr[-500:]}", flush=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    failures.append(f"{name}: exit {done.returncode}: {done.stderr[-500:]}")
    return {}


def compare(server, worker, failures):
    rows = []
    for sequences in (1, 3):
        name = f"resident, {sequences} sequences: largest difference to gRPC's outputs"
        found = run_loop(server, worker, name, failures, "--compare", f"--sequences={sequences}",
                         "--steps=140")
        if not found:
            continue
        if found["clustered"] < 128:
            failures.append(f"{name}: {found['clustered']} decoded tokens were clustered")
        rows.append({"name": name, "value": found["largest_error"], "unit": "of their rms",
                     "peer": "SelectAndRecall", "peer_value": 0, "ratio": None,
                     "target": "<= 0.02"})
    return rows


def measure(server, worker, failures):
    rows = []
    for sequences, tokens in SHAPES:
        name = f"resident step of a layer, {tokens} x {sequences}: p50"
        found = run_loop(server, worker, name, failures, f"--sequences={sequences}",
                         f"--tokens={tokens}", "--layers=4", "--steps=500")
        if not found:
            continue
        rows.append({"name": name, "value": found["resident_us"], "unit": "us",
                     "peer": "the same engine over gRPC", "peer_value": found["grpc_us"],
                     "ratio": found["resident_us"] / found["grpc_us"], "target": None})
    return rows


def kill_worker(server, worker, seconds, failures):
    """Kills a worker so many seconds after it began to replay steps."""
    process = subprocess.Popen(loop_command(server, worker, "--forever"), stdout=subprocess.PIPE,
                               text=True)
    process.stdout.readline()
    time.sleep(seconds)
    if process.poll() is not None:
        failures.append(f"resident: the worker ended by itself: {process.returncode}")
    process.kill()
    process.wait()


def kills(server, worker, args, failures):
    rng = random.Random(args.seed)
    print(f"seed {args.seed}")
    # What stays loaded after the first group, and after the first one that broke, is no loss.
    run_loop(server, worker, "before the kills", failures, "--steps=10")
    kill_worker(server, worker, 0.1, failures)
    replay(server, "grpc", "cpu", "resident.other", "--steps=2")
    before = settled_memory(server, "resident", failures)
    _, short = replay(server, "grpc", "cpu", "resident.other", "--steps=2")
    recoveries = []
    for _ in range(args.kills):
        kill_worker(server, worker, rng.uniform(0.0, 0.3), failures)
        _, seconds = replay(server, "grpc", "cpu", "resident.other", "--steps=2")
        recoveries.append(seconds - short)
    after = settled_memory(server, "resident", failures)
    if after > before:
        failures.append(f"resident: {before} MiB of GPU memory before the kills, {after} after")
    if max(recoveries) > RECOVERY_SECONDS:
        failures.append(f"resident: another worker waited {max(recoveries):.2f} s")
    run_loop(server, worker, "after the kills", failures, "--compare", "--steps=20")
    return [{"name": f"resident: worker killed {args.kills} times: another replay, slowest over an "
                     "undisturbed one", "value": max(recoveries), "unit": "s",
             "peer": "undisturbed", "peer_value": short, "ratio": None,
             "target": f"<= {RECOVERY_SECONDS}"},
            {"name": "resident: GPU memory after the kills", "value": after, "unit": "MiB",
             "peer": "before", "peer_value": before, "ratio": after / max(before, 1),
             "target": "<= 1"}]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--only", default="compare,measure", help="or kills")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CLUSTERKV_TEST_SEED", "1")))
    args = parser.parse_args()
    data = pathlib.Path(__file__).resolve().parent.parent / "data"
    args.trace = sorted(data.glob("moby_dick_8k.layer*.safetensors"))[:1]
    args.out.mkdir(parents=True, exist_ok=True)
    names = gpus()
    worker = "cuda:1" if len(names) > 1 else "cuda:0"
    failures, rows = [], []
    server = Server(args, "cuda:0", arena="16GiB")
    for what in args.only.split(","):
        try:
            if what == "compare":
                rows += compare(server, worker, failures)
            elif what == "measure":
                rows += measure(server, worker, failures)
            else:
                rows += kills(server, worker, args, failures)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failures.append(f"{what}: {error}")
    print(json.dumps(server.status().get("stats", {})))
    code = server.stop()
    if code != 0:
        failures.append(f"the server ended with {code}")
    for row in rows:
        print(f"{row['name']}: {row['value']} {row['unit']} ({row['peer']}: {row['peer_value']})")
    report = {"machine": f"{len(names)} x {names[0]}", "date": str(datetime.date.today()),
              "rows": rows}
    (args.out / "resident.json").write_text(json.dumps(report, indent=1) + "\n")
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
