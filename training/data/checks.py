"""What is refused before anything is computed from a dataset, with all faults at once, and what is said about it."""

import os
from collections.abc import Mapping, Sequence

import datasets
import torch

from depict_hf.photo_files import shown_lines

from .failures import plain_errors
from .inspection import Inspection, inspect_once, inspect_samples, place_of
from .layouts import Splits
from .loading import get_split
from .reading import IGNORE_LABEL, LabelEncoding
from .samples import SegmentationDataset
from .streaming import store

__all__ = [
    "Inspection",
    "describe_classes",
    "inspect_samples",
    "label_encoding",
    "open_samples",
    "print_once",
    "read_split",
]
_SHOWN = 20


@plain_errors()
def open_samples(
    splits: Mapping[str, datasets.Dataset],
    split: str,
    class_names: Sequence[str],
    image_column: str | None = None,
    label_column: str | None = None,
    reduce_labels: bool = False,
    skip_unreadable: bool = False,
    num_workers: int = 0,
) -> SegmentationDataset:
    """Open the samples of one split and read all of them once.

    What was found is printed. It is kept in the cache of `datasets`, so that reading happens once for each state of
    the data, and once for all processes that share that cache.

    Args:
        splits: As `load_dataset_splits` returns them; a streamed split is stored first.
        split: Name of one, or a part of it.
        class_names: Names in the order of the classes, to be compared with the dataset's where it has some.
        image_column, label_column, reduce_labels: As for `SegmentationDataset`. Where the layout of the dataset says
            how labels are encoded, that holds.
        skip_unreadable: Whether images that cannot be decoded are left out, and printed, instead of refused.
        num_workers: Processes that read.

    Raises:
        ValueError: If the split does not exist, its columns are neither given nor found, class names differ, or images
            or label maps are at fault; the message names all that cannot be decoded.
    """
    opened = getattr(splits, "opened", {})
    depends_on = (split, tuple(class_names), image_column, label_column, reduce_labels, skip_unreadable)
    if depends_on not in opened:
        columns = (image_column, label_column)
        samples, found = read_split(splits, split, *columns, num_workers=num_workers)
        label_encoding(splits, class_names, reduce_labels)  # refuses names before faults of label maps
        encoding, note = settle_encoding(splits, class_names, reduce_labels, found, *columns, num_workers=num_workers)
        opened[depends_on], report = check_split(samples, found, class_names, encoding, skip_unreadable)
        print_once("\n".join([*report, *([f"  {note}"] if note else [])]))
    return opened[depends_on]


def read_split(
    splits: Mapping[str, datasets.Dataset],
    split: str,
    image_column: str | None = None,
    label_column: str | None = None,
    num_workers: int = 0,
) -> tuple[SegmentationDataset, Inspection]:
    """Read the samples of one split, whose classes are not settled yet; return them and what reading showed.

    Raises:
        ValueError: If the split does not exist, or its columns are neither given nor found.
    """
    dataset = get_split(splits, split)
    if isinstance(dataset, datasets.IterableDataset):
        dataset = store(dataset, split)
    samples = SegmentationDataset(dataset, IGNORE_LABEL, image_column, label_column, split=split)
    return samples, inspect_once(samples, num_workers)


def settle_encoding(
    splits: Mapping[str, datasets.Dataset],
    class_names: Sequence[str],
    reduce_labels: bool,
    found: Inspection,
    image_column: str | None = None,
    label_column: str | None = None,
    num_workers: int = 0,
) -> tuple[LabelEncoding, str]:
    """Do as `label_encoding` does, but take 255 in masks of 0 and 255 for the second class; return a line on it, too.

    Such masks are those of no other kind: if 255 were ignored, nothing but class 0 would be left in all splits.

    Args:
        found: What was found in the split that is to be opened; the others are read only where it holds 0 and 255.

    Raises:
        ValueError: If names differ from those of the dataset, `reduce_labels` contradicts its layout, or there is
            nothing to learn, as masks hold 0 and 255 for another number of classes than two.
    """
    encoding = label_encoding(splits, class_names, reduce_labels)
    known = getattr(splits, "encoding", None) is not None or reduce_labels
    if known or IGNORE_LABEL not in found.all_ids or not found.all_ids <= {0, IGNORE_LABEL}:
        return encoding, ""
    together = set(found.all_ids)
    for name, dataset in splits.items():
        if not isinstance(dataset, datasets.IterableDataset):
            together |= read_split(splits, name, image_column, label_column, num_workers)[1].all_ids
    if together != {0, IGNORE_LABEL}:
        return encoding, ""
    if len(class_names) == 2:
        return LabelEncoding.binary(), f"masks hold only 0 and 255; 255 is class 1, {class_names[1]}, and not ignored"
    raise ValueError(
        "All label maps hold only 0 and 255, of which 255 is ignored, so that nothing is left to tell apart, and there "
        f"are {len(class_names)} class names. Name two classes, the first for 0 and the second for 255, as in "
        "background,crack; or write the numbers of classes into the masks."
    )


def check_split(
    samples: SegmentationDataset,
    found: Inspection,
    class_names: Sequence[str],
    encoding: LabelEncoding,
    skip_unreadable: bool,
) -> tuple[SegmentationDataset, list[str]]:
    """Return the samples that can be decoded, with their classes, and lines that say what was found.

    Raises:
        ValueError: If anything is to be refused; the message has all faults of the split.
    """
    faults = _describe_faults(found, samples, encoding, class_names, skip_unreadable)
    if faults:
        raise ValueError(faults)
    checked = SegmentationDataset(
        samples.dataset,
        len(class_names),
        samples.image_column,
        samples.label_column,
        encoding=encoding,
        split=samples.split,
        skip_unreadable=skip_unreadable,
    )
    if found.unreadable:
        checked = checked.without(index for index, _ in found.unreadable)
    pixels, ignored = found.pixels_by_class(encoding, len(class_names))
    if not sum(pixels):
        raise ValueError(
            f"Split {checked.split} has no labelled pixel in {len(checked)} images; its labels may be withheld, as "
            "those of test splits often are: choose another split."
        )
    checked.pixels = torch.tensor(pixels)
    share = ignored / (sum(pixels) + ignored)
    lines = [f"Split {checked.split}: {len(checked)} of {len(samples)} images, {share:.1%} of pixels ignored"]
    lines += [f"  left out: {message}" for _, message in found.unreadable]
    absent = [name for name, count in zip(class_names, pixels, strict=True) if not count]
    if absent:
        lines.append(f"  classes without a pixel: {', '.join(absent)}")
    return checked, lines


def describe_classes(splits: Mapping[str, datasets.Dataset], class_names: Sequence[str]) -> str:
    """Say in a line what the dataset was recognised as, and who names its classes."""
    known = splits if isinstance(splits, Splits) else Splits(splits)
    named = "not named by the dataset, so by the recipe" if known.class_names is None else "named by the dataset"
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(class_names))
    return f"Data: {known.layout}. Classes, {named}: {listed}"


def print_once(text: str) -> None:
    """Print in the first of all processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(shown_lines(text), flush=True)


def label_encoding(
    splits: Mapping[str, datasets.Dataset], class_names: Sequence[str], reduce_labels: bool
) -> LabelEncoding:
    """Say what ids in label maps mean: what the dataset's layout says, else classes, from 1 with `reduce_labels`.

    Raises:
        ValueError: If the dataset names other classes, or `reduce_labels` contradicts its layout.
    """
    known = splits if isinstance(splits, Splits) else Splits(splits)
    if known.class_names is not None:
        _compare_names(class_names, known.class_names, known.layout)
    if known.encoding is None:
        return LabelEncoding.counted(len(class_names), reduce_labels)
    if reduce_labels and known.encoding != LabelEncoding.counted(len(class_names), reduce_labels):
        raise ValueError(f"Got reduce_labels for {known.layout}, whose label 0 is not ignored; leave it out.")
    return known.encoding


def _describe_faults(
    found: Inspection,
    samples: SegmentationDataset,
    encoding: LabelEncoding,
    class_names: Sequence[str],
    skip_unreadable: bool,
) -> str:
    """Say what is refused, or return an empty text."""
    parts = []
    of_split = f"of {len(samples)} {{}} of split {samples.split}"
    if found.unreadable and (not skip_unreadable or len(found.unreadable) == len(samples)):
        lines = _lines([message for _, message in found.unreadable])
        parts.append(
            f"{len(found.unreadable)} {of_split.format('images')} cannot be read:{lines}\nRepair or remove them, or "
            "leave them out with skip_unreadable=true (training.evaluate: --skip-unreadable)."
        )
    meaningless = found.meaningless(encoding)
    wrong = [(place, message) for place, message in found.wrong]
    wrong += [(place, f"{place_of(samples, place)}: {encoding.refusal(ids)}") for place, ids in meaningless]
    if wrong:
        lines = _lines([message for _, message in sorted(wrong)])
        parts.append(f"{len(wrong)} {of_split.format('label maps')} do not suit:{lines}")
    if meaningless:
        parts += _remedies({each for _, ids in meaningless for each in ids}, found.all_ids, class_names)
    return "\n".join(parts)


def _lines(messages: Sequence[str]) -> str:
    """List the first messages, each on a line of its own, and say how many more there are."""
    more = f"\n  and {len(messages) - _SHOWN} more" if len(messages) > _SHOWN else ""
    return "".join(f"\n  {message}" for message in messages[:_SHOWN]) + more


def _remedies(meaningless: set[int], present: set[int], class_names: Sequence[str]) -> list[str]:
    """Say what probably is the matter with ids that mean nothing, and what to do."""
    count = len(class_names)
    meant = sorted(present - {IGNORE_LABEL})
    if meaningless == {count} and 0 not in present:
        return [
            f"Ids begin at 1: no label map holds 0, and the last of {count} classes has id {count}. Pass "
            "reduce_labels=true (training.evaluate: --reduce-labels), and 1 is the first class, 0 ignored."
        ]
    if meaningless == {count}:
        return [
            f"Ids go from 0 to {count}, which are {count + 1}, and there are {count} class names. If 0 is a class, "
            "such as background, name it first; if 0 is no class, pass reduce_labels=true (training.evaluate: "
            "--reduce-labels), and it is ignored."
        ]
    if meaningless == {65535}:
        return ["In 16-bit masks, 65535 is probably what is to be ignored; write 255 there instead."]
    if len(meant) <= count + 1 and meant[-1] >= 2 * count:
        listed = ", ".join(map(str, meant[:40]))
        lines = "".join(f"\n  NAME{index},{value},{value},{value}" for index, value in enumerate(meant[:40]))
        return [
            f"The maps hold the ids {listed}, with gaps, as grey levels that stand for classes do. In a folder of "
            "files, write classes.csv with these lines, and put a class name for each NAME:\n  name,r,g,b" + lines
        ]
    return [
        f"Maps hold ids up to {meant[-1]}, for which {meant[-1] + 1} class names are needed, and there are {count}: "
        "name all classes in the order of their ids."
    ]


def _compare_names(class_names: Sequence[str], own_names: Sequence[str], layout: str) -> None:
    """Raise ValueError unless both are the same names in the same order, but for capitals and outer spaces."""
    given, own = ([name.strip().lower() for name in names] for names in (class_names, own_names))
    if given == own:
        return
    different = next((i for i, pair in enumerate(zip(given, own, strict=False)) if pair[0] != pair[1]), None)
    first = (
        ""
        if different is None
        else (f"; the first that differs is {different}: {class_names[different]!r} and {own_names[different]!r}")
    )
    raise ValueError(
        f"Got {len(given)} class names, but the dataset ({layout}) has {len(own)}{first}. Pass its own with "
        "class_names=A,B,... or class_names=FILE (a .json or .txt), or choose a recipe or model of these classes."
    )
