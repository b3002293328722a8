"""A real server for the tests: the program of the C++ build (CLUSTERKV_SERVER, or build/release here)."""

import os
import pathlib
import signal
import socket
import subprocess
from collections.abc import Sequence

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]

SHARED = pathlib.Path(os.environ.get("CLUSTERKV_SHARED", ROOT.parent / "shared"))
MODEL = pathlib.Path(os.environ.get("CLUSTERKV_MODEL", SHARED / "models/books-30m-32k"))
TEXT = pathlib.Path(os.environ.get("CLUSTERKV_TEXT", SHARED / "texts/moby-dick.txt"))


def model_and_text() -> tuple[pathlib.Path, pathlib.Path]:
    """A trained model and a book, or the test is skipped."""
    if not MODEL.exists() or not TEXT.exists():
        pytest.skip(f"no model at {MODEL} or no text at {TEXT}: set CLUSTERKV_MODEL, CLUSTERKV_TEXT")
    return MODEL, TEXT


def keep_port(host: str, port: int = 0) -> socket.socket:
    """A port that nobody else gets while the socket lives, but for a server that listens on it (with
    SO_REUSEADDR, as servers do)."""
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind((host, port))
    return keeper


class Server:
    """On ports of its own, which it keeps while it is killed and started anew."""

    def __init__(self, program: str, arena: str = "256MiB", flags: Sequence[str] = (), *,
                 host: str = "127.0.0.1", port: int = 0):
        self.program, self.arena, self.flags = program, arena, flags
        self.host = host
        self.keepers = keep_port(host, port), keep_port(host)
        self.port, self.admin_port = (keeper.getsockname()[1] for keeper in self.keepers)
        self.start()

    @property
    def target(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def admin_target(self) -> str:
        return f"{self.host}:{self.admin_port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.program, f"--listen={self.target}", f"--admin_listen={self.admin_target}",
             f"--arena_bytes={self.arena}", "--log_level=warning", "--drain_timeout_ms=1000", *self.flags],
            stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("listening on"):
                return
        raise RuntimeError(f"the server did not start: {self.process.wait()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def server_program() -> str:
    program = os.environ.get("CLUSTERKV_SERVER", str(ROOT / "build/release/bin/clusterkv-server"))
    if not os.path.exists(program):
        pytest.skip(f"no server at {program}: build it, or set CLUSTERKV_SERVER")
    return program


@pytest.fixture
def server(server_program):
    server = Server(server_program)
    yield server
    if server.process.poll() is None:
        assert server.stop() == 0


class Shards:
    """Servers kv-0, kv-1 … and the list by which they know each other."""

    def __init__(self, program: str, folder: pathlib.Path, count: int = 3):
        self.file = folder / "shards"
        self.file.write_text("".join(f"kv-{i} 127.0.0.1:1\n" for i in range(count)))
        # Read whenever it has changed: the addresses are known when the servers have started.
        self.servers = [Server(program, arena="64MiB", flags=[
            f"--shards_file={self.file}", f"--shard_name=kv-{i}", "--build_threads=1", "--select_threads=1",
            "--session_ttl_ms=2000"]) for i in range(count)]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("".join(f"kv-{i} {server.target}\n" for i, server in enumerate(self.servers)))
        fresh.rename(self.file)

    @property
    def target(self) -> str:
        return ",".join(server.target for server in self.servers)


@pytest.fixture
def shards(server_program, tmp_path):
    shards = Shards(server_program, tmp_path)
    yield shards
    for server in shards.servers:
        if server.process.poll() is None:
            assert server.stop() == 0
