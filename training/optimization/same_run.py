"""Which run may continue: a record of everything that one depends on, written when it starts and compared later."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation import write_json
from ..recipe import SECTIONS, Recipe

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


def check_same_run(recipe: Recipe, path: Path, circumstances: Mapping[str, Any] | None = None) -> None:
    """Refuse to continue a run by another recipe, or in other circumstances.

    Args:
        path: The run's `recipe.json`; nothing is checked where it does not exist.
        circumstances: What else the result depends on, by its name there, as JSON gives it back: the data and the
            processes. What the file does not have, being of an earlier version, is not checked.

    Raises:
        ValueError: If something that the result depends on has another value there, or it cannot be read.
    """
    if not path.is_file():
        return
    saved = _read_record(path)
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


def write_run_record(record: dict, session: dict, checkpoint: str | None, path: Path) -> None:
    """Write `record` and the sessions of the run, one for each start, to `path`.

    Args:
        record: What stays the same from start to start.
        session: Environment of this start.
        checkpoint: Folder that this start goes on from; None where it begins anew, and earlier sessions are forgotten.
        path: JSON file, which holds the earlier sessions.
    """
    known = checkpoint is not None and path.is_file()
    sessions = _read_record(path)["sessions"] if known else []
    session = {"resumed_from": Path(checkpoint).name if checkpoint else None, "environment": session}
    write_json(record | {"sessions": [*sessions, session]}, path)


def _read_record(path: Path) -> dict:
    """Read what `write_run_record` wrote.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        sections = [saved["recipe"], *(saved["recipe"][name] for name in SECTIONS if name in saved["recipe"])]
        sessions = saved.setdefault("sessions", [])
        if not isinstance(sessions, list) or not all(isinstance(each, dict) for each in (saved, *sections)):
            raise TypeError("values of other types")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of a run ({type(error).__name__}: {error}), so that it cannot be told whether this "
            "is the same one; put it back from a copy, or delete it to go on without that check."
        ) from error
    return saved


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
