"""The asyncio control client: the same verbs as ``clusterkv.Client``."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio

from clusterkv import _calls, _shards
from clusterkv.client import CHANNEL_OPTIONS, SHARD_OPTIONS
from clusterkv.errors import ClusterKVError, from_rpc_error, from_status
from clusterkv.v1 import admin_service_pb2 as admin_pb
from clusterkv.v1 import admin_service_pb2_grpc as admin_grpc
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import cache_service_pb2_grpc as pb_grpc
from clusterkv.v1 import session_service_pb2 as session_pb
from clusterkv.v1 import session_service_pb2_grpc as session_grpc

T = TypeVar("T")
AnyIterable = Iterable[T] | AsyncIterable[T]


async def _peek(items: AnyIterable[T]) -> tuple[T | None, AsyncIterator[T]]:
    """The first of them, and all of them."""
    async def each() -> AsyncIterator[T]:
        if isinstance(items, AsyncIterable):
            async for item in items:
                yield item
        else:
            for item in items:
                yield item

    rest = each()
    first = await anext(rest, None)

    async def again() -> AsyncIterator[T]:
        if first is not None:
            yield first
            async for item in rest:
                yield item

    return first, again()


class Client:
    """A connection to one server, or to several as one, for asyncio. Use as an async context manager or await
    ``close``. Targets as of ``clusterkv.Client``."""

    def __init__(self, target: str, *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None):
        self.target = target
        self.timeout = timeout
        self._credentials = credentials
        self._shards = _shards.Shards(target)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._attached: dict[int, str] = {}  # attachment: its server

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            options = CHANNEL_OPTIONS if address == self.target else SHARD_OPTIONS
            host = self._credentials and self._shards.hosts.get(address)
            if host:
                options += (("grpc.ssl_target_name_override", host),)
            channel = self._channels[address] = (
                grpc.aio.secure_channel(address, self._credentials, options) if self._credentials
                else grpc.aio.insecure_channel(address, options))
        return channel

    def _stub(self, address: str) -> pb_grpc.CacheServiceStub:
        return pb_grpc.CacheServiceStub(self._channel(address))

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

    async def _run(self, steps: _shards.Steps, session: "Session | ShardSessions | None" = None) -> Any:
        """Does what the steps ask for, until they end."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._do(step, session)
                except ClusterKVError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            return end.value

    async def _do(self, step: Any, session: "Session | ShardSessions | None") -> Any:
        if isinstance(step, _shards.Ask):
            return await self._call(getattr(self._stub(step.address), step.method), step.request,
                                    step.timeout)
        if isinstance(step, _shards.SessionAt):
            assert session is not None
            return await session.id_at(step.address)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(step.host, step.port,
                                                                 type=socket.SOCK_STREAM)
        except OSError:
            return []
        return _shards.distinct(found)

    async def _one(self) -> bool:
        """Whether there is one server."""
        return self._shards.one or await self._run(self._shards.is_single())

    async def _address(self, sequence: Any, timeout: float | None) -> str:
        return self.target if await self._one() else await self._run(
            self._shards.locate(_calls.handle(sequence), timeout or self.timeout))

    async def _at(self, sequence: Any, timeout: float | None = None) -> pb_grpc.CacheServiceStub:
        """The server that has the sequence."""
        return self._stub(await self._address(sequence, timeout))

    async def _of_attachment(self, attachment_id: int) -> pb_grpc.CacheServiceStub:
        address = self.target if await self._one() else self._attached.get(attachment_id)
        if address is None:
            raise _calls.no_attachment(attachment_id)
        return self._stub(address)

    async def server_info(self, *, timeout: float | None = None) -> pb.ServerInfo:
        if not await self._one():
            return await self._run(self._shards.info(timeout or self.timeout))
        return await self._call(self._stub(self.target).GetServerInfo, pb.GetServerInfoRequest(), timeout)

    async def open(self, name: str, *, session: "Session | ShardSessions | None" = None,
                   timeout: float | None = None, **shape: Any) -> pb.Sequence:
        return await self.open_sequence(_calls.open_request(name, **shape), session=session,
                                        timeout=timeout)

    async def open_sequence(self, request: pb.OpenSequenceRequest, *,
                            session: "Session | ShardSessions | None" = None,
                            timeout: float | None = None) -> pb.Sequence:
        if not await self._one():
            return await self._run(self._shards.open(request, timeout or self.timeout,
                                                     session is not None), session)
        if session is not None:
            request = _calls.with_session(request, await session.id_at(self.target))
        open_here = self._stub(self.target).OpenSequence
        try:
            return await self._call(open_here, request, timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":
                raise
        here = _calls.without_others(request, await self.server_info(timeout=timeout))
        return await self._call(open_here, here, timeout)

    async def put_layer(self, sequence: Any, layer: int, keys: Any, values: Any, *,
                        first_token: int = 0, query_rms: Any | None = None,
                        timeout: float | None = None) -> pb.PutKvResponse:
        stub = await self._at(sequence, timeout)
        return await self._call(stub.PutKv, _calls.kv_chunks(
            _calls.handle(sequence), layer, keys, values, first_token, query_rms), timeout)

    async def put(self, requests: AnyIterable[pb.PutKvRequest], *,
                  timeout: float | None = None) -> pb.PutKvResponse:
        if await self._one():
            return await self._call(self._stub(self.target).PutKv, requests, timeout)
        first, requests = await _peek(requests)
        stub = await self._at(first.sequence if first else "", timeout)
        return await self._call(stub.PutKv, requests, timeout)

    async def seal(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        return await self._call((await self._at(sequence, timeout)).SealSequence, pb.SealSequenceRequest(
            sequence=_calls.handle(sequence)), timeout)

    async def get(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        if not await self._one():
            return (await self._run(self._shards.find(_calls.handle(sequence), timeout or self.timeout)))[1]
        return await self._call(self._stub(self.target).GetSequence, pb.GetSequenceRequest(
            sequence=_calls.handle(sequence)), timeout)

    async def list(self, prefix: str = "", *, whole: bool = True,
                   timeout: float | None = None) -> AsyncIterator[pb.Sequence]:
        if not await self._one():
            for sequence in await self._run(self._shards.list(prefix, timeout or self.timeout, whole)):
                yield sequence
            return
        token = ""
        while True:
            page = await self._call(self._stub(self.target).ListSequences, pb.ListSequencesRequest(
                prefix=prefix, page_token=token), timeout)
            for sequence in page.sequences:
                yield sequence
            token = page.next_page_token
            if not token:
                return

    async def fork(self, source: Any, name: str, *, max_decode_tokens: int = 0,
                   ttl_seconds: float = 0, timeout: float | None = None) -> pb.Sequence:
        return await self._call((await self._at(source, timeout)).ForkSequence, pb.ForkSequenceRequest(
            source=_calls.handle(source), name=name, max_decode_tokens=max_decode_tokens,
            ttl_ms=int(ttl_seconds * 1000)), timeout)

    async def release(self, sequence: Any, *, timeout: float | None = None) -> None:
        if not await self._one():
            await self._run(self._shards.release(_calls.handle(sequence), timeout or self.timeout))
            return
        try:
            await self._call(self._stub(self.target).ReleaseSequence,
                             pb.ReleaseSequenceRequest(sequence=_calls.handle(sequence)), timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":  # else it is not here
                raise

    async def connect_ingest(self, request: pb.ConnectIngestRequest, *, sequence: Any,
                             session: "Session | ShardSessions",
                             timeout: float | None = None) -> pb.ConnectIngestResponse:
        """Maps the session's window at the server that has the sequence."""
        address = await self._address(sequence, timeout)
        request = _calls.with_session(request, await session.id_at(address))
        return await self._call(self._stub(address).ConnectIngest, request, timeout)

    async def put_window(self, request: pb.PutWindowRequest, *, timeout: float | None = None) -> None:
        await self._call((await self._at(request.sequence, timeout)).PutWindow, request, timeout)

    async def attach(self, request: pb.AttachRequest, *,
                     session: "Session | ShardSessions | None" = None,
                     timeout: float | None = None) -> pb.AttachResponse:
        address = await self._address(request.sequence, timeout)
        if session is not None:
            request = _calls.with_session(request, await session.id_at(address))
        response = await self._call(self._stub(address).Attach, request, timeout)
        self._attached[response.attachment_id] = address
        return response

    async def connect_link(self, request: pb.ConnectLinkRequest, *,
                           timeout: float | None = None) -> pb.ConnectLinkResponse:
        stub = await self._of_attachment(request.attachment_id)
        return await self._call(stub.ConnectLink, request, timeout)

    async def detach(self, attachment_id: int, *, timeout: float | None = None) -> None:
        stub = await self._of_attachment(attachment_id)
        await self._call(stub.Detach, pb.DetachRequest(attachment_id=attachment_id), timeout)
        self._attached.pop(attachment_id, None)

    async def select(self, sequence: Any, layer: int, queries: Any, *, budget: int | None = None,
                     state: bool = True, zones: bool = False,
                     timeout: float | None = None) -> pb.SelectResult:
        stub = await self._at(sequence, timeout)
        response = await self._call(stub.SelectClusters, _calls.select_request(
            sequence, layer, queries, budget=budget, state=state, zones=zones), timeout)
        result = response.results[0]
        if result.HasField("error"):
            raise from_status(result.error)
        return result

    async def select_batch(self, request: pb.SelectClustersRequest, *,
                           timeout: float | None = None) -> pb.SelectClustersResponse:
        """Of several servers each is asked for the items whose sequences it has."""
        if await self._one():
            return await self._call(self._stub(self.target).SelectClusters, request, timeout)
        places = await self._run(self._shards.group(_calls.batch_handles(request), timeout or self.timeout))
        if len(places) == 1:
            return await self._call(self._stub(*places).SelectClusters, request, timeout)
        answers = await asyncio.gather(*(
            self._call(self._stub(address).SelectClusters, _calls.part_of(request, which), timeout)
            for address, which in places.items()))
        return _calls.joined(request, list(zip(places.values(), answers)))

    async def stream_select(self, requests: AnyIterable[pb.SelectClustersRequest], *,
                            timeout: float | None = None) -> AsyncIterator[pb.SelectClustersResponse]:
        """One stream for many steps: an answer per request, in order."""
        if await self._one():
            stub = self._stub(self.target)
        else:
            first, requests = await _peek(requests)
            stub = await self._at(_calls.batch_handles(first)[0] if first else "", timeout)
        async for response in self._stream(stub.StreamSelect, requests, timeout):
            yield response

    async def stream_select_and_recall(self, requests: AnyIterable[pb.SelectAndRecallRequest], *,
                                       timeout: float | None = None
                                       ) -> AsyncIterator[pb.SelectAndRecallResponse]:
        if await self._one():
            stub = self._stub(self.target)
        else:
            first, requests = await _peek(requests)
            stub = await self._of_attachment(first.items[0].attachment_id if first and first.items else 0)
        async for response in self._stream(stub.StreamSelectAndRecall, requests, timeout):
            yield response

    async def select_and_recall(self, request: pb.SelectAndRecallRequest, *,
                                timeout: float | None = None
                                ) -> AsyncIterator[pb.SelectAndRecallResponse]:
        stub = await self._of_attachment(request.items[0].attachment_id if request.items else 0)
        async for response in self._stream(stub.SelectAndRecall, request, timeout):
            yield response

    async def recall(self, sequence: Any, layer: int, positions: dict[int, list[int]], *,
                     timeout: float | None = None) -> dict[int, tuple[list[int], bytes]]:
        request = pb.RecallClustersRequest(sequence=_calls.handle(sequence), layer=layer, heads=[
            pb.RecallClustersRequest.Head(kv_head=h, positions=p) for h, p in positions.items()])
        return _calls.grouped([chunk async for chunk in self.recall_stream(request, timeout=timeout)])

    async def recall_stream(self, request: pb.RecallClustersRequest, *,
                            timeout: float | None = None) -> AsyncIterator[pb.RecordChunk]:
        stub = await self._at(request.sequence, timeout)
        async for chunk in self._stream(stub.RecallClusters, request, timeout):
            yield chunk

    async def append(self, request: pb.AppendKvRequest, *,
                     timeout: float | None = None) -> pb.AppendKvResponse:
        return await self._call((await self._at(request.sequence, timeout)).AppendKv, request, timeout)

    async def index(self, sequence: Any, layer: int, *, centroids: bool = True,
                    value_means: bool = False, positions: bool = True,
                    timeout: float | None = None) -> AsyncIterator[pb.IndexChunk]:
        stub = await self._at(sequence, timeout)
        async for chunk in self._stream(stub.GetIndex, pb.GetIndexRequest(
                sequence=_calls.handle(sequence), layer=layer, want_centroids=centroids,
                want_value_means=value_means, want_positions=positions), timeout):
            yield chunk

    @contextlib.asynccontextmanager
    async def session(self, worker: str) -> AsyncIterator["Session | ShardSessions"]:
        """``async with client.session("me") as session``: alive until the block ends; give it to ``open``
        and ``attach``."""
        one = await self._one()
        async with (Session(self._channel(self.target), worker) if one
                    else ShardSessions(self, worker)) as session:
            yield session


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

    async def id_at(self, address: str) -> int:
        return self.id

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


class ShardSessions:
    """A session with each of several servers, from when it is first needed there."""

    def __init__(self, client: Client, worker: str):
        self._client, self._worker = client, worker
        self._lock = asyncio.Lock()
        self._sessions: dict[str, Session] = {}

    async def __aenter__(self) -> "ShardSessions":
        return self

    async def id_at(self, address: str) -> int:
        async with self._lock:
            session = self._sessions.get(address)
            if session is None or not session.alive:
                session = await Session(self._client._channel(address), self._worker).__aenter__()
                self._sessions[address] = session
            return session.id

    @property
    def alive(self) -> bool:
        """With all servers that it was needed with."""
        return all(session.alive for session in self._sessions.values())

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

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
