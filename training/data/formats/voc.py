"""Pascal VOC, and CVAT's segmentation masks, which are laid out like it with a table of colours."""

import re
from pathlib import Path

from ..imagefolder import SPLIT_NAMES, find_class_names, read_text
from .colors import resolve_colors
from .found import Found, Tree, listed

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# labelme writes the maps to a folder of their own beside arrays.
_LABEL_FOLDERS = ("SegmentationClassPNG", "SegmentationClass")
_BORDER = (224, 224, 192)


def find_voc(tree: Tree) -> Found | None:
    """Find `JPEGImages` and `SegmentationClass`; None where there is no such folder.

    Splits are the lists in `ImageSets/Segmentation`, of which `trainval` is used only where there is no `train`.

    Raises:
        ValueError: If several folders are laid out so, photographs or label maps are missing, or a list names others.
    """
    roots = list(dict.fromkeys(path.parent for path in tree.folders if path.name in _LABEL_FOLDERS))
    if not roots:
        return None
    if len(roots) > 1:
        raise ValueError(
            f"{tree.folder} holds {len(roots)} folders in Pascal VOC's layout "
            f"({listed([str(each) for each in roots])}); pass one of them."
        )
    [root] = roots
    label_folder = next(root / name for name in _LABEL_FOLDERS if (root / name).is_dir())
    labels = {path.relative_to(label_folder).with_suffix("").as_posix(): path for path in label_folder.rglob("*.png")}
    photographs = [path for path in tree.images if (root / "JPEGImages") in path.parents]
    images = {path.relative_to(root / "JPEGImages").with_suffix("").as_posix(): path for path in photographs}
    from_cvat = (root / "labelmap.txt").is_file()
    layout = "CVAT's segmentation masks" if from_cvat else "Pascal VOC"
    if not images or not labels:
        lacking = "photographs in JPEGImages" if not images else f"PNG label maps in {label_folder.name}"
        remedy = "export again with images saved" if from_cvat else "unpack the whole archive"
        raise ValueError(f"{root} looks like {layout}, but holds no {lacking}; {remedy}, or copy them there.")
    lists = _read_lists(root / "ImageSets" / "Segmentation")
    notes = []
    without = sorted(labels.keys() - images.keys())
    if without:
        notes.append(f"{len(without)} label maps without a photograph are left out: {listed(without)}")
    if not lists:
        lists = {"train": sorted(images.keys() & labels.keys())}
        unlabelled = sorted(images.keys() - labels.keys())
        if unlabelled:
            notes.append(f"{len(unlabelled)} photographs without a label map are left out: {listed(unlabelled)}")
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for split, names in lists.items():
        missing = [name for name in names if name not in images or name not in labels]
        if len(missing) == len(names):
            notes.append(f"split {split} is left out, as none of its {len(names)} label maps is there")
            continue
        if missing:
            raise ValueError(
                f"{root} looks like {layout}, but of {len(names)} photographs with label maps in its list of split "
                f"{split}, {len(missing)} are missing: {listed(missing)}. Add them, or remove their lines."
            )
        pairs[split] = [(images[name], labels[name]) for name in names]
    if not pairs:
        raise ValueError(
            f"{root} looks like {layout}, but no photograph has a label map of the same name, as {min(images)} has "
            "none; give both the same names."
        )
    colored = resolve_colors(root, [label for each in pairs.values() for _, label in each], ignored=[_BORDER])
    drawn = iter(colored.paths)
    pairs = {split: [(image, next(drawn)) for image, _ in each] for split, each in pairs.items()}
    voc_names = all(re.fullmatch(r"\d{4}_\d{6}", Path(name).name) for name in images)
    return Found(
        f"{layout} ({root})" if root != tree.folder else layout,
        pairs,
        colored.class_names or find_class_names(root) or tree.class_names(),
        suggested_names=VOC_CLASSES if voc_names else None,
        notes=(*notes, *colored.notes),
    )


def _read_lists(folder: Path) -> dict[str, list[str]]:
    """Names of photographs by split; a list whose name is no split's is taken for the only one if it is."""
    lists: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for path in (each for each in sorted(folder.glob("*.txt")) if each.is_file()):
        # Lists of single classes (`car_train.txt`) have a second column.
        names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
        split = SPLIT_NAMES.get(path.stem.lower())
        (others if split is None else lists)[split or path.stem] = list(dict.fromkeys(names))
    if not lists and others:
        name = next((each for each in ("trainval", "default") if each in others), next(iter(others)))
        lists = {"train": others[name]}
    return {name: lists[name] for name in ("train", "validation", "test") if lists.get(name)}
