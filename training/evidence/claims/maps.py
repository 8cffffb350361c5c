"""Pixels counted image by image, so that images can be drawn again: confusion, and boundaries of the classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import maximum_filter, minimum_filter
from torch import Tensor

from depict_hf.configuration_depict import IGNORE_LABEL

# Width of the boundary as a share of the diagonal, as in Cheng et al. 2021.
BOUNDARY_SHARE = 0.02


@dataclass(frozen=True)
class MapCounts:
    """Counts of predicted and labelled pixels of images.

    Args:
        confusion: `(images, classes, classes)` int64, labels in rows, predictions in columns, ignored pixels left out.
        boundary_intersection, boundary_union: `(images, classes)` int64, pixels near the boundaries of a class in
            both, and in at least one, of label map and prediction.
    """

    confusion: np.ndarray
    boundary_intersection: np.ndarray
    boundary_union: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the counts for a file, in as few bytes as hold them."""
        return {name: getattr(self, name).astype(np.uint32) for name in self.__dataclass_fields__}

    def scores(self, names: Sequence[str]) -> dict:
        """Return `mean_iou`, `boundary_iou` and, by class name, `per_class_iou`; None for classes that are nowhere."""
        per_class = class_iou(self.confusion.sum(axis=0))
        with np.errstate(invalid="ignore"):
            boundary = self.boundary_intersection.sum(axis=0) / self.boundary_union.sum(axis=0)
        return {
            "mean_iou": float(np.nanmean(per_class)),
            "boundary_iou": float(np.nanmean(boundary)),
            "per_class_iou": {
                name: None if np.isnan(value) else float(value) for name, value in zip(names, per_class, strict=True)
            },
        }


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU of every class, NaN where it is nowhere, of matrices `(..., classes, classes)`."""
    intersection = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        return intersection / union


def count_maps(pairs: Iterable[tuple[Tensor, Tensor]], num_labels: int) -> MapCounts:
    """Count predictions against label maps.

    Args:
        pairs: Prediction and label map of every image, `(height, width)` integers; 255 is ignored in label maps.
    """
    confusion, intersection, union = [], [], []
    for prediction, labels in pairs:
        kept = labels != IGNORE_LABEL
        joint = torch.bincount(labels[kept] * num_labels + prediction[kept], minlength=num_labels**2)
        confusion.append(joint.view(num_labels, num_labels).numpy())
        both, either = boundary_counts(prediction.numpy(), labels.numpy(), num_labels)
        intersection.append(both)
        union.append(either)
    return MapCounts(np.stack(confusion), np.stack(intersection), np.stack(union))


def boundary_counts(prediction: np.ndarray, labels: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Count, by class, pixels near its boundary in both maps, and in at least one of them.

    Near is within `BOUNDARY_SHARE` of the image's diagonal from inside, in steps along rows, columns and diagonals. The
    border of the image is a boundary too. Pixels without a label are left out.

    Source:
        Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, equation 4;
        `mask_to_boundary`, boundary_iou/utils/boundary_utils.py in bowenc0221/boundary-iou-api.
    """
    width = max(1, round(BOUNDARY_SHARE * float(np.hypot(*labels.shape))))
    kept = labels != IGNORE_LABEL
    of_prediction = np.where(kept & near_boundary(prediction, width), prediction, num_labels)
    of_labels = np.where(kept & near_boundary(labels, width), labels, num_labels)
    both = np.bincount(of_labels[of_labels == of_prediction].ravel(), minlength=num_labels + 1)[:num_labels]
    areas = [np.bincount(each.ravel(), minlength=num_labels + 1)[:num_labels] for each in (of_prediction, of_labels)]
    return both, areas[0] + areas[1] - both


def near_boundary(ids: np.ndarray, width: int) -> np.ndarray:
    """Say which pixels have one of another id, or the border, at most `width` rows and columns away."""
    ids = ids.astype(np.uint8)
    size = 2 * width + 1
    near = maximum_filter(ids, size, mode="nearest") != minimum_filter(ids, size, mode="nearest")
    near[:width] = near[-width:] = near[:, :width] = near[:, -width:] = True
    return near
