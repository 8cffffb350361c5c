"""Bilinear resizing: of images directly, and of scores as matrices that are made once, kept, and applied exactly.

Resizing, averaging windows and cropping are linear and do the same to every row and to every column. An `Axis` says
what happens along one axis, by numbers of the host alone; its matrix comes from the CPU, and which of its columns a
band of rows needs is known without reading it. So nothing is read back from an accelerator.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that are upsampled at a time: on a CPU few enough to stay in its cache, else enough to keep a processor busy.
BAND_ELEMENTS = {"cpu": 2**19}
# Bounds of what is kept: bytes of matrices, over all devices, and their number.
KEPT_BYTES = 2**26
KEPT_ENTRIES = 512


def resize_bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(batch, channels, height, width)` to `size` = (height, width) pixels, without antialiasing.

    Returns the input itself where the size already fits.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


def size_of(images: Tensor) -> tuple[int, int]:
    """Return (height, width) of `(..., height, width)`."""
    height, width = images.shape[-2:]
    return height, width


def axis_operator(
    grid_length: int,
    starts: Sequence[int],
    window_length: int,
    length: int,
    target_length: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Write what merging windows and resizing the result does along one axis as a matrix.

    Upsampling a window bilinearly, averaging windows where they overlap (their corners form a grid) and resizing the
    average are linear, and each does the same to every row and to every column. So the merged image is
    `vertical @ mosaic @ horizontal^T` for every class, and any band of its rows can be had alone. The matrix is what
    `F.interpolate` itself makes of the unit matrix.

    Args:
        grid_length: Scores that a window has along the axis.
        starts: First pixel of each window, ascending.
        window_length: Pixels of a window; what lies beyond `length` (padding) is cut off.
        length: Pixels of the image that the windows cover.
        target_length: Pixels of the result.
        dtype: Type of the matrix.

    Returns:
        `(target_length, len(starts) * grid_length)`, on the CPU; every row sums to 1.
    """
    upsample = _resize_rows(torch.eye(grid_length, dtype=dtype, device="cpu"), window_length)
    if len(starts) == 1:
        return _resize_rows(upsample[:length], target_length)
    total = torch.zeros(length, len(starts), grid_length, dtype=dtype, device="cpu")
    count = torch.zeros(length, 1, 1, dtype=dtype, device="cpu")
    for index, start in enumerate(starts):
        total[start : start + window_length, index] += upsample
        count[start : start + window_length] += 1
    return _resize_rows(total.div_(count).flatten(1), target_length)


def _resize_rows(matrix: Tensor, length: int) -> Tensor:
    return resize_bilinear(matrix[None, None], (length, matrix.shape[1]))[0, 0]


@dataclass(frozen=True)
class Band:
    """Some rows of a matrix: `target[rows] = matrix @ source[used]`.

    Attributes:
        rows: Rows of the target.
        matrix: `(rows, used)`; None for the unit matrix. Shared by everybody: never to be changed.
        used: Those of the source, a slice or, where they lie far apart, their indices on the matrix's device.
    """

    rows: slice
    matrix: Tensor | None
    used: slice | Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of windows on an image, and of what their scores are brought to; arguments of `axis_operator`.

    Args:
        mirrored: Whether the target runs against the image, which was a mirror image.
    """

    grid_length: int
    starts: tuple[int, ...]
    window_length: int
    length: int
    target_length: int
    mirrored: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether the target is the source itself."""
        lengths = {self.grid_length, self.window_length, self.length, self.target_length}
        return len(self.starts) == len(lengths) == 1 and not self.mirrored

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Make the axis's `axis_operator` anew, `(target_length, windows * grid_length)`."""
        matrix = axis_operator(
            self.grid_length, self.starts, self.window_length, self.length, self.target_length, dtype
        )
        return matrix.flip(0) if self.mirrored else matrix

    def whole(self, dtype: torch.dtype, device: torch.device) -> Band:
        """Return all rows as one band."""
        return self.bands(self.target_length, dtype, device)[0]

    def bands(self, height: int, dtype: torch.dtype, device: torch.device) -> tuple[Band, ...]:
        """Return the rows of the target in bands of `height`, from the first to the last, on a device.

        What was made is kept for the next call, unless tensors are only pretended here (`FakeTensorMode`, a transform
        of `torch.func`) or a graph is traced, which must hold neither sizes nor tensors of other calls.
        """
        if torch.compiler.is_compiling():
            return (Band(slice(0, self.target_length), self.matrix(dtype).to(device), slice(None)),)
        if not _tensors_are_real():
            return self._make_bands(height, dtype, device)
        # Memory of one CUDA stream is not safe to use on another one without their waiting for each other.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        key = (self, height, dtype, device, stream)
        bands = _kept.get(key)
        if bands is None:
            bands = self._make_bands(height, dtype, device)
            _kept.put(key, bands, _num_bytes(bands))
        return bands

    def _make_bands(self, height: int, dtype: torch.dtype, device: torch.device) -> tuple[Band, ...]:
        target = self.target_length
        rows = [slice(top, min(top + height, target)) for top in range(0, target, height)]
        if self.is_identity:
            return tuple(Band(each, None, each) for each in rows)
        # Tensors made in inference mode could never take part in a training step.
        with torch.inference_mode(False):
            matrix = _to_device(self.matrix(dtype), device)
            bands = []
            for each in rows:
                columns = self.columns(each)
                first, last = columns[0], columns[-1]
                if last - first < 2 * len(columns):  # a slice copies nothing
                    used = slice(first, last + 1)
                    bands.append(Band(each, matrix[each, used], used))
                else:
                    indices = _to_device(torch.tensor(columns, device="cpu"), device)
                    bands.append(Band(each, matrix[each].index_select(1, indices), indices))
            return tuple(bands)

    def columns(self, rows: slice) -> list[int]:
        """List the columns of the matrix that may differ from zero in `rows`, ascending; all others are zero there."""
        first, last = rows.start, rows.stop - 1
        if self.mirrored:
            first, last = self.target_length - 1 - last, self.target_length - 1 - first
        first, last = _neighbours(first, last, self.length, self.target_length)
        columns: list[int] = []
        for index, start in enumerate(self.starts):
            end = start + self.window_length
            if start <= last and first < end:
                inside = max(first, start) - start, min(last, end - 1) - start
                low, high = _neighbours(*inside, self.grid_length, self.window_length)
                columns += range(index * self.grid_length + low, index * self.grid_length + high + 1)
        return columns


def _neighbours(first: int, last: int, length: int, target_length: int) -> tuple[int, int]:
    """Return the ends of those of `length` points that points `first` to `last` of `target_length` lie between."""
    if length == target_length:
        return first, last
    scale = length / target_length
    slack = 1e-4 + 1e-6 * length  # `F.interpolate` computes positions in float32
    low = math.floor((first + 0.5) * scale - 0.5 - slack)
    high = math.floor((last + 0.5) * scale - 0.5 + slack) + 1
    return min(max(low, 0), length - 1), max(min(high, length - 1), 0)


def upsampling_bands(
    length: int, target_length: int, row_elements: int, like: Tensor, dtype: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor, slice]]:
    """Upsample along one axis, band by band: `target[band] = operator @ rows[used]`.

    Args:
        length: Number of rows.
        target_length: Number of rows wanted.
        row_elements: Elements of a row; decides how high a band is.
        like: Its device, and its dtype unless `dtype` is given, are the operators'.

    Yields:
        Rows of the target, operator `(rows of the target, rows used)`, rows used. Operators are shared: leave them as
        they are.
    """
    axis = Axis(length, (0,), target_length, target_length, target_length)
    dtype = dtype or like.dtype
    for band in axis.bands(band_height(like.device, row_elements), dtype, like.device):
        assert isinstance(band.used, slice)  # only rows of several windows may lie far apart
        operator = band.matrix
        if operator is None:
            operator = torch.eye(band.rows.stop - band.rows.start, dtype=dtype, device=like.device)
        yield band.rows, operator, band.used


def band_height(device: torch.device, row_elements: int) -> int:
    """Return how many rows of `row_elements` scores are upsampled at a time on a device."""
    return max(1, BAND_ELEMENTS.get(device.type, 2**25) // row_elements)


def resample(scores: Tensor, vertical: Axis, horizontal: Axis) -> Tensor:
    """Bring scores of windows, side by side, to the axes' targets; gradients flow.

    Args:
        scores: `(..., rows, columns)`, any floating type.

    Returns:
        `(..., vertical.target_length, horizontal.target_length)`, in the type of `scores`.
    """
    if vertical.is_identity and horizontal.is_identity:
        return scores
    dtype = product_dtype(scores.dtype, scores.device)
    rows, columns = (axis.whole(dtype, scores.device) for axis in (vertical, horizontal))
    result = scores.to(dtype)
    with without_autocast(scores.device):
        if columns.matrix is not None:
            result = result[..., columns.used] @ columns.matrix.T
        if rows.matrix is not None:
            result = rows.matrix @ result[..., rows.used, :]
    return result.to(scores.dtype)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Say in which type matrix products of scores are exact to float32, whatever the settings of this process.

    Settings such as TF32 or `torch.set_float32_matmul_precision` hold for all threads, so they are not changed but
    evaded.

    Args:
        dtype: Type of the scores.

    Returns:
        float64 for scores in float64 and where products in float32 are rounded to fewer bits, else float32.
    """
    if dtype == torch.float64:
        return dtype
    # Apple's GPUs know neither float64 nor such a setting.
    return torch.float64 if device.type != "mps" and _products_are_rounded(device.type) else torch.float32


@torch.compiler.assume_constant_result
def _products_are_rounded(device_type: str) -> bool:
    """Whether this process lets matrix products of float32 be computed in TF32 or bfloat16 on such devices."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    # Older settings and newer ones may not be mixed; this reads both without an error.
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return precision not in ("ieee", "none")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Have this thread compute, within, on such devices in the types that tensors have."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Copies to CUDA are ordered by the stream, so that nobody needs to wait for them.
    return tensor.to(device, non_blocking=device.type == "cuda")


def _tensors_are_real() -> bool:
    """Whether tensors made here are PyTorch's plain ones, which later calls can use."""
    probe = torch.empty(0, device="cpu")
    return type(probe) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(probe)


def _num_bytes(bands: Sequence[Band]) -> int:
    """Count the bytes that bands occupy, what they share once."""
    tensors = [each for band in bands for each in (band.matrix, band.used) if isinstance(each, Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


class _Kept:
    """What was asked for last, bounded in number and bytes; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[tuple[Band, ...], int]] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: Hashable) -> tuple[Band, ...] | None:
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, bands: tuple[Band, ...], num_bytes: int) -> None:
        if num_bytes > KEPT_BYTES:
            return
        with self._lock:
            self._num_bytes += num_bytes - self._entries.pop(key, ((), 0))[1]
            self._entries[key] = bands, num_bytes
            while self._num_bytes > KEPT_BYTES or len(self._entries) > KEPT_ENTRIES:
                self._num_bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._num_bytes = 0


_kept = _Kept()
