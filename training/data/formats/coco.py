"""COCO: objects as polygons or run lengths, and panoptic PNGs of segment ids, drawn as label maps of classes."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from depict_hf.photo_files import read_image

from .found import Found, Tree, check_class_count, listed, refuse, split_of, words
from .rendering import Drawing, content_key, render, state_key
from .shapes import blank_map

BACKGROUND_NAMES = ("background", "_background_", "__background__", "bg")
_FARTHEST = 2**17  # pixels from the photograph's corner
# Files of other tasks beside those of segmentation; keypoints repeat the people among the instances.
_OTHER_TASKS = ("captions", "keypoints", "info", "unlabeled")


def find_coco(tree: Tree) -> Found | None:
    """Find JSON files with `images`, `annotations` and `categories`; None where there are none.

    Of one split, panoptic annotations are preferred to instances, as they label every pixel.

    Raises:
        ImportError: If there are polygons or run lengths, and pycocotools is not installed.
        ValueError: If files are of the same split or differ in categories, or photographs are missing.
    """
    if not tree.images:
        return None
    files: dict[bool, dict[str, list[tuple[Path, dict]]]] = {True: {}, False: {}}
    for path in tree.with_suffix(".json"):
        content = read_coco(path)
        if content is not None and not set(words(path.stem)) & set(_OTHER_TASKS):
            panoptic = any("segments_info" in each for each in content["annotations"][:1])
            split = split_of(tree.relative(path).with_suffix("").parts) or "train"
            files[panoptic].setdefault(split, []).append((path, content))
    panoptic = bool(files[True]) and _panoptic_folder(tree, *next(iter(files[True].values()))[0]) is not None
    by_split = files[panoptic] or files[True]
    if not by_split:
        return None
    for split, several in by_split.items():
        if len(several) > 1:
            names = ", ".join(str(tree.relative(path)) for path, _ in several)
            raise ValueError(
                f"{len(several)} COCO files, {names}, hold annotations of split {split}; merge them, keep one, or put "
                "train, val or test into their names."
            )
    sources = {split: several[0] for split, several in by_split.items()}
    categories = _categories(sources)
    if files[True] and not panoptic:
        path = next(iter(by_split.values()))[0][0]
        raise ValueError(f"{path} holds panoptic annotations, but the folder of its PNGs is not below {tree.folder}.")
    return _panoptic(tree, sources, categories) if panoptic else _instances(tree, sources, categories)


def read_coco(path: Path) -> dict | None:
    """Read what a COCO file holds; None where it is none, or its annotations have no segmentation at all.

    Raises:
        ValueError: If it has boxes only.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        return None
    if not all(isinstance(each, dict) for key in ("images", "annotations", "categories") for each in content[key]):
        return None
    kinds = [each for each in content["annotations"] if "segments_info" in each or each.get("segmentation")]
    if content["annotations"] and not kinds:
        if any("bbox" in each for each in content["annotations"]):
            raise ValueError(
                f"{path} is a COCO file with bounding boxes only; needed are polygons, run lengths (segmentation) or "
                "panoptic PNGs. Draw outlines, or move the file out of the folder."
            )
        return None
    return content


def _categories(sources: dict[str, tuple[Path, dict]]) -> dict[int, str]:
    """Names by id, the same in all files.

    Raises:
        ValueError: If files differ.
    """
    found: dict[int, str] = {}
    first = next(iter(sources.values()))[0]
    for path, content in sources.values():
        own = {each["id"]: each["name"] for each in content["categories"]}
        if found and own != found:
            raise ValueError(
                f"{first} and {path} have different categories; use one list of categories for all splits."
            )
        found = own
    return dict(sorted(found.items()))


def _instances(tree: Tree, sources: dict[str, tuple[Path, dict]], categories: dict[int, str]) -> Found:
    try:
        import pycocotools.mask
    except ImportError as error:
        path = next(iter(sources.values()))[0]
        raise ImportError(
            f"{path} holds COCO annotations, which pycocotools reads; install it with `pip install pycocotools` (it "
            "comes with the extra `train`)."
        ) from error
    background = next((key for key, name in categories.items() if name.lower() in BACKGROUND_NAMES), None)
    if background is None:
        names = ("background", *categories.values())
        classes = {key: index + 1 for index, key in enumerate(categories)}
    else:
        categories = {background: categories[background], **categories}
        names, classes = tuple(categories.values()), {key: index for index, key in enumerate(categories)}
    pairs, drawings, empty = {}, [], 0
    for split, (path, content) in sources.items():
        check_class_count(names, path)
        by_image: dict[object, list[dict]] = {}
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        photographs = _photographs(tree, path, content, split)
        key = content_key(path)
        for image in content["images"]:
            annotations = by_image.get(image["id"], [])
            empty += not annotations
            draw = partial(draw_instances, annotations, image["height"], image["width"], classes, pycocotools.mask)
            name = f"{path.name}, image {image['file_name']}"
            drawings.append(Drawing(name, ("coco", key, str(image["id"]), str(classes)), draw))
        pairs[split] = photographs
    drawn = iter(render(drawings))
    notes = [
        f"pixels of no object are class 0, {names[0]}; where objects overlap, the smaller one is on top; crowds "
        "(iscrowd) are of their class, below single objects"
    ]
    if empty:
        notes.append(f"{empty} photographs without any object are wholly {names[0]}")
    return Found(
        f"COCO polygons or run lengths ({_names(tree, sources)})",
        {split: [(image, next(drawn)) for image in images] for split, images in pairs.items()},
        names,
        notes=tuple(notes),
    )


def draw_instances(annotations: list[dict], height: int, width: int, classes: dict[int, int], coco_mask) -> np.ndarray:
    """Draw the objects of one photograph: crowds first, then large before small ones; elsewhere 0.

    Args:
        annotations: Annotations as COCO has them, each with `category_id` and `segmentation`.
        height, width: Size of the photograph, in pixels.
        classes: Class of each category.
        coco_mask: The module `pycocotools.mask`.

    Returns:
        Classes, uint8 `(height, width)`.

    Raises:
        ValueError: If an annotation has no outline, no known category, or another size.
    """
    labels = blank_map(height, width)
    masks = []
    for annotation in annotations:
        which = f"annotation {annotation.get('id')}"
        shape = annotation.get("segmentation")
        if annotation["category_id"] not in classes:
            raise ValueError(f"{which} has the category {annotation['category_id']}, which the file does not name")
        if not shape:
            raise ValueError(f"{which} has no outline; draw one, or remove it")
        if isinstance(shape, list):
            usable = [polygon for polygon in shape if len(polygon) >= 6]
            # The time that pycocotools takes for an edge grows with its length; NaN is no smaller number either.
            if not all(len(each) % 2 == 0 and all(map(_is_near, each)) for each in usable):
                raise ValueError(
                    f"{which} has a polygon whose coordinates are not pairs of numbers up to {_FARTHEST}; correct it"
                )
            if not usable:
                raise ValueError(f"{which} has a polygon of fewer than three points; correct or remove it")
            encoded = coco_mask.merge(coco_mask.frPyObjects(usable, height, width))
        elif list(shape["size"]) != [height, width]:
            raise ValueError(
                f"{which} is of {tuple(shape['size'])}, the photograph of {(height, width)} (height, width)"
            )
        else:
            # pycocotools would leave what run lengths do not reach as the memory was.
            packed = not isinstance(shape["counts"], list)
            runs = _unpacked(shape["counts"]) if packed else shape["counts"]
            if any(not isinstance(run, int) or run < 0 for run in runs):
                raise ValueError(f"{which} has run lengths that are no numbers of pixels; correct or remove it")
            if sum(runs) != height * width:
                raise ValueError(f"{which} has run lengths of {sum(runs)} pixels, needed {height * width}")
            encoded = shape if packed else coco_mask.frPyObjects(shape, *shape["size"])
        mask = coco_mask.decode(encoded).astype(bool)
        if mask.shape != (height, width):
            raise ValueError(f"{which} is of {mask.shape}, the photograph of {(height, width)} (height, width)")
        order = (not annotation.get("iscrowd", 0), -int(mask.sum()))
        masks.append((order, mask, classes[annotation["category_id"]]))
    for _, mask, label in sorted(masks, key=lambda each: each[0]):
        labels[mask] = label
    return labels


def _is_near(coordinate: object) -> bool:
    return isinstance(coordinate, (int, float)) and abs(coordinate) <= _FARTHEST


def _unpacked(counts: object) -> list[int]:
    """Return run lengths that are packed as text: 5 bits a character, from the fourth on as differences.

    Each is the difference from the last but one then.

    Raises:
        ValueError: If it is no such text.

    Source:
        `rleFrString`, common/maskApi.c in cocodataset/cocoapi.
    """
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"run lengths are {type(counts).__name__}, needed a list or text")
    text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    runs: list[int] = []
    value = bits = 0
    for character in text:
        piece = character - 48
        if not 0 <= piece < 64 or bits > 30:
            break
        value |= (piece & 31) << bits
        bits += 5
        if not piece & 32:
            value -= (piece & 16) << (bits - 4) if piece & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    else:
        if not bits:
            return runs
    raise ValueError("its text is no run lengths as COCO packs them; export it again")


def _panoptic(tree: Tree, sources: dict[str, tuple[Path, dict]], categories: dict[int, str]) -> Found:
    names = tuple(categories.values())
    classes = {key: index for index, key in enumerate(categories)}
    pairs, drawings, faults = {}, [], []
    for split, (path, content) in sources.items():
        check_class_count(names, path)
        folder = _panoptic_folder(tree, path, content)
        segments = {each["image_id"]: each for each in content["annotations"]}
        labelled = [image for image in content["images"] if image["id"] in segments]
        pairs[split] = _photographs(tree, path, content | {"images": labelled}, split)
        key = content_key(path)
        for image in labelled:
            annotation = segments[image["id"]]
            file = Path(os.path.abspath((folder or path.parent) / annotation["file_name"]))
            if Path(os.path.abspath(tree.folder)) not in file.parents or not file.is_file():
                faults.append(f"{tree.relative(path)}: there is no {file}")
                continue
            table = {each["id"]: classes.get(each["category_id"], -1) for each in annotation["segments_info"]}
            depends_on = ("panoptic", key, state_key(file))
            drawings.append(Drawing(str(file), depends_on, partial(draw_panoptic, file, table)))
    refuse(faults, f"{len(faults)} panoptic PNGs are missing; add them:")
    drawn = iter(render(drawings))
    return Found(
        f"COCO panoptic ({_names(tree, sources)})",
        {split: [(image, next(drawn)) for image in images] for split, images in pairs.items()},
        names,
        notes=("pixels of no segment are ignored",),
    )


def draw_panoptic(path: Path, classes: dict[int, int]) -> np.ndarray:
    """Return the classes of a PNG of segment ids, red + 256 green + 65536 blue: uint8 `(height, width)`, 255 for id 0.

    Args:
        path: Path of the PNG.
        classes: Class of each segment.

    Raises:
        ValueError: If the PNG has segments that are not listed, or of an unknown category.
    """
    pixels = np.array(read_image(path)[0].convert("RGB")).astype(np.int64)
    ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
    present, places = np.unique(ids, return_inverse=True)
    table = {0: 255} | classes
    unknown = [each for each in present.tolist() if table.get(each, -1) < 0]
    if unknown:
        raise ValueError(f"the segments {unknown[:5]} are not listed for it, or of no known category")
    return np.array([table[each] for each in present.tolist()], dtype=np.uint8)[places].reshape(ids.shape)


def _panoptic_folder(tree: Tree, path: Path, content: dict) -> Path | None:
    """Find the PNGs of a panoptic file: mostly in a folder of its name."""
    name = next((each["file_name"] for each in content["annotations"]), None)
    if name is None:
        return None
    found = [file for file in tree.images_by_name.get(Path(name).name, []) if file.as_posix().endswith(f"/{name}")]
    # Photographs may be PNGs of the same names, and other splits have such folders, too.
    split = split_of(tree.relative(path).with_suffix("").parts)
    for prefer in (
        lambda file: path.stem in file.parts,
        lambda file: "panoptic" in words(" ".join(tree.relative(file).parts[:-1])),
        lambda file: split_of(tree.relative(file).parts[:-1]) == split,
        lambda file: file.parent == path.parent,
    ):
        found = [file for file in found if prefer(file)] or found
    return found[0].parents[len(Path(name).parts) - 1] if found else None


def _photographs(tree: Tree, path: Path, content: dict, split: str) -> list[Path]:
    """Find the files of the images of a COCO file.

    Raises:
        ValueError: If some are missing, or several files have their name and none lies nearer than the others.
    """
    found, faults = [], []
    for image in content["images"]:
        name = image["file_name"]
        file = find_photograph(tree, name, path, split)
        if isinstance(file, str):
            faults.append(file)
        else:
            found.append(file)
    refuse(faults, f"{tree.relative(path)} names {len(faults)} photographs of {len(content['images'])} wrongly:")
    return found


def find_photograph(tree: Tree, name: str, annotations: Path, split: str | None) -> Path | str:
    """Find the file that annotations mean by a name, or say in a text why none can be told.

    A path that ends with the whole name is preferred, then one whose folders name the split, then one that lies
    beside the annotations; label maps are no photographs.
    """
    # Annotations written on Windows have its separators.
    name = name.replace("\\", "/")
    candidates = tree.images_by_name.get(Path(name).name, [])
    for prefer in (
        lambda file: file.as_posix().endswith(f"/{name}"),
        lambda file: not set(words(" ".join(tree.relative(file).parts[:-1]))) & {"panoptic", "mask", "masks", "labels"},
        lambda file: split_of(tree.relative(file).parts[:-1]) == split,
        lambda file: file.parent == annotations.parent,
    ):
        candidates = [file for file in candidates if prefer(file)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        return f"there is no photograph {name} below {tree.folder}; copy it there"
    return f"{name} could be {listed([str(tree.relative(each)) for each in candidates], 3)}; keep one of them"


def _names(tree: Tree, sources: dict[str, tuple[Path, dict]]) -> str:
    return listed([str(tree.relative(path)) for path, _ in sources.values()], 3)
