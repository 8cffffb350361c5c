"""Datasets on the Hub and in folders: which splits they have, and which columns hold photographs and label maps."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import yaml
from datasets.exceptions import DatasetGenerationError

from depict_hf.weight_files import one_line

from .failures import LOADING_ERRORS, plain_errors
from .formats import Tree, describe_unknown, find_format, resolve_colors
from .imagefolder import find_class_names, find_metadata, load_imagefolder
from .layouts import Splits, dataset_of_files, find_layout
from .naming import names_in_features, names_in_readme

IMAGE_COLUMNS = ("image", "img", "pixel_values", "photo")
LABEL_COLUMNS = (
    "label",
    "labels",
    "label_map",
    "annotation",
    "annotations",
    "mask",
    "masks",
    "ground_truth",
    "segmentation",
    "segmentation_map",
    "segmentation_mask",
    "semantic_segmentation",
)
_SLICE = re.compile(r"(?P<name>.+)\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\]")


@plain_errors()
def load_dataset_splits(name_or_path: str | Path, streaming: bool = False) -> Splits:
    """Load every split of a dataset on the Hub or in a local folder.

    Args:
        name_or_path: A dataset of the Hub that needs no script, or a folder: laid out like one on the Hub, in an
            official layout (`training.data.layouts`), an `imagefolder` (`training.data.imagefolder`), written by
            `save_to_disk`, or in a format of `training.data.formats`, from `images/` and `masks/` to COCO.
        streaming: Whether splits are read on the way, as `datasets.IterableDataset`.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a dataset.
        ImportError: If reading the format needs pycocotools, and it is not installed.
        ValueError: If a folder is incomplete or looks like several layouts, or the data cannot be loaded.
    """
    folder = Path(name_or_path)
    try:
        if not folder.is_dir():
            return _named(Splits(datasets.load_dataset(str(name_or_path), streaming=streaming)))
        return _load_folder(folder, streaming)
    except (RuntimeError, yaml.YAMLError, DatasetGenerationError) as error:
        # `RuntimeError` for datasets that need a script.
        reason = one_line(f"{error} {error.__cause__ or ''}")
        raise ValueError(
            f"{name_or_path} cannot be loaded; needed are complete data and no script: {reason}"
        ) from error


def _load_folder(folder: Path, streaming: bool) -> Splits:
    metadata = find_metadata(folder)
    official = find_layout(folder)
    if official is not None and metadata:
        raise ValueError(
            f"{folder} looks like {official.layout}, but also holds {metadata[0].relative_to(folder)}, as a folder of "
            "your own images does; remove one of the two."
        )
    if official is not None:
        return _streamed(official) if streaming else official
    if metadata:
        splits = load_imagefolder(folder, metadata, streaming)
        own = Splits(splits, "an imagefolder", find_class_names(folder), folder=folder)
        return own if streaming else _with_ids(own, folder)
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        named = _named(Splits(saved, "a dataset saved to disk", find_class_names(folder), folder=folder))
        return _streamed(named) if streaming else named
    tree = Tree(folder)
    found = find_format(tree)
    if found is not None:
        splits = {name: dataset_of_files(pairs, name) for name, pairs in found.pairs.items() if pairs}
        known = (found.layout, found.class_names, found.encoding, found.suggested_names, found.notes)
        own = Splits(splits, *known, folder=folder)
        return _streamed(own) if streaming else own
    unknown = describe_unknown(tree)
    if not any(path.suffix in (".parquet", ".arrow", ".tar", ".zip", ".json", ".jsonl", ".csv") for path in tree.files):
        raise ValueError(unknown)
    try:
        splits = datasets.load_dataset(str(folder), streaming=streaming)
    except LOADING_ERRORS as error:
        raise ValueError(f"{unknown}\n(As a folder in Hub layout it cannot be read: {one_line(error)})") from error
    return _named(Splits(splits, "a folder in Hub layout", find_class_names(folder), folder=folder))


def _with_ids(splits: Splits, folder: Path) -> Splits:
    """Return the same splits with ids in place of the colours of label maps, where these are files and coloured."""
    columns, paths = {}, {}
    for name, split in splits.items():
        try:
            columns[name] = find_columns(split.features)[1]
        except ValueError:
            return splits  # a recipe may name the columns
        rows = split.select_columns(columns[name]).cast_column(columns[name], datasets.Image(decode=False))
        paths[name] = [(row[columns[name]] or {}).get("path") for row in rows]
    every = [Path(path) for each in paths.values() for path in each if path is not None]
    if len(every) < sum(map(len, paths.values())) or not all(path.is_file() for path in every):
        return splits  # reported with all other files that cannot be read
    colored = resolve_colors(folder, every)
    if colored.source is None:
        splits.class_names = splits.class_names or colored.class_names
        return splits
    drawn = iter(colored.paths)
    replaced = {}
    for name, split in splits.items():
        files = [str(next(drawn)) for _ in paths[name]]
        rest = split.remove_columns(columns[name]).add_column(columns[name], files)
        replaced[name] = rest.cast_column(columns[name], datasets.Image())
    layout = f"{splits.layout}, coloured as {colored.source} says"
    return Splits(replaced, layout, colored.class_names, notes=colored.notes, folder=folder)


def _named(splits: Splits) -> Splits:
    """Return the same splits with the class names that their features or their README have."""
    features = next(iter(splits.values())).features if splits else None
    if splits.class_names is None and features is not None:
        splits.class_names = names_in_features(features)
    if splits.folder is not None:
        splits.suggested_names = names_in_readme(splits.folder)
    return splits


def _streamed(splits: Splits) -> Splits:
    """Return the same splits as streams, in parts that workers can share."""
    return splits.replace(
        {name: split.to_iterable_dataset(num_shards=min(len(split), 64)) for name, split in splits.items()}
    )


def get_split(splits: Mapping[str, datasets.Dataset], name: str) -> datasets.Dataset:
    """Return one split by name, or a part of it: `train[:80%]`, `train[80%:]`, `train[:100]`.

    Raises:
        ValueError: If the dataset has no such split.
    """
    found = _SLICE.fullmatch(name)
    whole = found["name"] if found else name
    if whole not in splits:
        raise ValueError(
            f"Got split {name!r}, needed one of those in the dataset: {', '.join(splits)}. Name it with train_split=, "
            "validation_split= or test_split= (--split of training.evaluate), or use parts of one, such as "
            "train_split=train[:80%] validation_split=train[80%:]."
        )
    if not found:
        return splits[whole]
    if isinstance(splits[whole], datasets.IterableDataset):
        raise ValueError(f"Got split {name!r}, but a stream has no parts; leave streaming out, or name whole splits.")
    start, stop = (_position(found[each], len(splits[whole]), at) for each, at in (("start", 0), ("stop", None)))
    return splits[whole].select(range(start, stop))


def _position(text: str | None, length: int, otherwise: int | None) -> int:
    """Read a bound of a slice, in percent or images."""
    if text is None:
        return length if otherwise is None else otherwise
    position = round(length * int(text[:-1]) / 100) if text.endswith("%") else int(text)
    return min(position, length)


def find_columns(
    features: datasets.Features, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Names of the photograph's and the label map's column: as given, else found by their usual names.

    Args:
        features: Features of the dataset; only columns of images are candidates.
        image_column: Its name where it is known.
        label_column: Its name where it is known.

    Raises:
        ValueError: If a given column does not exist or holds no images, or none or several have a usual name.
    """
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = _find_column("image", image_column, IMAGE_COLUMNS, candidates, list(features))
    label_column = _find_column("label", label_column, LABEL_COLUMNS, candidates, list(features))
    return image_column, label_column


def _find_column(
    kind: str, given: str | None, usual_names: Sequence[str], candidates: list[str], columns: list[str]
) -> str:
    existing = f"columns: {', '.join(columns)}; columns of images: {', '.join(candidates) or 'none'}"
    if given is not None:
        if given not in candidates:
            raise ValueError(f"Got {kind}_column={given!r}, which is no column of images of the dataset ({existing}).")
        return given
    found = [name for name in candidates if name in usual_names]
    if len(found) != 1:
        raise ValueError(
            f"Found {len(found)} columns that could be the {kind} ({', '.join(found) or 'none'}), needed one; pass "
            f"{kind}_column=NAME ({existing}). In a metadata.jsonl, names of such columns end in _file_name."
        )
    return found[0]
