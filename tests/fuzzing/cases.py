"""A case: a folder of damaged files, how they are read, what came of it, and whether that breaks the rule."""

import json
import os
import shutil
import socket
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .readers import DOCUMENTED, READERS, Wrong

CORPUS = Path(__file__).parent.parent / "corpus"
BASES = CORPUS / "bases"
DESCRIPTION = "case.json"
LONGEST_LINE = 1500


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: "right", "refused" by an error that is documented, or "escape", which breaks the rule.
        error: Name of the error's class; empty of a right result.
        text: Message of the error; of an escape what is wrong, with the stack where there is one.
        facts: What `readers` says about a right result.
    """

    kind: str
    error: str = ""
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def describe(case: dict[str, Any], folder: Path) -> None:
    """Write what a case is beside its files; names that are no text are kept by escapes of JSON."""
    (folder / DESCRIPTION).write_text(json.dumps(case, indent=1) + "\n", encoding="ascii")


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DESCRIPTION).read_text(encoding="ascii"))


def lay_out(folder: Path, place: Path) -> None:
    """Copy the sound files that a case is based on to a new folder, and lay its own and its special ones over them.

    Of its description, `base` names a folder of sound files, or one of them, or lists several such; `without` lists
    files that are deleted, and `special` names what is no file: "folder", "pipe", "socket", or "link:" and what it
    leads to.
    """
    case = description(folder)
    bases = case.get("base", [])
    place.mkdir()
    for base in [bases] if isinstance(bases, str) else bases:
        path = BASES / base
        shutil.copytree(path, place, dirs_exist_ok=True) if path.is_dir() else shutil.copy(path, place)
    shutil.copytree(folder, place, symlinks=True, dirs_exist_ok=True)
    (place / DESCRIPTION).unlink()
    for name in case.get("without", []):
        (place / name).unlink()
    for name, kind in case.get("special", {}).items():
        path = place / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(os.path.relpath(path))
        else:
            path.symlink_to(kind.removeprefix("link:"))


def run(folder: Path, place: Path) -> Outcome:
    """Run a case in a new folder `place`, and judge what comes of it."""
    case = description(folder)
    lay_out(folder, place)
    return judge(case, place)


def judge(case: dict[str, Any], place: Path) -> Outcome:
    """Read what a case describes from where its files lie, and say what came of it.

    What ends processes, such as a time limit, comes through.
    """
    kind = case["kind"]
    try:
        return Outcome("right", facts=READERS[kind](place, case))
    except Wrong as wrong:
        return Outcome("escape", "Wrong", str(wrong))
    except DOCUMENTED[kind] as error:
        name, text = type(error).__name__, str(error)
        fault = fault_of_message(text, several_lines=kind == "data")
        # Errors of this package's own say what arrived; these are what a parser said to itself.
        if isinstance(error, (UnicodeError, json.JSONDecodeError)):
            fault = "an error of a parser came through"
        if fault:
            return Outcome("escape", name, f"{fault}\n{_stack(error)}")
        return Outcome("refused", name, text)
    except Exception as error:
        return Outcome("escape", type(error).__name__, _stack(error))


def fault_of_message(text: str, several_lines: bool = False) -> str:
    """Say what is wrong with an error's message: no words, no plain text, too long, or several lines; else nothing."""
    lines = text.split("\n") if several_lines else [text]
    if len(text.split()) < 3:
        return "the message has no words"
    if not all(line.isprintable() for line in lines):
        return "the message has several lines, or characters that cannot be printed"
    if max(map(len, lines)) > LONGEST_LINE:
        return f"the message has a line of {max(map(len, lines))} characters"
    return ""


def _stack(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def differs(outcome: Outcome, expected: dict[str, Any]) -> str:
    """Say in what an outcome is not what a case expects; an empty text where it is.

    Args:
        expected: `right` with the facts that are compared, numbers that are no whole ones to within 1; or `refused`
            with the name of the `error` and a piece of the `message`. It may have both, where the system's libraries
            decide; then either will do.
    """
    faults = []
    if outcome.kind == "right" and "right" in expected:
        wrong = {
            name: (outcome.facts.get(name), value)
            for name, value in expected["right"].items()
            if not _close(outcome.facts.get(name), value)
        }
        faults.append("; ".join(f"{name} is {got}, expected {value}" for name, (got, value) in wrong.items()))
    elif outcome.kind == "refused" and "refused" in expected:
        wanted = expected["refused"]
        same = outcome.error == wanted["error"] and wanted["message"] in outcome.text
        faults.append("" if same else f"{outcome.error}: {outcome.text}, expected {wanted}")
    else:
        faults.append(f"{outcome.kind} {outcome.error} {outcome.text} {outcome.facts}, expected {expected}")
    return faults[0]


def _close(value: Any, expected: Any) -> bool:
    if isinstance(expected, list) and isinstance(value, list):
        return len(value) == len(expected) and all(map(_close, value, expected))
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return abs(value - expected) <= 1
    return value == expected
