"""A folder or data set, brought by anyone, to checked splits, class names and a text that says what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from depict_hf.photo_files import shown_lines
from depict_hf.ranges import check_class_name

from .checks import check_split, label_encoding, read_split, settle_encoding
from .failures import plain_errors
from .inspection import Inspection
from .layouts import Splits
from .loading import load_dataset_splits
from .reading import IGNORE_LABEL
from .samples import SegmentationDataset, count_pixels
from .splitting import complete_splits

_SHOWN = 20


@dataclass(frozen=True)
class OpenedData:
    """Data that can be trained on.

    Args:
        splits: "train", "validation" and "test" where the data have or allow them, and what their ids mean.
        samples: Samples of each split, checked.
        class_names: Names in the order of the classes.
        description: Lines on layout, classes, splits and their numbers of images, and pixels of each class.
        warnings: What is no reason to refuse the data, but to look at them, each with its remedy.
    """

    splits: Splits
    samples: dict[str, SegmentationDataset]
    class_names: tuple[str, ...]
    description: str
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((self.description, *(f"Warning: {each}" for each in self.warnings)))


@plain_errors()
def open_data(
    name_or_path: str | Path,
    class_names: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    reduce_labels: bool = False,
    skip_unreadable: bool = False,
    num_workers: int = 0,
) -> OpenedData:
    """Find out how data are laid out, split them where they have no splits, and check every file.

    Args:
        name_or_path: As for `load_dataset_splits`.
        class_names: Names in the order of the ids in label maps; where omitted, those that the data name, or else
            "class 0", "class 1" and so on ("background" and "foreground" for masks of 0 and 255).
        image_column, label_column: Found by their usual names if None.
        reduce_labels: Whether label 0 is ignored and the others go down by one.
        skip_unreadable: Whether images that cannot be decoded are left out instead of refused.
        num_workers: Processes that read.

    Returns:
        The data; `open_samples` with their splits and class names finds the very same samples.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a data set.
        ImportError: If reading the format needs pycocotools, and it is not installed.
        ValueError: If the layout is unknown or ambiguous, or anything is to be refused; the message has the faults of
            all splits, at most 20 of a kind.
    """
    columns = (image_column, label_column)
    splits = complete_splits(load_dataset_splits(name_or_path), *columns)
    # The same split under two names is read once.
    read: dict[int, tuple[SegmentationDataset, Inspection]] = {}
    for name, split in splits.items():
        if id(split) not in read:
            read[id(split)] = read_split(splits, name, *columns, num_workers=num_workers)
    together = _together([found for _, found in read.values()])
    names, source = _choose_names(splits, class_names, together, reduce_labels)
    for each in names:
        check_class_name(each)
    label_encoding(splits, names, reduce_labels)
    encoding, note = settle_encoding(splits, names, reduce_labels, together, *columns, num_workers=num_workers)
    samples: dict[str, SegmentationDataset] = {}
    faults, reports = [], []
    for name, split in splits.items():
        own, found = read[id(split)]
        if name in samples or own.split != name:
            continue
        try:
            samples[name], report = check_split(own, found, names, encoding, skip_unreadable)
            reports += report
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    for name, split in splits.items():
        samples.setdefault(name, samples[read[id(split)][0].split])
        depends_on = (name, tuple(names), *columns, reduce_labels, skip_unreadable)
        splits.opened[depends_on] = samples[name]
    lines = [
        f"Data: {splits.layout}.",
        f"Classes, {source}: {', '.join(f'{i} {each}' for i, each in enumerate(names))}",
    ]
    lines += [f"  {each}" for each in (*splits.notes, note) if each]
    lines += [each for each in reports if not each.startswith("  classes without")]
    distinct = {name: each for name, each in samples.items() if each.split == name}
    lines += _pixel_table(names, distinct)
    warnings = (*_absent_classes(names, distinct), *_duplicates(list(read.values())))
    return OpenedData(splits, samples, names, shown_lines("\n".join(lines)), tuple(map(shown_lines, warnings)))


def _together(inspections: list[Inspection]) -> Inspection:
    """Add up ids and pixels of all splits; places are meaningless in the result."""
    pixels: dict[int, int] = {}
    for found in inspections:
        for index, count in found.pixels:
            pixels[index] = pixels.get(index, 0) + count
    return Inspection([], [], [], sorted(pixels.items()), [])


def _choose_names(
    splits: Splits, given: Sequence[str] | None, found: Inspection, reduce_labels: bool
) -> tuple[tuple[str, ...], str]:
    """Choose the class names, and say in words who gave them.

    Raises:
        ValueError: If nobody names the classes and ids have gaps or begin at 1, or there is only one.
    """
    if given is not None:
        return tuple(given), "as given"
    if splits.class_names is not None:
        return splits.class_names, "named by the data"
    ids = sorted(found.all_ids - {IGNORE_LABEL})
    if reduce_labels:
        ids = [index - 1 for index in ids if index]
    if not ids:
        return ("class 0", "class 1"), "which nobody names"
    if splits.suggested_names is not None and ids[-1] < len(splits.suggested_names):
        return splits.suggested_names, "by the names that the data suggest"
    if found.all_ids == {0, IGNORE_LABEL}:
        return ("background", "foreground"), "which nobody names, of masks of 0 and 255"
    how = "Name the classes with --classes or class_names=, or in a classes.txt in the folder, in the order of ids"
    if len(ids) == 1:
        raise ValueError(f"All label maps hold the one id {ids[0]}; needed are at least two classes.")
    if 0 not in ids:
        raise ValueError(
            f"Ids begin at {ids[0]}: no label map holds 0, and nobody names the classes. Pass reduce_labels=true "
            f"(training.evaluate: --reduce-labels), and 1 is the first class, 0 ignored. Or keep 0 as a class. {how}."
        )
    if ids[-1] > IGNORE_LABEL:
        raise ValueError(
            f"Label maps hold ids up to {ids[-1]}, and nobody names the classes. If {ids[-1]} is to be ignored, "
            f"write {IGNORE_LABEL} there instead, as ids of 16 bits do not mark it otherwise. {how}."
        )
    if ids[-1] >= 2 * len(ids):
        rows = "".join(f"\n  NAME{index},{value},{value},{value}" for index, value in enumerate(ids[: _SHOWN * 2]))
        raise ValueError(
            f"Label maps hold the ids {', '.join(map(str, ids[: _SHOWN * 2]))}, with gaps, and nobody names the "
            f"classes. If they are grey levels, write classes.csv into the folder with these lines, and put a "
            f"class name for each NAME:\n  name,r,g,b{rows}\nIf they are ids: {how}."
        )
    names = tuple(f"class {index}" for index in range(ids[-1] + 1))
    return names, "which nobody names (a classes.txt in the folder or --classes would, in the order of ids)"


def _pixel_table(names: Sequence[str], samples: dict[str, SegmentationDataset]) -> list[str]:
    """List the share of labelled pixels that each class has in each split, in percent."""
    width = max(len("class"), *map(len, names))
    counts = [count_pixels(each) for each in samples.values()]
    shares = [each.double() / each.sum() for each in counts]
    head = f"{'class':{width}}" + "".join(f"{name:>12}" for name in samples)
    return ["Labelled pixels in percent:", f"  {head}"] + [
        f"  {name:{width}}" + "".join(f"{100 * float(share[index]):12.2f}" for share in shares)
        for index, name in enumerate(names)
    ]


def _absent_classes(names: Sequence[str], samples: dict[str, SegmentationDataset]) -> list[str]:
    warnings = []
    for split, each in samples.items():
        absent = [name for name, count in zip(names, count_pixels(each).tolist(), strict=True) if not count]
        if absent:
            effect = (
                "cannot be learned; leave them out of the class names, or add images"
                if split == "train"
                else ("have no IoU there; move images there, or leave it so")
            )
            warnings.append(f"classes without a pixel in {split}, {', '.join(absent)}, {effect}")
    return warnings


def _duplicates(read: Sequence[tuple[SegmentationDataset, Inspection]]) -> list[str]:
    """Find photographs that lie in several splits, byte for byte."""
    seen: dict[str, tuple[str, str]] = {}
    found = []
    for own, inspection in read:
        for place, digest in enumerate(inspection.hashes):
            split, name = seen.setdefault(digest, (own.split, own.name(place))) if digest else (own.split, "")
            if split != own.split:
                found.append(f"{name} ({split}) and {own.name(place)} ({own.split})")
    if not found:
        return []
    listed = "".join(f"\n  {each}" for each in found[:_SHOWN])
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [
        f"{len(found)} photographs lie in several splits, so that figures will be better than the model; remove them "
        f"from one:{listed}{more}"
    ]
