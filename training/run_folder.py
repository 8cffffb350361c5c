"""The folder of a run of `training.own_classes`, as far as the run that goes on in it has to know it."""

import argparse
import json
from pathlib import Path
from typing import Any

from .data import OpenedData, digest
from .own_classes import DEFAULT_MINUTES
from .planning import Plan, Stage
from .recipe import SECTIONS, Recipe

# In OUT: what the run was asked for and planned, what happened when, and all that is deleted at its end.
RUN, HISTORY, WORK = "run.json", "history.jsonl", "work"


def asked_of(arguments: argparse.Namespace) -> dict:
    """Return what a run depends on, as JSON gives it back."""
    minutes = arguments.minutes
    if minutes is None and arguments.epochs is None and arguments.max_steps is None:
        minutes = DEFAULT_MINUTES
    return {
        "data": arguments.data,
        "source": arguments.source,
        "classes": arguments.classes,
        "decoder": arguments.decoder,
        "minutes": minutes,
        "epochs": arguments.epochs,
        "max_steps": arguments.max_steps,
        "overrides": list(arguments.overrides),
    }


def open_run(output: Path, resume: bool, asked: dict) -> dict | None:
    """Read what `run.json` of a run that goes on says; None for a new one.

    Raises:
        ValueError: If OUT holds something and the run is not to go on, it was asked for something else, or what is
            there cannot be read.
    """
    path = output / RUN
    if resume and path.is_file():
        saved = _read_run(path)
        changed = [
            f"{name}={value!r}, there {saved['asked'].get(name)!r}"
            for name, value in asked.items()
            if value != saved["asked"].get(name)
        ]
        if changed:
            raise ValueError(f"Got --resume with other settings than in {path}: {'; '.join(changed)}. Use the same.")
        return saved
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "pass --resume to go on with the run in it, or " if path.is_file() else ""
        raise ValueError(f"{output} is not an empty folder; {what}choose a new one, so that nothing is overwritten.")
    output.mkdir(parents=True, exist_ok=True)
    return None


def read_history(output: Path) -> list[dict]:
    """Read the events of all sessions so far; lines that are none are passed over."""
    path = output / HISTORY
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # a line that was being written when the run was killed
            continue
        if isinstance(event, dict) and isinstance(event.get("seconds"), (int, float)):
            events.append(event)
    return events


def plan_of(saved: dict, output: Path) -> Plan:
    """Read the plan of a run out of what `open_run` returned.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return _plan_from_json(saved["plan"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_damaged(output / RUN, error)) from error


def describe_data(opened: OpenedData) -> dict:
    """Describe what is trained and validated on, as JSON gives it back, so that a later session can compare."""
    described = {}
    for name in ("train", "validation"):
        samples = opened.samples[name]
        described[name] = {"images": len(samples), "digest": digest(samples.encoded)}
    return described


def check_data(saved: dict, data: dict, output: Path) -> None:
    """Refuse to go on with other data than a run began with.

    Args:
        saved: What `open_run` returned; of an earlier version, it does not know its data, and nothing is checked.
        data: What `describe_data` says of them now.

    Raises:
        ValueError: If they differ.
    """
    if saved.get("data", data) != data:
        raise ValueError(
            f"Got --resume with other data than in {output / RUN}: {data}, there {saved['data']}. Put the data back as "
            "they were, or begin in another folder."
        )


def _plan_from_json(values: dict) -> Plan:
    stages = [Stage(**(stage | {"recipe": _recipe_from_json(stage["recipe"])})) for stage in values["stages"]]
    return Plan(**(values | {"stages": tuple(stages), "reasons": tuple(values["reasons"])}))


def _recipe_from_json(values: dict) -> Recipe:
    sections: dict[str, Any] = {
        section: kind(
            **{name: tuple(each) if isinstance(each, list) else each for name, each in values[section].items()}
        )
        for section, kind in SECTIONS.items()
    }
    return Recipe(name=values["name"], **sections)


def _read_run(path: Path) -> dict:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(saved["asked"], dict) and isinstance(saved["start"], list) and saved["plan"]):
            raise TypeError("values of other types")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path, error)) from error
    return saved


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} is no record of a run ({type(error).__name__}: {error}), without which it cannot go on; put it back "
        "from a copy, or begin in another folder."
    )
