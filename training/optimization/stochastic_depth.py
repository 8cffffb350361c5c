"""Stochastic depth that drops the same branches however a batch is divided among processes and forward passes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# A block of the encoders here has two residual branches: attention and MLP.
BRANCHES = 2


class SharedStochasticDepth(nn.Module):
    """Drops whole branches of single images, by numbers that were drawn before the forward pass.

    A block calls it for its branches in turn, `BRANCHES` times in every pass, also in a pass that gradient
    checkpointing repeats.

    Args:
        p: Probability that a branch is dropped, below 1; the others are divided by `1 - p`.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.draws: Tensor | None = None
        self.calls = 0

    def forward(self, branch: Tensor) -> Tensor:
        """Drop branches of `(batch, ...)`; in evaluation none."""
        if not self.training:
            return branch
        assert self.draws is not None  # `draw` comes before every pass
        draws = self.draws[:, self.calls % BRANCHES]
        self.calls += 1
        scale = (draws >= self.p).to(branch.dtype) / (1 - self.p)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def share_stochastic_depth(model: nn.Module) -> list[SharedStochasticDepth]:
    """Put `SharedStochasticDepth` in the place of a model's own stochastic depth, torchvision's or transformers'.

    Returns:
        The new modules; `draw` is to be called with them before every forward pass in training mode.
    """
    shared = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StochasticDepth):
                rate = child.p
            elif type(child).__name__.endswith("DropPath"):
                rate = child.drop_prob
            else:
                continue
            if rate:
                shared.append(SharedStochasticDepth(rate))
                setattr(parent, name, shared[-1])
    return shared


def draw(
    modules: Sequence[SharedStochasticDepth], seed: int, step: int, positions: Sequence[int], device: torch.device
) -> None:
    """Draw for one forward pass.

    Args:
        modules: What `share_stochastic_depth` returned.
        seed: Seed of the run.
        step: Optimiser step.
        positions: Place of each image of this pass among all images of the step.
        device: Device of the model.
    """
    if not modules:
        return
    rows = []
    for position in positions:
        # Four numbers, so that this is no seed of `sample_generator`, which augmentation draws from.
        state = np.random.SeedSequence([seed, step, position, 1]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        rows.append(torch.rand(len(modules), BRANCHES, generator=generator))
    draws = torch.stack(rows).to(device, non_blocking=True)  # ordered by the device's stream
    for index, module in enumerate(modules):
        module.draws = draws[:, index]
        module.calls = 0
