"""The temperature that makes a model's probabilities most likely, fitted on a bounded sample of pixels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from depict_hf.windows import CoarseScores

from .calibration import Calibration, labelled_scores, log_probabilities

MAX_SCORES = 2**25  # Of a sample: 128 MiB, three million pixels of eleven classes.
CHUNK_SCORES = 2**22
LEAST, MOST = 0.05, 20.0


class PixelSample:
    """Labelled pixels of all photographs with equal chances, and their scores, in bounded memory.

    Every pixel draws a number, by seed, photograph and place alone; the pixels with the least are kept. So the sample
    is the same whichever process sees which photograph, and in whichever order.

    Args:
        max_scores: Numbers to keep: pixels times views times classes.
        seed: Of the drawing.
    """

    def __init__(self, max_scores: int = MAX_SCORES, seed: int = 0):
        self.max_scores = max_scores
        self.seed = seed
        self.num_seen = 0
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._below = 1.0

    def __call__(self, index: int, views: Sequence[CoarseScores], labels: Tensor) -> None:
        """Look at a photograph: its place in the split, and what `labelled_scores` takes."""
        generator = torch.Generator().manual_seed(self.seed * 2**32 + index)
        drawn = torch.rand(labels.numel(), dtype=torch.float64, generator=generator)
        for positions, scores, truth in labelled_scores(views, labels):
            self.num_seen += len(truth)
            draws = drawn[positions.cpu()]
            kept = draws < self._below
            on_device = kept.to(scores.device)
            self._kept.append((draws[kept], scores[on_device].cpu(), truth[on_device].cpu()))
            if sum(each.numel() for _, each, _ in self._kept) > 2 * self.max_scores:
                self._shrink()

    def merge(self, state: PartialState) -> None:
        """Make it the sample of all processes' photographs, in all of them; each has to call this."""
        self._shrink()
        if state.num_processes > 1:
            everywhere = gather_object([(self.num_seen, *each) for each in self._kept])
            self.num_seen = sum(each[0] for each in everywhere)
            self._kept = [each[1:] for each in everywhere]
            self._shrink()

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Scores `(pixels, views, num_labels)` float32 and true classes `(pixels,)` int64 of what is kept.

        Raises:
            ValueError: If no photograph had a labelled pixel.
        """
        self._shrink()
        if not self._kept or not len(self._kept[0][0]):
            raise ValueError("The photographs have no labelled pixel to fit a temperature to; use another split.")
        return self._kept[0][1:]

    def _shrink(self) -> None:
        """Keep the pixels that drew least, in the order of what they drew."""
        if not self._kept:
            return
        draws, scores, labels = (torch.cat(each) for each in zip(*self._kept, strict=True))
        self._kept.clear()
        order = draws.argsort()
        most = max(1, self.max_scores // scores[0].numel()) if len(scores) else 0
        if len(order) > most:
            self._below = float(draws[order[most]])
            order = order[:most]
        self._kept.append((draws[order], scores[order], labels[order]))


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    """The temperature of the least mean negative log-likelihood, between 0.05 and 20.

    For one view that is a convex function of 1 / temperature, so that a search by intervals finds its one minimum.
    Where the model labels every pixel rightly, or its scores say nothing of the truth, there is no minimum between
    these bounds, and the result lies at one of them.

    Args:
        scores: `(pixels, views, num_labels)`.
        labels: `(pixels,)` int64.

    Source:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2.
    """
    from scipy.optimize import minimize_scalar

    step = max(1, CHUNK_SCORES // scores[0].numel())

    def mean_nll(log_temperature: float) -> float:
        total = 0.0
        for part, truth in zip(scores.split(step), labels.split(step), strict=True):
            log_likely = log_probabilities(part, math.exp(log_temperature))
            total += float(F.nll_loss(log_likely, truth, reduction="sum"))
        return total / len(labels)

    bounds = (math.log(LEAST), math.log(MOST))
    found = minimize_scalar(mean_nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(f"{math.exp(found.x):.4g}")


def figures_at(temperature: float, scores: Tensor, labels: Tensor) -> dict:
    """Return `Calibration.figures` of the pixels of a sample.

    Args:
        temperature: Scores are divided by it.
        scores: `(pixels, views, num_labels)`.
        labels: `(pixels,)` int64.
    """
    calibration = Calibration(temperature)
    step = max(1, CHUNK_SCORES // scores[0].numel())
    for part, truth in zip(scores.split(step), labels.split(step), strict=True):
        calibration.add(part, truth)
    return calibration.figures()
