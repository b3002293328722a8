#!/usr/bin/env python3
"""A Transformers model on a GPU with its KV in a server on the same GPU: prompts by window and by PutKv.

Usage: transformers_window.py --server=PROGRAM [--tokens=N] [--new_tokens=N]
Needs PyTorch with CUDA, Transformers, and the package clusterkv built with CUDA on PYTHONPATH. The model is a
small Llama with random weights. Both ways must generate the same tokens, and the server must say that it copied
nothing to its GPU while the prompt came in by window; PyTorch's profiler, that the worker copied no K and V.
Exit status 1 if not; 77 if something needed is not there.
"""
import argparse
import json
import pathlib
import sys
import tempfile
import time
import types as python_types

try:
    import grpc
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import clusterkv.transformers as ckv
    from clusterkv import _native
    from clusterkv.v1 import admin_service_pb2, admin_service_pb2_grpc
except ImportError as missing:
    print(f"SKIPPED: {missing}")
    sys.exit(77)

from start_server import start_server  # noqa: E402


class HostWriter(_native.PrefillWriter):
    """A writer that no window takes anything of."""

    def put_from_gpu(self, *_):
        return 0


def open_cache(model, server, new_tokens, by_window):
    cache = ckv.ClusterKVCache(model.config, server=server, budget=64, max_decode_tokens=new_tokens)
    if not by_window:
        cache._native = python_types.SimpleNamespace(
            PrefillWriter=HostWriter, DecodeSession=_native.DecodeSession)
    return cache


def generate(model, prompt, server, new_tokens, by_window):
    cache = open_cache(model, server, new_tokens, by_window)
    begin = time.monotonic()
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False,
                            attention_mask=torch.ones_like(prompt), pad_token_id=0)
    seconds = time.monotonic() - begin
    figures = cache.stats()
    cache.release()
    return tokens[0, prompt.shape[1]:].tolist(), figures, seconds


@torch.no_grad()
def copies_of_a_prefill(model, prompt, server, by_window):
    """Bytes that this process copies to the host and to the GPU while the prompt is ingested."""
    cache = open_cache(model, server, 16, by_window)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(prompt, past_key_values=cache)
        cache._finish_prompt()
        torch.cuda.synchronize()
    cache.release()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"]
                  if event.get("cat") == "gpu_memcpy"]
    return [sum(event["args"]["bytes"] for event in events if way in event["name"])
            for way in ("DtoH", "HtoD")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--new_tokens", type=int, default=32)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("SKIPPED: no GPU")
        sys.exit(77)
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
                         num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                         max_position_embeddings=args.tokens + args.new_tokens,
                         attn_implementation="clusterkv")
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    prompt = torch.randint(0, config.vocab_size, (1, args.tokens), device="cuda")
    process, server, admin = start_server(args.server, "1GiB")
    stub = admin_service_pb2_grpc.AdminServiceStub(grpc.insecure_channel(admin))
    stats = lambda: stub.GetStats(admin_service_pb2.GetStatsRequest())
    try:
        runs = {}
        for way in ("window", "PutKv", "window again"):
            before = stats()
            runs[way] = generate(model, prompt, server, args.new_tokens, way != "PutKv")
            after = stats()
            figures = runs[way][1]
            print(f"{way}: {runs[way][2]:.2f} s; by window {figures['ingest_window_bytes']} bytes, through the "
                  f"host {figures['ingest_host_bytes']}; the server took "
                  f"{after.window_bytes - before.window_bytes} by window and copied "
                  f"{after.device_uploaded_bytes - before.device_uploaded_bytes} bytes to its GPU, "
                  f"{after.device_fetched_bytes - before.device_fetched_bytes} back")
            runs[way] += (after.device_uploaded_bytes - before.device_uploaded_bytes,)
        profiled = {way: copies_of_a_prefill(model, prompt, server, way == "window")
                    for way in ("window", "PutKv")}
    finally:
        process.terminate()
        process.wait(timeout=30)
    kv_bytes = args.tokens * 2 * 2 * 64 * 2 * (config.num_hidden_layers - 2)
    failures = []
    if not runs["window"][0] == runs["PutKv"][0] == runs["window again"][0]:
        failures.append(f"other tokens: {runs['window'][0]}, {runs['PutKv'][0]}")
    for way in ("window", "window again"):
        if runs[way][1]["ingest_window_bytes"] != kv_bytes or runs[way][1]["ingest_host_bytes"] != 0:
            failures.append(f"{way}: expected {kv_bytes} bytes by window")
        if runs[way][3] != 0:  # as many tokens as this are not clustered, and stay in host memory
            failures.append(f"{way}: {runs[way][3]} bytes were copied to the GPU")
    for way, (to_host, to_gpu) in profiled.items():
        print(f"{way}: the profiler sees this worker copy {to_host} bytes to the host and {to_gpu} to the GPU while "
              f"{kv_bytes} bytes of K and V are ingested")
    if profiled["window"][0] >= kv_bytes // 100:
        failures.append("K and V were copied to the host")
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"tokens: {runs['window'][0]}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
