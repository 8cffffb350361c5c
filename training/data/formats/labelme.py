"""LabelMe: a JSON file of named shapes for each photograph, drawn in their order."""

import base64
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np

from depict_hf.photo_files import read_image
from depict_hf.writing import write_whole

from .coco import BACKGROUND_NAMES, find_photograph
from .found import Found, Tree, check_class_count, listed, refuse, split_of, without_area
from .rendering import Drawing, cache_folder, content_key, render_splits
from .shapes import blank_map, inside_circle, inside_polygon, inside_rectangle, place_mask

_AREAS = ("polygon", "rectangle", "circle", "mask")
_IGNORED = "__ignore__"


def find_labelme(tree: Tree) -> Found | None:
    """Find JSON files with `shapes`; None where there are none.

    Raises:
        ValueError: If a photograph is missing, or shapes cannot be drawn; the message names all faults.
    """
    files = {path: content for path in tree.with_suffix(".json") if (content := _read(path)) is not None}
    if not files:
        return None
    listed_names = tree.class_names()
    counts = Counter(
        (shape["label"], shape.get("shape_type") or "polygon") for each in files.values() for shape in each["shapes"]
    )
    used = {label for label, kind in counts if kind in _AREAS and label != _IGNORED}
    names = _class_names(used, listed_names, tree)
    classes = {name: index for index, name in enumerate(names)} | {_IGNORED: 255}
    splits: dict[str | None, list[tuple[Path, Drawing]]] = {}
    faults = []
    for path, content in files.items():
        split = split_of(tree.relative(path).parts[:-1])
        try:
            photograph = _photograph(tree, path, content, split)
        except ValueError as error:
            faults.append(f"{tree.relative(path)}: {error}")
            continue
        draw = partial(_draw, content, classes, photograph)
        drawing = Drawing(str(tree.relative(path)), ("labelme", content_key(path), str(classes)), draw)
        splits.setdefault(split, []).append((photograph, drawing))
    refuse(faults, f"{len(faults)} of {len(files)} LabelMe files have no photograph:")
    if None in splits and len(splits) > 1:
        raise ValueError(
            f"{len(splits[None])} LabelMe files, such as that of {splits[None][0][0]}, lie in no folder of a split "
            "(train, val, test), but others do; put all into such folders, or none."
        )
    drawn = render_splits(splits)
    notes = [f"pixels outside all shapes are class 0, {names[0]}; later shapes of a file are drawn over earlier ones"]
    if any(label == _IGNORED for label, _ in counts):
        notes.append(f"shapes called {_IGNORED} are ignored")
    notes += without_area((kind, count) for (_, kind), count in counts.items() if kind not in _AREAS)
    annotated = {photograph for pairs in splits.values() for photograph, _ in pairs}
    without = [str(tree.relative(path)) for path in tree.images if path not in annotated]
    if without:
        notes.append(f"{len(without)} photographs without a JSON file are left out: {listed(without)}")
    return Found(
        f"LabelMe ({len(files)} JSON files)",
        drawn,
        names,
        notes=tuple(notes),
    )


def _read(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return None
    shapes = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not ("imagePath" in content or "imageData" in content):
        return None
    return content if all(isinstance(each, dict) and isinstance(each.get("label"), str) for each in shapes) else None


def _class_names(used: set[str], given: tuple[str, ...] | None, tree: Tree) -> tuple[str, ...]:
    """Order the names: background first, then as a file that lists them does, else by the alphabet.

    Raises:
        ValueError: If a file lists names, but not all that are used.
    """
    background = next((name for name in sorted(used | set(given or ())) if name.lower() in BACKGROUND_NAMES), None)
    if given is not None:
        missing = sorted(used - set(given))
        if missing:
            raise ValueError(
                f"Shapes in {tree.folder} are called {listed(missing)}, which the file of class names there does not "
                "list; add these names, or correct the shapes."
            )
    others = [name for name in (given or sorted(used)) if name not in (background, _IGNORED)]
    names = (background or "background", *others)
    check_class_count(names, tree.folder)
    return names


def _photograph(tree: Tree, path: Path, content: dict, split: str | None) -> Path:
    """Find the file that a JSON file belongs to: the one that it names, one of its own name, or the one inside it."""
    named = content.get("imagePath")
    if named:
        if not isinstance(named, str) or "\0" in named:
            raise ValueError(f"its imagePath is {named!r}, needed is the name of a file")
        beside = Path(os.path.abspath(path.parent / PureWindowsPath(named).as_posix()))
        # Of files elsewhere, which a file from a stranger may name, only those of the same name below the folder.
        if Path(os.path.abspath(tree.folder)) in beside.parents and beside.is_file():
            return beside
        found = find_photograph(tree, PureWindowsPath(named).name, path, split)
        if isinstance(found, Path):
            return found
    same_name = [image for image in tree.images if image.parent == path.parent and image.stem == path.stem]
    if same_name:
        return same_name[0]
    if not content.get("imageData"):
        raise ValueError(f"there is no photograph {named or path.stem} below {tree.folder}, nor one in the file itself")
    try:
        data = base64.b64decode(content["imageData"], validate=True)
        suffix = (read_image(data)[0].format or "png").lower()
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"its imageData is no picture ({error})") from error
    target = cache_folder() / "depict_photographs" / f"{path.stem}-{content_key(path)[:24]}.{suffix}"
    if not target.is_file():
        write_whole(data, target)
    return target


def _draw(content: dict, classes: dict[str, int], photograph: Path) -> np.ndarray:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if not height or not width:
        width, height = read_image(photograph)[0].size
    labels = blank_map(height, width)
    for number, shape in enumerate(content["shapes"]):
        if (shape.get("shape_type") or "polygon") in _AREAS:
            try:
                labels[_inside(shape, height, width)] = classes[shape["label"]]
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise ValueError(f"shape {number} ({shape['label']}) cannot be drawn: {error}") from error
    return labels


def _inside(shape: dict, height: int, width: int) -> np.ndarray:
    """Return the pixels of one shape, bool `(height, width)`."""
    kind = shape.get("shape_type") or "polygon"
    points = [(float(x), float(y)) for x, y in shape.get("points", ())]
    needed = 3 if kind == "polygon" else 2
    if len(points) < needed:
        raise ValueError(f"it has {len(points)} points, needed {needed}")
    if kind == "polygon":
        return inside_polygon(points, height, width)
    if kind == "rectangle":
        # Later versions write all four corners.
        (left, top), (right, bottom) = np.min(points, axis=0).tolist(), np.max(points, axis=0).tolist()
        return inside_rectangle([(left, top), (right, bottom)], height, width)
    if kind == "circle":
        return inside_circle(points[0], points[1], height, width)
    stencil = np.array(read_image(base64.b64decode(shape.get("mask") or ""))[0].convert("L")) > 0
    return place_mask(stencil, round(points[0][0]), round(points[0][1]), height, width)
