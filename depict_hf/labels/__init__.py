"""Class names and display colours of the datasets, by class id, and their one reader."""

import json
from functools import cache
from importlib.resources import files

DATASETS = ("ade20k", "camvid", "cityscapes", "pascal_context")


@cache
def _classes(dataset: str) -> list[dict]:
    if dataset not in DATASETS:
        raise ValueError(f"Unknown dataset {dataset!r}; choose one of {', '.join(DATASETS)}.")
    return json.loads((files(__name__) / f"{dataset}.json").read_text(encoding="utf-8"))


def class_names(dataset: str) -> list[str]:
    """Names by class id, in the order of the published checkpoints (CamVid: of SegNet's 11 classes).

    Raises:
        ValueError: If the dataset is none of `DATASETS`.
    """
    return [each["name"] for each in _classes(dataset)]


def class_colors(dataset: str) -> list[tuple[int, int, int]]:
    """Display colours by class id, RGB in 0 to 255.

    Raises:
        ValueError: If the dataset is none of `DATASETS`.
    """
    return [tuple(each["color"]) for each in _classes(dataset)]


def colors_for(names: list[str]) -> list[tuple[int, int, int]]:
    """Display colours for a model's classes: those of the dataset with exactly these names, else distinct ones.

    Args:
        names: By class id.
    """
    for dataset in DATASETS:
        if class_names(dataset) == list(names):
            return class_colors(dataset)
    return [distinct_color(index + 1) for index in range(len(names))]


def distinct_color(index: int) -> tuple[int, int, int]:
    """Colour number `index` of PASCAL VOC's colour map: the bits of the index, dealt to red, green and blue in turn.

    The first 256 differ from each other; 0 is black.
    """
    color = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return tuple(color)
