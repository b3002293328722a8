#!/usr/bin/env python3
"""A decode loop of Llama-3.1-8B's shape with its KV cache on another GPU, against dense attention.

32 layers, 32 query heads over 8 KV heads of 128, bf16; every layer's matrix products (cuBLAS) and the
last one over the vocabulary, no norms or activations. The sparse loop asks a resident kernel on the
other GPU (kernels/resident); the dense one attends to a local cache, by PyTorch's fused attention or
by the project's own kernel, whichever is faster at the shape. Both are CUDA graphs of a whole step,
replayed in turn. Keys are synthetic, around centers; queries walk slowly.

Usage: decode_loop.py --lib=libckv_decode_loop.so --out=FILE [--shapes=32768x1,...] [--steps=N]
Needs PyTorch and two GPUs (with one, both ends share it: only good for a look).
"""
import argparse
import ctypes
import datetime
import json
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # loading waits for a resident kernel's end

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

WINDOW = 160  # the mean of a window that grows to 320
DIM, HEADS, QUERY_HEADS = 128, 8, 32
WHOLE, ALONE = 3, 6  # StepPart


class Loop:
    """The C interface of decode_loop.cu."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        for name in ("keys", "values", "queries"):
            getattr(self.lib, f"ckv_loop_{name}").restype = ctypes.c_void_p
        self.lib.ckv_loop_decode_kv_bytes.restype = ctypes.c_int64

    def call(self, name, *args):
        error = getattr(self.lib, f"ckv_loop_{name}")(*args)
        if error != 0:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def tensor(self, name, shape, *args):
        """A bf16 tensor over memory of the library."""
        pointer = getattr(self.lib, f"ckv_loop_{name}")(*args)
        count = 1
        for size in shape:
            count *= size

        class Interface:
            __cuda_array_interface__ = {
                "shape": (count,),
                "typestr": "<i2",
                "data": (pointer, False),
                "version": 3,
            }

        return torch.as_tensor(Interface(), device="cuda:0").view(torch.bfloat16).view(shape)


def stream():
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


class Model:
    def __init__(self, layers):
        torch.manual_seed(3)

        def weight(rows, columns):
            data = torch.randn(rows, columns, device="cuda:0", dtype=torch.bfloat16)
            return data.mul_(rows**-0.5)

        self.layers = [
            (weight(4096, 6144), weight(4096, 4096), weight(4096, 28672), weight(14336, 4096))
            for _ in range(layers)
        ]
        self.vocabulary = weight(4096, 128256)

    def step(self, x, attend):
        """One step; attend(layer, projected, out) fills out [batch, 4096]."""
        out = torch.empty_like(x)
        for layer, (qkv, project, up, down) in enumerate(self.layers):
            attend(layer, x @ qkv, out)
            x = ((out @ project) @ up)[:, :14336] @ down
        return x @ self.vocabulary


def time_us(graph, repeats):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def capture(function, warm=True):
    """A graph of what the function launches; with `warm` it is run once before."""
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def step_times(graph, steps):
    """Microseconds of each step of a run of them, one after the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:])]


class Shape:
    def __init__(self, loop, model, options, tokens, batch):
        self.loop, self.model, self.options = loop, model, options
        self.tokens, self.batch = tokens, batch
        self.x = torch.randn(batch, 4096, device="cuda:0", dtype=torch.bfloat16)
        self.row = {"tokens": tokens, "batch": batch, "tokens_per_cluster": options.per_cluster}

    def ends(self, blocks, pool):
        o = self.options
        self.loop.call("ends", self.batch, WINDOW, o.slots, o.budget, blocks, pool, o.walk,
                       ctypes.c_float(o.size), o.hold, o.prefetch)
        shape = (self.batch, QUERY_HEADS, 1, DIM)
        self.queries = self.loop.tensor("queries", shape)

    def sparse_step(self, part=WHOLE):
        def attend(layer, projected, out):
            self.loop.call("turn", layer, 1, ctypes.c_void_p(projected.data_ptr()), stream())
            self.loop.call("sparse", layer, part, ctypes.c_void_p(out.data_ptr()), stream())

        self.model.step(self.x, attend)
        self.loop.call("end_step", int(part == WHOLE), stream())

    def fused(self, layer, backend):
        shape = (self.options.sequences, HEADS, self.tokens, DIM)
        keys = self.loop.tensor("keys", shape, layer)[: self.batch]
        values = self.loop.tensor("values", shape, layer)[: self.batch]
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                self.queries, keys, values, enable_gqa=True)

    def dense_step(self, peer):
        def attend(layer, projected, out):
            self.loop.call("turn", layer, 0, ctypes.c_void_p(projected.data_ptr()), stream())
            if peer == "own":
                self.loop.call("dense", layer, ctypes.c_void_p(out.data_ptr()), stream())
            else:
                out.view(self.batch, QUERY_HEADS, 1, DIM).copy_(self.fused(layer, peer))

        self.model.step(self.x, attend)
        self.loop.call("end_step", 0, stream())

    def no_attention_step(self):
        self.model.step(self.x, lambda layer, projected, out: None)

    def choose_peer(self):
        """The fastest dense attention at this shape: (name, backend or "own", us by name)."""
        out = torch.empty(self.batch, 4096, device="cuda:0", dtype=torch.bfloat16)
        layers = range(min(4, len(self.model.layers)))

        def run_own():
            for layer in layers:
                self.loop.call("dense", layer, ctypes.c_void_p(out.data_ptr()), stream())

        candidates = {"own": ("own", run_own)}
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            backend = getattr(SDPBackend, name)
            candidates[name.lower()] = (
                backend, lambda b=backend: [self.fused(layer, b) for layer in layers])
        times, best = {}, None
        for name, (peer, run) in candidates.items():
            try:
                graph = capture(run)
                times[name] = min(time_us(graph, 5) for _ in range(3)) / len(layers)
            except RuntimeError as error:
                print(f"  {name}: {str(error).splitlines()[0][:100]}", flush=True)
                continue
            if best is None or times[name] < times[best[0]]:
                best = (name, peer)
        return (*best, times)

    def error_of(self, blocks, pool):
        """Relative error of the sparse output to dense attention over sinks, window and prompt."""
        self.ends(blocks, pool)
        out = torch.empty(2, self.batch, 4096, device="cuda:0", dtype=torch.bfloat16)
        projected = torch.randn(self.batch, 6144, device="cuda:0", dtype=torch.bfloat16)
        squares = [0.0, 0.0]
        self.loop.call("start")
        for _ in range(2):
            for layer in range(len(self.model.layers)):
                self.loop.call("turn", layer, 1, ctypes.c_void_p(projected.data_ptr()), stream())
                self.loop.call("sparse", layer, WHOLE, ctypes.c_void_p(out[0].data_ptr()),
                               stream())
                self.loop.call("dense", layer, ctypes.c_void_p(out[1].data_ptr()), stream())
                sparse, dense = out.float()
                squares[0] += (sparse - dense).square().sum().item()
                squares[1] += dense.square().sum().item()
            self.loop.call("end_step", 1, stream())
        self.stop()
        return (squares[0] / squares[1]) ** 0.5

    def stop(self):
        numbers = (ctypes.c_uint64 * 4)()
        self.loop.call("stop", numbers)
        pushed, served, given_up, status = numbers
        if given_up or status:
            raise RuntimeError(f"the loop stuck: given up {given_up}, status {status}")
        return pushed, served

    def sparse(self, blocks, pool):
        """Times of steps with one setting of the resident kernel, and what was sent."""
        self.ends(blocks, pool)
        at_once = self.loop.lib.ckv_loop_pairs_at_once()
        if at_once < self.batch * HEADS and blocks > 1:
            raise RuntimeError(f"only {at_once} pairs at once")
        alone = capture(lambda: self.sparse_step(ALONE))
        layers = len(self.model.layers)
        graph = capture(self.sparse_step, warm=False)
        self.loop.call("start")
        for _ in range(8):  # the hot cache fills
            graph.replay()
        self.stop()
        self.loop.call("start")
        rounds = []
        for _ in range(3):
            rounds.append((step_times(graph, self.options.steps),
                           step_times(alone, self.options.steps)))
        pushed, served = self.stop()
        times = [t for round_times, _ in rounds for t in round_times]
        exposed = [(statistics.median(a) - statistics.median(b)) / layers for a, b in rounds]
        return {
            "blocks_per_pair": blocks,
            "pool": pool,
            "p50_us": statistics.median(times),
            "p99_us": sorted(times)[int(0.99 * len(times))],
            "exposed_us_per_layer": statistics.median(exposed),
            "alone_p50_us": statistics.median([t for _, b in rounds for t in b]),
            "recalled_per_pair": pushed / max(1, served),
        }

    def run(self, settings):
        o = self.options
        print(f"{self.tokens} tokens x {self.batch}", flush=True)
        tried = []
        for blocks, pool in settings:
            try:
                result = self.sparse(blocks, pool)
            except RuntimeError as error:
                print(f"  {blocks} blocks per pair: {error}", flush=True)
                if "stuck" in str(error):
                    raise
                continue
            print("  " + json.dumps(result), flush=True)
            tried.append(result)
        if not tried:
            return None
        best = min(tried, key=lambda r: r["p50_us"])
        name, peer, peer_times = self.choose_peer()
        print(f"  dense attention, us per layer: {peer_times}", flush=True)
        # Both loops once more, in turn.
        self.ends(best["blocks_per_pair"], best["pool"])
        dense = capture(lambda: self.dense_step(peer))
        weights = capture(self.no_attention_step)
        graph = capture(self.sparse_step, warm=False)
        self.loop.call("start")
        for _ in range(8):
            graph.replay()
        both = ([], [])
        for _ in range(3):
            both[0].append(step_times(graph, o.steps))
            both[1].append(step_times(dense, o.steps))
        pushed, served = self.stop()
        times = [[t for part in parts for t in part] for parts in both]
        p50 = [statistics.median(part) for part in times]
        ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(*both)]
        dense_bytes = self.tokens * len(self.model.layers) * self.batch * HEADS * 4 * DIM
        self.row |= {
            "sparse_tokens_per_s": self.batch * 1e6 / statistics.mean(times[0]),
            "dense_tokens_per_s": self.batch * 1e6 / statistics.mean(times[1]),
            "sparse_p50_us": p50[0],
            "sparse_p99_us": sorted(times[0])[int(0.99 * len(times[0]))],
            "dense_p50_us": p50[1],
            "dense_p99_us": sorted(times[1])[int(0.99 * len(times[1]))],
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "peer": name,
            "peer_attention_us_per_layer": peer_times,
            "matrix_products_alone_us": statistics.median(step_times(weights, o.steps)),
            "exposed_us_per_layer": best["exposed_us_per_layer"],
            "recalled_per_pair": pushed / max(1, served),
            "blocks_per_pair": best["blocks_per_pair"],
            "decode_kv_share": self.loop.lib.ckv_loop_decode_kv_bytes() / dense_bytes,
            "settings_tried": tried,
        }
        self.row["error_to_dense"] = self.error_of(best["blocks_per_pair"], best["pool"])
        print("  " + json.dumps({k: v for k, v in self.row.items() if k != "settings_tried"}),
              flush=True)
        return self.row


def settings_of(options, batch):
    """Blocks per pair to try: as many as the pool has for all pairs, and fewer."""
    if options.blocks:
        return [(int(b), options.pool) for b in options.blocks.split(",")]
    most = min(8, options.pool // (batch * HEADS))
    return [(b, options.pool) for b in sorted({most, max(1, most - 1), max(1, most // 2)})]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", default="32768x1,32768x4,32768x8,32768x16,131072x4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="of a round; three rounds")
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--walk", type=int, default=128, help="steps of the queries' walk")
    parser.add_argument("--size", type=float, default=2.0, help="of the queries")
    parser.add_argument("--hold", type=int, default=20, help="steps that a query looks at a center")
    parser.add_argument("--pool", type=int, default=128, help="blocks of the resident kernel")
    parser.add_argument("--prefetch", type=int, default=32, help="MB of the index before queries")
    parser.add_argument("--blocks", default="", help="per pair, instead of the usual ones")
    options = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    gpus = torch.cuda.device_count()
    service = 1 if gpus > 1 else 0
    torch.cuda.set_device(0)
    started = time.time()
    loop, model, rows = Loop(options.lib), Model(options.layers), []
    result = {
        "machine": f"{gpus} x {torch.cuda.get_device_name(0)}",
        "date": datetime.date.today().isoformat(),
        "note": "Llama-3.1-8B's shape; matrix products alone beside attention.",
        "options": vars(options) | {"lib": None, "out": None},
        "shapes": rows,
    }
    with torch.inference_mode():
        for tokens in sorted({tokens for tokens, _ in shapes}):
            batches = [batch for of, batch in shapes if of == tokens]
            options.sequences = max(batches)
            began = time.time()
            # Larger clusters where 8,192 of them have no room in a multiprocessor's memory.
            options.per_cluster = 16 if tokens <= 65536 else 32
            loop.call("cache", service, 0, options.sequences, options.layers, tokens, 1,
                      options.per_cluster)
            print(f"cache of {options.sequences} x {tokens} built in {time.time() - began:.1f} s, "
                  f"at {time.time() - started:.0f} s", flush=True)
            for batch in batches:
                shape = Shape(loop, model, options, tokens, batch)
                row = shape.run(settings_of(options, batch))
                if row:
                    rows.append(row)
                pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'shape':>12} {'sparse':>9} {'dense':>9} {'ratio':>6} {'exposed':>8} {'KV':>7} {'err':>6}")
    for row in rows:
        print(f"{row['tokens']:>8} x{row['batch']:<2} {row['sparse_tokens_per_s']:9.0f} "
              f"{row['dense_tokens_per_s']:9.0f} {row['ratio']:6.2f} "
              f"{row['exposed_us_per_layer']:8.1f} {row['decode_kv_share']:7.4f} "
              f"{row['error_to_dense']:6.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
