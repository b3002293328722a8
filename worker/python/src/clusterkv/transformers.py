"""Hugging Face models with their KV in the service.

Importing this module registers the attention implementation ``"clusterkv"``. A model that was loaded with
it and is given a ``ClusterKVCache`` streams the prompt's KV to the service, layer by layer, and decodes
through it: each layer's exact query selects, the worker attends to what it holds and what it recalled, and
the service's attention state answers for the rest. Without such a cache the model attends as with "sdpa".

>>> import clusterkv.transformers as ckv
>>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="clusterkv")
>>> cache = ckv.ClusterKVCache(model.config, server="localhost:7400", preset="default", budget=64)
>>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=32)

The first forward pass is the prompt; every later one, of one token or of several, is decoded token by
token. One cache serves one ``generate`` call; ``reset()`` makes it new.
"""

from __future__ import annotations

import math
import uuid
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from clusterkv import _calls, _shards, _tensors
from clusterkv.errors import StaleHandleError, UnavailableError, UnsupportedError
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _check_config(config: Any) -> None:
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in SUPPORTED_MODELS:
        raise UnsupportedError(f"model_type: expected one of {', '.join(SUPPORTED_MODELS)}, got {kind}",
                               code="UNIMPLEMENTED", reason="UNSUPPORTED")
    types_of_layers = set(getattr(config, "layer_types", None) or ())
    if types_of_layers - {"full_attention"} or (
            not types_of_layers and getattr(config, "sliding_window", None)):
        raise UnsupportedError(f"{kind} with sliding-window layers: only full attention is supported",
                               code="UNIMPLEMENTED", reason="UNSUPPORTED")


class _RemoteLayer(DynamicLayer):
    """A layer whose KV lies in the service: holds none itself, only how long it is."""

    def __init__(self, cache: "ClusterKVCache", layer_idx: int):
        super().__init__()
        self.cache, self.layer_idx, self.length = cache, layer_idx, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # The attention function gets no more than these tensors: the handle rides on the keys.
        keys = key_states.view(key_states.shape)
        keys._clusterkv = self
        self.length += key_states.shape[-2]
        return keys, value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0


class ClusterKVCache(Cache):
    """A Transformers cache whose layers from ``dense_layers`` on lie in the service.

    Arguments: ``server`` "host:port", or several as for ``clusterkv.Client`` (each row's sequence goes to the
    one that owns its name); ``preset`` and ``budget`` (exact tokens per KV head, sinks included; None: the
    preset's); ``codec`` "raw" or "k8v4"; ``hot_tokens``: what the decode side keeps of earlier recalls, per KV
    head and layer; ``max_decode_tokens``: memory reserved for generated tokens; ``index`` and ``select``:
    further fields of IndexConfig and SelectConfig; ``hot_policy``: "token_lru", "cluster_lru" or "last_steps";
    ``timeout``: seconds of a call, and how long a step waits for a server that is away; ``tls_ca``,
    ``tls_cert``, ``tls_key``: PEM files as for ``ckv``, the last two where the server asks for a certificate;
    ``tls_server_name``: the name in the server's, if not the target's host.

    Raises UnsupportedError for models, layers and generation modes (beam search) that it cannot serve.
    """

    def __init__(self, config: Any, *, server: str, preset: str = "default", budget: int | None = None,
                 codec: str = "raw", hot_tokens: int = 256, dense_layers: int = 2,
                 max_decode_tokens: int = 4096, window_tokens: int | None = None,
                 hot_policy: str = "token_lru", name: str | None = None, timeout: float = 60.0,
                 index: dict[str, Any] | None = None, select: dict[str, Any] | None = None,
                 tls_ca: str = "", tls_cert: str = "", tls_key: str = "", tls_server_name: str = ""):
        from clusterkv import _native

        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        _check_config(config)
        self.config = config
        self.dense_layers = min(dense_layers, config.num_hidden_layers)
        self.kv_heads = config.num_key_value_heads
        self.query_heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.query_heads
        self._native = _native
        self._connection = _shards.native_connection(
            server, worker_name="transformers", timeout=timeout, tls_ca=tls_ca, tls_cert=tls_cert,
            tls_key=tls_key, tls_server_name=tls_server_name)
        self._name = name or f"hf-{uuid.uuid4().hex[:12]}"
        self._open = {"preset": preset, "budget": budget, "codec": codec,
                      "max_decode_tokens": max_decode_tokens, "index": dict(index or {}),
                      "select": dict(select or {})}
        if window_tokens is not None:
            self._open["index"]["window_tokens"] = window_tokens
        self._hot = pb.HotCacheConfig(capacity_tokens=hot_tokens, steps=1, policy=pb.HotCachePolicy.Value(
            f"HOT_CACHE_POLICY_{hot_policy.upper()}"))
        self._rounds = 0
        layers: list[Any] = [DynamicLayer() for _ in range(self.dense_layers)]
        layers += [_RemoteLayer(self, i) for i in range(self.dense_layers, config.num_hidden_layers)]
        super().__init__(layers=layers)
        self._clear()

    def _clear(self) -> None:
        self._sequences: list[pb.Sequence] = []
        self._writers: list[Any] = []
        self._decoders: list[Any] = []
        self._padding: list[int] = []
        self._figures: dict[str, float] = {}
        self._tokens = 0
        self._element_bytes = 2

    # --- prompt

    def _start(self, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        batch, _, tokens, _ = key.shape
        if key.dtype not in _DTYPES:
            raise UnsupportedError(f"dtype: expected float32, float16 or bfloat16, got {key.dtype}",
                                   code="UNIMPLEMENTED", reason="UNSUPPORTED")
        self._element_bytes = key.element_size()
        self._rounds += 1
        for row in range(batch):
            valid = tokens if mask is None else int(mask[row, 0, -1].sum())
            if mask is not None and not bool(mask[row, 0, -1, tokens - valid:].all()):
                raise UnsupportedError("attention_mask: only padding on the left is supported",
                                       code="UNIMPLEMENTED", reason="UNSUPPORTED")
            request = _calls.open_request(
                f"{self._name}-{self._rounds}-{row}", kv_heads=self.kv_heads,
                layers=self.config.num_hidden_layers - self.dense_layers,
                query_heads=self.query_heads, head_dim=self.head_dim, prompt_tokens=valid,
                dtype=_DTYPES[key.dtype], **self._open)
            sequence = pb.Sequence.FromString(self._connection.open(request.SerializeToString()))
            self._sequences.append(sequence)
            self._padding.append(tokens - valid)
            self._writers.append(self._native.PrefillWriter(self._connection,
                                                            sequence.SerializeToString()))
        self._tokens = tokens

    def _stream(self, layer: "_RemoteLayer", query: torch.Tensor, key: torch.Tensor,
                value: torch.Tensor, mask: torch.Tensor | None) -> None:
        if not self._writers:
            self._start(key, mask)
        group = self.query_heads // self.kv_heads
        for row, writer in enumerate(self._writers):
            pad = self._padding[row]
            k = key[row, :, pad:].transpose(0, 1)      # [tokens, kv_heads, head_dim]
            v = value[row, :, pad:].transpose(0, 1)
            q = query[row, :, pad:].float().reshape(self.kv_heads, group, -1, self.head_dim)
            rms = q.pow(2).mean(dim=(1, 2)).sqrt().contiguous().cpu().numpy()
            _tensors.put(writer, layer.layer_idx - self.dense_layers, 0, k, v, rms)

    def _finish_prompt(self) -> None:
        for writer in self._writers:
            sequence = pb.Sequence.FromString(writer.finish())
            self._decoders.append(self._native.DecodeSession(
                self._connection, sequence.handle.SerializeToString(), self._hot.SerializeToString(),
                sequence.index.window_tokens > 0))
        self._writers = []

    # --- decode

    def _decode(self, layer: "_RemoteLayer", query: torch.Tensor, key: torch.Tensor,
                value: torch.Tensor) -> torch.Tensor:
        if not self._decoders:
            self._finish_prompt()
        if query.shape[0] != len(self._decoders):
            raise UnsupportedError(f"batch: the prompt had {len(self._decoders)} rows, now "
                                   f"{query.shape[0]}", code="UNIMPLEMENTED", reason="UNSUPPORTED")
        output = torch.empty(query.shape[0], query.shape[2], self.query_heads, self.head_dim)
        for row, decoder in enumerate(self._decoders):
            figures = decoder.steps(
                layer.layer_idx - self.dense_layers, _tensors.host(key[row].transpose(0, 1)),
                _tensors.host(value[row].transpose(0, 1)), _tensors.host(query[row].transpose(0, 1)),
                output[row].numpy())
            for name, number in figures.items():
                self._figures[name] = self._figures.get(name, 0) + number
        return output.to(query)

    # --- what generate() asks of a cache

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UnsupportedError("beam search: sequences in the service cannot be reordered",
                               code="UNIMPLEMENTED", reason="UNSUPPORTED")

    def crop(self, max_length: int) -> None:
        raise UnsupportedError("crop: decoded tokens in the service cannot be taken back",
                               code="UNIMPLEMENTED", reason="UNSUPPORTED")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedError("batch_repeat_interleave: sequences in the service are not copied",
                               code="UNIMPLEMENTED", reason="UNSUPPORTED")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UnsupportedError("batch_select_indices: sequences in the service cannot be dropped",
                               code="UNIMPLEMENTED", reason="UNSUPPORTED")

    def reset(self) -> None:
        """Releases the sequences and starts anew: the next forward pass is a prompt."""
        self.release()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and not isinstance(layer, _RemoteLayer):
                layer.keys = layer.values = None
                layer.is_initialized = False
            else:
                layer.reset()
        self._clear()

    def release(self) -> None:
        """Gives the sequences back. Errors of a server that is gone are no errors here."""
        self._decoders, self._writers = [], []
        for sequence in self._sequences:
            try:
                self._connection.release(sequence.handle.SerializeToString())
            except (StaleHandleError, UnavailableError):
                pass
        self._sequences = []

    def reconnect(self, timeout: float = 60.0) -> bool:
        """Waits until the server answers again, of several any; True if its sequences are gone, or may be."""
        return self._connection.reconnect(timeout)

    def selected(self, layer_idx: int, row: int = 0) -> list[list[int]]:
        """Positions that the last step of a layer attended to exactly, per KV head, without sinks and
        window."""
        return self._decoders[row].last_positions(layer_idx - self.dense_layers)

    def stats(self) -> dict[str, float]:
        """Sums over rows, layers, heads and steps: exact_tokens, recalled_tokens, recalled_bytes,
        state_bytes (all that was answered for tokens) and correction_bytes (the part of it that makes up
        for a codec's loss), select_us, recall_us; hit_rate; ingest_window_bytes and
        ingest_host_bytes (of prompts that lay on a GPU: read there by the server, or copied through host
        memory); held_bytes (of this worker now, dense layers left out) and full_bytes (what a full cache of
        the same layers would hold)."""
        figures, counts = self._figures, self._connection.ingest_counts()
        exact = figures.get("exact_tokens", 0)
        length = max((layer.length for layer in self.layers if isinstance(layer, _RemoteLayer)), default=0)
        full = sum(length - pad for pad in self._padding)
        return {**{name: figures.get(name, 0) for name in (
                    "exact_tokens", "recalled_tokens", "recalled_bytes", "state_bytes",
                    "correction_bytes", "select_us", "recall_us")},
                "hit_rate": figures.get("hits", 0) / exact if exact else 0.0,
                "ingest_window_bytes": counts["window_bytes"], "ingest_host_bytes": counts["host_bytes"],
                "held_bytes": sum(decoder.held_bytes for decoder in self._decoders),
                "full_bytes": full * 2 * self.kv_heads * self.head_dim * self._element_bytes *
                (self.config.num_hidden_layers - self.dense_layers)}


def clusterkv_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                        value: torch.Tensor, attention_mask: torch.Tensor | None,
                        scaling: float | None = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function "clusterkv": query [batch, query_heads, tokens, head_dim]."""
    layer = getattr(key, "_clusterkv", None)
    if layer is None:  # a dense layer, or a model without our cache
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    cache = layer.cache
    # The service scales logits by 1 / sqrt(head_dim): another scale goes into the query.
    factor = (scaling or cache.head_dim ** -0.5) * math.sqrt(cache.head_dim)
    scaled = query if abs(factor - 1) < 1e-6 else query * factor
    if layer.length == query.shape[2]:
        out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        cache._stream(layer, scaled, key, value, attention_mask)
        return out
    return cache._decode(layer, scaled, key, value), None


def generate(model: Any, cache: ClusterKVCache, *, on_loss: str = "error", attempts: int = 3,
             **inputs: Any) -> Any:
    """``model.generate`` with a policy for a server that is lost under way.

    on_loss "error": the typed error (StaleHandleError, UnavailableError) ends the call. "recompute":
    waits for the server, prefills again and generates from the start, up to ``attempts`` times. A wrong
    token is never the answer.
    """
    if on_loss not in ("error", "recompute"):
        raise ValueError(f'on_loss: expected "error" or "recompute", got {on_loss!r}')
    for attempt in range(attempts):
        try:
            return model.generate(**inputs, past_key_values=cache)
        except (StaleHandleError, UnavailableError):
            if on_loss == "error" or attempt + 1 == attempts:
                raise
            cache.reconnect()
            cache.reset()
    raise AssertionError("unreachable")


AttentionInterface.register("clusterkv", clusterkv_attention)
AttentionMaskInterface.register("clusterkv", sdpa_mask)
__all__ = ["ClusterKVCache", "SUPPORTED_MODELS", "clusterkv_attention", "generate"]
