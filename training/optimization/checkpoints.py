"""Checkpoints that are known to be whole, which of them a run continues from, and which run may continue.

A checkpoint is written by `Trainer`, synchronised with the disk, and then marked with the sizes of its files: one
without that mark counts as not there. What a killed run leaves of one is deleted when the next one begins to train.
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

from ..recipe import SECTIONS, Recipe
from .averaging import WeightAverage

KEPT_CHECKPOINTS = 2
# Written into a checkpoint's folder after everything else.
COMPLETE = "complete.json"
DELETED = "deleted"
# What operating systems answer where a file system cannot synchronise folders, such as some network, FUSE and Windows
# shares. Files, which are synchronised one by one, do not end up there; what a power failure might cost is the name of
# the newest checkpoint, and a run then continues from the one before.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# What may change between the sessions of one run without changing its result.
FREE_FIELDS = (
    "num_workers",
    "evaluate_every_epochs",
    "save_every_steps",
    "sample_pictures",
    "report_to",
    "push_to_hub",
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


class CheckpointKeeper(TrainerCallback):
    """Completes every checkpoint that `Trainer` has written, and deletes the oldest ones.

    Args:
        output: Folder of the run.
        accelerator: The accelerator of the processes, all of which write parts of a checkpoint.
        average: Moving average of the weights, which becomes part of the checkpoint.
        every_steps: Optimiser steps after each of which a checkpoint is written, besides those that the arguments of
            `Trainer` ask for.
    """

    def __init__(
        self,
        output: Path,
        accelerator: Accelerator,
        average: WeightAverage | None = None,
        every_steps: int | None = None,
    ):
        self.output = output
        self.accelerator = accelerator
        self.average = average
        self.every_steps = every_steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.every_steps and state.global_step % self.every_steps == 0:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = self.output / f"checkpoint-{state.global_step}"
            if self.average:
                self.average.save(folder)
            mark_complete(folder)
            _synchronize(self.output)
            delete_oldest(self.output, KEPT_CHECKPOINTS, state.best_global_step)
        self.accelerator.wait_for_everyone()


def delete_oldest(output: Path, keep: int, best_step: int | None = None) -> None:
    """Delete checkpoints except the last `keep` ones and that of `best_step`."""
    steps = checkpoint_folders(output)
    for step in sorted(steps)[:-keep]:
        if step != best_step:
            _delete(steps[step])


def discard_unfinished(output: Path) -> None:
    """Delete checkpoints that are not whole, which a killed run left behind in `output`."""
    for folder in checkpoint_folders(output).values():
        if not is_complete(folder):
            _delete(folder)
    # Earlier versions wrote checkpoints in a folder "unfinished".
    for name in (DELETED, "unfinished"):
        shutil.rmtree(output / name, ignore_errors=True)


def checkpoint_folders(output: Path) -> dict[int, Path]:
    """Find the folders of checkpoints in `output`, whole or not, by their optimiser step."""
    folders = {}
    for folder in output.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and folder.is_dir():
            folders[int(match[1])] = folder
    return folders


def find_checkpoint(output: Path, resume: bool) -> str | None:
    """Find the folder of the last whole checkpoint in `output`; None where there is none.

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


def check_same_run(recipe: Recipe, path: Path, circumstances: Mapping[str, Any] | None = None) -> None:
    """Refuse to continue a run by another recipe, or in other circumstances.

    Args:
        path: The run's `recipe.json`; nothing is checked where it does not exist.
        circumstances: What else the result depends on, by its name there, as JSON gives it back: the data and the
            processes. What the file does not have, being of an earlier version, is not checked.

    Raises:
        ValueError: If something that the result depends on has another value there.
    """
    if not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    free = free_fields(recipe)
    changed = {
        name: values for name, values in changed_fields(saved["recipe"], as_json(recipe)).items() if name not in free
    }
    for name, now in (circumstances or {}).items():
        if saved.get(name, now) != now:
            changed[name] = [saved[name], now]
    if changed:
        values = "; ".join(f"{name}={now!r}, there {before!r}" for name, (before, now) in changed.items())
        raise ValueError(
            f"Got --resume with something else than in {path}: {values}. Continue with the same, or begin in another "
            "folder, there from these weights with start_from=CHECKPOINT if they are wanted."
        )


def free_fields(recipe: Recipe) -> set[str]:
    """Return the fields of a recipe that may change between the sessions of one run without changing its result."""
    free = set(FREE_FIELDS)
    if recipe.data.streaming:
        free.remove("num_workers")  # each of them reads a part of the stream
    if recipe.evaluation.keep_best or recipe.evaluation.early_stopping:
        free.remove("evaluate_every_epochs")
    return free


def changed_fields(before: dict, now: dict) -> dict[str, list]:
    """Return the values before and now of the fields that differ, by their short names.

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
    """Return the recipe's fields as a JSON file gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _without_sections(recipe: dict) -> dict:
    """Gather all fields of a recipe's JSON in one dict; recipes had no sections once."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        flat |= value if name in SECTIONS else {name: value}
    return flat


def _delete(folder: Path) -> None:
    """Take a checkpoint out of sight at once, and then delete its files."""
    hidden = folder.parent / DELETED / folder.name
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _synchronize(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of files, to the disk.

    Raises:
        OSError: If it cannot, unless `path` is a folder on a file system that has no such operation for folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)
