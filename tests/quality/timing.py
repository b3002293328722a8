"""Prefill and time per generated token with the KV in a server, beside plain Transformers in the same run.

    python tests/quality/timing.py --server=HOST:PORT --model=DIR --text=FILE --context=N --json=FILE

Both get the same prompt and then the same tokens, one at a time. "prefill" ends with the first token's
logits; for the service it includes the wait until every layer is clustered. Prints a table; times are in
milliseconds per token, select and recall are waits inside the step, summed over layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import clusterkv.transformers as ckv


@torch.no_grad()
def measure(model, ids: torch.Tensor, context: int, cache) -> dict:
    """ids [1, context + tokens]: the first `context` are the prompt, each later one is a step."""
    begin = time.monotonic()
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    steps = []
    for i in range(context, ids.shape[1]):
        step = time.monotonic()
        model(ids[:, i:i + 1], past_key_values=cache)
        steps.append(time.monotonic() - step)
    # The first step of the service also waits for the clusters.
    return {"prefill_s": time.monotonic() - begin - sum(steps[1:]) if isinstance(cache, ckv.ClusterKVCache)
            else time.monotonic() - begin - sum(steps),
            "ms_per_token": 1e3 * statistics.median(steps[1:]),
            "ms_per_token_p90": 1e3 * statistics.quantiles(steps[1:], n=10)[-1]}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="clusterkv",
                                                 dtype=torch.bfloat16).eval()
    with open(options.text, encoding="utf-8", errors="replace") as file:
        text = file.read()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :options.context + options.tokens]
    model(ids[:, :256])  # warms up
    rows = [{"method": "transformers", **measure(model, ids, options.context, DynamicCache())}]
    cache = ckv.ClusterKVCache(model.config, server=options.server, preset=options.preset,
                               budget=options.budget, codec=options.codec, timeout=300)
    row = {"method": f"{options.preset}@{options.budget}", **measure(model, ids, options.context, cache)}
    stats = cache.stats()
    row.update(select_ms=stats["select_us"] / 1e3 / options.tokens,
               recall_ms=stats["recall_us"] / 1e3 / options.tokens,
               held_bytes=stats["held_bytes"], full_bytes=stats["full_bytes"])
    cache.release()
    rows.append(row)
    for row in rows:
        print("  ".join(f"{name} {cell:.2f}" if isinstance(cell, float) else f"{name} {cell}"
                        for name, cell in row.items()))
    if options.json:
        report = {"context": options.context, "tokens": options.tokens, "machine": platform.machine(),
                  "cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(), "rows": rows}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
