"""Pure functions on images and logits larger than one window: cut, merge, resize, label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores that are upsampled at a time: on a CPU few enough to stay in its cache, else enough to keep a processor busy.
BAND_ELEMENTS = {"cpu": 2**19}
# Scores that are enlarged in width only, for all rows at a time: bounds the memory of large photographs.
STRIP_ELEMENTS = 2**24


def resize_bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `(batch, channels, height, width)` to `size` = (height, width) pixels, without antialiasing.

    Returns the input itself where the size already fits.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


def pad_to_multiple(pixel_values: Tensor, multiple: int) -> Tensor:
    """Zero-pad images at the bottom and right until both sides are multiples of `multiple` pixels.

    Source:
        `padding`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    height, width = pixel_values.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(pixel_values, (0, right, 0, bottom)) if bottom or right else pixel_values


def enlarge_to_window(pixel_values: Tensor, window_size: int) -> Tensor:
    """Enlarge images whose shorter side is below `window_size` pixels until it fits, keeping the aspect ratio.

    Source:
        `resize`, segm/model/utils.py in rstrudel/segmenter@20d1bfa: the longer side is rounded down.
    """
    height, width = pixel_values.shape[-2:]
    if min(height, width) >= window_size:
        return pixel_values
    # In this order of operations the rounding is the published one.
    if height < width:
        size = (window_size, int(width / height * window_size))
    else:
        size = (int(height / width * window_size), window_size)
    return resize_bilinear(pixel_values, size)


def window_starts(length: int, window_size: int, window_stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window is flush with the border.

    Args:
        length: Pixels of the side, at least `window_size`.

    Source:
        `sliding_window`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    return [*range(0, length - window_size, window_stride), length - window_size]


def window_corners(size: tuple[int, int], window_size: int, window_stride: int) -> list[tuple[int, int]]:
    """(top, left) pixels of every window on an image of `size` = (height, width), row by row."""
    tops, lefts = (window_starts(length, window_size, window_stride) for length in size)
    return [(top, left) for top in tops for left in lefts]


def cut_windows(pixel_values: Tensor, corners: list[tuple[int, int]], window_size: int) -> Tensor:
    """Cut `(batch, ...)` images into `(len(corners) * batch, ..., window, window)`, corner by corner."""
    return torch.cat([pixel_values[..., y : y + window_size, x : x + window_size] for y, x in corners])


def axis_operator(
    grid_length: int, starts: Sequence[int], window_length: int, length: int, target_length: int
) -> Tensor:
    """What merging windows and resizing the result does along one axis, as a matrix.

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

    Returns:
        `(target_length, len(starts) * grid_length)`, float32, on the CPU; every row sums to 1.
    """
    upsample = _resize_rows(torch.eye(grid_length), window_length)
    if len(starts) == 1:
        return _resize_rows(upsample[:length], target_length)
    total = torch.zeros(length, len(starts), grid_length)
    count = torch.zeros(length, 1, 1)
    for index, start in enumerate(starts):
        total[start : start + window_length, index] += upsample
        count[start : start + window_length] += 1
    return _resize_rows(total.div_(count).flatten(1), target_length)


def _resize_rows(matrix: Tensor, length: int) -> Tensor:
    return resize_bilinear(matrix[None, None], (length, matrix.shape[1]))[0, 0]


def merge_windows(
    window_logits: Sequence[Tensor],
    corners: Sequence[tuple[int, int]],
    size: tuple[int, int],
    window_size: int,
    target_size: tuple[int, int] | None = None,
) -> Tensor:
    """Average window logits where windows overlap.

    Args:
        window_logits: Per corner `(batch, num_labels, h, w)`, of the window's size or coarser; coarser ones are
            upsampled.
        corners: (top, left) pixels per window as of `window_corners`; together the windows cover the image.
        size: (height, width) pixels of the image.
        target_size: (height, width) pixels that the average is resized to; `size` if omitted.

    Returns:
        `(batch, num_labels, *target_size)`, in the dtype of the windows; sums are kept in float32.

    Source:
        `merge_windows`, segm/model/utils.py in rstrudel/segmenter@20d1bfa, up to the division by the counts.
    """
    first = window_logits[0]
    axes = zip(_starts(corners), first.shape[-2:], size, target_size or size, strict=True)
    vertical, horizontal = (
        axis_operator(grid, starts, window_size, length, target).to(first.device)
        for starts, grid, length, target in axes
    )
    tops, lefts = _starts(corners)
    mosaic = torch.stack(list(window_logits)).float().unflatten(0, (len(tops), len(lefts)))
    # (tops, lefts, batch, labels, h, w) to (batch, labels, tops * h, lefts * w)
    mosaic = mosaic.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
    with torch.autocast(first.device.type, enabled=False):
        return (vertical @ (mosaic @ horizontal.T)).to(first.dtype)


def _starts(corners: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Tops and lefts of windows in row-major order."""
    lefts = [left for top, left in corners if top == corners[0][0]]
    return [top for top, _ in corners[:: len(lefts)]], lefts


@dataclass(frozen=True)
class CoarseScores:
    """Scores of all classes for one view of an image, before they are brought to the image's size.

    Args:
        mosaic: `(rows, columns, num_labels)`: the scores of all windows side by side, any floating type, any device.
        vertical: `(height, rows)`, of `axis_operator`.
        horizontal: `(width, columns)`, of `axis_operator`; upside down for a mirrored view.
    """

    mosaic: Tensor
    vertical: Tensor
    horizontal: Tensor

    @classmethod
    def from_windows(
        cls,
        window_logits: Sequence[Tensor],
        corners: Sequence[tuple[int, int]],
        window: tuple[int, int],
        size: tuple[int, int],
        target_size: tuple[int, int],
        mirrored: bool = False,
    ) -> "CoarseScores":
        """Of windows that cover an image.

        Args:
            window_logits: Per corner `(num_labels, h, w)`.
            corners: (top, left) pixels per window, row by row.
            window: (height, width) pixels of a window.
            size: (height, width) pixels of the image; where it is less than the only window, the rest is padding.
            target_size: (height, width) pixels wanted.
            mirrored: Whether the image was a mirror image, so that the scores have to be mirrored back.
        """
        tops, lefts = _starts(corners)
        grid_height, grid_width = window_logits[0].shape[-2:]
        vertical = axis_operator(grid_height, tops, window[0], size[0], target_size[0])
        horizontal = axis_operator(grid_width, lefts, window[1], size[1], target_size[1])
        mosaic = torch.stack(list(window_logits)).unflatten(0, (len(tops), len(lefts)))
        # (tops, lefts, labels, h, w) to (tops * h, lefts * w, labels)
        mosaic = mosaic.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return cls(mosaic, vertical, horizontal.flip(0) if mirrored else horizontal)


def label_map(views: Sequence[CoarseScores]) -> Tensor:
    """The class with the highest score, or with the highest probability over several views, of every pixel.

    Full-size scores exist only for a band of rows and columns at a time, in float32. Equal to upsampling everything,
    up to float32 rounding.

    Args:
        views: One, whose scores are compared directly, or several, whose softmax is added up; on one device.

    Returns:
        `(height, width)`, uint8, or int64 where there are more than 256 classes, on the views' device.
    """
    device, num_labels = views[0].mosaic.device, views[0].mosaic.shape[-1]
    height, width = len(views[0].vertical), len(views[0].horizontal)
    labels = torch.empty(height, width, dtype=torch.uint8 if num_labels <= 256 else torch.int64, device=device)
    coarse_rows = sum(len(view.mosaic) for view in views)
    tile_width = min(width, max(64, STRIP_ELEMENTS // (coarse_rows * num_labels)))
    band_height = _band_height(device, tile_width * num_labels)
    rows = [slice(top, top + band_height) for top in range(0, height, band_height)]
    with torch.autocast(device.type, enabled=False):
        bands = [[_band(view.vertical[each], device) for view in views] for each in rows]
        mosaics = [view.mosaic.float() for view in views]
        for left in range(0, width, tile_width):
            columns = slice(left, left + tile_width)
            strips = [view.horizontal[columns].to(device) @ mosaic for view, mosaic in zip(views, mosaics, strict=True)]
            for each, operators in zip(rows, bands, strict=True):
                labels[each, columns] = _best(strips, operators)
    return labels


def _best(strips: list[Tensor], operators: list[tuple[Tensor, Tensor | slice]]) -> Tensor:
    """Best class of each pixel of one band of one tile."""
    total = None
    for strip, (operator, used) in zip(strips, operators, strict=True):
        scores = torch.tensordot(operator, strip[used], dims=1)
        if len(strips) > 1:
            scores = scores.softmax(dim=-1)
            total = scores if total is None else total.add_(scores)
    return (scores if total is None else total).argmax(dim=-1)


def upsampling_bands(
    length: int, target_length: int, row_elements: int, like: Tensor
) -> Iterator[tuple[slice, Tensor, slice]]:
    """Upsampling along one axis, band by band: `target[band] = operator @ rows[used]`.

    Args:
        length: Number of rows.
        target_length: Number of rows wanted.
        row_elements: Elements of a row; decides how high a band is.
        like: Its dtype and device are the operators'.

    Yields:
        Rows of the target, operator `(rows of the target, rows used)`, rows used.
    """
    operator = _resize_rows(torch.eye(length, dtype=like.dtype), target_length)
    height = _band_height(like.device, row_elements)
    for top in range(0, target_length, height):
        band = slice(top, min(top + height, target_length))
        used = operator[band].any(dim=0).nonzero()[:, 0]
        used = slice(int(used[0]), int(used[-1]) + 1)
        yield band, operator[band, used].to(like.device), used


def _band_height(device: torch.device, row_elements: int) -> int:
    return max(1, BAND_ELEMENTS.get(device.type, 2**25) // row_elements)


def _band(operator: Tensor, device: torch.device) -> tuple[Tensor, Tensor | slice]:
    """Rows of an operator without the columns that are zero in all of them, and which columns remain."""
    used = operator.any(dim=0).nonzero()[:, 0]
    first, last = int(used[0]), int(used[-1])
    if last - first < 2 * len(used):  # a slice copies nothing
        return operator[:, first : last + 1].to(device), slice(first, last + 1)
    return operator[:, used].to(device), used.to(device)
