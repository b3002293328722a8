"""The pure-Python clients against a real server."""

import asyncio
import socket

import numpy as np
import pytest

import clusterkv
from clusterkv import _calls, aio
from clusterkv.v1 import cache_service_pb2 as pb
from clusterkv.v1 import types_pb2 as types

from conftest import Server

SHAPE = dict(layers=2, kv_heads=2, query_heads=4, head_dim=32, dtype="float32")


def random_kv(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, 2, 32), np.float32) for _ in range(2))


def filled(client, name, tokens=300, **options):
    sequence = client.open(name, prompt_tokens=tokens, **SHAPE, **options)
    kv = []
    for layer in range(2):
        keys, values = random_kv(tokens, layer)
        kv.append((keys, values))
        client.put_layer(sequence, layer, keys, values)
    return client.seal(sequence), kv


def attention(queries, keys, values):
    q = queries.reshape(2, 2, 32)
    logits = np.einsum("hgd,thd->hgt", q, keys) / np.sqrt(32)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hgt,thd->hgd", weights, values).reshape(4, 32)


def test_the_life_of_a_sequence(server):
    with clusterkv.Client(server.target) as client, clusterkv.AdminClient(server.admin_target) as admin:
        assert "default" in client.server_info().presets
        sequence, _ = filled(client, "demo")
        assert sequence.state == pb.SEQUENCE_STATE_READY
        assert [s.handle.name for s in client.list("de")] == ["demo"]
        fork = client.fork(sequence, "fork")
        assert fork.handle.generation != sequence.handle.generation
        client.release(sequence)
        client.release(fork)
        with pytest.raises(clusterkv.NotFoundError) as error:
            client.get("demo")
        assert error.value.reason == "SEQUENCE_NOT_FOUND"
        verdict = admin.verify_ledger(checksums=True)
        assert verdict.balanced and not verdict.problems


def test_a_budget_of_everything_recalls_the_very_bytes(server):
    with clusterkv.Client(server.target) as client:
        sequence, kv = filled(client, "all")
        queries = np.random.default_rng(7).standard_normal((4, 32), np.float32)
        result = client.select(sequence, 1, queries, budget=10_000)
        positions = {h: list(head.exact_positions) for h, head in enumerate(result.heads)}
        assert positions[0] == list(range(16, 300))
        keys, values = kv[1]
        for head, (got, records) in client.recall(sequence, 1, positions).items():
            rows = np.frombuffer(records, np.float32).reshape(len(got), 2, 32)
            np.testing.assert_array_equal(rows[:, 0], keys[got, head])
            np.testing.assert_array_equal(rows[:, 1], values[got, head])


def test_state_and_exact_zone_together_are_close_to_full_attention(server):
    with clusterkv.Client(server.target) as client:
        codes = types.Codes(bits=4, group_channels=32)
        sequence, kv = filled(client, "state", tokens=1000, index={"codes": codes})
        queries = np.random.default_rng(8).standard_normal((4, 32), np.float32)
        result = client.select(sequence, 0, queries, budget=64)
        keys, values = kv[0]
        out = _calls.bytes_to_array(result.state.output, result.state.type, (4, 32)).copy()
        lse = np.frombuffer(result.state.log_sum_exp, np.float32)
        for g in range(4):
            held = list(range(16)) + list(result.heads[g // 2].exact_positions)
            logits = keys[held, g // 2] @ queries[g] / np.sqrt(32)
            total = np.logaddexp.reduce(np.append(logits, lse[g]))
            out[g] = np.exp(lse[g] - total) * out[g] + np.exp(logits - total) @ values[held, g // 2]
        full = attention(queries, keys, values)
        # Codes of unclustered noise: a loose bound, that a lost zone would break at once.
        assert np.linalg.norm(out - full) / np.linalg.norm(full) < 0.15


def test_errors_are_typed_and_name_the_field(server):
    with clusterkv.Client(server.target) as client:
        with pytest.raises(clusterkv.InvalidRequestError) as error:
            client.open("bad", prompt_tokens=0, **SHAPE)
        assert "prompt_tokens" in str(error.value)
        sequence, _ = filled(client, "twice")
        with pytest.raises(clusterkv.AlreadyExistsError):
            client.open("twice", prompt_tokens=10, **SHAPE)
        with pytest.raises(clusterkv.InvalidRequestError) as error:
            client.select(sequence, 0, np.full((4, 32), np.nan, np.float32))
        assert error.value.reason == "NON_FINITE_QUERY"
        stale = pb.Sequence.FromString(sequence.SerializeToString()).handle
        stale.boot_id ^= 1
        with pytest.raises(clusterkv.StaleHandleError):
            client.get(stale)


def test_a_sequence_of_another_shard_names_its_owner(server_program, tmp_path):
    shards = tmp_path / "shards"
    shards.write_text("a 127.0.0.1:7400\nb kv-b.example:7400\n")
    server = Server(server_program, flags=[f"--shards_file={shards}", "--shard_name=a"])
    refused = []
    with clusterkv.Client(server.target) as client:
        for i in range(16):
            with pytest.raises((clusterkv.NotOwnerError, clusterkv.NotFoundError)) as error:
                client.get(f"seq-{i}")
            if isinstance(error.value, clusterkv.NotOwnerError):
                refused.append(error.value)
    assert server.stop() == 0
    assert 0 < len(refused) < 16
    assert all(error.reason == "NOT_OWNER" and error.metadata["ownerShard"] == "b" and
               error.metadata["ownerAddress"] == "kv-b.example:7400" for error in refused)


def test_a_refused_identity_is_an_error_of_its_own():
    error = clusterkv.errors.make_error(7, "IDENTITY_REFUSED", "no", {"identity": "x"})
    assert isinstance(error, clusterkv.RefusedError) and isinstance(error, PermissionError)
    assert str(error) == "IDENTITY_REFUSED: no" and error.code == "PERMISSION_DENIED"


def test_a_session_owns_what_it_fills(server):
    with clusterkv.Client(server.target) as client:
        with client.session("pytest") as session:
            client.open("owned", prompt_tokens=100, session_id=session.id, **SHAPE)
            assert session.alive and [s.handle.name for s in client.list()] == ["owned"]


def test_the_asyncio_client_does_the_same(server):
    async def run():
        async with aio.Client(server.target) as client:
            sequence = await client.open("aio", prompt_tokens=200, **SHAPE)
            for layer in range(2):
                keys, values = random_kv(200, layer)
                await client.put_layer(sequence, layer, keys, values)
            sequence = await client.seal(sequence)
            queries = np.ones((4, 32), np.float32)
            results = await asyncio.gather(*(client.select(sequence, i % 2, queries) for i in range(8)))
            assert len({r.selection_digest for r in results}) == 2
            assert [s.handle.name async for s in client.list()] == ["aio"]
            # Streams answer each request in order, and as the unary calls do.
            requests = [_calls.select_request(sequence, i, queries) for i in (0, 1, 0)]
            streamed = [r.results[0] async for r in client.stream_select(requests)]
            assert [r.selection_digest for r in streamed] == [
                results[i].selection_digest for i in (0, 1, 0)]
            batch = await client.select_batch(pb.SelectClustersRequest(
                items=[requests[0].items[0], requests[1].items[0]]))
            assert [r.selection_digest for r in batch.results] == [
                results[i].selection_digest for i in (0, 1)]
            with pytest.raises(clusterkv.NotFoundError):
                await client.get("other")

    asyncio.run(run())


def test_the_streams_of_the_sync_client_answer_in_order(server):
    with clusterkv.Client(server.target) as client:
        sequence, _ = filled(client, "stream")
        queries = np.ones((4, 32), np.float32)
        alone = [client.select(sequence, layer, queries) for layer in range(2)]
        requests = (_calls.select_request(sequence, layer, queries) for layer in (1, 0, 1))
        digests = [r.results[0].selection_digest for r in client.stream_select(requests)]
        assert digests == [alone[layer].selection_digest for layer in (1, 0, 1)]


def test_a_session_and_the_admin_port_by_asyncio(server):
    async def run():
        async with aio.Client(server.target) as client, aio.AdminClient(server.admin_target) as admin:
            async with client.session("pytest-aio") as session:
                assert session.id and session.boot_id and session.alive
                await client.open("owned", prompt_tokens=100, session_id=session.id, **SHAPE)
                verdict = await admin.verify_ledger(checksums=True)
                assert verdict.balanced and not verdict.problems
                await admin.evict("owned", force=True)
                with pytest.raises(clusterkv.NotFoundError):
                    await client.get("owned")
            assert not session.alive
            await admin.drain()
            with pytest.raises(clusterkv.UnavailableError) as error:
                async with client.session("late"):
                    pass
            assert error.value.reason == "DRAINING"

    asyncio.run(run())


def test_a_client_opens_on_its_server_whichever_shard_owns_the_name(server_program, tmp_path):
    shards = tmp_path / "shards"
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        other = f"kv-1 127.0.0.1:{free.getsockname()[1]}"
        shards.write_text(f"kv-0 127.0.0.1:1\n{other}\n")
        server = Server(server_program, flags=[f"--shards_file={shards}", "--shard_name=kv-0"])
    try:
        with clusterkv.Client(server.target) as client:
            for i in range(20):
                assert client.open(f"s{i}", prompt_tokens=3, **SHAPE).handle.name == f"s{i}"
            with pytest.raises(clusterkv.ClusterKVError) as caught:
                for i in range(20):
                    client.get(f"nowhere{i}")
            while caught.value.reason == "SEQUENCE_NOT_FOUND":  # one of its own
                i += 1
                with pytest.raises(clusterkv.ClusterKVError) as caught:
                    client.get(f"nowhere{i}")
            assert caught.value.reason == "NOT_OWNER"
            assert isinstance(caught.value, clusterkv.NotFoundError)
            client.release(f"nowhere{i}")
            assert caught.value.metadata["ownerShard"] == "kv-1"

        async def opened():
            async with aio.Client(server.target) as client:
                return [await client.open(f"a{i}", prompt_tokens=3, **SHAPE) for i in range(20)]

        assert len(asyncio.run(opened())) == 20
    finally:
        assert server.stop() == 0
