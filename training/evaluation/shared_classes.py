"""Data with other classes than the model's: which of theirs stand for which of its, and which count."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.ranges import shown

from ..data import LabelEncoding, SegmentationDataset, load_dataset_splits
from .arguments import load_samples

FORM = '{"tree": ["vegetation"], "building": ["building", "door"]}'


def read_shared_classes(path: Path) -> dict[str, list[str]]:
    """Read a table from classes of a model to those classes of the data that mean the same.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no such table, or names a class of the data twice.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); needed is a table such as {FORM}.") from error
    lists = list(table.values()) if isinstance(table, dict) else []
    if not lists or not all(
        isinstance(each, list) and each and all(isinstance(n, str) for n in each) for each in lists
    ):
        raise ValueError(f"{path} holds {shown(table)}, needed a table such as {FORM}.")
    meant = [name for each in lists for name in each]
    twice = sorted({name for name in meant if meant.count(name) > 1})
    if twice:
        raise ValueError(f"{path} names {shown(twice[0])} twice; a class of the data can mean one of the model's only.")
    return table


def open_shared_samples(
    arguments: argparse.Namespace, names: Sequence[str], state: PartialState
) -> tuple[SegmentationDataset, tuple[int, ...]]:
    """Open the split of other data that the arguments name, with labels that are ids of the model's classes.

    Args:
        arguments: As `add_data_arguments` adds them, and `classes`, the path of the table.
        names: The model's, in the order of their ids.

    Returns:
        The samples, in which all that the table leaves out is ignored, and the ids of the model's classes in the table.

    Raises:
        OSError: If table or data cannot be read.
        ValueError: If the table is none, or names classes that model or data do not have, or the data name none or are
            at fault.
    """
    table = read_shared_classes(arguments.classes)
    with state.main_process_first():
        splits = load_dataset_splits(arguments.dataset)
    known = splits.class_names or splits.suggested_names
    if known is None:
        raise ValueError(
            f"{arguments.dataset} names no classes, which --classes needs; write a classes.txt into its folder, a name "
            "in a line, in the order of ids."
        )
    _check_known(arguments.classes, table, names, "the model")
    _check_known(arguments.classes, [name for each in table.values() for name in each], known, "the data")
    samples = load_samples(arguments, known, False, state)
    meaning = dict.fromkeys(range(len(known)), IGNORE_LABEL) | {
        known.index(name): names.index(key) for key, each in table.items() for name in each
    }
    classes = tuple(meaning.get(each, each) for each in samples.encoding.classes)
    shared = SegmentationDataset(
        samples.dataset,
        len(names),
        samples.image_column,
        samples.label_column,
        encoding=LabelEncoding(classes),
        split=samples.split,
        skip_unreadable=samples.skip_unreadable,
    )
    shared.left_out = samples.left_out
    return shared, tuple(sorted(names.index(key) for key in table))


def _check_known(path: Path, named: Sequence[str] | dict, known: Sequence[str], whose: str) -> None:
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"{path} names {shown(unknown[0])}, which is no class of {whose}: {', '.join(known)}.")
