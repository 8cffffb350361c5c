"""What every format has in common: a folder's files, the words that name splits, and what was found."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..imagefolder import SPLIT_NAMES, find_class_names
from ..reading import LabelEncoding

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
SHOWN = 20


@dataclass(frozen=True)
class Found:
    """Photographs and label maps of a folder.

    Args:
        layout: What the folder was recognised as, in words.
        pairs: A photograph's and its label map's file, by split; without splits, all are in "train".
        class_names: Names in the order of ids; None where the folder does not say.
        suggested_names: Names that are likely, to be used where the ids fit and nobody says otherwise.
        encoding: Meaning of the ids; None where they are the classes, and 255 is ignored.
        notes: Sentences on rules that were applied and on files that were left out.
    """

    layout: str
    pairs: dict[str, list[tuple[Path, Path]]]
    class_names: tuple[str, ...] | None = None
    suggested_names: tuple[str, ...] | None = None
    encoding: LabelEncoding | None = None
    notes: tuple[str, ...] = ()


class Tree:
    """All files in a folder and below, in order; hidden ones and those of archives of macOS are left out.

    Links to folders are followed, each folder once. Pipes and devices, which reading would wait for, are no files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[Path] = []
        self.folders: list[Path] = [folder]
        seen = {os.path.realpath(folder)}
        for parent, folders, files in os.walk(folder, followlinks=True):
            inner = []
            for name in sorted(folders):
                real = os.path.realpath(os.path.join(parent, name))
                if not name.startswith((".", "__MACOSX")) and real not in seen:
                    seen.add(real)
                    inner.append(name)
            folders[:] = inner
            self.folders += [Path(parent, name) for name in inner]
            paths = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
            self.files += [path for path in paths if path.is_file() or path.is_symlink()]

    @cached_property
    def images(self) -> list[Path]:
        """Files with the suffix of a picture."""
        return [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]

    @cached_property
    def images_by_name(self) -> dict[str, list[Path]]:
        """Those of one name, in whichever folder."""
        by_name: dict[str, list[Path]] = {}
        for path in self.images:
            by_name.setdefault(path.name, []).append(path)
        return by_name

    def with_suffix(self, suffix: str) -> list[Path]:
        """Return the files of one suffix, in lower case with its dot."""
        return [path for path in self.files if path.suffix.lower() == suffix]

    def relative(self, path: Path) -> Path:
        """Return the path of a file below the folder."""
        return path.relative_to(self.folder)

    def class_names(self) -> tuple[str, ...] | None:
        """Names that a file in the folder gives.

        Raises:
            ValueError: If several such files differ, or one cannot be used.
        """
        return find_class_names(self.folder)

    def summary(self) -> str:
        """Say in one line which folders there are, and how many files of which kind they hold."""
        if not self.files:
            return "no files"
        by_folder: dict[Path, Counter] = {}
        for path in self.files:
            by_folder.setdefault(self.relative(path).parent, Counter())[path.suffix.lower() or "without suffix"] += 1
        parts = [
            f"{folder.as_posix()}/ ({', '.join(f'{count} {suffix}' for suffix, count in kinds.most_common(4))})"
            for folder, kinds in sorted(by_folder.items())
        ]
        return listed(parts, 10, "; ")


def words(name: str) -> list[str]:
    """Return the words of a file's or folder's name, in lower case: `JPEGImages_2007` has "jpeg" and "images"."""
    return [each.lower() for each in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def split_of(parts: Iterable[str]) -> str | None:
    """Return the split that the last of some names has among its words; None where none has."""
    found = [SPLIT_NAMES[word] for part in parts for word in words(part) if word in SPLIT_NAMES]
    return found[-1] if found else None


def listed(items: Sequence[str], shown: int = SHOWN, separator: str = ", ") -> str:
    """List the first of some texts, and say how many more there are."""
    more = f"{separator}and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(items[:shown]) + more


def without_area(shapes: Iterable[tuple[str, int]]) -> list[str]:
    """Write notes on shapes that no label map shows, such as lines, from kinds of shapes and their numbers."""
    counts: Counter[str] = Counter()
    for kind, number in shapes:
        counts[kind] += number
    return [f"{count} shapes of type {kind} have no area and are left out" for kind, count in counts.items()]


def refuse(faults: Sequence[str], introduction: str) -> None:
    """Raise `ValueError` with all faults, the first `SHOWN` of them in lines of their own, if there are any."""
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError(f"{introduction}{lines}{more}")


def check_class_count(names: Sequence[str], where: Path) -> None:
    """Refuse more classes than there are labels beside the ignored one.

    Raises:
        ValueError: If there are more than 255, or two of one name.
    """
    if len(names) > 255:
        raise ValueError(f"{where} names {len(names)} classes; at most 255 can be drawn, as label 255 is ignored.")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ValueError(f"{where} gives the name {doubled[0]!r} to two classes; rename one of them.")
