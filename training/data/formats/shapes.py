"""Outlines to pixels: a pixel belongs to a shape that holds its centre, which lies half a pixel from its corner."""

from collections.abc import Sequence

import numpy as np

from depict_hf.photo_files import MAX_PHOTO_PIXELS

Points = Sequence[tuple[float, float]]


def blank_map(height: object, width: object) -> np.ndarray:
    """Make a label map of class 0, uint8 `(height, width)`, of a size that annotations declare.

    Raises:
        ValueError: If they are no numbers of pixels, or more than any photograph has.
    """
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"its size is declared as {height!r} x {width!r}, needed are two numbers of pixels")
    if height * width > MAX_PHOTO_PIXELS:
        raise ValueError(f"its size is declared as {height} x {width} pixels, needed are at most {MAX_PHOTO_PIXELS}")
    return np.zeros((height, width), dtype=np.uint8)


def inside_polygon(points: Points, height: int, width: int) -> np.ndarray:
    """Find the pixels in a polygon by the even-odd rule, bool `(height, width)`; what lies beyond is cut off.

    Args:
        points: Its corners (x, y), in pixels from the picture's upper left corner.
        height, width: Size of the picture, in pixels.

    Raises:
        ValueError: If a coordinate is not finite.
    """
    if not np.isfinite(points).all():
        raise ValueError("it has coordinates that are not finite numbers")
    # Each edge toggles, in every row that it crosses, all pixels to the right of it.
    toggles = np.zeros((height, width + 1), dtype=np.int32)
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if y0 == y1:
            continue
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        first, last = np.ceil(np.clip([y0 - 0.5, y1 - 0.5], 0, height)).astype(int)
        rows = np.arange(first, last)
        crossings = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.ceil(np.clip(crossings - 0.5, 0, width)).astype(int)
        np.add.at(toggles, (rows, columns), 1)
    return np.cumsum(toggles, axis=1)[:, :width] % 2 == 1


def inside_rectangle(corners: Points, height: int, width: int, degrees: float = 0.0) -> np.ndarray:
    """Find the pixels in a rectangle of two corners, turned clockwise about its centre; as `inside_polygon`."""
    (left, top), (right, bottom) = corners
    points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=float)
    if degrees:
        angle = np.radians(degrees)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = (points - points.mean(axis=0)) @ turn + points.mean(axis=0)
    return inside_polygon([(x, y) for x, y in points.tolist()], height, width)


def inside_circle(center: tuple[float, float], edge: tuple[float, float], height: int, width: int) -> np.ndarray:
    """Find the pixels in a circle about `center` through `edge`; as `inside_polygon`."""
    if not np.isfinite([center, edge]).all():
        raise ValueError("it has coordinates that are not finite numbers")
    rows, columns = np.mgrid[:height, :width] + 0.5
    radius = np.hypot(edge[0] - center[0], edge[1] - center[1])
    return np.hypot(columns - center[0], rows - center[1]) <= radius


def place_mask(mask: np.ndarray, left: int, top: int, height: int, width: int) -> np.ndarray:
    """Put a small mask at its place in a picture, bool `(height, width)`; what lies beyond the picture is cut off."""
    whole = np.zeros((height, width), dtype=bool)
    inside = mask[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    top, left = max(top, 0), max(left, 0)
    whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return whole
