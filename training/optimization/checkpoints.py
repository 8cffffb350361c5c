"""Checkpoints that are known to be whole, and which of them a run continues from.

A checkpoint is written by `Trainer`, synchronised with the disk, and then marked with the sizes and SHA-256 sums of its
files: one without that mark counts as not there, and one whose files are others by now is passed over. What a killed
run leaves of one is deleted when the next one begins to train.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from depict_hf.writing import synchronize, write_json

from .averaging import WeightAverage
from .same_run import FREE_FIELDS, as_json, changed_fields, check_same_run, free_fields

__all__ = [
    "COMPLETE",
    "DELETED",
    "FREE_FIELDS",
    "KEPT_CHECKPOINTS",
    "CheckpointKeeper",
    "as_json",
    "changed_fields",
    "changed_file",
    "check_output",
    "check_same_run",
    "checkpoint_folders",
    "delete_oldest",
    "discard_unfinished",
    "find_checkpoint",
    "free_fields",
    "is_complete",
    "last_good",
    "mark_complete",
    "warn_once",
]

KEPT_CHECKPOINTS = 2
# Written into a checkpoint's folder after everything else.
COMPLETE = "complete.json"
DELETED = "deleted"
_READ_BYTES = 2**20
# What to do where numbers are not finite.
REMEDY = (
    "Lower learning_rate, add warmup_steps, clip gradients with max_grad_norm, or choose another precision, and start "
    "a new run, from those weights with start_from=FOLDER."
)


def mark_complete(folder: Path) -> None:
    """Say that everything of the checkpoint in `folder` has been written, after seeing to it that it is on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != COMPLETE]
    for path in files:
        synchronize(path)
    facts = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    write_json(facts, folder / COMPLETE)
    synchronize(folder)


def is_complete(folder: Path) -> bool:
    """Whether a folder has the mark of `mark_complete` and all files that it lists, at their sizes."""
    facts = _marked(folder)
    return facts is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, (size, _) in facts.items()
    )


def changed_file(folder: Path) -> str | None:
    """Find a file of a complete checkpoint that is not what was written, by its checksum, which reads all of them.

    Returns:
        Its name; None where all are as they were, or the checkpoint is of an earlier version without checksums.
    """
    facts = _marked(folder) or {}
    return next((name for name, (_, sha256) in facts.items() if sha256 and _sha256(folder / name) != sha256), None)


def _marked(folder: Path) -> dict[str, tuple[int, str | None]] | None:
    """Read the size and checksum of each file that the mark of a checkpoint lists; None where there is no such mark."""
    try:
        facts = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        # Earlier versions wrote sizes alone.
        return {
            name: (each, None) if isinstance(each, int) else (int(each["bytes"]), str(each["sha256"]))
            for name, each in facts.items()
        }
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None  # not there, or damaged itself


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


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

    def on_save(self, args, state, control, model: nn.Module | None = None, **kwargs) -> None:
        """Mark the checkpoint as whole.

        Raises:
            FloatingPointError: If its weights are not finite, so that it is none to go on from.
        """
        if model is not None:
            self._check_weights(model, state.global_step)
        self.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = self.output / f"checkpoint-{state.global_step}"
            if self.average:
                self.average.save(folder)
            mark_complete(folder)
            synchronize(self.output)
            delete_oldest(self.output, KEPT_CHECKPOINTS, state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _check_weights(self, model: nn.Module, step: int) -> None:
        weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        # Of a model that the processes share (FSDP), each looks at its part.
        local = [getattr(each, "_local_tensor", each).detach() for each in weights.values()]
        finite = torch.stack([each.isfinite().all() for each in local]) if local else torch.ones(1)
        wrong = self.accelerator.reduce((~finite).sum().float())
        if wrong:
            names = [name for name, each in zip(weights, finite.tolist(), strict=False) if not each]
            raise FloatingPointError(
                f"{int(wrong)} of the weights' tensors are not finite after optimiser step {step}"
                f"{', such as ' + names[0] if names else ''}; {last_good(self.output)}. {REMEDY}"
            )


def last_good(output: Path) -> str:
    """Say which checkpoint in `output` is the last whole one."""
    whole = [step for step, folder in checkpoint_folders(output).items() if is_complete(folder)]
    if not whole:
        return "no checkpoint has been written yet"
    return f"the weights of step {max(whole)} are in {output}/checkpoint-{max(whole)}"


def delete_oldest(output: Path, keep: int, best_step: int | None = None) -> None:
    """Delete checkpoints except the last `keep` ones and that of `best_step`."""
    steps = checkpoint_folders(output)
    for step in sorted(steps)[:-keep]:
        if step != best_step:
            _delete(steps[step])


def check_output(output: Path, told: bool) -> None:
    """Refuse a folder with a trained model, which a run that ends there would replace, unless that was asked for.

    Checkpoints are what `find_checkpoint` asks for.

    Raises:
        ValueError: If there is a model, and nobody was told so.
    """
    if not told and any(output.glob("model*.safetensors*")):
        raise ValueError(
            f"{output} holds a trained model; pass --resume to continue its run, --overwrite to replace it, or choose "
            "another folder."
        )


def discard_unfinished(output: Path, resumed_from: str | None = None, all_of_them: bool = False) -> None:
    """Delete checkpoints that are not whole, which a killed run left behind in `output`.

    Args:
        output: Folder of the run.
        resumed_from: Checkpoint that the run goes on from, as `find_checkpoint` found it; later ones, which it passed
            over, are deleted, too.
        all_of_them: Whether all are deleted, as the run is to be replaced.
    """
    last = None if resumed_from is None else _step_of(Path(resumed_from))
    for step, folder in checkpoint_folders(output).items():
        if all_of_them or not is_complete(folder) or (last is not None and step > last):
            _delete(folder)
    # Earlier versions wrote checkpoints in a folder "unfinished".
    for name in (DELETED, "unfinished"):
        shutil.rmtree(output / name, ignore_errors=True)


def checkpoint_folders(output: Path) -> dict[int, Path]:
    """Find the folders of checkpoints in `output`, whole or not, by their optimiser step."""
    steps = {folder: _step_of(folder) for folder in output.glob("checkpoint-*") if folder.is_dir()}
    return {step: folder for folder, step in steps.items() if step is not None}


def _step_of(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def find_checkpoint(output: Path, resume: bool) -> str | None:
    """Find the folder of the last whole checkpoint in `output`; None where there is none.

    One that is not whole, such as a copy that was broken off, or whose files are others than were written, is passed
    over with a line on stderr.

    Raises:
        ValueError: If there is a checkpoint, whole or not, but the run is not to be resumed.
    """
    folders = checkpoint_folders(output)
    if folders and not resume:
        raise ValueError(
            f"{output} holds {folders[max(folders)].name}; pass --resume to continue, --overwrite to replace the run, "
            "or choose another folder."
        )
    for step in sorted(folders, reverse=True):
        fault = "is incomplete" if not is_complete(folders[step]) else None
        changed = None if fault else changed_file(folders[step])
        if changed:
            fault = f"is damaged ({changed} is not what was written)"
        if fault is None:
            return str(folders[step])
        warn_once(f"{folders[step]} {fault} and is passed over.")
    if folders:
        warn_once(f"No whole checkpoint is left in {output}; the run begins anew.")
    return None


def warn_once(text: str) -> None:
    """Print to stderr in the first of all processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _delete(folder: Path) -> None:
    """Take a checkpoint out of sight at once, and then delete its files; on a full disk, in the reverse order."""
    hidden = folder.parent / DELETED / folder.name
    try:
        hidden.parent.mkdir(exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        (folder / COMPLETE).unlink(missing_ok=True)
        hidden = folder
    shutil.rmtree(hidden)
