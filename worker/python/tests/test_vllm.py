"""vLLM's calls in the engine's order, against a real server: a prefill engine that stores prompts in chunks,
a decode engine that finds, attaches and decodes, beside requests of its own. With vLLM installed its own
base classes are underneath, else those of vllm_interface.py."""

import inspect
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("clusterkv._native")
import vllm_interface  # noqa: E402

vllm_interface.install()
import clusterkv.vllm  # noqa: E402
from clusterkv.vllm import backend, connector, prompts  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole  # noqa: E402

from test_shards import held, owner  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM, BLOCK, PROMPT = 3, 4, 2, 32, 16, 300
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]


class Engine:
    """One vLLM engine as the connector sees it: a scheduler, a worker, pages, and a model whose q, k, v of a
    token are drawn from its id and position."""

    def __init__(self, server, blocks=64, **extra):
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={
                "server": server.target, "budget": 4096, "min_tokens": 64, "dense_layers": 1,
                "timeout": 5.0, **extra}, is_kv_producer=True),
            cache_config=SimpleNamespace(block_size=BLOCK, enable_prefix_caching=False),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, rank=0),
            model_config=SimpleNamespace(
                model="tiny", dtype=torch.float32, get_num_layers=lambda p: LAYERS,
                get_num_kv_heads=lambda p: KV_HEADS, get_num_attention_heads=lambda p: HEADS,
                get_head_size=lambda: DIM))
        self.scheduler = connector.ClusterKVConnector(config, KVConnectorRole.SCHEDULER, None)
        self.worker = connector.ClusterKVConnector(config, KVConnectorRole.WORKER, None)
        self.pages = {name: torch.full((blocks, KV_HEADS, BLOCK, 2 * DIM), torch.nan) for name in NAMES}
        self.worker.register_kv_caches(self.pages)
        self.impls = {name: backend.ClusterKVImpl(HEADS, DIM, DIM ** -0.5, KV_HEADS) for name in NAMES}
        self.builder = backend.ClusterKVMetadataBuilder(None, NAMES, config, torch.device("cpu"))
        self.free = list(range(blocks))
        self.requests = {}

    def add(self, request_id, tokens):
        """A waiting request is scheduled for the first time: lookup, pages. False: ask again later."""
        request = SimpleNamespace(request_id=request_id, prompt_token_ids=tokens, mm_features=[],
                                  cache_salt=None, lora_request=None, computed=0, blocks=[], tokens=tokens,
                                  is_new=True)
        external, later = self.scheduler.get_num_new_matched_tokens(request, 0)
        assert later is False
        if external is None:
            return None
        request.computed = external
        request.blocks = [self.free.pop() for _ in range(-(-(len(tokens) + 32) // BLOCK))]
        self.scheduler.update_state_after_alloc(request, None, external)
        self.requests[request_id] = request
        return request

    def step(self, counts):
        """One engine step: {request id: tokens} -> {request id: outputs per layer [tokens, HEADS, DIM]}."""
        rows = [self.requests[name] for name in counts]
        new = [r for r in rows if r.is_new]
        old = [r for r in rows if not r.is_new]
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=r.request_id, block_ids=(r.blocks,),
                                                num_computed_tokens=r.computed) for r in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[r.request_id for r in old], resumed_req_ids=set(), new_block_ids=[None] * len(old),
                num_computed_tokens=[r.computed for r in old]),
            num_scheduled_tokens=counts, preempted_req_ids=None)
        meta = self.scheduler.build_connector_meta(output)
        self.worker.bind_connector_metadata(meta)
        common = self.common(rows, counts)
        attention = self.builder.build(0, common)
        self.worker.start_load_kv(SimpleNamespace())
        outputs = {name: [] for name in counts}
        for layer, name in enumerate(NAMES):
            self.worker.wait_for_layer_load(name)
            qkv = [torch.cat([projected(r.tokens, layer)[i][r.computed:r.computed + counts[r.request_id]]
                              for r in rows]) for i in range(3)]
            out = torch.full_like(qkv[0], torch.nan)
            self.impls[name].forward(SimpleNamespace(layer_name=name), *qkv, self.pages[name], attention, out)
            self.worker.save_kv_layer(name, self.pages[name], attention)
            for r, begin, end in zip(rows, attention.starts, attention.starts[1:]):
                outputs[r.request_id].append(out[begin:end])
        self.worker.wait_for_save()
        invalid = self.worker.get_block_ids_with_load_errors()
        self.worker.get_finished(set())
        self.worker.clear_connector_metadata()
        self.scheduler.update_connector_output(SimpleNamespace(invalid_block_ids=invalid))
        for r in rows:
            r.is_new = False
            r.computed += counts[r.request_id]
            if invalid & set(r.blocks):  # policy "recompute"
                r.computed = 0
        return outputs, invalid

    def common(self, rows, counts):
        lengths = [counts[r.request_id] for r in rows]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        slots = [r.blocks[t // BLOCK] * BLOCK + t % BLOCK for r in rows
                 for t in range(r.computed, r.computed + counts[r.request_id])]
        table = torch.zeros(len(rows), max(len(r.blocks) for r in rows), dtype=torch.int32)
        for i, r in enumerate(rows):
            table[i, :len(r.blocks)] = torch.tensor(r.blocks)
        return SimpleNamespace(num_reqs=len(rows), num_actual_tokens=sum(lengths), query_start_loc_cpu=starts,
                               seq_lens=torch.tensor([r.computed + n for r, n in zip(rows, lengths)]),
                               block_table_tensor=table, slot_mapping=torch.tensor(slots))

    def finish(self, request_id):
        request = self.requests.pop(request_id)
        self.free += request.blocks
        delay, parameters = self.scheduler.request_finished(request, request.blocks)
        assert delay is False
        self.worker.get_finished({request_id})
        return parameters

    def shutdown(self):
        self.worker.shutdown()
        self.scheduler.shutdown()


def projected(tokens, layer):
    """q [tokens, HEADS, DIM], k, v [tokens, KV_HEADS, DIM] of a layer."""
    rows = []
    for position, token in enumerate(tokens):
        generator = torch.Generator().manual_seed(1000003 * layer + 1009 * token + position)
        rows.append(torch.randn(HEADS + 2 * KV_HEADS, DIM, generator=generator))
    return torch.stack(rows).split([HEADS, KV_HEADS, KV_HEADS], 1)


def expected(tokens, layer, begin, end):
    """Full causal attention of tokens [begin, end)."""
    q, k, v = (t[:end].transpose(0, 1) for t in projected(tokens, layer))
    return torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0].transpose(0, 1)[begin:]


def check(outputs, tokens, begin, end):
    for layer, out in enumerate(outputs):
        torch.testing.assert_close(out, expected(tokens, layer, begin, end), rtol=2e-3, atol=2e-3)


@pytest.fixture
def tokens():
    return torch.randint(0, 500, (PROMPT + 40,), generator=torch.Generator().manual_seed(3)).tolist()


def store(server, prompt):
    """A prefill engine computes a prompt in two chunks, stores it and is gone."""
    engine = Engine(server)
    assert engine.add("p", prompt).computed == 0
    for count in (170, len(prompt) - 170):
        begin = engine.requests["p"].computed
        outputs, invalid = engine.step({"p": count})
        assert not invalid
        check(outputs["p"], prompt, begin, begin + count)
    parameters = engine.finish("p")
    engine.shutdown()
    assert engine.worker._worker.counters == {"stored": 1, "store_failures": 0, "attached": 0,
                                              "load_failures": 0}
    return parameters


def test_a_prompt_computed_by_one_engine_is_decoded_by_another(server, tokens):
    prompt = tokens[:PROMPT]
    assert store(server, prompt)["prompt_tokens"] == PROMPT - 1
    engine = Engine(server)
    request = engine.add("d", prompt)
    assert request.computed == PROMPT - 1      # all but the token whose query is the first to select
    request.tokens = tokens
    own = torch.randint(0, 500, (90,), generator=torch.Generator().manual_seed(9)).tolist()
    assert engine.add("own", own).computed == 0
    outputs, invalid = engine.step({"d": 1, "own": 50})      # in one batch with a request of its own
    assert not invalid
    check(outputs["d"], tokens, PROMPT - 1, PROMPT)
    check(outputs["own"], own, 0, 50)
    for begin in range(PROMPT, PROMPT + 8):
        outputs, invalid = engine.step({"d": 1})
        assert not invalid
        check(outputs["d"], tokens, begin, begin + 1)
    assert engine.worker._worker.counters["attached"] == 1
    # The pages of the sparse layers hold nothing of the prompt; those of the dense layer all of it.
    page = request.blocks[0]
    assert engine.pages[NAMES[2]][page].isnan().all() and not engine.pages[NAMES[0]][page].isnan().any()
    engine.finish("d")
    assert not engine.worker._worker._decoders
    engine.shutdown()


def test_a_longer_prompt_attends_to_its_stored_prefix(server, tokens):
    store(server, tokens[:PROMPT])
    engine = Engine(server)
    assert engine.add("longer", tokens).computed == PROMPT - 1
    rest = len(tokens) - PROMPT + 1
    outputs, invalid = engine.step({"longer": rest})
    assert not invalid
    check(outputs["longer"], tokens, PROMPT - 1, len(tokens))
    other = [tokens[0] + 1, *tokens[1:]]
    assert engine.add("other", other).computed == 0
    engine.shutdown()


def test_a_prompt_is_stored_on_its_shard_and_found_when_another_is_away(shards, tokens):
    prompt = tokens[:PROMPT]
    store(shards, prompt)
    name, = set().union(*held(shards))
    assert name in held(shards)[owner(name)]
    shards.servers[(owner(name) + 1) % 3].kill()
    engine = Engine(shards)
    engine.add("d", prompt).tokens = tokens
    for begin in range(PROMPT - 1, PROMPT + 3):
        outputs, invalid = engine.step({"d": 1})
        assert not invalid
        check(outputs["d"], tokens, begin, begin + 1)
    engine.shutdown()


def test_a_prompt_that_is_being_stored_is_asked_for_again_later(server, tokens):
    prefill, decode = Engine(server), Engine(server, wait_s=0.6)
    prefill.add("p", tokens[:PROMPT])
    prefill.step({"p": 170})
    assert decode.add("d", tokens[:PROMPT]) is None
    time.sleep(0.7)
    assert decode.add("d", tokens[:PROMPT]).computed == 0     # long enough: computes it itself
    prefill.shutdown()
    decode.shutdown()


def test_a_lost_server_is_a_load_failure_and_the_request_is_recomputed(server, tokens):
    store(server, tokens[:PROMPT])
    engine = Engine(server)
    request = engine.add("d", tokens[:PROMPT])
    request.tokens = tokens
    outputs, invalid = engine.step({"d": 1})
    assert not invalid
    server.kill()
    outputs, invalid = engine.step({"d": 1})
    assert invalid and invalid <= set(request.blocks) and request.computed == 0
    outputs, invalid = engine.step({"d": PROMPT + 1})         # dense, from the start
    assert not invalid
    check(outputs["d"], tokens, 0, PROMPT + 1)
    engine.shutdown()


def test_a_failed_store_does_not_end_the_engine(server, tokens):
    engine = Engine(server)
    engine.add("p", tokens[:PROMPT])
    server.kill()
    outputs, invalid = engine.step({"p": PROMPT})
    assert not invalid and engine.worker._worker.counters["store_failures"] >= 1
    check(outputs["p"], tokens[:PROMPT], 0, PROMPT)
    engine.shutdown()


def test_prompts_are_named_by_their_tokens_alone():
    hashes = prompts.prefix_hashes([1, 2, 3, 70000], [2, 4], salt="s")
    assert hashes == {2: "ae85ec76736a2d4ff4ea4cb58b5c105d", 4: "d1617bd3b5f5698af0466037a741d653"}
    assert prompts.prefix_hashes([1, 2], [2], salt="s")[2] == hashes[2]
    assert prompts.prefix_hashes([1, 2], [2], salt="t")[2] != hashes[2]


def test_engines_with_prefix_caching_are_refused(server):
    with pytest.raises(ValueError, match="enable_prefix_caching"):
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={"server": server.target}),
            cache_config=SimpleNamespace(block_size=BLOCK, enable_prefix_caching=True))
        connector.ClusterKVConnector(config, KVConnectorRole.SCHEDULER, None)


@pytest.mark.skipif(not vllm_interface.real(), reason="vLLM is not installed")
def test_the_installed_vllm_has_the_hooks_with_these_parameters():
    from vllm.v1.attention import backend as real_backend

    for ours, base in ((connector.ClusterKVConnector, KVConnectorBase_V1),
                       (backend.ClusterKVBackend, real_backend.AttentionBackend),
                       (backend.ClusterKVImpl, real_backend.AttentionImpl),
                       (backend.ClusterKVMetadataBuilder, real_backend.AttentionMetadataBuilder)):
        assert not inspect.isabstract(ours)
        for name, method in inspect.getmembers(ours, inspect.isroutine):
            theirs = getattr(base, name, None)
            if name.startswith("_") and name != "__init__" or theirs is None or theirs is method:
                continue
            assert list(inspect.signature(method).parameters) == list(
                inspect.signature(theirs).parameters), name


@pytest.mark.skipif(not vllm_interface.real(), reason="vLLM is not installed")
def test_the_custom_slot_of_the_installed_vllm_takes_the_backend():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    clusterkv.vllm.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is backend.ClusterKVBackend
    assert backend.ClusterKVBackend.validate_configuration(
        head_size=DIM, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=BLOCK, use_mla=False,
        has_sink=False, use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False,
        device_capability=None, attn_type="decoder", use_kv_connector=True) == []
