"""Pure functions on images and logits larger than one window: cut, merge, label by bands."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .resampling import (
    BAND_ELEMENTS,
    Axis,
    Band,
    axis_operator,
    band_height,
    product_dtype,
    resample,
    resize_bilinear,
    size_of,
    upsampling_bands,
    without_autocast,
)

__all__ = [
    "BAND_ELEMENTS",
    "STRIP_ELEMENTS",
    "CoarseScores",
    "Segmentation",
    "axis_operator",
    "cut_windows",
    "enlarge_to_window",
    "enlarged_size",
    "label_map",
    "label_views",
    "merge_windows",
    "pad_to_multiple",
    "resize_bilinear",
    "score_bands",
    "upsampling_bands",
    "window_corners",
    "window_starts",
]

# Scores that are enlarged in width only, for all rows at a time: bounds the memory of large photographs.
STRIP_ELEMENTS = 2**24

# Windows of one image at one scale, whose logits are kept until all are there.
MOST_WINDOWS = 2**17
# Pixels of all those windows together: the logits of 150 classes, 16 times coarser, take 20 GB in float32.
MOST_WINDOW_PIXELS = 2**33


def pad_to_multiple(pixel_values: Tensor, multiple: int) -> Tensor:
    """Zero-pad images, `(batch, channels, height, width)`, at the bottom and right to multiples of `multiple` pixels.

    Source:
        `padding`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    height, width = pixel_values.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(pixel_values, (0, right, 0, bottom)) if bottom or right else pixel_values


def enlarge_to_window(pixel_values: Tensor, window_size: int) -> Tensor:
    """Enlarge images whose shorter side is below `window_size` pixels until it fits, keeping the aspect ratio.

    Args:
        pixel_values: `(batch, channels, height, width)`.
        window_size: Pixels.

    Returns:
        The images, of shape `(batch, channels, height, width)` with the new sizes; as they are if they fit.

    Source:
        `resize`, segm/model/utils.py in rstrudel/segmenter@20d1bfa: the longer side is rounded down.
    """
    size = enlarged_size(*size_of(pixel_values), window_size)
    return pixel_values if size == size_of(pixel_values) else resize_bilinear(pixel_values, size)


def enlarged_size(height: int, width: int, window_size: int) -> tuple[int, int]:
    """Return the (height, width) that `enlarge_to_window` brings an image of `height` x `width` pixels to."""
    if min(height, width) >= window_size:
        return height, width
    # In this order of operations the rounding is the published one.
    if height < width:
        return window_size, int(width / height * window_size)
    return int(height / width * window_size), window_size


def window_starts(length: int, window_size: int, window_stride: int) -> list[int]:
    """Return the first pixels of the windows along one side; the last window is flush with the border.

    Args:
        length: Pixels of the side, at least `window_size`.

    Source:
        `sliding_window`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    return [*range(0, length - window_size, window_stride), length - window_size]


def window_corners(size: tuple[int, int], window_size: int, window_stride: int) -> list[tuple[int, int]]:
    """Return (top, left) pixels of every window on an image of `size` = (height, width), row by row.

    Raises:
        ValueError: If there are more than `MOST_WINDOWS`, they have more than `MOST_WINDOW_PIXELS`, or the stride
            leaves pixels out.
    """
    if not 0 < window_stride <= window_size <= min(size):
        raise ValueError(
            f"Got windows of {window_size} pixels every {window_stride} for an image of {size[0]}x{size[1]}, needed a "
            "positive stride of at most the window, and a window of at most the image."
        )
    down, across = (-(-(length - window_size) // window_stride) + 1 for length in size)
    count = down * across
    if count > MOST_WINDOWS or count * window_size**2 > MOST_WINDOW_PIXELS:
        raise ValueError(
            f"An image of {size[0]}x{size[1]} pixels has {count} windows of {window_size} every {window_stride}, "
            f"needed at most {MOST_WINDOWS} of together {MOST_WINDOW_PIXELS} pixels; "
            "raise the stride, or make the image smaller."
        )
    tops, lefts = (window_starts(length, window_size, window_stride) for length in size)
    return [(top, left) for top in tops for left in lefts]


def cut_windows(pixel_values: Tensor, corners: list[tuple[int, int]], window_size: int) -> Tensor:
    """Cut `(batch, ...)` images into `(len(corners) * batch, ..., window, window)`, corner by corner."""
    return torch.cat([pixel_values[..., y : y + window_size, x : x + window_size] for y, x in corners])


def merge_windows(
    window_logits: Sequence[Tensor],
    corners: Sequence[tuple[int, int]],
    size: tuple[int, int],
    window_size: int | tuple[int, int],
    target_size: tuple[int, int] | None = None,
) -> Tensor:
    """Average window logits where windows overlap.

    Args:
        window_logits: Per corner `(batch, num_labels, h, w)`, of the window's size or coarser; coarser ones are
            upsampled.
        corners: (top, left) pixels per window as of `window_corners`; together the windows cover the image.
        size: (height, width) pixels of the image. Where it is less than the only window, the rest is padding, which is
            cut off.
        window_size: Pixels of a window, one number or (height, width).
        target_size: (height, width) pixels that the average is resized to; `size` if omitted.

    Returns:
        `(batch, num_labels, *target_size)`, in the dtype of the windows; sums are kept in float32 at least.

    Source:
        `merge_windows`, segm/model/utils.py in rstrudel/segmenter@20d1bfa, up to the division by the counts.
    """
    window = (window_size, window_size) if isinstance(window_size, int) else window_size
    vertical, horizontal = _axes(window_logits[0], corners, window, size, target_size or size)
    mosaic = torch.stack(list(window_logits)).unflatten(0, (len(vertical.starts), len(horizontal.starts)))
    # (tops, lefts, batch, labels, h, w) to (batch, labels, tops * h, lefts * w)
    return resample(mosaic.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3), vertical, horizontal)


def _axes(
    logits: Tensor,
    corners: Sequence[tuple[int, int]],
    window: tuple[int, int],
    size: tuple[int, int],
    target_size: tuple[int, int],
    mirrored: bool = False,
) -> tuple[Axis, Axis]:
    """Return the vertical and the horizontal axis of windows in row-major order, whose logits are `(..., h, w)`."""
    lefts = tuple(left for top, left in corners if top == corners[0][0])
    tops = tuple(top for top, _ in corners[:: len(lefts)])
    (grid_height, grid_width), (height, width) = logits.shape[-2:], target_size
    vertical = Axis(grid_height, tops, window[0], size[0], height)
    return vertical, Axis(grid_width, lefts, window[1], size[1], width, mirrored)


@dataclass(frozen=True)
class CoarseScores:
    """Scores of all classes for one view of an image, before they are brought to the image's size.

    Args:
        mosaic: `(rows, columns, num_labels)`: the scores of all windows side by side, any floating type, any device.
        vertical: Axis from `rows` to the image's height.
        horizontal: Axis from `columns` to the image's width; against it for a mirrored view.
    """

    mosaic: Tensor
    vertical: Axis
    horizontal: Axis

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
        """Take the scores of windows that cover an image.

        Args:
            window_logits: Per corner `(num_labels, h, w)`.
            corners: (top, left) pixels per window, row by row.
            window: (height, width) pixels of a window.
            size: (height, width) pixels of the image; where it is less than the only window, the rest is padding.
            target_size: (height, width) pixels wanted.
            mirrored: Whether the image was a mirror image, so that the scores have to be mirrored back.
        """
        vertical, horizontal = _axes(window_logits[0], corners, window, size, target_size, mirrored)
        return cls(_side_by_side(window_logits, vertical, horizontal), vertical, horizontal)

    def with_logits(self, window_logits: Sequence[Tensor]) -> "CoarseScores":
        """Return the same view with other scores, per corner `(num_labels, h, w)`, as large as the old ones."""
        return replace(self, mosaic=_side_by_side(window_logits, self.vertical, self.horizontal))

    def at(self, row: int, column: int) -> Tensor:
        """Return the scores of one pixel of the image, `(num_labels,)` float32: those of `score_bands` up to rounding.

        Args:
            row, column: Pixel, from 0 to below the axes' target lengths.
        """
        device = self.mosaic.device
        dtype = product_dtype(self.mosaic.dtype, device)
        scores = self.mosaic.to(dtype).transpose(0, 1)  # (columns, rows, num_labels)
        with without_autocast(device):
            for axis, place in ((self.horizontal, column), (self.vertical, row)):
                band = axis.whole(dtype, device)
                used = scores[band.used]
                scores = used[place] if band.matrix is None else torch.tensordot(band.matrix[place], used, dims=1)
        return scores.float()


def _side_by_side(window_logits: Sequence[Tensor], vertical: Axis, horizontal: Axis) -> Tensor:
    mosaic = torch.stack(list(window_logits)).unflatten(0, (len(vertical.starts), len(horizontal.starts)))
    # (tops, lefts, labels, h, w) to (tops * h, lefts * w, labels)
    return mosaic.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


class Segmentation(NamedTuple):
    """What is known of every pixel of an image, `(height, width)` each.

    Attributes:
        labels: Class ids.
        confidence: Probability of the label, float32, where it was asked for.
        margin: That probability minus the one of the likeliest other class, float32, where it was asked for; 0 where
            two classes are equally likely.
    """

    labels: Tensor
    confidence: Tensor | None = None
    margin: Tensor | None = None


def label_map(views: Sequence[CoarseScores]) -> Tensor:
    """Return the labels of `label_views` alone, `(height, width)`."""
    return label_views(views).labels


def label_views(
    views: Sequence[CoarseScores], return_confidence: bool = False, temperature: float = 1.0
) -> Segmentation:
    """Find the class with the highest score, or the highest probability over several views, of every pixel.

    Full-size scores exist only for a band of rows and columns at a time, in float32. Equal to upsampling everything,
    up to float32 rounding.

    Args:
        views: One, whose scores are compared directly, or several, whose softmax is averaged; on one device.
        return_confidence: Whether confidence and margin are computed too; the labels are the same either way.
        temperature: Divides the scores of every view before the softmax that confidence and margin are taken from,
            never those that decide the label. Over several views another class than the label can then be likelier;
            the margin is negative there.

    Returns:
        Labels uint8, or int64 where there are more than 256 classes; all on the views' device.

    Raises:
        ValueError: If there are no views, they differ in size or classes, or the temperature cannot divide.
    """
    lengths = {(view.vertical.target_length, view.horizontal.target_length, view.mosaic.shape[-1]) for view in views}
    if len(lengths) != 1:
        raise ValueError(f"Got views of {sorted(lengths)} (height, width, classes), needed one or more of one size.")
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"Got temperature={temperature}, needed a number from 1e-06 to 1e+06.")
    device, num_labels = views[0].mosaic.device, views[0].mosaic.shape[-1]
    height, width = views[0].vertical.target_length, views[0].horizontal.target_length
    label_dtype = torch.uint8 if num_labels <= 256 else torch.int64
    if not return_confidence and len(views) == 1 and views[0].vertical.is_identity and views[0].horizontal.is_identity:
        return Segmentation(views[0].mosaic.argmax(dim=-1).to(label_dtype))
    dtypes = (label_dtype, torch.float32, torch.float32)[: 3 if return_confidence else 1]
    parts = [torch.empty(height, width, dtype=dtype, device=device) for dtype in dtypes]
    decide = _decide_together if len(views) > 1 else _decide
    for rows, columns, scores in score_bands(views):
        for part, values in zip(parts, decide(scores, return_confidence, temperature), strict=True):
            part[rows, columns] = values
    return Segmentation(*parts)


def score_bands(views: Sequence[CoarseScores]) -> Iterator[tuple[slice, slice, Iterator[Tensor]]]:
    """Yield the scores at the size of the image, a band of rows and columns at a time: all that ever exists of them.

    Args:
        views: One or several of an image, on one device.

    Yields:
        Rows and columns of a band, and the scores there of one view after the other, each float32
        `(rows, columns, num_labels)`, which the caller may overwrite. Together the bands cover every pixel once. They
        have to be read before the next band is asked for.
    """
    device, num_labels = views[0].mosaic.device, views[0].mosaic.shape[-1]
    width = views[0].horizontal.target_length
    dtype = product_dtype(views[0].mosaic.dtype, device)
    coarse_rows = sum(len(view.mosaic) for view in views)
    tile_width = min(width, max(64, STRIP_ELEMENTS // (coarse_rows * num_labels)))
    tiles = zip(*(view.horizontal.bands(tile_width, dtype, device) for view in views), strict=True)
    rows = band_height(device, tile_width * num_labels)
    bands = list(zip(*(view.vertical.bands(rows, dtype, device) for view in views), strict=True))
    with without_autocast(device):
        mosaics = [view.mosaic.to(dtype) for view in views]
        for tile in tiles:
            strips = [_columns_of(mosaic, each) for mosaic, each in zip(mosaics, tile, strict=True)]
            for band in bands:
                scores = (_rows_of(strip, each).float() for strip, each in zip(strips, band, strict=True))
                yield band[0].rows, tile[0].rows, scores


def _columns_of(mosaic: Tensor, band: Band) -> Tensor:
    """Bring `(rows, columns, num_labels)` to `(rows, columns of the band, num_labels)`."""
    columns = mosaic[:, band.used]
    return columns if band.matrix is None else band.matrix @ columns


def _rows_of(strip: Tensor, band: Band) -> Tensor:
    """Bring `(rows, columns, num_labels)` to `(rows of the band, columns, num_labels)`, which nobody else holds."""
    rows = strip[band.used]
    return rows.clone() if band.matrix is None else torch.tensordot(band.matrix, rows, dims=1)


def _decide(scores: Iterable[Tensor], return_confidence: bool, temperature: float) -> tuple[Tensor, ...]:
    """Label and, where asked for, confidence and margin of each pixel.

    Args:
        scores: Scores of one view, `(height, width, num_labels)`, float32; overwritten.
    """
    [scores] = scores
    labels = scores.argmax(dim=-1)
    if not return_confidence:
        return (labels,)
    index = labels[..., None]
    # Relative to the label's score, whose own term is 1.
    others = scores.sub_(scores.gather(-1, index)).div_(temperature).scatter_(-1, index, -torch.inf)
    runner_up = others.amax(dim=-1).exp()
    confidence = 1 / (1 + others.exp_().sum(dim=-1))
    return labels, confidence, confidence * (1 - runner_up)


def _decide_together(scores: Iterable[Tensor], return_confidence: bool, temperature: float) -> tuple[Tensor, ...]:
    """Decide as `_decide` does, by the average of the probabilities of several views."""
    total: Tensor | None = None
    tempered: Tensor | None = None
    num_views = 0
    for each in scores:
        total = _add(total, each.softmax(dim=-1))
        if return_confidence and temperature != 1:
            tempered = _add(tempered, each.div_(temperature).softmax(dim=-1))
        num_views += 1
    assert total is not None  # there are several views
    labels = total.argmax(dim=-1)
    if not return_confidence:
        return (labels,)
    index = labels[..., None]
    probabilities = (total if tempered is None else tempered).div_(num_views)
    confidence = probabilities.gather(-1, index)[..., 0]
    runner_up = probabilities.scatter_(-1, index, 0).amax(dim=-1)
    return labels, confidence, confidence - runner_up


def _add(total: Tensor | None, values: Tensor) -> Tensor:
    return values if total is None else total.add_(values)
