"""SIGINT and SIGTERM: at once where nothing is in hand, after the file in hand where something is."""

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def command_text(arguments: Sequence[str]) -> str:
    """Write a command as a shell takes it, on one line that every terminal can show.

    What cannot be printed, such as a line break in a file's name, stands there in the bytes of the name.
    """
    return " ".join(shlex.quote(each) if each.isprintable() else _in_bytes(each) for each in arguments)


def _in_bytes(argument: str) -> str:
    printable = set(range(32, 127)) - set(b"\\'")
    return "$'" + "".join(chr(each) if each in printable else f"\\x{each:02x}" for each in os.fsencode(argument)) + "'"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which ends a command as Ctrl-C does."""


class Interruption:
    """Notes the first signal while `in_hand`; a second SIGINT ends the process at once.

    Attributes:
        number: The signal that arrived; None while none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.number or 0).name

    @property
    def status(self) -> int:
        """What the process is to exit with, by the custom of shells."""
        return 128 + (self.number or 0)

    @contextmanager
    def in_hand(self) -> Iterator[None]:
        """Only note signals, for as long as something is in hand."""

        def note(number: int, frame: FrameType | None) -> None:
            self.number = self.number or number
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with handling(dict.fromkeys(SIGNALS, note)):
            yield


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Have SIGTERM end what runs as SIGINT does, by an exception, so that what is unfinished is put away.

    Raises:
        Terminated: At SIGTERM.
        KeyboardInterrupt: At SIGINT.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a process that was forked off, for reading data
        os.kill(os.getpid(), number)

    with handling({signal.SIGTERM: end}):
        yield


@contextmanager
def handling(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """Handle signals in another way for a while, but for those that the process was started to ignore."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle any
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:
                signal.signal(number, earlier)
