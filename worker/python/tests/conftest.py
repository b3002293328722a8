"""A real server for the tests: the program of the C++ build (CLUSTERKV_SERVER, or build/release here)."""

import os
import pathlib
import signal
import socket
import subprocess
import time
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, program: str, arena: str = "256MiB", flags: Sequence[str] = ()):
        self.program, self.arena, self.flags = program, arena, flags
        self.port, self.admin_port = free_port(), free_port()
        self.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def admin_target(self) -> str:
        return f"127.0.0.1:{self.admin_port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.program, f"--listen={self.target}", f"--admin_listen={self.admin_target}",
             f"--arena_bytes={self.arena}", "--log_level=warning", *self.flags])
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError("the server did not start")

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
