#!/usr/bin/env python3
"""Attacks on a server by raw sockets, and what must be true during and after each of them.

Usage: attack_test.py SERVER CKV     (the programs clusterkv-server and ckv)
During every attack an honest client is answered, except where the attack fills the connection limit:
there it is refused at once. Afterwards it is answered, and the server ends cleanly. No TLS stands in
the way here, so this is the worst case: in production a NetworkPolicy keeps strangers out.
"""

import contextlib
import pathlib
import re
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

SERVER, CKV = None, None
MAX_CONNECTIONS = 64
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
ANSWER_SECONDS = 5


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name_index, value):
    """An HPACK literal whose name is in the static table."""
    return bytes([0x40 | name_index, len(value)]) + value


def request_headers(path=b"/clusterkv.v1.CacheService/GetServerInfo"):
    te = b"\x40\x02te\x08trailers"
    return (b"\x83\x86" + literal(4, path) + literal(1, b"localhost") +
            literal(31, b"application/grpc") + te)


class ServerTest(unittest.TestCase):
    """A server of its own for every test."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.log = (pathlib.Path(folder.name) / "log").open("w+")
        self.addCleanup(self.log.close)
        self.process = subprocess.Popen(
            [SERVER, "--listen=127.0.0.1:0", "--admin_listen=127.0.0.1:0", "--arena_bytes=16MiB",
             f"--max_connections={MAX_CONNECTIONS}"],
            stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.addCleanup(self.process.stdout.close)
        self.addCleanup(self.process.kill)
        line = self.process.stdout.readline()
        self.port = int(re.match(r"listening on 127\.0\.0\.1:(\d+)", line)[1])
        self.assertEqual(self.ask(), 0)
        self.resident = self.resident_bytes()

    def tearDown(self):
        self.assertEqual(self.ask(), 0, "not answered after the attack")
        self.assertIsNone(self.process.poll(), "the server died")
        self.assertLess(self.resident_bytes() - self.resident, 512 << 20)
        self.process.terminate()
        self.assertEqual(self.process.wait(timeout=60), 0)

    def resident_bytes(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10

    def ask(self):
        """An honest client's exit status: 0 answered, 3 refused."""
        return subprocess.run([CKV, "status", f"--server=127.0.0.1:{self.port}",
                               f"--connect_timeout={ANSWER_SECONDS}s"], capture_output=True,
                              timeout=60, check=False).returncode

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_SECONDS)

    @contextlib.contextmanager
    def connection(self):
        """An HTTP/2 connection that has said hello."""
        with self.connect() as sock:
            sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
            yield sock

    def send(self, sock, pieces):
        """Sends until the server hangs up; reads what it answers, so that it is never held up.

        Returns how many pieces went out.
        """
        sent = 0
        try:
            for piece in pieces:
                sock.settimeout(ANSWER_SECONDS)
                sock.sendall(piece)
                sent += 1
                sock.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    while sock.recv(1 << 16):
                        pass
        except OSError:
            pass  # closed by the server: a fine answer
        return sent

    def is_closed(self, sock, seconds):
        sock.settimeout(seconds)
        try:
            while sock.recv(1 << 16):
                pass
            return True
        except TimeoutError:
            return False
        except OSError:
            return True


class AttackTest(ServerTest):
    def test_a_flood_of_connections_is_refused_and_forgotten(self):
        sockets = []
        for _ in range(10 * MAX_CONNECTIONS):
            with contextlib.suppress(OSError):
                sockets.append(self.connect())
        self.assertEqual(self.ask(), 3)  # refused at once, not left waiting
        for sock in sockets:
            sock.close()
        limit = time.monotonic() + 10
        while self.ask() != 0:
            self.assertLess(time.monotonic(), limit, "deaf after the flood")

    def test_half_a_handshake_is_cut(self):
        sockets = [self.connect() for _ in range(MAX_CONNECTIONS // 2)]
        for sock in sockets:
            sock.sendall(PREFACE[:10])
        self.assertEqual(self.ask(), 0)
        for sock in sockets:
            self.assertTrue(self.is_closed(sock, 20), "half a handshake lives after 20 s")
            sock.close()

    def test_garbage_instead_of_http2(self):
        for seed in range(200):
            with self.connect() as sock:
                self.send(sock, [bytes((seed * 31 + i * 7) % 256 for i in range(4096))])
        self.assertEqual(self.ask(), 0)

    def test_a_tls_hello_is_no_harm(self):
        with self.connect() as sock:
            self.send(sock, [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)])
            self.assertTrue(self.is_closed(sock, 20))

    def test_rapid_reset(self):
        with self.connection() as sock:
            streams = range(1, 40_001, 2)
            self.send(sock, (frame(HEADERS, END_HEADERS, stream, request_headers()) +
                             frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
                             for stream in streams))
            self.assertEqual(self.ask(), 0)

    def test_an_endless_header_string(self):
        with self.connection() as sock:
            # A value of 2^28 bytes is announced; 4 MiB of it come.
            begin = b"\x00\x01x\x7f" + b"\x81\xff\xff\x7f"
            self.send(sock, [frame(HEADERS, 0, 1, begin)] +
                      [frame(CONTINUATION, 0, 1, b"a" * 16_000)] * 262)
            self.assertEqual(self.ask(), 0)

    def test_empty_continuations(self):
        with self.connection() as sock:
            self.send(sock, [frame(HEADERS, 0, 1, request_headers())] +
                      [frame(CONTINUATION, 0, 1) * 100] * 500)
            self.assertEqual(self.ask(), 0)

    def test_a_flood_of_pings_is_cut(self):
        with self.connection() as sock:
            self.send(sock, [frame(PING, 0, 0, bytes(8)) * 10] * 2000)
            self.assertEqual(self.ask(), 0)
            self.assertTrue(self.is_closed(sock, 20))

    def test_a_flood_of_settings(self):
        with self.connection() as sock:
            self.send(sock, [frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 10] * 2000)
            self.assertEqual(self.ask(), 0)

    def test_calls_that_never_end(self):
        with self.connection() as sock:
            self.send(sock, (frame(HEADERS, END_HEADERS, stream,
                                   request_headers(b"/clusterkv.v1.CacheService/PutKv"))
                             for stream in range(1, 2001, 2)))
            self.assertEqual(self.ask(), 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    SERVER, CKV = sys.argv[1:3]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
