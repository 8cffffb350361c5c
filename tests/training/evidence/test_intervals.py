"""Intervals over seeds and draws, against scipy and by hand."""

import pytest
from scipy import stats

from training.evidence import intervals


def test_of_one_model_or_one_draw_it_is_students_interval():
    values = [0.4, 0.5, 0.45, 0.41]
    mean, error = sum(values) / 4, stats.sem(values)
    low, high = stats.t.interval(0.95, 3, mean, error)
    for table in ([values], [[value] for value in values]):
        found = intervals.crossed_mean(table)
        assert found["mean"] == pytest.approx(mean) and found["interval"] == pytest.approx([low, high])


def test_it_covers_models_and_draws():
    """Means of models 1, 3, 5 (variance 4), of draws 2, 4 (variance 2)."""
    found = intervals.crossed_mean([[0, 2], [2, 4], [4, 6]])
    models, draws = 4 / 3, 2 / 2
    freedom = (models + draws) ** 2 / (models**2 / 2 + draws**2 / 1)
    half = stats.t.ppf(0.975, freedom) * (models + draws) ** 0.5
    assert found == {"mean": 3, "interval": pytest.approx([3 - half, 3 + half])}


def test_single_and_equal_values():
    assert intervals.crossed_mean([[0.3]]) == {"mean": 0.3, "interval": None}
    assert intervals.crossed_mean([[0.5, 0.5], [0.5, 0.5]]) == {"mean": 0.5, "interval": [0.5, 0.5]}


def test_differences_are_paired():
    """Unpaired, the spread of 10 would hide the difference of 1."""
    found = intervals.paired_difference([[11, 21.2], [31, 41]], [[10, 20], [30, 40]])
    assert found["mean"] == pytest.approx(1.05) and found["interval"][0] > 0
    assert intervals.paired_difference([[1, 2]], [[1, 2], [3, 4]]) == {"mean": None, "interval": None}


@pytest.mark.parametrize(
    ("interval", "side"), [([0.1, 0.2], 1), ([-0.2, -0.1], -1), ([-0.1, 0.1], 0), ([0, 0.1], 0), (None, 0)]
)
def test_sides(interval, side):
    assert intervals.side_of_zero(interval) == side


def test_crossing():
    assert intervals.first_crossing([1, 2], [0.8, 0.4], 1.0, 0.5) == pytest.approx(1.75)
    assert intervals.first_crossing([1, 2], [0.0, 0.9], 1.0, 0.5) == pytest.approx(0.5)
    assert intervals.first_crossing([1, 2], [0.8, 0.6], 1.0, 0.5) is None


def test_bootstrap():
    """Of many images of one model it is about the normal interval; of equal images it covers the models alone."""
    values = [index % 2 for index in range(400)]
    found = intervals.bootstrap_mean([values])
    assert found["mean"] == 0.5 and found == intervals.bootstrap_mean([values])
    assert found["interval"] == pytest.approx([0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], abs=0.006)
    assert intervals.bootstrap_mean([[1.0] * 5, [2.0] * 5])["interval"] == [1, 2]
    assert intervals.bootstrap_mean([[1.0]]) == {"mean": 1, "interval": None}
