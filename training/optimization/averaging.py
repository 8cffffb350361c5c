"""Exponential moving average of the weights that training moves: these are evaluated and saved, others are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

FILE_NAME = "average.safetensors"


class WeightAverage(TrainerCallback):
    """After every optimiser step, `average = d * average + (1 - d) * weight`, where d warms up to `decay`.

    After step t, counted from 1, d is min(decay, (1 + t) / (10 + t)): 2/11 after the first. So the initial weights are
    forgotten at once, and a run that is shorter than 1 / (1 - decay) steps has an average of its own weights, too.

    Args:
        model: Its parameters that require a gradient are averaged, in float32; the others do not move.
        decay: Between 0 and 1.

    Source:
        The warm-up is that of `tf.train.ExponentialMovingAverage` with `num_updates`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.average: dict[str, torch.Tensor] = {}
        self.decay = decay

    @torch.no_grad()
    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begin with the weights as they are, unless an average was loaded."""
        self.average = {
            name: self.average.get(name, weight).detach().to(weight.device, torch.float32, copy=True)
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = [weight.float() for weight in self.weights.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def save(self, folder: Path) -> None:
        save_file(self.average, folder / FILE_NAME)

    def load(self, folder: Path) -> None:
        """Continue from the average that `save` wrote.

        Raises:
            ValueError: If there is none of these weights.
        """
        path = folder / FILE_NAME
        average = load_file(path) if path.is_file() else {}
        if average.keys() != self.weights.keys():
            raise ValueError(f"{folder} holds no average of these weights; resume a run that was started with one.")
        self.average = average

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the weights by their average."""
        for name, weight in self.weights.items():
            weight.copy_(self.average[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within, and its own afterwards; change nothing before training begins."""
        if not self.average:
            yield
            return
        own = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(own[name])
