"""The asyncio control client: the same verbs as ``clusterkv.Client``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from clusterkv import _calls
from clusterkv.client import CHANNEL_OPTIONS
from clusterkv.errors import from_rpc_error, from_status
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import cache_service_pb2_grpc as pb_grpc


class Client:
    """A connection to one server, for asyncio. Use as an async context manager or await ``close``."""

    def __init__(self, target: str, *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None):
        self.target = target
        self.timeout = timeout
        self._channel = (grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
                         if credentials else grpc.aio.insecure_channel(target, CHANNEL_OPTIONS))
        self._cache = pb_grpc.CacheServiceStub(self._channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, method: Callable, request: Any, timeout: float | None) -> Any:
        try:
            return await method(request, timeout=timeout or self.timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def _stream(self, method: Callable, request: Any,
                      timeout: float | None) -> AsyncIterator[Any]:
        try:
            async for response in method(request, timeout=timeout or self.timeout):
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def server_info(self, *, timeout: float | None = None) -> pb.ServerInfo:
        return await self._call(self._cache.GetServerInfo, pb.GetServerInfoRequest(), timeout)

    async def open(self, name: str, *, timeout: float | None = None, **shape: Any) -> pb.Sequence:
        return await self._call(self._cache.OpenSequence, _calls.open_request(name, **shape), timeout)

    async def put_layer(self, sequence: Any, layer: int, keys: Any, values: Any, *,
                        first_token: int = 0, query_rms: Any | None = None,
                        timeout: float | None = None) -> pb.PutKvResponse:
        return await self._call(self._cache.PutKv, _calls.kv_chunks(
            _calls.handle(sequence), layer, keys, values, first_token, query_rms), timeout)

    async def seal(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        return await self._call(self._cache.SealSequence, pb.SealSequenceRequest(
            sequence=_calls.handle(sequence)), timeout)

    async def get(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        return await self._call(self._cache.GetSequence, pb.GetSequenceRequest(
            sequence=_calls.handle(sequence)), timeout)

    async def list(self, prefix: str = "", *,
                   timeout: float | None = None) -> AsyncIterator[pb.Sequence]:
        token = ""
        while True:
            page = await self._call(self._cache.ListSequences, pb.ListSequencesRequest(
                prefix=prefix, page_token=token), timeout)
            for sequence in page.sequences:
                yield sequence
            token = page.next_page_token
            if not token:
                return

    async def fork(self, source: Any, name: str, *, max_decode_tokens: int = 0,
                   ttl_seconds: float = 0, timeout: float | None = None) -> pb.Sequence:
        return await self._call(self._cache.ForkSequence, pb.ForkSequenceRequest(
            source=_calls.handle(source), name=name, max_decode_tokens=max_decode_tokens,
            ttl_ms=int(ttl_seconds * 1000)), timeout)

    async def release(self, sequence: Any, *, timeout: float | None = None) -> None:
        await self._call(self._cache.ReleaseSequence, pb.ReleaseSequenceRequest(
            sequence=_calls.handle(sequence)), timeout)

    async def attach(self, request: pb.AttachRequest, *,
                     timeout: float | None = None) -> pb.AttachResponse:
        return await self._call(self._cache.Attach, request, timeout)

    async def detach(self, attachment_id: int, *, timeout: float | None = None) -> None:
        await self._call(self._cache.Detach, pb.DetachRequest(attachment_id=attachment_id), timeout)

    async def select(self, sequence: Any, layer: int, queries: Any, *, budget: int | None = None,
                     state: bool = True, zones: bool = False,
                     timeout: float | None = None) -> pb.SelectResult:
        response = await self._call(self._cache.SelectClusters, _calls.select_request(
            sequence, layer, queries, budget=budget, state=state, zones=zones), timeout)
        result = response.results[0]
        if result.HasField("error"):
            raise from_status(result.error)
        return result

    async def select_and_recall(self, request: pb.SelectAndRecallRequest, *,
                                timeout: float | None = None
                                ) -> AsyncIterator[pb.SelectAndRecallResponse]:
        async for response in self._stream(self._cache.SelectAndRecall, request, timeout):
            yield response

    async def recall(self, sequence: Any, layer: int, positions: dict[int, list[int]], *,
                     timeout: float | None = None) -> dict[int, tuple[list[int], bytes]]:
        request = pb.RecallClustersRequest(sequence=_calls.handle(sequence), layer=layer, heads=[
            pb.RecallClustersRequest.Head(kv_head=h, positions=p) for h, p in positions.items()])
        return _calls.grouped([chunk async for chunk in self._stream(
            self._cache.RecallClusters, request, timeout)])

    async def append(self, request: pb.AppendKvRequest, *,
                     timeout: float | None = None) -> pb.AppendKvResponse:
        return await self._call(self._cache.AppendKv, request, timeout)

    async def index(self, sequence: Any, layer: int, *, centroids: bool = True,
                    value_means: bool = False, positions: bool = True,
                    timeout: float | None = None) -> AsyncIterator[pb.IndexChunk]:
        async for chunk in self._stream(self._cache.GetIndex, pb.GetIndexRequest(
                sequence=_calls.handle(sequence), layer=layer, want_centroids=centroids,
                want_value_means=value_means, want_positions=positions), timeout):
            yield chunk
