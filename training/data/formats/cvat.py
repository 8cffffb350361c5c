"""CVAT for images: one XML file of polygons and masks, drawn in their order of depth."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from ..imagefolder import SPLIT_NAMES
from .coco import BACKGROUND_NAMES, find_photograph
from .found import Found, Tree, check_class_count, listed, refuse, split_of, without_area
from .rendering import Drawing, content_key, render_splits
from .shapes import blank_map, inside_polygon, inside_rectangle, place_mask

_AREAS = ("polygon", "mask", "box")


def find_cvat(tree: Tree) -> Found | None:
    """Find `annotations.xml` as CVAT exports it; None where there is no such file.

    Splits are the subsets of a project, or the folders of several such files.

    Raises:
        ValueError: If a photograph is missing, labels differ between files, or shapes cannot be drawn.
    """
    files = {path: root for path in tree.with_suffix(".xml") if (root := _read(path)) is not None}
    if not files:
        return None
    listings = {tuple(each.text or "" for each in root.iterfind("meta//labels/label/name")) for root in files.values()}
    shapes = Counter((shape.tag, shape.get("label")) for root in files.values() for shape in root.iterfind("image/*"))
    if len(listings) > 1:
        raise ValueError(
            f"{listed([str(path) for path in files], 3)} have different labels; export them as one project."
        )
    used = sorted({label for kind, label in shapes if kind in _AREAS and label})
    found = tuple(dict.fromkeys((*listings.pop(), *used)))
    background = next((name for name in found if name.lower() in BACKGROUND_NAMES), None)
    names = (background or "background", *(name for name in found if name != background))
    check_class_count(names, next(iter(files)))
    classes = {name: index for index, name in enumerate(names)}
    splits: dict[str | None, list[tuple[Path, Drawing]]] = {}
    faults = []
    for path, root in files.items():
        key = content_key(path)
        for image in root.iterfind("image"):
            subset = SPLIT_NAMES.get((image.get("subset") or "").lower())
            split = subset or split_of(tree.relative(path).parts[:-1])
            photograph = find_photograph(tree, image.get("name", ""), path, split)
            if isinstance(photograph, str):
                faults.append(photograph)
                continue
            name = f"{tree.relative(path)}, image {image.get('name')}"
            depends_on = ("cvat", key, str(image.get("id")), str(image.get("name")), str(classes))
            drawing = Drawing(name, depends_on, partial(_draw, image, classes))
            splits.setdefault(split, []).append((photograph, drawing))
    refuse(faults, f"{len(faults)} photographs of CVAT's {listed([str(tree.relative(path)) for path in files], 3)}:")
    if None in splits and len(splits) > 1:
        raise ValueError(
            f"{len(splits[None])} photographs, such as {splits[None][0][0]}, are in no subset called Train, Validation "
            "or Test, but others are; put all into subsets, or none."
        )
    drawn = render_splits(splits)
    notes = [f"pixels outside all shapes are class 0, {names[0]}; shapes are drawn by their depth, then in their order"]
    notes += without_area((kind, count) for (kind, _), count in shapes.items() if kind not in (*_AREAS, "tag"))
    if any(kind == "box" for kind, _ in shapes):
        notes.append("boxes are drawn as filled rectangles")
    return Found(
        f"CVAT for images ({listed([str(tree.relative(path)) for path in files], 3)})",
        drawn,
        names,
        notes=tuple(notes),
    )


def _read(path: Path) -> ElementTree.Element | None:
    """Read the root of a file with images of CVAT; None for other XML, such as Pascal VOC's of objects."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError):
        return None
    return root if root.tag == "annotations" and root.find("image") is not None else None


def _draw(image: ElementTree.Element, classes: dict[str, int]) -> np.ndarray:
    height, width = int(image.get("height", 0)), int(image.get("width", 0))
    labels = blank_map(height, width)
    shapes = sorted(image, key=lambda shape: int(shape.get("z_order", 0)))
    for number, shape in enumerate(each for each in shapes if each.tag in _AREAS):
        try:
            labels[_inside(shape, height, width)] = classes[shape.get("label", "")]
        except ValueError as error:
            raise ValueError(f"shape {number} ({shape.tag} {shape.get('label')}) cannot be drawn: {error}") from error
    return labels


def _inside(shape: ElementTree.Element, height: int, width: int) -> np.ndarray:
    """Return the pixels of one shape, bool `(height, width)`."""
    if shape.tag == "box":
        left, top, right, bottom = (float(shape.get(side, "")) for side in ("xtl", "ytl", "xbr", "ybr"))
        return inside_rectangle([(left, top), (right, bottom)], height, width, float(shape.get("rotation", 0)))
    if shape.tag == "polygon":
        points = [point.split(",") for point in shape.get("points", "").split(";")]
        if len(points) < 3:
            raise ValueError(f"it has {len(points)} points, needed 3")
        return inside_polygon([(float(x), float(y)) for x, y in points], height, width)
    left, top = int(float(shape.get("left", 0))), int(float(shape.get("top", 0)))
    return place_mask(_stencil(shape), left, top, height, width)


def _stencil(shape: ElementTree.Element) -> np.ndarray:
    """Draw a mask in its own box from the lengths of runs along its rows, the first of which is outside."""
    height, width = int(float(shape.get("height", 0))), int(float(shape.get("width", 0)))
    runs = [int(run) for run in shape.get("rle", "").split(",")]
    if min(runs) < 0 or sum(runs) != height * width:
        raise ValueError(f"its run lengths give {sum(runs)} pixels, needed {height} x {width}")
    blank_map(height, width)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
