"""The README's ten lines, as they stand there, over a text with planted facts: the model must answer the question
at its end. CLUSTERKV_CONTEXT tokens (default 8,192), CLUSTERKV_QUESTIONS times (default 1); skipped where the
model is absent."""

import os
import pathlib
import re
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("clusterkv._native")

from conftest import ROOT, Server, model_and_text  # noqa: E402

CONTEXT = int(os.environ.get("CLUSTERKV_CONTEXT", "8192"))
QUESTIONS = int(os.environ.get("CLUSTERKV_QUESTIONS", "1"))


@pytest.fixture
def large_server(server_program):
    server = Server(server_program, arena="1GiB")
    yield server
    assert server.stop() == 0


def example() -> str:
    """The first Python block of the package's README."""
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", readme, re.S).group(1)


@pytest.mark.parametrize("question", range(QUESTIONS))
def test_the_readmes_ten_lines_answer_a_planted_question(large_server, tmp_path, monkeypatch, question):
    path, text = model_and_text()
    sys.path.insert(0, str(ROOT / "tests/quality"))
    import tasks

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sequence = tasks.Builder(tokenizer, [text.read_text(encoding="utf-8")], CONTEXT, seed=21).build("needle", 0)
    digits = sequence.scored[question]
    begin = sequence.scored[question - 1][-1] + 1 if question else sequence.prompt_tokens
    asked = sequence.ids[1:sequence.prompt_tokens] + sequence.ids[begin:digits[0]]
    (tmp_path / "book.txt").write_text(tokenizer.decode(asked), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = example()
    assert len(code.strip().splitlines()) <= 11 and '"localhost:7400"' in code
    names = {"path": str(path)}
    exec(code.replace('"localhost:7400"', repr(large_server.target)), names)
    answer = names["tokenizer"].decode(names["out"][0, -32:])
    code_asked = tokenizer.decode(sequence.ids[digits[0]:digits[-1] + 1])
    print(f"{names['inputs']['input_ids'].shape[1]} tokens, asked for {code_asked}, answered {answer!r}; "
          f"{names['cache'].stats()}")
    assert answer.replace(" ", "").startswith(code_asked.replace(" ", ""))
    assert names["cache"].stats()["held_bytes"] < names["cache"].stats()["full_bytes"] / 4
