"""Checkpoints that are whole or not there, which of them a run continues from, and which run may continue.

A checkpoint is written in `unfinished/`, synchronised with the disk, marked with the sizes of its files and then moved
to its place at once. What a killed run leaves in `unfinished/` is deleted when the next one begins to train.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

from ..recipe import SECTIONS, Recipe

# Written into a checkpoint's folder after everything else.
COMPLETE = "complete.json"
UNFINISHED = "unfinished"
# What may change between the sessions of one run without changing its result.
FREE_FIELDS = (
    "num_workers",
    "evaluate_every_epochs",
    "save_every_steps",
    "sample_pictures",
    "report_to",
    "test_split",
    "final_window_stride",
    "final_size",
    "final_long_side_factor",
)


def mark_complete(folder: Path) -> None:
    """Say that everything of the checkpoint in `folder` has been written, after seeing to it that it is on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE]
    for path in files:
        _synchronize(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / COMPLETE).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    _synchronize(folder / COMPLETE)
    _synchronize(folder)


def is_complete(folder: Path) -> bool:
    """Whether a folder has the mark of `mark_complete` and all files that it lists, at their sizes."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def publish(folder: Path, output: Path, keep: int) -> None:
    """Mark a checkpoint that has been written elsewhere, move it into `output`, and delete the oldest ones there.

    Args:
        folder: Of the checkpoint, on the same file system.
        output: Of the run.
        keep: How many checkpoints stay.
    """
    mark_complete(folder)
    place = output / folder.name
    if place.exists():
        _delete(place)
    folder.rename(place)
    _synchronize(output)
    steps = checkpoint_folders(output)
    for step in sorted(steps)[:-keep]:
        _delete(steps[step])


def discard_unfinished(output: Path) -> None:
    """Delete the folder that checkpoints are written in, with what a killed run left behind there."""
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def checkpoint_folders(output: Path) -> dict[int, Path]:
    """Folders of checkpoints in `output`, whole or not, by their optimiser step."""
    folders = {}
    for folder in output.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and folder.is_dir():
            folders[int(match[1])] = folder
    return folders


def find_checkpoint(output: Path, resume: bool) -> str | None:
    """Folder of the last whole checkpoint in `output`; None where there is none.

    One that is not whole, such as a copy that was broken off, is passed over with a line on stderr.

    Raises:
        ValueError: If there is a checkpoint, whole or not, but the run is not to be resumed.
    """
    folders = checkpoint_folders(output)
    if folders and not resume:
        raise ValueError(
            f"{output} holds {folders[max(folders)].name}; pass --resume to continue, or choose another folder."
        )
    for step in sorted(folders, reverse=True):
        if is_complete(folders[step]):
            return str(folders[step])
        print(f"{folders[step]} is incomplete and is passed over.", file=sys.stderr)
    return None


def check_same_run(recipe: Recipe, path: Path) -> None:
    """Refuse to continue a run by another recipe.

    Args:
        path: The run's `recipe.json`; nothing is checked where it does not exist.

    Raises:
        ValueError: If a field that the result depends on has another value there.
    """
    if not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    changed = {
        name: values for name, values in changed_fields(saved, as_json(recipe)).items() if name not in FREE_FIELDS
    }
    if changed:
        values = "; ".join(f"{name}={now!r}, there {before!r}" for name, (before, now) in changed.items())
        raise ValueError(f"Got --resume with another recipe than in {path}: {values}. Use the same, or another folder.")


def changed_fields(before: dict, now: dict) -> dict[str, list]:
    """Values before and now of the fields that differ, by their short names.

    Those that `before`, of a run that began with an earlier version, lacks had their default.
    """
    defaults = {
        field.name: json.loads(json.dumps(field.default))
        for kind in SECTIONS.values()
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }
    before, now = defaults | _without_sections(before), _without_sections(now)
    return {name: [before.get(name), value] for name, value in now.items() if before.get(name) != value}


def as_json(recipe: Recipe) -> dict:
    """The recipe's fields as a JSON file gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _without_sections(recipe: dict) -> dict:
    """All fields of a recipe's JSON in one dict; recipes had no sections once."""
    flat = {}
    for name, value in recipe.items():
        flat |= value if name in SECTIONS else {name: value}
    return flat


def _delete(folder: Path) -> None:
    """Take a checkpoint out of sight at once, and then delete its files."""
    hidden = folder.parent / UNFINISHED / f"{folder.name}.deleted"
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _synchronize(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
