"""What is trained for how long, of which size and in which precision: from the data, the machine and the time there is.

Two stages: the decoder alone on features of the frozen encoder that are computed once, which is fast, and then decoder
and last encoder blocks together, which is what makes a model good. The settings of both are those that proved well on
CamVid (`training.recipes.camvid_dinov2_small` and its fine-tuning); what depends on data and machine is decided here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .recipe import (
    DataSection,
    EvaluationSection,
    HardwareSection,
    ModelSection,
    OptimizationSection,
    Recipe,
    find_field,
)

# Sides in patches: of evaluated photographs (the shorter one), of squares cut from features, of squares in fine-tuning.
SIZE, FEATURE_CROP, CROP, SMALL_CROP = 42, 20, 28, 20
SIZE_ON_GPU = 56
# Shares of the time there is when training begins.
DECODER_SHARE, FEATURES_SHARE, TEST_SHARE, VALIDATION_SHARE = 0.12, 0.25, 0.15, 0.08
# Of the whole time, for saving, pictures, the report, and what cannot be foreseen.
MARGIN = 0.03
# Fewer steps of fine-tuning than this do more harm than good.
LEAST_STEPS = 60
# An end for machines that are much faster than measured; the time ends training before.
MOST_EPOCHS = 100_000
# Fields of recipes that have no meaning here, and what to do instead.
OPTION_OF = {
    "class_names": "use --classes",
    "epochs": "use --minutes, --epochs or --max-steps",
    "backbone": "use --from",
    "start_from": "use --from",
    "encoder": "use --from",
    "streaming": "train a recipe by training.train, which can stream",
    "evaluate_every_epochs": "evaluations are spread over the time there is",
}


@dataclass(frozen=True)
class DataFacts:
    """What the plan needs to know of the data.

    Args:
        class_names: Names in the order of their ids.
        train, validation, test: Numbers of images.
        short_side: Median of the photographs, in pixels.
    """

    class_names: tuple[str, ...]
    train: int
    validation: int
    test: int
    short_side: int


@dataclass(frozen=True)
class MachineFacts:
    """What the plan needs to know of the machine and the model, all measured on them.

    Args:
        device: "cpu", "cuda", ...
        patch_size: Side of a patch of the encoder, in pixels.
        num_blocks: Blocks of the encoder.
        hidden_size: Width of the encoder.
        precision: "bf16" or "float32".
        encode_seconds: The frozen encoder on one whole photograph of `size`.
        train_seconds: An optimiser step of fine-tuning, for each of its squares of `CROP` patches.
        segment_seconds: Segmenting one photograph with overlapping windows.
        processors: Processors that this process may use.
        free_disk_bytes: Free bytes where the run writes.
        why_precision: The sentence that the report has on it.
    """

    device: str
    patch_size: int
    num_blocks: int
    hidden_size: int
    precision: str
    encode_seconds: float
    train_seconds: float
    segment_seconds: float
    processors: int
    free_disk_bytes: float = math.inf
    why_precision: str = ""


@dataclass(frozen=True)
class Stage:
    """One part of a plan.

    Args:
        name: The stage in words, for lines and tables.
        recipe: Its settings; `epochs` is only a bound where time ends it.
        ends_at: Its end in spent seconds of the budget, evaluation included; infinite where steps bound it.
        steps: Optimiser steps that bound it, where there is no time.
        images: Training images that it uses, evenly spaced; all if None.
    """

    name: str
    recipe: Recipe
    ends_at: float = math.inf
    steps: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Plan:
    """Stages in their order, and what is set apart for evaluation.

    Args:
        stages: One or two.
        validation_images: Images that each evaluation during training looks at, evenly spaced.
        test_images: Images that the trained model is evaluated on.
        test_seconds: Seconds that this is expected to take.
        reasons: Lines on what was chosen and why.
    """

    stages: tuple[Stage, ...]
    validation_images: int
    test_images: int
    test_seconds: float = 0.0
    reasons: tuple[str, ...] = field(default=())


def size_for(device: str, patch_size: int, short_side: int) -> int:
    """Choose the shorter side of photographs, in whole patches: small ones are enlarged, as patches are coarse."""
    patches = SIZE if device == "cpu" or short_side < SIZE_ON_GPU * patch_size else SIZE_ON_GPU
    return patches * patch_size


def base_recipe(data: DataFacts, machine: MachineFacts, means: tuple, stds: tuple, decoder_type: str) -> Recipe:
    """Return what both stages share."""
    crop = CROP * machine.patch_size
    batch_size = 2 ** min(3, int(math.log2(max(data.train, 1))))
    return Recipe(
        name="own_classes",
        data=DataSection(
            class_names=data.class_names,
            image_mean=means,
            image_std=stds,
            size=size_for(machine.device, machine.patch_size, data.short_side),
            crop_size=crop,
            scale_range=(0.6, 1.6),
        ),
        # The weights come from what training starts from, in memory.
        model=ModelSection(backbone="none", decoder_type=decoder_type),
        optimization=OptimizationSection(
            epochs=MOST_EPOCHS,
            batch_size=batch_size,
            learning_rate=1e-3,
            scale_rate_factor=10.0,
            class_balance=0.5,
            weight_decay=0.01,
            schedule="cosine",
            final_learning_rate=0.0,
            warmup_steps=50,
            max_grad_norm=1.0,
        ),
        evaluation=EvaluationSection(
            window_size=crop,
            window_stride=crop * 3 // 4,
            evaluate_every_epochs=MOST_EPOCHS,
            sample_pictures=0,
            keep_best=True,
            report_to="none",
        ),
        hardware=HardwareSection(precision=machine.precision, num_workers=_workers(machine)),
    )


def stage_recipes(base: Recipe, machine: MachineFacts, overrides: Sequence[str]) -> tuple[Recipe | None, Recipe | None]:
    """Return recipes of the decoder alone, on cached features, and of decoder and last two thirds of the encoder.

    Overrides replace fields of both; one that a stage cannot be without leaves that stage out (None).

    Raises:
        ValueError: If an override is unknown, contradicts the rest or belongs to an option of the command.
    """
    chosen = check_overrides(overrides)
    crop = min(FEATURE_CROP * machine.patch_size, base.data.crop_size)
    decoder = base.replace(name="own_classes_decoder", cache_features=True, crop_size=crop, num_workers=0)
    finetuning = base.replace(
        name="own_classes_finetuned",
        freeze_encoder=False,
        frozen_encoder_blocks=machine.num_blocks // 3,
        encoder_rate_factor=0.25,
        encoder_layer_decay=0.8,
        learning_rate=3e-4,
        scale_rate_factor=3.0,
    )
    of_adapters = [each for each in overrides if find_field(each.partition("=")[0])[1].name.startswith("lora_")]
    rest = [each for each in overrides if each not in of_adapters]
    wanted = base.override(rest)
    if wanted.data.cache_features or ("freeze_encoder" in chosen and wanted.model.freeze_encoder):
        return decoder.override(rest), None
    if chosen & {"freeze_encoder", "cache_features"}:
        return None, finetuning.override(overrides)
    return decoder.override(rest), finetuning.override(overrides)


def check_overrides(overrides: Sequence[str]) -> set[str]:
    """Return short names of the fields that overrides replace.

    Raises:
        ValueError: If a field is unknown, or an option of the command says the same.
    """
    names = {find_field(each.partition("=")[0])[1].name for each in overrides}
    for name in names & OPTION_OF.keys():
        raise ValueError(f"Got {name} as a field; {OPTION_OF[name]}.")
    return names


def make_plan(
    data: DataFacts,
    machine: MachineFacts,
    base: Recipe,
    seconds: float,
    spent: float,
    steps: int | None = None,
    decoder_is_new: bool = True,
    overrides: Sequence[str] = (),
) -> Plan:
    """Decide stages, their lengths, and how much is evaluated.

    Args:
        base: What `base_recipe` returned.
        seconds: Seconds that the run may take in all; infinite where `steps` bound it.
        spent: Seconds that it took so far.
        steps: Optimiser steps of all stages together, or None.
        decoder_is_new: Whether some weights of the decoder are random; else there is no need to train it alone.
        overrides: Overrides of fields, as `section.field=value`.

    Raises:
        ValueError: If there is too little time to train anything, or an override cannot be followed.
    """
    decoder, finetuning = stage_recipes(base, machine, overrides)
    last = finetuning or decoder
    assert last is not None  # an override leaves out one stage at most
    reasons = [_reason_for_size(data, machine, last), machine.why_precision]
    left = seconds * (1 - MARGIN) - spent
    test_images = data.test
    if test_images * machine.segment_seconds > TEST_SHARE * left:
        test_images = max(1, int(TEST_SHARE * left / machine.segment_seconds))
        reasons.append(
            f"The trained model is evaluated on about {test_images} of {data.test} test images, evenly spaced, or more "
            f"if it gets faster: as measured, all would take {clock(data.test * machine.segment_seconds)}."
        )
    test_seconds = test_images * machine.segment_seconds
    left -= test_seconds
    batch_size = last.optimization.batch_size
    needed = 4 * batch_size * machine.train_seconds
    if left < needed:
        raise ValueError(
            f"Got {seconds / 60:.3g} minutes, of which {max(left, 0) / 60:.2g} are left for training after reading, "
            f"measuring and evaluation, needed at least {needed / 60:.2g} for a few steps; give more --minutes."
        )
    validation_images = data.validation
    if not math.isinf(left):
        affordable = VALIDATION_SHARE * left / (10 * machine.segment_seconds)
        validation_images = min(data.validation, max(int(affordable), 8))
    if validation_images < data.validation:
        reasons.append(f"During training, {validation_images} of {data.validation} validation images are evaluated.")
    if decoder and finetuning and steps is None:
        finetuning, expected = _in_time(finetuning, machine, left)
        if expected < LEAST_STEPS:
            reasons.append(
                f"The encoder stays frozen: in this time it could be trained for only about {expected:.0f} steps, and "
                f"fewer than {LEAST_STEPS} do not pay."
            )
            finetuning = None

    stages: list[Stage] = []
    ends_at = spent + left
    if decoder and (decoder_is_new or finetuning is None):
        images = _cached_images(data, machine, decoder, left)
        cache = (2 * images + validation_images) * machine.encode_seconds
        stage_end = min(spent + cache + DECODER_SHARE * left, ends_at) if finetuning else ends_at
        stage_steps = None if steps is None else max(1, 2 * steps // 5) if finetuning else steps
        stages.append(Stage("decoder", decoder, stage_end, stage_steps, None if images == data.train else images))
        which = f"all {images}" if images == data.train else f"{images} of {data.train}, evenly spaced,"
        reasons.append(
            f"First the decoder alone, on features of the frozen encoder: {which} training images and their mirror "
            f"images are encoded once, in about {clock(cache)}."
        )
    if finetuning:
        stage_steps = None if steps is None else max(1, steps - sum(stage.steps or 0 for stage in stages))
        begin = stages[0].ends_at if stages else spent
        expected = stage_steps or (1 - VALIDATION_SHARE) * (ends_at - begin) / _step_seconds(finetuning, machine)
        stages.append(Stage("fine-tuning", finetuning, ends_at, stage_steps))
        reasons.append(
            f"{'Then' if len(stages) > 1 else 'Only'} decoder and the last "
            f"{machine.num_blocks - finetuning.model.frozen_encoder_blocks} of {machine.num_blocks} encoder blocks: "
            f"{'' if stage_steps else 'about '}{expected:.0f} steps of {batch_size} squares of "
            f"{finetuning.data.crop_size} pixels."
        )
    return Plan(tuple(stages), validation_images, test_images, test_seconds, tuple(each for each in reasons if each))


def clock(seconds: float) -> str:
    """Write seconds in words."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _workers(machine: MachineFacts) -> int:
    if machine.device == "cpu":
        return 1 if machine.processors > 1 else 0
    return max(1, min(8, machine.processors - 1))


def _in_time(recipe: Recipe, machine: MachineFacts, left: float) -> tuple[Recipe, float]:
    """Return the recipe of fine-tuning, on smaller squares where there is little time, and the steps to be expected."""
    left *= 1 - DECODER_SHARE - FEATURES_SHARE
    small = SMALL_CROP * machine.patch_size
    if left / _step_seconds(recipe, machine) < LEAST_STEPS and recipe.data.crop_size > small:
        recipe = recipe.replace(crop_size=small)
    return recipe, left / _step_seconds(recipe, machine)


def _step_seconds(recipe: Recipe, machine: MachineFacts) -> float:
    """Return the seconds of an optimiser step; what is measured is for squares of `CROP` patches."""
    squares = (recipe.data.crop_size / (CROP * machine.patch_size)) ** 2
    return recipe.optimization.batch_size * machine.train_seconds * squares


def _cached_images(data: DataFacts, machine: MachineFacts, recipe: Recipe, left: float) -> int:
    """Say how many training images are encoded beforehand, in the time and on the disk there is."""
    images = data.train
    if not math.isinf(left):
        images = min(images, int(FEATURES_SHARE * left / (2 * machine.encode_seconds)))
    # Two times float16 features, at 4 : 3, and labels.
    side = recipe.data.size // machine.patch_size
    image_bytes = 4 / 3 * side**2 * (4 * machine.hidden_size + machine.patch_size**2)
    images = min(images, int(min(machine.free_disk_bytes / 2, 1e15) / image_bytes))
    return min(data.train, max(images, recipe.optimization.batch_size))


def _reason_for_size(data: DataFacts, machine: MachineFacts, recipe: Recipe) -> str:
    size = recipe.data.size
    return (
        f"Photographs ({data.short_side} pixels on the shorter side in the median) are "
        f"{'enlarged' if data.short_side < size else 'reduced'} to {size}, so that a patch covers "
        f"{machine.patch_size * data.short_side / size:.0f} pixels of theirs; evaluation looks at overlapping windows "
        f"of {recipe.evaluation.window_size}."
    )
