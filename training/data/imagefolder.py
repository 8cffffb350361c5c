"""A user's own photographs and label maps: `metadata.jsonl` beside them, and names of their classes in a file.

Each line of `metadata.jsonl` (or row of `metadata.csv`) names the files of one photograph and its label map, relative
to itself: `{"file_name": "photos/1.jpg", "label_file_name": "maps/1.png"}`. There is one such file in each of the
folders `train`, `validation` and `test`, or a single one whose paths may begin with those folders.
"""

import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from depict_hf.labels import read_class_names
from depict_hf.weight_files import one_line

from .failures import LOADING_ERRORS

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CLASS_FILES = ("id2label.json", "classes.txt", "class_names.txt", "labels.txt", "codes.txt")
# What `datasets` takes for the names of splits, too.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def find_metadata(folder: Path) -> list[Path]:
    """Find a folder's metadata files, unless its README says itself where its data are."""
    if "configs" in read_readme(folder)[0]:
        return []
    return sorted(path for name in METADATA for path in folder.rglob(name))


def load_imagefolder(folder: Path, metadata: list[Path], streaming: bool = False):
    """Load splits by name, as the folders say in which `metadata` or the photographs are.

    `datasets` finds splits by words in any file name, and then may leave out a metadata file without telling; here
    only folders count.

    Raises:
        ValueError: If there are metadata files beside and inside the folders of splits, or paths that begin with such
            a folder and others that do not.
    """
    parts = {path.relative_to(folder).parts[0] for path in metadata if path.parent != folder}
    if not parts:
        splits = _load(folder, {"train": ["**"]}, streaming)
        return splits if streaming else _split_by_folder(folder, splits["train"])
    if any(path.parent == folder for path in metadata):
        raise ValueError(
            f"Found metadata in {folder} and in its folders {', '.join(sorted(parts))}; keep either the one file or "
            "one in the folder of each split."
        )
    names = {part: SPLIT_NAMES.get(part.lower(), part) for part in sorted(parts)}
    if len(set(names.values())) < len(names):
        raise ValueError(f"Found the folders {', '.join(names)} in {folder}, two of which name the same split.")
    return _load(folder, {split: [f"{part}/**"] for part, split in names.items()}, streaming)


def read_text(path: Path) -> str:
    """Read the text of a small file, with or without a byte order mark.

    Raises:
        ValueError: If it is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8; save it as that.") from error


def find_class_names(folder: Path) -> tuple[str, ...] | None:
    """Read the names in one of `CLASS_FILES` of a folder; None where there is no such file.

    Raises:
        ValueError: If there are several, and they differ, or one cannot be used.
    """
    found = {name: read_class_names(folder / name) for name in CLASS_FILES if (folder / name).is_file()}
    if len(set(found.values())) > 1:
        raise ValueError(f"{' and '.join(found)} in {folder} name different classes; remove one of them.")
    return next(iter(found.values()), None)


def _load(folder: Path, data_files: dict[str, list[str]], streaming: bool):
    try:
        return datasets.load_dataset("imagefolder", data_dir=str(folder), data_files=data_files, streaming=streaming)
    except LOADING_ERRORS as error:
        reason = one_line(f"{error} {error.__cause__ or ''}")
        raise ValueError(
            f"The metadata in {folder} cannot be used; needed is a file_name in each line, relative to the metadata, "
            f"and in each file the same columns: {reason}"
        ) from error


def _split_by_folder(folder: Path, dataset: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Put all in "train", unless the paths of photographs begin with the names of splits."""
    column = next(name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image))
    encoded = pa.chunked_array(dataset.with_format("arrow")[column][:])
    paths = pc.struct_field(encoded, "path").to_pylist()
    firsts = [os.path.relpath(path, folder.resolve()).split(os.sep)[0] for path in paths]
    names = [SPLIT_NAMES.get(first.lower()) for first in firsts]
    splits = [name for name in names if name is not None]
    if not splits:
        return {"train": dataset}
    if len(splits) < len(names):
        raise ValueError(
            f"In {folder}, {names.count(None)} of {len(names)} paths do not begin with the name of a split, as "
            f"{paths[names.index(None)]}, and others do; put all photographs in folders of splits, or none."
        )
    return {
        split: dataset.select([index for index, name in enumerate(splits) if name == split])
        for split in dict.fromkeys(splits)
    }


def read_readme(folder: Path) -> tuple[dict, str]:
    """Read the YAML at the beginning of a folder's README.md, and the text below it; empty where there is none.

    Raises:
        ValueError: If the YAML cannot be read.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}, ""
    text = read_text(path)
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}, text
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(
            f"The YAML at the beginning of {path} cannot be read; correct it: {one_line(error)}"
        ) from error
    return (header, parts[2]) if isinstance(header, dict) else ({}, text)
