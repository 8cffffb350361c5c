"""Files of weights that may be damaged: their headers, a checksum of their own, and values that are no numbers.

A `.safetensors` file carries no checksum: a flipped bit in it is another weight. Files that this package writes
therefore keep one in their metadata (`CHECKSUM`), which other programs ignore and drop when they write weights anew, so
that it never outlives what it stands for. Where a file has one, it is compared before the weights are used.
"""

import hashlib
import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from .photo_files import shown

# In the metadata of a file: SHA-256, in hexadecimal, of all that `_digest` reads.
CHECKSUM = "sha256"

# As the library safetensors bounds it.
LONGEST_HEADER = 100_000_000

_CHUNK_BYTES = 2**20


class WeightsError(ValueError, RuntimeError):
    """Weights that are damaged or do not fit; a RuntimeError, too, as transformers raises where weights do not fit."""


class Header(NamedTuple):
    """What the beginning of a `.safetensors` file says.

    Attributes:
        tensors: `dtype` (as the format names it), `shape` and `data_offsets` by the name of each tensor.
        metadata: Texts by name.
        length: Bytes of the header, without the 8 before it that hold this number.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    length: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor["shape"]) for name, tensor in self.tensors.items()}


def one_line(error: BaseException | str, longest: int = 600) -> str:
    """Write what an error says in one line that every terminal can show, cut off where it is very long."""
    text = shown(" ".join(str(error).split()))
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} ..."


def read_header(path: str | Path) -> Header:
    """Read the header of a `.safetensors` file, whose tensors must fill the rest of the file without gap or overlap.

    Raises:
        OSError: If the file cannot be read.
        WeightsError: If it is no whole `.safetensors` file, or names a tensor twice.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise _damaged(path, f"its header would have {length} of {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
        metadata = header.pop("__metadata__", {})
        offsets = [_checked_offsets(tensor) for tensor in header.values()]
        texts = all(isinstance(value, str) for value in metadata.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({one_line(error, 100)})") from error
    end = 0
    for begin, until in sorted(offsets):
        if begin != end:
            raise _damaged(path, f"its tensors leave a gap or overlap at byte {end} of the weights")
        end = until
    if not texts or 8 + length + end != size:
        raise _damaged(path, f"its header describes {8 + length + end} bytes, the file has {size}")
    return Header(header, metadata, length)


def _checked_offsets(tensor: dict[str, Any]) -> tuple[int, int]:
    """Return where a tensor begins and ends, if that is as long as its shape needs; ValueError else."""
    begin, end = tensor["data_offsets"]
    shape = tensor["shape"]
    if not isinstance(shape, list) or not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a shape or offset is no whole number")
    bits = {"BOOL": 8, "BF16": 16, "F4": 4}.get(tensor["dtype"])
    if bits is None:
        bits = int(tensor["dtype"].lstrip("FUIC").partition("_")[0])
    if bits * math.prod(shape) != 8 * (end - begin):
        raise ValueError(f"{tensor['dtype']} of shape {shape} in {end - begin} bytes")
    return begin, end


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path} is no whole safetensors file: {what}; copy, download or write it again.")


def _digest(path: Path, header: Header) -> str:
    """Compute the checksum of names, types, shapes and places of the tensors, and of their values."""
    digest = hashlib.sha256(json.dumps(header.tensors, sort_keys=True).encode())
    with path.open("rb") as file:
        file.seek(8 + header.length)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_checksum(path: str | Path) -> str:
    """Compute the SHA-256, in hexadecimal, of a file of any kind."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: str | Path, expected: str | None = None) -> Header:
    """Compare a `.safetensors` file with its checksum, where it carries one, and return its header.

    Args:
        expected: Checksum of a file that does not carry its own.

    Raises:
        OSError: If the file cannot be read.
        WeightsError: If the file is not what was written.
    """
    path = Path(path)
    header = read_header(path)
    # The name may be what is damaged; no other text there is as long.
    expected = next((text for text in header.metadata.values() if len(text) == 64), expected)
    expected = header.metadata.get(CHECKSUM, expected)
    if expected is not None and (found := _digest(path, header)) != expected:
        raise WeightsError(
            f"{path} is damaged: its weights have the checksum {found[:12]}..., needed {expected[:12]}..., with which "
            "they were written; copy, download or write it again."
        )
    return header


def seal(path: str | Path) -> None:
    """Write the checksum into the metadata of a `.safetensors` file; nothing happens where it carries a right one."""
    path = Path(path)
    header = read_header(path)
    digest = _digest(path, header)
    if header.metadata.get(CHECKSUM) == digest:
        return
    content = {"__metadata__": header.metadata | {CHECKSUM: digest}, **header.tensors}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at multiples of eight bytes, as the library has it
    handle, name = tempfile.mkstemp(prefix=".sealing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as sealed, path.open("rb") as file:
            file.seek(8 + header.length)
            sealed.write(struct.pack("<Q", len(text)) + text)
            while chunk := file.read(_CHUNK_BYTES):
                sealed.write(chunk)
            sealed.flush()
            os.fsync(sealed.fileno())
        os.chmod(name, path.stat().st_mode & 0o777)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_archive(path: str | Path) -> bool:
    """Compare the checksums in an archive that `torch.save` wrote, which PyTorch itself does not.

    Returns:
        Whether the file has checksums: those in PyTorch's format before 1.6, which is no archive, have none.

    Raises:
        OSError: If the file cannot be read.
        WeightsError: If the archive is damaged, or would be larger unpacked than it is.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            wrong = None if packed else archive.testzip()
    except OSError:
        raise
    # Its own error and, of damaged files, those of the modules that it uses.
    except Exception as error:
        raise WeightsError(f"{path} is a damaged archive ({one_line(error, 200)}); download it again.") from error
    if packed:
        raise WeightsError(f"{path} is compressed, needed an archive as torch.save writes it; save it by torch.save.")
    if wrong is not None:
        raise WeightsError(
            f"{path} is damaged: the checksum of {wrong!r} in it is not that with which it was written; copy or "
            "download it again."
        )
    return True


def load_checked(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a `.safetensors` file, compared with its checksum where it carries one, and all finite.

    Raises:
        OSError: If the file cannot be read.
        WeightsError: If it is damaged, or values in it are NaN or infinite.
    """
    verify(path)
    try:
        tensors = load_file(path)
    # The library's own error, and those of dtypes that torch does not know.
    except Exception as error:
        raise WeightsError(f"{path} cannot be read: {one_line(error)}.") from error
    check_finite(tensors.items(), str(path))
    return tensors


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuse NaN and infinite values.

    Args:
        tensors: Names and values, on any device; those without values ("meta") and those of whole numbers are passed
            over.
        source: What they are the weights of, for the message.

    Raises:
        WeightsError: If there are any; names the tensors, and how many values in each.
    """
    found = []
    for name, value in tensors:
        if value.is_meta or not (value.is_floating_point() or value.is_complex()):
            continue
        # One number tells for nearly all; where finite values sum up to infinity, the values do.
        if not math.isfinite(abs(value.detach().sum(dtype=torch.float32 if value.itemsize < 4 else None).item())):
            wrong = int((~value.detach().isfinite()).sum())
            if wrong:
                found.append(f"{name}: {wrong} of {value.numel()}")
    if found:
        more = f" and {len(found) - 5} more tensors" if len(found) > 5 else ""
        raise WeightsError(
            f"{source} holds values that are NaN or infinite ({', '.join(found[:5])}{more}), needed finite numbers; "
            "train or copy the model again."
        )
