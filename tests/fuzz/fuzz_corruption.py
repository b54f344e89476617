"""The corruptions of bytes, JSON and files in `fuzz_inputs.py`, and the values that it inserts."""

import copy
import gzip
import json
import random
from pathlib import Path


ODD_VALUES = [
    None,
    True,
    -1,
    0,
    2,
    2.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "7",
    "/etc/passwd",
    "../outside",
    [],
    [1, "a", None],
    {},
    {"a": {"b": 1}},
]


def corrupt_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncated, flipped, overwritten, doubled, emptied or interrupted by rubbish."""
    if not data:
        return b"\x00"
    place, other = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    rubbish = rng.choice(
        [b"\xff\xfe", b"\x00" * 50, b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\n\n", b"\xef\xbb\xbf"]
    )
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 50])):
        # headers are where structure is
        index = rng.randrange(min(len(data), 600)) if rng.random() < 0.7 else rng.randrange(len(data))
        flipped[index] ^= 1 << rng.randrange(8)
    return rng.choice(
        [
            data[:place],
            bytes(flipped),
            bytes(flipped),
            data[:place] + b"\x00" * (other - place) + data[other:],
            data[:place] + data[other:],
            data + data,
            b"",
            data[:place] + rubbish + data[place:],
            rubbish + data,
        ]
    )


def corrupt_json(value, rng: random.Random):
    """A copy with one to three values replaced, dropped or added somewhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holders = []

        def collect(node, holders=holders):
            if isinstance(node, dict | list) and node:
                holders.append(node)
                for child in node.values() if isinstance(node, dict) else node:
                    collect(child)

        collect(value)
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        kind = rng.random()
        if kind < 0.15:
            del holder[key]
        elif kind < 0.25 and isinstance(holder, dict):
            holder["unheard_of"] = rng.choice(ODD_VALUES)
        elif kind < 0.4 and isinstance(holder[key], int | float):
            holder[key] = rng.choice(
                [str(holder[key]), -holder[key], holder[key] + 0.5, [holder[key]], holder[key] * 1000 + 1]
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value if rng.random() < 0.97 else rng.choice(ODD_VALUES)


def corrupt_file(path: Path, rng: random.Random) -> None:
    """Changes one file: its JSON, its lines of JSON, or its bytes."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.65:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        index = rng.randrange(len(lines))
        lines[index] = json.dumps(corrupt_json(json.loads(lines[index]), rng))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".gz" and rng.random() < 0.5:
        path.write_bytes(gzip.compress(corrupt_bytes(gzip.decompress(data), rng)))
    elif rng.random() < 0.03:
        path.unlink()
    elif rng.random() < 0.03:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(corrupt_bytes(data, rng))
