"""Splits for a dataset that has not all of them: which split a photograph belongs to follows from its name."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .layouts import Splits
from .loading import find_columns
from .reading import content_hash
from .samples import undecoded

SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}


def complete_splits(splits: Splits, image_column: str | None = None, label_column: str | None = None) -> Splits:
    """Return the same dataset with the splits "train", "validation" and "test", and notes on how they came about.

    Of a dataset of one split, 70 % become "train", 15 % "validation" and 15 % "test". Each photograph's split follows
    from a hash of its name, so that it stays the same when others are added. Where one of the three would be empty,
    the photograph whose hash lies nearest becomes its only one, if need be until more are added. Where only "test" is
    missing, it is the same as "validation"; where only "validation" is missing, 15 % of "train" become it. Streams, and
    datasets whose splits have other names, stay as they are.

    Args:
        splits: As `load_dataset_splits` returns them.
        image_column, label_column: Found by their usual names if None.

    Raises:
        ValueError: If the only split has fewer than three photographs, or there are two that are to become three.
    """
    if not splits or any(isinstance(split, datasets.IterableDataset) for split in splits.values()):
        return splits
    names = set(splits)
    if len(names) == 1:
        [only] = splits.values()
        parts = _divide(only, splits.folder, SHARES, image_column, label_column)
        counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        listed = ", ".join(f"{share:.0%} {name}" for name, share in SHARES.items())
        note = (
            f"it has no splits, so they are made ({listed}) by a hash of each photograph's name, and stay the same "
            f"when others are added: {counts}; folders train/, val/ and test/ would be used instead"
        )
        return splits.replace(parts, note)
    if names == {"train", "test"}:
        shares = {"train": 0.85, "validation": 0.15}
        parts = _divide(splits["train"], splits.folder, shares, image_column, label_column)
        note = (
            f"it has no validation split, so 15 % of train ({len(parts['validation'])}) are, by a hash of their names"
        )
        return splits.replace(parts | {"test": splits["test"]}, note)
    if {"train", "validation"} <= names and "test" not in names:
        note = "it has no test split, so the validation split is used for both"
        return splits.replace(dict(splits) | {"test": splits["validation"]}, note)
    return splits


def assign(keys: list[str], shares: dict[str, float]) -> list[str]:
    """Choose a split for each key, by the key alone unless a split would be empty.

    Args:
        keys: Names, which should differ.
        shares: Share of each split, in the order in which they divide the interval from 0 to 1; their sum is 1.

    Raises:
        ValueError: If there are fewer keys than splits.
    """
    if len(keys) < len(shares):
        raise ValueError(
            f"Got {len(keys)} photographs, needed at least {len(shares)}, one for each of {', '.join(shares)}."
        )
    places = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys]
    bounds, total = {}, 0.0
    for name, share in shares.items():
        bounds[name] = (total, total + share)
        total += share
    assigned = [next((name for name, (_, end) in bounds.items() if place < end), name) for place in places]
    for name, (start, end) in bounds.items():
        if name not in assigned:
            counts = Counter(assigned)
            free = [index for index in range(len(keys)) if counts[assigned[index]] > 1]
            nearest = min(free, key=lambda index: (max(start - places[index], places[index] - end), keys[index]))
            assigned[nearest] = name
    return assigned


def _divide(
    dataset: datasets.Dataset, folder: Path | None, shares: dict[str, float], *columns: str | None
) -> dict[str, datasets.Dataset]:
    image_column, label_column = find_columns(dataset.features, *columns)
    assigned = assign(_keys(dataset, image_column, label_column, folder), shares)
    return {name: dataset.select([index for index, each in enumerate(assigned) if each == name]) for name in shares}


def _keys(dataset: datasets.Dataset, image_column: str, label_column: str, folder: Path | None) -> list[str]:
    """Return what tells photographs apart wherever they lie: paths in their folder, else names, else contents."""
    encoded = undecoded(dataset, image_column, label_column)
    column = pa.chunked_array(encoded.with_format("arrow")[image_column][:])
    paths = pc.struct_field(column, "path").to_pylist()
    if all(paths):
        keys = [_relative(Path(path), folder) for path in paths]
        if len(set(keys)) == len(keys):
            return keys
    return [content_hash(row[image_column]) if row[image_column] else "" for row in encoded]


def _relative(path: Path, folder: Path | None) -> str:
    """Return a path in a folder without suffix; the name alone where it lies elsewhere."""
    for root in () if folder is None else (Path(os.path.abspath(folder)), folder.resolve()):
        if root in Path(os.path.abspath(path)).parents:
            return Path(os.path.abspath(path)).relative_to(root).with_suffix("").as_posix()
    return path.stem
