"""The sync control client: every call of the API over grpcio, no native code needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from clusterkv import _calls, _shards
from clusterkv.errors import ClusterKVError, from_rpc_error, from_status
from clusterkv.v1 import admin_service_pb2 as admin_pb
from clusterkv.v1 import admin_service_pb2_grpc as admin_grpc
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import cache_service_pb2_grpc as pb_grpc
from clusterkv.v1 import session_service_pb2 as session_pb
from clusterkv.v1 import session_service_pb2_grpc as session_grpc

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 8 << 20),
                   ("grpc.keepalive_time_ms", 30000), ("grpc.keepalive_timeout_ms", 10000))
# Of several servers one that is back is to be seen soon.
SHARD_OPTIONS = CHANNEL_OPTIONS + (("grpc.initial_reconnect_backoff_ms", 100),
                                   ("grpc.min_reconnect_backoff_ms", 100),
                                   ("grpc.max_reconnect_backoff_ms", 1000))


def tls(ca: str, cert: str | None = None, key: str | None = None) -> grpc.ChannelCredentials:
    """Credentials from PEM files: who signed the server's certificate, and, where the server asks
    for one, the certificate to show and its key. They are read once, now.

    >>> Client("clusterkv:7400", credentials=clusterkv.tls("ca.crt", "tls.crt", "tls.key"))
    """
    def read(path: str | None) -> bytes | None:
        if path is None:
            return None
        with open(path, "rb") as file:
            return file.read()
    if (cert is None) != (key is None):
        raise ValueError("expected a certificate and its key, got one of the two")
    return grpc.ssl_channel_credentials(read(ca), read(key), read(cert))


class Client:
    """A connection to one server, or to several as one. Thread-safe. Use as a context manager or call
    ``close``.

    >>> with Client("localhost:7400") as client:
    ...     sequence = client.open("demo", layers=2, kv_heads=2, query_heads=4, head_dim=64,
    ...                            prompt_tokens=keys.shape[0], dtype="float32")
    ...     client.put_layer(sequence, 0, keys, values)

    Several: "HOST:PORT,HOST:PORT", or a name of several addresses (a headless service). A sequence is opened
    on the server that owns its name, found where it is, and every call goes there (``_shards``). A stream
    stays with the server of its first request.

    Every call takes ``timeout`` (seconds) and raises a ``ClusterKVError`` of the class that tells what
    to do about it.
    """

    def __init__(self, target: str, *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None):
        self.target = target
        self.timeout = timeout
        self._credentials = credentials
        self._shards = _shards.Shards(target)
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}
        self._attached: dict[int, str] = {}  # attachment: its server

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            channel = self._channels.get(address)
            if channel is None:
                one = address == self.target
                options = (CHANNEL_OPTIONS if one else SHARD_OPTIONS) + tuple(
                    ("grpc.ssl_target_name_override", host) for host in filter(None, [
                        self._credentials and self._shards.hosts.get(address)]))
                channel = self._channels[address] = (
                    grpc.secure_channel(address, self._credentials, options) if self._credentials
                    else grpc.insecure_channel(address, options))
            return channel

    def _stub(self, address: str) -> pb_grpc.CacheServiceStub:
        return pb_grpc.CacheServiceStub(self._channel(address))

    def _call(self, method: Callable, request: Any, timeout: float | None) -> Any:
        try:
            return method(request, timeout=timeout or self.timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _stream(self, method: Callable, request: Any, timeout: float | None) -> Iterator[Any]:
        try:
            yield from method(request, timeout=timeout or self.timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def _run(self, steps: _shards.Steps, session: "Session | ShardSessions | None" = None) -> Any:
        """Does what the steps ask for, until they end."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._do(step, session)
                except ClusterKVError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            return end.value

    def _do(self, step: Any, session: "Session | ShardSessions | None") -> Any:
        if isinstance(step, _shards.Ask):
            return self._call(getattr(self._stub(step.address), step.method), step.request, step.timeout)
        if isinstance(step, _shards.SessionAt):
            assert session is not None
            return session.id_at(step.address)
        return _shards.resolve(step.host, step.port)

    def _one(self) -> bool:
        """Whether there is one server."""
        return self._shards.one or self._run(self._shards.is_single())

    def _at(self, sequence: Any, timeout: float | None = None) -> pb_grpc.CacheServiceStub:
        """The server that has the sequence."""
        return self._stub(self._address(sequence, timeout))

    def _address(self, sequence: Any, timeout: float | None) -> str:
        return self.target if self._one() else self._run(
            self._shards.locate(_calls.handle(sequence), timeout or self.timeout))

    def _of_attachment(self, attachment_id: int) -> pb_grpc.CacheServiceStub:
        address = self.target if self._one() else self._attached.get(attachment_id)
        if address is None:
            raise _calls.no_attachment(attachment_id)
        return self._stub(address)

    def server_info(self, *, timeout: float | None = None) -> pb.ServerInfo:
        """Of several: the first that answers; ``shards`` names all, if they know of each other."""
        if not self._one():
            return self._run(self._shards.info(timeout or self.timeout))
        return self._call(self._stub(self.target).GetServerInfo, pb.GetServerInfoRequest(), timeout)

    def open(self, name: str, *, session: "Session | ShardSessions | None" = None, timeout: float | None = None,
             **shape: Any) -> pb.Sequence:
        """Opens a sequence; arguments as ``_calls.open_request``. With a session it ends with that, if it
        is not sealed."""
        return self.open_sequence(_calls.open_request(name, **shape), session=session, timeout=timeout)

    def open_sequence(self, request: pb.OpenSequenceRequest, *, session: "Session | ShardSessions | None" = None,
                      timeout: float | None = None) -> pb.Sequence:
        """On this server, whichever of several shards owns the name; with several servers on the owner."""
        if not self._one():
            return self._run(self._shards.open(request, timeout or self.timeout, session is not None),
                             session)
        if session is not None:
            request = _calls.with_session(request, session.id_at(self.target))
        open_here = self._stub(self.target).OpenSequence
        try:
            return self._call(open_here, request, timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":
                raise
        request = _calls.without_others(request, self.server_info(timeout=timeout))
        return self._call(open_here, request, timeout)

    def put(self, requests: Iterable[pb.PutKvRequest], *, timeout: float | None = None) -> pb.PutKvResponse:
        """Messages of one sequence."""
        if self._one():
            return self._call(self._stub(self.target).PutKv, iter(requests), timeout)
        first, requests = _calls.peek(requests)
        return self._call(self._at(first.sequence if first else "", timeout).PutKv, requests, timeout)

    def put_layer(self, sequence: Any, layer: int, keys: Any, values: Any, *, first_token: int = 0,
                  query_rms: Any | None = None, timeout: float | None = None) -> pb.PutKvResponse:
        """Puts K and V [tokens, kv_heads, head_dim] (after RoPE) of one layer, in chunks."""
        return self.put(_calls.kv_chunks(_calls.handle(sequence), layer, keys, values, first_token,
                                         query_rms), timeout=timeout)

    def seal(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        return self._call(self._at(sequence, timeout).SealSequence,
                          pb.SealSequenceRequest(sequence=_calls.handle(sequence)), timeout)

    def get(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        if not self._one():
            return self._run(self._shards.find(_calls.handle(sequence), timeout or self.timeout))[1]
        return self._call(self._stub(self.target).GetSequence,
                          pb.GetSequenceRequest(sequence=_calls.handle(sequence)), timeout)

    def list(self, prefix: str = "", *, whole: bool = True,
             timeout: float | None = None) -> Iterator[pb.Sequence]:
        """All sequences, page by page; of several servers all together, by name. Unless it must be whole, those
        of the servers that answer."""
        if not self._one():
            yield from self._run(self._shards.list(prefix, timeout or self.timeout, whole))
            return
        token = ""
        while True:
            page = self._call(self._stub(self.target).ListSequences, pb.ListSequencesRequest(
                prefix=prefix, page_token=token), timeout)
            yield from page.sequences
            token = page.next_page_token
            if not token:
                return

    def fork(self, source: Any, name: str, *, max_decode_tokens: int = 0, ttl_seconds: float = 0,
             timeout: float | None = None) -> pb.Sequence:
        """On the server of its source, whose pages it shares, whichever owns the name."""
        return self._call(self._at(source, timeout).ForkSequence, pb.ForkSequenceRequest(
            source=_calls.handle(source), name=name, max_decode_tokens=max_decode_tokens,
            ttl_ms=int(ttl_seconds * 1000)), timeout)

    def release(self, sequence: Any, *, timeout: float | None = None) -> None:
        if not self._one():
            self._run(self._shards.release(_calls.handle(sequence), timeout or self.timeout))
            return
        try:
            self._call(self._stub(self.target).ReleaseSequence,
                       pb.ReleaseSequenceRequest(sequence=_calls.handle(sequence)), timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":  # else it is not here
                raise

    def connect_ingest(self, request: pb.ConnectIngestRequest, *, sequence: Any,
                       session: "Session | ShardSessions", timeout: float | None = None) -> pb.ConnectIngestResponse:
        """Maps the session's window at the server that has the sequence."""
        address = self._address(sequence, timeout)
        request = _calls.with_session(request, session.id_at(address))
        return self._call(self._stub(address).ConnectIngest, request, timeout)

    def put_window(self, request: pb.PutWindowRequest, *, timeout: float | None = None) -> None:
        self._call(self._at(request.sequence, timeout).PutWindow, request, timeout)

    def attach(self, request: pb.AttachRequest, *, session: "Session | ShardSessions | None" = None,
               timeout: float | None = None) -> pb.AttachResponse:
        address = self._address(request.sequence, timeout)
        if session is not None:
            request = _calls.with_session(request, session.id_at(address))
        response = self._call(self._stub(address).Attach, request, timeout)
        self._attached[response.attachment_id] = address
        return response

    def connect_link(self, request: pb.ConnectLinkRequest, *,
                     timeout: float | None = None) -> pb.ConnectLinkResponse:
        return self._call(self._of_attachment(request.attachment_id).ConnectLink, request, timeout)

    def detach(self, attachment_id: int, *, timeout: float | None = None) -> None:
        self._call(self._of_attachment(attachment_id).Detach,
                   pb.DetachRequest(attachment_id=attachment_id), timeout)
        self._attached.pop(attachment_id, None)

    def select(self, sequence: Any, layer: int, queries: Any, *, budget: int | None = None,
               state: bool = True, zones: bool = False, timeout: float | None = None) -> pb.SelectResult:
        """Selects for queries [query_heads, head_dim] of one layer; raises the item's own error."""
        response = self._call(self._at(sequence, timeout).SelectClusters, _calls.select_request(
            sequence, layer, queries, budget=budget, state=state, zones=zones), timeout)
        result = response.results[0]
        if result.HasField("error"):
            raise from_status(result.error)
        return result

    def select_batch(self, request: pb.SelectClustersRequest, *,
                     timeout: float | None = None) -> pb.SelectClustersResponse:
        """Of several servers each is asked for the items whose sequences it has, one after the other."""
        if self._one():
            return self._call(self._stub(self.target).SelectClusters, request, timeout)
        places = self._run(self._shards.group(_calls.batch_handles(request), timeout or self.timeout))
        if len(places) == 1:
            return self._call(self._stub(*places).SelectClusters, request, timeout)
        return _calls.joined(request, [
            (which, self._call(self._stub(address).SelectClusters, _calls.part_of(request, which), timeout))
            for address, which in places.items()])

    def select_and_recall(self, request: pb.SelectAndRecallRequest, *, timeout: float | None = None
                          ) -> Iterator[pb.SelectAndRecallResponse]:
        """The items' attachments are those of one server."""
        stub = self._of_attachment(request.items[0].attachment_id if request.items else 0)
        return self._stream(stub.SelectAndRecall, request, timeout)

    def recall(self, sequence: Any, layer: int, positions: dict[int, list[int]], *,
               timeout: float | None = None) -> dict[int, tuple[list[int], bytes]]:
        """Records of tokens, by KV head: positions and packed records."""
        request = pb.RecallClustersRequest(sequence=_calls.handle(sequence), layer=layer, heads=[
            pb.RecallClustersRequest.Head(kv_head=h, positions=p) for h, p in positions.items()])
        return _calls.grouped(self.recall_stream(request, timeout=timeout))

    def recall_stream(self, request: pb.RecallClustersRequest, *,
                      timeout: float | None = None) -> Iterator[pb.RecordChunk]:
        return self._stream(self._at(request.sequence, timeout).RecallClusters, request, timeout)

    def stream_select(self, requests: Iterable[pb.SelectClustersRequest], *, timeout: float | None = None
                      ) -> Iterator[pb.SelectClustersResponse]:
        """One stream for many steps: an answer per request, in order."""
        if self._one():
            return self._stream(self._stub(self.target).StreamSelect, iter(requests), timeout)
        first, requests = _calls.peek(requests)
        handle = _calls.batch_handles(first)[0] if first else ""
        return self._stream(self._at(handle, timeout).StreamSelect, requests, timeout)

    def stream_select_and_recall(self, requests: Iterable[pb.SelectAndRecallRequest], *,
                                 timeout: float | None = None) -> Iterator[pb.SelectAndRecallResponse]:
        if self._one():
            return self._stream(self._stub(self.target).StreamSelectAndRecall, iter(requests), timeout)
        first, requests = _calls.peek(requests)
        stub = self._of_attachment(first.items[0].attachment_id if first and first.items else 0)
        return self._stream(stub.StreamSelectAndRecall, requests, timeout)

    def append(self, request: pb.AppendKvRequest, *, timeout: float | None = None) -> pb.AppendKvResponse:
        return self._call(self._at(request.sequence, timeout).AppendKv, request, timeout)

    def index(self, sequence: Any, layer: int, *, centroids: bool = True, value_means: bool = False,
              positions: bool = True, timeout: float | None = None) -> Iterator[pb.IndexChunk]:
        return self._stream(self._at(sequence, timeout).GetIndex, pb.GetIndexRequest(
            sequence=_calls.handle(sequence), layer=layer, want_centroids=centroids,
            want_value_means=value_means, want_positions=positions), timeout)

    def session(self, worker: str) -> "Session | ShardSessions":
        """``with client.session("me") as session``: alive until the block ends; give it to ``open`` and
        ``attach``."""
        if self._one():
            return Session(self._channel(self.target), worker)
        return ShardSessions(self, worker)


class Session:
    """A liveness session: heartbeats on a thread until closed. ``id`` goes into open and attach calls."""

    def __init__(self, channel: grpc.Channel, worker: str):
        self._requests: queue.Queue = queue.Queue()
        self._requests.put(session_pb.SessionRequest(
            hello=session_pb.SessionRequest.Hello(worker=worker)))
        self._call = session_grpc.SessionServiceStub(channel).Session(iter(self._requests.get, None))
        try:
            welcome = next(self._call).welcome
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        self.id: int = welcome.session_id
        self.boot_id: int = welcome.boot_id
        self.notices: queue.Queue[session_pb.SessionResponse.Notice] = queue.Queue()
        self._ended = threading.Event()
        self._interval = max(0.05, welcome.ttl_ms / 4000)
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(self._interval):
            self._requests.put(session_pb.SessionRequest(
                heartbeat=session_pb.SessionRequest.Heartbeat()))

    def _listen(self) -> None:
        try:
            for response in self._call:
                if response.HasField("notice"):
                    self.notices.put(response.notice)
        except grpc.RpcError:
            pass
        self._ended.set()

    def id_at(self, address: str) -> int:
        return self.id

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def close(self) -> None:
        self._ended.set()
        self._requests.put(None)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ShardSessions:
    """A session with each of several servers, from when it is first needed there."""

    def __init__(self, client: Client, worker: str):
        self._client, self._worker = client, worker
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def id_at(self, address: str) -> int:
        with self._lock:
            session = self._sessions.get(address)
            if session is None or not session.alive:
                session = self._sessions[address] = Session(self._client._channel(address), self._worker)
            return session.id

    @property
    def alive(self) -> bool:
        """With all servers that it was needed with."""
        with self._lock:
            return all(session.alive for session in self._sessions.values())

    def close(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.close()

    def __enter__(self) -> "ShardSessions":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AdminClient:
    """The admin port: drain, figures, ledger, evictions."""

    def __init__(self, target: str, *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None):
        self.timeout = timeout
        self._channel = (grpc.secure_channel(target, credentials, CHANNEL_OPTIONS) if credentials
                         else grpc.insecure_channel(target, CHANNEL_OPTIONS))
        self._admin = admin_grpc.AdminServiceStub(self._channel)

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self._channel.close()

    def _call(self, method: Callable, request: Any) -> Any:
        try:
            return method(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def stats(self) -> admin_pb.Stats:
        return self._call(self._admin.GetStats, admin_pb.GetStatsRequest())

    def verify_ledger(self, *, checksums: bool = False) -> admin_pb.VerifyLedgerResponse:
        return self._call(self._admin.VerifyLedger,
                          admin_pb.VerifyLedgerRequest(checksums=checksums))

    def drain(self) -> admin_pb.DrainResponse:
        return self._call(self._admin.Drain, admin_pb.DrainRequest())

    def evict(self, sequence: Any, *, force: bool = False) -> None:
        self._call(self._admin.EvictSequence, admin_pb.EvictSequenceRequest(
            sequence=_calls.handle(sequence), force=force))

    def force_release_worker(self, session_id: int) -> None:
        self._call(self._admin.ForceReleaseWorker,
                   admin_pb.ForceReleaseWorkerRequest(session_id=session_id))
