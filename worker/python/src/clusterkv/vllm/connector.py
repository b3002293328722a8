"""The KV connector: the scheduler's half finds prompts and says which request does what in each step, the
worker's half (``worker.Worker``) does it.

The last token of a prompt is never stored: the engine always computes it, and with its query the first
selection is made. Decode requests are attached for as long as they run; what a request generates stays in
its own worker. Requests whose prompt is lost under way are reported by their pages (`kv_load_failure_policy`
"recompute" computes them again, dense; "fail" ends them).
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (KVConnectorBase_V1, KVConnectorMetadata,
                                                               KVConnectorRole)

from clusterkv.client import Client
from clusterkv.vllm.backend import ClusterKVMetadata, layer_index
from clusterkv.vllm.prompts import Directory, Namespace, prefix_hashes
from clusterkv.vllm.worker import Options, Step, Worker, current_worker, set_worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclasses.dataclass
class ClusterKVConnectorMetadata(KVConnectorMetadata):
    steps: dict[int, Step] = dataclasses.field(default_factory=dict)  # by the first slot that it writes
    ended: set[str] = dataclasses.field(default_factory=set)          # preempted, or without their prompt


@dataclasses.dataclass
class _Request:
    """What the scheduler's half knows of a request."""

    block_ids: list[int] = dataclasses.field(default_factory=list)
    attached_hash: str = ""
    attached_tokens: int = 0
    store_hash: str = ""
    store_tokens: int = 0
    lost: bool = False


class ClusterKVConnector(KVConnectorBase_V1):
    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole,
                 kv_cache_config: "KVCacheConfig"):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = dict(self._kv_transfer_config.kv_connector_extra_config)
        self.options = Options(**extra)
        if vllm_config.cache_config.enable_prefix_caching:
            # The pages of a prompt that lies in the service hold nothing: sharing them would be wrong.
            raise ValueError("ClusterKVConnector: expected enable_prefix_caching=False, got True")
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._block_size = vllm_config.cache_config.block_size
        self._namespace = Namespace(model.model, str(model.dtype).removeprefix("torch."),
                                    parallel.tensor_parallel_size)
        self._worker: Worker | None = None
        self._kv_caches: dict[int, torch.Tensor] = {}
        if role == KVConnectorRole.WORKER:
            assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved "auto"
            self._rank = getattr(parallel, "rank", 0) % parallel.tensor_parallel_size
            self._worker = Worker(
                self.options, layers=model.get_num_layers(parallel),
                kv_heads=model.get_num_kv_heads(parallel),
                query_heads=model.get_num_attention_heads(parallel), head_dim=model.get_head_size(),
                dtype=model.dtype, block_size=self._block_size)
            set_worker(self._worker)
        else:
            self._client = self.options.client()
            self._directory = Directory(self._client, self._namespace)
            self._requests: dict[str, _Request] = {}
            self._waiting_since: dict[str, float] = {}
            self._ended: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a dropped store is a miss later on

    # --- scheduler's half

    @staticmethod
    def _salt(request: "Request") -> str | None:
        """What changes a prompt's KV besides its tokens; None: such prompts are not served."""
        if getattr(request, "mm_features", None) or not request.prompt_token_ids:
            return None
        lora = getattr(request, "lora_request", None)
        return f"{getattr(request, 'cache_salt', None) or ''}\0{lora.lora_name if lora else ''}"

    def get_num_new_matched_tokens(self, request: "Request",
                                   num_computed_tokens: int) -> tuple[int | None, bool]:
        salt = self._salt(request)
        tokens = request.prompt_token_ids or []
        known = self._requests.get(request.request_id)
        if salt is None or num_computed_tokens or len(tokens) <= self.options.min_tokens:
            return 0, False
        if known and known.lost:
            return 0, False
        self._directory.refresh()
        found = self._directory.longest(tokens, salt)
        if found is None:
            since = self._waiting_since.setdefault(request.request_id, time.monotonic())
            if time.monotonic() - since < self.options.wait_s:
                return None, False
            found = (0, "")
        length = found[0] if found[0] >= self.options.min_tokens else 0
        return length, False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks",
                                 num_external_tokens: int) -> None:
        self._waiting_since.pop(request.request_id, None)
        salt, tokens = self._salt(request), request.prompt_token_ids or []
        state = self._requests.setdefault(request.request_id, _Request())
        if salt is None:
            return
        if num_external_tokens:
            state.attached_tokens = num_external_tokens
            state.attached_hash = prefix_hashes(tokens, [num_external_tokens], salt)[num_external_tokens]
        elif len(tokens) > self.options.min_tokens and not state.lost:
            state.store_tokens = len(tokens) - 1
            state.store_hash = prefix_hashes(tokens, [len(tokens) - 1], salt)[len(tokens) - 1]

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        meta = ClusterKVConnectorMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            state = self._requests.setdefault(new.req_id, _Request())
            state.block_ids = list(new.block_ids[0])
            self._add_step(meta, new.req_id, new.num_computed_tokens, scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            state = self._requests.setdefault(request_id, _Request())
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                state.block_ids = []
                meta.ended.add(request_id)  # what it had decoded is computed again
            state.block_ids += blocks[0] if blocks else []
            self._add_step(meta, request_id, cached.num_computed_tokens[i], scheduler_output)
        meta.ended |= self._ended | (scheduler_output.preempted_req_ids or set())
        self._ended = set()
        return meta

    def _add_step(self, meta: ClusterKVConnectorMetadata, request_id: str, first_token: int,
                  scheduler_output: "SchedulerOutput") -> None:
        state = self._requests[request_id]
        if not state.attached_hash and first_token >= state.store_tokens:
            return
        step = Step(request_id, first_token, scheduler_output.num_scheduled_tokens[request_id])
        if state.attached_hash:
            step.attached_to, step.prompt_tokens = state.attached_hash, state.attached_tokens
            step.block_ids = state.block_ids[:-(-state.attached_tokens // self._block_size)]
        else:
            step.store_as, step.store_tokens = state.store_hash, state.store_tokens
        block = state.block_ids[first_token // self._block_size]
        meta.steps[block * self._block_size + first_token % self._block_size] = step

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Requests that lost their prompt run dense from here on."""
        invalid = connector_output.invalid_block_ids or set()
        for request_id, state in self._requests.items():
            if state.attached_hash and invalid & set(state.block_ids):
                state.attached_hash, state.attached_tokens, state.lost = "", 0, True
                self._ended.add(request_id)

    def request_finished(self, request: "Request",
                         block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        # What was put is copied already: vLLM may free its pages at once.
        state = self._requests.pop(request.request_id, None)
        self._waiting_since.pop(request.request_id, None)
        stored = {"prompt_tokens": state.store_tokens, "hash": state.store_hash} if (
            state and state.store_hash) else None
        return False, stored

    def reset_cache(self) -> bool | None:
        """Forgets what is known of the service; its sequences live on, by their time to live."""
        if self.role == KVConnectorRole.SCHEDULER:
            self._directory.refresh(force=True)
        return True

    # --- worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = {layer_index(name): cache for name, cache in kv_caches.items()}

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._worker and isinstance(connector_metadata, ClusterKVConnectorMetadata)
        self._worker.end_requests(connector_metadata.ended)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert self._worker and isinstance(metadata, ClusterKVConnectorMetadata)
        for step in metadata.steps.values():
            if step.attached_to:
                step.attached_to = self._namespace.name(self._rank, step.prompt_tokens, step.attached_to)
            if step.store_as:
                step.store_as = self._namespace.name(self._rank, step.store_tokens, step.store_as)
        self._worker.begin_step(metadata.steps, self._kv_caches)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # start_load_kv has loaded what is loaded

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata",
                      **kwargs: Any) -> None:
        assert self._worker
        if not isinstance(attn_metadata, ClusterKVMetadata):
            raise NotImplementedError("ClusterKVConnector: expected the attention backend CUSTOM of "
                                      f"clusterkv.vllm, got {type(attn_metadata).__name__}")
        size, index = kv_layer.shape[2], layer_index(layer_name)
        for row, (begin, end) in enumerate(zip(attn_metadata.starts, attn_metadata.starts[1:])):
            step = self._worker.step_at(attn_metadata.first_slots[row]) if begin < end else None
            if step and step.store_as:
                slots = attn_metadata.slot_mapping[begin:end]
                kv = kv_layer[slots // size, :, slots % size]
                keys, values = kv.chunk(2, -1)
                self._worker.store(step, index, keys, values, attn_metadata.query_squares[layer_name][row])

    def wait_for_save(self) -> None:
        return  # rows were copied by save_kv_layer

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker:
            self._worker.end_requests(finished_req_ids)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker else set()

    def shutdown(self) -> None:
        if self._worker:
            self._worker.shutdown()
            if current_worker() is self._worker:
                set_worker(None)
        else:
            self._client.close()

    # --- what the engine asks of the class

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # the hooks and the backend are Python between the graph's pieces
