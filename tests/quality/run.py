"""Quality of selection through a running server, on a real model.

    python tests/quality/run.py --server=HOST:PORT --model=DIR --text=FILE[,FILE] --context=N
        --sequences=N --seed=N --methods=full,clusterkv@1024,recall@128,default@64[:CODEC] --json=FILE

Per sequence the prompt is prefilled once with full attention; its last tokens are decoded, teacher-forced,
once per method. Layers below --dense_layers stay dense. Methods of the service decode through the server,
over the very same KV; a sequence is put there once for all methods that share its index and codec.

A method is NAME@B[:CODEC][/w=W][/codes=BITS:CHANNELS][/seed=N]. NAME: a preset; `full`; a baseline computed
here, `topb` (exact, shared per KV head), `quest` (pages of 16), `window`; or `oracle-PRESET`, the preset in
float32 PyTorch. Prints a table, writes {"rows": [...]}, and with --svg a plot of quality against bytes.

needle: share of planted 6-digit codes reproduced whole. copy: next-token accuracy in repeated passages.
nll: loss on running text. err_task, err_text: relative error of attention's output against full attention
over the same queries (needle and copy; text), mean over layers. *_per_step: per KV head and layer, from
the third step on. With --check_oracle, oracle_agreement: the share of the oracle's exact tokens that the
service chose, over the service's own clusters (k-means amplifies rounding, selection must not), of all
layers and of the worst; oracle_difference: how far the outputs are apart, relative, on those steps;
selection: a digest of the first served layer's exact tokens on those steps, whose queries are the same for all
methods; oracle_clusters: the share of tokens that the oracle's own k-means, from the same start, puts where the service has
them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer,
                          Cache, DynamicCache)

import oracle
import tasks
from clusterkv import _calls, _native, _tensors
from clusterkv.client import Client
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

SKIPPED_STEPS = 2  # the hot cache is cold
BASELINES = ("full", "topb", "quest", "window")
FIGURES = ("recalled_tokens", "recalled_bytes", "state_bytes", "exact_tokens", "hits")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What --methods says of one method."""

    text: str
    name: str
    budget: int
    codec: str
    coded_tokens: int | None = None
    codes: str = ""                  # "BITS:CHANNELS"
    seed: int | None = None          # of a random start

    @staticmethod
    def parse(text: str, codec: str) -> "Spec":
        head, *more = text.split("/")
        head, _, own_codec = head.partition(":")
        name, _, budget = head.partition("@")
        fields = dict(item.split("=") for item in more)
        served = name in oracle.PRESETS
        if name.removeprefix("oracle-") not in (*oracle.PRESETS, *BASELINES) or set(fields) - {
                "w", "codes", "seed"}:
            raise SystemExit("--methods: expected NAME@B[:CODEC][/w=W][/codes=BITS:CHANNELS][/seed=N] with NAME "
                             f"one of {', '.join((*BASELINES, *oracle.PRESETS))}, got {text}")
        return Spec(text, name, int(budget) if budget else 64 if served else 0,
                    (own_codec or codec) if served else "", int(fields["w"]) if "w" in fields else None,
                    fields.get("codes", ""), int(fields["seed"]) if "seed" in fields else None)

    @property
    def preset(self) -> oracle.Preset | None:
        preset = oracle.PRESETS.get(self.name.removeprefix("oracle-"))
        if preset and self.codes:
            bits, channels = map(int, self.codes.split(":"))
            preset = dataclasses.replace(preset, bits=bits, group_channels=channels)
        return preset


# --- what the model's attention does at the moment: one Prefill or Tail per thread

_here = threading.local()


def quality_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    out = _here.stage.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("clusterkv_quality", quality_attention)
AttentionMaskInterface.register("clusterkv_quality", lambda *args, **kwargs: None)


class Prefill:
    """Full attention over the prompt; keeps the queries' RMS."""

    def __init__(self):
        self.query_rms: dict[int, torch.Tensor] = {}

    def attend(self, layer, query, key, value, scaling):
        q = query[0].float().view(key.shape[1], -1, query.shape[2], query.shape[3])
        self.query_rms[layer] = q.pow(2).mean(dim=(1, 2)).sqrt()
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                              enable_gqa=True)


class TailCache(Cache):
    """Hands the tail's own KV through: the prompt's is the Tail's, the same for every row."""

    def __init__(self, prompt_tokens: int):
        super().__init__(layers=[])
        self.prompt_tokens = prompt_tokens

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prompt_tokens


class Tail:
    """The tail's tokens, one row per method. All rows attend in parallel, each in its own way."""

    def __init__(self, prompt: DynamicCache, methods: list["Method"], dense_layers: int, chunk: int):
        self.prompt, self.methods, self.dense_layers, self.chunk = prompt, methods, dense_layers, chunk
        self.errors: list[dict[int, float]] = [{} for _ in methods]
        self.pool = ThreadPoolExecutor(max(1, len(methods)))

    def attend(self, layer, query, key, value, scaling):
        cached = self.prompt.layers[layer]

        @torch.no_grad()
        def row(i: int) -> torch.Tensor:
            heads, steps, dim = query[i].shape
            q = query[i].float().view(key.shape[1], -1, steps, dim).transpose(1, 2)
            k = torch.cat([cached.keys[0], key[i]], 1).float()
            v = torch.cat([cached.values[0], value[i]], 1).float()
            full = by_chunks(q, k, v, self.chunk)
            method = self.methods[i]
            if layer < self.dense_layers or method.spec.name == "full":
                out = full
            else:
                out = method.attend(layer, query[i], key[i], value[i], q, k, v)
                self.errors[i][layer] = ((out - full).norm() / full.norm()).item()
            return out.transpose(1, 2).reshape(heads, steps, dim)

        return torch.stack(list(self.pool.map(row, range(len(self.methods))))).to(query.dtype)


def by_chunks(q, k, v, chunk, select=None):
    """q [kv_heads, steps, group, head_dim], k, v [kv_heads, tokens, head_dim], the last `steps` tokens decoded
    -> output like q. select(kv_head, queries, first step) -> mask, state and log-sum-exp for oracle.attend."""
    prompt, out = k.shape[1] - q.shape[1], torch.empty_like(q)
    for h in range(len(q)):
        for begin in range(0, q.shape[1], chunk):
            queries = q[h, begin:begin + chunk]
            end = prompt + begin + len(queries)
            zones = select(h, queries, begin) if select else ()
            out[h, begin:begin + chunk] = oracle.attend(queries, k[h, :end], v[h, :end], *zones)
    return out


@dataclasses.dataclass
class Figures:
    """Sums over steps, layers and KV heads."""

    sums: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(FIGURES, 0.0))
    steps: int = 0
    compared: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # layer: tokens, missing
    apart: list[float] = dataclasses.field(default_factory=list)
    selection: str = ""                                                       # digest, of the first layer
    clusters: list[float] = dataclasses.field(default_factory=list)  # share of tokens in the oracle's cluster

    @staticmethod
    def parse(fields: dict) -> "Figures":
        """Of dataclasses.asdict, through JSON."""
        compared = {int(layer): pair for layer, pair in fields.pop("compared").items()}
        return Figures(**fields, compared=compared)

    def add(self, other: "Figures") -> None:
        for name, number in other.sums.items():
            self.sums[name] += number
        self.steps += other.steps
        for layer, (tokens, missing) in other.compared.items():
            mine = self.compared.setdefault(layer, [0, 0])
            mine[0] += tokens
            mine[1] += missing
        self.apart += other.apart
        self.clusters += other.clusters
        self.selection = hashlib.sha256((self.selection + other.selection).encode()).hexdigest()[:16]


class Method:
    """A way to attend in the sparse layers, for one sequence."""

    def __init__(self, spec: Spec, options: argparse.Namespace):
        self.spec, self.options, self.figures = spec, options, Figures()

    def end(self) -> None:
        pass

    def attend(self, layer, query, key, value, q, k, v):
        """The tail's query [query_heads, steps, head_dim], key, value [kv_heads, steps, head_dim] as the model
        has them; q, k, v as for by_chunks -> output like q, float32."""
        raise NotImplementedError


class Baseline(Method):
    def attend(self, layer, query, key, value, q, k, v):
        prompt, budget = k.shape[1] - q.shape[1], self.spec.budget
        quest = [oracle.Quest(k[h, :prompt]) for h in range(len(k))] if self.spec.name == "quest" else []

        def select(h, queries, first):
            if self.spec.name == "topb":
                return (oracle.exact_top(queries, k[h, :prompt], budget),)
            if quest:
                return (quest[h].select(queries, budget),)
            return (oracle.window(prompt, budget, k.device),)

        return by_chunks(q, k, v, self.options.chunk, select)


def head_indexes(spec, k, v, prompt, query_rms, labels=None):
    seed = oracle.SEED if spec.seed is None else spec.seed
    return [oracle.HeadIndex(spec.preset, k[h, :prompt], v[h, :prompt], query_rms[h], h, seed,
                             None if labels is None else labels[h]) for h in range(len(k))]


def with_sinks(exact, state, lse):
    sinks = torch.ones(*exact.shape[:2], oracle.SINKS, dtype=torch.bool, device=exact.device)
    return torch.cat([sinks, exact], -1), state, lse


class OracleMethod(Method):
    """A preset in PyTorch, with its own clusters."""

    def __init__(self, spec, options, query_rms):
        super().__init__(spec, options)
        self.query_rms = query_rms

    def attend(self, layer, query, key, value, q, k, v):
        heads = head_indexes(self.spec, k, v, k.shape[1] - q.shape[1], self.query_rms[layer])
        return by_chunks(q, k, v, self.options.chunk, lambda h, queries, first: with_sinks(
            *heads[h].select(queries, self.spec.budget, self.spec.coded_tokens)))


class ServiceMethod(Method):
    """A preset through the server."""

    def __init__(self, spec, options, connection, sequence, query_rms, is_first_of_index):
        super().__init__(spec, options)
        self.is_first_of_index = is_first_of_index  # of the methods that share a preset and a start
        self.sequence, self.query_rms = sequence, query_rms
        one_step = spec.name == "clusterkv" and options.one_step_clusterkv
        # A one-step cache holds whatever one step selects: each query head of a group its own.
        group = sequence.shape.query_heads // sequence.shape.kv_heads
        hot = pb.HotCacheConfig(
            capacity_tokens=spec.budget * group if one_step else options.hot_tokens, steps=1,
            policy=pb.HOT_CACHE_POLICY_LAST_STEPS if one_step else pb.HOT_CACHE_POLICY_TOKEN_LRU)
        select = types.SelectConfig(budget_tokens=spec.budget)
        if spec.coded_tokens is not None:
            select.coded_tokens = spec.coded_tokens
        self.decoder = _native.DecodeSession(
            connection, sequence.handle.SerializeToString(), hot.SerializeToString(), False,
            select.SerializeToString())

    def end(self):
        self.decoder = None

    def attend(self, layer, query, key, value, q, k, v):
        index, steps = layer - self.options.dense_layers, query.shape[1]
        out = torch.empty(steps, query.shape[0], query.shape[2])
        tail = [_tensors.host(t.transpose(0, 1)) for t in (key, value, query)]
        # Steps whose positions are asked for go alone.
        asked = range(16, steps, self.options.check_oracle) if self.options.check_oracle else ()
        begins = sorted({0, SKIPPED_STEPS, steps, *asked, *(i + 1 for i in asked)})
        positions = {}
        for begin, end in zip(begins, begins[1:]):
            figures = self.decoder.steps(index, *(t[begin:end] for t in tail), out[begin:end].numpy())
            if begin >= SKIPPED_STEPS:
                for name in FIGURES:
                    self.figures.sums[name] += figures[name]
                self.figures.steps += (end - begin) * len(k)
            if begin in asked:
                positions[begin] = self.decoder.last_positions(index)
        out = out.to(q.device).view(steps, len(k), -1, query.shape[2]).transpose(0, 1)
        if positions and index == 0:
            self.figures.selection = hashlib.sha256(json.dumps(positions).encode()).hexdigest()[:16]
        if positions:
            self.compare(layer, positions, out, q, k, v)
        return out

    def compare(self, layer, positions, out, q, k, v):
        """The service's exact tokens and outputs against the oracle's over the service's clusters."""
        prompt, steps = k.shape[1] - q.shape[1], sorted(positions)
        labels = self.service_labels(layer, prompt, k.device)
        heads = head_indexes(self.spec, k, v, prompt, self.query_rms[layer], labels)
        if self.is_first_of_index:
            for mine, theirs in zip(head_indexes(self.spec, k, v, prompt, self.query_rms[layer]), labels):
                self.figures.clusters.append((mine.labels == theirs).float().mean().item())
        tally = self.figures.compared.setdefault(layer, [0, 0])
        difference = norm = 0.0
        for h, head in enumerate(heads):
            for i in steps:
                exact, state, lse = head.select(q[h, i:i + 1], self.spec.budget, self.spec.coded_tokens)
                theirs = exact[0].any(0).nonzero().flatten() + oracle.SINKS
                ours = torch.tensor(positions[i][h], dtype=theirs.dtype, device=theirs.device)
                tally[0] += len(theirs)
                tally[1] += int((~torch.isin(theirs, ours)).sum())
                expected = oracle.attend(q[h, i:i + 1], k[h, :prompt + i + 1], v[h, :prompt + i + 1],
                                         *with_sinks(exact, state, lse))
                difference += (out[h, i] - expected[0]).pow(2).sum().item()
                norm += expected.pow(2).sum().item()
        self.figures.apart.append((difference / norm) ** .5)

    def service_labels(self, layer, prompt, device):
        labels = None
        with Client(self.options.server, timeout=120) as client:
            for chunk in client.index(self.sequence, layer - self.options.dense_layers, centroids=False):
                if labels is None:
                    labels = np.zeros((self.sequence.shape.kv_heads, prompt - oracle.SINKS), np.int64)
                ids = np.repeat(np.arange(len(chunk.sizes)) + chunk.first_cluster, chunk.sizes)
                labels[chunk.kv_head, np.asarray(chunk.positions) - oracle.SINKS] = ids
        return torch.from_numpy(labels).to(device)


# --- one sequence

class Ingest:
    """A prompt's KV in the service: once for each index and codec that the methods ask for."""

    def __init__(self, connection, specs, prompt, query_rms, config, dense_layers):
        self.connection, self.sequences = connection, {}
        key = prompt.layers[0].keys
        for spec in specs:
            if spec.name not in oracle.PRESETS or self.key(spec) in self.sequences:
                continue
            index = {"window_tokens": 0}
            if spec.codes:
                bits, channels = map(int, spec.codes.split(":"))
                index["codes"] = types.Codes(bits=bits, group_channels=channels)
            if spec.seed is not None:
                index["seed"] = spec.seed
            request = _calls.open_request(
                f"quality-{spec.text}-{time.monotonic_ns()}", preset=spec.name, codec=spec.codec,
                layers=config.num_hidden_layers - dense_layers, kv_heads=config.num_key_value_heads,
                query_heads=config.num_attention_heads, head_dim=key.shape[-1],
                prompt_tokens=key.shape[2], dtype=str(key.dtype).removeprefix("torch."),
                max_decode_tokens=tasks.TAIL_TOKENS + 1, index=index)
            self.sequences[self.key(spec)] = pb.Sequence.FromString(
                connection.open(request.SerializeToString()))
        writers = {name: _native.PrefillWriter(connection, sequence.SerializeToString())
                   for name, sequence in self.sequences.items()}
        for layer in range(dense_layers, config.num_hidden_layers) if writers else ():
            cached, rms = prompt.layers[layer], query_rms[layer].cpu().numpy()
            k, v = (_tensors.host(t[0].transpose(0, 1)) for t in (cached.keys, cached.values))
            for writer in writers.values():
                writer.put(layer - dense_layers, 0, k.shape[0], k, v, rms)
        for name, writer in writers.items():
            self.sequences[name] = pb.Sequence.FromString(writer.finish())

    @staticmethod
    def key(spec: Spec) -> tuple:
        return spec.name, spec.codec, spec.codes, spec.seed

    def release(self) -> None:
        for sequence in self.sequences.values():
            self.connection.release(sequence.handle.SerializeToString())


def score(sequence: tasks.Sequence, logits: torch.Tensor) -> float:
    """logits [steps, vocabulary] of the tail's tokens, each predicting the next."""
    ids = torch.tensor(sequence.ids)
    first = sequence.prompt_tokens + 1
    if sequence.kind == "text":
        return F.cross_entropy(logits[:-1].float(), ids[first:].to(logits.device)).item()
    right = logits.argmax(-1).cpu()
    groups = [[int(right[p - first]) == sequence.ids[p] for p in group if p >= first]
              for group in sequence.scored]
    if sequence.kind == "needle":
        return float(np.mean([all(group) for group in groups]))
    return float(np.mean([hit for group in groups for hit in group]))


@torch.no_grad()
def evaluate(model, sequence: tasks.Sequence, specs: list[Spec], connection, options) -> list[dict]:
    """Per method: its score, its error, its figures."""
    begin = time.monotonic()
    ids = torch.tensor([sequence.ids], device=model.device)
    prompt = DynamicCache()
    _here.stage = prefill = Prefill()
    model.model(ids[:, :sequence.prompt_tokens], past_key_values=prompt, use_cache=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    prefilled = time.monotonic()
    ingest = Ingest(connection, specs, prompt, prefill.query_rms, model.config, options.dense_layers)
    methods: list[Method] = []
    indexes: set[tuple] = set()
    for spec in specs:
        if spec.name in oracle.PRESETS:
            methods.append(ServiceMethod(spec, options, connection, ingest.sequences[Ingest.key(spec)],
                                         prefill.query_rms, (spec.name, spec.seed) not in indexes))
            indexes.add((spec.name, spec.seed))
        else:
            methods.append(OracleMethod(spec, options, prefill.query_rms) if spec.preset
                           else Baseline(spec, options))
    ingested = time.monotonic()
    _here.stage = tail = Tail(prompt, methods, options.dense_layers, options.chunk)
    positions = torch.arange(sequence.prompt_tokens, ids.shape[1], device=model.device)
    logits = model(ids[:, sequence.prompt_tokens:].expand(len(methods), -1),
                   past_key_values=TailCache(sequence.prompt_tokens),
                   position_ids=positions.expand(len(methods), -1)).logits
    tail.pool.shutdown()
    for method in methods:
        method.end()
    ingest.release()
    print(f"{sequence.kind}: prefill {prefilled - begin:.1f} s, ingest {ingested - prefilled:.1f} s, "
          f"decode {time.monotonic() - ingested:.1f} s", file=sys.stderr, flush=True)
    return [{"score": score(sequence, logits[i]), "figures": method.figures,
             "error": float(np.mean(list(tail.errors[i].values()))) if tail.errors[i] else None}
            for i, method in enumerate(methods)]


# --- the table

def table_rows(specs: list[Spec], results: list[tuple[str, list[dict]]]) -> list[dict]:
    """results: per sequence its kind and what evaluate answered."""
    rows = []
    for i, spec in enumerate(specs):
        columns, figures = defaultdict(list), Figures()
        for kind, of_methods in results:
            columns["nll" if kind == "text" else kind].append(of_methods[i]["score"])
            columns["err_text" if kind == "text" else "err_task"].append(of_methods[i]["error"])
            figures.add(of_methods[i]["figures"])
        row: dict = {"method": spec.name, "budget": spec.budget, "codec": spec.codec, "coded_tokens": None,
                     "codes": None, **({"seed": spec.seed} if spec.seed is not None else {})}
        preset = spec.preset
        if preset and preset.bits:
            row["coded_tokens"] = (preset.coded_tokens if spec.coded_tokens is None else spec.coded_tokens)
            row["codes"] = f"{preset.bits}:{preset.group_channels}"
        for column in ("needle", "copy", "nll", "err_task", "err_text"):
            numbers = [n for n in columns[column] if n is not None]
            row[column] = float(np.mean(numbers)) if numbers else None
        for column in ("recalled_tokens", "recalled_bytes", "state_bytes"):
            row[f"{column}_per_step"] = figures.sums[column] / figures.steps if figures.steps else None
        exact = figures.sums["exact_tokens"]
        row["hit_rate"] = figures.sums["hits"] / exact if exact else None
        if figures.compared:
            tokens, missing = map(sum, zip(*figures.compared.values()))
            row["oracle_agreement"] = 1 - missing / tokens
            row["oracle_agreement_worst_layer"] = min(1 - m / t for t, m in figures.compared.values())
            row["oracle_compared_tokens"] = tokens
            row["oracle_difference"] = float(np.mean(figures.apart))
            row["selection"] = figures.selection
            if figures.clusters:
                row["oracle_clusters"] = float(np.mean(figures.clusters))
        row["per_sequence"] = {name: columns[name] for name in ("needle", "copy", "nll") if columns[name]}
        rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name, cell in row.items()
                               if name not in ("per_sequence", "selection") and cell not in (None, "")))
    text = [[name.replace("_per_step", "/step") for name in names]]
    for row in rows:
        text.append(["–" if row.get(c) in (None, "") else f"{row[c]:.4f}" if isinstance(row[c], float)
                     else str(row[c]) for c in names])
    widths = [max(len(line[i]) for line in text) for i in range(len(names))]
    for line in text:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="comma-separated files")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=2, help="of each kind")
    parser.add_argument("--first", type=int, default=0, metavar="I",
                        help="of the sequences that a longer run has, those from the I-th on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", default="full,clusterkv@1024,recall@128,default@64")
    parser.add_argument("--kinds", default="needle,copy,text")
    parser.add_argument("--dense_layers", type=int, default=2)
    parser.add_argument("--hot_tokens", type=int, default=1024)
    parser.add_argument("--one_step_clusterkv", action=argparse.BooleanOptionalAction, default=True,
                        help="clusterkv keeps what its last step selected, as published; else an LRU")
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--check_oracle", type=int, nargs="?", const=16, default=0, metavar="STEPS",
                        help="compare every STEPS-th step's selection with the float32 oracle's")
    parser.add_argument("--device", default="cpu", help="of the model and the baselines: cpu or cuda")
    parser.add_argument("--chunk", type=int, default=64, help="steps that a baseline computes at once")
    parser.add_argument("--parallel", type=int, default=1, help="sequences under way at a time")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--resume", metavar="FILE",
                        help="go on from the report of a run over the same sequences that was ended")
    parser.add_argument("--append", metavar="FILE",
                        help="take the rows of an earlier report over the same sequences into this one")
    parser.add_argument("--json")
    parser.add_argument("--svg")
    return parser.parse_args(argv)


def write_report(options, report: dict, done: dict[tuple[str, int], list[dict]]) -> None:
    results = [[*task, [{**one, "figures": dataclasses.asdict(one["figures"])} for one in of_methods]]
               for task, of_methods in sorted(done.items())]
    with open(options.json + ".part", "w", encoding="utf-8") as file:
        json.dump({**report, "methods": options.methods, "results": results}, file)
    os.replace(options.json + ".part", options.json)


def resumed(options, report: dict) -> dict[tuple[str, int], list[dict]]:
    with open(options.resume, encoding="utf-8") as file:
        before = json.load(file)
    if before["methods"] != options.methods or any(
            before[name] != report[name] for name in report if name != "sequences"):
        raise SystemExit(f"--resume: {options.resume} is of other sequences or methods")
    return {(kind, index): [{**one, "figures": Figures.parse(one["figures"])} for one in of_methods]
            for kind, index, of_methods in before["results"]}


def main(argv=None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    specs = [Spec.parse(text, options.codec) for text in options.methods.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="clusterkv_quality",
                                                 dtype=torch.bfloat16).eval().to(options.device)
    texts = [open(path, encoding="utf-8", errors="replace").read() for path in options.text.split(",")]
    builder = tasks.Builder(tokenizer, texts, options.context, options.seed)
    connection = _native.Connection(options.server, worker_name="quality", timeout=300)
    report = {"model": options.model.rstrip("/").rsplit("/", 1)[-1], "context": options.context,
              "sequences": options.sequences, "seed": options.seed,
              "texts": [path.rsplit("/", 1)[-1] for path in options.text.split(",")]}
    if options.first:
        report["first"] = options.first
    earlier = []
    if options.append:
        with open(options.append, encoding="utf-8") as file:
            before = json.load(file)
        if any(before[name] != number for name, number in report.items()):
            raise SystemExit(f"--append: {options.append} is of other sequences")
        earlier = before["rows"]

    kinds = options.kinds.split(",")
    indexes = range(options.first, options.first + options.sequences)
    order = [(kind, index) for index in indexes for kind in kinds]
    done = resumed(options, report) if options.resume else {}
    writing = threading.Lock()

    def rows() -> list[dict]:
        """Of the first sequences that are there of every kind: the run may be ended before the last."""
        end = next((i for i in indexes if any((kind, i) not in done for kind in kinds)), indexes.stop)
        report["sequences"] = end - options.first
        whole = [(kind, done[kind, i]) for kind, i in order if i < end]
        return earlier + table_rows(specs, whole) if whole else []

    def one(task: tuple[str, int]) -> None:
        result = evaluate(model, builder.build(*task), specs, connection, options)
        with writing:
            done[task] = result
            if options.json:
                write_report(options, {"rows": rows(), **report}, done)

    sys.setswitchinterval(1e-4)  # the threads of the methods wait for the server most of the time
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(one, [task for task in order if task not in done]))
    print_table(rows())
    if options.svg:
        from plot import write_plot

        write_plot(rows(), options.svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
