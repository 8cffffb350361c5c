"""GPU hours of the recipes, estimated: exact FLOPs of their matrix products over an assumed rate."""

from dataclasses import dataclass

import torch
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

    def gpu_hours(self, precision: str) -> float:
        """Estimate hours of one A100 SXM in a precision of `ASSUMED_RATES`, without evaluation and waiting for data.

        Raises:
            ValueError: If there is no rate for the precision.
        """
        if precision not in ASSUMED_RATES:
            raise ValueError(f"Got precision={precision!r}, needed one of {', '.join(ASSUMED_RATES)}.")
        peak, share = ASSUMED_RATES[precision]
        return self.flops / (peak * share) / 3600


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
