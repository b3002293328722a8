"""What the sync and the asyncio client share: requests from arguments, shapes of arrays, replies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from clusterkv.errors import ClusterKVError, make_error
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

ELEMENT_TYPES = {"float32": types.ELEMENT_TYPE_FLOAT32, "float16": types.ELEMENT_TYPE_FLOAT16,
                 "bfloat16": types.ELEMENT_TYPE_BFLOAT16}
CHUNK_BYTES = 1 << 20
T = TypeVar("T")
M = TypeVar("M", pb.OpenSequenceRequest, pb.AttachRequest)


def element_type(array: Any) -> str:
    """"float32", "float16" or "bfloat16" of a NumPy or PyTorch array."""
    name = str(array.dtype).removeprefix("torch.")
    if name not in ELEMENT_TYPES:
        raise TypeError(f"expected float32, float16 or bfloat16, got {name}")
    return name


def array_bytes(array: Any) -> memoryview:
    """The bytes of a contiguous NumPy array or PyTorch CPU tensor, without a copy where it can be."""
    if hasattr(array, "detach"):  # a torch tensor: NumPy has no bfloat16, so by its 16-bit view
        import torch

        tensor = array.detach().contiguous().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
        array = tensor.numpy()
    return memoryview(np.ascontiguousarray(array)).cast("B")


def vector(array: Any) -> types.Vector:
    """A ``Vector`` of packed bytes; lists of numbers become plain values."""
    if isinstance(array, types.Vector):
        return array
    if isinstance(array, (list, tuple)):
        return types.Vector(values=[float(x) for x in np.ravel(array)])
    return types.Vector(data=bytes(array_bytes(array)), type=ELEMENT_TYPES[element_type(array)])


def to_array(v: types.Vector, shape: Sequence[int]) -> np.ndarray:
    """The float32 array of a ``Vector``."""
    return bytes_to_array(v.data, v.type, shape) if v.data else (
        np.asarray(v.values, np.float32).reshape(shape))


def bytes_to_array(data: bytes, kind: int, shape: Sequence[int]) -> np.ndarray:
    if kind == types.ELEMENT_TYPE_FLOAT16:
        return np.frombuffer(data, np.float16).astype(np.float32).reshape(shape)
    if kind == types.ELEMENT_TYPE_BFLOAT16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, np.float32).reshape(shape)


def handle(sequence: Any) -> types.SequenceHandle:
    """The handle of a name, a ``Sequence`` or a handle."""
    if isinstance(sequence, str):
        return types.SequenceHandle(name=sequence)
    return sequence.handle if isinstance(sequence, pb.Sequence) else sequence


def kv_chunks(sequence: types.SequenceHandle, layer: int, keys: Any, values: Any, first_token: int,
              query_rms: Any | None) -> Iterator[pb.PutKvRequest]:
    """One layer's K and V, [tokens, kv_heads, head_dim], as PutKv messages of about a megabyte."""
    if tuple(keys.shape) != tuple(values.shape) or len(keys.shape) != 3:
        raise ValueError("keys, values: expected equal shapes [tokens, kv_heads, head_dim], got "
                         f"{tuple(keys.shape)} and {tuple(values.shape)}")
    tokens = keys.shape[0]
    k, v = array_bytes(keys), array_bytes(values)
    row = len(k) // max(1, tokens)
    step = max(1, CHUNK_BYTES // (2 * row)) if row else 1
    if query_rms is not None:
        yield pb.PutKvRequest(sequence=sequence, statistics=pb.LayerStatistics(
            layer=layer, query_rms=vector(np.asarray(query_rms, np.float32))))
    for begin in range(0, tokens, step):
        end = min(tokens, begin + step)
        yield pb.PutKvRequest(sequence=sequence, chunk=pb.KvChunk(
            layer=layer, first_token=first_token + begin, tokens=end - begin,
            keys=bytes(k[begin * row:end * row]), values=bytes(v[begin * row:end * row])))


def open_request(name: str, *, layers: int, kv_heads: int, query_heads: int, head_dim: int,
                 prompt_tokens: int, dtype: str = "bfloat16", preset: str = "default",
                 budget: int | None = None, codec: str = "raw", max_decode_tokens: int = 0,
                 ttl_seconds: float = 0, index: Mapping[str, Any] | None = None,
                 select: Mapping[str, Any] | None = None, session_id: int = 0) -> pb.OpenSequenceRequest:
    request = pb.OpenSequenceRequest(
        name=name, prompt_tokens=prompt_tokens, preset=preset, codec=codec, session_id=session_id,
        max_decode_tokens=max_decode_tokens, ttl_ms=int(ttl_seconds * 1000),
        shape=types.KvShape(layers=layers, kv_heads=kv_heads, query_heads=query_heads,
                            head_dim=head_dim, element_type=ELEMENT_TYPES[dtype]),
        index=types.IndexConfig(**(index or {})), select=types.SelectConfig(**(select or {})))
    if budget is not None:
        request.select.budget_tokens = budget
    return request


def without_others(request: pb.OpenSequenceRequest, info: pb.ServerInfo) -> pb.OpenSequenceRequest:
    """The same request, for the server of ``info``, whoever owns the sequence's name."""
    here = pb.OpenSequenceRequest()
    here.CopyFrom(request)
    here.without_shards.extend(shard.name for shard in info.shards if shard.name != info.shard)
    return here


def with_session(request: M, session_id: int) -> M:
    """The same request of a session."""
    mine = type(request)()
    mine.CopyFrom(request)
    mine.session_id = session_id
    return mine


def select_request(sequence: Any, layer: int, queries: Any, *, budget: int | None = None,
                   state: bool = True, zones: bool = False) -> pb.SelectClustersRequest:
    item = pb.SelectItem(sequence=handle(sequence), layer=layer, queries=vector(queries))
    if budget is not None:
        item.select.budget_tokens = budget
    return pb.SelectClustersRequest(items=[item], want_state=state, want_zones=zones,
                                    state_type=types.ELEMENT_TYPE_FLOAT32)


def peek(items: Iterable[T]) -> tuple[T | None, Iterator[T]]:
    """The first of them, and all of them."""
    rest = iter(items)
    first = next(rest, None)
    return first, rest if first is None else itertools.chain([first], rest)


def batch_handles(request: pb.SelectClustersRequest) -> list[types.SequenceHandle]:
    """Of each item, or of the shorthand for one."""
    return [item.sequence for item in request.items] or [types.SequenceHandle(name=request.sequence)]


def part_of(request: pb.SelectClustersRequest, which: list[int]) -> pb.SelectClustersRequest:
    """The same request with some of its items."""
    part = pb.SelectClustersRequest()
    part.CopyFrom(request)
    del part.items[:]
    part.items.extend(request.items[i] for i in which)
    return part


def joined(request: pb.SelectClustersRequest,
           parts: list[tuple[list[int], pb.SelectClustersResponse]]) -> pb.SelectClustersResponse:
    """One answer from those to the parts: results in the order of the items."""
    results: dict[int, pb.SelectResult] = {}
    for which, response in parts:
        results.update(zip(which, response.results))
    return pb.SelectClustersResponse(
        results=[results[i] for i in sorted(results)], request_id=request.request_id,
        queue_us=max(response.queue_us for _, response in parts),
        select_us=max(response.select_us for _, response in parts))


def no_attachment(attachment_id: int) -> ClusterKVError:
    return make_error("NOT_FOUND", "ATTACHMENT_NOT_FOUND", f"no attachment has the id {attachment_id}",
                      {"attachmentId": str(attachment_id)})


def grouped(records: Iterable[pb.RecordChunk]) -> dict[int, tuple[list[int], bytes]]:
    """Record chunks by KV head: positions and packed records."""
    out: dict[int, tuple[list[int], bytearray]] = {}
    for chunk in records:
        positions, data = out.setdefault(chunk.kv_head, ([], bytearray()))
        positions.extend(chunk.positions)
        data.extend(chunk.records)
    return {head: (positions, bytes(data)) for head, (positions, data) in out.items()}
