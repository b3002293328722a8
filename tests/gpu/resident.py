#!/usr/bin/env python3
"""Two processes and no host between them: a server on one GPU, an engine on another whose steps the
server's GPU answers by itself (resident_loop).

Usage: resident.py --bin=DIR --out=DIR [--kills=N] [--only=PART,...] [--memcheck]
Outputs must be those of a DecodeSession over gRPC. A step's layer is timed beside the same engine
over gRPC, and beside a model's matrix products; two engines at once, beside each alone. Beside
groups a worker over nccl must get gRPC, and a select its answer. A worker that is killed in the
middle of a step must cost others no more than 3 s, and no GPU memory. Writes DIR/resident.json, as
gpu.json.
"""
import argparse
import datetime
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

from links import RECOVERY_SECONDS, Server, gpus, memory_rows, replay, settled_memory

# (sequences, tokens, tokens per cluster) of what is timed, four layers each; 8,192 clusters have no
# room in a multiprocessor's memory.
SHAPES = ((1, 32768, 16), (4, 32768, 16), (8, 32768, 16), (16, 32768, 16), (4, 131072, 32))
# Sequences of 32,768 tokens of each of two loops. Both engines are on one GPU, so what stands for
# the matrix products of theirs leaves that to the other.
TOGETHER = (1, 4, 8, 16)
PRODUCTS_US = 120


def loop_command(server, worker, *more):
    return [server.args.bin / "resident_loop", f"--server={server.address}", f"--device={worker}",
            *more]


def run_loop(server, worker, name, failures, *more, under=()):
    """What it prints, perhaps under a checker; empty after a failure."""
    done = subprocess.run([*under, *loop_command(server, worker, *more)], capture_output=True,
                          text=True, timeout=200)
    print(f"{name}: {done.stdout.strip()} {done.stderr[-500:]}", flush=True)
    if done.returncode == 0:
        printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(printed[-1])  # a checker says more
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


def memcheck(server, worker, failures):
    """The worker's end. The server's does not end under the checker: its launches wait for the
    kernel that runs."""
    checker = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    run_loop(server, worker, "memcheck", failures, "--compare", "--tokens=1024", "--steps=70",
             under=checker)
    return []


def measure(server, worker, failures):
    rows = []
    for sequences, tokens, cluster in SHAPES:
        shape = f"{tokens} x {sequences}"
        await_room(server)
        found = run_loop(server, worker, shape, failures, f"--sequences={sequences}",
                         f"--tokens={tokens}", f"--cluster={cluster}", "--layers=4", "--steps=300",
                         "--products")
        if not found:
            continue
        rows.append({"name": f"resident step of a layer, {shape}: p50",
                     "value": found["resident_us"], "unit": "us",
                     "peer": "the same engine over gRPC", "peer_value": found["grpc_us"],
                     "ratio": found["resident_us"] / found["grpc_us"], "target": None})
        rows.append({"name": f"resident step of a layer, {shape}: added to matrix products, p50",
                     "value": found["beside_work_us"] - found["work_us"], "unit": "us",
                     "peer": "the matrix products", "peer_value": found["work_us"],
                     "ratio": found["beside_work_us"] / found["work_us"] - 1, "target": None})
    return rows


def together(server, worker, failures):
    rows = []
    for sequences in TOGETHER:
        shape = f"32768 x {sequences}"
        await_room(server)
        found = run_loop(server, worker, f"two loops of {shape}", failures, "--loops=2",
                         f"--sequences={sequences}", "--tokens=32768", "--layers=2",
                         "--steps=300", f"--busy_us={PRODUCTS_US}")
        if not found:
            continue
        for i, (alone, both) in enumerate(zip(found["alone_us"], found["together_us"])):
            rows.append({"name": f"two loops of {shape} at once, loop {i}: a layer, p50",
                         "value": both, "unit": "us", "peer": "the loop alone",
                         "peer_value": alone, "ratio": alone / both,
                         "target": "ratio (speed) >= 0.8"})
    return rows


def beside(server, worker, failures):
    """Other workers while one group runs, and two: seconds that their replays take."""
    rows, groups = [], []
    replay(server, "grpc", "cpu", "resident.other", "--steps=2")
    _, alone = replay(server, "grpc", "cpu", "resident.other", "--steps=2")
    try:
        for number in (1, 2):
            groups.append(begin_group(server, worker))
            run, _ = replay(server, "nccl", worker, "resident.nccl", "--steps=2")
            if run["link"] != "grpc":
                failures.append(f"beside {number} groups: a link over {run['link']}")
            _, seconds = replay(server, "grpc", "cpu", "resident.other", "--steps=2")
            if seconds - alone > RECOVERY_SECONDS:
                failures.append(f"beside {number} groups: a replay takes {seconds:.2f} s")
            rows.append({"name": f"another worker's replay beside {number} groups",
                         "value": seconds, "unit": "s", "peer": "without groups",
                         "peer_value": alone, "ratio": seconds / alone, "target": None})
    finally:
        for group in groups:
            group.kill()
            group.wait()
    return rows


def prompts(server, worker, _):
    """Seconds that a prompt takes to come in and be clustered, beside a small and a large group."""
    def seed():
        begin = time.monotonic()
        subprocess.run([server.args.bin / "ckv", "seed", f"--server={server.address}",
                        "--prefix=prompt", "--tokens=32768", "--layers=4", "--kv_heads=8",
                        "--query_heads=32", "--head_dim=128", "--replace"],
                       check=True, capture_output=True, timeout=60)
        return time.monotonic() - begin

    alone = statistics.median(seed() for _ in range(4))
    rows = []
    for sequences in (1, 16):
        group = begin_group(server, worker, f"--sequences={sequences}", "--tokens=8192")
        try:
            seconds = statistics.median(seed() for _ in range(3))
        finally:
            group.kill()
            group.wait()
        rows.append({"name": "a prompt of 32768 tokens, 4 layers, seeded beside a group of "
                             f"{sequences} sequences", "value": seconds, "unit": "s",
                     "peer": "without groups", "peer_value": alone, "ratio": seconds / alone,
                     "target": None})
        await_room(server)
    return rows


def await_room(server):
    """Until the last run's sequences are nobody's, so that they may be evicted."""
    deadline = time.monotonic() + 10
    while server.status()["stats"]["attachments"] != 0 and time.monotonic() < deadline:
        time.sleep(0.1)


def begin_group(server, worker, *more):
    """A worker that replays steps until it is killed."""
    process = subprocess.Popen(loop_command(server, worker, "--forever", *more),
                               stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def kill_worker(server, worker, seconds, failures):
    """Kills a worker so many seconds after it began to replay steps."""
    process = begin_group(server, worker)
    time.sleep(seconds)
    if process.poll() is not None:
        failures.append(f"resident: the worker ended by itself: {process.returncode}")
    process.kill()
    process.wait()


def kills(server, worker, failures):
    args = server.args
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
    memory = memory_rows("resident", before, settled_memory(server, "resident", failures), failures)
    if max(recoveries) > RECOVERY_SECONDS:
        failures.append(f"resident: another worker waited {max(recoveries):.2f} s")
    run_loop(server, worker, "after the kills", failures, "--compare", "--steps=20")
    return [{"name": f"resident: worker killed {args.kills} times: another replay, slowest over an "
                     "undisturbed one", "value": max(recoveries), "unit": "s",
             "peer": "undisturbed", "peer_value": short, "ratio": None,
             "target": f"<= {RECOVERY_SECONDS}"}] + memory


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--only", default="compare,beside,prompts,measure,together",
                        help="or kills")
    parser.add_argument("--memcheck", action="store_true", help="the worker's end under it, too")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CLUSTERKV_TEST_SEED", "1")))
    args = parser.parse_args()
    data = pathlib.Path(__file__).resolve().parent.parent / "data"
    args.trace = sorted(data.glob("moby_dick_8k.layer*.safetensors"))[:1]
    args.out.mkdir(parents=True, exist_ok=True)
    names = gpus()
    worker = "cuda:1" if len(names) > 1 else "cuda:0"
    failures, rows = [], []
    server = Server(args, "cuda:0", arena="16GiB")
    parts = {"compare": compare, "measure": measure, "together": together, "beside": beside,
             "prompts": prompts, "kills": kills, "memcheck": memcheck}
    # Kernels of two processes take turns on a GPU, milliseconds each: times say nothing there.
    timed = {"beside", "prompts", "measure", "together"} if len(names) == 1 else set()
    for what in args.only.split(",") + ["memcheck"] * args.memcheck:
        if what in timed:
            print(f"{what}: SKIPPED: both ends are on one GPU")
            continue
        try:
            rows += parts[what](server, worker, failures)
        except (RuntimeError, subprocess.SubprocessError) as error:
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
