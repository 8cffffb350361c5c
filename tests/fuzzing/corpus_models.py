"""Cases of tests/corpus: model folders, and checkpoints of the published code."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save

from .cases import BASES
from .corpus_cases import Case, refused, right


def _flipped(data: bytes, place: int) -> bytes:
    result = bytearray(data)
    result[place] ^= 1
    return bytes(result)


def _with_header(data: bytes, old: bytes, new: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    assert old in header
    header = header.replace(old, new, 1)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def models() -> Iterator[Case]:
    folder = BASES / "model"
    data = (folder / "model.safetensors").read_bytes()
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    broken = {key: value.clone() for key, value in tensors.items()}
    broken[name].view(-1)[:2] = float("nan")
    weights = {
        "flipped": (_flipped(data, -1), refused("is damaged: its weights have the checksum")),
        "flipped-early": (_flipped(data, len(data) // 2), refused("is damaged: its weights have the checksum")),
        "cut": (data[:-100], refused("is no whole safetensors file")),
        "empty": (b"", refused("is no whole safetensors file")),
        "header-of-exabytes": (struct.pack("<Q", 2**60) + data[8:], refused("its header would have")),
        "header-of-brackets": (struct.pack("<Q", 9000) + b"[" * 9000, refused("its header cannot be read")),
        "renamed": (_with_header(data, name.encode(), name.encode()[:-1] + b"x"), refused("checksum")),
        "huge-shape": (
            _with_header(data, b'"shape":[', b'"shape":[1000000000000,'),
            refused("its header cannot be read"),
        ),
        "nan": (save(broken, {"format": "pt"}), refused("NaN or infinite")),
        "missing": (save({name: tensors[name]}, {"format": "pt"}), refused("missing_keys")),
        "no-checksum": (save(tensors, {"format": "pt"}), right(classes=3)),
    }
    yield Case(
        "model-sound", {}, {"kind": "model", "base": "model", "how": "load_model"}, right(classes=3, decoder="sa")
    )
    for key, (content, expected) in weights.items():
        description = {"kind": "model", "base": "model", "how": "load_model"}
        if key.startswith(("flipped", "cut")):
            description["damaged_weights"] = True
        yield Case(f"model-weights-{key}", {"model.safetensors": content}, description, expected)
    config = json.loads((folder / "config.json").read_text())
    for key, values, message in (
        ("hidden-size-of-billions", {"hidden_size": 10**9}, "must be at most"),
        ("half-a-head", {"num_attention_heads": 3}, "not divisible by num_attention_heads"),
        ("window-of-4", {"window_size": 4, "window_stride": 4}, "does not hold one patch"),
        ("stride-beyond-the-window", {"window_stride": 17}, "would skip pixels"),
        ("gap-in-ids", {"id2label": {"0": "a", "2": "b"}, "label2id": {}}, "without a gap"),
        ("escape-in-a-name", {"id2label": {"0": "a", "1": "b\x1b[2J", "2": "c"}, "label2id": {}}, "control characters"),
        ("method-as-a-setting", {"to_dict": 1}, "'to_dict' is no setting"),
        ("other-classes", {"id2label": {str(i): str(i) for i in range(5)}, "label2id": {}}, "other shapes"),
        ("nan-epsilon", {"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ("text-for-a-number", {"hidden_size": "8"}, "hidden_size"),
    ):
        content = json.dumps(config | values).encode()
        description = {"kind": "model", "base": "model", "how": "load_model"}
        yield Case(f"model-config-{key}", {"config.json": content}, description, refused(message))
    for key, content, message in (
        ("not-json", b"{", "cannot load the model"),
        ("brackets", b"[" * 5000, "is no JSON object"),
        ("not-utf8", b'{"model_type": "\xff"}', "cannot load the model"),
    ):
        yield Case(f"model-config-{key}", {"config.json": content}, description, refused(message))
    reader = {"kind": "model", "base": "model", "how": "from_pretrained"}
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for key, values, message in (
        ("no-deviation", {"image_std": [0, 1, 1]}, "image_std"),
        ("two-means", {"image_mean": [0.5, 0.5]}, "three channels"),
        ("size-of-billions", {"size": {"shortest_edge": 10**9}}, "at most 65536"),
    ):
        content = json.dumps(settings | values).encode()
        yield Case(f"model-processor-{key}", {"preprocessor_config.json": content}, reader, refused(message))
    not_utf8 = {"preprocessor_config.json": b'{"a": "\xff"}'}
    yield Case("model-processor-not-utf8", not_utf8, reader, refused("no text in UTF-8"))
    familiarity = (folder / "familiarity.safetensors").read_bytes()
    reader = reader | {"how": "familiarity"}
    yield Case("model-familiarity-sound", {}, reader, right(directions=[4, 8]))
    flipped = {"familiarity.safetensors": _flipped(familiarity, -1)}
    yield Case("model-familiarity-flipped", flipped, reader, refused("is damaged", "WeightsError"))


class _Command:
    """What a pickle that runs a program is made of."""

    def __reduce__(self):
        import os

        return os.system, ("touch hacked",)


def published() -> Iterator[Case]:
    folder = BASES / "published_sa"
    data, text = (folder / "checkpoint.pth").read_bytes(), (folder / "variant.yml").read_text()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        first = max(archive.infolist(), key=lambda entry: entry.file_size).header_offset
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    foreign = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(2)}, "n_cls": 3}, foreign)
    description = {"kind": "model", "base": "published_sa", "how": "convert"}
    yield Case("published-sound", {}, description, right(classes=3, decoder="sa"))
    for name, content, expected in (
        ("flipped", _flipped(data, first + 200), refused("is damaged: the checksum of", "WeightsError")),
        ("cut", data[:-1000], refused("damaged archive", "WeightsError")),
        ("empty", b"", refused("damaged")),
        ("compressed", packed.getvalue(), refused("is compressed", "WeightsError")),
        ("program", pickle.dumps({"model": _Command()}), refused("holds code, which is never run")),
        ("other-model", foreign.getvalue(), refused("needed the two files of one model")),
    ):
        damaged = {"damaged_weights": True} if name in ("flipped", "cut") else {}
        yield Case(f"published-{name}", {"checkpoint.pth": content}, description | damaged, expected)
    aliases = "net_kwargs: {}\na0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
    )
    for name, old, new, message in (
        ("width-of-billions", "d_model: 8", "d_model: 1000000000", "must be at most"),
        ("many-heads", "n_cls: 3\n  n_heads: 2", "n_cls: 3\n  n_heads: many", "num_attention_heads"),
        ("no-heads", "n_cls: 3\n  n_heads: 2", "n_cls: 3\n  n_heads: 0", "at least 1"),
        ("twice", "patch_size: 8", "patch_size: 8\n  patch_size: 8", "stands there more than once"),
        ("date", "backbone: unnamed", "backbone: !!timestamp 2001-99-99", "is not YAML of plain values"),
        ("name-of-python", "backbone: unnamed", "backbone: !!python/name:os.system", "is not YAML of plain values"),
        ("brackets", "backbone: unnamed", f"backbone: {'[' * 500}", "is not YAML of plain values"),
        ("aliases", text, aliases, "more than 10000 values"),
        ("nothing", text, "", 'has no "net_kwargs"'),
    ):
        assert old in text, old
        content = text.replace(old, new, 1).encode()
        yield Case(f"published-variant-{name}", {"variant.yml": content}, description, refused(message))
    nowhere = description | {"without": ["variant.yml"]}
    yield Case("published-variant-missing", {}, nowhere, refused("variant.yml", "FileNotFoundError"))
