"""An inference engine's own loop on its own tensors: KV of its layers in, attention output of its layers out.

The C++ engine (``worker/engine.h``, whose rules on waiting, streams and failures hold) on PyTorch tensors of a
GPU and the current stream, or on PyTorch tensors and NumPy arrays in host memory. Tensors are read and written
where they lie.

>>> with Engine("localhost:7400", device="cuda:0", links="peer,grpc") as engine:
...     sequence = engine.create("chat-17", layers=32, kv_heads=8, query_heads=32, head_dim=128,
...                              prompt_tokens=tokens, max_decode_tokens=1024)
...     for layer in range(32):
...         engine.ingest(sequence, layer, keys[layer], values[layer])  # [tokens, kv_heads, head_dim]
...     engine.seal(sequence)
...     engine.attach(sequence)
...     engine.append(layer, [sequence], key, value)                    # per token and layer: [1, kv_heads, head_dim]
...     output = engine.step(layer, [sequence], query)                  # [1, query_heads, head_dim]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clusterkv import _calls
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

LINKS = {"grpc": pb.LINK_GRPC, "peer": pb.LINK_PEER, "nccl": pb.LINK_NCCL}
_NAMES = {number: name for name, number in _calls.ELEMENT_TYPES.items()}


class _Memory(NamedTuple):
    """Where a tensor lies; strides in bytes."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str

    @staticmethod
    def of(tensor: Any) -> "_Memory":
        if isinstance(tensor, np.ndarray):
            return _Memory(tensor.ctypes.data, tensor.shape, tensor.strides, tensor.dtype.name, "cpu")
        size = tensor.element_size()
        return _Memory(tensor.data_ptr(), tuple(tensor.shape), tuple(stride * size for stride in tensor.stride()),
                       str(tensor.dtype).removeprefix("torch."), str(tensor.device))


class EngineSequence:
    """A sequence of an ``Engine``, until ``close`` or ``release``. One thread at a time."""

    def __init__(self, native: Any):
        self._native = native
        shape = self.proto.shape
        self._kv_row = (shape.kv_heads, shape.head_dim)
        self._query_row = (shape.query_heads, shape.head_dim)
        self._dtype = _NAMES[shape.element_type]
        self._form = (*self._query_row, shape.kv_heads, self._dtype)

    @property
    def proto(self) -> pb.Sequence:
        """As the service last told it."""
        return pb.Sequence.FromString(self._native.info)

    @property
    def link(self) -> str:
        """"resident" in a group; else "grpc", "peer" or "nccl"; empty before ``attach``."""
        return self._native.link

    @property
    def link_reason(self) -> str:
        """Why it is not a better one."""
        return self._native.link_reason


class Engine:
    """Connects to ``target``: one server, or several by commas.

    ``device``: whose memory the tensors are in, "cpu" or "cuda:N". ``output_type``: of what ``step`` writes.
    ``links``: how recalled records may come, best first: "peer,grpc". ``hot_tokens``: what this side keeps of earlier
    recalls, per KV head and layer. ``budget`` and ``select``: what differs from the sequences' SelectConfig.
    ``timeout``, ``tls_ca`` and so on: as for ``ClusterKVCache``.

    Raises a ``ClusterKVError`` of the class that tells what to do about it; ValueError for tensors of another
    shape, type or device than the call takes. On a GPU a step's failure is known later: its output is zeros and
    the sequence's next call, or ``wait``, raises it.
    """

    def __init__(self, target: str, *, device: str = "cpu", output_type: str = "float32",
                 links: str | Sequence[str] = "grpc", hot_tokens: int = 1024, budget: int | None = None,
                 select: dict[str, Any] | None = None, append_batch_tokens: int = 16,
                 worker_name: str = "engine", timeout: float = 30.0, tls_ca: str = "", tls_cert: str = "",
                 tls_key: str = "", tls_server_name: str = ""):
        from clusterkv import _native

        if output_type not in _calls.ELEMENT_TYPES:
            raise ValueError(f"output_type: expected float32, float16 or bfloat16, got {output_type!r}")
        links = links.split(",") if isinstance(links, str) else links
        for link in links:
            if link not in LINKS:
                raise ValueError(f"links: expected peer, nccl or grpc, got {link!r}")
        config = types.SelectConfig(**(select or {}))
        if budget is not None:
            config.budget_tokens = budget
        self.device = "cuda:0" if device == "cuda" else device
        self.output_type = output_type
        self._native = _native.Engine(
            target, self.device, _calls.ELEMENT_TYPES[output_type], [LINKS[link] for link in links],
            pb.HotCacheConfig(capacity_tokens=hot_tokens).SerializeToString(), config.SerializeToString(),
            append_batch_tokens, worker_name, timeout, tls_ca, tls_cert, tls_key, tls_server_name)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its sequences, after the streams that it was given have done their work. Not while another
        thread calls."""
        self._native.close()

    # --- prefill

    def create(self, name: str, **shape: Any) -> EngineSequence:
        """Opens a sequence to be filled; arguments as ``Client.open``: layers, kv_heads, query_heads,
        head_dim, prompt_tokens, dtype ("bfloat16"), preset, budget, codec, max_decode_tokens …"""
        return EngineSequence(self._native.create(_calls.open_request(name, **shape).SerializeToString()))

    def ingest(self, sequence: EngineSequence, layer: int, keys: Any, values: Any, *, first_token: int = 0,
               query_rms: Any | None = None) -> None:
        """K and V [tokens, kv_heads, head_dim] (after RoPE) of a layer. They may be overwritten by what the
        current stream does next. ``query_rms`` [kv_heads, head_dim]: root mean squares of the prompt's queries.
        Raises CapacityError (LIMIT_EXCEEDED) where too much is waiting: try again."""
        k, v = self._kv(sequence, keys, values, (None,))
        rms = [] if query_rms is None else np.asarray(query_rms, np.float32).ravel().tolist()
        self._native.ingest(sequence._native, layer, first_token, k.shape[0], k.pointer, v.pointer, k.strides[0],
                            k.strides[1], rms, self._stream())

    def seal(self, sequence: EngineSequence) -> None:
        """Waits until all of it is with the service, and clustered."""
        self._native.seal(sequence._native)

    def ingest_counts(self) -> dict[str, Any]:
        """How rows that lay on a GPU went: window_bytes, host_bytes, fallbacks {reason: count}."""
        return self._native.ingest_counts()

    # --- decode

    def attach(self, sequence: Any) -> EngineSequence:
        """A sealed sequence for decoding: one of this engine, or any by its name, handle or ``Sequence``."""
        if isinstance(sequence, EngineSequence):
            self._native.attach(sequence._native)
            return sequence
        return EngineSequence(self._native.attach_handle(_calls.handle(sequence).SerializeToString()))

    def append(self, layer: int, sequences: Sequence[EngineSequence], keys: Any, values: Any) -> None:
        """A decoded token's K and V of a layer, [sequences, kv_heads, head_dim], before the step that attends
        to it."""
        k, v = self._kv(self._first(sequences), keys, values, (len(sequences),))
        self._native.append(layer, [s._native for s in sequences], k.pointer, v.pointer, k.strides[0],
                            k.strides[1], self._stream())

    def step(self, layer: int, sequences: Sequence[EngineSequence], queries: Any, out: Any | None = None) -> Any:
        """Attention of queries [sequences, query_heads, head_dim] over all tokens, as [sequences, query_heads,
        head_dim] of the output type, in ``out`` if it is given."""
        first = self._first(sequences)
        shape = (len(sequences), *first._query_row)
        q = self._memory("queries", queries, shape, first._dtype, dense=2)
        if out is None:
            out = self._empty(shape, like=queries)
        o = self._memory("out", out, shape, self.output_type, dense=2)
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ValueError("out: it is read-only")
        self._native.step(layer, [s._native for s in sequences], q.pointer, q.strides[0], o.pointer, o.strides[0],
                          self._stream())
        return out

    def wait(self, sequence: EngineSequence) -> None:
        """Waits until the sequence's calls are done and raises its first untold failure."""
        self._native.wait(sequence._native)

    # --- decoding without the host

    def join(self, sequences: Sequence[EngineSequence]) -> None:
        """From here on the service's GPU answers the steps of these attached sequences by itself: ``append`` and
        ``step`` take all of them, in this order and dense, and layers in order from 0 on; they launch kernels and
        do nothing else, so that a whole step can be captured in a ``torch.cuda.CUDAGraph`` and replayed until the
        next ``settle``. UnavailableError says why it cannot be had: a GPU server of this host, tensors on a GPU,
        codec "raw" and ``output_type`` the sequences' element type are what it takes."""
        self._first(sequences)
        self._native.join([s._native for s in sequences])

    def settle(self, sequence: EngineSequence) -> None:
        """Between two steps of the sequence's group, at least every 256 tokens: sends what was appended and takes
        over what the service has clustered. Waits for the stream and the service."""
        self._native.settle(sequence._native, self._stream())

    def leave(self, sequence: EngineSequence) -> None:
        """As ``settle``, and the group's sequences are single again."""
        self._native.leave(sequence._native, self._stream())

    # --- the end

    def close_sequence(self, sequence: EngineSequence) -> None:
        """Sends what was not yet sent and detaches; the service keeps the sequence by its rules."""
        self._native.close_sequence(sequence._native)

    def release(self, sequence: EngineSequence) -> None:
        """As ``close_sequence``, and the service gives its memory back."""
        self._native.release_sequence(sequence._native)

    # --- tensors

    @staticmethod
    def _first(sequences: Sequence[EngineSequence]) -> EngineSequence:
        if not sequences:
            raise ValueError("sequences: expected at least one")
        first = sequences[0]
        for sequence in sequences:
            if sequence._form != first._form:
                raise ValueError("sequences: expected the same heads, head_dim and type of all, got "
                                 f"{first._form} and {sequence._form}")
        return first

    def _kv(self, sequence: EngineSequence, keys: Any, values: Any,
            rows: tuple[int | None]) -> tuple[_Memory, _Memory]:
        k = self._memory("keys", keys, (*rows, *sequence._kv_row), sequence._dtype, dense=1)
        v = self._memory("values", values, k.shape, sequence._dtype, dense=1)
        if k.strides != v.strides:
            raise ValueError(f"values: expected the strides of keys, {k.strides} bytes, got {v.strides}")
        return k, v

    def _memory(self, what: str, tensor: Any, shape: tuple[int | None, ...], dtype: str, dense: int) -> _Memory:
        """Checked: of that shape (None: any), with its last ``dense`` axes dense. 16-bit floats may be given as
        their bits, uint16 or int16."""
        m = _Memory.of(tensor)
        bits = ("uint16", "int16") if dtype != "float32" else ()
        if len(m.shape) != len(shape) or any(want not in (None, got) for want, got in zip(shape, m.shape)) or (
                m.dtype != dtype and m.dtype not in bits) or m.device != self.device:
            wanted = ", ".join("tokens" if want is None else str(want) for want in shape)
            raise ValueError(f"{what}: expected [{wanted}] of {dtype} on {self.device}, got {list(m.shape)} of "
                             f"{m.dtype} on {m.device}")
        strides, run = list(m.strides), 4 if dtype == "float32" else 2
        for axis in reversed(range(len(strides))):
            if m.shape[axis] <= 1:  # any number may stand there
                strides[axis] = run
            if axis >= len(strides) - dense and strides[axis] != run:
                raise ValueError(f"{what}: expected the last {'axis' if dense == 1 else f'{dense} axes'} to be "
                                 f"dense, got strides of {m.strides} bytes")
            run = strides[axis] * m.shape[axis]
        return m._replace(strides=tuple(strides))

    def _empty(self, shape: tuple[int, ...], like: Any) -> Any:
        if isinstance(like, np.ndarray):  # which has no bfloat16
            return np.empty(shape, "uint16" if self.output_type == "bfloat16" else self.output_type)
        import torch

        return torch.empty(shape, dtype=getattr(torch, self.output_type), device=like.device)

    def _stream(self) -> int:
        if self.device == "cpu":
            return 0
        import torch

        return torch.cuda.current_stream(self.device).cuda_stream
