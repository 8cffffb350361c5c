"""A user's own annotations in usual formats, found by themselves: photographs and label maps of ids, by split."""

from collections.abc import Callable

from .coco import find_coco
from .colors import resolve_colors
from .cvat import find_cvat
from .found import Found, Tree
from .labelme import find_labelme
from .pairs import find_pairs
from .voc import find_voc

# Photographs and label maps in folders are looked for last: other formats have such folders, too.
_FORMATS = (find_voc, find_coco, find_cvat, find_labelme)

SUPPORTED = (
    "images/ and masks/ with equal names (also train/, val/, test/ above or below them)",
    "a metadata.jsonl with file_name and label_file_name",
    "Pascal VOC (JPEGImages, SegmentationClass)",
    "COCO (annotations/*.json with polygons, RLE or panoptic PNGs)",
    "LabelMe (a JSON file for each photograph)",
    "CVAT (annotations.xml, or its segmentation masks with labelmap.txt)",
    "a data set in Hub layout, or one saved to disk",
    "ADE20K, Cityscapes, Pascal Context or CamVid as their owners lay them out",
)

__all__ = ["SUPPORTED", "Found", "Tree", "describe_unknown", "find_format", "resolve_colors"]


def find_format(tree: Tree) -> Found | None:
    """Find what a folder holds, if it is in one of the formats of this package; None otherwise.

    Raises:
        ImportError: If reading the format needs pycocotools, and it is not installed.
        ValueError: If it is in several formats, or incomplete; the message says what was found and what to do.
    """
    found = [each for each in (_look(find, tree) for find in _FORMATS) if each is not None]
    if len(found) > 1:
        names = " and ".join(each.layout for each in found)
        raise ValueError(
            f"{tree.folder} holds annotations in several layouts: {names}. Which of them is meant cannot be told; move "
            "the others out of the folder, or pass the folder that holds only one."
        )
    return found[0] if found else find_pairs(tree)


def _look(find: Callable[[Tree], Found | None], tree: Tree) -> Found | None:
    """Look for one format; what its annotations lack, or have of another type, is no mistake of ours.

    Raises:
        ValueError: If they are not as the format has them.
    """
    try:
        return find(tree)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError) as error:
        name = find.__name__.removeprefix("find_")
        raise ValueError(
            f"{tree.folder} has annotations that look like {name}, but are not as that format has them "
            f"({type(error).__name__}: {error}); export them again, or move them out of the folder."
        ) from error


def describe_unknown(tree: Tree) -> str:
    """Write an error's text: what a folder holds, what is supported, and how to write the simplest."""
    supported = "".join(f"\n  {each}" for each in SUPPORTED)
    return (
        f"Found no photographs with label maps in {tree.folder}.\nIt holds {tree.summary()}.\nSupported are:"
        f"{supported}\nThe simplest: put photographs into images/ and, for each, a PNG of the same name into "
        "masks/, of the same size, whose pixels are the numbers of the classes (0, 1, 2, ...; 255 where nothing is "
        "known); name the classes in classes.txt beside these folders, one a line."
    )
