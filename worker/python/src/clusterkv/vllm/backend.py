"""The attention backend in vLLM's CUSTOM slot: full attention over vLLM's own pages in plain PyTorch, and
attention through the service for requests whose prompt lies there.

A page is [kv_heads, block_size, 2 * head_dim], K beside V. Which request a row of the batch is, the metadata
does not say; the first slot that a row writes does, for no two requests write to one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from vllm.v1.attention.backend import (AttentionBackend, AttentionCGSupport, AttentionImpl,
                                       AttentionMetadata, AttentionMetadataBuilder, AttentionType,
                                       CommonAttentionMetadata)

from clusterkv.vllm.worker import Step, current_worker


@dataclasses.dataclass
class ClusterKVMetadata(AttentionMetadata):
    starts: list[int]                 # [rows + 1] into the batch's tokens
    seq_lens: list[int]
    block_table: torch.Tensor         # [rows, blocks]
    slot_mapping: torch.Tensor        # [tokens]
    first_slots: list[int]
    # Filled by forward, read by the connector's save_kv_layer: [rows, kv_heads, head_dim] per layer.
    query_squares: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


class ClusterKVMetadataBuilder(AttentionMetadataBuilder[ClusterKVMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata,
              fast_build: bool = False) -> ClusterKVMetadata:
        common = common_attn_metadata
        rows = common.num_reqs
        starts = common.query_start_loc_cpu[:rows + 1].tolist()
        slots = common.slot_mapping[:common.num_actual_tokens]
        begins = torch.tensor([min(s, max(0, len(slots) - 1)) for s in starts[:-1]], device=slots.device)
        return ClusterKVMetadata(
            starts=starts, seq_lens=common.seq_lens[:rows].tolist(),
            block_table=common.block_table_tensor[:rows], slot_mapping=slots,
            first_slots=slots[begins].tolist() if len(slots) else [-1] * rows)


class ClusterKVBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["ClusterKVImpl"]:
        return ClusterKVImpl

    @staticmethod
    def get_builder_cls() -> type["ClusterKVMetadataBuilder"]:
        return ClusterKVMetadataBuilder


class ClusterKVImpl(AttentionImpl[ClusterKVMetadata]):
    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
                 alibi_slopes: list[float] | None = None, sliding_window: int | None = None,
                 kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
                 attn_type: str = AttentionType.DECODER,
                 kv_sharing_target_layer_name: str | None = None) -> None:
        for name, given in (("alibi_slopes", alibi_slopes), ("sliding_window", sliding_window),
                            ("logits_soft_cap", logits_soft_cap),
                            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name)):
            if given:
                raise NotImplementedError(f"ClusterKVBackend: {name} is not supported")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"ClusterKVBackend: attn_type {attn_type} is not supported")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(self, layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                kv_cache: torch.Tensor, attn_metadata: ClusterKVMetadata, output: torch.Tensor,
                output_scale: torch.Tensor | None = None,
                output_block_scale: torch.Tensor | None = None) -> torch.Tensor:
        """query [tokens, heads, head_dim], key, value [tokens, kv_heads, head_dim], kv_cache [blocks,
        kv_heads, block_size, 2 * head_dim], output like query."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("ClusterKVBackend: quantized output is not supported")
        if attn_metadata is None:  # a profiling run
            return output.fill_(0)
        meta, worker = attn_metadata, current_worker()
        tokens, size = meta.starts[-1], kv_cache.shape[2]
        q, k, v = (t[:tokens].view(tokens, -1, self.head_size) for t in (query, key, value))
        slots = meta.slot_mapping[:tokens]
        kv_cache[slots // size, :, slots % size] = torch.cat([k, v], -1)
        out = output[:tokens].view(tokens, self.num_heads, self.head_size)
        squares = torch.zeros(len(meta.seq_lens), self.num_kv_heads, self.head_size, device=q.device)
        index = layer_index(layer.layer_name)
        for row, (begin, end) in enumerate(zip(meta.starts, meta.starts[1:])):
            if begin == end:
                continue
            step = worker.step_at(meta.first_slots[row]) if worker else None
            if worker and step and step.attached_to and not worker.is_dense(index):
                own = self._through_service(worker, step, index, q[begin:end], k[begin:end], v[begin:end])
            else:
                own = self._over_pages(q[begin:end], kv_cache, meta.block_table[row], meta.seq_lens[row])
            out[begin:end] = own
            if step and step.store_as:
                kept = min(end, begin + max(0, step.store_tokens - step.first_token))
                squares[row] = (q[begin:kept].float() * self._factor()).view(
                    kept - begin, self.num_kv_heads, -1, self.head_size).pow(2).sum((0, 2))
        meta.query_squares[layer.layer_name] = squares
        return output

    def _factor(self) -> float:
        """The service scales logits by 1 / sqrt(head_dim): another scale goes into the query."""
        return self.scale * self.head_size ** .5

    def _through_service(self, worker, step: Step, index: int, q, k, v) -> torch.Tensor:
        factor = self._factor()
        out = worker.decode(step, index, q if abs(factor - 1) < 1e-6 else q * factor, k, v)
        # A request that has lost its prompt is recomputed or failed by the engine: nobody reads this.
        return torch.zeros_like(q) if out is None else out

    def _over_pages(self, q, kv_cache, blocks, length: int) -> torch.Tensor:
        steps, size = q.shape[0], kv_cache.shape[2]
        pages = kv_cache[blocks[:-(-length // size)].long()]            # [blocks, kv_heads, size, 2 dim]
        kv = pages.transpose(0, 1).reshape(self.num_kv_heads, -1, 2 * self.head_size)[:, :length]
        k, v = kv.split(self.head_size, -1)
        mask = torch.ones(steps, length, dtype=torch.bool, device=q.device).tril(length - steps)
        return F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask,
                                              scale=self.scale, enable_gqa=True)[0].transpose(0, 1)


def layer_index(layer_name: str) -> int:
    """Of "model.layers.7.self_attn.attn": 7."""
    numbers = [int(part) for part in layer_name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise NotImplementedError(f"ClusterKVBackend: expected one layer number in {layer_name}")
    return numbers[0]
