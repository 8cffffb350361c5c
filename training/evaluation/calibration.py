"""How far a model's probabilities can be believed: calibration error, likelihood, Brier score, risk at coverage."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.windows import CoarseScores, score_bands

from .records import write_figure

COVERAGES = tuple(step / 20 for step in range(1, 21))
# Pixels are sorted by 1 - confidence, a float32, in bins of equal upper bits: each is 1/256 as wide as its place is far
# from certainty, so that pixels of nearly 1 are told apart as well as others.
UNCERTAINTY_SHIFT = 15
NUM_UNCERTAINTY_BINS = (0x3F800000 >> UNCERTAINTY_SHIFT) + 1
DIAGRAM_SUFFIXES = (".png", ".svg", ".pdf")


class LabelledScores(NamedTuple):
    """The labelled pixels of a part of a photograph.

    Attributes:
        positions: `(pixels,)` int64, row by row in the photograph.
        scores: `(pixels, views, num_labels)` float32, as the model made them.
        labels: `(pixels,)` int64, the true classes.
    """

    positions: Tensor
    scores: Tensor
    labels: Tensor


def labelled_scores(views: Sequence[CoarseScores], labels: Tensor) -> Iterator[LabelledScores]:
    """The scores of a photograph's labelled pixels at full size, band by band, in the engine's bounded memory.

    Args:
        views: Of one photograph, as of `depict_hf.inference.score_stream`.
        labels: `(height, width)` integers on any device, 255 where there is no class.

    Raises:
        ValueError: If the label map is of another size, or holds ids of no class.
    """
    height, width = views[0].vertical.target_length, views[0].horizontal.target_length
    if labels.shape != (height, width):
        raise ValueError(
            f"Got a label map of {tuple(labels.shape)} for scores of {(height, width)} (height, width), needed one "
            "size; keep label maps at the photographs' own."
        )
    num_labels = views[0].mosaic.shape[-1]
    labels = labels.to(views[0].mosaic.device, torch.long)
    known = labels != IGNORE_LABEL
    wrong = known & ((labels < 0) | (labels >= num_labels))
    if wrong.any():
        raise ValueError(
            f"Got the label {int(labels[wrong][0])} for a model of {num_labels} classes, needed 0 to {num_labels - 1}, "
            f"or {IGNORE_LABEL} for none."
        )
    positions = torch.arange(height * width, device=labels.device).view(height, width)
    for rows, columns, scores in score_bands(views):
        kept = known[rows, columns]
        of_views = torch.stack([each[kept] for each in scores], dim=1)
        yield LabelledScores(positions[rows, columns][kept], of_views, labels[rows, columns][kept])


def log_probabilities(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithm of the probabilities of classes, averaged over views.

    Args:
        scores: `(pixels, views, num_labels)`.
        temperature: Divides the scores of every view.

    Returns:
        `(pixels, num_labels)`.
    """
    return (scores / temperature).log_softmax(dim=-1).logsumexp(dim=1) - math.log(scores.shape[1])


class Calibration:
    """Sums over labelled pixels of any number of photographs, of fixed size; those of several processes may be added.

    Confidence is the probability of the label, which is the most probable class at temperature 1, as in
    `depict_hf.inference.segment`.

    Args:
        temperature: Divides the scores before the softmax.
        num_bins: Of equal width over (0, 1], for the calibration error and the reliability diagram.
    """

    def __init__(self, temperature: float = 1.0, num_bins: int = 15):
        if not 0 < temperature < math.inf:
            raise ValueError(f"Got temperature={temperature}, needed a positive finite number; 1 changes nothing.")
        if num_bins < 1:
            raise ValueError(f"Got num_bins={num_bins}, needed at least 1.")
        self.temperature = temperature
        self.num_bins = num_bins
        # Columns: pixels, right ones, sum of their confidence. The last bin is for confidences of exactly 1.
        self.bins = torch.zeros(num_bins + 1, 3, dtype=torch.float64)
        # Columns: pixels, wrong ones.
        self.by_uncertainty = torch.zeros(NUM_UNCERTAINTY_BINS, 2, dtype=torch.float64)
        # Negative log-likelihood, squared distance from the truth.
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count pixels.

        Args:
            scores: `(pixels, views, num_labels)` floating.
            labels: `(pixels,)` int64, true classes; no pixel without one.
        """
        scores, at_truth = scores.float(), labels[:, None]
        log_likely = log_probabilities(scores, self.temperature)
        several = scores.shape[1] > 1
        decisive = log_probabilities(scores) if several and self.temperature != 1 else log_likely
        predicted = decisive.argmax(dim=-1)
        right = (predicted == labels).double().cpu()
        log_likelihood = log_likely.gather(1, at_truth)
        likely = log_likely.exp_().clamp_(max=1)
        confidence = likely.gather(1, predicted[:, None])[:, 0].cpu()

        edges = torch.linspace(0, 1, self.num_bins + 1)
        bins = torch.bucketize(confidence, edges, right=True) - 1
        self.bins += _sums(bins, len(self.bins), torch.ones_like(right), right, confidence.double())
        uncertainty = (1 - confidence).view(torch.int32) >> UNCERTAINTY_SHIFT
        self.by_uncertainty += _sums(uncertainty, NUM_UNCERTAINTY_BINS, torch.ones_like(right), 1 - right)
        self.sums[0] -= log_likelihood.cpu().double().sum()
        difference = likely.scatter_add_(1, at_truth, torch.full_like(log_likelihood, -1))
        self.sums[1] += difference.square().sum(dim=1).cpu().double().sum()

    def reduce(self, state: PartialState) -> None:
        """Add up the sums of all processes, in all of them; each has to call this."""
        if state.num_processes > 1:
            for name in ("bins", "by_uncertainty", "sums"):
                setattr(self, name, reduce(getattr(self, name).to(state.device), "sum").cpu())

    def figures(self) -> dict:
        """Figures over everything added, ready for JSON; those of no pixels are None.

        Returns:
            `temperature`, `num_pixels`, `accuracy` and `mean_confidence`, fractions;
            `expected_calibration_error`, a fraction: |accuracy - mean confidence| of each bin, weighted by its pixels;
            `negative_log_likelihood` of the true class, nats a pixel;
            `brier_score`: squared distance of all classes' probabilities from 1 for the true and 0 for the others;
            `reliability`: `edges` of the bins, and per bin `count`, `mean_confidence` and `accuracy`;
            `risk_coverage`: `risk`, the share of wrong labels among the surest pixels, for each share of pixels in
            `coverage`, and its `area`, the mean risk over every coverage from one pixel to all.

        Source:
            The calibration error is that of `MulticlassCalibrationError(norm="l1")` in torchmetrics 1.9: bins hold
            their lower edge, and confidences of exactly 1 are a bin of their own, which the diagram shows as part of
            the last. Risk and coverage as in Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks",
            2017; where pixels are equally sure, wrong ones are spread evenly among them.
        """
        count, right, confidence = self.bins.numpy().T
        total = count.sum() or math.nan
        error = np.abs(right - confidence).sum() / total
        nll, brier = (self.sums.numpy() / total).tolist()
        shown = [np.append(each[:-2], each[-2:].sum()) for each in (count, right, confidence)]
        with np.errstate(invalid="ignore"):
            bin_accuracy, bin_confidence = shown[1] / shown[0], shown[2] / shown[0]
        risk, area = self._risks()
        return {
            "temperature": self.temperature,
            "num_pixels": int(count.sum()),
            "accuracy": _number(right.sum() / total),
            "mean_confidence": _number(confidence.sum() / total),
            "expected_calibration_error": _number(error),
            "negative_log_likelihood": _number(nll),
            "brier_score": _number(brier),
            "reliability": {
                "edges": np.linspace(0, 1, self.num_bins + 1).round(6).tolist(),
                "count": [int(each) for each in shown[0]],
                "mean_confidence": [_number(each) for each in bin_confidence],
                "accuracy": [_number(each) for each in bin_accuracy],
            },
            "risk_coverage": {
                "area": _number(area),
                "coverage": list(COVERAGES),
                "risk": [_number(each) for each in risk],
            },
        }

    def _risks(self) -> tuple[np.ndarray, float]:
        """Risk at `COVERAGES`, and the area under it."""
        used = self.by_uncertainty[self.by_uncertainty[:, 0] > 0]
        if not len(used):
            return np.full(len(COVERAGES), math.nan), math.nan
        count, wrong = used.T
        pixels, errors = count.cumsum(0), wrong.cumsum(0)
        covered = np.array(COVERAGES) * float(pixels[-1])
        risk = np.interp(covered, [0, *pixels.tolist()], [0, *errors.tolist()]) / covered
        # Within a bin the k-th surest pixel has errors_before + slope * (k - pixels_before) wrong ones up to it; the
        # sum of that over k, divided by k, is a difference of harmonic numbers.
        slope, pixels_before, errors_before = wrong / count, pixels - count, errors - wrong
        harmonic = torch.digamma(pixels + 1) - torch.digamma(pixels_before + 1)
        area = (wrong + (errors_before - slope * pixels_before) * harmonic).sum() / pixels[-1]
        return risk, float(area)


class CalibrationObserver:
    """Counts the pixels of one photograph after the other in several calibrations, reading the scores once."""

    def __init__(self, calibrations: Sequence[Calibration]):
        self.calibrations = calibrations

    def __call__(self, index: int, views: Sequence[CoarseScores], labels: Tensor) -> None:
        for part in labelled_scores(views, labels):
            for each in self.calibrations:
                each.add(part.scores, part.labels)


def check_diagram(path: Path | None) -> None:
    """Refuse a diagram that cannot be drawn, before the images are evaluated.

    Raises:
        ValueError: If its suffix is none of `DIAGRAM_SUFFIXES`.
        ImportError: If matplotlib is missing.
    """
    if path is None:
        return
    if path.suffix.lower() not in DIAGRAM_SUFFIXES:
        raise ValueError(f"Got the diagram {path}, needed a name that ends in {', '.join(DIAGRAM_SUFFIXES)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The diagram needs matplotlib; install the extra: pip install 'depict-hf[plots]'.") from error


def draw_reliability(calibrations: dict[str, dict], path: Path) -> None:
    """Draw reliability diagrams above the shares of pixels, one beside the other, and risk against coverage.

    Args:
        calibrations: By title, what `Calibration.figures` returned.
        path: Of a picture; folders above it are made.

    Raises:
        ValueError, ImportError: As `check_diagram`.
    """
    check_diagram(path)
    from matplotlib.figure import Figure

    columns = len(calibrations) + 1
    figure = Figure(figsize=(3.6 * columns, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, columns, height_ratios=(3, 1))
    risks = figure.add_subplot(grid[:, -1])
    for column, (title, figures) in enumerate(calibrations.items()):
        bins = figures["reliability"]
        edges, count = np.array(bins["edges"]), np.array(bins["count"])
        accuracy, confidence = (np.array(bins[name], dtype=float) for name in ("accuracy", "mean_confidence"))
        reliability = figure.add_subplot(grid[0, column])
        reliability.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
        reliability.bar(edges[:-1], accuracy, np.diff(edges), align="edge", color="C0", alpha=0.45, edgecolor="C0")
        reliability.plot(confidence, accuracy, "o", color="C3", markersize=4, label="bins at their mean confidence")
        reliability.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right labels")
        error, nll = figures["expected_calibration_error"], figures["negative_log_likelihood"]
        numbers = "no labelled pixels" if error is None else f"ECE {100 * error:.2f} %, NLL {nll:.4f}"
        reliability.set_title(f"{title}\n{numbers}", fontsize="medium")
        reliability.legend(fontsize="x-small", loc="upper left")
        shares = figure.add_subplot(grid[1, column], sharex=reliability)
        shares.bar(edges[:-1], 100 * count / max(count.sum(), 1), np.diff(edges), align="edge", color="C0", alpha=0.45)
        shares.set(xlabel="confidence", ylabel="pixels (%)")
        curve = figures["risk_coverage"]
        risks.plot(curve["coverage"], [100 * (each or 0) for each in curve["risk"]], ".-", label=title)
    risks.set(xlim=(0, 1.02), xlabel="coverage: share of surest pixels kept", ylabel="wrong labels among them (%)")
    risks.set_title("Risk and coverage", fontsize="medium")
    risks.set_ylim(bottom=0)
    risks.grid(alpha=0.3)
    risks.legend(fontsize="small")
    write_figure(figure, path, dpi=100)


def _sums(bins: Tensor, num_bins: int, *columns: Tensor) -> Tensor:
    """`(num_bins, len(columns))` float64."""
    return torch.stack([torch.bincount(bins, weights=each, minlength=num_bins) for each in columns], dim=1)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)
