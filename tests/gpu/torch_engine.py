#!/usr/bin/env python3
"""A PyTorch engine on a GPU and a server on one, by clusterkv.engine: exact outputs where the budget covers the
context, and decoding without the host, a whole step in a torch.cuda.CUDAGraph, beside steps one by one.

Usage: torch_engine.py --server=PROGRAM [--tokens=N] [--sequences=N] [--json=FILE]
Needs PyTorch with CUDA, and the package clusterkv built with CUDA on PYTHONPATH. The server is on the first GPU, the
engine on the second if there is one; with both on one, whose kernels take turns there, nothing is timed. Exit status
1 if something differs; 77 if something needed is not there.
"""
import argparse
import json
import pathlib
import statistics
import sys
import time

try:
    import torch

    from clusterkv.engine import Engine
except ImportError as missing:
    print(f"SKIPPED: {missing}")
    sys.exit(77)

from start_server import start_server  # noqa: E402

LAYERS, KV_HEADS, QUERY_HEADS, DIM = 4, 8, 32, 128
STEPS = 24  # fewer tokens than the window: what is decoded is clustered on neither side


def random_rows(seed, rows, heads, device):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, heads, DIM, device=device, generator=generator).bfloat16()


def fill(engine, name, tokens, seed, budget, device):
    """An attached sequence, and its layers' K and V."""
    sequence = engine.create(name, layers=LAYERS, kv_heads=KV_HEADS, query_heads=QUERY_HEADS, head_dim=DIM,
                             prompt_tokens=tokens, budget=budget, max_decode_tokens=512)
    layers = [[random_rows(seed + 2 * layer + i, tokens, KV_HEADS, device) for i in range(2)]
              for layer in range(LAYERS)]
    for layer, (keys, values) in enumerate(layers):
        engine.ingest(sequence, layer, keys, values)
    torch.cuda.synchronize(device)
    engine.seal(sequence)
    return engine.attach(sequence), layers


def step_inputs(step, sequences, device):
    """Of each layer: K, V and queries."""
    return [[random_rows(10_000 + 100 * step + 3 * layer + i, sequences, heads, device)
             for i, heads in enumerate((KV_HEADS, KV_HEADS, QUERY_HEADS))] for layer in range(LAYERS)]


def run_step(engine, sequences, inputs, outputs):
    for layer, (key, value, query) in enumerate(inputs):
        engine.append(layer, sequences, key, value)
        engine.step(layer, sequences, query, outputs[layer])


def new_outputs(sequences, device):
    return [torch.empty(sequences, QUERY_HEADS, DIM, device=device, dtype=torch.bfloat16) for _ in range(LAYERS)]


def largest_error(outputs, wanted):
    """In units of what is wanted, root mean square."""
    square = sum(float(w.float().pow(2).mean()) for w in wanted) / len(wanted)
    return max(float((o.float() - w.float()).abs().max()) for o, w in zip(outputs, wanted)) / square ** 0.5


def exact(engine, device):
    """Against PyTorch's attention, with a budget that covers the context."""
    sequence, layers = fill(engine, "exact", 700, 1, 4096, device)
    worst = 0.0
    for step in range(3):
        inputs, outputs = step_inputs(step, 1, device), new_outputs(1, device)
        run_step(engine, [sequence], inputs, outputs)
        wanted = []
        for mine, (key, value, query) in zip(layers, inputs):
            mine[:] = torch.cat([mine[0], key]), torch.cat([mine[1], value])
            k, v = (x.transpose(0, 1)[None].float() for x in mine)
            wanted.append(torch.nn.functional.scaled_dot_product_attention(
                query.transpose(0, 1)[None].float(), k, v, enable_gqa=True)[0].transpose(0, 1))
        engine.wait(sequence)
        worst = max(worst, largest_error(outputs, wanted))
    engine.release(sequence)
    return worst


def layer_us(run, device, rounds=30):
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) * 1e6 / LAYERS)
    return statistics.median(times)


def without_the_host(engine, tokens, sequences, device):
    """Largest difference of a captured group's outputs to those of single steps. Between two GPUs also microseconds of
    a layer: replayed, launched from Python, and of single steps."""
    single, group = ([fill(engine, f"{name}-{i}", tokens, 1000 * i, 64, device)[0] for i in range(sequences)]
                     for name in ("single", "group"))
    engine.join(group)
    assert group[0].link == "resident", group[0].link
    inputs, outputs, wanted = step_inputs(0, sequences, device), *(new_outputs(sequences, device) for _ in range(2))
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    worst = 0.0
    with torch.cuda.stream(stream):
        run_step(engine, group, inputs, outputs)
        run_step(engine, single, inputs, wanted)
        stream.synchronize()
        worst = largest_error(outputs, wanted)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run_step(engine, group, inputs, outputs)
        for step in range(1, STEPS):
            for now, new in zip(inputs, step_inputs(step, sequences, device)):
                for x, y in zip(now, new):
                    x.copy_(y)
            graph.replay()
            run_step(engine, single, inputs, wanted)
            stream.synchronize()
            worst = max(worst, largest_error(outputs, wanted))
        times = []
        if torch.cuda.device_count() > 1:
            for run in (graph.replay, lambda: run_step(engine, group, inputs, outputs)):
                engine.settle(group[0])
                times.append(layer_us(run, device))
        engine.leave(group[0])
        if times:
            times.append(layer_us(lambda: run_step(engine, single, inputs, wanted), device))
    for sequence in single + group:
        engine.release(sequence)
    return worst, times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("SKIPPED: no GPU")
        sys.exit(77)
    gpu = torch.cuda.device_count() - 1 and 1
    device = f"cuda:{gpu}"
    torch.cuda.set_device(gpu)
    process, server, _ = start_server(args.server, "8GiB")
    failures = []
    try:
        with Engine(server, device=device, output_type="bfloat16", links="peer,grpc", hot_tokens=256) as engine:
            error = exact(engine, device)
            worst, times = without_the_host(engine, args.tokens, args.sequences, device)
            counts = engine.ingest_counts()
    finally:
        process.terminate()
        if process.wait(timeout=60) != 0:
            failures.append("the server did not end well")
    shape = f"{args.tokens} x {args.sequences}"
    rows = [("PyTorch engine, budget over context: largest error", error, "of their rms",
             "scaled_dot_product_attention", 0, None, "<= 0.03"),
            (f"PyTorch engine, {shape}: a captured group's largest difference to single steps", worst, "of their rms",
             "Step over the link", 0, None, "<= 0.05")]
    if times:
        graphed, launched, alone = times
        name = f"PyTorch engine, {shape}: a layer of a replayed step"
        rows += [(name, graphed, "us", "launched from Python", launched, launched / graphed, None),
                 (name, graphed, "us", "Step over the link", alone, alone / graphed, None)]
    for name, value, unit, peer, peer_value, *_ in rows:
        print(f"{name}: {value:.4g} {unit} ({peer}: {peer_value:.4g})")
    if error > 0.03 or worst > 0.05:
        failures.append("outputs differ")
    print(f"K and V: {counts}")
    if counts["window_bytes"] == 0 or set(counts["fallbacks"]) - {"no free slot"}:
        failures.append("K and V came through the host")
    for failure in failures:
        print(f"FAILED: {failure}")
    if args.json:
        keys = ("name", "value", "unit", "peer", "peer_value", "ratio", "target")
        pathlib.Path(args.json).write_text(json.dumps({"rows": [dict(zip(keys, row)) for row in rows]}, indent=1))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
