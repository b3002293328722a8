#!/usr/bin/env python3
"""Times the CUDA kernels against their peers in one process and writes gpu.json.

Usage: bench.py --lib=libckv_gpu_bench.so --out=DIR
Needs PyTorch with CUDA, for the peers (cuBLAS through torch.bmm, torch.topk, copies) and the
clock. Every figure is the median over rounds that alternate between the kernel and its peer, each a
replay of a graph of several launches over different data.
"""
import argparse
import ctypes
import datetime
import json
import pathlib
import statistics

import torch

ROUNDS = 7
GROUP = 4  # query heads per KV head where nothing else is said


class Library:
    """The C interface of gpu_bench.cu."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)

    def create(self, name, *args):
        torch.cuda.synchronize()
        function = getattr(self.lib, name)
        function.restype = ctypes.c_void_p
        return function(*args)

    def free(self):
        """The memory of all that was created."""
        torch.cuda.synchronize()
        self.lib.ckv_free()

    def digest(self):
        """Of the results of all that was created, after what the stream was given."""
        function = self.lib.ckv_digest
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_uint64
        return function(torch.cuda.current_stream().cuda_stream)

    def runner(self, name, handle):
        function = getattr(self.lib, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]

        def run(layer):
            error = function(handle, layer, torch.cuda.current_stream().cuda_stream)
            if error != 0:
                raise RuntimeError(f"{name}: CUDA error {error}")

        return run


def capture(run, layers, repeats=1):
    """A graph of run(0) .. run(layers - 1), `repeats` times over, and how many calls that is."""
    for layer in range(layers):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for layer in range(layers):
                run(layer)
    return graph, layers * repeats


def time_graph(graph, calls):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def compare(runs, layers, repeats=1):
    """Medians in microseconds per call of each of `runs`, alternating, and their spreads."""
    graphs = [capture(run, layers, repeats) for run in runs]
    times = [[] for _ in runs]
    for graph, calls in graphs:
        time_graph(graph, calls)
    for _ in range(ROUNDS):
        for i, (graph, calls) in enumerate(graphs):
            times[i].append(time_graph(graph, calls))
    return [statistics.median(t) for t in times]


class Report:
    def __init__(self):
        self.rows = []

    def add(self, name, value, unit, peer, peer_value, ratio, target):
        self.rows.append({"name": name, "value": value, "unit": unit, "peer": peer,
                          "peer_value": peer_value, "ratio": ratio, "target": target})
        print(f"{name:58} {value:10.2f} {unit:8} {peer:42} {peer_value:10.2f} "
              f"ratio {ratio:6.2f}  target {target}", flush=True)


def clustered_rows(problems, rows, dim):
    """bf16 rows around random centers, as keys are."""
    centers = torch.randn(problems, rows // 16, dim, device="cuda")
    which = torch.randint(rows // 16, (problems, rows), device="cuda")
    x = torch.gather(centers, 1, which[..., None].expand(-1, -1, dim))
    return (x + 0.7 * torch.randn_like(x)).bfloat16().contiguous()


def bench_kmeans(library, report):
    for problems, rows, clusters, label in (
            (8, 32768, 400, "32k, k = 400, 8 problems"),
            (64, 32768, 400, "32k, k = 400, 64 problems"),
            (32, 8192, 512, "32k by segments, k = 2,048, 8 problems"),
            (256, 8192, 512, "32k by segments, k = 2,048, 64 problems")):
        x = clustered_rows(problems, rows, 128)
        handle = library.create("ckv_kmeans_create", ctypes.c_void_p(x.data_ptr()), problems, rows,
                                clusters, 10)
        centroids = torch.randn(problems, 128, clusters, device="cuda").bfloat16()
        out = torch.empty(problems, rows, clusters, device="cuda", dtype=torch.bfloat16)
        ours, peer = compare([library.runner("ckv_kmeans_assign", handle),
                              lambda layer: torch.bmm(x, centroids, out=out)], 1, 4)
        flop = 2.0 * problems * rows * clusters * 128
        report.add(f"k-means assignment, {label}", flop / ours / 1e6, "TFLOP/s",
                   "cuBLAS bf16 batched GEMM", flop / peer / 1e6, peer / ours, ">= 0.65")
        if clusters == 512:
            def whole(layer):
                index = torch.linspace(0, rows - 1, clusters, device="cuda").long()
                c = x[:, index].float()
                xf = x.float()
                for _ in range(10):
                    unit = torch.nn.functional.normalize(c, dim=-1).bfloat16()
                    labels = torch.bmm(x, unit.transpose(1, 2), out=out).argmax(-1)
                    sums = torch.zeros_like(c).scatter_add_(
                        1, labels[..., None].expand(-1, -1, 128), xf)
                    counts = torch.zeros(problems, clusters, device="cuda").scatter_add_(
                        1, labels, torch.ones_like(labels, dtype=torch.float))
                    c = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], c)
            ours, peer = compare([library.runner("ckv_kmeans_run", handle), whole], 1)
            report.add(f"k-means, 10 iterations, {label}", ours / 1e3, "ms",
                       "PyTorch GEMM + argmax + scatter", peer / 1e3, peer / ours, ">= 3")
        del x, out, centroids
        torch.cuda.empty_cache()


def bench_index(library, report):
    layers = 3
    for bits, k8v4, target in ((0, 0, ">= 0.75"), (2, 0, "-"), (2, 1, "-")):
        handle = library.create("ckv_index_create", 32768, bits, k8v4, layers)
        build = library.runner("ckv_index_build", handle)
        whole, = compare([build], layers)
        ours, peer = compare([library.runner("ckv_index_encode", handle),
                              library.runner("ckv_index_peer", handle)], layers, 2)
        codec = "k8v4" if k8v4 else "raw"
        label = f"32k, 8 heads, {codec}, codes of {bits} bits"
        moved = 2 * 32768 * 8 * 512  # K and V read and written
        report.add(f"index build, permute: {label}", moved / ours / 1e3, "GB/s",
                   "device copy of K and V", moved / peer / 1e3, peer / ours, target)
        report.add(f"index build, whole: {label}", whole, "us", "device copy of K and V", peer,
                   whole / peer, "-")
        torch.cuda.empty_cache()


def bench_select(library, report):
    empty, = compare([library.runner("ckv_empty_run", None)], 1, 32)
    for sequences, clusters in ((1, 400), (1, 2048), (8, 2048), (16, 2048), (64, 2048)):
        layers = 8
        pairs = sequences * 8
        handle = library.create("ckv_select_create", sequences, clusters, 0, ctypes.c_float(0),
                                layers, 0, GROUP)
        centroids = torch.randn(layers, pairs, clusters, 128, device="cuda").half()
        queries = torch.randn(layers, pairs, 128, GROUP, device="cuda").half()

        def gemv(layer):
            return torch.bmm(centroids[layer], queries[layer])

        def gemv_topk(layer):
            rank = torch.softmax(gemv(layer).float(), 1).sum(-1)
            torch.topk(rank, min(clusters, 128), dim=-1)

        run = library.runner("ckv_select_run", handle)
        ours, peer, product = compare([run, gemv_topk, gemv], layers)
        label = f"{pairs} rows of {clusters} clusters"
        floor = empty + product
        report.add(f"select, {label}", ours, "us", "GEMV + softmax + torch.topk", peer,
                   peer / ours, ">= 3")
        report.add(f"select over its floor, {label}", ours, "us", "empty kernel + GEMV", floor,
                   ours / floor, "<= 1.5")
        del centroids
        torch.cuda.empty_cache()


def bench_answer(library, report):
    for sequences, layers in ((1, 32), (4, 32), (16, 8)):
        handle = library.create("ckv_select_create", sequences, 2048, 2048, ctypes.c_float(0.25),
                                layers, 0, GROUP)
        ours, peer = compare([library.runner("ckv_select_run", handle),
                              library.runner("ckv_select_peer", handle)], layers)
        report.add(f"answer, 32k, batch {sequences}, W = 2,048", ours, "us",
                   "reading the same scattered bytes", peer, ours / peer, "<= 1.5")


def bench_round(library, report):
    """A round of the resident kernel: one a launch, with queries that are there already."""
    for sequences, blocks, layers in ((1, 8, 16), (4, 4, 16), (4, 3, 16), (16, 1, 8)):
        answer = library.create("ckv_select_create", sequences, 2048, 2048, ctypes.c_float(0.25),
                                layers, 0, GROUP)
        handle = library.create("ckv_round_create", ctypes.c_void_p(answer), blocks)
        peer = library.runner("ckv_select_peer", answer)
        for layer in range(layers):  # the peer reads what these chose
            library.runner("ckv_select_run", answer)(layer)
        ours, floor = compare([library.runner("ckv_round_run", handle), peer], layers)
        report.add(f"a resident round, 32k, batch {sequences}, {blocks} blocks a pair", ours, "us",
                   "reading the same scattered bytes", floor, ours / floor, "-")


def bench_answer_large(library, report):
    """Pairs of 8 query heads, and of 128k tokens."""
    for group, clusters in ((8, 2048), (4, 8192), (8, 8192)):
        for sequences, layers in ((1, 8), (4, 4), (16, 2)):
            handle = library.create("ckv_select_create", sequences, clusters, 2048,
                                    ctypes.c_float(0.25), layers, 0, group)
            ours, peer = compare([library.runner("ckv_select_run", handle),
                                  library.runner("ckv_select_general", handle)], layers, 2)
            label = f"{group} heads, {clusters} clusters, batch {sequences}, W = 2,048"
            report.add(f"answer, {label}", ours, "us", "the kernel for every shape", peer,
                       peer / ours, "-")
            library.free()


def bench_answer_parts(library, report):
    """What an answer's time is made of: by blocks per pair, and without its parts."""
    layers = 8
    for sequences, blocks, scored, estimated in (
            (1, 1, 2048, 0.25), (1, 2, 2048, 0.25), (1, 4, 2048, 0.25), (1, 8, 2048, 0.25),
            (1, 8, 2048, 0), (1, 8, 0, 0.25), (1, 8, 0, 0), (1, 1, 2048, 0), (1, 1, 0, 0.25),
            (1, 1, 0, 0), (4, 1, 2048, 0.25), (4, 2, 2048, 0.25), (4, 4, 2048, 0.25)):
        handle = library.create("ckv_select_create", sequences, 2048, scored,
                                ctypes.c_float(estimated), layers, blocks, GROUP)
        ours, peer = compare([library.runner("ckv_select_run", handle),
                              library.runner("ckv_select_peer", handle)], layers)
        report.add(f"answer, batch {sequences}, {blocks} blocks, W = {scored}, {estimated}", ours,
                   "us", "reading the same scattered bytes", peer, ours / peer, "-")


def bench_attention(library, report):
    for batch, tokens, k8v4 in ((1, 1024, 0), (16, 400, 0), (16, 1024, 0), (16, 4096, 0),
                                (64, 1024, 0), (16, 1024, 1), (16, 4096, 1)):
        layers = 8 if batch * tokens < 32768 else 2
        handle = library.create("ckv_attention_create", batch * 8, tokens, k8v4, layers)
        ours, peer = compare([library.runner("ckv_attention_run", handle),
                              library.runner("ckv_attention_peer", handle)], layers)
        codec = "k8v4" if k8v4 else "raw"
        total = batch * 8 * tokens * (200 if k8v4 else 512)
        label = f"batch {batch}, {tokens} tokens, {codec}"
        report.add(f"sparse attention, {label}", total / ours / 1e3, "GB/s",
                   "the same, contiguous", total / peer / 1e3, peer / ours,
                   ">= 0.9" if batch >= 16 else "-")


def bench_move(library, report):
    for count, record_bytes in ((400, 20480), (1024, 4096), (8192, 512), (262144, 512),
                                (262144, 200)):
        layers = 8 if count < 100000 else 2
        handle = library.create("ckv_move_create", count, record_bytes, layers)
        ours, peer = compare([library.runner("ckv_move_run", handle),
                              library.runner("ckv_move_peer", handle)], layers)
        total = 2 * count * record_bytes
        report.add(f"move {count} records of {record_bytes} B on one GPU", total / ours / 1e3,
                   "GB/s", "device copy, contiguous", total / peer / 1e3, peer / ours, "-")


def bench_same(library, report):
    """Not a time: whether large batches give the same bits in every run, alone and beside other
    work, whose blocks come and go between theirs."""
    runs = 40
    x = clustered_rows(64, 8192, 128)
    rows = ctypes.c_void_p(x.data_ptr())
    quarter = ctypes.c_float(0.25)
    kernels = [(f"k-means, {problems} problems of 8,192 rows", "ckv_kmeans_run",
                ("ckv_kmeans_create", rows, problems, 8192, 512, 10)) for problems in (8, 32, 64)]
    kernels += [(f"index build, 32k, {'k8v4' if k8v4 else 'raw'}", "ckv_index_build",
                 ("ckv_index_create", 32768, 2, k8v4, 1)) for k8v4 in (0, 1)]
    kernels += [(f"select, {8 * sequences} rows of 2,048 clusters", "ckv_select_run",
                 ("ckv_select_create", sequences, 2048, 0, ctypes.c_float(0), 1, 0, GROUP))
                for sequences in (1, 16, 64)]
    kernels += [(f"answer, {heads} heads, {clusters} clusters, batch {sequences}", "ckv_select_run",
                 ("ckv_select_create", sequences, clusters, 2048, quarter, 1, 0, heads))
                for heads, clusters in ((4, 2048), (8, 2048), (4, 8192), (8, 8192))
                for sequences in (1, 4, 16)]
    kernels += [(f"sparse attention, batch 16, 4,096 tokens, {'k8v4' if k8v4 else 'raw'}",
                 "ckv_attention_run", ("ckv_attention_create", 128, 4096, k8v4, 1))
                for k8v4 in (0, 1)]
    other, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda").bfloat16()
    failed = []
    for name, run_name, create in kernels:
        run = library.runner(run_name, library.create(*create))
        run(0)
        want = library.digest()
        differ = [0, 0]
        for beside in (0, 1):
            for _ in range(runs):
                with torch.cuda.stream(other):
                    for _ in range(8 * beside):
                        a @ a
                run(0)
                differ[beside] += library.digest() != want
        library.free()
        report.add(f"other bits in {runs} runs: {name}", differ[0], "runs", "beside products",
                   differ[1], 0, "0")
        failed += [name] if any(differ) else []
    if failed:
        raise RuntimeError("not the same in every run: " + "; ".join(failed))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default="kmeans,index,select,answer,answer_large,round,"
                        "answer_parts,attention,move,same")
    options = parser.parse_args()
    torch.manual_seed(1)
    stream = torch.cuda.Stream()
    library, report = Library(options.lib), Report()
    failed = []
    with torch.cuda.stream(stream):
        for name in options.only.split(","):
            try:
                globals()[f"bench_{name}"](library, report)
            except RuntimeError as error:  # the rest is still worth having
                print(f"{name}: {error}", flush=True)
                failed.append(name)
            library.free()
    result = {"machine": torch.cuda.get_device_name(),
              "date": datetime.date.today().isoformat(), "rows": report.rows}
    pathlib.Path(options.out, "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
