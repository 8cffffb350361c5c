"""SIGTERM and SIGINT: a command ends in one line that says how to go on, training not before its step is saved."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from depict_hf.interruption import SIGNALS, command_text, handling


class Stopped(KeyboardInterrupt):
    """A command that a signal ends.

    Args:
        number: Number of the signal.
        done: What is done and kept, in words; empty where nobody knows better than the command itself.
    """

    def __init__(self, number: int, done: str = ""):
        super().__init__(done)
        self.number = number
        self.done = done


class _Signals:
    """What came, and whether something is under way that is to be finished first."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferring = False
        self.process = 0


_signals = _Signals()


def received() -> int | None:
    """Return the number of the first signal that came while `run_stoppable` ran a command; None where none did."""
    return _signals.received


@contextmanager
def deferred() -> Iterator[None]:
    """Have a first signal only noted within, for `received`; without `run_stoppable` around it, change nothing."""
    _signals.deferring = True
    try:
        yield
    finally:
        _signals.deferring = False


def run_stoppable(command: Callable[[], int], name: str, go_on: str) -> int:
    """Run a command that SIGTERM and SIGINT end in one line on stderr; a second SIGINT ends it at once, silently.

    Args:
        command: Returns an exit code.
        name: Name of the command, with which the line begins.
        go_on: What the line says on how to go on.

    Returns:
        What `command` returns, or 128 and the number of the signal: 143 for SIGTERM, 130 for SIGINT.
    """
    _signals.received = None
    _signals.process = os.getpid()
    try:
        with handling(dict.fromkeys(SIGNALS, _handle)):
            return command()
    except Stopped as stopped:
        number, done = stopped.number, stopped.done
    except RuntimeError:
        # A signal to all processes of a group also ends processes that read data, which their parent hears of.
        if _signals.received is None:
            raise
        number, done = _signals.received, ""
    if os.environ.get("RANK", "0") == "0":
        what = f"{name}: stopped by {signal.Signals(number).name}; {done + '; ' if done else ''}{go_on}"
        print(what, file=sys.stderr, flush=True)
    return 128 + number


def command_line(name: str, arguments: Sequence[str] | None, *added: str) -> str:
    """Write the command that goes on, as a shell takes it, with options that it may have had already.

    Args:
        name: The words before its arguments, such as `depict train`.
        arguments: Its arguments; those of this process if None.
        added: Options to be added.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return f"{name} {command_text([*given, *(each for each in added if each not in given)])}"


def survive(worker: int) -> None:
    """Let a process that reads data leave it to its parent what a signal to all of them means.

    For `worker_init_fn` of a `DataLoader`. Its parent alone ends it by SIGTERM, as Python does with such processes at
    its end. Where no sender can be told (macOS, Windows), it ends at any SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not os.getppid(): from Python 3.14 on, such processes are forked from a server.
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _signals.process:
        return  # a process that was forked to read data; its parent decides
    if _signals.received is not None:
        if number == signal.SIGINT:
            os._exit(128 + number)
        return
    _signals.received = number
    if not _signals.deferring:
        raise Stopped(number)
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        # Not by print, in which the signal may have come.
        os.write(2, f"\n{name}: a checkpoint is written after this step; a second Ctrl-C ends at once.\n".encode())
