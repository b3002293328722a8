"""Prompts by their tokens: the names under which their KV lies in the service, and what is there.

A name says everything that must be equal for KV to be equal: model, element type, tensor-parallel rank,
salt, and a hash of the token ids. It does not depend on the process (no PYTHONHASHSEED).
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import time
from collections.abc import Sequence

from clusterkv.client import Client
from clusterkv.errors import ClusterKVError
from clusterkv.v1 import cache_service_pb2 as pb


def prefix_hashes(tokens: Sequence[int], lengths: Sequence[int], salt: str = "") -> dict[int, str]:
    """BLAKE2b-128 of the salt and of the first n token ids (little-endian uint32), for each n of `lengths`."""
    digest = hashlib.blake2b(salt.encode() + b"\0", digest_size=16)
    hashes, at = {}, 0
    for length in sorted(lengths):
        digest.update(struct.pack(f"<{length - at}I", *tokens[at:length]))
        hashes[length], at = digest.hexdigest(), length
    return hashes


@dataclasses.dataclass(frozen=True)
class Namespace:
    """What the KV of a prompt depends on besides its tokens."""

    model: str
    dtype: str
    ranks: int

    @property
    def prefix(self) -> str:
        """Of all names here: the model by its hash, for names are short."""
        model = hashlib.blake2b(f"{self.model}\0{self.dtype}\0{self.ranks}".encode(), digest_size=8)
        return f"vllm/{model.hexdigest()}/"

    def name(self, rank: int, tokens: int, digest: str) -> str:
        return f"{self.prefix}{rank}/{tokens}/{digest}"


class Directory:
    """Which prompts lie ready in the service, looked up by their tokens. A hint: attaching decides."""

    def __init__(self, client: Client, namespace: Namespace, refresh_s: float = 0.5):
        self.client, self.namespace, self.refresh_s = client, namespace, refresh_s
        self._states: dict[str, int] = {}
        self._lengths: set[int] = set()
        self._at = float("-inf")

    def refresh(self, *, force: bool = False) -> None:
        """Lists the server's sequences, at most every `refresh_s`. A server that is gone has none."""
        if not force and time.monotonic() - self._at < self.refresh_s:
            return
        self._at = time.monotonic()
        try:
            self._states = {sequence.handle.name: sequence.state
                            for sequence in self.client.list(self.namespace.prefix, whole=False)}
        except ClusterKVError:
            self._states = {}
        self._lengths = {int(name.split("/")[3]) for name in self._states}

    def longest(self, tokens: Sequence[int], salt: str = "") -> tuple[int, str] | None:
        """The longest stored proper prefix of the tokens and its hash: (0, "") when there is none, None when
        a longer one is being stored just now."""
        lengths = sorted((n for n in self._lengths if n < len(tokens)), reverse=True)
        hashes = prefix_hashes(tokens, lengths, salt)
        for length in lengths:
            names = [self.namespace.name(rank, length, hashes[length])
                     for rank in range(self.namespace.ranks)]
            states = [self._states.get(name) for name in names]
            if None in states:
                continue
            if all(state in (pb.SEQUENCE_STATE_READY, pb.SEQUENCE_STATE_APPENDING) for state in states):
                return length, hashes[length]
            if pb.SEQUENCE_STATE_RELEASED not in states:
                return None
        return 0, ""
