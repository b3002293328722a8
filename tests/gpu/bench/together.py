#!/usr/bin/env python3
"""Groups of one service GPU that ask at once: a resident kernel for each, and one for all.

A worker is a block of the same GPU: per layer 120 us of other work, the queries of its pairs
(eight of each sequence of 32,768 tokens), the wait for the last state. What a layer takes is
compared with what it takes alone, turn about in the same run.

Usage: together.py --lib=libckv_decode_loop.so --out=FILE [--rounds=N] [--repeats=N]
"""
import argparse
import ctypes
import datetime
import json
import os
import pathlib
import statistics

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # loading waits for a resident kernel's end

LAYERS, TOKENS, TOKENS_PER_CLUSTER, BUSY_NS = 2, 32768, 16, 120_000
# As decode_loop.py has them.
WINDOW, SLOTS, BUDGET, STEPS, QUERY_SIZE, HOLD, PREFETCH_MB = 160, 256, 64, 128, 2.0, 20, 32
POOL = 128  # blocks of all kernels

# Groups, sequences of each, blocks and blocks per pair of a group alone, and of each of so many
# kernels.
CASES = (
    (2, 1, (64, 8), {1: (64, 8), 2: (48, 6)}),
    (2, 4, (64, 2), {1: (64, 2), 2: (64, 2)}),
    (2, 8, (64, 1), {1: (64, 1), 2: (64, 1)}),
    (2, 12, (96, 1), {1: (96, 1), 2: (64, 1)}),
    (2, 16, (128, 1), {1: (128, 1), 2: (64, 1)}),
    (3, 16, (128, 1), {1: (128, 1), 3: (42, 1)}),
    (4, 8, (64, 1), {2: (64, 1), 4: (32, 1)}),
)


class Loops:
    def __init__(self, path, sequences):
        self.lib = ctypes.CDLL(path)
        self.call("cache", 0, 0, sequences, LAYERS, TOKENS, 0, TOKENS_PER_CLUSTER)

    def call(self, name, *args):
        error = getattr(self.lib, f"ckv_loop_{name}")(*args)
        if error != 0:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def groups(self, count, sequences):
        self.lib.ckv_loop_drop()
        for _ in range(count):
            self.call("ends", sequences, WINDOW, SLOTS, BUDGET, 1, POOL, STEPS,
                      ctypes.c_float(QUERY_SIZE), HOLD, PREFETCH_MB)
            self.lib.ckv_loop_keep()

    def run(self, count, kernels, place, rounds):
        """Microseconds of each layer, by group."""
        times = (ctypes.c_int64 * (count * rounds))()
        self.call("together", count, kernels, *place, rounds, BUSY_NS, times)
        return [[t / 1e3 for t in times[g * rounds:(g + 1) * rounds]][rounds // 10:]
                for g in range(count)]


def summary(samples):
    ordered = sorted(samples)
    return {"p50": round(statistics.median(ordered), 1),
            "p10": round(ordered[len(ordered) // 10], 1),
            "p90": round(ordered[len(ordered) * 9 // 10], 1),
            "p99": round(ordered[len(ordered) * 99 // 100], 1)}


def measure(loops, case, rounds, repeats):
    """What a layer takes alone, and of so many kernels: of the group that is slowest."""
    count, sequences, alone, shared = case
    loops.groups(count, sequences)
    ways = {None: (1, 1, alone)} | {kernels: (count, kernels, shared[kernels]) for kernels in shared}
    times = {way: [[] for _ in range(how[0])] for way, how in ways.items()}
    for _ in range(repeats):
        for way, how in ways.items():
            for group, samples in enumerate(loops.run(*how, rounds)):
                times[way][group] += samples
    found = {way: max((summary(samples) for samples in groups), key=lambda s: s["p50"])
             for way, groups in times.items()}
    return found.pop(None), found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    loops = Loops(options.lib, max(count * sequences for count, sequences, *_ in CASES))
    rows = []
    for case in CASES:
        count, sequences = case[:2]
        alone, shared = measure(loops, case, options.rounds, options.repeats)
        for kernels, found in shared.items():
            name = f"{count} groups of {TOKENS} x {sequences} at once, kernels: {kernels}"
            ratio = alone["p50"] / found["p50"]
            rows.append({"name": f"{name}: a layer, p50 of the slowest", "value": found["p50"],
                         "unit": "us", "peer": "a group alone", "peer_value": alone["p50"],
                         "ratio": ratio, "target": ">= 0.8" if case[:2] == (2, 16) else None,
                         "spread": found, "peer_spread": alone})
            print(f"{name}: {ratio:.2f} {found} alone {alone}", flush=True)
    result = {"date": datetime.date.today().isoformat(), "rows": rows}
    pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
