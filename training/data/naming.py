"""Class names that a data set of the Hub gives in its features or in its README."""

import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from .imagefolder import read_readme

_CLASS_WORDS = ("class", "label", "categor", "segment", "mask", "annotation")


def names_in_features(features: datasets.Features) -> tuple[str, ...] | None:
    """Names of the one `ClassLabel`, alone or in a sequence, in a column that is called after classes; else None.

    Labels of whole scenes (`scene_category`) are no classes of pixels.
    """
    found = {
        tuple(feature.names)
        for name, feature in _class_labels(features)
        if any(word in name.lower() for word in _CLASS_WORDS) and "scene" not in name.lower() and len(feature.names) > 1
    }
    return found.pop() if len(found) == 1 else None


def _class_labels(feature: object, name: str = "") -> Iterator[tuple[str, datasets.ClassLabel]]:
    """Find all features with class names, and the names of the columns that lead to them."""
    if isinstance(feature, datasets.ClassLabel):
        yield name, feature
    elif isinstance(feature, dict):
        for key, inner in feature.items():
            yield from _class_labels(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(feature, (list, tuple)) and feature:
        yield from _class_labels(feature[0], name)
    elif (inner := getattr(feature, "feature", None)) is not None:  # datasets.List, LargeList, Sequence
        yield from _class_labels(inner, name)


def names_in_readme(folder: Path) -> tuple[str, ...] | None:
    """Names in a README: an `id2label` in its YAML, or a text that numbers them, `0 road, 1 car, ...`; else None.

    Raises:
        ValueError: If the YAML cannot be read.
    """
    header, text = read_readme(folder)
    table = header.get("id2label")
    if isinstance(table, dict) and table:
        by_id = {int(key): str(name) for key, name in table.items() if str(key).isdigit() and int(key) != 255}
        if sorted(by_id) == list(range(len(by_id))):
            return tuple(by_id[index] for index in range(len(by_id)))
    return _numbered(" ".join(text.split()))


def _numbered(text: str) -> tuple[str, ...] | None:
    """Find the only list `0 NAME, 1 NAME, ...` in a text, of three names, or two after a colon; else None.

    None also where there are several.
    """
    found = []
    for start in re.finditer(r"(?<![\w.,-])0[:=]? (?=[^\W\d])", text):
        names: list[str] = []
        place = start.start()
        while each := re.compile(rf"{len(names)}[:=]? ([^\W\d][^,;.|()0-9]*?)(, |; |\. |\.$|;|$)").match(text, place):
            names.append(each[1].strip())
            place = each.end()
        if len(names) > (1 if text[: start.start()].rstrip().endswith(":") else 2):
            found.append(tuple(names))
    return found[0] if len(set(found)) == 1 else None
