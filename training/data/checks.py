"""Every photograph and label map is read once before anything is computed from them, and all faults are reported."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import PIL
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from depict_hf.configuration_depict import IGNORE_LABEL

from . import reading
from .layouts import Splits
from .loading import get_split
from .reading import LabelEncoding, UnreadableImageError
from .samples import SegmentationDataset
from .streaming import store

_BATCH = 16
_SHOWN = 20


@dataclass(frozen=True)
class Inspection:
    """What reading all samples showed.

    Args:
        unreadable: Place and message of each image that cannot be decoded, or whose label map cannot.
        wrong: The same for label maps that do not fit their photograph or hold ids that are no class.
        pixels: Of each class over all other label maps.
        ignored: Pixels without a class.
    """

    unreadable: list[tuple[int, str]]
    wrong: list[tuple[int, str]]
    pixels: list[int]
    ignored: int


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
    """Samples of one split, all of which have been read.

    What was found is printed. It is kept in the cache of `datasets`, so that reading happens once for each state of
    the data, and once for all processes that share that cache.

    Args:
        splits: As `load_dataset_splits` returns them; a streamed split is stored first.
        split: Name of one, or a part of it.
        class_names: In the order of the classes, to be compared with the dataset's where it has some.
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
        encoding = label_encoding(splits, class_names, reduce_labels)
        dataset = get_split(splits, split)
        if isinstance(dataset, datasets.IterableDataset):
            dataset = store(dataset, split)
        samples = SegmentationDataset(
            dataset, len(class_names), image_column, label_column, encoding=encoding, split=split
        )
        opened[depends_on] = _checked(samples, class_names, skip_unreadable, num_workers)
    return opened[depends_on]


def _checked(
    samples: SegmentationDataset, class_names: Sequence[str], skip_unreadable: bool, num_workers: int
) -> SegmentationDataset:
    """The samples that can be decoded, after a report; `ValueError` where anything is to be refused."""
    found = _inspect_once(samples, num_workers)
    faults = _describe_faults(found, samples, skip_unreadable)
    if faults:
        raise ValueError(faults)
    count = len(samples)
    if found.unreadable:
        samples = samples.without(index for index, _ in found.unreadable)
    if not sum(found.pixels):
        raise ValueError(
            f"Split {samples.split} has no labelled pixel in {len(samples)} images; its labels may be withheld, as "
            "those of test splits often are: choose another split."
        )
    samples.pixels = torch.tensor(found.pixels)
    print_once(_describe(found, samples, count, class_names))
    return samples


def describe_classes(splits: Mapping[str, datasets.Dataset], class_names: Sequence[str]) -> str:
    """A line on what the dataset was recognised as, and who names its classes."""
    known = splits if isinstance(splits, Splits) else Splits(splits)
    named = "not named by the dataset, so by the recipe" if known.class_names is None else "named by the dataset"
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(class_names))
    return f"Data: {known.layout}. Classes, {named}: {listed}"


def print_once(text: str) -> None:
    """Print in the first of all processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def label_encoding(
    splits: Mapping[str, datasets.Dataset], class_names: Sequence[str], reduce_labels: bool
) -> LabelEncoding:
    """Of a dataset's label maps: what its layout says, else ids of the classes, from 1 with `reduce_labels`.

    Raises:
        ValueError: If the dataset names other classes, or `reduce_labels` contradicts its layout.
    """
    known = splits if isinstance(splits, Splits) else Splits(splits)
    if known.class_names is not None:
        _compare_names(class_names, known)
    if known.encoding is None:
        return LabelEncoding.counted(len(class_names), reduce_labels)
    if reduce_labels and known.encoding != LabelEncoding.counted(len(class_names), reduce_labels):
        raise ValueError(f"Got reduce_labels for {known.layout}, whose label 0 is not ignored; leave it out.")
    return known.encoding


def inspect_samples(samples: SegmentationDataset, num_workers: int = 0) -> Inspection:
    """Read all samples, in `num_workers` processes or in this one."""
    loader = DataLoader(_Readings(samples), batch_size=_BATCH, num_workers=num_workers, collate_fn=_as_is)
    unreadable, wrong = [], []
    pixels = torch.zeros(samples.num_labels, dtype=torch.long)
    ignored = 0
    progress = tqdm(total=len(samples), desc=f"Checking {samples.split}", disable=not sys.stderr.isatty())
    for batch in loader:
        for index, fault, counts in batch:
            if fault:
                (unreadable if fault[0] else wrong).append((index, fault[1]))
            else:
                pixels += torch.tensor(counts[0])
                ignored += counts[1]
        progress.update(len(batch))
    progress.close()
    return Inspection(unreadable, wrong, pixels.tolist(), ignored)


class _Readings(Dataset):
    """For each sample its place, its fault (whether it cannot be decoded, and a message) or None, and its pixels."""

    def __init__(self, samples: SegmentationDataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, tuple[bool, str] | None, tuple[list[int], int] | None]:
        try:
            labels = self.samples[index]["labels"].flatten()
        except UnreadableImageError as error:
            return index, (True, f"image {index}: {error.__cause__}"), None
        except ValueError as error:
            return index, (False, str(error)), None
        counts = torch.bincount(labels, minlength=IGNORE_LABEL + 1)
        ignored = int(counts[IGNORE_LABEL])
        counts[IGNORE_LABEL] = 0
        # Beyond 255 classes, those after the ignored id are counted, too.
        padded = torch.nn.functional.pad(counts, (0, max(self.samples.num_labels - len(counts), 0)))
        return index, None, (padded[: self.samples.num_labels].tolist(), ignored)


def _as_is(batch: list) -> list:
    return batch


def _inspect_once(samples: SegmentationDataset, num_workers: int) -> Inspection:
    """`inspect_samples`, or what it found earlier in the same data."""
    depends_on = [samples.fingerprint, samples.image_column, samples.label_column, samples.split, samples.num_labels]
    depends_on += [samples.encoding.classes, PIL.__version__]
    code = b"".join(Path(each).read_bytes() for each in (__file__, reading.__file__))
    name = hashlib.sha256(json.dumps(depends_on).encode() + code).hexdigest()[:16]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "depict_checks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.is_file():
            return Inspection(**json.loads(path.read_text()))
        found = inspect_samples(samples, num_workers)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(found)))
        partial.rename(path)
    return found


def _describe_faults(found: Inspection, samples: SegmentationDataset, skip_unreadable: bool) -> str:
    """What is refused, or an empty text."""
    parts = []
    of_split = f"of {len(samples)} {{}} of split {samples.split}"
    if found.unreadable and (not skip_unreadable or len(found.unreadable) == len(samples)):
        lines = "".join(f"\n  {message}" for _, message in found.unreadable)
        parts.append(
            f"{len(found.unreadable)} {of_split.format('images')} cannot be read:{lines}\nRepair or remove them, or "
            "leave them out with skip_unreadable=true (training.evaluate: --skip-unreadable)."
        )
    if found.wrong:
        lines = "".join(f"\n  {message}" for _, message in found.wrong[:_SHOWN])
        more = f"\n  and {len(found.wrong) - _SHOWN} more" if len(found.wrong) > _SHOWN else ""
        parts.append(f"{len(found.wrong)} {of_split.format('label maps')} do not suit:{lines}{more}")
    return "\n".join(parts)


def _describe(found: Inspection, samples: SegmentationDataset, count: int, class_names: Sequence[str]) -> str:
    """Lines on one split: how many images, which were left out, which classes have no pixel."""
    total = sum(found.pixels) + found.ignored
    lines = [f"Split {samples.split}: {len(samples)} of {count} images, {found.ignored / total:.1%} of pixels ignored"]
    lines += [f"  left out: {message}" for _, message in found.unreadable]
    absent = [name for name, pixels in zip(class_names, found.pixels, strict=True) if not pixels]
    if absent:
        lines.append(f"  classes without a pixel: {', '.join(absent)}")
    if len(absent) == len(class_names) - 1 and found.ignored:
        lines.append("  a single class has pixels; in masks of 0 and 255, 255 is ignored: save them with 0 and 1")
    return "\n".join(lines)


def _compare_names(class_names: Sequence[str], splits: Splits) -> None:
    given, own = ([name.strip().lower() for name in names] for names in (class_names, splits.class_names))
    if given == own:
        return
    different = next((i for i, pair in enumerate(zip(given, own, strict=False)) if pair[0] != pair[1]), None)
    first = (
        ""
        if different is None
        else (
            f"; the first that differs is {different}: {class_names[different]!r} and {splits.class_names[different]!r}"
        )
    )
    raise ValueError(
        f"Got {len(given)} class names, but the dataset ({splits.layout}) has {len(own)}{first}. Pass its own with "
        "class_names=A,B,... or class_names=FILE (a .json or .txt), or choose a recipe or model of these classes."
    )
