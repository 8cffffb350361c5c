"""Which photographs a command was given, what their results are called, and which of them this process takes."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .photo_files import PHOTO_SUFFIXES

# File that a photograph from standard input is kept in while it is segmented; its results are called like that.
STANDARD_INPUT = "stdin"
# What results of `depict segment` are called: the photograph's name with this in place of its suffix.
RESULT_SUFFIXES = {
    "overlay": "_overlay.png",
    "png": "_labels.png",
    "npy": "_labels.npy",
    "coco": "_coco.json",
    "geojson": ".geojson",
}
# And what those of `depict segment --confidence` are.
CONFIDENCE_SUFFIXES = {
    "confidence": "_confidence.png",
    "margin": "_margin.png",
    "confidence_picture": "_confidence_picture.png",
}


@dataclass(frozen=True)
class Photograph:
    """One photograph among those given.

    Attributes:
        path: Path of the file.
        target: Path of its results, without their suffixes.
        number: Its place among all photographs of the run, from 1, whichever process takes it.
    """

    path: Path
    target: Path
    number: int

    @property
    def name(self) -> str:
        """What to call it towards the user: its path, or - for standard input."""
        return "-" if self.path.name == STANDARD_INPUT else str(self.path)

    def result(self, kind: str) -> Path:
        """Say where its result of this kind goes, a key of `RESULT_SUFFIXES` or `CONFIDENCE_SUFFIXES`."""
        return self.target.with_name(self.target.name + (RESULT_SUFFIXES | CONFIDENCE_SUFFIXES)[kind])


def find_photographs(
    paths: Iterable[Path], output: Path, kinds: Sequence[str], recursive: bool = False
) -> list[Photograph]:
    """Find image files as given, and those in folders, sorted; each file once.

    Results of what lies in sub-folders go to sub-folders of the same names. Photographs of one name in one of these are
    numbered.

    Args:
        paths: Files and folders.
        output: Folder for results. What lies in it is not taken where it lies inside a folder that is searched.
        kinds: The results wanted, keys of `RESULT_SUFFIXES` or `CONFIDENCE_SUFFIXES`.
        recursive: Whether sub-folders are searched too.

    Raises:
        ValueError: If a folder holds no image files, or a photograph would be overwritten by a result.
    """
    found: dict[Path, Path] = {}
    for path, folder in _expand(paths, output, recursive):
        found.setdefault(path, folder)
    photographs: list[Photograph] = []
    # Names that differ only in case are one file on some systems.
    taken: set[tuple[Path, str]] = set()
    for path, folder in found.items():
        stem, count = path.stem, 1
        while (folder, stem.casefold()) in taken:
            count += 1
            stem = f"{path.stem}_{count}"
        taken.add((folder, stem.casefold()))
        photographs.append(Photograph(path, output / folder / stem, len(photographs) + 1))
    originals = {each.path.resolve() for each in photographs}
    for each in photographs:
        for kind in kinds:
            if each.result(kind).resolve() in originals:
                raise ValueError(
                    f"{each.result(kind)} is one of the photographs and would be overwritten; change --output."
                )
    return photographs


def _expand(paths: Iterable[Path], output: Path, recursive: bool) -> Iterator[tuple[Path, Path]]:
    """Find image files, and the folders that they lie in, seen from the folder that was given."""
    results = output.resolve()
    for root in paths:
        if not root.is_dir():
            yield root, Path()
            continue
        found = False
        for folder, subfolders, names in os.walk(root):
            # Those of an earlier run are no photographs; a folder searched on purpose is.
            subfolders[:] = sorted(each for each in subfolders if recursive and Path(folder, each).resolve() != results)
            for name in sorted(names):
                if Path(name).suffix.lower() in PHOTO_SUFFIXES:
                    found = True
                    yield Path(folder, name), Path(folder).relative_to(root)
        if not found:
            hint = "" if recursive else "; sub-folders are searched with --recursive"
            raise ValueError(f"{root} holds no image files ({' '.join(PHOTO_SUFFIXES)}){hint}.")


@contextmanager
def standard_input() -> Iterator[Path]:
    """Keep the photograph that comes by standard input, as a file for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STANDARD_INPUT
        path.write_bytes(sys.stdin.buffer.read())
        yield path


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` or `accelerate launch` started, on this machine and others.

    Attributes:
        rank: Its number, from 0.
        count: Number of processes; 1 where there was no launcher.
        local_rank: Its number, from 0, among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def launched(cls) -> "Processes":
        """Read from the environment what the launcher says."""
        if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
            return cls()
        return cls(*(int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    def share(self, photographs: Sequence[Photograph]) -> Sequence[Photograph]:
        """Return every `count`-th photograph, starting with this process's own."""
        return photographs[self.rank :: self.count]

    def total(self, number: int) -> int:
        """Return the sum of the numbers of all processes, once all have come here.

        A launcher that sees a process end with an error ends the others; so they wait for each other, as long as it
        takes.
        """
        if self.count == 1:
            return number
        from datetime import timedelta

        import torch

        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        numbers = torch.tensor(number)
        torch.distributed.all_reduce(numbers)
        torch.distributed.destroy_process_group()
        return int(numbers)
