"""The asyncio control client: the same verbs as ``clusterkv.Client``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio

from clusterkv import _calls
from clusterkv.client import CHANNEL_OPTIONS
from clusterkv.errors import ClusterKVError, from_rpc_error, from_status
from clusterkv.v1 import admin_service_pb2 as admin_pb
from clusterkv.v1 import admin_service_pb2_grpc as admin_grpc
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import cache_service_pb2_grpc as pb_grpc
from clusterkv.v1 import session_service_pb2 as session_pb
from clusterkv.v1 import session_service_pb2_grpc as session_grpc

T = TypeVar("T")
AnyIterable = Iterable[T] | AsyncIterable[T]


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
        request = _calls.open_request(name, **shape)
        try:
            return await self._call(self._cache.OpenSequence, request, timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":
                raise
        here = _calls.without_others(request, await self.server_info(timeout=timeout))
        return await self._call(self._cache.OpenSequence, here, timeout)

    async def put_layer(self, sequence: Any, layer: int, keys: Any, values: Any, *,
                        first_token: int = 0, query_rms: Any | None = None,
                        timeout: float | None = None) -> pb.PutKvResponse:
        return await self._call(self._cache.PutKv, _calls.kv_chunks(
            _calls.handle(sequence), layer, keys, values, first_token, query_rms), timeout)

    async def put(self, requests: AnyIterable[pb.PutKvRequest], *,
                  timeout: float | None = None) -> pb.PutKvResponse:
        return await self._call(self._cache.PutKv, requests, timeout)

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
        try:
            await self._call(self._cache.ReleaseSequence,
                       pb.ReleaseSequenceRequest(sequence=_calls.handle(sequence)), timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":  # else it is not here
                raise

    async def attach(self, request: pb.AttachRequest, *,
                     timeout: float | None = None) -> pb.AttachResponse:
        return await self._call(self._cache.Attach, request, timeout)

    async def connect_link(self, request: pb.ConnectLinkRequest, *,
                           timeout: float | None = None) -> pb.ConnectLinkResponse:
        return await self._call(self._cache.ConnectLink, request, timeout)

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

    async def select_batch(self, request: pb.SelectClustersRequest, *,
                           timeout: float | None = None) -> pb.SelectClustersResponse:
        return await self._call(self._cache.SelectClusters, request, timeout)

    async def stream_select(self, requests: AnyIterable[pb.SelectClustersRequest], *,
                            timeout: float | None = None) -> AsyncIterator[pb.SelectClustersResponse]:
        """One stream for many steps: an answer per request, in order."""
        async for response in self._stream(self._cache.StreamSelect, requests, timeout):
            yield response

    async def stream_select_and_recall(self, requests: AnyIterable[pb.SelectAndRecallRequest], *,
                                       timeout: float | None = None
                                       ) -> AsyncIterator[pb.SelectAndRecallResponse]:
        async for response in self._stream(self._cache.StreamSelectAndRecall, requests, timeout):
            yield response

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

    def session(self, worker: str) -> "Session":
        """``async with client.session("me") as session``: alive until the block ends."""
        return Session(self._channel, worker)


class Session:
    """A liveness session: heartbeats from a task until closed. ``id`` goes into open and attach calls."""

    def __init__(self, channel: grpc.aio.Channel, worker: str):
        self._stub, self._worker = session_grpc.SessionServiceStub(channel), worker
        self.id = self.boot_id = 0
        self.notices: asyncio.Queue[session_pb.SessionResponse.Notice] = asyncio.Queue()
        self._tasks: list[asyncio.Task] = []

    async def __aenter__(self) -> "Session":
        self._call = self._stub.Session()
        try:
            await self._call.write(session_pb.SessionRequest(
                hello=session_pb.SessionRequest.Hello(worker=self._worker)))
            answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        if not isinstance(answer, session_pb.SessionResponse):  # the stream ended: its status says why
            raise await self._error()
        self.id, self.boot_id = answer.welcome.session_id, answer.welcome.boot_id
        interval = max(0.05, answer.welcome.ttl_ms / 4000)
        self._tasks = [asyncio.create_task(self._beat(interval)), asyncio.create_task(self._listen())]
        return self

    async def _error(self) -> Exception:
        return from_rpc_error(grpc.aio.AioRpcError(
            await self._call.code(), await self._call.initial_metadata(),
            await self._call.trailing_metadata(), details=await self._call.details()))

    async def _beat(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            await self._call.write(session_pb.SessionRequest(
                heartbeat=session_pb.SessionRequest.Heartbeat()))

    async def _listen(self) -> None:
        async for response in self._call:
            if response.HasField("notice"):
                await self.notices.put(response.notice)

    @property
    def alive(self) -> bool:
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._call.cancel()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class AdminClient:
    """The admin port, for asyncio: the same verbs as ``clusterkv.AdminClient``."""

    def __init__(self, target: str, *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None):
        self.timeout = timeout
        self._channel = (grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
                         if credentials else grpc.aio.insecure_channel(target, CHANNEL_OPTIONS))
        self._admin = admin_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> "AdminClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    async def _call(self, method: Callable, request: Any) -> Any:
        try:
            return await method(request, timeout=self.timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def stats(self) -> admin_pb.Stats:
        return await self._call(self._admin.GetStats, admin_pb.GetStatsRequest())

    async def verify_ledger(self, *, checksums: bool = False) -> admin_pb.VerifyLedgerResponse:
        return await self._call(self._admin.VerifyLedger,
                                admin_pb.VerifyLedgerRequest(checksums=checksums))

    async def drain(self) -> admin_pb.DrainResponse:
        return await self._call(self._admin.Drain, admin_pb.DrainRequest())

    async def evict(self, sequence: Any, *, force: bool = False) -> None:
        await self._call(self._admin.EvictSequence, admin_pb.EvictSequenceRequest(
            sequence=_calls.handle(sequence), force=force))

    async def force_release_worker(self, session_id: int) -> None:
        await self._call(self._admin.ForceReleaseWorker,
                         admin_pb.ForceReleaseWorkerRequest(session_id=session_id))
