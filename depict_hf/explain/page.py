"""An explanation as one HTML file: numbers of all patches packed into it, and a template that draws them."""

import base64
import hashlib
import html
import io
import json
import zlib
from importlib.resources import files

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from ..analysis import Recording, attention
from ..labels import colors_for
from ..modeling_depict import DepictForSemanticSegmentation
from .explanation import Explanation
from .layout import Layout
from .readings import head_maps

MOST_BYTES = 2_900_000  # Of the data in the page; template, style and script have 50,000 more.
LONGEST_SIDE = 896  # Pixels of the photograph on the page.
LEVELS = 63  # Steps of brightness in a head's map: more cannot be seen, and fewer bits pack better.
ATTENTION_ELEMENTS = 2**23  # Weights that exist at a time.

# Patches along a side of the squares that share a map, and of the squares of which a map consists.
COARSENINGS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (16, 16), (32, 32))


def page(explanation: Explanation) -> str:
    """Write the page; everything that comes from files, class names included, is escaped.

    No script or style runs but its own, whose hashes are in its content security policy, and nothing is loaded.
    """
    data = _data(explanation)
    room = MOST_BYTES - len(json.dumps(data))
    if "attention" not in explanation.numbers["missing"]:
        data["maps"] = _head_maps(explanation, room)
    folder = files(__package__)
    template, style, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "data.js", "photo.js", "sections.js")
    )
    script = "".join(scripts)
    parts = {
        "{{POLICY}}": "default-src 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'",
        "{{TITLE}}": html.escape(explanation.numbers["photo"]["name"]),
        "{{STYLE}}": style,
        # "<" could end the element, or begin a comment in it.
        "{{DATA}}": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "{{SCRIPT}}": script,
    }
    # One part after the other, from front to back, so that no part's text is searched.
    pieces = []
    for mark, text in parts.items():
        before, template = template.split(mark)
        pieces += [before, text]
    return "".join([*pieces, template])


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(explanation: Explanation) -> dict:
    """Gather all but the heads' maps."""
    numbers, layout, patches = explanation.numbers, explanation.layout, explanation.patches
    height, width = _picture_size(layout)
    file = io.BytesIO()
    explanation.photo.resize((width, height), PIL.Image.Resampling.LANCZOS).save(file, "JPEG", quality=80)
    rows, columns = (
        ((np.arange(small) + 0.5) * large / small).astype(int)
        for small, large in zip((height, width), layout.photo, strict=True)
    )
    # What no pixel asks for is zero, which packs to nothing; classes are asked for where patches look.
    used = _used(explanation)[:, None]
    labels = explanation.labels.numpy()[rows][:, columns]
    confidence = explanation.confidence.numpy()[rows[::2]][:, columns[::2]]
    if numbers["class"] is not None:
        # The page has the maps of all class tokens, coarsened.
        numbers = {**numbers, "class": {key: value for key, value in numbers["class"].items() if key != "attention"}}
    return {
        "numbers": numbers,
        "colors": colors_for(explanation.model.config.id2label),
        "shown_classes": explanation.shown_classes,
        "terms": [{"kind": term.kind, "layer": term.layer, "head": term.head} for term in patches.terms],
        "photo": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        "size": [height, width],
        "along": [
            [each.tolist() for each in layout.along(axis, length)] for axis, length in enumerate((height, width))
        ],
        "labels": _pack(labels, "uint16"),
        "confidence": _pack(confidence, "uint8", 1 / 255),
        "reading_classes": _pack(patches.classes, "uint16"),
        "reading_probabilities": _pack(patches.probabilities * used[..., None], "uint16", 1 / 65535),
        "label_probabilities": _pack(patches.label_probabilities * used, "uint16", 1 / 65535),
        "class_probabilities": _pack(patches.final[:, explanation.shown_classes] * used, "uint8", 1 / 255),
        "contributions": _pack(patches.contributions * used[..., None], "int16", _scale(patches.contributions, 32767)),
        "scores": _pack(patches.scores * used, "int16", _scale(patches.scores, 32767)),
        "maps": None,
    }


def _picture_size(layout: Layout) -> tuple[int, int]:
    scale = min(1, LONGEST_SIDE / max(layout.photo))
    height, width = (max(1, round(length * scale)) for length in layout.photo)
    return height, width


def _used(explanation: Explanation) -> np.ndarray:
    """Of all patches of all windows, those that a pixel of the photograph or of its picture on the page belongs to."""
    layout = explanation.layout
    return (layout.areas(layout.photo) + layout.areas(_picture_size(layout))) > 0


def _scale(values: np.ndarray, most: int) -> float:
    return float(np.abs(values).max()) / most or 1.0


def _pack(values: np.ndarray, dtype: str, scale: float = 1) -> dict:
    """Pack little-endian numbers, of which each stands for `scale`, deflated (zlib) and in base 64."""
    values = values if dtype == "float32" else np.rint(values / scale)
    data = base64.b64encode(zlib.compress(values.astype(np.dtype(dtype).newbyteorder("<")).tobytes(), 9)).decode()
    return {"dtype": dtype, "shape": list(values.shape), "scale": scale, "data": data}


def _head_maps(explanation: Explanation, room: int) -> dict:
    """Show where every patch and shown class token looks, as fine as fits into `room` bytes.

    `patches` has the shape (window, square of patches, layer, head, square), `classes` (window, class, layer, head,
    square). A value is the share of attention that goes to the patches of a square, on average over the patches that
    share a map, as brightness from 0 to `levels`, the square root of its ratio to the map's largest share (`peaks`).
    """
    model, recordings = explanation.model, explanation.recordings
    used = torch.from_numpy(_used(explanation)).double().unflatten(0, (len(recordings), *explanation.layout.grid))
    for sharing, square in COARSENINGS:
        # Squares of patches that share a map, of which there are more where windows overlap than are asked for.
        wanted = (_sum_squares(used, sharing) > 0).flatten(1).numpy()
        sample = _patch_maps(model, recordings[0], sharing, square)
        # One window tells what is much too large, and its number of values what need not even be packed: never have
        # they taken less than one bit each.
        if sample[0].size * wanted.sum() / 8 > room:
            continue
        if _size(_packed_maps(sample[None])) * wanted.sum() / wanted.shape[1] > 1.2 * room:
            continue
        maps = np.stack([_patch_maps(model, each, sharing, square) for each in recordings])
        maps *= wanted[:, :, None, None, None]
        classes = np.stack(
            [
                np.stack([_squares(head_maps(model, each, None, label), square) for label in explanation.shown_classes])
                for each in recordings
            ]
        )
        packed = {
            "sharing": sharing,
            "square": square,
            "levels": LEVELS,
            "patches": _packed_maps(maps),
            "classes": _packed_maps(classes),
        }
        if _size(packed) <= room:
            return packed
    raise ValueError(f"The heads' maps of {len(recordings)} windows do not fit into a page; crop the photograph.")


def _packed_maps(maps: np.ndarray) -> dict:
    """Return the maps' brightness, largest shares, and what they sum to: 1 less what goes to class tokens."""
    peaks = maps.max(-1)
    relative = maps / np.where(peaks > 0, peaks, 1)[..., None]
    return {
        "maps": _pack(LEVELS * np.sqrt(relative), "uint8"),
        "peaks": _pack(peaks, "float32"),
        "sums": _pack(maps.sum(-1), "float32"),
    }


def _size(packed: dict) -> int:
    return len(json.dumps(packed))


def _patch_maps(model: DepictForSemanticSegmentation, recording: Recording, sharing: int, square: int) -> np.ndarray:
    """`(squares of patches, layers, heads, squares)`, float32."""
    grid_height, grid_width = recording.grid_size
    num_tokens = recording.num_patches + recording.num_labels
    layers = []
    for layer in range(len(recording.decoder_tokens) - 1):
        parts = []
        # Whole rows of squares at a time.
        heads = attention(model, recording, layer, torch.tensor([0])).shape[1]
        rows_at_once = max(1, ATTENTION_ELEMENTS // (heads * num_tokens * grid_width) // sharing) * sharing
        for row in range(0, grid_height, rows_at_once):
            rows = torch.arange(row * grid_width, min(row + rows_at_once, grid_height) * grid_width)
            weights = attention(model, recording, layer, rows)[0, ..., : recording.num_patches]
            # (heads, squares, rows, columns): the patches that look come last, to be averaged.
            looked_at = _sum_squares(weights.unflatten(-1, recording.grid_size), square).flatten(-2)
            looking = looked_at.transpose(1, 2).unflatten(-1, (-1, grid_width))
            counts = _sum_squares(torch.ones_like(looking[:1, :1]), sharing)
            parts.append((_sum_squares(looking, sharing) / counts).flatten(-2))
        layers.append(torch.cat(parts, dim=-1).permute(2, 0, 1))
    return torch.stack(layers, dim=1).float().cpu().numpy()


def _squares(maps: np.ndarray, square: int) -> np.ndarray:
    return _sum_squares(torch.from_numpy(maps), square).flatten(-2).float().numpy()


def _sum_squares(maps: Tensor, size: int) -> Tensor:
    """Sum over squares of `size` patches, `(..., height, width)` to `(..., ceil(height / size), ceil(width / size))`;
    those at the bottom and right may be cut off."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (0, -width % size, 0, -height % size))
    return padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((-3, -1))
