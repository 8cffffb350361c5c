"""Means of measurements over training seeds and draws, with 95 % intervals."""

from collections.abc import Sequence
from statistics import fmean, variance

import torch

from .comparison_report import t_quantile


def crossed_mean(values: Sequence[Sequence[float]]) -> dict:
    """Return the mean over models and draws, and its 95 % interval, which covers both.

    With M models and D draws, s_M^2 the sample variance of the models' means over draws and s_D^2 that of the draws'
    means over models, the interval is the mean plus or minus t sqrt(s_M^2 / M + s_D^2 / D), with t the two-sided 95 %
    quantile of Student's t at the degrees of freedom of Welch and Satterthwaite,
    (s_M^2 / M + s_D^2 / D)^2 / ((s_M^2 / M)^2 / (M - 1) + (s_D^2 / D)^2 / (D - 1)). Of one model it covers draws only,
    of one draw models only.

    Args:
        values: `(models, draws)`; every model has the same draws.

    Returns:
        `mean`, and `interval`, [low, high], None for a single value.
    """
    mean = fmean(value for row in values for value in row)
    parts = [(fmean(row) for row in values), (fmean(column) for column in zip(*values, strict=True))]
    terms = []
    for means in map(list, parts):
        if len(means) > 1:
            terms.append((variance(means) / len(means), len(means) - 1))
    if not terms:
        return {"mean": mean, "interval": None}
    total = sum(term for term, _ in terms)
    if total == 0:
        return {"mean": mean, "interval": [mean, mean]}
    freedom = total**2 / sum(term**2 / freedom for term, freedom in terms)
    half = t_quantile(freedom) * total**0.5
    return {"mean": mean, "interval": [mean - half, mean + half]}


def paired_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> dict:
    """Subtract the second from the first, model by model and draw by draw, and summarise as `crossed_mean` does.

    Returns:
        `mean` and `interval`; both None where there are not as many models on both sides, so that none are pairs.
    """
    if len(first) != len(second):
        return {"mean": None, "interval": None}
    return crossed_mean([[a - b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)])


def side_of_zero(interval: Sequence[float] | None) -> int:
    """Return 1 or -1 where an interval is wholly above or below zero, else, or without an interval, 0."""
    if interval is None:
        return 0
    return int(interval[0] > 0) - int(interval[1] < 0)


def first_crossing(sigmas: Sequence[float], values: Sequence[float], start: float, level: float) -> float | None:
    """Return where straight lines through (0, start) and the values first fall below a level; None if nowhere."""
    left, above = 0.0, start
    for sigma, value in zip(sigmas, values, strict=True):
        if value < level <= above:
            return left + (sigma - left) * (above - level) / (above - value)
        left, above = sigma, value
    return None


def bootstrap_mean(values: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0) -> dict:
    """Return the mean over models and images, and its 95 % interval by the bootstrap over images and models.

    Each resample draws as many images as there are, with replacement, and as many models; every model has the same
    images. The interval reaches from the 2.5 % to the 97.5 % quantile of the resamples' means.

    Args:
        values: `(models, images)`.
        resamples: How many.
        seed: Of the draws.

    Returns:
        `mean`, and `interval`, [low, high], None for a single value.
    """
    table = torch.tensor(values, dtype=torch.float64)
    if table.numel() == 1:
        return {"mean": table.item(), "interval": None}
    generator = torch.Generator().manual_seed(seed)
    models, images = table.shape
    rows = torch.randint(models, (resamples, models, 1), generator=generator)
    columns = torch.randint(images, (resamples, 1, images), generator=generator)
    means = table[rows, columns].mean((1, 2))
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": table.mean().item(), "interval": [low, high]}
