"""The worker's half: prompts on their way into the service, requests attached to prompts that lie there.

One Worker per process; the connector drives it, the attention backend asks it. It knows tensors and the
service, not vLLM. What fails while storing is dropped and counted, never raised: a store must not end an
engine. What fails while loading or decoding is a load failure of that request, told to the engine, which
recomputes it or fails it; a token from half an answer is never given out.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any

import numpy as np
import torch

from clusterkv import _calls, _shards, _tensors
from clusterkv.client import Client, tls
from clusterkv.errors import AlreadyExistsError, ClusterKVError
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Options:
    """kv_connector_extra_config."""

    server: str                  # "host:port", or several as for clusterkv.Client
    preset: str = "default"
    budget: int | None = None
    hot_tokens: int = 256
    dense_layers: int = 2        # layers [0, dense_layers) attend to everything, loaded back into vLLM's pages
    min_tokens: int = 1024       # shorter prompts stay in vLLM's own cache
    ttl_seconds: float = 600.0   # life of a stored prompt after its last use
    wait_s: float = 10.0         # how long a request waits for a prompt that is being stored
    timeout: float = 60.0
    tls_ca: str = ""             # PEM files, as for ckv; the next two where the server asks for a certificate
    tls_cert: str = ""
    tls_key: str = ""

    def client(self) -> Client:
        credentials = tls(self.tls_ca, self.tls_cert or None, self.tls_key or None) if self.tls_ca else None
        return Client(self.server, timeout=self.timeout, credentials=credentials)


@dataclasses.dataclass
class Step:
    """What one request does in one engine step."""

    request_id: str
    first_token: int                  # of this step's tokens, in the request
    tokens: int
    store_as: str = ""                # the prompt's name under which this step's KV is stored
    store_tokens: int = 0             # of the prompt, all steps together
    attached_to: str = ""             # the prompt's name that it decodes from
    prompt_tokens: int = 0            # of that prompt
    block_ids: list[int] = dataclasses.field(default_factory=list)  # with a prompt to load: all so far


@dataclasses.dataclass
class _Store:
    writer: Any
    query_squares: dict[int, torch.Tensor]  # layer: sum over group and tokens [kv_heads, head_dim]
    put_layers: int = 0


class Worker:
    def __init__(self, options: Options, *, layers: int, kv_heads: int, query_heads: int, head_dim: int,
                 dtype: torch.dtype, block_size: int):
        self.options, self.layers, self.kv_heads = options, layers, kv_heads
        self.query_heads, self.head_dim, self.block_size = query_heads, head_dim, block_size
        self.dtype = dtype
        self.failed_blocks: set[int] = set()
        self.counters = dict.fromkeys(("stored", "store_failures", "attached", "load_failures"), 0)
        self._steps: dict[int, Step] = {}
        self._stores: dict[str, _Store] = {}
        self._decoders: dict[str, Any] = {}
        self._seals: list[threading.Thread] = []
        self._client = options.client()
        self._connection: Any = None

    # --- one engine step

    def begin_step(self, steps: dict[int, Step], kv_caches: dict[int, torch.Tensor]) -> None:
        """steps: by the first slot that each request writes in this step (no other request can). Attaches
        who is new and loads the dense layers into kv_caches [blocks, kv_heads, block_size, 2 * head_dim]."""
        self._steps = steps
        for step in steps.values():
            if step.attached_to and step.request_id not in self._decoders:
                try:
                    self._attach(step, kv_caches)
                    self.counters["attached"] += 1
                except ClusterKVError as error:
                    self._load_failed(step, error)

    def step_at(self, slot: int) -> Step | None:
        return self._steps.get(slot)

    def end_requests(self, request_ids: set[str]) -> None:
        """Finished or preempted: gives back their leases, and prompts that were not stored whole."""
        for request_id in request_ids:
            self._decoders.pop(request_id, None)
            self._stores.pop(request_id, None)

    def take_failed_blocks(self) -> set[int]:
        failed, self.failed_blocks = self.failed_blocks, set()
        return failed

    def shutdown(self) -> None:
        for thread in self._seals:
            thread.join(self.options.timeout)
        self._decoders, self._stores = {}, {}
        self._client.close()

    # --- store

    def store(self, step: Step, layer: int, keys: torch.Tensor, values: torch.Tensor,
              query_squares: torch.Tensor) -> None:
        """This step's K and V of one layer, [tokens, kv_heads, head_dim], and the sum of squares of its
        queries [kv_heads, head_dim]. Copies to the host once; sends in the background."""
        wanted = min(step.first_token + step.tokens, step.store_tokens) - step.first_token
        if wanted <= 0:
            return
        try:
            state = self._stores.get(step.request_id)
            if state is None:
                if layer or step.first_token:
                    return  # it failed before
                state = self._stores[step.request_id] = self._open(step)
            squares = state.query_squares.get(layer)
            state.query_squares[layer] = query_squares if squares is None else squares + query_squares
            last = step.first_token + wanted == step.store_tokens
            rms = np.zeros(0, np.float32)
            if last:
                count = step.store_tokens * (self.query_heads // self.kv_heads)
                rms = (state.query_squares[layer] / count).sqrt().float().cpu().numpy()
            _tensors.put(state.writer, layer, step.first_token, keys[:wanted], values[:wanted], rms)
            state.put_layers += last
            if state.put_layers == self.layers:
                del self._stores[step.request_id]
                thread = threading.Thread(target=self._seal, args=(state.writer,), daemon=True)
                self._seals = [t for t in self._seals if t.is_alive()] + [thread]
                thread.start()
        except AlreadyExistsError:
            pass  # another request is storing the same prompt, or has
        except ClusterKVError as error:
            self._store_failed(error)
            self._stores.pop(step.request_id, None)

    def _open(self, step: Step) -> _Store:
        # Without an owner: the prompt outlives this worker, by its time to live.
        request = _calls.open_request(
            step.store_as, layers=self.layers, kv_heads=self.kv_heads, query_heads=self.query_heads,
            head_dim=self.head_dim, prompt_tokens=step.store_tokens,
            dtype=str(self.dtype).removeprefix("torch."), preset=self.options.preset,
            budget=self.options.budget, ttl_seconds=self.options.ttl_seconds, index={"window_tokens": 0})
        sequence = self._client.open_sequence(request)
        from clusterkv import _native

        return _Store(_native.PrefillWriter(self._native(), sequence.SerializeToString()), {})

    def _seal(self, writer: Any) -> None:
        try:
            writer.finish()
            self.counters["stored"] += 1
        except ClusterKVError as error:
            self._store_failed(error)

    def _store_failed(self, error: ClusterKVError) -> None:
        self.counters["store_failures"] += 1
        logger.warning("a prompt was not stored: %s", error)

    # --- load and decode

    def _native(self) -> Any:
        if self._connection is None:
            options = self.options
            self._connection = _shards.native_connection(
                options.server, worker_name="vllm", timeout=options.timeout, tls_ca=options.tls_ca,
                tls_cert=options.tls_cert, tls_key=options.tls_key)
        return self._connection

    def _attach(self, step: Step, kv_caches: dict[int, torch.Tensor]) -> None:
        from clusterkv import _native

        sequence = self._client.get(step.attached_to)
        if step.first_token != step.prompt_tokens or sequence.prompt_tokens != step.prompt_tokens:
            raise ClusterKVError(f"prompt: expected {step.prompt_tokens} tokens, {step.attached_to} has "
                                 f"{sequence.prompt_tokens}, the step begins at {step.first_token}")
        hot = pb.HotCacheConfig(capacity_tokens=self.options.hot_tokens,
                                policy=pb.HOT_CACHE_POLICY_TOKEN_LRU)
        select = types.SelectConfig()
        if self.options.budget is not None:
            select.budget_tokens = self.options.budget
        # Decoded tokens stay here: requests that share a prompt do not share what they generate.
        decoder = _native.DecodeSession(self._native(), sequence.handle.SerializeToString(),
                                        hot.SerializeToString(), False, select.SerializeToString())
        for layer in range(min(self.options.dense_layers, self.layers)):
            self._load_layer(sequence, layer, step, kv_caches[layer])
        self._decoders[step.request_id] = decoder

    def _load_layer(self, sequence: pb.Sequence, layer: int, step: Step, kv_cache: torch.Tensor) -> None:
        """All of a layer's prompt into the request's pages."""
        tokens, dim = step.prompt_tokens, self.head_dim
        rows = torch.empty(tokens, self.kv_heads, 2 * dim, dtype=self.dtype)
        sinks = min(tokens, sequence.index.sink_tokens)
        clustered = list(range(sinks, tokens))
        found = 0
        request = pb.RecallClustersRequest(sequence=sequence.handle, layer=layer, heads=[
            pb.RecallClustersRequest.Head(kv_head=h, positions=clustered) for h in range(self.kv_heads)])
        steady = pb.RecallClustersRequest(sequence=sequence.handle, layer=layer, steady_zone=True)
        for call in (request, steady):
            if call is request and not clustered:
                continue
            for chunk in self._client.recall_stream(call):
                records = torch.frombuffer(bytearray(chunk.records), dtype=self.dtype).view(-1, 2 * dim)
                rows[torch.tensor(chunk.positions, dtype=torch.long), chunk.kv_head] = records
                found += len(chunk.positions)
        if found != tokens * self.kv_heads:
            raise ClusterKVError(f"layer {layer}: expected {tokens * self.kv_heads} records, got {found}")
        blocks = torch.tensor(step.block_ids, device=kv_cache.device)
        at = torch.arange(tokens, device=kv_cache.device)
        kv_cache[blocks[at // self.block_size], :, at % self.block_size] = rows.to(kv_cache.device)

    def decode(self, step: Step, layer: int, queries: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor) -> torch.Tensor | None:
        """This step's tokens of an attached request: queries [tokens, query_heads, head_dim], keys, values
        [tokens, kv_heads, head_dim] -> output like queries, or None: the request has failed."""
        decoder = self._decoders.get(step.request_id)
        if decoder is None:
            return None
        output = torch.empty(queries.shape, dtype=torch.float32)
        try:
            decoder.steps(layer, _tensors.host(keys), _tensors.host(values), _tensors.host(queries), output.numpy())
        except ClusterKVError as error:
            self._decoders.pop(step.request_id, None)
            self._load_failed(step, error)
            return None
        return output.to(queries)

    def is_dense(self, layer: int) -> bool:
        return layer < self.options.dense_layers

    def _load_failed(self, step: Step, error: ClusterKVError) -> None:
        self.counters["load_failures"] += 1
        # All of the prompt's pages: none of the sparse layers' KV is in them.
        self.failed_blocks.update(step.block_ids)
        logger.warning("request %s lost its prompt: %s", step.request_id, error)


_worker: Worker | None = None


def set_worker(worker: Worker | None) -> None:
    """By the connector, once per process: the attention backend finds it here."""
    global _worker
    _worker = worker


def current_worker() -> Worker | None:
    return _worker

