"""How a recipe's parameters move: groups by rate and weight decay, optimiser, schedule, frozen blocks."""

import math
import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..recipe import Recipe

SCALE_PARAMETERS = ("mask_norm.", "step_size", "class_tokens")
TOKENS = ("token", "position_embeddings", "lambda")
_BLOCK = re.compile(r"encoder\..*?\blayers?\.(\d+)\.")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Return `optimizer_groups` by the rates and the weight decay of a recipe."""
    optimization = recipe.optimization
    return optimizer_groups(
        model,
        optimization.learning_rate,
        optimization.weight_decay,
        optimization.encoder_rate_factor,
        optimization.encoder_layer_decay,
        optimization.scale_rate_factor,
    )


def optimizer_groups(
    model: nn.Module,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.01,
    encoder_rate_factor: float = 0.25,
    encoder_layer_decay: float = 0.8,
    scale_rate_factor: float = 3.0,
) -> list[dict]:
    """Return the groups for any optimiser of PyTorch: every parameter that requires a gradient exactly once.

    The defaults are those that fine-tuning with AdamW proved well with on CamVid.

    Args:
        model: A `DepictForSemanticSegmentation`, or its decoder alone in a module that calls it `decoder`.
        learning_rate: Rate of the decoder's matrices.
        weight_decay: Decay of matrices; norms, biases, tokens and step sizes have none.
        encoder_rate_factor: The rate of the encoder's last block is this times `learning_rate`.
        encoder_layer_decay: The rate of each encoder block is this times that of the next one.
        scale_rate_factor: The rate of class tokens, step sizes and the LayerNorm over classes, which together set the
            scale of the logits, is this times `learning_rate`.

    Returns:
        `params`, `lr` and `weight_decay` of each group.
    """
    num_blocks = count_encoder_blocks(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if name.startswith("encoder."):
            blocks_above = num_blocks - 1 - encoder_block(name, num_blocks)
            factor = encoder_rate_factor * encoder_layer_decay**blocks_above
        elif any(part in name for part in SCALE_PARAMETERS):
            factor = scale_rate_factor
        decays = parameter.ndim > 1 and not any(part in name for part in TOKENS)
        key = (learning_rate * factor, weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def freeze_encoder_blocks(model: nn.Module, num_frozen: int) -> None:
    """Freeze the embeddings and the first `num_frozen` blocks of a model's encoder, in place; nothing for 0.

    Raises:
        ValueError: If the encoder has fewer blocks.
    """
    num_blocks = count_encoder_blocks(model)
    if num_frozen > num_blocks:
        raise ValueError(f"Got frozen_encoder_blocks={num_frozen}, needed at most {num_blocks}, all the encoder has.")
    for name, parameter in model.named_parameters():
        if num_frozen and name.startswith("encoder.") and encoder_block(name, num_blocks) < num_frozen:
            parameter.requires_grad_(False)


def count_encoder_blocks(model: nn.Module) -> int:
    """Count the blocks of the model's encoder; 0 for a module without one."""
    found = (_BLOCK.match(name) for name, _ in model.named_parameters())
    return max((int(match[1]) + 1 for match in found if match), default=0)


def encoder_block(name: str, num_blocks: int) -> int:
    """Number the encoder block that a parameter belongs to: -1 for embeddings, the last for what follows it."""
    match = _BLOCK.match(name)
    if match:
        return int(match[1])
    return -1 if "embeddings" in name else num_blocks - 1


def create_optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    """Create the recipe's optimiser over the groups of `parameter_groups`."""
    if recipe.optimization.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.optimization.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.optimization.learning_rate)


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, num_training_steps: int) -> LambdaLR:
    """Create the schedule, stepped after every optimiser step; each group keeps its share of the rate throughout."""
    return LambdaLR(optimizer, lambda step: rate_factor(recipe, step, num_training_steps))


def rate_factor(recipe: Recipe, step: float, num_training_steps: int) -> float:
    """Return the share of the learning rate at an optimiser step, counted from 0, or between two steps.

    Source:
        `PolynomialLR`, segm/optim/scheduler.py in rstrudel/segmenter@20d1bfa, for "polynomial".
    """
    if step < recipe.optimization.warmup_steps:
        return (step + 1) / (recipe.optimization.warmup_steps + 1)
    progress = (step - recipe.optimization.warmup_steps) / max(1, num_training_steps - recipe.optimization.warmup_steps)
    progress = min(progress, 1.0)
    decay = (
        (1 - progress) ** 0.9
        if recipe.optimization.schedule == "polynomial"
        else 0.5 * (1 + math.cos(math.pi * progress))
    )
    final = recipe.optimization.final_learning_rate / recipe.optimization.learning_rate
    return final + (1 - final) * decay
