"""Files and folders that are being written beside their places, and what killed runs left of them.

Their names begin with `UNFINISHED`. A run holds a lock on what it has not moved into place yet, so that what a killed
run left behind can be told from what another run is writing, and is deleted by the next run.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked, and nothing left behind is deleted
    fcntl = None  # type: ignore[assignment]

# Hidden, and without the suffix of a photograph or a result, so that nothing takes it for one.
UNFINISHED = ".unfinished-"
_UNFINISHED = re.compile(re.escape(UNFINISHED) + r"\d+-[0-9a-f]{12}")  # the process, and a random part


def begin(parent: Path, folder: bool = False) -> tuple[int, Path]:
    """Make a locked file or folder of a name that nobody else has; return its descriptor and path."""
    while True:
        path = parent / f"{UNFINISHED}{os.getpid()}-{secrets.token_hex(6)}"
        if folder:
            path.mkdir()
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # as below
                continue
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # A run that deletes what was left behind may have been there before the lock.
        if _lock(descriptor) is not False and _leads_to(path, descriptor):
            return descriptor, path
        os.close(descriptor)


def delete_unfinished(folders: Iterable[Path]) -> None:
    """Delete what killed runs left in folders, not in those below; what a running one is writing stays."""
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                found = [Path(entry.path) for entry in entries if _UNFINISHED.fullmatch(entry.name)]
        except OSError:  # It is not there, or its files are nobody's business here.
            continue
        for path in found:
            _delete_if_abandoned(path)


def _lock(descriptor: int) -> bool | None:
    """Lock until it is closed; False if it is locked by somebody else, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _leads_to(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _delete_if_abandoned(path: Path) -> None:
    try:
        descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # moved or deleted meanwhile, or somebody else's
        return
    try:
        if _lock(descriptor) and _leads_to(path, descriptor):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError:  # It may stay: what it was left by has ended.
        pass
    finally:
        os.close(descriptor)
