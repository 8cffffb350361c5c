"""Runs cases in processes of their own with limits of memory and time, until one breaks the rule."""

import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import datasets
import torch

from .cases import Outcome, describe, run
from .makers import MAKERS

# Bytes that a case may take beyond what the process has without it; the largest photograph that is opened takes 2 GiB.
MEMORY = 4 * 2**30
SECONDS = 30  # of the processor, or four times as many on the clock: others may be at work
# A process that reads on beyond this, deaf to its alarm, is ended.
_GRACE = 15
# What one process does before the next begins with clean memory.
_CASES_A_PROCESS = 500
_TURN_SECONDS = 20.0
_HEAVY = ("depict_hf.results", "depict_hf.explain", "depict_hf.export", "training.train", "training.session")


@dataclass
class Report:
    """What fuzzing did.

    Attributes:
        counts: Number of cases by kind and outcome.
        escape: The first case that broke the rule, and its outcome; None where there was none.
    """

    counts: dict[str, Counter] = field(default_factory=dict)
    escape: tuple[Path, Outcome] | None = None

    def lines(self) -> list[str]:
        rows = [
            f"{kind}: {sum(each.values())} cases, {dict(sorted(each.items()))}" for kind, each in self.counts.items()
        ]
        return [*rows, f"{sum(sum(each.values()) for each in self.counts.values())} cases in all"]


class TookTooLong(BaseException):
    """A case took more time than it may; no error of what it tests, so that nothing there takes it for one."""


def fuzz(
    kinds: Iterable[str],
    seed: int,
    place: Path,
    minutes: float | None = None,
    cases: int | None = None,
    first: int = 0,
) -> Report:
    """Make and run cases, some of each kind in turn, until one breaks the rule.

    Args:
        kinds: Keys of `makers.MAKERS`.
        seed: Together with the kind and a number, the whole of what a case is.
        place: Folder for the case in hand, which is kept there if it breaks the rule.
        minutes: When to end.
        cases: Of each kind, when to end.
        first: Number of the first case.
    """
    report = Report({kind: Counter() for kind in kinds})
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    last = float("inf") if cases is None else first + cases
    numbers = dict.fromkeys(report.counts, first)
    place.mkdir(parents=True, exist_ok=True)
    for module in _HEAVY if "commands" in report.counts else ():  # once, rather than in each process
        import_module(module)
    while numbers and report.escape is None and time.monotonic() < end:
        for kind in list(numbers):
            turn = min(end, time.monotonic() + _TURN_SECONDS)
            until = int(min(last, numbers[kind] + _CASES_A_PROCESS))
            numbers[kind], report.escape = _in_process(
                kind, seed, numbers[kind], until, turn, place, report.counts[kind]
            )
            if report.escape is not None or time.monotonic() >= end:
                break
            if numbers[kind] >= last:
                del numbers[kind]
    return report


def make(kind: str, seed: int, number: int, folder: Path) -> None:
    """Write a case into a new folder."""
    folder.mkdir(parents=True)
    rng = random.Random(f"{kind} {seed} {number}")
    case = MAKERS[kind](rng, folder)
    describe(case | {"made": f"{kind} {seed} {number}"}, folder)


def run_alone(folder: Path, place: Path) -> Outcome:
    """Run one case in a process of its own, within the limits."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with _process(lambda answer: answer(_limited(folder, place)), place.parent) as answers:
        return next(answers)


def _in_process(
    kind: str, seed: int, first: int, until: int, turn: float, place: Path, counts: Counter
) -> tuple[int, tuple[Path, Outcome] | None]:
    """Run the cases of numbers from `first` until `until` or the end of the turn; return the next one's number."""
    case, work = place / "case", place / "work"

    def work_off(answer) -> None:
        for number in range(first, until):
            _remove(case)
            make(kind, seed, number, case)
            outcome = _limited(case, work)
            answer(outcome)
            if outcome.kind == "escape" or time.monotonic() >= turn:
                return

    number = first
    with _process(work_off, place) as answers:
        for outcome in answers:
            number += 1
            counts[outcome.kind] += 1
            if outcome.kind == "escape":
                kept = place / f"{kind}-{seed}-{number - 1}"
                _remove(kept)
                shutil.move(case, kept)
                return number, (kept, outcome)
    return number, None


def _limited(folder: Path, place: Path) -> Outcome:
    """Run a case within a process that may die of it."""
    _remove(place)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _ring)
    signal.alarm(4 * SECONDS)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome = run(folder, place)
    except TookTooLong:
        outcome = Outcome("escape", "TookTooLong", f"more than {SECONDS} seconds")
    except BaseException as error:  # such as a SystemExit, which no reader lets through
        outcome = Outcome("escape", type(error).__name__, str(error))
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _remove(place)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MEMORY and outcome.kind != "escape":
        return Outcome("escape", "MemoryError", f"{grown / 2**30:.1f} GiB were taken")
    return outcome


def _ring(*_) -> None:
    raise TookTooLong


@contextmanager
def _process(work: Callable[[Callable[[Outcome], None]], None], place: Path) -> Iterator[Iterator[Outcome]]:
    """Fork a process that does `work`, which is given a function for answers; yield these.

    One that dies of its work answers with an escape. What it caches is in `place` as long as it lives.
    """
    cache = place / "cache"
    _remove(cache)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:

        def answer(outcome: Outcome) -> None:
            os.write(write_end, json.dumps(asdict(outcome)).encode("ascii") + b"\n")

        try:
            os.close(read_end)
            os.setpgid(0, 0)
            _bound_memory()
            _prepare(cache)
            work(answer)
        except BaseException:  # what makes cases is at fault itself
            answer(Outcome("escape", "fuzzing", traceback.format_exc()))
        os._exit(0)
    os.close(write_end)
    try:
        yield _answers(child, read_end)
    finally:
        os.close(read_end)
        for end in (lambda: os.killpg(child, signal.SIGKILL), lambda: os.waitpid(child, 0)):
            with suppress(ProcessLookupError, ChildProcessError, PermissionError):  # It has ended by itself.
                end()
        _remove(cache)


def _answers(child: int, read_end: int) -> Iterator[Outcome]:
    waiting = b""
    while True:
        ready, _, _ = select.select([read_end], [], [], 4 * SECONDS + _GRACE)
        if not ready:
            yield Outcome("escape", "TookTooLong", f"deaf to its alarm after {SECONDS} seconds")
            return
        piece = os.read(read_end, 2**16)
        if not piece:
            break
        *lines, waiting = (waiting + piece).split(b"\n")
        for line in lines:
            yield Outcome(**json.loads(line))
    _, status = os.waitpid(child, 0)
    if status:
        yield Outcome("escape", "crash", f"the process ended with {os.waitstatus_to_exitcode(status)}")


def _bound_memory() -> None:
    """Let this process take `MEMORY` more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _prepare(cache: Path) -> None:
    """Let libraries print their own lines to nowhere, and keep what they read in a folder that is deleted.

    The threads of the process that was forked are not there.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.config.HF_DATASETS_CACHE = cache
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder, be it one that a case left without permissions."""
    if folder.exists():
        shutil.rmtree(folder)
