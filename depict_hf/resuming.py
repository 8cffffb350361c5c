"""Which photographs of `depict segment` are done already, and what becomes of results that are there."""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .interruption import command_text
from .photo_files import shown
from .photographs import Photograph
from .unfinished import delete_unfinished
from .writing import Existing, is_there, write_whole

# Files in the folder for results that list what a run with --overwrite is replacing. What they list and is older than
# they are is not done: a run that was broken off goes on with --resume like any other.
REPLACING = ".replacing-"


@dataclass(frozen=True)
class Results:
    """The results that a run writes.

    Args:
        photographs: Those that this process takes.
        kinds: Results of each of them, keys of `RESULT_SUFFIXES` or `CONFIDENCE_SUFFIXES`.
        output: Folder for results.
    """

    photographs: Sequence[Photograph]
    kinds: Sequence[str]
    output: Path

    def of(self, photograph: Photograph) -> list[Path]:
        """Return where the results of a photograph go."""
        return [photograph.result(kind) for kind in self.kinds]

    def choose(self, resume: bool = False, overwrite: bool = False) -> list[tuple[Photograph, Existing]]:
        """Choose the photographs to be segmented, each with what `writing.write_all` does with results there.

        What killed runs left in the folders for results is deleted.

        Args:
            resume: Whether photographs are left out whose results are all there; of others, results there are kept
                unless a run that was broken off was replacing them.
            overwrite: Whether results that are there are replaced.

        Raises:
            ValueError: If results are there, and neither was asked for.
        """
        delete_unfinished({self.output, *(each.target.parent for each in self.photographs)})
        if overwrite:
            return [(each, "replace") for each in self.photographs]
        if resume:
            old = self._old()
            left = [each for each in self.photographs if not self._is_done(each, old)]
            return [(each, "keep" if old.isdisjoint(self.of(each)) else "replace") for each in left]
        there = [next(filter(_is_result, self.of(each)), None) for each in self.photographs]
        found = [path for path in there if path is not None]
        if found:
            raise ValueError(
                f"{shown(self.output)} holds results of {len(found)} of these {len(there)} photographs, such as "
                f"{shown(found[0])}; add --resume to leave out those that are done, or --overwrite to replace them."
            )
        return [(each, "refuse") for each in self.photographs]

    def num_done(self) -> int:
        """Count the photographs whose results are all there, and not to be replaced."""
        old = self._old()
        return sum(self._is_done(each, old) for each in self.photographs)

    def begin_to_replace(self) -> None:
        """Note for a run that goes on after this one which results are to be replaced."""
        there = [str(path) for each in self.photographs for path in self.of(each) if _is_result(path)]
        if there:
            names = [os.path.relpath(path, self.output) for path in there]
            write_whole(json.dumps(names), self.output / f"{REPLACING}{os.getpid()}-{secrets.token_hex(6)}")

    def end(self) -> None:
        """Delete notes of `begin_to_replace` as far as all that they list was replaced, or tried by this run."""
        tried = {path for each in self.photographs for path in self.of(each)}
        for note, old in self._notes():
            if not old - tried:
                note.unlink(missing_ok=True)

    def _is_done(self, photograph: Photograph, old: set[Path]) -> bool:
        paths = self.of(photograph)
        return all(path.is_file() for path in paths) and old.isdisjoint(paths)

    def _old(self) -> set[Path]:
        """Find results that a run which was broken off was to replace and did not."""
        return {path for _, old in self._notes() for path in old}

    def _notes(self) -> Iterator[tuple[Path, set[Path]]]:
        """Read notes of `begin_to_replace`; yield each with what it lists and is older than it is."""
        for note in sorted(self.output.glob(f"{REPLACING}*")):
            try:
                listed = [self.output / name for name in json.loads(note.read_bytes())]
                began = note.stat().st_mtime_ns
            except FileNotFoundError:  # Another run has just ended.
                continue
            yield note, {path for path in listed if path.is_file() and path.stat().st_mtime_ns < began}


@dataclass(frozen=True)
class Outcome:
    """What became of the photographs of a run of `depict segment`.

    Attributes:
        num_failed: Those that could not be read, or whose results could not be written.
        full: Why a result was not written where the disk is full, which ended the run; else None.
    """

    num_failed: int = 0
    full: OSError | None = None


def how_to_go_on(arguments: Sequence[str]) -> str:
    """Write the command that goes on where one with these arguments, the first of which is `segment`, was stopped."""
    rest = [each for each in arguments[1:] if each not in ("--overwrite", "--resume")]
    return command_text(["depict", "segment", "--resume", *rest])


def _is_result(path: Path) -> bool:
    return is_there(path) and not path.is_dir()
