"""A few made photographs with label maps, laid out as the owners of ADE20K, Cityscapes and Pascal Context do."""

from pathlib import Path

import numpy as np
import PIL.Image

from depict_hf.labels import class_names

from ..data import CITYSCAPES_CLASSES

# (height, width) in pixels, about as the data sets have them; Cityscapes' 1024 x 2048 would double the time of its
# evaluation.
MADE_SIZES = {"ade20k": (512, 683), "cityscapes": (1024, 1280), "pascal_context": (375, 500)}
_CELLS = 6


def make_dataset(
    dataset: str, folder: Path, num_train: int, num_validation: int, size: tuple[int, int] | None = None
) -> Path:
    """Write photographs of coloured cells on a slope of brightness, each of one class or ignored.

    Args:
        dataset: A key of `MADE_SIZES`.
        folder: Made, and given to `load_dataset_splits`.
        num_train, num_validation: Photographs of the splits.
        size: (height, width) in pixels; every other photograph is upright, but for Cityscapes', which all have one
            size. `MADE_SIZES` if None.

    Returns:
        The folder.

    Raises:
        ValueError: If the data set is none of `MADE_SIZES`.
    """
    if dataset not in MADE_SIZES:
        raise ValueError(f"Got dataset={dataset!r}, needed one of {', '.join(MADE_SIZES)}.")
    height, width = MADE_SIZES[dataset] if size is None else size
    rng = np.random.default_rng(0)
    num_labels = len(class_names(dataset))
    colors = rng.integers(0, 200, (num_labels + 1, 3))
    names: dict[str, list[str]] = {"train": [], "val": []}
    for split, count in (("train", num_train), ("val", num_validation)):
        for index in range(count):
            upright = index % 2 == 1 and dataset != "cityscapes"
            shape = (width, height) if upright else (height, width)
            classes = _cells(rng.integers(0, num_labels + 1, (_CELLS, _CELLS)), shape)  # the last one is ignored
            slope = np.linspace(0, 55, shape[1])[None, :, None]
            photo = PIL.Image.fromarray((colors[classes] + slope).astype(np.uint8))
            names[split].append(_WRITERS[dataset](folder, split, index, photo, classes, num_labels))
    if dataset == "cityscapes":  # the labels of its test split are withheld
        _save(photo, folder / "leftImg8bit" / "test" / "berlin" / "berlin_000000_000019_leftImg8bit.png")
    if dataset == "pascal_context":
        lists = folder / "VOCdevkit" / "VOC2010" / "ImageSets" / "SegmentationContext"
        lists.mkdir(parents=True)
        for split, listed in names.items():
            (lists / f"{split}.txt").write_text("\n".join(listed) + "\n", encoding="utf-8")
    return folder


def _cells(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(length) * _CELLS // length for length in shape)
    return values[rows[:, None], columns[None, :]]


def _save(image: PIL.Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _write_ade20k(
    folder: Path, split: str, index: int, photo: PIL.Image.Image, classes: np.ndarray, num_labels: int
) -> str:
    """Count the classes from 1; 0 is "other"."""
    root, where = folder / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
    name = f"ADE_{split}_{index + 1:08d}"
    ids = np.where(classes == num_labels, 0, classes + 1)
    _save(photo, root / "images" / where / f"{name}.jpg")
    _save(PIL.Image.fromarray(ids.astype(np.uint8)), root / "annotations" / where / f"{name}.png")
    return name


def _write_cityscapes(
    folder: Path, split: str, index: int, photo: PIL.Image.Image, classes: np.ndarray, num_labels: int
) -> str:
    """Use the 34 ids of labelIds, 0 of which is unlabeled."""
    city = {"train": "aachen", "val": "frankfurt"}[split]
    name = f"{city}_{index:06d}_000019"
    ids = np.array([*CITYSCAPES_CLASSES, 0])[classes]
    _save(photo, folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
    _save(PIL.Image.fromarray(ids.astype(np.uint8)), folder / "gtFine" / split / city / f"{name}_gtFine_labelIds.png")
    return name


def _write_pascal_context(
    folder: Path, split: str, index: int, photo: PIL.Image.Image, classes: np.ndarray, num_labels: int
) -> str:
    """Write the ids as they are; what has no class of its own is background, 0."""
    root = folder / "VOCdevkit" / "VOC2010"
    name = f"2008_{index + 1000 * (split == 'val'):06d}"
    ids = np.where(classes == num_labels, 0, classes)
    _save(photo, root / "JPEGImages" / f"{name}.jpg")
    _save(PIL.Image.fromarray(ids.astype(np.uint8)), root / "SegmentationClassContext" / f"{name}.png")
    return name


_WRITERS = {"ade20k": _write_ade20k, "cityscapes": _write_cityscapes, "pascal_context": _write_pascal_context}
