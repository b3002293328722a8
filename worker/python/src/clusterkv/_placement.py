"""Which shard a sequence belongs to: rendezvous hashing of names by XXH3-64, as the servers do it
(proto/placement.h)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

import xxhash


class Named(Protocol):
    name: str


S = TypeVar("S", bound=Named)


def score(sequence: str, shard: str) -> int:
    """Of equal shards the one with the highest owns the sequence."""
    return xxhash.xxh3_64_intdigest(f"{sequence}\n{shard}".encode())


def rank(sequence: str, shards: Iterable[S]) -> list[S]:
    """Shards (anything with a name) in the order in which they are asked for the sequence, the owner first."""
    return sorted(shards, key=lambda shard: (-score(sequence, shard.name), shard.name))
