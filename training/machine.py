"""How fast this machine computes what a plan consists of, measured on the model and the data that are to be trained."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from depict_hf import DepictForSemanticSegmentation
from depict_hf.inference import segment
from depict_hf.loading import native_dtype, training_device
from depict_hf.vit import LayerRecord

from .data import SegmentationDataset, TrainingDataset
from .evaluation import spread, wait_for
from .optimization import count_encoder_blocks
from .planning import CROP, DataFacts, MachineFacts, base_recipe, stage_recipes
from .recipe import Recipe
from .recipe_data import build_augmentation, build_image_processor
from .recipe_model import freeze_for

LOOKED_AT = 16
# What takes longer is timed once.
SLOW_SECONDS = 10.0


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the autocast of a recipe's precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def data_facts(opened) -> DataFacts:
    """Return what a plan needs to know of the data that `open_data` opened; some photographs are looked at."""
    samples = opened.samples
    train = samples["train"]
    sides = [min(train[index]["image"].shape[-2:]) for index in spread(len(train), LOOKED_AT)]
    return DataFacts(
        tuple(opened.class_names),
        len(train),
        len(samples["validation"]),
        len(samples["test"]),
        int(statistics.median(sides)),
    )


def measure(
    model: DepictForSemanticSegmentation,
    samples: SegmentationDataset,
    data: DataFacts,
    means: tuple,
    stds: tuple,
    output: Path,
    overrides: Sequence[str] = (),
) -> MachineFacts:
    """Time encoder, training step and segmentation on one photograph each; the model's weights do not change.

    Args:
        model: Moved to the fastest device, where it stays; in evaluation mode afterwards.
        samples: Samples of the training split.
        output: Where the run writes.
        overrides: Overrides of fields, which decide sizes.
    """
    device = training_device()
    model.to(device).eval()
    facts: dict[str, Any] = {
        "device": device.type,
        "patch_size": model.config.encoder_patch_size,
        "num_blocks": count_encoder_blocks(model),
        "hidden_size": model.encoder.hidden_size,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "free_disk_bytes": shutil.disk_usage(output).free,
    }
    unmeasured = MachineFacts(**facts, precision="float32", encode_seconds=1.0, train_seconds=1.0, segment_seconds=1.0)
    base = base_recipe(data, unmeasured, means, stds, model.config.decoder_type)
    recipe = next(each for each in reversed(stage_recipes(base, unmeasured, overrides)) if each)
    side = recipe.data.crop_size
    square = torch.randn(1, 3, side, side, device=device)
    facts["precision"], facts["why_precision"], encode_square = _choose_precision(model, square, overrides)
    recipe = recipe.replace(precision=facts["precision"])
    processor = build_image_processor(recipe)
    photo = samples[0]["image"]
    pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
    area = pixel_values.shape[-2] * pixel_values.shape[-1]
    windows = (recipe.evaluation.window_size, recipe.evaluation.window_stride)
    model.config.window_size, model.config.window_stride = windows
    with torch.inference_mode(), autocast(device, facts["precision"]):
        segment_seconds = _seconds(lambda: segment(model, processor, [photo.permute(1, 2, 0).numpy()]), device)
    model.config.window_size = model.config.window_stride = None
    train_seconds = _train_seconds(model, recipe, samples, device)
    return MachineFacts(
        **facts,
        # Attention makes large images cost more than their area.
        encode_seconds=1.25 * encode_square * area / side**2,
        train_seconds=train_seconds * (CROP * facts["patch_size"] / side) ** 2,
        segment_seconds=segment_seconds,
    )


def _choose_precision(
    model: DepictForSemanticSegmentation, square: torch.Tensor, overrides: Sequence[str]
) -> tuple[str, str, float]:
    """Precision, the reason for it, and the seconds that the encoder takes for a square in it.

    It is what the processor can do that decides, not a timing, which a busy machine may turn round.
    """
    given = [each.partition("=")[2] for each in overrides if each.partition("=")[0].endswith("precision")]
    native = native_dtype(square.device) == torch.bfloat16
    precision = given[0] if given and given != ["auto"] else "bf16" if native else "float32"

    def encode() -> None:
        with torch.inference_mode(), autocast(square.device, precision):
            model.encoder(square, LayerRecord())

    reason = (
        f"Precision {precision}: this processor {'multiplies' if native else 'does not multiply'} bfloat16 natively."
    )
    return precision, reason if precision not in given else "", _seconds(encode, square.device)


def _train_seconds(
    model: DepictForSemanticSegmentation,
    recipe: Recipe,
    samples: SegmentationDataset,
    device: torch.device,
) -> float:
    """Time forward and backward pass for each of two squares, and reading them where no other processor does that."""
    side = recipe.data.crop_size
    trainable = {name: each.requires_grad for name, each in model.named_parameters()}
    if not recipe.model.lora_rank:
        freeze_for(model, recipe)
    model.train()
    squares = torch.randn(2, 3, side, side, device=device)
    labels = torch.zeros(2, side, side, dtype=torch.long, device=device)

    def step() -> None:
        with autocast(device, recipe.hardware.precision):
            loss = model(pixel_values=squares, labels=labels).loss
        loss.backward()

    seconds = _seconds(step, device) / 2
    model.zero_grad()
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    dataset = TrainingDataset(samples, build_augmentation(recipe), 0)
    reading = _seconds(lambda: dataset[0], torch.device("cpu"))
    if device.type == "cpu":
        return seconds + reading
    return max(seconds, reading / max(recipe.hardware.num_workers, 1))


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time a function: the faster of two calls, as the first may prepare things; the first where it was slow anyway."""
    seconds: list[float] = []
    while len(seconds) < 2 and sum(seconds) < SLOW_SECONDS:
        wait_for(device)
        begin = time.perf_counter()
        function()
        wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
