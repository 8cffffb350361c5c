"""Class names and display colours of the datasets, by class id, and their one reader."""

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path


def datasets() -> tuple[str, ...]:
    """Names of the datasets whose classes are known: those of the JSON files beside this module."""
    found = [path.name for path in files(__name__).iterdir()]
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


@cache
def _classes(dataset: str) -> list[dict]:
    if dataset not in datasets():
        raise ValueError(f"Unknown dataset {dataset!r}; choose one of {', '.join(datasets())}.")
    return json.loads((files(__name__) / f"{dataset}.json").read_text(encoding="utf-8"))


def class_names(dataset: str) -> list[str]:
    """Names by class id, in the order of the published checkpoints (CamVid: of SegNet's 11 classes).

    Pascal Context's are in mmsegmentation's order, which is that of the prepared label maps. The published list
    (segm/data/config/pascal_context.yml in rstrudel/segmenter@20d1bfa) is in another one, and misnames them.

    Raises:
        ValueError: If the dataset is none of `datasets()`.
    """
    return [each["name"] for each in _classes(dataset)]


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of classes, in the order of their ids: a JSON object from id to name or list, or one name a line.

    The ignored id 255 may be named, too, and is left out, as is a first line `__ignore__`. Lines may begin with their
    id, from 0: `0 road` or `0: road`.

    Raises:
        ValueError: If ids are not 0, 1, 2, ... without a gap, or there is no name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8; save it as that.") from error
    if path.suffix == ".json":
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(names, dict):
            names = _by_id(names, path)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if names[:1] == ["__ignore__"]:
            names = names[1:]
        numbered = [re.fullmatch(r"(\d+)\s*[:,\s]\s*(\S.*)", name) for name in names]
        if all(numbered) and [int(each[1]) for each in numbered if each] == list(range(len(names))):
            names = [each[2] for each in numbered if each]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no names of classes; needed is one for each id, as text.")
    return tuple(names)


def _by_id(names: dict, path: Path) -> list:
    """Names in the order of their ids, without that of the ignored one."""
    from ..configuration_depict import IGNORE_LABEL  # imports torch, without which the other names here are read

    if not all(str(index).isdigit() for index in names):
        raise ValueError(f"{path} has keys that are no ids, such as {next(iter(names))!r}; needed is id: name.")
    by_id = {int(index): name for index, name in names.items()}
    if len(by_id) <= IGNORE_LABEL:
        by_id.pop(IGNORE_LABEL, None)
    if sorted(by_id) != list(range(len(by_id))):
        raise ValueError(f"{path} has the ids {sorted(by_id)[:10]} ...; number classes from 0 without a gap.")
    return [by_id[index] for index in range(len(by_id))]


def class_colors(dataset: str) -> list[tuple[int, int, int]]:
    """Display colours by class id, RGB in 0 to 255.

    Raises:
        ValueError: If the dataset is none of `datasets()`.
    """
    return [tuple(each["color"]) for each in _classes(dataset)]


def colors_for(id2label: dict[int, str]) -> list[tuple[int, int, int]]:
    """Display colours for a model's classes: those of the dataset with exactly these names, else distinct ones.

    Args:
        id2label: Names by class id, as in the model's config.

    Raises:
        ValueError: If the ids are not 0, 1, 2, ... without a gap.
    """
    if set(id2label) != set(range(len(id2label))):
        raise ValueError(f"Got the ids {sorted(id2label)[:10]} for {len(id2label)} classes; number them from 0.")
    names = [id2label[index] for index in range(len(id2label))]
    for dataset in datasets():
        if class_names(dataset) == names:
            return class_colors(dataset)
    return [distinct_color(index + 1) for index in range(len(names))]


def distinct_color(index: int) -> tuple[int, int, int]:
    """Colour number `index` of PASCAL VOC's colour map: the bits of the index, dealt to red, green and blue in turn.

    0 is black; all up to 2^24 differ from each other.
    """
    color = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return tuple(color)
