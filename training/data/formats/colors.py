"""Coloured label maps: drawn as ids by a table of colours, or their colours listed for the user to name."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from depict_hf.photo_files import FORMATS, UnreadableImageError, decoding, read_image

from .color_tables import Color, ColorTable, find_color_table
from .found import SHOWN
from .rendering import Drawing, render, state_key

_READ_FOR_LISTING = 200
_MOST_COLORS = 40


@dataclass(frozen=True)
class Colored:
    """Label maps after colours became ids.

    Args:
        paths: Paths in the order in which they were given.
        class_names: Names as the table has them; None where there is no table.
        source: Name of the table's file where colours were read by it.
        notes: What the table leaves out.
    """

    paths: list[Path]
    class_names: tuple[str, ...] | None = None
    source: str | None = None
    notes: tuple[str, ...] = ()


def resolve_colors(folder: Path, paths: Sequence[Path], ignored: Sequence[Color] = ()) -> Colored:
    """Label maps of ids, from ones that may be coloured.

    Args:
        folder: Where a table of colours may be.
        paths: Paths of the label maps.
        ignored: Colours without a class, whether the table has them or not.

    Raises:
        ValueError: If maps are coloured and there is no table, or one that lacks some of the colours; the message has
            the colours, and what to write into which file.
    """
    table = find_color_table(folder)
    modes = [_mode(path) for path in paths]
    if table is None:
        colored = [path for path, mode in zip(paths, modes, strict=True) if mode in ("RGB", "RGBA")]
        _refuse_colors(folder, colored, len(paths))
        return Colored(list(paths))
    greys = all(len(set(color)) == 1 for color in table.classes) and max(table.classes) > (len(table.classes),) * 3
    by_color = [mode in ("RGB", "RGBA", "P") or (greys and mode == "L") for mode in modes]
    if not any(by_color):
        return Colored(list(paths), table.class_names)
    table = ColorTable(table.path, table.class_names, dict.fromkeys(ignored, 255) | table.classes)
    drawings = [
        Drawing(str(path), (state_key(path), str(sorted(table.classes.items()))), partial(_draw, path, table), path)
        for path, colored in zip(paths, by_color, strict=True)
        if colored
    ]
    drawn = iter(render(drawings))
    without = [color for color, label in table.classes.items() if label == 255 and color not in ignored]
    notes = (f"the colours {', '.join(map(_hex, without))} are ignored, as {table.path.name} says",) if without else ()
    results = [next(drawn) if colored else path for path, colored in zip(paths, by_color, strict=True)]
    return Colored(results, table.class_names, table.path.name, notes)


def _mode(path: Path) -> str | None:
    """Tell how a file stores pixels; None where it is no picture, or a JPEG, which is refused when it is read."""
    if not path.is_file():  # but a pipe, say, which opening would wait for
        return None
    try:
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]
        with decoding(), Image.open(path, formats=known) as image:
            return None if image.format in ("JPEG", "MPO") else image.mode
    except UnreadableImageError:
        return None  # reported with all other files that cannot be read


def _draw(path: Path, table: ColorTable) -> np.ndarray:
    image, _ = read_image(path)
    indices = np.array(image) if image.mode == "P" else None
    if image.mode == "RGBA" and np.array(image)[..., 3].min() < 255:
        raise ValueError("it is partly transparent; save it without alpha, each pixel in the colour of its class")
    pixels = np.array(image.convert("RGB"))
    values = _packed(pixels)
    colors = np.array([_packed(np.array(color, dtype=np.uint8)) for color in table.classes])
    labels = np.array(list(table.classes.values()), dtype=np.uint8)
    order = np.argsort(colors)
    places = np.searchsorted(colors[order], values).clip(max=len(colors) - 1)
    known = colors[order][places] == values
    if known.all():
        return labels[order][places]
    if indices is not None and (indices[~known] == 255).all():
        return np.where(known, labels[order][places], np.uint8(255))  # the ignored border of a VOC palette
    if indices is not None and set(np.unique(indices).tolist()) <= {*range(len(table.class_names)), 255}:
        return indices  # the palette is another one, but its indices are the ids
    unknown = Counter(values[~known].tolist()).most_common(5)
    described = ", ".join(f"{_hex(_unpacked(value))} ({count / values.size:.1%})" for value, count in unknown)
    raise ValueError(
        f"{len(np.unique(values[~known]))} of its colours are not in {table.path.name}: {described}; add them, or save "
        "masks without smoothing, with one colour for each class"
    )


def _refuse_colors(folder: Path, paths: Sequence[Path], count: int) -> None:
    """Refuse label maps most of which are coloured, not grey; of many, some are read.

    Where only a few are, among maps of ids, they are reported with all other files that do not suit.

    Args:
        folder: Where a table of colours may be written.
        paths: Those that may be coloured.
        count: Number of all label maps.
    """
    step = max(len(paths) // _READ_FOR_LISTING, 1)
    counts: Counter[int] = Counter()
    colored = []
    for path in tqdm(paths[::step], desc="Reading colours", disable=not sys.stderr.isatty(), leave=False):
        try:
            pixels = np.array(read_image(path)[0].convert("RGB"))
        except OSError:
            continue  # reported with all other files that cannot be read
        values, pixel_counts = np.unique(_packed(pixels), return_counts=True)
        if any(len(set(_unpacked(value))) > 1 for value in values.tolist()):
            colored.append(path)
            counts.update(dict(zip(values.tolist(), pixel_counts.tolist(), strict=True)))
    if len(colored) * step * 2 < count:
        return
    total = counts.total()
    listing = [
        f"{_hex(color)}  {color[0]:3} {color[1]:3} {color[2]:3}  {count / total:6.2%} of pixels"
        for color, count in ((_unpacked(value), count) for value, count in counts.most_common(_MOST_COLORS))
    ]
    of = f"{len(colored)} of {len(paths)} label maps" if step == 1 else f"{len(colored)} of {len(paths[::step])} read"
    introduction = f"{of}, such as {colored[0]}, hold colours, and no table says which class a colour means."
    lines = "".join(f"\n  {line}" for line in listing)
    if len(counts) > _MOST_COLORS:
        raise ValueError(
            f"{introduction} They hold {len(counts)} colours, the most frequent of which are:{lines[: SHOWN * 60]}\n"
            "So many come from JPEG, from smoothed edges, or from pictures that are no label maps: save them as PNG "
            "without smoothing, one colour for each class."
        )
    rows = "\n".join(f"  NAME{index},{r},{g},{b}" for index, (r, g, b) in enumerate(map(_unpacked, _ordered(counts))))
    raise ValueError(
        f"{introduction} Their colours are:{lines}\nWrite {folder / 'classes.csv'} with these lines, and put the name "
        f"of a class for each NAME (void for what is to be ignored; one name may have several colours):\n"
        f"  name,r,g,b\n{rows}"
    )


def _ordered(counts: Counter[int]) -> list[int]:
    """Sort colours: black first, which mostly is the background; then the most frequent."""
    return sorted(counts, key=lambda value: (value != 0, -counts[value]))


def _packed(pixels: np.ndarray) -> np.ndarray:
    parts = pixels.astype(np.int32)
    return (parts[..., 0] << 16) | (parts[..., 1] << 8) | parts[..., 2]


def _unpacked(value: int) -> Color:
    return value >> 16, value >> 8 & 255, value & 255


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
