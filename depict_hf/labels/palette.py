"""Colours that are easy to tell apart, for colour-blind people too."""

from collections.abc import Sequence
from functools import cache

import numpy as np

# What red, green and blue light become for people without one kind of cone: nobody, protanopes, deuteranopes.
# Source: Machado, Oliveira and Fernandes, IEEE TVCG 15(6), 2009, table of simulation matrices at severity 1.0.
VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    ]
)
# sRGB to XYZ under D65, and the white of that (IEC 61966-2-1).
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])

# Levels of each channel that candidates are made of, and their lightness: neither black, which is no class, nor white.
LEVELS = np.arange(0, 256, 17)
LIGHTNESS = (25, 92)
# Most people see all hues: for them colours shall be so many times as far apart as for others.
NORMAL_VISION_FACTOR = 1.5
FIRST_COLOR = (0, 119, 187)


def perceived(colors: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """Convert colours to CIELAB, where distances are about those that people see.

    Args:
        colors: `(colours, 3)`, RGB in 0 to 255.

    Returns:
        `(visions, colours, 3)`: to normal vision, protanopes and deuteranopes.
    """
    values = np.asarray(colors, dtype=np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.einsum("vij,nj->vni", VISIONS, linear), 0, 1)
    relative = seen @ XYZ.T / WHITE
    bent = np.where(relative > 216 / 24389, np.cbrt(relative), (24389 / 27 * relative + 16) / 116)
    x, y, z = np.moveaxis(bent, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def smallest_distances(colors: Sequence[Sequence[int]] | np.ndarray) -> list[float]:
    """Return the distance of the two most similar colours in CIELAB to normal vision, protanopes and deuteranopes."""
    lab = perceived(colors)
    distances = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1)
    distances[:, np.eye(len(colors), dtype=bool)] = np.inf
    return distances.min(axis=(1, 2)).tolist()


@cache
def _distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    candidates = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = perceived(candidates)[0, :, 0]
    candidates = candidates[(lightness >= LIGHTNESS[0]) & (lightness <= LIGHTNESS[1])]
    lab = perceived(candidates)
    lab[0] /= NORMAL_VISION_FACTOR
    chosen = [int(np.abs(candidates - FIRST_COLOR).sum(axis=1).argmin())]
    nearest = np.full(len(candidates), np.inf)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[:, chosen[-1:]], axis=-1).min(axis=0))
        chosen.append(int(nearest.argmax()))
    return tuple(tuple(color) for color in candidates[chosen].tolist())


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Return colours as far apart as can be, for normal and colour-blind eyes alike; always the same ones.

    Each colour is the one whose smallest distance to all before it, over the three kinds of vision, is largest. So the
    first colours are the same however many are wanted.

    Returns:
        RGB in 0 to 255.
    """
    return list(_distinct_colors(count))[:count]
