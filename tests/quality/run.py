"""Quality of selection through a running server, on a real model.

    python tests/quality/run.py --server=HOST:PORT --model=DIR --text=FILE[,FILE] --context=N
        --sequences=N --seed=N --methods=full,clusterkv@1024,recall@128,default@64[:CODEC] --json=FILE

Per sequence the prompt is prefilled once with full attention; its last tokens are decoded, teacher-forced,
once per method. Layers below --dense_layers stay dense. Methods of the service stream the very same KV to
the server and decode through it; `topb@B` (exact, shared per KV head), `quest@B` (pages of 16) and
`window@B` are baselines computed here. Prints a table, writes {"rows": [...]}, and with --svg a plot of
quality against bytes.

needle: share of planted 6-digit codes reproduced whole. copy: next-token accuracy in repeated passages.
nll: loss on running text. err_task, err_text: relative error of attention's output against full attention
over the same queries (needle and copy; text), mean over layers. *_per_step: per KV head and layer, from
the third step on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer,
                          DynamicCache)
from transformers.masking_utils import sdpa_mask

import oracle
import tasks
from clusterkv import _calls, _native
from clusterkv import transformers as ckv
from clusterkv.client import Client
from clusterkv.v1 import cache_service_pb2 as pb

SKIPPED_STEPS = 2  # the hot cache is cold


class Stage:
    """What the attention function does at the moment: set by the evaluation, read by every layer."""

    def __init__(self):
        self.method = None          # None: prefill
        self.query_rms: dict[int, torch.Tensor] = {}
        self.errors: dict[int, tuple[float, float]] = {}

    def attend(self, module, query, key, value, scaling):
        layer = module.layer_idx
        if self.method is None:
            q = query[0].float().view(key.shape[1], -1, query.shape[2], query.shape[3])
            self.query_rms[layer] = q.pow(2).mean(dim=(1, 2)).sqrt()
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                                  enable_gqa=True)
        full = full_attention(query, key, value, scaling)
        if layer < self.method.dense_layers or self.method.name == "full":
            return full
        out = self.method.attend(layer, query[0], key[0], value[0])
        difference = (out.float() - full[0].float()).pow(2).sum().item()
        self.errors[layer] = (difference, full[0].float().pow(2).sum().item())
        return out[None].to(full)


def full_attention(query, key, value, scaling):
    steps, tokens = query.shape[2], key.shape[2]
    mask = torch.ones(steps, tokens, dtype=torch.bool).tril(tokens - steps)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                          enable_gqa=True)


STAGE = Stage()


def quality_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    return STAGE.attend(module, query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register("clusterkv_quality", quality_attention)
AttentionMaskInterface.register("clusterkv_quality", lambda *args, **kwargs: None)


class TailCache(DynamicCache):
    """The prompt's KV, shared by all methods, with the tail's own appended anew for each."""

    def __init__(self, prompt: DynamicCache):
        super().__init__()
        self.prompt = prompt

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        layer = self.prompt.layers[layer_idx]
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prompt.get_seq_length(layer_idx)


@dataclasses.dataclass
class Figures:
    recalled_tokens: float = 0
    recalled_bytes: float = 0
    state_bytes: float = 0
    exact_tokens: float = 0
    hits: float = 0
    steps: int = 0                   # steps * layers * KV heads
    compared: int = 0
    differing: int = 0


class Method:
    def __init__(self, spec: str, options: argparse.Namespace):
        self.spec, self.options, self.dense_layers = spec, options, options.dense_layers
        head, _, self.codec = spec.partition(":")
        self.name, _, budget = head.partition("@")
        self.budget = int(budget) if budget else 0
        self.figures = Figures()

    def begin(self, prompt: DynamicCache, query_rms: dict[int, torch.Tensor], config) -> None:
        self.prompt = prompt

    def end(self) -> None:
        pass

    def attend(self, layer, query, key, value):
        """query [query_heads, steps, head_dim], key, value [kv_heads, tokens, head_dim], the last `steps`
        tokens decoded -> output [query_heads, steps, head_dim]."""
        heads, steps, dim = query.shape
        kv_heads, tokens, _ = key.shape
        prompt = tokens - steps
        q = query.float().view(kv_heads, -1, steps, dim)
        k, v = key.float(), value.float()
        out = torch.empty(kv_heads, q.shape[1], steps, dim)
        for h in range(kv_heads):
            select = self.selector(k[h, :prompt], v[h, :prompt])
            for i in range(steps):
                mask = torch.zeros(q.shape[1], tokens, dtype=torch.bool)
                mask[:, :prompt] = select(q[h, :, i])
                mask[:, prompt:prompt + i + 1] = True
                out[h, :, i] = oracle.attend(q[h, :, i], k[h], v[h], mask)
        return out.view(heads, steps, dim)

    def selector(self, keys, values):
        if self.name == "topb":
            return lambda q: oracle.exact_top(q, keys, self.budget)
        if self.name == "quest":
            quest = oracle.Quest(keys)
            return lambda q: quest.select(q, self.budget)
        if self.name == "window":
            mask = oracle.window(len(keys), self.budget)
            return lambda q: mask
        raise SystemExit(f"--methods: expected full, topb, quest, window or one of "
                         f"{', '.join(oracle.PRESETS)}, got {self.name}")


class ServiceMethod(Method):
    """A preset through the server."""

    def __init__(self, spec, options, connection):
        super().__init__(spec, options)
        self.connection = connection
        self.codec = self.codec or options.codec

    def begin(self, prompt, query_rms, config):
        self.layers = config.num_hidden_layers - self.dense_layers
        self.kv_heads = config.num_key_value_heads
        key = prompt.layers[0].keys
        self.prompt, self.query_rms = prompt, query_rms
        request = _calls.open_request(
            f"quality-{self.spec}-{time.time_ns()}", layers=self.layers, kv_heads=self.kv_heads,
            query_heads=config.num_attention_heads, head_dim=key.shape[-1], prompt_tokens=key.shape[2],
            dtype=str(key.dtype).removeprefix("torch."), preset=self.name, budget=self.budget or None,
            codec=self.codec, max_decode_tokens=1024, index={"window_tokens": 0},
            select=self.options.select)
        self.sequence = pb.Sequence.FromString(self.connection.open(request.SerializeToString()))
        writer = _native.PrefillWriter(self.connection, self.sequence.SerializeToString())
        for layer in range(self.dense_layers, config.num_hidden_layers):
            cached = prompt.layers[layer]
            k, v = (ckv._host(t[0].transpose(0, 1)) for t in (cached.keys, cached.values))
            writer.put(layer - self.dense_layers, 0, k.shape[0], k, v, query_rms[layer].numpy())
        self.sequence = pb.Sequence.FromString(writer.finish())
        hot = pb.HotCacheConfig(capacity_tokens=self.hot_tokens(), steps=1,
                                policy=pb.HOT_CACHE_POLICY_LAST_STEPS if self.one_step()
                                else pb.HOT_CACHE_POLICY_TOKEN_LRU)
        self.decoder = _native.DecodeSession(self.connection, self.sequence.handle.SerializeToString(),
                                             hot.SerializeToString(), False)

    def one_step(self) -> bool:
        return self.name == "clusterkv" and self.options.one_step_clusterkv

    def hot_tokens(self) -> int:
        # A one-step cache holds whatever one step selects.
        return 1 << 16 if self.one_step() else self.options.hot_tokens

    def end(self):
        self.decoder = None
        self.connection.release(self.sequence.handle.SerializeToString())

    def attend(self, layer, query, key, value):
        heads, steps, dim = query.shape
        prompt = key.shape[1] - steps
        out = torch.empty(steps, heads, dim)
        tail = [ckv._host(t.transpose(0, 1)) for t in (key[:, prompt:], value[:, prompt:], query)]
        checks = self.oracle_checks(layer, key, value, prompt) if self.options.check_oracle else None
        for i in range(steps):
            figures = self.decoder.steps(layer - self.dense_layers, *(t[i:i + 1] for t in tail),
                                         out[i:i + 1].numpy())
            if i >= SKIPPED_STEPS:
                for name in ("recalled_tokens", "recalled_bytes", "state_bytes", "exact_tokens", "hits"):
                    setattr(self.figures, name, getattr(self.figures, name) + figures[name])
                self.figures.steps += self.kv_heads
            if checks and i % 16 == 0:
                self.compare(checks, query[:, i], layer)
        return out.transpose(0, 1)

    def oracle_checks(self, layer, key, value, prompt):
        """The oracle over the service's own clusters: k-means amplifies rounding, selection must not."""
        with Client(self.options.server, timeout=120) as client:
            labels = torch.zeros(self.kv_heads, prompt - oracle.SINKS, dtype=torch.long)
            for chunk in client.index(self.sequence, layer - self.dense_layers, centroids=False):
                ids = np.repeat(np.arange(len(chunk.sizes)) + chunk.first_cluster, chunk.sizes)
                labels[chunk.kv_head, torch.tensor(list(chunk.positions)) - oracle.SINKS] = (
                    torch.from_numpy(ids))
        return [oracle.HeadIndex(oracle.PRESETS[self.name], key[h, :prompt].float(),
                                 value[h, :prompt].float(), self.query_rms[layer][h], labels=labels[h])
                for h in range(self.kv_heads)]

    def compare(self, checks, query, layer):
        budget = self.budget or 64
        ours = self.decoder.last_positions(layer - self.dense_layers)
        queries = query.float().view(self.kv_heads, -1, query.shape[-1])
        for h, index in enumerate(checks):
            mask, _, _ = index.select(queries[h], budget)
            theirs = set((mask.any(0).nonzero().flatten() + oracle.SINKS).tolist())
            self.figures.compared += len(theirs)
            self.figures.differing += len(theirs - set(ours[h]))


def make_method(spec: str, options, connection) -> Method:
    name = spec.partition("@")[0]
    return ServiceMethod(spec, options, connection) if name in oracle.PRESETS else Method(spec, options)


def score(sequence: tasks.Sequence, logits: torch.Tensor) -> float:
    """logits [steps, vocabulary] of the tail's tokens, each predicting the next."""
    ids = torch.tensor(sequence.ids)
    first = sequence.prompt_tokens + 1
    if sequence.kind == "text":
        return F.cross_entropy(logits[:-1].float(), ids[first:]).item()
    right = logits.argmax(-1)
    groups = [[int(right[p - first]) == sequence.ids[p] for p in group if p >= first]
              for group in sequence.scored]
    if sequence.kind == "needle":
        return float(np.mean([all(group) for group in groups]))
    return float(np.mean([hit for group in groups for hit in group]))


@torch.no_grad()
def evaluate(model, sequence: tasks.Sequence, methods: list[Method], results) -> None:
    ids = torch.tensor([sequence.ids])
    prompt = DynamicCache()
    STAGE.method = None
    model.model(ids[:, :sequence.prompt_tokens], past_key_values=prompt, use_cache=True)
    query_rms = dict(STAGE.query_rms)
    for method in methods:
        STAGE.method, STAGE.errors = method, {}
        method.begin(prompt, query_rms, model.config)
        tail = ids[:, sequence.prompt_tokens:]
        positions = torch.arange(sequence.prompt_tokens, ids.shape[1])[None]
        logits = model(tail, past_key_values=TailCache(prompt), position_ids=positions).logits[0]
        method.end()
        row = results[method.spec]
        row[{"needle": "needle", "copy": "copy", "text": "nll"}[sequence.kind]].append(
            score(sequence, logits))
        if STAGE.errors:
            error = np.mean([(d / f) ** .5 for d, f in STAGE.errors.values()])
            row["err_text" if sequence.kind == "text" else "err_task"].append(error)


def table_rows(methods: list[Method], results) -> list[dict]:
    rows = []
    for method in methods:
        row: dict = {"method": method.name, "budget": method.budget, "codec": method.codec}
        for column in ("needle", "copy", "nll", "err_task", "err_text"):
            numbers = results[method.spec][column]
            row[column] = float(np.mean(numbers)) if numbers else None
        figures, steps = method.figures, method.figures.steps
        for column in ("recalled_tokens", "recalled_bytes", "state_bytes"):
            row[f"{column}_per_step"] = getattr(figures, column) / steps if steps else None
        row["hit_rate"] = figures.hits / figures.exact_tokens if figures.exact_tokens else None
        if figures.compared:
            row["oracle_agreement"] = 1 - figures.differing / figures.compared
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    columns = [c for c in rows[0] if any(row.get(c) is not None for row in rows)]
    if any("oracle_agreement" in row for row in rows):
        columns.append("oracle_agreement") if "oracle_agreement" not in columns else None
    text = [[c.replace("_per_step", "/step") for c in columns]]
    for row in rows:
        text.append(["–" if row.get(c) is None else f"{row[c]:.4g}" if isinstance(row[c], float)
                     else str(row[c]) for c in columns])
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    for line in text:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="comma-separated files")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=2, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", default="full,clusterkv@1024,recall@128,default@64")
    parser.add_argument("--kinds", default="needle,copy,text")
    parser.add_argument("--dense_layers", type=int, default=2)
    parser.add_argument("--hot_tokens", type=int, default=1024)
    parser.add_argument("--one_step_clusterkv", action=argparse.BooleanOptionalAction, default=True,
                        help="clusterkv keeps what its last step selected, as published; else an LRU")
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--coded_tokens", type=int)
    parser.add_argument("--check_oracle", action="store_true",
                        help="compare every 16th step's selection with the float32 oracle's")
    parser.add_argument("--json")
    parser.add_argument("--svg")
    options = parser.parse_args(argv)
    options.select = {} if options.coded_tokens is None else {"coded_tokens": options.coded_tokens}
    return options


def main(argv=None) -> int:
    options = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="clusterkv_quality",
                                                 dtype=torch.bfloat16).eval()
    texts = [open(path, encoding="utf-8", errors="replace").read() for path in options.text.split(",")]
    builder = tasks.Builder(tokenizer, texts, options.context, options.seed)
    connection = _native.Connection(options.server, worker_name="quality", timeout=300)
    methods = [make_method(spec, options, connection) for spec in options.methods.split(",")]
    results: dict = defaultdict(lambda: defaultdict(list))
    for kind in options.kinds.split(","):
        for index in range(options.sequences):
            begin = time.monotonic()
            evaluate(model, builder.build(kind, index), methods, results)
            print(f"{kind} {index + 1}/{options.sequences}: {time.monotonic() - begin:.0f} s",
                  file=sys.stderr, flush=True)
    rows = table_rows(methods, results)
    print_table(rows)
    report = {"model": options.model.rstrip("/").rsplit("/", 1)[-1], "context": options.context,
              "sequences": options.sequences, "seed": options.seed, "rows": rows}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    if options.svg:
        from plot import write_plot

        write_plot(rows, options.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
