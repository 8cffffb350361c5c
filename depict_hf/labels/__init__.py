"""Class names and display colours of the datasets, by class id, and their one reader."""

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

PALETTES = ("auto", "official", "distinct")
# Datasets whose colours everybody who works with them knows by heart, although some of them look alike.
EXPECTED_PALETTES = ("ade20k", "cityscapes", "pascal_context")


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
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, ids are not 0, 1, 2, ... without a gap, or there is no name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8; save it as that.") from error
    except (OSError, ValueError) as error:  # ValueError: characters that no file's name can have
        reason = getattr(error, "strerror", None) or error
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"{path} cannot be read ({reason}); needed is a file with names of classes, .json or .txt."
        ) from error
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
    """Return the display colours by class id, RGB in 0 to 255.

    Raises:
        ValueError: If the dataset is none of `datasets()`.
    """
    return [tuple(each["color"]) for each in _classes(dataset)]


def colors_for(id2label: dict[int, str], palette: str = "auto") -> list[tuple[int, int, int]]:
    """Return the display colours for a model's classes.

    Args:
        id2label: Names by class id, as in the model's config.
        palette: "distinct" for those of `palette.distinct_colors`, which are easy to tell apart, in an order that suits
            the classes where the file of the dataset has one; "official" for those of the dataset with exactly these
            names, and distinct ones where there is none; "auto" for the official ones of the datasets in
            `EXPECTED_PALETTES`, and distinct ones else.

    Raises:
        ValueError: If the ids are not 0, 1, 2, ... without a gap, or there is no such palette.
    """
    from .palette import distinct_colors

    if palette not in PALETTES:
        raise ValueError(f"Unknown palette {palette!r}; choose one of {', '.join(PALETTES)}.")
    if set(id2label) != set(range(len(id2label))):
        raise ValueError(f"Got the ids {sorted(id2label)[:10]} for {len(id2label)} classes; number them from 0.")
    names = [id2label[index] for index in range(len(id2label))]
    dataset = next((each for each in datasets() if class_names(each) == names), None)
    if dataset and (palette == "official" or (palette == "auto" and dataset in EXPECTED_PALETTES)):
        return class_colors(dataset)
    if dataset and "distinct" in _classes(dataset)[0]:
        return [tuple(each["distinct"]) for each in _classes(dataset)]
    return distinct_colors(len(names))


def find_classes(wanted: str, names: list[str]) -> list[int]:
    """Return the ids of classes named in a list such as "road,car".

    Args:
        wanted: Names between commas. Where a class has several names between commas ("road, route"), any will do.
        names: Names by class id.

    Raises:
        ValueError: If a name is that of no class, or of several.
    """
    ids: list[int] = []
    for name in (each.strip().lower() for each in wanted.split(",")):
        whole = [index for index, each in enumerate(names) if each.lower() == name]
        parts = [
            index for index, each in enumerate(names) if name in [part.strip() for part in each.lower().split(",")]
        ]
        found = whole or parts
        if len(found) != 1:
            what = "is the name of several classes" if found else "is none of the model's classes"
            listed = ", ".join(repr(names[index]) for index in found) if found else ", ".join(names)
            raise ValueError(f"{name!r} {what}: {listed}.")
        ids.append(found[0])
    return sorted(set(ids))


def distinct_color(index: int) -> tuple[int, int, int]:
    """Return colour `index` of PASCAL VOC's colour map: the bits of the index, dealt to red, green and blue in turn.

    0 is black; all up to 2^24 differ from each other.
    """
    color = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    red, green, blue = color
    return red, green, blue
