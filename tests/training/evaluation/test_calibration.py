"""Figures of calibration against torchmetrics and definitions; nothing depends on bands, batches or processes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torchmetrics.classification import MulticlassCalibrationError

from depict_hf import DepictImageProcessor, windows
from depict_hf.inference import score_stream, segment
from training.evaluation import calibration as module
from training.evaluation.calibration import Calibration, CalibrationObserver, draw_reliability, labelled_scores


def draw(count: int, num_labels: int = 7, num_views: int = 1, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and true classes that they say something of."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(num_labels, (count,), generator=generator)
    scores = spread * torch.randn(count, num_views, num_labels, generator=generator)
    return scores + 2 * F.one_hot(labels, num_labels)[:, None], labels


def probabilities(scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (scores.double() / temperature).softmax(-1).mean(1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("num_bins", [15, 10])
def test_the_calibration_error_is_that_of_torchmetrics(temperature, num_bins):
    """Added in unequal parts; some confidences are exactly 1, which torchmetrics counts as a bin of their own."""
    scores, labels = draw(4000)
    scores[:300] *= 40
    ours, theirs = Calibration(temperature, num_bins), MulticlassCalibrationError(7, num_bins, "l1")
    for part, truth in zip(scores.split(1300), labels.split(1300), strict=True):
        ours.add(part, truth)
        theirs.update((part[:, 0] / temperature).softmax(-1), truth)
    assert (probabilities(scores, temperature).float().amax(-1) == 1).any()
    assert ours.figures()["expected_calibration_error"] == pytest.approx(theirs.compute().item(), abs=1e-6)


def test_edges_of_bins_belong_to_the_bin_above():
    """As in torchmetrics; confidences that are exact in float32."""
    confidence = torch.tensor([0.5, 0.75, 0.75, 0.625])
    scores = torch.stack([confidence, 1 - confidence], dim=-1).log()[:, None]
    labels = torch.tensor([0, 0, 1, 0])
    ours, theirs = Calibration(num_bins=4), MulticlassCalibrationError(2, 4, "l1")
    ours.add(scores, labels)
    theirs.update(scores[:, 0].softmax(-1), labels)
    assert ours.figures()["expected_calibration_error"] == pytest.approx(theirs.compute().item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_views", [1, 3])
def test_likelihood_brier_score_and_the_diagrams_bins_by_definition(num_views, temperature):
    """Fails if views are averaged in another space, or the temperature decides labels."""
    scores, labels = draw(3000, num_views=num_views)
    calibration = Calibration(temperature)
    calibration.add(scores, labels)
    figures = calibration.figures()
    likely = probabilities(scores, temperature)
    predicted = probabilities(scores).argmax(-1)
    confidence = likely.gather(1, predicted[:, None])[:, 0]
    assert figures["negative_log_likelihood"] == pytest.approx(F.nll_loss(likely.log(), labels).item(), abs=1e-6)
    brier = (likely - F.one_hot(labels, 7)).square().sum(-1).mean().item()
    assert figures["brier_score"] == pytest.approx(brier, abs=1e-6)
    assert figures["accuracy"] == pytest.approx((predicted == labels).double().mean().item())
    assert figures["mean_confidence"] == pytest.approx(confidence.mean().item(), abs=1e-6)
    assert figures["num_pixels"] == sum(figures["reliability"]["count"]) == 3000
    for index in range(15):
        inside = (confidence >= index / 15) & (confidence < (index + 1) / 15)
        assert figures["reliability"]["count"][index] == inside.sum()
        for name, values in (("mean_confidence", confidence), ("accuracy", (predicted == labels).double())):
            value = figures["reliability"][name][index]
            assert (value is None) == (not inside.any())
            if value is not None:
                assert value == pytest.approx(values[inside].mean().item(), abs=1e-6)


def test_risk_and_coverage_by_sorting():
    scores, labels = draw(2000)
    calibration = Calibration()
    calibration.add(scores, labels)
    curve = calibration.figures()["risk_coverage"]
    likely, predicted = probabilities(scores).max(-1)
    wrong = (predicted != labels)[likely.argsort(descending=True)].double().numpy()
    risks = wrong.cumsum() / np.arange(1, 2001)
    # Bins of equally sure pixels are 1/256 as wide as they are far from certainty.
    assert curve["area"] == pytest.approx(risks.mean(), abs=2e-3)
    for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True):
        assert risk == pytest.approx(risks[round(coverage * 2000) - 1], abs=3e-3)
    assert curve["risk"][-1] == pytest.approx(wrong.mean())


def test_the_area_is_the_mean_over_orders_of_equally_sure_pixels():
    """Two surest pixels, one of them wrong, and then three, two of them wrong: exactly, by all orders."""
    scores = torch.tensor([[4.0, 0.0]] * 2 + [[1.0, 0.0]] * 3)[:, None]
    labels = torch.tensor([0, 1, 1, 0, 1])
    calibration = Calibration()
    calibration.add(scores, labels)
    areas = []
    for first, second in itertools.product(itertools.permutations([0, 1]), itertools.permutations([1, 0, 1])):
        areas.append(np.mean(np.cumsum([*first, *second]) / np.arange(1, 6)))
    assert calibration.figures()["risk_coverage"]["area"] == pytest.approx(np.mean(areas))


def test_sure_pixels_are_told_apart():
    """Confidences of 0.9999 and more differ in risk; fails with bins of equal width."""
    scores = torch.cat([torch.tensor([10.0, 0.0]).repeat(50, 1), torch.tensor([13.0, 0.0]).repeat(50, 1)])[:, None]
    calibration = Calibration()
    calibration.add(scores, (torch.arange(100) < 50).long())
    assert calibration.figures()["risk_coverage"]["risk"][:10] == [0] * 10


@pytest.mark.parametrize("options", [{}, {"scales": (1.0, 1.5), "flip": True}])
def test_photographs_by_bands_are_as_segment_is_sure(options, monkeypatch):
    """255 is left out; fails if labels and bands are shifted against each other, or a band is counted twice."""
    monkeypatch.setitem(windows.BAND_ELEMENTS, "cpu", 400)
    monkeypatch.setattr(windows, "STRIP_ELEMENTS", 1)  # tiles of 64 columns
    model = tiny_model("ca", temperature=2.0, window_size=32, window_stride=20)
    image_processor = DepictImageProcessor(size={"shortest_edge": 40})
    photo = np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8)
    [expected] = segment(model, image_processor, [photo], **options, return_confidence=True)
    truth = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (37, 90), dtype=np.uint8))
    truth[expected.labels % 2 == 0] = expected.labels[expected.labels % 2 == 0].byte()
    truth[5:9, 30:70] = 255
    calibration = Calibration(model.config.temperature)
    [views] = score_stream(model, image_processor, [photo], **options)
    CalibrationObserver([calibration])(0, views, truth)
    figures = calibration.figures()
    known = truth != 255
    assert figures["num_pixels"] == known.sum()
    assert figures["mean_confidence"] == pytest.approx(expected.confidence[known].double().mean().item(), abs=1e-6)
    assert figures["accuracy"] == pytest.approx((expected.labels == truth)[known].double().mean().item())
    parts = list(labelled_scores(views, truth))
    assert len(parts) > 4
    assert torch.equal(torch.cat([each.positions for each in parts]).sort()[0], known.flatten().nonzero()[:, 0])


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (torch.zeros(37, 89, dtype=torch.uint8), r"Got a label map of \(37, 89\) for scores of \(37, 90\)"),
        (torch.full((37, 90), 5, dtype=torch.uint8), "Got the label 5 for a model of 5 classes"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(truth, message):
    photo = np.zeros((37, 90, 3), dtype=np.uint8)
    [views] = score_stream(tiny_model("linear"), DepictImageProcessor(size={"shortest_edge": 32}), [photo])
    with pytest.raises(ValueError, match=message):
        next(labelled_scores(views, truth))


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="Got temperature=0, needed a positive finite number"):
        Calibration(0)
    with pytest.raises(ValueError, match="Got num_bins=0, needed at least 1"):
        Calibration(num_bins=0)


def test_nothing_labelled_gives_no_figures():
    figures = Calibration().figures()
    assert figures["num_pixels"] == 0
    assert figures["expected_calibration_error"] is None and figures["risk_coverage"]["area"] is None
    json.dumps(figures, allow_nan=False)


def test_diagrams_are_drawn(tmp_path):
    calibration = Calibration()
    calibration.add(*draw(500))
    draw_reliability(
        {"before": calibration.figures(), "no pixels": Calibration().figures()}, tmp_path / "new" / "a.png"
    )
    assert (tmp_path / "new" / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"Got the diagram a.txt, needed a name that ends in \.png"):
        module.check_diagram(Path("a.txt"))
