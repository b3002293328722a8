"""The presets in float32 PyTorch, written apart from the service: the oracle of its selections, and the
baselines that are measured beside it.

All functions work on one layer: keys, values [kv_heads, tokens, head_dim] float32, queries [kv_heads,
group, steps, head_dim] float32 of the last `steps` tokens, which are decoded and stay in the window.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

SINKS = 16
NONE = -1e30


@dataclasses.dataclass(frozen=True)
class Preset:
    tokens_per_cluster: int
    segment: int
    iterations: int
    random: bool
    shared: bool
    coded_tokens: int = 0
    refine: int = 0
    estimated: float = 0.0
    bits: int = 0
    group_channels: int = 32
    balanced: bool = True


PRESETS = {
    "clusterkv": Preset(80, 0, 20, True, False, balanced=False),
    "recall": Preset(16, 8192, 10, False, True, refine=8, estimated=.25, bits=2),
    "default": Preset(16, 8192, 10, False, True, coded_tokens=2048, estimated=.25, bits=2),
}


def spherical_kmeans(x: torch.Tensor, clusters: int, preset: Preset,
                     generator: torch.Generator) -> torch.Tensor:
    """x [tokens, head_dim] -> labels [tokens]."""
    n = x.shape[0]
    if preset.random:
        start = torch.randperm(n, generator=generator)[:clusters]
    else:
        start = torch.arange(clusters) * (n - 1) // max(1, clusters - 1)
    centroids, unit = x[start].clone(), F.normalize(x, dim=-1)
    for _ in range(preset.iterations):
        labels = (unit @ F.normalize(centroids, dim=-1).T).argmax(-1)
        sizes = torch.bincount(labels, minlength=clusters)
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        live = sizes > 0
        centroids[live] = sums[live] / sizes[live, None]
    return labels


def through_codes(residual: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What a residual [tokens, head_dim] is after balanced coding, scales and lows in fp16."""
    tokens, dim = residual.shape
    balance = residual.pow(2).mean(0).sqrt().clamp(min=1e-9).rsqrt()
    y = (residual * balance).view(tokens, dim // group, group)
    low = y.amin(-1, keepdim=True)
    scale = ((y.amax(-1, keepdim=True) - low) / (2 ** bits - 1)).clamp(min=1e-8)
    low, scale = low.half().float(), scale.half().float().clamp(min=6e-8)
    codes = ((y - low) / scale).round().clamp(0, 2 ** bits - 1)
    return (codes * scale + low).view(tokens, dim) / balance


class HeadIndex:
    """The index of one KV head of one layer over its prompt."""

    def __init__(self, preset: Preset, keys: torch.Tensor, values: torch.Tensor,
                 query_rms: torch.Tensor | None, seed: int = 3, labels: torch.Tensor | None = None):
        """keys, values [tokens, head_dim]. With `labels` [tokens - SINKS] the clusters are given."""
        self.preset = preset
        self.sink_keys = keys[:SINKS]
        k, v = keys[SINKS:], values[SINKS:]
        self.weight = torch.ones(k.shape[1])
        if preset.balanced and query_rms is not None:
            self.weight = (query_rms.clamp(min=1e-6) / k.std(0).clamp(min=1e-6)).sqrt()
        k = k * self.weight
        if labels is None:
            labels = self.cluster(k, seed)
        self.labels, segment = labels, preset.segment or len(k)
        clusters = sum(max(1, min(segment, len(k) - begin) // preset.tokens_per_cluster)
                       for begin in range(0, len(k), segment))
        self.sizes = torch.bincount(labels, minlength=clusters)
        sums = torch.zeros(clusters, k.shape[1]).index_add_(0, labels, k)
        self.centroids = sums / self.sizes.clamp(min=1)[:, None]
        sums = torch.zeros_like(self.centroids).index_add_(0, self.labels, v)
        self.value_means = sums / self.sizes.clamp(min=1)[:, None]
        order = torch.sort(self.labels, stable=True).indices
        begins = self.sizes.cumsum(0) - self.sizes
        self.rank_in_cluster = torch.empty_like(self.labels)
        self.rank_in_cluster[order] = torch.arange(len(k)) - begins[self.labels[order]]
        if preset.bits:
            self.coded_keys = self.centroids[self.labels] + through_codes(
                k - self.centroids[self.labels], preset.bits, preset.group_channels)
            self.coded_values = self.value_means[self.labels] + through_codes(
                v - self.value_means[self.labels], preset.bits, preset.group_channels)

    def cluster(self, k: torch.Tensor, seed: int) -> torch.Tensor:
        preset, labels, first = self.preset, [], 0
        generator = torch.Generator().manual_seed(seed)
        segment = preset.segment or len(k)
        for begin in range(0, len(k), segment):
            part = k[begin:begin + segment]
            count = max(1, len(part) // preset.tokens_per_cluster)
            labels.append(spherical_kmeans(part, count, preset, generator) + first)
            first += count
        return torch.cat(labels)

    def select(self, query: torch.Tensor, budget: int):
        """query [group, head_dim] -> exact mask [group, tokens] (sinks left out), state output and
        log-sum-exp [group]."""
        preset, scale = self.preset, query.shape[-1] ** -0.5
        q = query / self.weight
        scores = (q @ self.centroids.T * scale).masked_fill(self.sizes == 0, NONE)
        ranked = torch.softmax(scores, -1).sum(0, keepdim=True) if preset.shared else scores
        room = max(budget - SINKS, 0)
        if preset.coded_tokens:
            room = max(room, preset.coded_tokens)
        elif preset.refine:
            room *= preset.refine
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        sizes = self.sizes[order]
        before = sizes.cumsum(-1) - sizes
        taken = torch.zeros_like(sizes).scatter_(-1, order, torch.minimum((room - before).clamp(min=0), sizes))
        touched = self.rank_in_cluster < taken[:, self.labels]          # [1 or group, tokens]
        if not preset.coded_tokens and not preset.refine:
            exact = touched.expand(len(q), -1)
            return exact, None, None
        sink_logits = query @ self.sink_keys.T * scale
        logits = (q @ self.coded_keys.T * scale).masked_fill(~touched, NONE)
        weights = torch.softmax(torch.cat([sink_logits, logits], -1), -1)[:, SINKS:].sum(0)
        weights = weights.masked_fill(~touched[0], -1)
        keep = min(max(budget - SINKS, 0), int(touched.sum()))
        exact = torch.zeros(len(self.labels), dtype=torch.bool)
        exact[weights.argsort(dim=0, descending=True, stable=True)[:keep]] = True
        state_logits, state_values = [], []
        if preset.coded_tokens:
            coded = touched[0] & ~exact
            state_logits.append(logits[:, coded])
            state_values.append(self.coded_values[coded])
        rest = (taken[0] == 0) & (self.sizes > 0)
        count = min(int(preset.estimated * len(self.sizes)), int(rest.sum()))
        best = ranked[0].masked_fill(~rest, -1).argsort(dim=0, descending=True, stable=True)[:count]
        state_logits.append(scores[:, best] + self.sizes[best].float().log())
        state_values.append(self.value_means[best])
        logits, values = torch.cat(state_logits, -1), torch.cat(state_values)
        lse = torch.logsumexp(logits, -1) if logits.shape[-1] else torch.full((len(q),), -torch.inf)
        out = torch.softmax(logits, -1) @ values if logits.shape[-1] else torch.zeros_like(query)
        return exact.expand(len(q), -1), out, lse


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
           state: torch.Tensor | None = None, lse: torch.Tensor | None = None) -> torch.Tensor:
    """query [group, head_dim] over keys, values [tokens, head_dim] where mask [group, tokens], merged
    with a state."""
    logits = (query @ keys.T * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    if state is None:
        return torch.softmax(logits, -1) @ values
    own = torch.logsumexp(logits, -1)
    total = torch.logaddexp(own, lse)
    return ((own - total).exp()[:, None] * (torch.softmax(logits, -1) @ values) +
            (lse - total).exp()[:, None] * state)


def exact_top(query: torch.Tensor, keys: torch.Tensor, budget: int) -> torch.Tensor:
    """Exact top-B shared per KV head, sinks included: mask [tokens] over the prompt."""
    weights = torch.softmax(query @ keys.T * query.shape[-1] ** -0.5, -1).sum(0)
    weights[:SINKS] = torch.inf
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[weights.topk(min(budget, len(keys))).indices] = True
    return mask


class Quest:
    """Quest (arXiv 2406.10774): pages of 16 with channel-wise bounds, per query head."""

    PAGE = 16

    def __init__(self, keys: torch.Tensor):
        self.tokens = len(keys)
        pad = -len(keys) % self.PAGE
        pages = F.pad(keys, (0, 0, 0, pad), value=torch.nan).view(-1, self.PAGE, keys.shape[1])
        self.low = torch.nan_to_num(pages, nan=torch.inf).amin(1)
        self.high = torch.nan_to_num(pages, nan=-torch.inf).amax(1)

    def select(self, query: torch.Tensor, budget: int) -> torch.Tensor:
        bound = torch.maximum(query[:, None] * self.low, query[:, None] * self.high).sum(-1)
        bound[:, 0] = torch.inf  # the sinks' page
        pages = bound.topk(min(max(1, budget // self.PAGE), bound.shape[1]), -1).indices
        mask = torch.zeros(bound.shape, dtype=torch.bool).scatter_(1, pages, True)
        return mask.repeat_interleave(self.PAGE, 1)[:, :self.tokens]


def window(tokens: int, budget: int) -> torch.Tensor:
    """Sinks and the newest tokens of the prompt."""
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[:SINKS] = True
    mask[max(SINKS, tokens - (budget - SINKS)):] = True
    return mask
