"""The presets in float32 PyTorch, written apart from the service: the oracle of its selections, and the
baselines that are measured beside it.

Everything here is of one KV head of one layer: keys, values [tokens, head_dim] float32 of the prompt, queries
[steps, group, head_dim] float32 of the decoded tokens, all steps at once. Tensors stay on the device where
they are.
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


SEED = 8  # of random starts: the service's own


def random_rows(n: int, clusters: int, seed: int) -> torch.Tensor:
    """The tokens where the contract lets a random start begin: a partial Fisher-Yates shuffle by SplitMix64."""
    mask, rows = (1 << 64) - 1, list(range(n))
    for i in range(clusters):
        seed = (seed + 0x9e3779b97f4a7c15) & mask
        z = ((seed ^ seed >> 30) * 0xbf58476d1ce4e5b9) & mask
        z = ((z ^ z >> 27) * 0x94d049bb133111eb) & mask
        j = i + (((z ^ z >> 31) >> 32) * (n - i) >> 32)
        rows[i], rows[j] = rows[j], rows[i]
    return torch.tensor(rows[:clusters])


def spherical_kmeans(x: torch.Tensor, clusters: int, preset: Preset, seed: int) -> torch.Tensor:
    """x [tokens, head_dim] -> labels [tokens]."""
    n = x.shape[0]
    if preset.random:
        start = random_rows(n, clusters, seed)
    else:
        start = torch.arange(clusters) * (n - 1) // max(1, clusters - 1)
    centroids, unit = x[start.to(x.device)].clone(), F.normalize(x, dim=-1)
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


def stored(means: torch.Tensor) -> torch.Tensor:
    """Centroids and value means as an index keeps them: the nearest halves, saturating."""
    return means.clamp(-65504, 65504).half().float()


class HeadIndex:
    """The index of one KV head of one layer over its prompt."""

    def __init__(self, preset: Preset, keys: torch.Tensor, values: torch.Tensor,
                 query_rms: torch.Tensor | None, head: int = 0, seed: int = SEED,
                 labels: torch.Tensor | None = None):
        """keys, values [tokens, head_dim]. With `labels` [tokens - SINKS] the clusters are given; else those of
        KV head `head` under `seed`."""
        self.preset = preset
        self.sink_keys = keys[:SINKS]
        k, v = keys[SINKS:], values[SINKS:]
        self.weight = torch.ones(k.shape[1], device=k.device)
        if preset.balanced and query_rms is not None:
            self.weight = (query_rms.clamp(min=1e-6) / k.std(0).clamp(min=1e-6)).sqrt()
        k = k * self.weight
        if labels is None:
            labels = self.cluster(k, seed + (head << 32))
        self.labels, segment = labels, preset.segment or len(k)
        clusters = sum(max(1, min(segment, len(k) - begin) // preset.tokens_per_cluster)
                       for begin in range(0, len(k), segment))
        self.sizes = torch.bincount(labels, minlength=clusters)
        sums = torch.zeros(clusters, k.shape[1], device=k.device).index_add_(0, labels, k)
        self.centroids = stored(sums / self.sizes.clamp(min=1)[:, None])
        sums = torch.zeros_like(self.centroids).index_add_(0, self.labels, v)
        self.value_means = stored(sums / self.sizes.clamp(min=1)[:, None])
        order = torch.sort(self.labels, stable=True).indices
        begins = self.sizes.cumsum(0) - self.sizes
        self.rank_in_cluster = torch.empty_like(self.labels)
        self.rank_in_cluster[order] = (torch.arange(len(k), device=k.device) -
                                       begins[self.labels[order]])
        if preset.bits:
            self.coded_keys = self.centroids[self.labels] + through_codes(
                k - self.centroids[self.labels], preset.bits, preset.group_channels)
            self.coded_values = self.value_means[self.labels] + through_codes(
                v - self.value_means[self.labels], preset.bits, preset.group_channels)

    def cluster(self, k: torch.Tensor, seed: int) -> torch.Tensor:
        preset, labels, first = self.preset, [], 0
        segment = preset.segment or len(k)
        for i, begin in enumerate(range(0, len(k), segment)):
            part = k[begin:begin + segment]
            count = max(1, len(part) // preset.tokens_per_cluster)
            labels.append(spherical_kmeans(part, count, preset, seed + i) + first)
            first += count
        return torch.cat(labels)

    def select(self, query: torch.Tensor, budget: int, coded_tokens: int | None = None):
        """query [steps, group, head_dim] -> exact mask [steps, 1 or group, tokens] (sinks left out), state
        output [steps, group, head_dim] and log-sum-exp [steps, group], or None and None without a state.
        `coded_tokens`: W, if not the preset's."""
        preset, scale = self.preset, query.shape[-1] ** -0.5
        wanted = preset.coded_tokens if coded_tokens is None else coded_tokens
        q = query / self.weight
        scores = (q @ self.centroids.T * scale).masked_fill(self.sizes == 0, NONE)
        ranked = torch.softmax(scores, -1).sum(1, keepdim=True) if preset.shared else scores
        room = max(budget - SINKS, 0)
        if preset.coded_tokens:
            room = max(room, wanted)
        elif preset.refine:
            room *= preset.refine
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        sizes = self.sizes[order]
        before = sizes.cumsum(-1) - sizes
        taken = torch.zeros_like(sizes).scatter_(
            -1, order, torch.minimum((room - before).clamp(min=0), sizes))
        touched = self.rank_in_cluster < taken[..., self.labels]      # [steps, 1 or group, tokens]
        if not preset.coded_tokens and not preset.refine:
            return touched, None, None
        logits = (q @ self.coded_keys.T * scale).masked_fill(~touched, NONE)
        sink_logits = query @ self.sink_keys.T * scale
        weights = torch.softmax(torch.cat([sink_logits, logits], -1), -1)[..., SINKS:].sum(1)
        weights.masked_fill_(~touched[:, 0], -1)
        keep = min(max(budget - SINKS, 0), room)
        best = weights.argsort(dim=-1, descending=True, stable=True)[:, :keep]
        exact = torch.zeros_like(touched[:, 0]).scatter_(1, best, True) & touched[:, 0]
        # The estimated zone: the next clusters by rank that no token was taken of, while they have any.
        rest = (taken[:, 0] == 0) & (self.sizes > 0)
        count = int(preset.estimated * len(self.sizes))
        place = (ranked[:, 0].masked_fill(~rest, -1).argsort(dim=-1, descending=True, stable=True)
                 .argsort(dim=-1, stable=True))
        estimated = (rest & (place < count))[:, None]
        parts = [((scores + self.sizes.clamp(min=1).float().log()).masked_fill(~estimated, -torch.inf),
                  self.value_means)]
        if preset.coded_tokens:
            coded = touched & ~exact[:, None]
            parts.append((logits.masked_fill(~coded, -torch.inf), self.coded_values))
        lse = torch.logsumexp(torch.stack([torch.logsumexp(part, -1) for part, _ in parts]), 0)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
        output = sum((part - finite).exp() @ values for part, values in parts)
        return exact[:, None], output, lse


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
           mask: torch.Tensor | None = None, state: torch.Tensor | None = None,
           lse: torch.Tensor | None = None) -> torch.Tensor:
    """query [steps, group, head_dim] of the last `steps` of keys, values [tokens, head_dim] -> output like
    query. Of the first tokens those where mask [steps, 1 or group, first tokens] says so (None: all), of
    the rest those up to each step; merged with a state."""
    steps = len(query)
    logits = query @ keys.T * query.shape[-1] ** -0.5
    if mask is not None:
        logits[..., :mask.shape[-1]].masked_fill_(~mask, -torch.inf)
    later = torch.ones(steps, steps, dtype=torch.bool, device=query.device).triu(1)
    logits[..., len(keys) - steps:].masked_fill_(later[:, None], -torch.inf)
    total = torch.logsumexp(logits, -1)
    if state is not None:
        total = torch.logaddexp(total, lse)
    output = (logits - total[..., None]).exp() @ values
    return output if state is None else output + (lse - total).exp()[..., None] * state


def exact_top(query: torch.Tensor, keys: torch.Tensor, budget: int) -> torch.Tensor:
    """Exact top-B shared per KV head, sinks included: mask [steps, 1, tokens]."""
    weights = torch.softmax(query @ keys.T * query.shape[-1] ** -0.5, -1).sum(1)
    weights[:, :SINKS] = torch.inf
    best = weights.topk(min(budget, len(keys)), -1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, best, True)[:, None]


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
        """Mask [steps, group, tokens]. The bound sum(max(q low, q high)) is the positive part of q against
        the highs and the negative part against the lows."""
        bound = query.clamp(min=0) @ self.high.T + query.clamp(max=0) @ self.low.T
        bound[..., 0] = torch.inf  # the sinks' page
        pages = bound.topk(min(max(1, budget // self.PAGE), bound.shape[-1]), -1).indices
        mask = torch.zeros_like(bound, dtype=torch.bool).scatter_(-1, pages, True)
        return mask.repeat_interleave(self.PAGE, -1)[..., :self.tokens]


def window(tokens: int, budget: int, device: torch.device) -> torch.Tensor:
    """Sinks and the newest tokens of the prompt: mask [1, 1, tokens]."""
    mask = torch.zeros(1, 1, tokens, dtype=torch.bool, device=device)
    mask[..., :SINKS] = True
    mask[..., max(SINKS, tokens - (budget - SINKS)):] = True
    return mask
