"""Dataset-level mean intersection over union, from one running confusion matrix."""

import numpy as np
import torch
from torch import Tensor


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

    def __init__(self, num_labels: int, ignore_index: int = 255, reduce_labels: bool = False):
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
            self._add(prediction, reference)

    def compute(self) -> dict[str, float | np.ndarray]:
        """Results over everything added since the start or the last `reset`; it may be called while counting.

        Returns:
            `mean_iou`, `mean_accuracy` and `overall_accuracy`, fractions; `per_category_iou` and
            `per_category_accuracy`, `(num_labels,)` float64.
        """
        counts = self.confusion.cpu().numpy().astype(np.float64)
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

    def _add(self, prediction: Tensor, reference: Tensor) -> None:
        reference = reference.long().flatten()
        prediction = prediction.long().to(reference.device).flatten()
        if self.reduce_labels:
            # 0 and 255 both end as 255; 254 cannot come from anything but 255.
            reference = torch.where((reference == 0) | (reference == 255), 255, reference - 1)
        kept = reference != self.ignore_index
        rows, columns = (self._in_range(ids[kept]) for ids in (reference, prediction))
        size = self.num_labels + 1
        counts = torch.bincount(rows * size + columns, minlength=size * size).view(size, size)
        self.confusion = self.confusion.to(counts.device) + counts

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


def _to_map(ids) -> Tensor:
    if isinstance(ids, Tensor):
        return ids.detach()
    array = np.asarray(ids)
    # torch has few operations on unsigned 16- to 64-bit numbers.
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "ui" else array)


def _mean_of_present(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
