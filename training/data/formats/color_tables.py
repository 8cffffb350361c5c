"""Tables from colours to classes, in the forms in which tools and data sets write them."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..imagefolder import read_text

Color = tuple[int, int, int]
# Searched in this order; the first that names colours is used.
TABLE_FILES = (
    "labelmap.txt",
    "classes.csv",
    "class_dict.csv",
    "colors.csv",
    "colours.csv",
    "colormap.csv",
    "label_colors.csv",
    "colors.json",
    "colours.json",
    "classes.json",
    "colormap.json",
    "label_colors.json",
    "label_colors.txt",
    "colors.txt",
    "classes.txt",
)
IGNORED_NAMES = ("void", "ignore", "ignored", "__ignore__", "unlabeled", "unlabelled", "unlabeled pixels")
_HEX = re.compile(r"#?([0-9a-fA-F]{6})")


@dataclass(frozen=True)
class ColorTable:
    """Classes by colour.

    Args:
        path: Path of its file.
        class_names: Names in the order of the file, or of its ids where it has such; `IGNORED_NAMES` are no classes.
        classes: Class of each colour, 255 where it is ignored.
    """

    path: Path
    class_names: tuple[str, ...]
    classes: dict[Color, int]

    @classmethod
    def of_rows(cls, path: Path, rows: list[tuple[str, Color]]) -> "ColorTable":
        """Make a table of names and colours in their order; several colours may have one name.

        Raises:
            ValueError: If one colour has two names, or all are ignored.
        """
        names = tuple(dict.fromkeys(name for name, _ in rows if name.strip().lower() not in IGNORED_NAMES))
        classes: dict[Color, int] = {}
        for name, color in rows:
            label = names.index(name) if name in names else 255
            if classes.setdefault(color, label) != label:
                raise ValueError(f"{path} gives the colour {color} to two classes; correct one of them.")
        if not names or len(names) > 255:
            raise ValueError(f"{path} names {len(names)} classes beside ignored ones; needed are 1 to 255.")
        return cls(path, names, classes)


def find_color_table(folder: Path) -> ColorTable | None:
    """Find the table in a folder; None where none of `TABLE_FILES` has colours.

    Raises:
        ValueError: If a table cannot be used.
    """
    for name in TABLE_FILES:
        path = folder / name
        if path.is_file() and (rows := _read_rows(path)):
            return ColorTable.of_rows(path, rows)
    return None


def _read_rows(path: Path) -> list[tuple[str, Color]] | None:
    """Names and colours; None where the file has no colours at all."""
    text = read_text(path)
    if path.suffix == ".json":
        return _from_json(text, path)
    if path.suffix == ".csv":
        return _from_csv(text, path)
    return _from_lines(text, path)


def _from_json(text: str, path: Path) -> list[tuple[str, Color]] | None:
    """Read `{"road": [128, 64, 128]}`, `{"road": "#804080"}`, either reversed, or a list of names and colors."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if isinstance(content, dict) and len(content) == 1 and isinstance(next(iter(content.values())), list):
        inner = next(iter(content.values()))
        content = inner if inner and isinstance(inner[0], dict) else content
    pairs: list[tuple[object, object]] = []
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, dict):
                value = value.get("color", value.get("colour", value.get("rgb")))
            pairs.append((key, value) if _color(value) else (value, key))
    elif isinstance(content, list):
        for each in content:
            if isinstance(each, dict):
                name = next((each[key] for key in ("name", "label", "class", "title") if key in each), None)
                color = next((each[key] for key in ("color", "colour", "rgb") if key in each), None)
                pairs.append((name, color))
    return _checked_rows(pairs, path)


def _from_csv(text: str, path: Path) -> list[tuple[str, Color]] | None:
    """Read columns `name,r,g,b` (or `red`, ...), or `name,color` with #rrggbb or three numbers; an `id` orders them."""
    try:
        dialect = csv.Sniffer().sniff(text, delimiters=",;\t")
    except csv.Error:
        dialect = csv.excel
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines(), dialect) if any(row)]
    if not rows:
        return None
    header = [cell.lower().strip("# ") for cell in rows[0]]

    def column(*names: str) -> int | None:
        return next((index for index, cell in enumerate(header) if cell in names), None)

    name = column("name", "class", "label", "class_name", "label_name", "category")
    parts = [column("r", "red"), column("g", "green"), column("b", "blue")]
    channels = [part for part in parts if part is not None]
    whole = column("color", "colour", "rgb", "hex", "color_rgb")
    index = column("id", "index", "label_id", "class_id")
    where = channels if len(channels) == len(parts) else whole
    if name is None or where is None:
        if len(rows[0]) == 4 and _color(rows[0][1:]):  # no header: name, r, g, b
            return _checked_rows([(row[0], row[1:]) for row in rows], path)
        return None
    if index is not None and all(len(row) > index and row[index].isdigit() for row in rows[1:]):
        rows[1:] = sorted(rows[1:], key=lambda row: int(row[index]))
    pairs: list[tuple[object, object]] = []
    for row in rows[1:]:
        if len(row) < len(header):
            raise ValueError(f"{path} has the row {','.join(row)!r}, which is shorter than its header; complete it.")
        pairs.append((row[name], row[where] if isinstance(where, int) else [row[channel] for channel in where]))
    return _checked_rows(pairs, path)


def _from_lines(text: str, path: Path) -> list[tuple[str, Color]] | None:
    """`name:r,g,b:parts:actions` as CVAT writes it, `r g b name` as CamVid does, or `name r g b`."""
    pairs: list[tuple[object, object]] = []
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        numbers = r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"
        if found := re.fullmatch(rf"([^:]+):\s*{numbers}\s*(?::.*)?", line):
            pairs.append((found[1], found.groups()[1:]))
        elif found := re.fullmatch(rf"{numbers}[\s,:]+(\S.*)", line):
            pairs.append((found[4], found.groups()[:3]))
        elif found := re.fullmatch(rf"(.*?\S)[\s,:]+{numbers}", line):
            pairs.append((found[1], found.groups()[1:]))
        else:
            pairs.append((line, None))
    return _checked_rows(pairs, path)


def _checked_rows(pairs: list[tuple[object, object]], path: Path) -> list[tuple[str, Color]] | None:
    rows = [(name, _color(color)) for name, color in pairs]
    colored = [(name, color) for name, color in rows if color is not None]
    if not colored:
        return None
    wrong = [name if color is None else color for name, color in rows if color is None or not isinstance(name, str)]
    if wrong:
        raise ValueError(
            f"{path} gives colours to {len(colored)} of {len(rows)} classes; needed is a name and a colour, three "
            f"numbers from 0 to 255 or #rrggbb, for each, also for {wrong[0]!r}."
        )
    return [(str(name).strip(), color) for name, color in colored]


def _color(value: object) -> Color | None:
    """Read a colour in any form; None where it is none."""
    if isinstance(value, str):
        if found := _HEX.fullmatch(value.strip()):
            digits = found[1]
            return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
        value = re.findall(r"\d+", value) if re.fullmatch(r"[\s\d,;()\[\]]+", value) else None
    if not isinstance(value, (list, tuple)) or len(value) not in (3, 4):
        return None
    try:
        red, green, blue = (int(each) for each in value[:3])
    except (TypeError, ValueError):
        return None
    return (red, green, blue) if all(0 <= each <= 255 for each in (red, green, blue)) else None
