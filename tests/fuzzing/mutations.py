"""Damages of files and values, as disks, networks, other programs and hostile hands make them."""

import copy
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

# Numbers at the ends of what fields of files hold, and sizes at which decoders change what they do.
NUMBERS = (
    *(0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF),
    *(16383, 30000, 65500, 100000),
)
# Values that a field of a JSON, YAML or of Python is given instead of its own.
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 255, 256, 65536, 10**6, 10**9, 10**30, -(10**9), 2**63, 2**64),
    *(0.0, -0.0, 0.5, -0.5, 1e-30, 1e300, float("nan"), float("inf"), -float("inf")),
    *(True, False, None, "", "a", " ", "../x", "float32", "none", "auto", "1", "nan", "\0", "\u2028", "\udce9", "<b>&"),
    *([], [1], [0.5, 0.5], [0.5] * 4, [[]], [[[[]]]], {}, {"a": 1}, {"0": "x"}, {"": None}, "x" * 700, ["x"] * 6),
)
TEXTS = (
    *("", "nan", "-1", "1e999", "9" * 30, "0", "\0", "&x;", "<a>", "é", "☃", ",", '"', "'", "../..", "\n", "\t"),
    *("[" * 500, "{", "#", "%", "\x1b[2J"),
)


def damaged_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = (b"",)) -> tuple[str, bytes]:
    """Damage the contents of a file once or several times; return what was done, and the result.

    Args:
        others: Contents of other files, pieces of which may be put in.
    """
    how = rng.choice([*_BYTES, "several"])
    if how == "several":
        done = []
        for _ in range(rng.randint(2, 4)):
            how = rng.choice([each for each in _BYTES if each != "cut"])
            data = bytes(_BYTES[how](rng, bytearray(data), others)) if data else data
            done.append(how)
        return "+".join(done), data
    return how, bytes(_BYTES[how](rng, bytearray(data), others)) if data else data


def _flip(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _head(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    for _ in range(rng.choice([1, 2, 4])):
        data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    return data


def _cut(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    return data[: rng.randrange(len(data))]


def _zeros(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + bytes(len(data) - start)


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    other = rng.choice(others)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other) + 1) :]


def _drop(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 2, 4, 16, 100, 1000]) :]


def _repeat(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice([1, 4, 16, 300])]
    return data[:start] + piece * rng.choice([1, 2, 50]) + data[start:]


def _insert(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.choice([1, 3, 50, 5000])) + data[start:]


def _number(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    width = rng.choice([1, 2, 4, 8])
    start = rng.randrange(min(len(data), rng.choice([64, 400, len(data)])))
    value = rng.choice(NUMBERS) & (256**width - 1)
    data[start : start + width] = value.to_bytes(width, rng.choice(["big", "little"]))
    return data


def _swap(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> bytearray:
    first, second = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    length = rng.choice([2, 8, 60])
    data[first : first + length], data[second : second + length] = (
        data[second : second + length],
        data[first : first + length],
    )
    return data


_BYTES = {
    "flip": _flip,
    "head": _head,
    "cut": _cut,
    "zeros": _zeros,
    "splice": _splice,
    "drop": _drop,
    "repeat": _repeat,
    "insert": _insert,
    "number": _number,
    "swap": _swap,
}


def damaged_png(rng: random.Random, data: bytes) -> bytes:
    """Change the chunks of a PNG file, and give them the right checksums, so that what they say is believed."""
    position, chunks = 8, []
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], bytearray(data[position + 8 : position + 8 + length])))
        position += 12 + length
    place = rng.randrange(len(chunks))
    name, body = chunks[place]
    how = rng.choice(["body", "body", "name", "drop", "double", "shuffle"])
    if how == "body":
        for _ in range(rng.choice([1, 3]) if body else 0):
            body[rng.randrange(min(len(body), 30))] = rng.randrange(256)
    elif how == "name":
        names = (b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"pHYs")
        chunks[place] = (rng.choice(names), body)
    elif how == "drop":
        del chunks[place]
    elif how == "double":
        chunks.insert(rng.randrange(len(chunks)), (name, body))
    else:
        rng.shuffle(chunks)
    return data[:8] + b"".join(png_chunk(name, bytes(body)) for name, body in chunks)


def png_chunk(name: bytes, body: bytes) -> bytes:
    """Write a chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def damaged_value(rng: random.Random, value: Any, names: Sequence[str] = ("a",)) -> Any:
    """Change, add or take away one entry at any depth of a JSON value.

    Args:
        names: Of entries that may be added.
    """
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (dict, list)):
            keys = list(each) if isinstance(each, dict) else range(len(each))
            places += [(each, key) for key in keys]
            waiting += [each[key] for key in keys]
    if not places:
        return rng.choice(VALUES)
    inside, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del inside[key]
    elif how < 0.25 and isinstance(inside, dict):
        inside[rng.choice(names)] = rng.choice(VALUES)
    elif how < 0.3 and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[key]))
    elif how < 0.4 and isinstance(inside[key], (int, float)):
        inside[key] = rng.choice([-inside[key], inside[key] + 1, inside[key] * 1000, str(inside[key])])
    else:
        inside[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def damaged_json(rng: random.Random, text: str, names: Sequence[str] = ("a",)) -> str:
    """Damage JSON as a value mostly, else as a text."""
    if rng.random() < 0.85:
        return json.dumps(damaged_value(rng, json.loads(text), names))
    return damaged_text(rng, text)


def damaged_text(rng: random.Random, text: str) -> str:
    """Put a piece of text somewhere, in place of a few characters, or change the order of lines."""
    if rng.random() < 0.1:
        lines = text.split("\n")
        rng.shuffle(lines)
        return "\n".join(lines)
    start = rng.randrange(len(text) + 1)
    return text[:start] + rng.choice(TEXTS) + text[start + rng.randrange(8) :]


def damaged_yaml(rng: random.Random, text: str) -> str:
    """Damage one line of a YAML file: its value, its depth, or what YAML alone can say."""
    if rng.random() < 0.2:
        return damaged_text(rng, text)
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    name = lines[place].partition(":")[0]
    special = (
        f"{name}: &a [*a]",
        f"{name}: !!int x",
        f"{name}: !!timestamp 2001-99-99",
        f"{name}: !!python/name:os.system",
    )
    value = rng.choice(VALUES)
    number = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(str(value), json.dumps(value))
    lines[place] = rng.choice(
        [f"{name}: {number}"] * 6
        + [lines[place] + "\n" + lines[place], "  " + lines[place], "? " + lines[place], *special, ""]
    )
    return "\n".join(lines)


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change what the header of a `.safetensors` file says, and let its length fit."""
    length = int.from_bytes(data[:8], "little")
    header = damaged_json(rng, data[8 : 8 + length].decode(), ("__metadata__", "encoder.norm.weight")).encode(
        "utf-8", "surrogatepass"
    )
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damaged_archive(rng: random.Random, data: bytes) -> bytes:
    """Change an entry of a ZIP archive, such as the pickle in a checkpoint, or leave one out, with right checksums."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        entries = [(each.filename, old.read(each)) for each in old.infolist()]
        pickles = [each for each in entries if each[0].endswith("data.pkl")]
        chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else entries)
        how = rng.choice(["bytes", "bytes", "bytes", "drop", "name", "double"])
        for entry in entries:
            name, content = entry
            if entry is chosen and how == "bytes":
                content = damaged_bytes(rng, content)[1]
            elif entry is chosen and how == "drop":
                continue
            elif entry is chosen and how == "name":
                name = rng.choice(["../x", "archive/data/999", "archive/byteorder", "x" * 300])
            new.writestr(name, content)
        if how == "double":
            new.writestr(f"{chosen[0]}.1", chosen[1])
    return result.getvalue()
