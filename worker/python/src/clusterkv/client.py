"""The sync control client: every call of the API over grpcio, no native code needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from clusterkv import _calls
from clusterkv.errors import ClusterKVError, from_rpc_error, from_status
from clusterkv.v1 import admin_service_pb2 as admin_pb
from clusterkv.v1 import admin_service_pb2_grpc as admin_grpc
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import cache_service_pb2_grpc as pb_grpc
from clusterkv.v1 import session_service_pb2 as session_pb
from clusterkv.v1 import session_service_pb2_grpc as session_grpc

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 8 << 20),
                   ("grpc.keepalive_time_ms", 30000), ("grpc.keepalive_timeout_ms", 10000))


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
    """A connection to one server. Thread-safe. Use as a context manager or call ``close``.

    >>> with Client("localhost:7400") as client:
    ...     sequence = client.open("demo", layers=2, kv_heads=2, query_heads=4, head_dim=64,
    ...                            prompt_tokens=keys.shape[0], dtype="float32")
    ...     client.put_layer(sequence, 0, keys, values)

    Every call takes ``timeout`` (seconds) and raises a ``ClusterKVError`` of the class that tells what
    to do about it.
    """

    def __init__(self, target: str, *, timeout: float = 30.0,
                 credentials: grpc.ChannelCredentials | None = None):
        self.target = target
        self.timeout = timeout
        self._channel = (grpc.secure_channel(target, credentials, CHANNEL_OPTIONS) if credentials
                         else grpc.insecure_channel(target, CHANNEL_OPTIONS))
        self._cache = pb_grpc.CacheServiceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

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

    def server_info(self, *, timeout: float | None = None) -> pb.ServerInfo:
        return self._call(self._cache.GetServerInfo, pb.GetServerInfoRequest(), timeout)

    def open(self, name: str, *, timeout: float | None = None, **shape: Any) -> pb.Sequence:
        """Opens a sequence; arguments as ``_calls.open_request``."""
        return self.open_sequence(_calls.open_request(name, **shape), timeout=timeout)

    def open_sequence(self, request: pb.OpenSequenceRequest, *,
                      timeout: float | None = None) -> pb.Sequence:
        """On this server, whichever of several shards owns the name."""
        try:
            return self._call(self._cache.OpenSequence, request, timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":
                raise
        request = _calls.without_others(request, self.server_info(timeout=timeout))
        return self._call(self._cache.OpenSequence, request, timeout)

    def put(self, requests: Iterable[pb.PutKvRequest], *, timeout: float | None = None) -> pb.PutKvResponse:
        return self._call(self._cache.PutKv, iter(requests), timeout)

    def put_layer(self, sequence: Any, layer: int, keys: Any, values: Any, *, first_token: int = 0,
                  query_rms: Any | None = None, timeout: float | None = None) -> pb.PutKvResponse:
        """Puts K and V [tokens, kv_heads, head_dim] (after RoPE) of one layer, in chunks."""
        return self.put(_calls.kv_chunks(_calls.handle(sequence), layer, keys, values, first_token,
                                         query_rms), timeout=timeout)

    def seal(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        return self._call(self._cache.SealSequence,
                          pb.SealSequenceRequest(sequence=_calls.handle(sequence)), timeout)

    def get(self, sequence: Any, *, timeout: float | None = None) -> pb.Sequence:
        return self._call(self._cache.GetSequence,
                          pb.GetSequenceRequest(sequence=_calls.handle(sequence)), timeout)

    def list(self, prefix: str = "", *, timeout: float | None = None) -> Iterator[pb.Sequence]:
        """All sequences, page by page."""
        token = ""
        while True:
            page = self._call(self._cache.ListSequences, pb.ListSequencesRequest(
                prefix=prefix, page_token=token), timeout)
            yield from page.sequences
            token = page.next_page_token
            if not token:
                return

    def fork(self, source: Any, name: str, *, max_decode_tokens: int = 0, ttl_seconds: float = 0,
             timeout: float | None = None) -> pb.Sequence:
        return self._call(self._cache.ForkSequence, pb.ForkSequenceRequest(
            source=_calls.handle(source), name=name, max_decode_tokens=max_decode_tokens,
            ttl_ms=int(ttl_seconds * 1000)), timeout)

    def release(self, sequence: Any, *, timeout: float | None = None) -> None:
        try:
            self._call(self._cache.ReleaseSequence,
                       pb.ReleaseSequenceRequest(sequence=_calls.handle(sequence)), timeout)
        except ClusterKVError as error:
            if error.reason != "NOT_OWNER":  # else it is not here
                raise

    def attach(self, request: pb.AttachRequest, *, timeout: float | None = None) -> pb.AttachResponse:
        return self._call(self._cache.Attach, request, timeout)

    def connect_link(self, request: pb.ConnectLinkRequest, *,
                     timeout: float | None = None) -> pb.ConnectLinkResponse:
        return self._call(self._cache.ConnectLink, request, timeout)

    def detach(self, attachment_id: int, *, timeout: float | None = None) -> None:
        self._call(self._cache.Detach, pb.DetachRequest(attachment_id=attachment_id), timeout)

    def select(self, sequence: Any, layer: int, queries: Any, *, budget: int | None = None,
               state: bool = True, zones: bool = False, timeout: float | None = None) -> pb.SelectResult:
        """Selects for queries [query_heads, head_dim] of one layer; raises the item's own error."""
        response = self._call(self._cache.SelectClusters, _calls.select_request(
            sequence, layer, queries, budget=budget, state=state, zones=zones), timeout)
        result = response.results[0]
        if result.HasField("error"):
            raise from_status(result.error)
        return result

    def select_batch(self, request: pb.SelectClustersRequest, *,
                     timeout: float | None = None) -> pb.SelectClustersResponse:
        return self._call(self._cache.SelectClusters, request, timeout)

    def select_and_recall(self, request: pb.SelectAndRecallRequest, *, timeout: float | None = None
                          ) -> Iterator[pb.SelectAndRecallResponse]:
        return self._stream(self._cache.SelectAndRecall, request, timeout)

    def recall(self, sequence: Any, layer: int, positions: dict[int, list[int]], *,
               timeout: float | None = None) -> dict[int, tuple[list[int], bytes]]:
        """Records of tokens, by KV head: positions and packed records."""
        request = pb.RecallClustersRequest(sequence=_calls.handle(sequence), layer=layer, heads=[
            pb.RecallClustersRequest.Head(kv_head=h, positions=p) for h, p in positions.items()])
        return _calls.grouped(self._stream(self._cache.RecallClusters, request, timeout))

    def stream_select(self, requests: Iterable[pb.SelectClustersRequest], *, timeout: float | None = None
                      ) -> Iterator[pb.SelectClustersResponse]:
        """One stream for many steps: an answer per request, in order."""
        return self._stream(self._cache.StreamSelect, iter(requests), timeout)

    def stream_select_and_recall(self, requests: Iterable[pb.SelectAndRecallRequest], *,
                                 timeout: float | None = None) -> Iterator[pb.SelectAndRecallResponse]:
        return self._stream(self._cache.StreamSelectAndRecall, iter(requests), timeout)

    def append(self, request: pb.AppendKvRequest, *, timeout: float | None = None) -> pb.AppendKvResponse:
        return self._call(self._cache.AppendKv, request, timeout)

    def index(self, sequence: Any, layer: int, *, centroids: bool = True, value_means: bool = False,
              positions: bool = True, timeout: float | None = None) -> Iterator[pb.IndexChunk]:
        return self._stream(self._cache.GetIndex, pb.GetIndexRequest(
            sequence=_calls.handle(sequence), layer=layer, want_centroids=centroids,
            want_value_means=value_means, want_positions=positions), timeout)

    def session(self, worker: str) -> "Session":
        return Session(self._channel, worker)


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
