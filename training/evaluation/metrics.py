"""Dataset-level mean intersection over union, from one running confusion matrix, and a check by `evaluate`'s own."""

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from depict_hf.configuration_depict import IGNORE_LABEL


class Scores(TypedDict):
    """Results of a confusion matrix; fractions, NaN where nothing is labelled or a class occurs nowhere.

    `mean_iou`, `mean_accuracy` and `overall_accuracy` are numbers, the others arrays `(num_labels,)`, float64.
    """

    mean_iou: float
    mean_accuracy: float
    overall_accuracy: float
    per_category_iou: np.ndarray
    per_category_accuracy: np.ndarray


class MeanIoU:
    """The `mean_iou` metric of `evaluate`, without keeping any label map.

    Pixels are counted over the whole dataset; a class that occurs in no label map and no prediction is NaN in the
    per-category results and left out of the means.

    Args:
        num_labels: Number of classes.
        ignore_index: Label of the pixels to leave out, in predictions and references alike. It is compared after
            `reduce_labels`, and may be a class id, which then is left out.
        reduce_labels: Whether references (not predictions) are shifted: 0 becomes 255, the rest goes down by one, 255
            stays.

    Attributes:
        confusion: int64, `(num_labels + 1, num_labels + 1)`, references by predictions, on the device of the maps
            that were last added. The last row and column hold ids outside 0 to num_labels - 1, which count for the
            class they were confused with and nowhere else. Matrices of several processes may be summed.

    Source:
        metrics/mean_iou/mean_iou.py in huggingface/evaluate@210d214, whose histograms have the same effect.
    """

    def __init__(self, num_labels: int, ignore_index: int = IGNORE_LABEL, reduce_labels: bool = False):
        if num_labels < 1:
            raise ValueError(f"Got num_labels={num_labels}, needed at least 1; pass the number of classes.")
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.reduce_labels = reduce_labels
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added."""
        self.confusion = torch.zeros(self.num_labels + 1, self.num_labels + 1, dtype=torch.long)

    def add_batch(self, *, predictions, references) -> None:
        """Count the pixels of one batch.

        Args:
            predictions: Sequence of integer maps `(height, width)`, each of its own size, or one array or tensor
                `(batch, height, width)`.
            references: The label maps of the same images.

        Raises:
            ValueError: If the maps are not pairs of integer maps of one shape. Nothing of the batch is counted then.
        """
        if len(predictions) != len(references):
            raise ValueError(
                f"Got {len(predictions)} predictions and {len(references)} references, needed one of each per image."
            )
        pairs = [
            self._check_pair(index, _to_map(prediction), _to_map(reference))
            for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True))
        ]
        for prediction, reference in pairs:
            self.add(self._count(prediction, reference))

    def add(self, counts: Tensor) -> None:
        """Add a matrix of `count`, of the shape that it returns."""
        self.confusion = self.confusion.to(counts.device) + counts

    def count(self, prediction: Tensor, reference: Tensor) -> Tensor:
        """Count the confusion matrix of one image, not yet added; like the attribute, on the device of the label map.

        Args:
            prediction: `(height, width)`, integer. Two maps of uint8 are several times as fast as others.
            reference: `(height, width)`, integer.

        Raises:
            ValueError: If they are not two integer maps of one shape.
        """
        return self._count(*self._check_pair(0, prediction, reference))

    def compute(self) -> Scores:
        """Compute the results over everything added since the start or the last `reset`; more may be added later.

        Returns:
            What `scores` returns.
        """
        return scores(self.confusion)

    def _count(self, prediction: Tensor, reference: Tensor) -> Tensor:
        prediction = prediction.to(reference.device)
        if prediction.dtype == reference.dtype == torch.uint8:
            reference, prediction, counts = _distinct_pairs(reference, prediction)
        else:
            reference, prediction, counts = reference.long().flatten(), prediction.long().flatten(), None
        if self.reduce_labels:
            # 0 and 255 both end as 255; 254 cannot come from anything but 255.
            reference = torch.where((reference == 0) | (reference == 255), 255, reference - 1)
        kept = reference != self.ignore_index
        rows, columns = (self._in_range(ids[kept]) for ids in (reference, prediction))
        size = self.num_labels + 1
        if counts is None:
            matrix = torch.bincount(rows * size + columns, minlength=size * size)
        else:
            matrix = counts.new_zeros(size * size).index_add_(0, rows * size + columns, counts[kept])
        return matrix.view(size, size)

    def _in_range(self, ids: Tensor) -> Tensor:
        return torch.where((ids < 0) | (ids >= self.num_labels), self.num_labels, ids)

    @staticmethod
    def _check_pair(index: int, prediction: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        if prediction.shape != reference.shape or reference.ndim != 2:
            raise ValueError(
                f"Map {index} of the batch: got a prediction of shape {tuple(prediction.shape)} and a reference of "
                f"shape {tuple(reference.shape)}, needed the same (height, width); resize logits to the label map "
                "before the argmax."
            )
        for name, ids in (("prediction", prediction), ("reference", reference)):
            if ids.is_floating_point() or ids.is_complex():
                raise ValueError(f"Map {index} of the batch: got a {name} of {ids.dtype}, needed integer class ids.")
        return prediction, reference


def scores(confusion: Tensor) -> Scores:
    """Compute the results of a confusion matrix as `MeanIoU` keeps it, of a dataset or of one image.

    Returns:
        `mean_iou`, `mean_accuracy` and `overall_accuracy`, fractions, NaN without any labelled pixel;
        `per_category_iou` and `per_category_accuracy`, `(num_labels,)` float64.
    """
    counts = confusion.cpu().numpy().astype(np.float64)
    intersection = counts.diagonal()[:-1]
    label_area = counts.sum(axis=1)[:-1]
    prediction_area = counts.sum(axis=0)[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = intersection / (label_area + prediction_area - intersection)
        accuracy = intersection / label_area
        overall_accuracy = intersection.sum() / label_area.sum()
    return {
        "mean_iou": _mean_of_present(iou),
        "mean_accuracy": _mean_of_present(accuracy),
        "overall_accuracy": float(overall_accuracy),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


class EvaluateMeanIoU:
    """The real `mean_iou` of `evaluate`, to check `MeanIoU` by. It keeps every map until the end.

    Args:
        num_labels: Number of classes.
        ignore_index: Label of the pixels to leave out.
        source: Name on the Hub, or path of the metric's script or of the folder with it.

    Raises:
        OSError: If the metric cannot be had.
        ValueError: If there are more classes than the metric's 8-bit images hold.
    """

    def __init__(self, num_labels: int, ignore_index: int = IGNORE_LABEL, source: str = "mean_iou"):
        import evaluate

        if num_labels > 256:
            raise ValueError(f"Got {num_labels} classes, needed at most 256: evaluate's mean_iou keeps 8-bit images.")

        advice = (
            "pass the path of a copy of metrics/mean_iou/mean_iou.py of huggingface/evaluate, or compute without it"
        )
        if source != "mean_iou" and not Path(source).exists():
            raise FileNotFoundError(f"Got the metric script {source}, which does not exist; {advice}.")
        try:
            # Runs at the same time must not share a file of maps.
            self.metric = evaluate.load(source, experiment_id=uuid.uuid4().hex)
        except (OSError, ImportError, SyntaxError) as error:
            raise OSError(f"The metric {source} of evaluate cannot be loaded; {advice}: {error}") from error
        self.arguments = {"num_labels": num_labels, "ignore_index": ignore_index, "reduce_labels": False}

    def add(self, prediction: Tensor, reference: Tensor) -> None:
        """Hand over the maps of one image, `(height, width)` integers of 0 to 255, on any device."""
        maps = (each.to("cpu", torch.uint8).numpy() for each in (prediction, reference))
        self.metric.add_batch(**{name: [each] for name, each in zip(("predictions", "references"), maps, strict=True)})

    def compute(self) -> Scores:
        """Return the results as of `scores`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.metric.compute(**self.arguments)


def largest_difference(results: Mapping[str, Any], others: Mapping[str, Any]) -> float:
    """Compare all numbers of two results of `scores`; infinite where one is NaN (or None) and the other is not."""
    differences = [0.0]
    for key, values in results.items():
        ours, theirs = (np.atleast_1d(np.asarray(each, dtype=np.float64)) for each in (values, others[key]))
        if (np.isnan(ours) != np.isnan(theirs)).any():
            return math.inf
        differences.append(float(np.nanmax(np.abs(ours - theirs), initial=0.0)))
    return max(differences)


def compare_metrics(record: dict, results: Mapping[str, Any], source: str) -> dict:
    """Compare a record of `evaluate` with what `EvaluateMeanIoU` computed from the same label maps.

    Args:
        record: Ours.
        results: What `EvaluateMeanIoU.compute` returned.
        source: Where that metric came from.

    Returns:
        `source`, `mean_iou`, `mean_accuracy` and `overall_accuracy` of that metric, and `largest_difference` over these
        and all classes.
    """
    means = ("mean_iou", "mean_accuracy", "overall_accuracy")
    ours = {name: record[name] for name in means}
    ours |= {f"per_category_{kind}": list(record[f"per_class_{kind}"].values()) for kind in ("iou", "accuracy")}
    theirs = {name: float(results[name]) for name in means}
    return {"source": source, **theirs, "largest_difference": largest_difference(ours, results)}


def _distinct_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of values that occur at one place of two uint8 tensors, int64, and how often each does."""
    counts = torch.bincount((first.int() * 256 + second).flatten(), minlength=256 * 256)
    pairs = counts.nonzero().squeeze(1)
    return pairs // 256, pairs % 256, counts[pairs]


def _to_map(ids) -> Tensor:
    if isinstance(ids, Tensor):
        return ids.detach()
    array = np.asarray(ids)
    # torch has few operations on unsigned 16- to 64-bit numbers.
    widen = array.dtype.kind in "ui" and array.dtype != np.uint8
    return torch.from_numpy(array.astype(np.int64) if widen else array)


def _mean_of_present(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
