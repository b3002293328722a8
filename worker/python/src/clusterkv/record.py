"""Writes KV traces of a model over a text: ``python -m clusterkv.record --model DIR --text FILE --out DIR``.

One safetensors file per layer in the project's trace format: k, v [tokens, kv_heads, head_dim] after RoPE,
q [queries, query_heads, head_dim] of the last tokens, q_rms [kv_heads, head_dim] of the prompt.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer,
                          DynamicCache)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Recorder:
    """Keeps what each wanted layer attended with."""

    def __init__(self, layers: set[int], queries: int):
        self.layers, self.queries = layers, queries
        self.traces: dict[int, dict[str, torch.Tensor]] = {}

    def attention(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                  value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any):
        if module.layer_idx in self.layers:
            prompt = query.shape[2] - self.queries
            q = query[0, :, :prompt].float()
            q = q.reshape(key.shape[1], -1, prompt, q.shape[-1])
            self.traces[module.layer_idx] = {
                "k": key[0].transpose(0, 1).contiguous(), "v": value[0].transpose(0, 1).contiguous(),
                "q": query[0, :, prompt:].transpose(0, 1).contiguous(),
                "q_rms": q.pow(2).mean(dim=(1, 2)).sqrt().contiguous()}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clusterkv.record", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--queries", type=int, default=384, help="last tokens, whose queries are kept")
    parser.add_argument("--layers", default="", help="comma-separated; all without it")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text, encoding="utf-8", errors="replace") as file:
        ids = tokenizer.encode(file.read(64 * options.tokens))[:options.tokens]
    if len(ids) < options.tokens or options.queries >= len(ids):
        raise SystemExit(f"--text: expected at least {options.tokens} tokens (more than --queries), got "
                         f"{len(ids)}")
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="clusterkv_record",
                                                 dtype="auto").eval()
    layers = {int(layer) for layer in options.layers.split(",") if layer} or set(
        range(model.config.num_hidden_layers))
    recorder = Recorder(layers, options.queries)
    AttentionInterface.register("clusterkv_record", recorder.attention)
    with torch.no_grad():
        model.model(torch.tensor([ids]), past_key_values=DynamicCache(), use_cache=True)
    os.makedirs(options.out, exist_ok=True)
    stem = os.path.splitext(os.path.basename(options.text))[0]
    for layer, trace in sorted(recorder.traces.items()):
        path = os.path.join(options.out, f"{stem}.layer{layer}.safetensors")
        save_file(trace, path)
        print(path)


def _unused(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("replaced before the model runs")


AttentionInterface.register("clusterkv_record", _unused)
AttentionMaskInterface.register("clusterkv_record", sdpa_mask)

if __name__ == "__main__":
    main()
