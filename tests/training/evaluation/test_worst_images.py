"""Which images are kept, and at what size."""

import numpy as np
import pytest
import torch

from training.evaluation.metrics import MeanIoU
from training.evaluation.worst_images import WorstImages

COLORS = [(255, 0, 0), (0, 255, 0)]


def look_at(worst: WorstImages, index: int, right: float, width: int = 10) -> None:
    """An image of class 0 everywhere, this share of which is predicted right."""
    labels = torch.zeros(10, width, dtype=torch.uint8)
    prediction = labels.clone()
    prediction[round(10 * right) :] = 1
    image = torch.full((3, 10, width), index, dtype=torch.uint8)
    worst.add(index, image, labels, prediction, MeanIoU(2).count(prediction, labels))


def test_the_worst_are_kept_worst_first():
    worst = WorstImages(3)
    for index, right in enumerate((0.9, 0.3, 1.0, 0.5, 0.3, 0.7, 0.1)):
        look_at(worst, index, right)
    assert [each.index for each in worst.images] == [6, 1, 4]  # of equal ones the first
    # Class 1 occurs in the prediction, with an IoU of 0: the mean is half of the other's.
    assert [each.mean_iou for each in worst.images] == pytest.approx([0.05, 0.15, 0.15])
    assert [each.accuracy for each in worst.images] == pytest.approx([0.1, 0.3, 0.3])
    assert worst.images[0].photo.getpixel((0, 0)) == (6, 6, 6)
    assert worst.images[0].prediction[:, 0].tolist() == [0] + [1] * 9


def test_equal_images_that_come_later_do_not_replace_earlier_ones_in_any_order():
    forwards, backwards = WorstImages(2), WorstImages(2)
    for index in range(4):
        look_at(forwards, index, 0.5)
        look_at(backwards, 3 - index, 0.5)
    assert [each.index for each in forwards.images] == [each.index for each in backwards.images] == [0, 1]


def test_images_without_labels_are_passed_over():
    worst = WorstImages(2)
    labels = torch.full((4, 5), 255, dtype=torch.uint8)
    prediction = torch.zeros_like(labels)
    worst.add(0, torch.zeros(3, 4, 5, dtype=torch.uint8), labels, prediction, MeanIoU(2).count(prediction, labels))
    assert worst.images == []


def test_large_images_are_kept_small():
    """2000 x 10 pixels become 320 x 2; the left third of the label map stays the left third."""
    worst = WorstImages(1)
    labels = torch.zeros(10, 2000, dtype=torch.uint8)
    labels[:, : 2000 // 4] = 1
    worst.add(0, torch.zeros(3, 10, 2000, dtype=torch.uint8), labels, labels, MeanIoU(2).count(labels, labels))
    [kept] = worst.images
    assert kept.photo.size == (320, 2) and kept.truth.shape == kept.prediction.shape == (2, 320)
    assert kept.truth[0].tolist() == [1] * 80 + [0] * 240


def test_the_sheet_shows_every_kept_image():
    worst = WorstImages(2)
    look_at(worst, 40, 0.5)
    look_at(worst, 80, 0.2)
    pixels = np.array(worst.sheet(["first", "second"], COLORS, ["wall", "floor"])).reshape(-1, 3)
    greys = [int((pixels == (grey,) * 3).all(axis=1).sum()) for grey in (40, 80)]
    assert min(greys) > 10_000


def test_nothing_to_keep_is_refused():
    with pytest.raises(ValueError, match="count=0, needed at least 1"):
        WorstImages(0)
