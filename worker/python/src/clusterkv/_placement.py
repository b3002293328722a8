"""Which shard a sequence belongs to: rendezvous hashing of names by XXH3-64, as the servers do it
(proto/placement.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Protocol, TypeVar

_MASK = (1 << 64) - 1
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e")
_STRIPE, _STRIPES_OF_BLOCK = 64, (len(_SECRET) - 64) // 8


def _u32(data: bytes, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def _u64(data: bytes, at: int) -> int:
    return struct.unpack_from("<Q", data, at)[0]


def _fold(a: int, b: int) -> int:
    product = a * b
    return (product & _MASK) ^ (product >> 64)


def _avalanche(h: int) -> int:
    h = (h ^ h >> 37) * 0x165667919E3779F9 & _MASK
    return h ^ h >> 32


def _xxh64_avalanche(h: int) -> int:
    h = (h ^ h >> 33) * _P64_2 & _MASK
    h = (h ^ h >> 29) * _P64_3 & _MASK
    return h ^ h >> 32


def _rotate(h: int, bits: int) -> int:
    return (h << bits | h >> 64 - bits) & _MASK


def _mix16(data: bytes, at: int, secret: int) -> int:
    return _fold(_u64(data, at) ^ _u64(_SECRET, secret), _u64(data, at + 8) ^ _u64(_SECRET, secret + 8))


def _short(data: bytes) -> int:
    n = len(data)
    if n > 8:
        low = _u64(data, 0) ^ _u64(_SECRET, 24) ^ _u64(_SECRET, 32)
        high = _u64(data, n - 8) ^ _u64(_SECRET, 40) ^ _u64(_SECRET, 48)
        swapped = int.from_bytes(low.to_bytes(8, "little"), "big")
        return _avalanche((n + swapped + high + _fold(low, high)) & _MASK)
    if n >= 4:
        h = _u32(data, n - 4) + (_u32(data, 0) << 32) ^ _u64(_SECRET, 8) ^ _u64(_SECRET, 16)
        h ^= _rotate(h, 49) ^ _rotate(h, 24)
        h = h * 0x9FB21C651E98DF25 & _MASK
        h = (h ^ (h >> 35) + n) * 0x9FB21C651E98DF25 & _MASK
        return h ^ h >> 28
    if n:
        combined = data[0] << 16 | data[n >> 1] << 24 | data[n - 1] | n << 8
        return _xxh64_avalanche(combined ^ _u32(_SECRET, 0) ^ _u32(_SECRET, 4))
    return _xxh64_avalanche(_u64(_SECRET, 56) ^ _u64(_SECRET, 64))


def _medium(data: bytes) -> int:
    n = len(data)
    h = n * _P64_1
    if n <= 128:
        for i in range((n - 1) // 32 + 1):
            h += _mix16(data, 16 * i, 32 * i) + _mix16(data, n - 16 * (i + 1), 32 * i + 16)
        return _avalanche(h & _MASK)
    for i in range(8):
        h += _mix16(data, 16 * i, 16 * i)
    h = _avalanche(h & _MASK)
    for i in range(8, n // 16):
        h += _mix16(data, 16 * i, 16 * (i - 8) + 3)
    return _avalanche(h + _mix16(data, n - 16, 136 - 17) & _MASK)


def _accumulate(lanes: list[int], data: bytes, at: int, secret: int) -> None:
    for i in range(8):
        word = _u64(data, at + 8 * i)
        key = word ^ _u64(_SECRET, secret + 8 * i)
        lanes[i ^ 1] = lanes[i ^ 1] + word & _MASK
        lanes[i] = lanes[i] + (key & 0xFFFFFFFF) * (key >> 32) & _MASK


def _long(data: bytes) -> int:
    lanes = [_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1]
    last_secret = len(_SECRET) - _STRIPE
    stripes = (len(data) - 1) // _STRIPE
    for stripe in range(stripes):
        within = stripe % _STRIPES_OF_BLOCK
        _accumulate(lanes, data, stripe * _STRIPE, within * 8)
        # Not behind the last block, whole or not.
        if within == _STRIPES_OF_BLOCK - 1 and stripe // _STRIPES_OF_BLOCK < (
                (len(data) - 1) // (_STRIPE * _STRIPES_OF_BLOCK)):
            for i in range(8):
                lane = lanes[i] ^ lanes[i] >> 47 ^ _u64(_SECRET, last_secret + 8 * i)
                lanes[i] = lane * _P32_1 & _MASK
    _accumulate(lanes, data, len(data) - _STRIPE, last_secret - 7)
    h = len(data) * _P64_1
    for i in range(0, 8, 2):
        h += _fold(lanes[i] ^ _u64(_SECRET, 11 + 8 * i), lanes[i + 1] ^ _u64(_SECRET, 19 + 8 * i))
    return _avalanche(h & _MASK)


def xxh3_64(data: bytes) -> int:
    """XXH3-64 without a seed."""
    return _short(data) if len(data) <= 16 else _medium(data) if len(data) <= 240 else _long(data)


def score(sequence: str, shard: str) -> int:
    """Of equal shards the one with the highest owns the sequence."""
    return xxh3_64(f"{sequence}\n{shard}".encode())


class Named(Protocol):
    name: str


S = TypeVar("S", bound=Named)


def rank(sequence: str, shards: Iterable[S]) -> list[S]:
    """Shards (anything with a name) in the order in which they are asked for the sequence, the owner first."""
    return sorted(shards, key=lambda shard: (-score(sequence, shard.name), shard.name))
