"""`MeanIoU` against `evaluate`'s `mean_iou`: recorded results, and its histograms written out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from training.evaluation.metrics import EvaluateMeanIoU, MeanIoU, largest_difference, scores

FIXTURE = Path(__file__).parents[2] / "data" / "mean_iou.safetensors"
KEYS = {"mean_iou", "mean_accuracy", "overall_accuracy", "per_category_iou", "per_category_accuracy"}


def by_histograms(predictions, references, num_labels, ignore_index, reduce_labels) -> dict:
    """The definition: areas by `np.histogram`, each of which drops what is out of its range by itself."""
    intersection, prediction_area, label_area = np.zeros((3, num_labels))
    for prediction, reference in zip(predictions, references, strict=True):
        prediction, reference = np.array(prediction), np.array(reference)
        if reduce_labels:
            reference[reference == 0] = 255
            reference = reference - 1
            reference[reference == 254] = 255
        kept = reference != ignore_index
        prediction, reference = prediction[kept], reference[kept]
        for area, ids in (
            (intersection, prediction[prediction == reference]),
            (prediction_area, prediction),
            (label_area, reference),
        ):
            area += np.histogram(ids, bins=num_labels, range=(0, num_labels - 1))[0]
    with np.errstate(all="ignore"):
        iou = intersection / (prediction_area + label_area - intersection)
        accuracy = intersection / label_area
        return {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": intersection.sum() / label_area.sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }


def assert_equal_results(results: dict, expected: dict) -> None:
    assert set(results) == KEYS
    for key in KEYS:
        np.testing.assert_allclose(np.atleast_1d(results[key]), np.atleast_1d(expected[key]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", ["plain", "ignore_in_range", "absent_class", "reduce_labels"])
def test_equals_recorded_results(case):
    with safe_open(FIXTURE, "pt") as file:
        arguments = json.loads(file.metadata()[case])
        count = arguments.pop("count")
        maps = [[file.get_tensor(f"{case}.{i}.{kind}") for i in range(count)] for kind in ("prediction", "reference")]
        expected = {key: file.get_tensor(f"{case}.result.{key}").numpy() for key in KEYS}
    metric = MeanIoU(**arguments)
    for prediction, reference in zip(*maps, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert_equal_results(metric.compute(), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
@pytest.mark.parametrize(
    ("num_labels", "ignore_index", "reduce_labels"),
    [(10, 255, False), (10, 255, True), (10, 254, True), (10, 3, True), (10, 7, False), (2, 0, False), (1, 255, False)],
)
def test_equals_histograms_for_ids_outside_the_classes(num_labels, ignore_index, reduce_labels, dtype):
    """Ids 10 to 13, 254 and 255 appear in predictions and references, alone and together."""
    rng = np.random.default_rng(0)
    ids = np.array([*range(14), 254, 255], dtype=dtype)
    sizes = [(20, 30), (7, 5), (11, 40)]
    predictions, references = ([rng.choice(ids, size) for size in sizes] for _ in range(2))
    for prediction, reference in zip(predictions, references, strict=True):
        same = rng.random(prediction.shape) < 0.5
        prediction[same] = reference[same]
    metric = MeanIoU(num_labels, ignore_index, reduce_labels)
    metric.add_batch(predictions=predictions, references=references)
    expected = by_histograms(predictions, references, num_labels, ignore_index, reduce_labels)
    assert_equal_results(metric.compute(), expected)


def test_counts_add_up_over_batches_and_processes():
    generator = torch.Generator().manual_seed(0)
    predictions, references = (torch.randint(0, 5, (6, 9, 8), generator=generator) for _ in range(2))
    whole, first, second = MeanIoU(4), MeanIoU(4), MeanIoU(4)
    whole.add_batch(predictions=predictions, references=references)
    first.add_batch(predictions=list(predictions[:2]), references=references[:2].numpy())
    first.add_batch(predictions=predictions[2:3], references=references[2:3])
    second.add_batch(predictions=predictions[3:], references=references[3:])
    assert whole.confusion.dtype == torch.int64
    assert whole.confusion.sum() == 6 * 9 * 8
    assert torch.equal(whole.confusion, first.confusion + second.confusion)


def test_reset_forgets():
    metric = MeanIoU(2)
    metric.add_batch(predictions=[[[0, 1]]], references=[[[1, 1]]])
    assert metric.compute()["overall_accuracy"] == 0.5
    metric.reset()
    assert metric.confusion.sum() == 0
    assert np.isnan(metric.compute()["mean_iou"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([np.zeros((3, 4), int)], [np.zeros((4, 3), int)], r"Map 0.*\(3, 4\).*\(4, 3\)"),
        (np.zeros((3, 4), int), np.zeros((3, 4), int), r"Map 0.*shape \(4,\)"),
        ([np.zeros((3, 4), int)], [], "1 predictions and 0 references"),
        ([np.zeros((3, 4))], [np.zeros((3, 4), int)], "prediction of torch.float64"),
    ],
)
def test_refuses_maps_that_do_not_fit(predictions, references, message):
    metric = MeanIoU(5)
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=predictions, references=references)
    assert metric.confusion.sum() == 0


def test_refuses_no_classes():
    with pytest.raises(ValueError, match="num_labels=0"):
        MeanIoU(0)


def test_one_images_counts_are_its_own():
    """Two of four labelled pixels of class 0 are right, one is called 1, one has an id that is no class."""
    metric = MeanIoU(2)
    counts = metric.count(torch.tensor([[0, 0, 1, 9, 1]]), torch.tensor([[0, 0, 0, 0, 255]]))
    assert counts.tolist() == [[2, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert metric.confusion.sum() == 0
    metric.add(counts)
    metric.add(counts)
    assert metric.confusion.sum() == 8
    assert scores(counts)["mean_iou"] == metric.compute()["mean_iou"] == 0.25


def test_largest_difference_is_over_all_numbers():
    ours = {"mean_iou": 0.5, "per_category_iou": [None, 0.25, 0.75]}
    theirs = {"mean_iou": 0.5, "per_category_iou": np.array([np.nan, 0.25, 0.5])}
    assert largest_difference(ours, theirs) == 0.25
    assert largest_difference(ours, theirs | {"per_category_iou": np.array([0.1, 0.25, 0.75])}) == float("inf")


def test_the_real_metric_needs_8_bits():
    with pytest.raises(ValueError, match="300 classes, needed at most 256"):
        EvaluateMeanIoU(300)
