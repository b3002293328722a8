"""Models on a GPU with their KV in a server. Skipped where PyTorch sees no GPU."""

import json
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("clusterkv._native")
import clusterkv.transformers as ckv  # noqa: E402

from conftest import ROOT, Server, model_and_text  # noqa: E402
from test_transformers import greedy, prompt, tiny  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")


@pytest.fixture
def large_server(server_program):
    server = Server(server_program, arena="2GiB")
    yield server
    assert server.stop() == 0


def copies_to_host(work, path) -> tuple[int, int]:
    """Copies from the GPU to the host while `work` runs, and their bytes, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    copies = [event["args"]["bytes"] for event in json.loads(path.read_text())["traceEvents"]
              if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]]
    return len(copies), sum(copies)


def test_tokens_equal_plain_attention_when_the_budget_covers_the_context(server):
    model, ids = tiny().cuda(), prompt().cuda()
    cache = ckv.ClusterKVCache(model.config, server=server.target, budget=4096)
    assert torch.equal(greedy(model, ids, cache=cache), greedy(model, ids))


@torch.no_grad()
def test_the_prompts_kv_crosses_to_the_host_once(server, tmp_path):
    model, ids = tiny().cuda(), prompt(tokens=900).cuda()
    model(ids[:, :8])  # what the first pass sets up is not counted
    cache = ckv.ClusterKVCache(model.config, server=server.target)
    count, copied = copies_to_host(lambda: model(ids, past_key_values=cache), tmp_path / "trace.json")
    layers, heads, dim = 2, 2, 32
    kv = layers * 900 * 2 * heads * dim * 4
    query_rms = layers * heads * dim * 4
    print(f"prefill: {count} copies to the host, {copied} bytes; K and V are {kv} bytes")
    assert kv + query_rms <= copied <= kv + query_rms + 64 * count


@torch.no_grad()
def test_planted_questions_over_32k_tokens(large_server):
    path, text = model_and_text()
    sys.path.insert(0, str(ROOT / "tests/quality"))
    import tasks

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="clusterkv", dtype=torch.bfloat16).eval().cuda()
    sequence = tasks.Builder(tokenizer, [text.read_text(encoding="utf-8")], 32768, seed=7).build("needle", 0)
    cache = ckv.ClusterKVCache(model.config, server=large_server.target, preset="default", budget=64)
    ids = torch.tensor([sequence.ids], device="cuda")
    model(ids[:, :sequence.prompt_tokens], past_key_values=cache)
    at, right = sequence.prompt_tokens, 0
    for digits in sequence.scored:
        # The question, then what the model says by itself; the next question follows its own answer.
        turn = ids[:, at:digits[0]]
        answer = []
        for _ in digits:
            logits = model(turn, past_key_values=cache).logits
            turn = logits[:, -1:].argmax(-1)
            answer.append(int(turn))
        model(turn, past_key_values=cache)
        right += answer == sequence.ids[digits[0]:digits[-1] + 1]
        at = digits[-1] + 1
    print(f"{right} of {len(sequence.scored)} planted codes; {cache.stats()}")
    assert right >= 0.9 * len(sequence.scored)
    assert cache.stats()["held_bytes"] < cache.stats()["full_bytes"] / 10
