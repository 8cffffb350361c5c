"""Differences between decoders with intervals and p-values, by a paired bootstrap over seeds and images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .maps import class_iou

# Resamples that are computed together.
CHUNK = 250


@dataclass(frozen=True)
class Difference:
    """A difference and its resamples.

    Args:
        value: The difference itself.
        by_seed: The same for every seed alone.
        resampled: `(resamples,)`, the difference in each resample.
    """

    value: float
    by_seed: tuple[float, ...]
    resampled: np.ndarray

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval, not corrected for other tests."""
        low, high = np.quantile(self.resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def p_not_above(self, bound: float) -> float:
        """Return the one-sided p-value of "the difference is at most `bound`"."""
        return float((1 + (self.resampled <= bound).sum()) / (1 + len(self.resampled)))

    def p_not_below(self, bound: float) -> float:
        """Return the one-sided p-value of "the difference is at least `bound`"."""
        return float((1 + (self.resampled >= bound).sum()) / (1 + len(self.resampled)))


def mean_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the mean IoU of matrices `(..., classes, classes)` over the classes that each of them has."""
    return np.nanmean(class_iou(confusion), axis=-1)


def accuracy_difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int = 0) -> Difference:
    """Compare two decoders by mean IoU.

    Args:
        first, second: `(seeds, images, classes, classes)` confusion matrices; equal seeds and images are pairs.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        `first` minus `second`, means over seeds of the mIoU over the images.

    Raises:
        ValueError: If they have different seeds or images.
    """
    if first.shape != second.shape:
        raise ValueError(f"Got counts of shapes {first.shape} and {second.shape}, needed the same seeds and images.")
    num_seeds, num_images, num_labels, _ = first.shape
    by_seed = mean_iou(first.sum(axis=1)) - mean_iou(second.sum(axis=1))
    generator = np.random.default_rng(seed)
    flat = [each.reshape(num_seeds, num_images, -1).astype(np.float64) for each in (first, second)]
    resampled: list[np.ndarray] = []
    for start in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - start)
        seeds = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=count)
        images = generator.multinomial(num_images, [1 / num_images] * num_images, size=count)
        scores = []
        for each in flat:
            totals = np.stack([images @ of_seed for of_seed in each], axis=1)
            scores.append(mean_iou(totals.reshape(count, num_seeds, num_labels, num_labels)))
        resampled.append(((scores[0] - scores[1]) * seeds).sum(axis=1) / num_seeds)
    return Difference(float(by_seed.mean()), tuple(by_seed.tolist()), np.concatenate(resampled))


def retention_difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int = 0) -> Difference:
    """Compare two decoders by the retained share of their mean IoU under noise.

    Args:
        first, second: `(seeds, draws)`, mean IoU with noise as a share of that without, averaged over noise levels.
        resamples: How many.
        seed: Of the resampling.

    Raises:
        ValueError: If they have different seeds or draws.
    """
    if first.shape != second.shape:
        raise ValueError(f"Got shares of shapes {first.shape} and {second.shape}, needed the same seeds and draws.")
    differences = first - second
    num_seeds, num_draws = differences.shape
    generator = np.random.default_rng(seed)
    seeds = generator.integers(num_seeds, size=(resamples, num_seeds, 1))
    draws = generator.integers(num_draws, size=(resamples, num_seeds, num_draws))
    by_seed = differences.mean(axis=1)
    return Difference(float(by_seed.mean()), tuple(by_seed.tolist()), differences[seeds, draws].mean(axis=(1, 2)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction, in their order.

    Raises:
        ImportError: If statsmodels is missing.
    """
    try:
        from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "The correction needs statsmodels; install the extra: pip install 'depict-hf[train]'."
        ) from error
    return [float(each) for each in multipletests(p_values, method="holm")[1]]
