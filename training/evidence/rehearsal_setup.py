"""What a rehearsal goes through: a recipe of the paper made small, its data, its encoder's weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.configuration_depict import ENCODER_PRESETS
from depict_hf.to_published import timm_state_dict
from depict_hf.windows import window_starts

from ..data import load_dataset_splits
from ..evaluation import interleaved_seconds, matrix_product
from ..recipe import SECTIONS, Recipe
from ..recipes import RECIPES, get_recipe
from ..settings import text_of
from .costs import count_parameters, step_bytes, training_cost
from .made_data import MADE_SIZES, make_dataset

# Resuming falls into the middle of an epoch.
STEPS, STEPS_UNTIL_RESUMED = 10, 8
# A step is made of as many images as keep it below this, for ten of them to take minutes on two cores.
FLOPS_PER_STEP = 2e12
# Beside what a step keeps: a checkpoint that is read, the loss's bands, Python and its libraries.
OTHER_BYTES = 3 * 2**30
# Copies of the weights that are on the disk at once, at most: encoder, two checkpoints with states, models, published.
DISK_COPIES = 9


def dataset_of(recipe: Recipe) -> str:
    """Name the data set that a row of the paper is of.

    Raises:
        ValueError: If the recipe is none of those rows.
    """
    name = next((each for each in MADE_SIZES if recipe.name.startswith(each)), None)
    if name is None or recipe.model.encoder is None:
        raise ValueError(
            f"Got recipe {recipe.name!r}, which is no row of the paper; rehearse one whose name begins with "
            f"{', '.join(MADE_SIZES)}. Other recipes are short enough to be run."
        )
    return name


def rows_of_the_paper() -> list[str]:
    """Name the recipes that can be rehearsed, smaller encoders first."""
    return [name for name in RECIPES if get_recipe(name).model.encoder is not None]


def reduce_recipe(recipe: Recipe, available_bytes: int) -> tuple[Recipe, list[str]]:
    """Make of a recipe what fits into memory and minutes: first fewer images a step, and a smaller encoder at last.

    Args:
        available_bytes: Of memory.

    Returns:
        The recipe, of ten steps, and what was reduced, in sentences.
    """
    small, sentences = recipe, []
    flops_per_image = training_cost(recipe).flops_per_step / recipe.optimization.batch_size

    def too_large(each: Recipe) -> bool:
        images = each.optimization.batch_size
        return step_bytes(each, images) + OTHER_BYTES > available_bytes

    while small.optimization.batch_size > 1 and (
        flops_per_image * small.optimization.batch_size > FLOPS_PER_STEP or too_large(small)
    ):
        small = small.replace(batch_size=small.optimization.batch_size // 2, accumulation_steps=1)
    if small.optimization.batch_size != recipe.optimization.batch_size:
        sentences.append(f"{small.optimization.batch_size} images a step instead of {recipe.optimization.batch_size}")
    patch_size = ENCODER_PRESETS[recipe.model.encoder or ""][0]
    widths = {name: shape[1] for name, shape in ENCODER_PRESETS.items() if shape[0] == patch_size and not shape[4]}
    while too_large(small):
        smaller = [name for name in widths if widths[name] < widths[small.model.encoder or ""]]
        if not smaller:
            break
        small = small.replace(encoder=max(smaller, key=widths.__getitem__))
    if small.model.encoder != recipe.model.encoder:
        sentences.append(
            f"encoder {small.model.encoder} instead of {recipe.model.encoder}, which does not fit into the "
            f"{available_bytes / 2**30:.1f} GiB of free memory"
        )
    return small, sentences


def check_disk(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder without room for what the rehearsal writes.

    Raises:
        OSError: If there is too little.
    """
    needed = DISK_COPIES * 4 * count_parameters(recipe)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**30:.1f} GiB of free disk, needed about {needed / 2**30:.1f}; free some, or give "
            "another OUTPUT."
        )


def validation_images(recipe: Recipe) -> int:
    """Return how many images are evaluated: two, or one where even a step of one image is long."""
    return 2 if recipe.optimization.batch_size > 1 else 1


def make_data(recipe: Recipe, dataset: str, folder: Path) -> tuple[Recipe, str, list[str]]:
    """Make data in their official layout for ten steps of a recipe, and have the real reader find them.

    Returns:
        The recipe, of ten steps; what the reader recognised; what was reduced, in sentences.

    Raises:
        RuntimeError: If they were taken for something else.
    """
    num_train, num_validation = STEPS // 2 * recipe.optimization.batch_size, validation_images(recipe)
    make_dataset(dataset, folder, num_train, num_validation)
    layout = load_dataset_splits(folder).layout
    if "in its official layout" not in layout:
        raise RuntimeError(f"The made data were read as {layout!r}, needed {dataset} in its official layout.")
    height, width = MADE_SIZES[dataset]
    images = f"{num_train} + {num_validation} made images of {height} x {width}"
    return _ten_steps(recipe, STEPS // 2), f"{layout}: {images}", [f"{images} instead of the data set"]


def take_data(recipe: Recipe, name_or_path: str) -> tuple[Recipe, str, list[str]]:
    """Take the first images of somebody's data for ten steps of a recipe.

    Returns:
        As `make_data`; the recipe names parts of the splits. Without its validation split, the training split is
        evaluated on.

    Raises:
        OSError: If there are no such data.
        ValueError: If there is no such training split, or only a part of one is asked for.
    """
    splits = load_dataset_splits(name_or_path)
    train = recipe.data.train_split
    if train not in splits:
        raise ValueError(
            f"Got train_split={train!r}, needed one of the splits {', '.join(splits)}, whole: a rehearsal takes the "
            "first images of it."
        )
    batch_size = min(recipe.optimization.batch_size, len(splits[train]))
    steps = max(each for each in (1, 2, 5) if each <= len(splits[train]) // batch_size)
    reduced = [f"the first {steps * batch_size} training images"]
    if batch_size < recipe.optimization.batch_size:
        reduced.append(f"{batch_size} images a step, as there are no more")
    validation = recipe.data.validation_split
    if "[" not in validation:
        if validation not in splits:
            reduced.append(f"evaluation on the {train} split, as there is no {validation} split")
            validation = train
        validation = f"{validation}[:{validation_images(recipe)}]"
    reduced.append(f"evaluation on {validation}")
    small = recipe.replace(
        batch_size=batch_size,
        accumulation_steps=1,
        train_split=f"{train}[:{steps * batch_size}]",
        validation_split=validation,
        test_split=validation,
    )
    return (
        _ten_steps(small, steps),
        f"{splits.layout}: {', '.join(f'{n} {len(s)}' for n, s in splits.items())}",
        reduced,
    )


def _ten_steps(recipe: Recipe, steps_per_epoch: int) -> Recipe:
    """Have the recipe make `STEPS`, with a checkpoint after `STEPS_UNTIL_RESUMED`, and evaluate after the last one."""
    epochs = STEPS // steps_per_epoch
    return recipe.replace(
        epochs=epochs,
        evaluate_every_epochs=epochs,
        save_every_steps=STEPS_UNTIL_RESUMED,
        num_workers=min(recipe.hardware.num_workers, 2),
        report_to="none",
        sample_pictures=1,
        keep_best=False,
        early_stopping=0,
        push_to_hub=None,
    )


def overrides_of(recipe: Recipe) -> list[str]:
    """Return the command line of the fields in which a recipe differs from the one of its name."""
    own = get_recipe(recipe.name)
    return [
        f"{section}.{name}={text_of(value)}"
        for section in SECTIONS
        for name, value in vars(getattr(recipe, section)).items()
        if value != getattr(getattr(own, section), name)
    ]


def write_random_encoder(preset: str, folder: Path) -> Path:
    """Write random weights of an encoder of `ENCODER_PRESETS`, at 384 pixels, as timm publishes pretrained ones.

    Returns:
        The folder, whose `model.safetensors` `read_weights` reads.
    """
    torch.manual_seed(0)
    config = DepictConfig.from_preset(preset, image_size=384, decoder_type="linear", num_labels=2)
    model = DepictForSemanticSegmentation(config)
    heads = ("head", "head_dist") if config.use_distillation_token else ("head",)
    classifiers = {f"{head}.weight": torch.zeros(1000, config.hidden_size) for head in heads}
    classifiers |= {f"{head}.bias": torch.zeros(1000) for head in heads}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm_state_dict(model.encoder.state_dict()) | classifiers, folder / "model.safetensors")
    return folder


def least_minutes(recipe: Recipe, dataset: str, scales: Sequence[float]) -> float:
    """Say how long a rehearsal takes at least on this machine: its FLOPs at the rate of a large matrix product.

    Args:
        recipe: Of `make_data` or `take_data`.
        dataset: Whose made images stand for those that are evaluated.
        scales: Of the multi-scale evaluation, on one image and its mirror image.
    """
    step = training_cost(recipe).flops_per_step
    forward = step / 3 / recipe.optimization.batch_size
    single = windows_of(recipe, MADE_SIZES[dataset], 1.0)
    # Both runs, the whole and the resumed one, evaluate all images by two protocols.
    windows = 4 * validation_images(recipe) * single + 2 * sum(
        windows_of(recipe, MADE_SIZES[dataset], s) for s in scales
    )
    product, flops = matrix_product(torch.float32)
    seconds = min(interleaved_seconds({"": product}, repetitions=3)[""])
    return ((2 * STEPS - STEPS_UNTIL_RESUMED) * step + windows * forward) / (flops / seconds) / 60


def windows_of(recipe: Recipe, size: tuple[int, int], scale: float) -> int:
    """Count the windows that the published protocol cuts a photograph of (height, width) into at one scale."""
    evaluation = recipe.evaluation
    window = evaluation.window_size or recipe.data.crop_size
    stride = evaluation.final_window_stride or evaluation.window_stride or window
    shortest = int((evaluation.final_size or recipe.data.size) * scale)
    longest = int(shortest * (evaluation.final_long_side_factor or max(size)))
    factor = min(longest / max(size), shortest / min(size))
    factor = max(factor, window / min(size))  # what is smaller than a window is enlarged to it
    count = 1
    for length in size:
        count *= len(window_starts(max(window, int(length * factor + 0.5)), window, stride))
    return count
