"""Pure functions on images and logits larger than one window: cut, merge, resize."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def merge_windows(
    window_logits: list[Tensor], corners: list[tuple[int, int]], size: tuple[int, int], window_size: int
) -> Tensor:
    """Average window logits where windows overlap.

    Args:
        window_logits: Per corner `(batch, num_labels, h, w)`, of the window's size or coarser; coarser ones are
            upsampled one window at a time.
        corners: (top, left) pixels per window; together the windows cover the image.
        size: (height, width) pixels of the image.

    Returns:
        `(batch, num_labels, height, width)`, in the dtype of the windows; sums are kept in float32.

    Source:
        `merge_windows`, segm/model/utils.py in rstrudel/segmenter@20d1bfa, up to the division by the counts.
    """
    first = window_logits[0]
    total = torch.zeros(*first.shape[:2], *size, dtype=torch.float32, device=first.device)
    count = torch.zeros(size, dtype=torch.float32, device=first.device)
    for logits, (top, left) in zip(window_logits, corners, strict=True):
        rows, columns = slice(top, top + window_size), slice(left, left + window_size)
        total[..., rows, columns] += resize_bilinear(logits, (window_size, window_size))
        count[rows, columns] += 1
    return total.div_(count).to(first.dtype)
