#!/usr/bin/env python3
"""Makes the messages that ghz sends.

Usage: messages.py select OUT SEQUENCES < query.json      from `ckv seed --print_query`
       messages.py put OUT NAME TOKENS KV_HEADS HEAD_DIM [SHARD…]
select writes OUT/select.json, which asks one of SEQUENCES sequences at random, and OUT/select.bin,
the same request for the first one as protobuf. put writes the three steps of a prompt of one layer:
OUT/open.json, OUT/put_kv.json (a client stream of two chunks) and OUT/release.json; request i is
sequence NAME-i. SHARD…: the shards that are not meant, where the server knows of several.
"""

import base64
import json
import pathlib
import random
import struct
import sys


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, payload):
    """One field of protobuf's wire format: bytes are length-delimited, an int is a varint."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def select_request(query):
    """clusterkv.v1.SelectClustersRequest, its queries packed as FLOAT32."""
    values = query["queries"]["values"]
    vector = field(1, struct.pack(f"<{len(values)}f", *values))
    return (field(2, query["sequence"].encode()) + field(3, query["layer"]) + field(4, vector) +
            field(6, int(query["want_state"])))


def write_select(out, sequences):
    query = json.load(sys.stdin)
    (out / "select.bin").write_bytes(select_request(query))
    prefix = query["sequence"].removesuffix("-0")
    query["sequence"] = f"{prefix}-{{{{randomInt 0 {sequences}}}}}"
    (out / "select.json").write_text(json.dumps(query))


def bfloat16_rows(count):
    """`count` nearly normal numbers, the same ones on every run."""
    numbers = random.Random(1)
    return b"".join(struct.pack("<f", numbers.gauss(0, 1))[2:] for _ in range(count))


def write_put(out, name, tokens, kv_heads, head_dim, others):
    sequence = {"name": name + "-{{.RequestNumber}}"}
    shape = {"layers": 1, "kv_heads": kv_heads, "query_heads": kv_heads, "head_dim": head_dim}
    (out / "open.json").write_text(
        json.dumps({**sequence, "shape": shape, "prompt_tokens": tokens,
                    "ttl_ms": 600_000, "without_shards": others}))
    half = tokens // 2
    messages = []
    for first, count in ((0, half), (half, tokens - half)):
        rows = base64.b64encode(bfloat16_rows(count * kv_heads * head_dim)).decode()
        chunk = {"layer": 0, "first_token": first, "tokens": count, "keys": rows, "values": rows}
        messages.append({"sequence": sequence, "chunk": chunk})
    (out / "put_kv.json").write_text(json.dumps(messages))
    (out / "release.json").write_text(json.dumps({"sequence": sequence}))


def main(arguments):
    if len(arguments) == 3 and arguments[0] == "select":
        write_select(pathlib.Path(arguments[1]), int(arguments[2]))
    elif len(arguments) >= 6 and arguments[0] == "put":
        write_put(pathlib.Path(arguments[1]), arguments[2], *map(int, arguments[3:6]),
                  arguments[6:])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
