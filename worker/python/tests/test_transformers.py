"""Models with their KV in a real server. Budgets that cover the context make the tokens comparable with
plain attention; what small budgets cost is measured by tests/quality."""


import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("clusterkv._native")
import clusterkv  # noqa: E402
import clusterkv.transformers as ckv  # noqa: E402

from test_shards import held, owner  # noqa: E402


def tiny(**changes):
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=96, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, **changes)
    config._attn_implementation = "clusterkv"
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # sharper than a fresh model's: attention must matter
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def prompt(rows=1, tokens=200, seed=5):
    return torch.randint(2, 160, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, mask=None, cache=None, tokens=24):
    return model.generate(inputs=ids, attention_mask=torch.ones_like(ids) if mask is None else mask,
                          past_key_values=cache, do_sample=False, max_new_tokens=tokens, pad_token_id=0)


def test_tokens_equal_plain_attention_when_the_budget_covers_the_context(server):
    model, ids = tiny(), prompt()
    cache = ckv.ClusterKVCache(model.config, server=server.target, budget=4096, codec="raw")
    assert torch.equal(greedy(model, ids, cache=cache), greedy(model, ids))
    stats = cache.stats()
    assert stats["exact_tokens"] > 0 and stats["recalled_bytes"] > 0 and 0 < stats["hit_rate"] < 1
    assert stats["full_bytes"] == 223 * 2 * 2 * 32 * 4 * 2


def test_batches_with_padding_on_the_left(server):
    model, ids = tiny(), prompt(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    cache = ckv.ClusterKVCache(model.config, server=server.target, budget=4096)
    assert torch.equal(greedy(model, ids, mask, cache), greedy(model, ids, mask))


def test_a_second_turn_of_several_tokens_is_decoded_token_by_token(server):
    model, ids = tiny(), prompt()
    cache = ckv.ClusterKVCache(model.config, server=server.target, budget=4096)
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        ours = model(ids[:, 150:], past_key_values=cache).logits
        full = model(ids).logits[:, 150:]
    torch.testing.assert_close(ours, full, rtol=2e-3, atol=2e-3)


def test_reset_starts_anew(server):
    model, ids = tiny(), prompt()
    cache = ckv.ClusterKVCache(model.config, server=server.target, budget=4096)
    first = greedy(model, ids, cache=cache)
    cache.reset()
    assert torch.equal(greedy(model, ids, cache=cache), first)


def test_beam_search_and_foreign_models_are_refused_by_name(server):
    model = tiny()
    cache = ckv.ClusterKVCache(model.config, server=server.target)
    with pytest.raises(clusterkv.UnsupportedError, match="beam search|batch"):
        model.generate(inputs=prompt(), past_key_values=cache, num_beams=2, max_new_tokens=4,
                       pad_token_id=0)
    with pytest.raises(clusterkv.UnsupportedError, match="gpt2"):
        ckv.ClusterKVCache(transformers.GPT2Config(), server=server.target)
    with pytest.raises(clusterkv.UnsupportedError, match="sliding"):
        ckv.ClusterKVCache(transformers.MistralConfig(sliding_window=128), server=server.target)


def test_the_rows_of_a_batch_lie_on_the_shards_that_own_them(shards):
    model, ids = tiny(), prompt(rows=3)
    name = next(f"hf-{i}" for i in range(1000) if {owner(f"hf-{i}-1-{row}") for row in range(3)} == {0, 1, 2})
    cache = ckv.ClusterKVCache(model.config, server=shards.target, budget=4096, name=name)
    assert torch.equal(greedy(model, ids, cache=cache), greedy(model, ids))
    assert [len(names) for names in held(shards)] == [1, 1, 1]
    cache.release()
    assert [len(names) for names in held(shards)] == [0, 0, 0]


class KillAfter(transformers.StoppingCriteria):
    """Kills a server after a number of tokens."""

    def __init__(self, server, tokens):
        self.server, self.left = server, tokens

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.server.kill()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_lost_shard_is_recomputed_on_another(shards):
    model, ids = tiny(), prompt()
    plain = greedy(model, ids)
    name = next(f"hf-{i}" for i in range(1000) if owner(f"hf-{i}-1-0") == owner(f"hf-{i}-2-0") == 1)
    # A decode step waits for its server, `timeout` long, before it gives it up.
    cache = ckv.ClusterKVCache(model.config, server=shards.target, budget=4096, name=name, timeout=3)
    assert torch.equal(plain, ckv.generate(
        model, cache, inputs=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
        pad_token_id=0, on_loss="recompute", stopping_criteria=[KillAfter(shards.servers[1], 9)]))


class RestartAfter(transformers.StoppingCriteria):
    """Kills the server and starts it anew after a number of tokens, once."""

    def __init__(self, server, tokens):
        self.server, self.left = server, tokens

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.server.kill()
            self.server.start()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("on_loss", ["error", "recompute"])
def test_a_restarted_server_gives_a_typed_error_or_the_right_tokens(server, on_loss):
    model, ids = tiny(), prompt()
    plain = greedy(model, ids)
    cache = ckv.ClusterKVCache(model.config, server=server.target, budget=4096)
    arguments = dict(inputs=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
                     pad_token_id=0, on_loss=on_loss, stopping_criteria=[RestartAfter(server, 9)])
    if on_loss == "error":
        with pytest.raises((clusterkv.StaleHandleError, clusterkv.UnavailableError)):
            ckv.generate(model, cache, **arguments)
    else:
        assert torch.equal(ckv.generate(model, cache, **arguments), plain)
