"""Arithmetic of the time budget, with a clock that the tests turn."""

import math

import pytest

from training.optimization import Budget, Pace, ProgressLine, clock_time
from training.optimization.groups import rate_factor
from training.optimization.pace import rate_when
from training.recipes import get_recipe


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_budget_counts_earlier_sessions_and_from_the_command_s_start(clock):
    budget = Budget(600, spent_before=100, clock=clock, started=990.0)
    assert (budget.spent(), budget.left()) == (110, 490)
    clock.now += 90
    assert (budget.spent(), budget.left()) == (200, 400)


def test_a_stage_is_over_before_a_step_and_an_evaluation_would_exceed_it(clock):
    pace = Pace(Budget(600, clock=clock), starts_at=100, ends_at=500)
    pace.evaluation_seconds, pace.step_seconds = 30, 10
    clock.now += 100
    assert pace.over(0) == 0
    clock.now += 180
    assert pace.over(7) == pytest.approx(180 / 360)
    clock.now += 180
    assert pace.over(7) == 1
    assert pace.seconds_left(7) == 40
    clock.now += 10**6
    assert pace.over(7) == 1 and pace.seconds_left(7) == 0


def test_steps_bound_a_stage_where_there_is_no_time_and_say_how_long_it_takes(clock):
    pace = Pace(Budget(clock=clock), steps=40)
    assert math.isnan(pace.seconds_left(0))
    clock.now += 30
    assert (pace.over(10), pace.over(40), pace.over(50)) == (0.25, 1, 1)
    assert pace.seconds_left(10) == 90


def test_a_stage_ends_the_sooner_the_slower_evaluations_are_up_to_a_bound(clock):
    budget = Budget(1000, clock=clock)
    pace = Pace(budget, 0, 800, afterwards_seconds=100, afterwards_images=50, afterwards_at_most=150)
    assert pace.end() == 800
    pace.image_seconds = 1.0
    assert pace.end() == 850
    pace.image_seconds = 2.5
    assert pace.end() == 775
    pace.image_seconds = 100.0
    assert pace.end() == 750


def test_the_rate_warms_up_by_steps_and_comes_down_by_what_is_over():
    recipe = get_recipe("camvid_dinov2_small_sa").replace(warmup_steps=4)
    assert [rate_when(recipe, step, 0.0) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert rate_when(recipe, 4, 0.0) == rate_factor(recipe, 4, 100) == 1
    assert rate_when(recipe, 4, 0.5) == pytest.approx(0.5)
    assert rate_when(recipe, 400, 1.0) == pytest.approx(0, abs=1e-6)
    # A stage of very few steps must not end within its warm-up.
    assert rate_when(recipe, 2, 0.5) == pytest.approx(0.5)


def test_lines_on_progress_keep_the_last_loss_and_the_best_score(clock, capsys):
    line = ProgressLine(Budget(600, clock=clock), every_seconds=30)
    line.show("decoder", {"step": 1, "loss": 2.0}, 90.0)
    clock.now += 5
    line.show("decoder", {"step": 2, "loss": 1.0}, 85.0)  # too soon for another line
    line.show("decoder", {"step": 2, "mean_iou": 0.5}, 80.0)
    clock.now += 31
    line.show("decoder", {"step": 9, "loss": 0.25}, 59.6)
    line.show("decoder", {"step": 10, "mean_iou": 0.4}, math.nan)
    assert capsys.readouterr().out.splitlines() == [
        "decoder, step 1, 1:30 left, loss 2.000",
        "decoder, step 2, 1:20 left, loss 1.000, validation mIoU 50.00 (best 50.00)",
        "decoder, step 9, 0:59 left, loss 0.250, validation mIoU 50.00 (best 50.00)",
        "decoder, step 10, ? left, loss 0.250, validation mIoU 40.00 (best 50.00)",
    ]
    assert clock_time(3725) == "62:05"
