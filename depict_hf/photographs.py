"""Which photographs a command was given, what their results are called, and which of them this process takes."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread

from .photo_files import PHOTO_SUFFIXES, shown

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
        """What to call it in records: its path, or - for standard input."""
        return "-" if self.path.name == STANDARD_INPUT else str(self.path)

    @property
    def shown(self) -> str:
        """What to call it towards the user: its name on one line that every terminal can show."""
        return shown(self.name)

    def result(self, kind: str) -> Path:
        """Say where its result of this kind goes, a key of `RESULT_SUFFIXES` or `CONFIDENCE_SUFFIXES`."""
        return self.target.with_name(self.target.name + (RESULT_SUFFIXES | CONFIDENCE_SUFFIXES)[kind])


def find_photographs(
    paths: Iterable[Path], output: Path, kinds: Sequence[str], recursive: bool = False
) -> list[Photograph]:
    """Find image files as given, and those in folders, sorted; each file once.

    Results of what lies in sub-folders go to sub-folders of the same names. Photographs of one name in one of these are
    numbered. What is named like a photograph but is none, such as a folder, a broken link or a pipe, counts as one: it
    fails when it is read, and no other is lost by it.

    Args:
        paths: Files and folders.
        output: Folder for results. What lies in it is not taken where it lies inside a folder that is searched.
        kinds: The results wanted, keys of `RESULT_SUFFIXES` or `CONFIDENCE_SUFFIXES`.
        recursive: Whether sub-folders are searched too.

    Raises:
        ValueError: If nothing but a folder without image files is given, or a photograph would be overwritten by a
            result.
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
    # `Path.resolve` raises on links that lead to themselves.
    originals = {os.path.realpath(each.path) for each in photographs}
    for each in photographs:
        for kind in kinds:
            if os.path.realpath(each.result(kind)) in originals:
                name = shown(each.result(kind))
                raise ValueError(f"{name} is one of the photographs and would be overwritten; change --output.")
    return photographs


def _expand(paths: Iterable[Path], output: Path, recursive: bool) -> Iterator[tuple[Path, Path]]:
    """Find image files, and the folders that they lie in, seen from the folder that was given."""
    results = os.path.realpath(output)
    roots = list(paths)
    for root in roots:
        if not os.path.isdir(root):
            yield root, Path()
            continue
        found = False
        unreadable: list[OSError] = []
        for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
            if not recursive:
                names += subfolders  # Those named like a photograph are told of.
            # Those of an earlier run are no photographs; a folder searched on purpose is.
            subfolders[:] = sorted(
                each for each in subfolders if recursive and os.path.realpath(Path(folder, each)) != results
            )
            for name in sorted(names):
                if Path(name).suffix.lower() in PHOTO_SUFFIXES:
                    found = True
                    yield Path(folder, name), Path(folder).relative_to(root)
        for error in unreadable:
            found = True
            yield Path(error.filename), Path()
        if not found and len(roots) > 1:
            yield root, Path()
        elif not found:
            hint = "" if recursive else "; sub-folders are searched with --recursive"
            raise ValueError(f"{shown(root)} holds no image files ({' '.join(PHOTO_SUFFIXES)}){hint}.")


@contextmanager
def standard_input() -> Iterator[Path]:
    """Keep the photograph that comes by standard input, as a file for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STANDARD_INPUT
        if sys.stdin is None:
            raise ValueError("Got - for standard input, which is closed; name an image file, or pass one to it.")
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
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

    def total(self, number: int, stopped: Callable[[], bool] = lambda: False) -> int | None:
        """Return the sum of the numbers of all processes, once all have come here.

        A launcher that sees a process end with an error ends the others; so they wait for each other, as long as it
        takes.

        Args:
            stopped: Asked again and again while others are waited for; None is returned when it says so.
        """
        if self.count == 1:
            return number
        total: Future = Future()
        # PyTorch waits where no signal would be handled.
        Thread(target=_add_up, args=(number, total), daemon=True).start()
        while not wait([total], timeout=0.1).done:
            if stopped():
                return None
        return total.result()


def _add_up(number: int, total: Future) -> None:
    import torch

    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        numbers = torch.tensor(number)
        torch.distributed.all_reduce(numbers)
        torch.distributed.destroy_process_group()
    except RuntimeError as error:
        total.set_exception(OSError(f"another process ended before it had come to its end ({error})."))
    else:
        total.set_result(int(numbers))
