"""The average's values, and the model before, while and after it is applied."""

from types import SimpleNamespace

import pytest
import torch

from training.optimization.averaging import WeightAverage


def averaged_over(steps: list[float], decay: float, first_step: int = 1) -> tuple[torch.nn.Linear, WeightAverage]:
    """A layer of one weight that starts at 1 and takes these values; its bias is frozen."""
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(layer.weight)
    layer.bias.requires_grad_(False)
    average = WeightAverage(layer, decay)
    average.on_train_begin(None, None, None)
    for step, value in enumerate(steps, start=first_step):
        torch.nn.init.constant_(layer.weight, value)
        average.on_step_end(None, SimpleNamespace(global_step=step), None)
    return layer, average


def test_average_is_the_exponential_one_from_the_initial_weights_on():
    _, average = averaged_over([2.0, 4.0], decay=0.75, first_step=1000)
    assert average.average.keys() == {"weight"}
    assert average.average["weight"].item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)


def test_the_average_warms_up():
    """d is 2/11 after the first step and 3/12 after the second; from step 8 of (1 + t)/(10 + t) = 0.5 on it stays."""
    _, average = averaged_over([2.0, 4.0], decay=0.5)
    first = 2 / 11 * 1 + 9 / 11 * 2
    assert average.average["weight"].item() == pytest.approx(3 / 12 * first + 9 / 12 * 4)
    _, average = averaged_over([3.0], decay=0.5, first_step=8)
    assert average.average["weight"].item() == pytest.approx(2.0)


def test_applied_average_is_taken_back():
    layer, average = averaged_over([3.0], decay=0.5, first_step=1000)
    with average.applied():
        assert layer.weight.item() == 2.0
    assert layer.weight.item() == 3.0
    average.copy_to_model()
    assert layer.weight.item() == 2.0


def test_before_training_the_model_is_evaluated_as_it_is():
    layer = torch.nn.Linear(1, 1)
    weight = layer.weight.item()
    with WeightAverage(layer, 0.9).applied():
        assert layer.weight.item() == weight


def test_a_saved_average_goes_on(tmp_path):
    _, first = averaged_over([2.0], decay=0.5, first_step=1000)
    first.save(tmp_path)
    layer = torch.nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    second = WeightAverage(layer, 0.5)
    second.load(tmp_path)
    second.on_train_begin(None, None, None)
    torch.nn.init.constant_(layer.weight, 4.0)
    second.on_step_end(None, SimpleNamespace(global_step=1001), None)
    assert second.average["weight"].item() == 0.5 * 1.5 + 0.5 * 4


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_without_these_weights_is_refused(tmp_path, saved):
    if saved:
        averaged_over([2.0], decay=0.5)[1].save(tmp_path)
    with pytest.raises(ValueError, match="holds no average of these weights"):
        WeightAverage(torch.nn.Linear(1, 1), 0.5).load(tmp_path)
