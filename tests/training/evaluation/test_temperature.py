"""Samples of pixels and the temperature that is fitted to them, without photographs being read."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from depict_hf.windows import CoarseScores
from training.evaluation import temperature as module
from training.evaluation.temperature import PixelSample, figures_at, fit_temperature


def photograph(index: int, height: int = 12, width: int = 20) -> tuple[list[CoarseScores], torch.Tensor]:
    """Two views of four classes whose scores are coarser than the label map; a fifth of it has no label."""
    generator = torch.Generator().manual_seed(index)
    logits = torch.randn(2, 4, height // 4, width // 4, generator=generator)
    size = (height, width)
    views = [CoarseScores.from_windows([each], [(0, 0)], size, size, size) for each in logits]
    labels = torch.randint(5, size, generator=generator, dtype=torch.uint8)
    return views, labels.masked_fill(labels == 4, 255)


def drawn_from(temperature: float, count: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and true classes that are as likely as the scores say when divided by this temperature."""
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(count, 1, 6, generator=generator)
    return scores, (scores[:, 0] / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature, monkeypatch):
    scores, labels = drawn_from(temperature)
    fitted = fit_temperature(scores, labels)
    assert fitted == pytest.approx(temperature, rel=0.05)
    assert figures_at(fitted, scores, labels)["expected_calibration_error"] < 0.01
    monkeypatch.setattr(module, "CHUNK_SCORES", 1000)
    assert fit_temperature(scores, labels) == pytest.approx(fitted, rel=1e-3)


def test_it_is_the_least_negative_log_likelihood_over_views_too():
    """Against another optimiser and a likelihood by its definition."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (3000,), generator=generator)
    scores = 3 * torch.randn(3000, 3, 5, generator=generator) + 3 * F.one_hot(labels, 5)[:, None]

    def mean_nll(temperature) -> float:
        likely = (scores.double() / float(temperature[0])).softmax(-1).mean(1)
        return -likely[torch.arange(3000), labels].log().mean().item()

    expected = minimize(mean_nll, [1.0], method="Nelder-Mead").x[0]
    assert fit_temperature(scores, labels) == pytest.approx(expected, rel=2e-3)


def test_without_a_minimum_the_result_is_a_bound():
    scores, _ = drawn_from(1.0, 500)
    assert fit_temperature(scores, scores[:, 0].argmax(-1)) == pytest.approx(module.LEAST, rel=0.01)
    assert fit_temperature(scores, scores[:, 0].argmin(-1)) == pytest.approx(module.MOST, rel=0.01)


def test_every_labelled_pixel_is_kept_while_there_is_room():
    sample = PixelSample()
    photographs = [photograph(index) for index in range(3)]
    for index, (views, labels) in enumerate(photographs):
        sample(index, views, labels)
    scores, labels = sample.pixels()
    known = torch.cat([each[each != 255] for _, each in photographs])
    assert len(labels) == sample.num_seen == len(known) and scores.shape[1:] == (2, 4)
    assert torch.equal(labels.bincount(), known.bincount())


def test_a_sample_is_the_same_in_any_order_and_by_any_processes(monkeypatch):
    """Fails if what is kept depends on what was seen before, or a process's share counts for more than another's."""
    whole, backwards, even, odd = (PixelSample(max_scores=8 * 100, seed=3) for _ in range(4))
    for index in range(6):
        whole(index, *photograph(index))
        backwards(5 - index, *photograph(5 - index))
        (odd if index % 2 else even)(index, *photograph(index))
    for each in (even, odd):
        each._shrink()
    everywhere = [(each.num_seen, *part) for each in (odd, even) for part in each._kept]
    monkeypatch.setattr(module, "gather_object", lambda own: everywhere)
    even.merge(SimpleNamespace(num_processes=2))
    assert even.num_seen == whole.num_seen
    for other in (backwards, even):
        assert all(torch.equal(*pair) for pair in zip(whole.pixels(), other.pixels(), strict=True))
    other_seed = PixelSample(max_scores=8 * 100, seed=4)
    other_seed(0, *photograph(0))
    assert not torch.equal(other_seed.pixels()[0][:50], whole.pixels()[0][:50])


def test_large_and_small_photographs_have_their_share():
    """100 of 20 000 pixels against 100 of 240: fails where each photograph gives as many."""
    sample = PixelSample(max_scores=8 * 1000)
    large = torch.zeros(100, 200, dtype=torch.uint8)
    sample(0, photograph(0, 100, 200)[0], large)
    sample(1, photograph(1)[0], torch.ones(12, 20, dtype=torch.uint8))
    labels = sample.pixels()[1]
    assert len(labels) == 1000
    expected = 1000 * 240 / 20_240
    assert (labels == 1).sum().item() == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_a_split_without_labels_is_refused():
    sample = PixelSample()
    with pytest.raises(ValueError, match="no labelled pixel to fit a temperature to"):
        sample.pixels()
    sample(0, photograph(0)[0], torch.full((12, 20), 255))
    with pytest.raises(ValueError, match="no labelled pixel to fit a temperature to"):
        sample.pixels()
