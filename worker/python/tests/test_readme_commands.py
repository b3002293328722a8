"""What the package's README tells people to type is what there is."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1]
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)


def commands(begin: str) -> list[list[str]]:
    """The lines of the README's blocks that begin so, as words; comments left out."""
    lines = [line for block in BLOCKS for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(begin)]


def test_extras_and_defines_of_the_pip_commands_exist():
    project = (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")
    cmake = (PACKAGE / "CMakeLists.txt").read_text(encoding="utf-8")
    found = commands("pip install")
    assert len(found) == 3
    for _, _, target, *options in found:
        path, extra = re.fullmatch(r"\./([\w/]+)(?:\[(\w+)\])?", target).groups()
        assert PACKAGE.parts[-2:] == tuple(path.split("/"))
        assert extra is None or re.search(rf"^{extra} = \[", project, re.M)
        for option in options:
            name = option.removeprefix("--config-settings=cmake.define.").partition("=")[0]
            assert f"option({name} " in cmake


def test_the_control_client_is_built_without_a_compiler(tmp_path):
    for module in ("scikit_build_core", "grpc_tools", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module}")
    if not (PACKAGE.parents[1] / "proto").exists():
        pytest.skip("not in the repository")
    _, _, _, *options = commands("pip install ./worker/python --config-settings")[0]
    site, environment = tmp_path / "site", dict(os.environ, CC="/nonexistent", CXX="/nonexistent")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
                    "--no-index", "--target", str(site), str(PACKAGE), *options,
                    f"--config-settings=build-dir={tmp_path / 'build'}"], check=True,
                   env=environment)
    assert not list(site.glob("clusterkv/_native*.so"))
    code = ("import clusterkv, clusterkv.aio; from clusterkv.v1 import cache_service_pb2;"
            "print(clusterkv.Client('127.0.0.1:1').target, clusterkv.__file__)")
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=str(site))).stdout
    assert out.startswith("127.0.0.1:1 ") and str(site) in out


def test_modules_and_examples_of_the_table_exist():
    rows = re.findall(r"^\| (`.*?) \|", README, re.M)
    words = [word for row in rows for word in re.findall(r"`([^`]+)`", row)]
    assert len(words) > 8
    for word in words:
        if word.startswith("examples/"):
            assert (PACKAGE / word).exists()
            compile((PACKAGE / word).read_text(encoding="utf-8"), word, "exec")
        elif word.startswith("python -m "):
            assert importlib.util.find_spec(word.split()[2])
        elif re.fullmatch(r"clusterkv(\.\w+)*(\(.*\))?", word):
            module, _, name = word.partition("(")[0].rpartition(".")
            package = importlib.import_module(module)
            source = pathlib.Path(package.__file__).parent / name
            assert hasattr(package, name) or source.exists() or source.with_suffix(".py").exists(), word


def test_the_vllm_command_names_what_there_is():
    pytest.importorskip("torch")
    from test_vllm import connector  # with vLLM's interface, installed or not

    arguments = shlex.split(next(block for block in BLOCKS if block.startswith("vllm serve")))
    config = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert config["kv_connector_module_path"] == connector.__name__
    assert hasattr(connector, config["kv_connector"])
    connector.Options(**config["kv_connector_extra_config"])
