"""Several servers as one: where a sequence belongs and where it is, as worker/shards.h finds it.

What is to be asked is decided here, once; who asks is the sync or the asyncio client. A method of ``Shards``
is a generator: it yields what is to be done (``Resolve``, ``Ask``, ``SessionAt``), is sent the answer or
thrown the exception, and returns its result.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import threading
import time
from collections.abc import Generator, Iterable
from typing import Any

from clusterkv import _placement
from clusterkv.errors import (ClusterKVError, NotFoundError, StaleHandleError, UnavailableError,
                              make_error)
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

CONNECT_TIMEOUT = 2.0  # how long a shard that does not answer is waited for before another is asked
AWAY_FOR = 5.0         # how long one that did not is not asked again
REDIRECTS = 16         # more than a list is ever behind
ETCD = "etcd://"       # worker/shards.h reads such a list; the control client does not


@dataclasses.dataclass(frozen=True)
class Resolve:
    """-> [(family, address)] of a host, empty where the name does not resolve now."""

    host: str
    port: str


@dataclasses.dataclass(frozen=True)
class Ask:
    """-> the answer of the server there; raises ClusterKVError."""

    address: str
    method: str  # of CacheService
    request: Any
    timeout: float


@dataclasses.dataclass(frozen=True)
class SessionAt:
    """-> the id of the caller's session there."""

    address: str


Steps = Generator[Resolve | Ask | SessionAt, Any, Any]


def split(text: str) -> tuple[str, str]:
    """"host:port" -> both; the host without brackets."""
    host, _, port = text.rpartition(":")
    if not host or not port:
        raise make_error("INVALID_ARGUMENT", "", f'server: expected HOST:PORT, comma-separated, got "{text}"')
    return (host[1:-1] if host[0] == "[" and host[-1] == "]" else host), port


def joined(host: str, port: str | int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_one(target: str, addresses: Iterable[tuple[Any, str]] | None = None) -> bool | None:
    """Whether a target is one server: no list, and no name of several addresses (a headless service). None:
    its addresses must be known to tell. One of IPv4 and one of IPv6 are the same host's."""
    if "," in target or target.startswith(ETCD):
        return False
    if addresses is not None:
        families = [family for family, _ in addresses]
        return len(families) == len(set(families))
    if target.startswith("unix:") or "/" in target:  # gRPC's own schemes
        return True
    host = split(target)[0] if ":" in target else target
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return True if host == "localhost" else None


def is_away(error: ClusterKVError) -> bool:
    """The shard cannot be used now; another may."""
    return error.reason == "DRAINING" or error.code in ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED",
                                                        "UNKNOWN")


class Shards:
    """Thread-safe. ``target``: a server, or several: addresses with commas between, or a name of several
    addresses, each of them one. Where the servers know of no list of shards those of the target are the
    shards, by the names written: then all clients must write the same."""

    def __init__(self, target: str):
        self.target = target
        self.one = is_one(target)             # None: not known yet
        self.members: list[pb.Shard] = []     # by name
        self.hosts: dict[str, str] = {}       # address: the name that its certificate has
        self._lock = threading.Lock()
        self._addresses: dict[int, str] = {}  # by boot id, of servers that answered
        self._met: set[str] = set()
        self._away: dict[str, float] = {}     # addresses not asked until then

    # --- who there is

    def is_single(self) -> Steps:
        """Whether the target is one server. While its name does not resolve, it is."""
        if self.one is not None:
            return self.one
        addresses = yield Resolve(*split(self.target))
        if addresses:
            self.one = is_one(self.target, addresses)
        return self.one is not False

    def _seeds(self) -> Steps:
        """[(name, address, host if the target does not write this address)]."""
        if self.target.startswith(ETCD):
            raise make_error("UNIMPLEMENTED", "UNSUPPORTED", f"{self.target}: etcd's list is read by the native "
                             "worker (ClusterKVCache) alone; name some of the shards, which tell all")
        seeds = []
        for text in filter(None, self.target.split(",")):
            if text.startswith("unix:"):
                seeds.append((text, text, ""))
                continue
            host, port = split(text)
            addresses = sorted({address for _, address in (yield Resolve(host, port))})
            if len(addresses) == 1:
                seeds.append((text, text, ""))
            else:
                seeds += [(joined(address, port), joined(address, port), host) for address in addresses]
        return seeds

    def _look(self, timeout: float) -> Steps:
        """The list of the first that knows one. Without any, those that the target names, answering or not:
        a shard that is away for a while still owns what it owns."""
        last: ClusterKVError = UnavailableError(f"no shard at {self.target}", code="UNAVAILABLE")
        named, boot_ids = [], set()
        for name, address, host in (yield from self._seeds()):
            if host:
                self.hosts[address] = host
            else:
                named.append(pb.Shard(name=name, address=address))
                if boot_ids:
                    continue
            try:
                info = yield Ask(address, "GetServerInfo", pb.GetServerInfoRequest(),
                                 min(timeout, CONNECT_TIMEOUT))
            except ClusterKVError as error:
                if not is_away(error):
                    raise
                last = error
                continue
            if info.shards:
                return list(info.shards)
            # Several addresses of one name may be one server's.
            if host and info.boot_id not in boot_ids:
                named.append(pb.Shard(name=name, address=address))
            boot_ids.add(info.boot_id)
        if not boot_ids:
            raise last
        return sorted(named, key=lambda shard: shard.name)

    def _known(self, timeout: float) -> Steps:
        if not self.members:
            self.members = yield from self._look(timeout)
        return self.members

    def refresh(self) -> Steps:
        """Asks the shards who they are anew; the list stays where none answers. -> whether one did."""
        try:
            self.members = yield from self._look(CONNECT_TIMEOUT)
        except ClusterKVError as error:
            if not is_away(error):
                raise
            return False
        return True

    def _meet(self, address: str, timeout: float) -> Steps:
        """A server that did not answer yet: does it now?"""
        with self._lock:
            if address in self._met:
                return
            if time.monotonic() < self._away.get(address, 0):
                raise UnavailableError(f"{address} did not answer just now", code="UNAVAILABLE")
        try:
            info = yield Ask(address, "GetServerInfo", pb.GetServerInfoRequest(),
                             min(timeout, CONNECT_TIMEOUT))
        except ClusterKVError as error:
            if is_away(error):
                self._lost(address)
            raise
        self._gave(address, info.boot_id)

    def _gave(self, address: str, boot_id: int) -> None:
        with self._lock:
            self._met.add(address)
            self._away.pop(address, None)
            self._addresses[boot_id] = address

    def _lost(self, address: str) -> None:
        with self._lock:
            self._met.discard(address)
            self._away[address] = time.monotonic() + AWAY_FOR

    # --- sequences

    def open(self, request: pb.OpenSequenceRequest, timeout: float, session: bool = False) -> Steps:
        """On the sequence's owner; where that drains or is away, on the next one in rank."""
        mine = pb.OpenSequenceRequest()
        mine.CopyFrom(request)
        known = yield from self._known(timeout)
        without: list[str] = []
        redirected: pb.Shard | None = None
        last: ClusterKVError = UnavailableError("no shard takes new sequences", code="UNAVAILABLE")
        for _ in range(2 * len(known) + REDIRECTS):
            following, redirected = redirected, None
            if following is None or following.name in without:
                ranked = _placement.rank(mine.name, (s for s in known
                                                     if s.name not in without and not s.draining))
                if not ranked:
                    break
                following = ranked[0]
            del mine.without_shards[:]
            # A server may not have heard yet of one that drains.
            mine.without_shards.extend({*without, *(s.name for s in known if s.draining)} - {following.name})
            try:
                return (yield from self._open_at(following.address, mine, timeout, session))
            except ClusterKVError as error:
                last = error
            if last.reason == "NOT_OWNER":
                redirected = pb.Shard(name=last.metadata.get("ownerShard", ""),
                                      address=last.metadata.get("ownerAddress", ""))
                # Our list or the shard's is old: the next call begins with a new one.
                if (yield from self.refresh()):
                    known = self.members
            elif is_away(last):
                without.append(following.name)
            else:
                raise last
        raise UnavailableError(f"no shard takes sequence {mine.name}: {last.message}", code="UNAVAILABLE",
                               metadata=last.metadata)

    def _open_at(self, address: str, request: pb.OpenSequenceRequest, timeout: float,
                 session: bool) -> Steps:
        yield from self._meet(address, timeout)
        if session:
            request.session_id = yield SessionAt(address)
        try:
            sequence = yield Ask(address, "OpenSequence", request, timeout)
        except ClusterKVError as error:
            if is_away(error) and error.reason != "DRAINING":
                self._lost(address)
            raise
        self._gave(address, sequence.handle.boot_id)
        return sequence

    def find(self, handle: types.SequenceHandle, timeout: float) -> Steps:
        """-> (address, sequence). The shards are asked in order of rank. Raises NotFoundError,
        StaleHandleError; UnavailableError when it was not found, and not every shard answered."""
        giver = self._addresses.get(handle.boot_id) if handle.boot_id else None
        if giver is not None:  # also where the shard is on its way out and in no list any more
            try:
                return giver, (yield Ask(giver, "GetSequence", pb.GetSequenceRequest(sequence=handle),
                                         timeout))
            except ClusterKVError as error:
                if error.reason != "STALE_BOOT_ID" and not is_away(error):
                    raise
        known = yield from self._known(timeout)
        try:
            return (yield from self._find_among(known, handle, timeout))
        except ClusterKVError as error:
            first = error
        if not (yield from self.refresh()):
            raise first
        # Shards that were not known before; those that are no longer listed were asked.
        names = {shard.name for shard in known}
        added = [shard for shard in self.members if shard.name not in names]
        if not added:
            raise first
        try:
            return (yield from self._find_among(added, handle, timeout))
        except ClusterKVError:
            raise first from None

    def _find_among(self, shards: list[pb.Shard], handle: types.SequenceHandle, timeout: float) -> Steps:
        answer = make_error("NOT_FOUND", "SEQUENCE_NOT_FOUND", f"no shard has a sequence named {handle.name}",
                            {"sequence": handle.name})
        for shard in _placement.rank(handle.name, shards):
            try:
                yield from self._meet(shard.address, timeout)
                found = yield Ask(shard.address, "GetSequence", pb.GetSequenceRequest(sequence=handle),
                                  timeout)
                self._gave(shard.address, found.handle.boot_id)
                return shard.address, found
            except ClusterKVError as error:
                if error.reason in ("SEQUENCE_NOT_FOUND", "NOT_OWNER"):
                    continue
                if is_away(error):
                    if error.reason != "DRAINING":
                        self._lost(shard.address)
                    answer = UnavailableError(
                        f"shard {shard.name} at {shard.address} does not answer: {error.message}",
                        code="UNAVAILABLE")
                elif not isinstance(error, StaleHandleError):
                    raise
                elif answer.code != "UNAVAILABLE":
                    answer = error
        raise answer

    def locate(self, handle: types.SequenceHandle, timeout: float) -> Steps:
        """-> the address of the server that has it; the target itself where it is one."""
        if (yield from self.is_single()):
            return self.target
        giver = self._addresses.get(handle.boot_id) if handle.boot_id else None
        return giver or (yield from self.find(handle, timeout))[0]

    def release(self, handle: types.SequenceHandle, timeout: float) -> Steps:
        """Wherever it is; nothing if it is nowhere."""
        try:
            address, sequence = yield from self.find(handle, timeout)
        except (StaleHandleError, NotFoundError):
            return
        yield Ask(address, "ReleaseSequence", pb.ReleaseSequenceRequest(sequence=sequence.handle), timeout)

    def list(self, prefix: str, timeout: float, whole: bool = True) -> Steps:
        """Of all shards, by name; of those that answer, where it need not be whole."""
        sequences: list[pb.Sequence] = []
        for shard in (yield from self._known(timeout)):
            try:
                sequences += yield from self._list_at(shard.address, prefix, timeout)
            except ClusterKVError as error:
                if whole or not is_away(error):
                    raise
        return sorted(sequences, key=lambda sequence: sequence.handle.name)

    def _list_at(self, address: str, prefix: str, timeout: float) -> Steps:
        yield from self._meet(address, timeout)
        sequences: list[pb.Sequence] = []
        token = ""
        while True:
            try:
                page = yield Ask(address, "ListSequences",
                                 pb.ListSequencesRequest(prefix=prefix, page_token=token), timeout)
            except ClusterKVError as error:
                if is_away(error) and error.reason != "DRAINING":
                    self._lost(address)
                raise
            sequences += page.sequences
            token = page.next_page_token
            if not token:
                return sequences

    def info(self, timeout: float) -> Steps:
        """Of the first shard that answers."""
        last: ClusterKVError | None = None
        for shard in (yield from self._known(timeout)):
            try:
                return (yield Ask(shard.address, "GetServerInfo", pb.GetServerInfoRequest(), timeout))
            except ClusterKVError as error:
                if not is_away(error):
                    raise
                last = error
        raise last or UnavailableError(f"no shard at {self.target}", code="UNAVAILABLE")

    def group(self, handles: Iterable[types.SequenceHandle], timeout: float) -> Steps:
        """-> {address: [which of the handles are there]}."""
        places: dict[str, list[int]] = {}
        for i, handle in enumerate(handles):
            places.setdefault((yield from self.locate(handle, timeout)), []).append(i)
        return places


def resolve(host: str, port: str) -> list[tuple[Any, str]]:
    """What ``Resolve`` asks for, waiting."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return distinct(found)


def distinct(found: Iterable[tuple]) -> list[tuple[Any, str]]:
    """Families and addresses of what getaddrinfo found."""
    return sorted({(family, address[0]) for family, _, _, _, address in found})


def native_connection(target: str, **options: Any) -> Any:
    """The C++ worker's connection to one server or to several (``_native.Connection``)."""
    from clusterkv import _native

    one = is_one(target)
    if one is None:
        one = is_one(target, resolve(*split(target)))
    return _native.Connection(target, several=not one, **options)
