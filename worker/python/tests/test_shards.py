"""Several servers as one: placement, and the clients against three real servers."""

import asyncio
import contextlib
import random
import socket
import time

import numpy as np
import pytest

import clusterkv
from clusterkv import _calls, _placement, _shards, aio
from clusterkv.v1 import cache_service_pb2 as pb

from conftest import Server
from test_client import SHAPE, filled, random_kv

NAMES = ("kv-0", "kv-1", "kv-2")


def owner(sequence: str) -> int:
    shards = [pb.Shard(name=name) for name in NAMES]
    return NAMES.index(_placement.rank(sequence, shards)[0].name)


def name_of(shard: int, begin: str = "sequence") -> str:
    return next(name for name in (f"{begin}-{i}" for i in range(1000)) if owner(name) == shard)


def test_python_and_the_native_worker_place_alike():
    native = pytest.importorskip("clusterkv._native")
    rng = random.Random(3)
    for i in range(1000):
        names = [f"shard-{rng.randrange(10 ** 9)}" for _ in range(rng.randrange(1, 8))]
        sequence = "".join(rng.choice("abcä/-0 ") for _ in range(rng.randrange(1, 251 if i % 2 else 20)))
        ranked = [shard.name for shard in _placement.rank(sequence, [pb.Shard(name=n) for n in names])]
        assert ranked == native.rank_shards(sequence, names)


def test_the_servers_place_alike(shards):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(clusterkv.Client(s.target)) for s in shards.servers]
        for i in range(1000):
            name, asked = f"sequence-{i}", i % 3
            with pytest.raises((clusterkv.NotOwnerError, clusterkv.NotFoundError)) as error:
                clients[asked].get(name)
            said = (error.value.metadata["ownerShard"] if error.value.reason == "NOT_OWNER" else NAMES[asked])
            assert said == NAMES[owner(name)]


def held(shards) -> list[set[str]]:
    names = []
    for server in shards.servers:
        with clusterkv.Client(server.target) as client:
            names.append({sequence.handle.name for sequence in client.list()})
    return names


def test_sequences_lie_with_their_owners_and_every_call_finds_them(shards):
    queries = np.random.default_rng(1).standard_normal((4, 32), np.float32)
    # One seed is enough: it names the others. The comma says that there are several.
    with clusterkv.Client(shards.servers[0].target + ",") as client, clusterkv.Client(shards.target) as other:
        names = [name_of(i) for i in range(3)]
        sequences = [filled(client, name)[0] for name in names]
        assert held(shards) == [{name} for name in names]
        assert [s.handle.name for s in other.list("seq")] == sorted(names)
        for name, sequence in zip(names, sequences):
            assert other.get(name).handle == sequence.handle  # by its name alone
            first = client.select(sequence, 1, queries)
            assert other.select(name, 1, queries).selection_digest == first.selection_digest
            head = list(first.heads[0].exact_positions)
            assert other.recall(name, 1, {0: head})[0][0] == head
            assert sum(len(chunk.positions) for chunk in other.index(sequence, 0)) == 2 * (300 - 16)
        batch = pb.SelectClustersRequest(want_state=True, items=[
            _calls.select_request(sequences[i], 1, queries).items[0] for i in (2, 0, 1, 0)])
        digests = [r.selection_digest for r in client.select_batch(batch).results]
        assert digests == [client.select(sequences[i], 1, queries).selection_digest for i in (2, 0, 1, 0)]
        streamed = client.stream_select(_calls.select_request(sequences[1], 1, queries) for _ in range(2))
        assert [r.results[0].selection_digest for r in streamed] == [digests[2]] * 2
        fork = other.fork(names[1], "fork")
        attached = client.attach(pb.AttachRequest(sequence=sequences[2].handle))
        step = client.select_and_recall(pb.SelectAndRecallRequest(items=[pb.SelectAndRecallItem(
            attachment_id=attached.attachment_id, layer=1, queries=_calls.vector(queries))]))
        assert next(iter(step)).selection.results[0].selection_digest == digests[0]
        client.detach(attached.attachment_id)
        with pytest.raises(clusterkv.NotFoundError):
            client.detach(attached.attachment_id)
        for sequence in (*names, fork):
            other.release(sequence)
        other.release("never")
        assert held(shards) == [set()] * 3
        with pytest.raises(clusterkv.NotFoundError) as error:
            other.get("never")
        assert error.value.reason == "SEQUENCE_NOT_FOUND"


def test_a_sequence_that_is_not_with_its_owner_is_found(shards):
    with clusterkv.Client(shards.servers[0].target) as alone, clusterkv.Client(shards.target) as client:
        sequence, _ = filled(alone, name_of(2))  # a client of one server opens there
        assert client.get(sequence.handle.name).handle == sequence.handle
        assert client.select(sequence.handle.name, 0, np.ones((4, 32), np.float32)).heads


def test_not_owner_is_followed(shards):
    with clusterkv.Client(shards.target) as client:
        client.list()
        # As of a list that is old: it knows two shards of the three.
        client._shards.members = client._shards.members[:2]
        name = name_of(2)
        client.open(name, prompt_tokens=3, **SHAPE)
        assert held(shards) == [set(), set(), {name}]
        assert len(client._shards.members) == 3


def test_a_draining_or_dead_owner_is_passed_over(shards):
    with clusterkv.Client(shards.target) as client:
        survivor, _ = filled(client, name_of(2))
        with clusterkv.AdminClient(shards.servers[0].admin_target) as admin:
            admin.drain()
        shards.servers[1].kill()
        for i in range(2):
            filled(client, name_of(i))
        with clusterkv.Client(shards.servers[2].target) as last:
            assert {s.handle.name for s in last.list()} == {name_of(0), name_of(1), survivor.handle.name}
        # It is nowhere that answers, and not all did.
        with pytest.raises(clusterkv.UnavailableError):
            client.get("nowhere")
        shards.servers[1].start()
        gone = survivor.handle
        assert client.get(gone).handle == gone


def until_stale(call) -> None:
    """While gRPC has not connected again the server is away; then its new process does not know the handle."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with pytest.raises((clusterkv.StaleHandleError, clusterkv.UnavailableError)) as error:
            call()
        if isinstance(error.value, clusterkv.StaleHandleError):
            return
        time.sleep(0.02)
    raise error.value


def test_a_handle_of_a_process_that_is_gone_is_stale(shards):
    with clusterkv.Client(shards.target) as client:
        sequence, _ = filled(client, name_of(1))
        shards.servers[1].kill()
        shards.servers[1].start()
        until_stale(lambda: client.select(sequence, 0, np.ones((4, 32), np.float32)))
        client.release(sequence)
        filled(client, sequence.handle.name)


def test_a_session_with_several_servers_owns_what_it_fills(shards):
    with clusterkv.Client(shards.target) as client:
        with client.session("pytest") as session:
            for i in range(3):
                client.open(name_of(i), prompt_tokens=100, session=session, **SHAPE)
            assert session.alive and len(list(client.list())) == 3
        assert not session.alive


def test_servers_that_know_of_no_shards_are_those_that_the_target_names(server_program):
    servers = [Server(server_program, arena="64MiB") for _ in range(2)]
    target = ",".join(server.target for server in servers)
    with clusterkv.Client(target) as client:
        for i in range(8):
            client.open(f"s{i}", prompt_tokens=3, **SHAPE)
        by_name = [pb.Shard(name=server.target) for server in servers]
        for server in servers:
            with clusterkv.Client(server.target) as one:
                assert {s.handle.name for s in one.list()} == {
                    f"s{i}" for i in range(8) if _placement.rank(f"s{i}", by_name)[0].name == server.target}
    assert [server.stop() for server in servers] == [0, 0]


def test_the_asyncio_client_does_the_same(shards):
    async def run():
        async with aio.Client(shards.target) as client:
            names, queries = [name_of(i) for i in range(3)], np.ones((4, 32), np.float32)
            async with client.session("pytest-aio") as session:
                sequences = [await client.open(name, prompt_tokens=200, session=session, **SHAPE)
                             for name in names]
                for sequence in sequences:
                    for layer in range(2):
                        await client.put_layer(sequence, layer, *random_kv(200, layer))
                sequences = [await client.seal(sequence) for sequence in sequences]
            assert held(shards) == [{name} for name in names]
            assert [s.handle.name async for s in client.list()] == sorted(names)
            alone = [(await client.select(name, 1, queries)).selection_digest for name in names]
            batch = await client.select_batch(pb.SelectClustersRequest(items=[
                _calls.select_request(sequences[i], 1, queries).items[0] for i in (2, 0, 1)]))
            assert [r.selection_digest for r in batch.results] == [alone[i] for i in (2, 0, 1)]
            streamed = [r.results[0].selection_digest async for r in client.stream_select(
                [_calls.select_request(sequences[1], 1, queries)] * 2)]
            assert streamed == [alone[1]] * 2
            attached = await client.attach(pb.AttachRequest(sequence=sequences[2].handle))
            answers = [r async for r in client.select_and_recall(pb.SelectAndRecallRequest(items=[
                pb.SelectAndRecallItem(attachment_id=attached.attachment_id, layer=1,
                                       queries=_calls.vector(queries))]))]
            assert answers[0].selection.results[0].selection_digest == alone[2]
            await client.detach(attached.attachment_id)
            with pytest.raises(clusterkv.NotFoundError):
                await client.get("never")
            for name in (*names, "never"):
                await client.release(name)
            assert held(shards) == [set()] * 3

    asyncio.run(run())


def test_a_name_of_several_addresses_is_several_servers():
    v4, v6 = socket.AF_INET, socket.AF_INET6
    assert _shards.is_one("10.0.0.1:7400") and _shards.is_one("[::1]:7400") and _shards.is_one("unix:/x")
    assert _shards.is_one("localhost:7400")
    assert _shards.is_one("kv:7400") is None
    assert _shards.is_one("kv:7400", [(v4, "10.0.0.1"), (v6, "fd00::1")])
    assert _shards.is_one("kv:7400", [(v4, "10.0.0.1"), (v4, "10.0.0.2")]) is False
    assert _shards.is_one("kv:7400,") is False
    assert _shards.is_one("etcd://127.0.0.1:2379/kv") is False
    with pytest.raises(clusterkv.InvalidRequestError):
        clusterkv.Client("nonsense,").server_info()
    with pytest.raises(clusterkv.UnsupportedError, match="name some of the shards"):
        clusterkv.Client("etcd://127.0.0.1:2379/kv").server_info()


def test_a_headless_name_stands_for_its_addresses(server_program, monkeypatch):
    first = Server(server_program, arena="64MiB")
    second = Server(server_program, arena="64MiB", host="127.0.0.2", port=first.port)
    # As a resolver answers for a headless service: an address for each.
    found = {"kv.example": [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2")]}
    monkeypatch.setattr(_shards, "resolve", lambda host, port: found.get(host, []))
    by_name = [pb.Shard(name=server.target) for server in (first, second)]
    with clusterkv.Client(f"kv.example:{first.port}") as client:
        for i in range(8):
            client.open(f"s{i}", prompt_tokens=3, **SHAPE)
        for server in (first, second):
            with clusterkv.Client(server.target) as one:
                assert {s.handle.name for s in one.list()} == {
                    f"s{i}" for i in range(8) if _placement.rank(f"s{i}", by_name)[0].name == server.target}
    assert [first.stop(), second.stop()] == [0, 0]


def test_the_native_worker_goes_where_a_sequence_belongs(shards):
    native = pytest.importorskip("clusterkv._native")
    connection = _shards.native_connection(shards.target, timeout=20)
    names = [name_of(i) for i in range(3)]
    for name in names:
        request = _calls.open_request(name, prompt_tokens=300, **SHAPE)
        sequence = connection.open(request.SerializeToString())
        writer = native.PrefillWriter(connection, sequence)
        for layer in range(2):
            keys, values = random_kv(300, layer)
            writer.put(layer, 0, 300, keys, values, np.zeros(0, np.float32))
        sealed = pb.Sequence.FromString(writer.finish())
        decoder = native.DecodeSession(connection, sealed.handle.SerializeToString(),
                                       pb.HotCacheConfig(capacity_tokens=64).SerializeToString(), False)
        keys, values = random_kv(1)
        output = np.empty((1, 4, 32), np.float32)
        decoder.steps(0, keys, values, np.ones((1, 4, 32), np.float32), output)
        assert np.isfinite(output).all() and output.any()
    assert held(shards) == [{name} for name in names]
    for name in names:
        connection.release(pb.Sequence(handle={"name": name}).handle.SerializeToString())
    assert held(shards) == [set()] * 3
    assert connection.reconnect(5)
