"""An engine's loop in Python against a real server, in host memory. Budgets cover the context, so that outputs
are full attention's."""

import re

import numpy as np
import pytest

pytest.importorskip("clusterkv._native")
import clusterkv  # noqa: E402
from clusterkv.engine import Engine  # noqa: E402

from conftest import ROOT  # noqa: E402

LAYERS, KV_HEADS, QUERY_HEADS, DIM = 2, 2, 6, 64
SHAPE = dict(layers=LAYERS, kv_heads=KV_HEADS, query_heads=QUERY_HEADS, head_dim=DIM, max_decode_tokens=64)


def rows(seed, tokens, heads, dtype="float32"):
    return np.random.default_rng(seed).standard_normal((tokens, heads, DIM)).astype(dtype)


def attention(queries, keys, values):
    """[query_heads, head_dim] over all tokens."""
    group = QUERY_HEADS // KV_HEADS
    keys, values = (np.repeat(x.astype(np.float32), group, axis=1) for x in (keys, values))
    logits = np.einsum("hd,thd->ht", queries.astype(np.float32), keys) / DIM ** 0.5
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), values)


def fill(engine, name, tokens, seed, wrap=lambda x: x, dtype="float32"):
    """An attached sequence, and its layers' K and V."""
    sequence = engine.create(name, prompt_tokens=tokens, dtype=dtype, budget=4096, **SHAPE)
    layers = []
    for layer in range(LAYERS):
        keys, values = (rows(seed + 2 * layer + i, tokens, KV_HEADS) for i in range(2))
        for begin in range(0, tokens, 100):
            engine.ingest(sequence, layer, wrap(keys[begin:begin + 100]), wrap(values[begin:begin + 100]),
                          first_token=begin)
        layers.append([keys, values])
    engine.seal(sequence)
    return engine.attach(sequence), layers


def decode(engine, sequences, layers, steps, seed, wrap=lambda x: x):
    """The largest difference to full attention; `layers` grow by what is appended."""
    largest = 0.0
    for step in range(steps):
        for layer in range(LAYERS):
            keys, values = (rows(seed + 50 * step + 2 * layer + i, len(sequences), KV_HEADS) for i in range(2))
            queries = rows(seed + 50 * step + 20 + layer, len(sequences), QUERY_HEADS)
            engine.append(layer, sequences, wrap(keys), wrap(values))
            output = np.asarray(engine.step(layer, sequences, wrap(queries)))
            for i, mine in enumerate(layers):
                mine[layer] = [np.concatenate([old, new[i:i + 1]])
                               for old, new in zip(mine[layer], (keys, values))]
                largest = max(largest, np.abs(output[i] - attention(queries[i], *mine[layer])).max())
    return largest


def test_outputs_are_full_attentions(server):
    with Engine(server.target) as engine:
        sequence, layers = fill(engine, "one", 300, seed=1)
        assert sequence.link == "grpc" and sequence.proto.tokens == 300
        assert decode(engine, [sequence], [layers], steps=5, seed=100) < 2e-3
        engine.release(sequence)


def test_a_batch_of_unequal_lengths(server):
    with Engine(server.target, hot_tokens=64) as engine:
        filled = [fill(engine, f"batch-{n}", n, seed=n) for n in (40, 333, 120)]
        assert decode(engine, *map(list, zip(*filled)), steps=3, seed=7) < 2e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensors_of_16_bits_with_strides(server, dtype):
    torch = pytest.importorskip("torch")

    def wrap(array):  # [rows, heads, dim] that lies as [heads, rows, dim], as attention layers have it
        tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(1, 0, 2)))
        return tensor.to(getattr(torch, dtype)).transpose(0, 1)

    with Engine(server.target, output_type=dtype) as engine:
        sequence, layers = fill(engine, dtype, 150, seed=3, wrap=wrap, dtype=dtype)
        out = torch.zeros(1, QUERY_HEADS, DIM, dtype=getattr(torch, dtype))
        queries = rows(9, 1, QUERY_HEADS)
        assert engine.step(0, [sequence], wrap(queries).contiguous(), out) is out
        assert np.abs(out.float().numpy()[0] - attention(queries[0], *layers[0])).max() < 3e-2


def test_another_engine_attaches_by_name(server):
    with Engine(server.target) as prefill, Engine(server.target) as engine:
        sequence, layers = fill(prefill, "shared", 200, seed=4)
        prefill.close_sequence(sequence)
        with pytest.raises(ValueError, match="sequence: it is closed"):
            prefill.step(0, [sequence], rows(1, 1, QUERY_HEADS))
        again = engine.attach("shared")
        assert decode(engine, [again], [layers], steps=2, seed=30) < 2e-3
        engine.release(again)
        with pytest.raises(clusterkv.NotFoundError):
            engine.attach("shared")


def test_what_does_not_fit_is_told_by_name(server):
    with Engine(server.target) as engine:
        sequence, _ = fill(engine, "refused", 40, seed=5)
        good = rows(1, 1, QUERY_HEADS)
        with pytest.raises(ValueError, match=r"queries: expected \[1, 6, 64\] of float32 on cpu, got \[1, 5, 64\]"):
            engine.step(0, [sequence], good[:, :5])
        with pytest.raises(ValueError, match="queries: .*got .* of float16 on cpu"):
            engine.step(0, [sequence], good.astype(np.float16))
        with pytest.raises(ValueError, match="queries: expected the last 2 axes to be dense"):
            engine.step(0, [sequence], rows(1, 1, 2 * QUERY_HEADS)[:, ::2])
        with pytest.raises(ValueError, match="keys: expected .1, 2, 64. of float32"):
            engine.append(0, [sequence], rows(1, 2, KV_HEADS), rows(2, 2, KV_HEADS))
        with pytest.raises(ValueError, match="values: expected the strides of keys"):
            wide = rows(2, 1, 2 * KV_HEADS)[:, ::2]
            engine.append(0, [sequence], rows(1, 1, KV_HEADS), wide)
        with pytest.raises(ValueError, match="sequences: expected at least one"):
            engine.step(0, [], good[:0])
        other = engine.create("refused-too", prompt_tokens=40, dtype="float32", **{**SHAPE, "query_heads": 8})
        with pytest.raises(ValueError, match="sequences: expected the same heads"):
            engine.step(0, [sequence, other], rows(1, 2, QUERY_HEADS))
        engine.release(other)
        read_only = np.empty((1, QUERY_HEADS, DIM), np.float32)
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match="out: it is read-only"):
            engine.step(0, [sequence], good, read_only)
        with pytest.raises(clusterkv.InvalidRequestError, match="layer"):
            engine.step(LAYERS, [sequence], good)
        with pytest.raises(clusterkv.UnavailableError):  # host memory
            engine.join([sequence])
        assert np.isfinite(engine.step(0, [sequence], good)).all()  # nothing else is lost
    with pytest.raises(ValueError, match="engine: it is closed"):
        engine.step(0, [sequence], good)
    with pytest.raises(ValueError, match="links: expected peer, nccl or grpc"):
        Engine(server.target, links="pear,grpc")
    with pytest.raises(ValueError, match="output_type"):
        Engine(server.target, output_type="int8")


def test_a_lost_server_is_a_typed_error(server):
    with Engine(server.target, timeout=3) as engine:
        sequence, _ = fill(engine, "lost", 40, seed=6)
        server.kill()
        with pytest.raises((clusterkv.UnavailableError, clusterkv.DeadlineError)):
            engine.step(0, [sequence], rows(1, 1, QUERY_HEADS))


def test_the_readmes_loop(server):
    code, = re.findall(r"```python\n(from clusterkv.engine .*?)```", (ROOT / "worker/python/README.md").read_text(),
                       re.DOTALL)
    code = code.replace("localhost:7400", server.target).replace("cuda:0", "cpu").replace("peer,grpc", "grpc")
    prompt = [[rows(layer + i, 80, KV_HEADS, "float16") for i in range(2)] for layer in range(LAYERS)]
    model = [lambda i=i: (rows(i, 1, KV_HEADS, "float16"), rows(i, 1, KV_HEADS, "float16"),
                          rows(i, 1, QUERY_HEADS, "float16")) for i in range(LAYERS)]
    names = {"tokens": 80, "prompt": prompt, "model": model, "outputs": []}
    exec(code, names)
    assert len(names["outputs"]) == 4 * LAYERS and names["outputs"][0].shape == (1, QUERY_HEADS, DIM)
