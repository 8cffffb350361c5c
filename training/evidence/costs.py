"""GPU hours of the recipes, estimated: exact FLOPs of their matrix products over an assumed rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.vit import LayerRecord

from ..evaluation import count_flops
from ..optimization import freeze_encoder_blocks
from ..recipe import Recipe
from ..recipes import RECIPES, get_recipe

# Images of the official training splits.
TRAINING_IMAGES = {"ade20k": 20210, "pascal_context": 4998, "cityscapes": 2975, "camvid": 367}
CAMVID_ASPECT = 4 / 3

# Peak FLOP/s of an NVIDIA A100 SXM by its data sheet, and the share of it that training is assumed to sustain. timm's
# measured mixed-precision training on an RTX 3090 (results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv, peak
# 71e12) amounts to 20 % for ViT-Ti/16, 31 % for ViT-S/16 and 47 % for ViT-L/16 at 384 pixels. Plain float32 has no
# tensor cores to keep fed.
ASSUMED_RATES = {"float32": (19.5e12, 0.7), "TF32": (156e12, 0.4), "bf16": (312e12, 0.4)}
# The share of so many times one card's work that cards together are assumed to do, where they share the global batch
# and wait for each other at every step.
ASSUMED_SCALING = {1: 1.0, 8: 0.85}


@dataclass(frozen=True)
class TrainingCost:
    """What a recipe's training computes on its official training split.

    Args:
        flops_per_step: FLOPs of one optimiser step: forward and backward pass over its global batch.
        steps: Optimiser steps.
        flops_before: Spent once, before the first step, on cached features.
    """

    flops_per_step: int
    steps: int
    flops_before: int = 0

    @property
    def flops(self) -> int:
        return self.flops_before + self.flops_per_step * self.steps

    def gpu_hours(self, precision: str, cards: int = 1) -> float:
        """Estimate how many hours A100 SXMs train, without evaluation and waiting for data.

        Args:
            precision: Of `ASSUMED_RATES`.
            cards: Of `ASSUMED_SCALING`, at work at once; the hours are those of the clock, not their sum.

        Raises:
            ValueError: If nothing is assumed of the precision or of so many cards.
        """
        if precision not in ASSUMED_RATES:
            raise ValueError(f"Got precision={precision!r}, needed one of {', '.join(ASSUMED_RATES)}.")
        if cards not in ASSUMED_SCALING:
            raise ValueError(f"Got cards={cards}, needed one of {', '.join(map(str, ASSUMED_SCALING))}.")
        peak, share = ASSUMED_RATES[precision]
        return self.flops / (peak * share * cards * ASSUMED_SCALING[cards]) / 3600


def training_cost(recipe: Recipe) -> TrainingCost:
    """Count the matrix products, convolutions and attention of a recipe's training, on PyTorch's meta device.

    Raises:
        ValueError: If the recipe's data set or backbone is not known here.
    """
    model = _meta_model(recipe)
    num_images = _training_images(recipe)
    steps = recipe.optimization.epochs * recipe.steps_per_epoch(num_images)
    if not recipe.data.cache_features:
        images = torch.empty(
            recipe.optimization.batch_size, 3, recipe.data.crop_size, recipe.data.crop_size, device="meta"
        )
        return TrainingCost(count_flops(lambda: model(images).logits.sum().backward()), steps)
    side = recipe.data.crop_size // model.config.encoder_patch_size
    patches = torch.empty(recipe.optimization.batch_size, side * side, model.encoder.hidden_size, device="meta")
    step = count_flops(lambda: model.decoder(patches, (side, side)).sum().backward())
    patch_size = model.config.encoder_patch_size
    height, width = (
        -(-int(length) // patch_size) * patch_size for length in (recipe.data.size, recipe.data.size * CAMVID_ASPECT)
    )
    images = torch.empty(2 * num_images, 3, height, width, device="meta")  # each image and its mirror image
    return TrainingCost(step, steps, count_flops(lambda: model.encoder(images, LayerRecord())))


def step_bytes(recipe: Recipe, num_images: int) -> int:
    """Count what a float32 optimiser step of a recipe with a native encoder keeps: weights, gradients, states, outputs.

    Outputs are those of layers that the backward pass needs, with fused attention. Not counted are what exists for a
    moment only, such as the loss's bands of enlarged scores, and what libraries reserve.

    Args:
        num_images: Images of a forward pass.

    Raises:
        ValueError: If the recipe's backbone is not known here.
    """
    model = _meta_model(recipe)
    model.set_attn_implementation("sdpa")
    storages: dict[int, Tensor] = {}
    with FakeTensorMode():  # knows shapes and dtypes, and computes nothing
        parameters = {name: torch.empty(each.shape, requires_grad=True) for name, each in model.named_parameters()}
        images = torch.empty(num_images, 3, recipe.data.crop_size, recipe.data.crop_size)

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.func.functional_call(model, parameters, (images,))
        own = {each.untyped_storage()._cdata for each in parameters.values()}
        kept = sum(each.untyped_storage().nbytes() for key, each in storages.items() if key not in own)
    states = {"sgd": 1, "adamw": 2}[recipe.optimization.optimizer]
    return kept + (2 + states) * 4 * sum(each.numel() for each in parameters.values())


def count_parameters(recipe: Recipe) -> int:
    """Count the weights of a recipe's model.

    Raises:
        ValueError: If the recipe's backbone is not known here.
    """
    return sum(each.numel() for each in _meta_model(recipe).parameters())


def cost_of(recipe: Recipe) -> dict[str, Any]:
    """Estimate what a recipe with a native encoder costs on A100-class cards; nothing of it is measured.

    Returns:
        A record ready for JSON: `parameters`, `steps`, `batch_size`, `flops_per_step`; by number of cards (as text, of
        `ASSUMED_SCALING`, those that the batch can be divided among) `bytes_per_card`, see `step_bytes`, and `hours` by
        precision; `assumptions`.

    Raises:
        ValueError: If the recipe's data set or backbone is not known here.
    """
    cost, batch_size = training_cost(recipe), recipe.optimization.batch_size
    passes = recipe.optimization.accumulation_steps
    cards = [each for each in ASSUMED_SCALING if batch_size % (each * passes) == 0]
    return {
        "parameters": count_parameters(recipe),
        "steps": cost.steps,
        "batch_size": batch_size,
        "flops_per_step": cost.flops_per_step,
        "bytes_per_card": {str(each): step_bytes(recipe, recipe.images_per_pass(each)) for each in cards},
        "hours": {str(each): {name: cost.gpu_hours(name, each) for name in ASSUMED_RATES} for each in cards},
        "assumptions": {
            "peak_flops_per_second_and_share": {name: list(rate) for name, rate in ASSUMED_RATES.items()},
            "scaling": {str(each): share for each, share in ASSUMED_SCALING.items()},
        },
    }


def describe_assumptions() -> str:
    """Say in a sentence what the estimated hours rest on."""
    rates = "; ".join(f"{name} {share:.0%} of {peak / 1e12:g} TFLOP/s" for name, (peak, share) in ASSUMED_RATES.items())
    together = "; ".join(f"{each} cards at {share:.0%} each" for each, share in ASSUMED_SCALING.items() if each > 1)
    return (
        f"Hours are estimates, not measured: counted FLOPs of the training steps over assumed rates of an NVIDIA A100 "
        f"SXM ({rates}; {together}), without evaluation and waiting for data."
    )


def describe_cost(name: str, cost: Mapping[str, Any]) -> list[str]:
    """Say what `cost_of` returned, in lines."""
    lines = [
        f"{name}: {cost['parameters'] / 1e6:.1f} million weights, {cost['steps']} steps of {cost['batch_size']} "
        f"images, {cost['flops_per_step'] / 1e12:.3g} TFLOP a step"
    ]
    for cards, hours in cost["hours"].items():
        times = ", ".join(f"{name} {value:.3g}" for name, value in hours.items())
        memory = f"{cost['bytes_per_card'][cards] / 2**30:.1f} GiB a step in float32"
        lines.append(f"  {cards} A100-class card{'s' * (cards != '1')}, estimated: {times} hours; {memory} on each")
    return [*lines, describe_assumptions()]


def _training_images(recipe: Recipe) -> int:
    for dataset, count in TRAINING_IMAGES.items():
        if recipe.name.startswith(dataset):
            return count
    raise ValueError(f"Got recipe {recipe.name!r}, needed one whose name begins with {', '.join(TRAINING_IMAGES)}.")


def _meta_model(recipe: Recipe) -> DepictForSemanticSegmentation:
    """Build the recipe's model without weights, in training mode, attention written out so that all of it counts."""
    fields = {"decoder_type": recipe.model.decoder_type, "num_labels": len(recipe.data.class_names)}
    if recipe.model.encoder is not None:
        config = DepictConfig.from_preset(recipe.model.encoder, image_size=recipe.data.crop_size, **fields)
    elif recipe.model.backbone == "facebook/dinov2-small":
        backbone = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
        )
        config = DepictConfig(backbone_config=backbone, **fields)
    else:
        raise ValueError(
            f"Got backbone={recipe.model.backbone!r}, needed facebook/dinov2-small or a recipe with `encoder`."
        )
    with torch.device("meta"):
        model = DepictForSemanticSegmentation(config).train()
    model.set_attn_implementation("eager")
    model.encoder.requires_grad_(not recipe.model.freeze_encoder)
    freeze_encoder_blocks(model, recipe.model.frozen_encoder_blocks)
    return model


def cost_table() -> str:
    """List FLOPs and estimated hours of every recipe."""
    assumptions = "; ".join(
        f"{name} {share:.0%} of {peak / 1e12:g} TFLOP/s" for name, (peak, share) in ASSUMED_RATES.items()
    )
    lines = [
        "Estimated hours of one NVIDIA A100 SXM, from counted FLOPs and assumed rates, evaluation not included:",
        f"{assumptions}.",
        f"{'recipe':<46}{'steps':>8}{'TFLOP/step':>12}{'PFLOP':>9}"
        + "".join(f"{f'{name} h':>11}" for name in ASSUMED_RATES),
    ]
    for name in RECIPES:
        cost = training_cost(get_recipe(name))
        hours = "".join(f"{cost.gpu_hours(precision):>11.3g}" for precision in ASSUMED_RATES)
        lines.append(f"{name:<46}{cost.steps:>8}{cost.flops_per_step / 1e12:>12.3g}{cost.flops / 1e15:>9.1f}{hours}")
    return "\n".join(lines)
