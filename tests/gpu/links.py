#!/usr/bin/env python3
"""Two processes over every link: a server on one GPU, ckv replay on another (or the same).

Usage: links.py --bin=DIR --out=DIR [--trace=FILE ...] [--faults] [--kills=N]
Without --faults: replays the trace over peer, nccl (by NVLink, and by its sockets) and grpc, each
alone and two at once, with and without corrections (codecs k8v4 and raw), and against a server
without a GPU. Recalled bytes and corrections must be the same over all of them, and the selections
those of the CPU in 99.9 % of tokens.
With --faults: kills the worker in the middle of a replay, --kills times per link; each time the
server must serve another replay within 3 s, and at the end hold as much GPU memory as before;
then stops a worker for 10 s, and kills the server.
Writes DIR/links.json or DIR/faults.json, as gpu.json.
"""
import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

RECOVERY_SECONDS = 3.0
# The driver takes memory for itself by 2 MiB as it needs it, and keeps it: 2 to 4 MiB more within 20
# to 60 kills. Ours is counted to the byte.
DRIVER_KEEPS_MIB = 6


def gpus():
    listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
                            capture_output=True, text=True, check=True)
    return listed.stdout.split("\n")[:-1]


def memory_of(pid):
    """MiB that a process holds on all GPUs, or of all GPUs where processes are not told apart."""
    listed = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=True)
    of = [int(m[2]) for m in re.finditer(r"(\d+), (\d+)", listed.stdout) if int(m[1]) == pid]
    if of:
        return sum(of)
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                            capture_output=True, text=True, check=True)
    return sum(int(line) for line in listed.stdout.split())


# Neither NVLink nor shared memory: NCCL's sockets, the way across hosts without InfiniBand.
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket",
           "NCCL_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,P2P"}


class Server:
    def __init__(self, args, device, environment=None, arena="2GiB"):
        self.args = args
        self.environment = os.environ | (environment or {})
        self.log = open(args.out / f"server.{device.replace(':', '')}.log", "a")
        self.process = subprocess.Popen(
            [args.bin / "clusterkv-server", f"--device={device}", "--listen=127.0.0.1:0",
             "--admin_listen=127.0.0.1:0", f"--arena_bytes={arena}", "--session_ttl_ms=2000"],
            stdout=subprocess.PIPE, stderr=self.log, text=True, env=self.environment)
        line = self.process.stdout.readline()
        match = re.match(r"listening on (\S+), admin on (\S+)", line)
        if match is None:
            raise RuntimeError(f"the server did not start: see {self.log.name}")
        self.address, self.admin = match[1], match[2]

    def replay_command(self, link, device, *more):
        return [self.args.bin / "ckv", "replay", f"--server={self.address}", f"--link={link}",
                f"--device={device}", *more, *self.args.trace]

    def status(self):
        done = subprocess.run([self.args.bin / "ckv", "status", f"--server={self.address}",
                               f"--admin={self.admin}", "--json=-"], capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def await_selects(self, process):
        """Until `process`, the only worker, has begun to decode, or ended."""
        selects = lambda: self.status().get("stats", {}).get("selects", 0)
        before = selects()
        deadline = time.monotonic() + 30
        while selects() == before and process.poll() is None and time.monotonic() < deadline:
            pass

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1


def replay(server, link, device, name, *more):
    out = server.args.out
    command = server.replay_command(link, device, f"--json={out / name}.json",
                                    f"--selections={out / name}.selections", *more)
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env=server.environment)
    seconds = time.monotonic() - begin
    if done.returncode != 0:
        raise RuntimeError(f"{name}: exit {done.returncode}: {done.stderr[-800:]}")
    report = json.loads((out / f"{name}.json").read_text())
    return report["runs"][0] | {"layers": report["layers"]}, seconds


def equal_share(a, b):
    """The share of selected tokens of `a` that `b` selected too, in the same step and head."""
    both = total = 0
    for left, right in zip(a.read_text().splitlines(), b.read_text().splitlines()):
        wanted, got = left.split(":")[1].split(), set(right.split(":")[1].split())
        total += len(wanted)
        both += sum(position in got for position in wanted)
    return both / max(total, 1)


def try_replay(server, link, device, name, failures, *more):
    """A replay over that link and no other; None after a failure."""
    try:
        run, _ = replay(server, link, device, name, *more)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        failures.append(str(error))
        return None
    if run["link"] != link:
        failures.append(f"{name}: went over {run['link']}: {run['link_reason']}")
    return run


def replay_over_links(args, codec, links, worker, failures):
    """Over each link alone, and over the first two at once; NCCL's sockets too. By name."""
    of = f"--codec={codec}"
    server = Server(args, "cuda:0")
    runs = {f"{link}.{codec}": try_replay(server, link, worker, f"{link}.{codec}", failures, of)
            for link in links}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        beside = {f"{link}.{codec}.beside": None for link in links[:2]}
        both = [pool.submit(try_replay, server, link, worker, name, failures, of)
                for link, name in zip(links, beside)]
        runs |= {name: run.result() for name, run in zip(beside, both)}
    print(json.dumps(server.status(), indent=1)[:3000])
    code = server.stop()
    if code != 0:
        failures.append(f"the server ended with {code}")
    if "nccl" in links:
        name = f"nccl.{codec}.sockets"
        server = Server(args, "cuda:0", SOCKETS | {"NCCL_DEBUG_FILE": f"{args.out / name}.%p.log"})
        runs[name] = try_replay(server, "nccl", worker, name, failures, of)
        server.stop()
        said = "".join(log.read_text() for log in args.out.glob(f"{name}.*.log"))
        if "via NET/Socket" not in said or "via P2P" in said or "via SHM" in said:
            failures.append(f"{name}: not by sockets: {said[-800:]}")
    return {name: run for name, run in runs.items() if run is not None}


def rows_of_replay(args, codec, name, runs, reference, failures):
    run = runs[name]
    share = equal_share(args.out / f"cpu.{codec}.selections", args.out / f"{name}.selections")
    if not share >= 0.999:
        failures.append(f"{name}: {share:.5f} of the CPU's tokens")
    rows = [{"name": f"replay over {name}: tokens selected as the CPU does", "value": share,
             "unit": "share", "peer": "CPU server", "peer_value": 1.0, "ratio": share,
             "target": ">= 0.999"}]
    for i, layer in enumerate(run["layers"]):
        for what in ("recalled", "correction") if codec != "raw" else ("recalled",):
            same = all(layer[f"{what}_digest"] == other["layers"][i][f"{what}_digest"]
                       for other in runs.values())
            if not same:
                failures.append(f"{name}: other {what} bytes than over other links, layer {i}")
            rows.append({"name": f"replay over {name}, layer {i}: {what} bytes",
                         "value": int(same), "unit": "1: those of all links", "peer": "all links",
                         "peer_value": 1, "ratio": int(same), "target": "1"})
        for what in ("select_us", "recall_us"):
            value = layer[what]["p50"]
            peer = reference["layers"][i][what]["p50"]
            rows.append({"name": f"replay over {name}, layer {i}: {what} p50", "value": value,
                         "unit": "us", "peer": "CPU server over grpc", "peer_value": peer,
                         "ratio": value / peer if peer else None, "target": None})
        error, peer = layer["output_error"], reference["layers"][i]["output_error"]
        rows.append({"name": f"replay over {name}, layer {i}: output error", "value": error,
                     "unit": "of |full|", "peer": "CPU server", "peer_value": peer,
                     "ratio": error / peer, "target": "as the CPU"})
    rows.append({"name": f"replay over {name}: prefill", "value": run["ingest_seconds"],
                 "unit": "s", "peer": "CPU server", "peer_value": reference["ingest_seconds"],
                 "ratio": run["ingest_seconds"] / reference["ingest_seconds"], "target": None})
    return rows


def run_links(args, failures):
    rows = []
    several = len(gpus()) > 1
    worker = "cuda:1" if several else "cuda:0"
    # NCCL refuses two ranks on one GPU.
    links = ["peer", "nccl", "grpc"] if several else ["peer", "grpc"]
    for codec in ("raw", "k8v4"):  # k8v4: records beside which corrections are answered
        cpu = Server(args, "cpu")
        reference, _ = replay(cpu, "grpc", "cpu", f"cpu.{codec}", f"--codec={codec}")
        cpu.stop()
        runs = replay_over_links(args, codec, links, worker, failures)
        for name in runs:
            rows += rows_of_replay(args, codec, name, runs, reference, failures)
    return rows


def run_service(args, failures):
    """Selects of a 32k context of Llama-3.1-8B's heads: a server with a GPU beside one without."""
    rows, found = [], {}
    shape = ["--tokens=32768", "--layers=1", "--kv_heads=8", "--query_heads=32", "--head_dim=128"]
    loads = {"one at a time": ["--items=1", "--concurrency=1"],
             "batches of 16": ["--items=16", "--concurrency=1"],
             "batches of 16, 4 at a time": ["--items=16", "--concurrency=4", "--connections=4"]}
    for device in ("cpu", "cuda:0"):
        server = Server(args, device, arena="4GiB")
        seeded = subprocess.run([args.bin / "ckv", "seed", f"--server={server.address}",
                                 "--sequences=2", *shape], capture_output=True, text=True)
        if seeded.returncode != 0:
            failures.append(f"seed on {device}: {seeded.stderr[-500:]}")
        for name, load in loads.items():
            report = args.out / f"bench.{device.replace(':', '')}.{len(found)}.json"
            done = subprocess.run([args.bin / "ckv", "bench", f"--server={server.address}",
                                   "--duration=3s", f"--json={report}", *load],
                                  capture_output=True, text=True)
            if done.returncode != 0:
                failures.append(f"bench on {device}: {done.stderr[-500:]}")
                continue
            found[device, name] = json.loads(report.read_text())
        print(device, json.dumps(server.status().get("stats", {})))
        server.stop()
    for name, load in loads.items():
        runs = [found.get((device, name)) for device in ("cuda:0", "cpu")]
        if None in runs:
            continue
        items = int(load[0].split("=")[1])
        p50 = [next(entry["latency"] for entry in run["latencyDistribution"]
                    if entry["percentage"] == 50) / 1e3 for run in runs]
        rates = [run["rps"] * items for run in runs]
        rows.append({"name": f"select over gRPC, 32k x 8 heads, {name}: p50", "value": p50[0],
                     "unit": "us", "peer": "CPU server", "peer_value": p50[1],
                     "ratio": p50[0] / p50[1], "target": None})
        rows.append({"name": f"select over gRPC, 32k x 8 heads, {name}: selects", "value": rates[0],
                     "unit": "1/s", "peer": "CPU server", "peer_value": rates[1],
                     "ratio": rates[0] / rates[1], "target": None})
    return rows


def kill_worker(server, link, worker, seconds):
    """Kills a worker `seconds` after it began to decode; whether it was decoding still."""
    process = subprocess.Popen(server.replay_command(link, worker), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=server.environment)
    server.await_selects(process)
    time.sleep(seconds)
    decoded = process.poll() is None
    process.kill()
    process.wait()
    return decoded


def settled_memory(server, link, failures):
    """(what the server allocated, bytes; what the driver counts, MiB), once the sessions of killed
    workers have ended by their ttl, and with them attachments and links."""
    deadline = time.monotonic() + 15
    while server.status().get("stats", {}).get("attachments") != 0:
        if time.monotonic() > deadline:
            failures.append(f"{link}: attachments of killed workers are still there")
            break
        time.sleep(0.5)
    time.sleep(1)
    return server.status()["stats"]["device_memory_bytes"], memory_of(server.process.pid)


def memory_rows(link, before, after, failures):
    """Rows of two settled_memory, between which workers were killed."""
    if after[0] != before[0]:
        failures.append(f"{link}: the server holds {after[0]} bytes of the GPU, {before[0]} before")
    if after[1] > before[1] + DRIVER_KEEPS_MIB:
        failures.append(f"{link}: {before[1]} MiB of GPU memory before, {after[1]} after")
    return [{"name": f"{link}: GPU memory that the server holds after the kills",
             "value": after[0], "unit": "bytes", "peer": "before", "peer_value": before[0],
             "ratio": after[0] / max(before[0], 1), "target": "1"},
            {"name": f"{link}: GPU memory after the kills", "value": after[1], "unit": "MiB",
             "peer": "before", "peer_value": before[1], "ratio": after[1] / max(before[1], 1),
             "target": f"at most {DRIVER_KEEPS_MIB} more"}]


def kill_workers(server, link, worker, args, rng, failures):
    """Kills a worker in the middle of its decode again and again, a replay after each."""
    before_run, _ = replay(server, link, worker, f"{link}.whole")
    decoding = before_run["decode_seconds"]
    # What stays loaded after the first replay, and after the first link that broke, is no loss.
    kill_worker(server, link, worker, decoding * 0.4)
    _, short = replay(server, "grpc", "cpu", f"{link}.other", "--steps=2")
    before = settled_memory(server, link, failures)
    recoveries, in_time = [], 0
    for kill in range(args.kills):
        in_time += kill_worker(server, link, worker, decoding * rng.uniform(0.0, 0.8))
        try:
            _, seconds = replay(server, "grpc", "cpu", f"{link}.other", "--steps=2")
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failures.append(f"{link}: after kill {kill}: {error}")
            break
        recoveries.append(seconds - short)
    memory = memory_rows(link, before, settled_memory(server, link, failures), failures)
    print(f"{link}: {in_time} of {args.kills} workers were killed while they decoded")
    if in_time < args.kills * 0.8:
        failures.append(f"{link}: only {in_time} workers were killed while they decoded")
    worst = max(recoveries, default=-1)
    if not 0 <= len(recoveries) == args.kills or worst > RECOVERY_SECONDS:
        failures.append(f"{link}: {len(recoveries)} of {args.kills}, slowest {worst:.2f} s")
    run, _ = replay(server, link, worker, f"{link}.after")
    for a, b in zip(run["layers"], before_run["layers"]):
        if a["recalled_digest"] != b["recalled_digest"]:
            failures.append(f"{link}: other bytes after the kills than before")
    return [{"name": f"{link}: worker killed {args.kills} times: another replay, slowest over "
                     "an undisturbed one", "value": worst, "unit": "s", "peer": "undisturbed",
             "peer_value": short, "ratio": None, "target": f"<= {RECOVERY_SECONDS}"}] + memory


def run_faults(args, failures):
    rows = []
    names = gpus()
    worker = "cuda:1" if len(names) > 1 else "cuda:0"
    args.trace = args.trace[:1]
    server = Server(args, "cuda:0")
    rng = random.Random(args.seed)
    print(f"seed {args.seed}")
    for link in [one for one in args.links.split(",") if one != "nccl" or len(names) > 1]:
        rows += kill_workers(server, link, worker, args, rng, failures)
    code = server.stop()
    if code != 0:
        failures.append(f"the server ended with {code}")
    return rows


def begin_replay(server, link, device, name):
    """A replay that decodes; what it reports goes to NAME.json."""
    process = subprocess.Popen(
        server.replay_command(link, device, f"--json={server.args.out / name}.json"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    server.await_selects(process)
    return process


def stop_and_kill(args, link, failures):
    """A worker that stands still for 10 s, and a server that is killed, amid recalls."""
    rows = []
    worker = "cuda:1" if len(gpus()) > 1 else "cuda:0"
    server = Server(args, "cuda:0")
    whole, _ = replay(server, link, worker, f"{link}.undisturbed")
    _, short = replay(server, "grpc", "cpu", f"{link}.other", "--steps=2")

    # Its session ends meanwhile (2 s), its attachment with it: it must attach anew.
    process = begin_replay(server, link, worker, f"{link}.stopped")
    process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, seconds = replay(server, "grpc", "cpu", f"{link}.other", "--steps=2")
    time.sleep(max(0, 10 - (time.monotonic() - stopped)))
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=120)[0]
    same = False
    if process.returncode == 0:
        layers = json.loads((args.out / f"{link}.stopped.json").read_text())["layers"]
        same = all(a["output_error"] == b["output_error"]
                   for a, b in zip(layers, whole["layers"]))
    if not same:
        failures.append(f"{link}: stopped for 10 s: exit {process.returncode}: {said[-500:]}")
    if seconds - short > RECOVERY_SECONDS:
        failures.append(f"{link}: {seconds - short:.2f} s late beside a stopped worker")
    rows.append({"name": f"{link}: worker stopped for 10 s: another replay over an undisturbed "
                         "one", "value": seconds - short, "unit": "s", "peer": "undisturbed",
                 "peer_value": short, "ratio": None, "target": f"<= {RECOVERY_SECONDS}"})
    rows.append({"name": f"{link}: worker stopped for 10 s: its output afterwards",
                 "value": int(same), "unit": "1: as undisturbed", "peer": "undisturbed",
                 "peer_value": 1, "ratio": int(same), "target": "1"})

    process = begin_replay(server, link, worker, f"{link}.orphan")
    server.process.kill()
    server.process.wait()
    killed = time.monotonic()
    try:
        said = process.communicate(timeout=60)[0]
        seconds = time.monotonic() - killed
    except subprocess.TimeoutExpired:
        process.kill()
        said, seconds = "(still running after 60 s)", 60.0
    # A typed error, not a crash and not an answer.
    if process.returncode <= 0 or "Error" not in said and "UNAVAILABLE" not in said:
        failures.append(f"{link}: server killed: exit {process.returncode}: {said[-500:]}")
    print(f"{link}: server killed: the worker says: {said.strip().splitlines()[-1:]}")
    rows.append({"name": f"{link}: server killed: until its worker ends with an error",
                 "value": seconds, "unit": "s", "peer": None, "peer_value": None,
                 "ratio": None, "target": None})
    server = Server(args, "cuda:0")
    again, _ = replay(server, link, worker, f"{link}.restarted")
    if any(a["recalled_digest"] != b["recalled_digest"]
           for a, b in zip(again["layers"], whole["layers"])):
        failures.append(f"{link}: other bytes from the server's successor")
    server.stop()
    return rows


def run_stops(args, failures):
    """All links at once, each with servers of its own: most of it is waiting."""
    links = [one for one in args.links.split(",") if one != "nccl" or len(gpus()) > 1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(stop_and_kill, args, link, failures) for link in links]
        return [row for run in runs for row in run.result()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--trace", action="append")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--links", default="peer,nccl,grpc", help="of --faults")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CLUSTERKV_TEST_SEED", "1")))
    args = parser.parse_args()
    if not args.trace:
        data = pathlib.Path(__file__).resolve().parent.parent / "data"
        args.trace = sorted(data.glob("moby_dick_8k.layer*.safetensors"))
    args.out.mkdir(parents=True, exist_ok=True)
    failures = []
    if args.faults:
        rows = run_faults(args, failures) + run_stops(args, failures)
    else:
        rows = run_links(args, failures) + run_service(args, failures)
    for row in rows:
        print(f"{row['name']}: {row['value']} {row['unit']} ({row['peer']}: {row['peer_value']})")
    name = "faults.json" if args.faults else "links.json"
    names = gpus()
    report = {"machine": f"{len(names)} x {names[0]}", "date": str(datetime.date.today()),
              "rows": rows}
    (args.out / name).write_text(json.dumps(report, indent=1) + "\n")
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
