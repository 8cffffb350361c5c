"""Files and folders that are whole or not there, at whatever moment a run is killed or its disk is full.

Whatever is written goes beside its place first, under a name of `unfinished`, is synchronised with the disk and moved
into place.
"""

import ctypes
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .photo_files import shown
from .unfinished import begin, delete_unfinished

if TYPE_CHECKING:
    import PIL.Image

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What else says so: errors of other languages' libraries are known by their text alone.
_FULL_TEXTS = tuple(text for number in _FULL for text in (os.strerror(number), f"os error {number})"))
# Below this, an error of a library that does not give its reason is put down to the disk.
_NEARLY_FULL_BYTES = 2**16
# What operating systems answer where a file system cannot synchronise folders, such as some network, FUSE and Windows
# shares. What a power failure might cost there is the newest names, not what the files hold.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
# And where it cannot link a file, or exchange or move a folder in one step.
_NOT_HERE = (*_NO_FOLDER_SYNC, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV, errno.EBUSY)

# Moved last into a folder that is there already: without these it holds no model, whatever else it holds.
_WEIGHTS = (".safetensors", ".onnx", ".pt2")
# What a folder of a model or an export may hold for another one to take its place.
_MODEL_FILE = re.compile(
    r"config\.json|preprocessor_config\.json|conversion\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|model\.(onnx|pt2|json)"
)

Existing = Literal["replace", "refuse", "keep"]


class UnwritableError(OSError):
    """A file or folder that cannot be written; says which, why, and what to do."""

    def __str__(self) -> str:
        return self.strerror or ""


class DiskFullError(UnwritableError):
    """The disk is full, or the user's share of it is."""

    def __str__(self) -> str:
        return f"{self.strerror}; make room, and start again."


def write_whole(data: bytes | str, path: str | Path, existing: Existing = "replace") -> None:
    """Write a file that at no moment is there in part.

    Args:
        data: All that it will hold; text in UTF-8.
        path: Where to write; folders above it are made. A device or a pipe is written to directly.
        existing: As for `write_all`.

    Raises:
        UnwritableError: As `write_all`.
    """
    write_all({Path(path): data}, existing)


def write_json(record: Any, path: str | Path, indent: int = 2) -> None:
    """Write or replace a file of JSON, as `write_whole` does."""
    write_whole(json.dumps(record, indent=indent) + "\n", path)


def write_all(contents: Mapping[Path, bytes | str], existing: Existing = "replace") -> None:
    """Write files none of which is there before all are on the disk, and each of which is whole.

    Args:
        contents: What files will hold, by their paths. They are moved into place in this order.
        existing: What happens to files that are there already: they are replaced; or none is written; or they are kept,
            and only the others are written.

    Raises:
        DiskFullError: If the disk is full; nothing is left of what did not get into place.
        UnwritableError: If a file cannot be written for another reason, or is there and shall not be replaced.
    """
    begun: list[tuple[int, Path, Path]] = []
    path = None
    try:
        for path, data in contents.items():
            data = data.encode() if isinstance(data, str) else data
            if _is_special(path):
                path.write_bytes(data)
                continue
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if existing == "refuse" and is_there(path):
                raise _exists(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, unfinished = begin(path.parent)
            begun.append((descriptor, unfinished, path))
            _write(descriptor, data)
        for descriptor, _, path in begun:  # noqa: B007 for the error
            _synchronize_data(descriptor)
        for _, unfinished, path in begun:
            _move(unfinished, path, existing)
    except UnwritableError:
        raise
    except OSError as error:
        raise _unwritable(error, path or "") from error
    finally:
        for descriptor, unfinished, _ in begun:
            unfinished.unlink(missing_ok=True)
            os.close(descriptor)


@contextmanager
def whole_folder(folder: str | Path, replace: bool = False) -> Iterator[Path]:
    """Have a folder filled that gets into place when all of it is on the disk; nothing is left where that fails.

    A folder that is new, empty or to be replaced gets into place in one step where the file system can do that. Else
    its files do one after the other, weights last, as they do in a folder that is there and keeps its other files.

    Args:
        folder: Path of the folder; folders above it are made.
        replace: Whether it takes the place of all that `folder` holds, not only of files with the same names.

    Yields:
        Path of a folder to write to.

    Raises:
        DiskFullError: If the disk is full.
        UnwritableError: If the folder cannot be made, or another run filled it meanwhile.
    """
    folder = Path(folder)
    filled = folder.is_dir() and any(folder.iterdir())
    inside = (filled and not replace) or (folder.is_dir() and not _can_be_moved(folder))
    descriptor = place = None
    try:
        parent = folder if inside else folder.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        descriptor, place = begin(parent, folder=True)
        yield place
        _synchronize_all(place)
        if inside:
            _fill(place, folder)
        elif filled:
            _exchange(place, folder)
        else:
            _settle(place, folder)
        synchronize(folder)
        synchronize(folder.absolute().parent)
    except DiskFullError:
        raise
    except Exception as error:
        # Before anything is deleted, which would make room.
        if is_full(error) or (isinstance(error, RuntimeError) and _nearly_full(place)):
            raise _disk_full(folder) from error
        if isinstance(error, OSError) and not isinstance(error, UnwritableError) and error.errno is not None:
            raise _unwritable(error, folder) from error
        raise
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def check_file(path: Path | None, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, a file that is not to be replaced or cannot be written.

    What killed runs left beside it is deleted.

    Args:
        path: None is nothing to be written.
        overwrite: Whether one that is there may be replaced.

    Raises:
        ValueError: If it is there and may not be replaced, or is a folder, or its folder cannot be written to.
    """
    if path is None or _is_special(path):
        return
    if path.is_dir():
        raise ValueError(f"{shown(path)} is a folder, needed the name of a file.")
    if is_there(path) and not overwrite:
        raise ValueError(f"{shown(path)} exists; add --overwrite to replace it, or choose another name.")
    _check_parent(path)
    delete_unfinished([path.parent])


def check_folder(folder: Path, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, a folder that holds something, or what is not to be replaced.

    What killed runs left in it or beside it is deleted.

    Args:
        folder: Folder for a model or an export.
        overwrite: Whether an earlier model or export in it may be replaced.

    Raises:
        ValueError: If it is no folder, or holds something that is not to be replaced, or cannot be made.
    """
    if is_there(folder) and not folder.is_dir():
        raise ValueError(f"{shown(folder)} is not an empty folder; choose a new one, so that nothing is overwritten.")
    _check_parent(folder)
    delete_unfinished([folder, folder.absolute().parent])
    held = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    if held and not overwrite:
        raise ValueError(
            f"{shown(folder)} is not an empty folder; choose a new one, so that nothing is overwritten, or add "
            "--overwrite to replace the model or export in it."
        )
    code = {path.name for path in Path(__file__).parent.glob("*.py")}  # which saved models carry along
    foreign = [name for name in held if not _MODEL_FILE.fullmatch(name) and name not in code]
    if foreign:
        raise ValueError(
            f"{shown(folder)} holds more than a model or an export, such as {shown(foreign[0])}, which --overwrite "
            "does not replace; move that away, or choose another folder."
        )


def is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a link that leads nowhere."""
    return os.path.lexists(path)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk or the user's share of it is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def encode_picture(image: "PIL.Image.Image", path: str | Path) -> bytes:
    """Return what a file of that name holds when `image` is saved to it."""
    import PIL.Image

    PIL.Image.init()
    buffer = io.BytesIO()
    image.save(buffer, PIL.Image.EXTENSION[Path(path).suffix.lower()])
    return buffer.getvalue()


def synchronize(path: Path) -> None:
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


def _synchronize_data(descriptor: int) -> None:
    # Without the time of the last change, which costs as much again on some disks.
    getattr(os, "fdatasync", os.fsync)(descriptor)


def _synchronize_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        synchronize(path)
    synchronize(folder)


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _move(unfinished: Path, path: Path, existing: Existing) -> None:
    """Move a file into place, in one step where the file system can do that without replacing another."""
    if existing == "replace":
        os.replace(unfinished, path)
        return
    try:
        os.link(unfinished, path)
        return
    except FileExistsError:
        taken = True
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        taken = is_there(path)
    if not taken:
        os.replace(unfinished, path)
    elif existing == "refuse" or not path.is_file():
        raise _exists(path)


def _can_be_moved(folder: Path) -> bool:
    """Whether a folder beside this one could take its place: neither a mount point, nor in somebody else's folder."""
    parent = folder.absolute().parent
    return not folder.is_symlink() and not folder.is_mount() and os.access(parent, os.W_OK | os.X_OK)


def _settle(place: Path, folder: Path) -> None:
    """Move a folder to where there is none, or an empty one."""
    try:
        os.rename(place, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise _exists(folder) from error
        if error.errno not in _NOT_HERE:
            raise
        _fill(place, folder)


def _exchange(place: Path, folder: Path) -> None:
    """Have a folder take the place of another, which `place` is afterwards."""
    try:
        # 2 is RENAME_EXCHANGE, -100 is AT_FDCWD: Linux alone has it, and Python has no name for it.
        names = [-100, os.fsencode(place), -100, os.fsencode(folder.absolute()), 2]
        if ctypes.CDLL(None, use_errno=True).renameat2(*names) == 0:
            return
        number = ctypes.get_errno()
        if number not in _NOT_HERE:
            raise OSError(number, os.strerror(number))
    except AttributeError:
        pass
    # Without its weights, the old one is no model any more; with its own, the new one is.
    for path in sorted(folder.iterdir(), key=_weights_first):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    _fill(place, folder)


def _fill(place: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in sorted(place.iterdir(), key=_weights_first, reverse=True):
        os.replace(path, folder / path.name)


def _weights_first(path: Path) -> tuple[bool, str]:
    return path.suffix not in _WEIGHTS, path.name


def _is_special(path: Path) -> bool:
    """Whether it is a device, a pipe or a socket, be it a file that standard output goes to by its name in /dev."""
    parts = path.absolute().parts[1:3]
    if parts[:1] == ("proc",) or (parts[:1] == ("dev",) and parts[1:] != ("shm",)):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _check_parent(path: Path) -> None:
    existing = next(each for each in path.absolute().parents if each.exists())
    if not existing.is_dir():
        raise ValueError(f"{shown(path)} cannot be written: {shown(existing)} is no folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{shown(path)} cannot be written: {shown(existing)} does not allow it; choose another place.")


def _nearly_full(place: Path | None) -> bool:
    return place is not None and place.exists() and shutil.disk_usage(place).free < _NEARLY_FULL_BYTES


def _unwritable(error: OSError, path: str | Path) -> UnwritableError:
    if error.errno in _FULL:
        return _disk_full(path, error.errno)
    return UnwritableError(error.errno or errno.EIO, f"{shown(path)} cannot be written: {error.strerror or error}")


def _disk_full(path: str | Path, number: int | None = errno.ENOSPC) -> DiskFullError:
    return DiskFullError(number or errno.ENOSPC, f"{shown(path)} was not written, since the disk is full")


def _exists(path: Path) -> UnwritableError:
    return UnwritableError(
        errno.EEXIST, f"{shown(path)} was not written, since another run wrote it meanwhile; --overwrite replaces it."
    )
