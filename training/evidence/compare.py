"""Decoders trained on the cached features of one frozen encoder and evaluated on whole images, run by run.

Decoders are trained on the CPU: a run depends on its settings alone, and with as many threads repeats bit for bit.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.windows import resize_bilinear

from ..data import DecoderOnFeatures, FeatureDataset, load_dataset_splits, sample_generator
from ..evaluation import MeanIoU, class_names, count_flops, environment, interleaved_seconds, write_json, write_whole
from ..optimization import create_optimizer, create_scheduler, parameter_groups
from ..recipe import Recipe, resolve_precision
from ..recipe_data import build_image_processor, build_samples
from ..recipe_model import build_model
from ..recipes import camvid_dinov2_small
from ..settings import nearest_name
from .comparison_report import build_report, load_runs, plot_report, render_markdown

# Of the runs that choose the learning rate; none of the compared seeds may be it.
TRIAL_SEED = 1000
# What a run depends on besides the data, all of it used here; the rest of `Recipe` is not.
RUN_FIELDS = (
    "decoder_type",
    "learning_rate",
    "seed",
    "size",
    "crop_size",
    "batch_size",
    "optimizer",
    "scale_rate_factor",
    "weight_decay",
    "schedule",
    "final_learning_rate",
    "warmup_steps",
    "max_grad_norm",
    "precision",
    "class_names",
)
DATA_FIELDS = (
    "image_column",
    "label_column",
    "reduce_labels",
    "image_mean",
    "image_std",
    "train_split",
    "validation_split",
    "test_split",
)
OVERRIDABLE = (*RUN_FIELDS[3:], *DATA_FIELDS)


@dataclass(frozen=True)
class EvaluationSplit:
    """Whole images: their features, and label maps `(height, width)` uint8 at the photographs' own size."""

    features: FeatureDataset
    labels: list[Tensor]


@dataclass(frozen=True)
class ComparisonData:
    """The features of all three splits."""

    training: FeatureDataset
    validation: EvaluationSplit
    test: EvaluationSplit

    @property
    def fingerprints(self) -> dict[str, str]:
        """What each split's features depend on, as one name."""
        folders = (self.training.folder, self.validation.features.folder, self.test.features.folder)
        return {name: folder.name for name, folder in zip(("training", "validation", "test"), folders, strict=True)}


def comparison_recipe(decoder_type: str, backbone: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of `decoder_type`: CamVid's, with crops of 224 pixels.

    Raises:
        ValueError: If an override is none of the fields that a comparison uses.
    """
    for assignment in overrides:
        name = assignment.partition("=")[0]
        if name not in OVERRIDABLE:
            raise ValueError(f"Got {assignment!r}, which a comparison cannot change{nearest_name(name, OVERRIDABLE)}.")
    recipe = camvid_dinov2_small(decoder_type).replace(crop_size=224)
    if backbone is not None:
        recipe = recipe.replace(backbone=backbone)
    return resolve_precision(recipe.override(overrides))


def load_data(recipe: Recipe, dataset: str, folder: Path) -> ComparisonData:
    """Load features of the recipe's splits, computed into `folder` where it does not hold them.

    Raises:
        OSError: If the dataset or the encoder cannot be loaded.
        ValueError: If the data do not suit the recipe.
    """
    splits = load_dataset_splits(dataset)
    model, image_processor = build_model(recipe), build_image_processor(recipe)
    autocast = recipe.hardware.precision == "bf16"

    def features(split: str, crop_size: int | None = None) -> FeatureDataset:
        samples = build_samples(recipe, splits, split)
        return FeatureDataset(model, samples, image_processor, folder, crop_size, autocast=autocast)

    def evaluation(split: str) -> EvaluationSplit:
        whole = features(split)
        labels = [whole.samples[index]["labels"].to(torch.uint8) for index in range(len(whole))]
        return EvaluationSplit(whole, labels)

    training = features(recipe.data.train_split, recipe.data.crop_size)
    recipe.steps_per_epoch(len(training))  # refuses fewer images than one batch
    return ComparisonData(training, evaluation(recipe.data.validation_split), evaluation(recipe.data.test_split))


def training_batches(num_images: int, batch_size: int, steps: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Return the epoch and image indices of each step; every epoch a new order, its last incomplete batch left out."""
    steps_per_epoch = num_images // batch_size
    for step in range(steps):
        epoch, batch = divmod(step, steps_per_epoch)
        if batch == 0:
            # The index after the last image: crops draw from those of the images.
            order = torch.randperm(num_images, generator=sample_generator(seed, epoch, num_images)).tolist()
        yield epoch, order[batch * batch_size : (batch + 1) * batch_size]


def train_decoder(recipe: Recipe, steps: int, training: FeatureDataset) -> tuple[DecoderOnFeatures, list[float]]:
    """Train a new decoder.

    Returns:
        The decoder in evaluation mode, float32, and the loss of every step.
    """
    set_seed(recipe.optimization.seed)
    decoder = DecoderOnFeatures(build_model(recipe)).train()
    optimizer = create_optimizer(parameter_groups(decoder, recipe), recipe)
    scheduler = create_scheduler(optimizer, recipe, steps)
    training.seed = recipe.optimization.seed
    losses = []
    for epoch, indices in training_batches(len(training), recipe.optimization.batch_size, steps, training.seed):
        training.set_epoch(epoch)
        batch = torch.utils.data.default_collate([training[index] for index in indices])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.hardware.precision == "bf16"):
            loss = decoder(**batch).loss
        loss.backward()
        if recipe.optimization.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.optimization.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return decoder.eval(), losses


@torch.inference_mode()
def evaluate_decoder(decoder: DecoderOnFeatures, split: EvaluationSplit) -> dict:
    """Return the single-scale mIoU at the photographs' own size, float32, as `depict_hf.inference.segment` predicts.

    Returns:
        `mean_iou` and, by class name, `per_class_iou`, fractions; None for a class that occurs nowhere.
    """
    metric = MeanIoU(decoder.config.num_labels, ignore_index=IGNORE_LABEL)
    for index, labels in enumerate(split.labels):
        height, width = labels.shape
        prediction = predict(decoder, *split.features.read_whole(index), (height, width))
        metric.add_batch(predictions=[prediction], references=[labels])
    results = metric.compute()
    values = [None if iou != iou else iou for iou in results["per_category_iou"].tolist()]
    return {
        "mean_iou": results["mean_iou"],
        "per_class_iou": dict(zip(class_names(decoder.config), values, strict=True)),
    }


def predict(decoder: DecoderOnFeatures, features: Tensor, input_size: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map of one image, `size` = (height, width), from its features `(grid_height, grid_width, hidden)`."""
    logits = decoder(features[None], input_size=input_size[None]).logits.float()
    return resize_bilinear(logits, size)[0].argmax(dim=0)


def run_once(recipe: Recipe, steps: int, data: ComparisonData, path: Path, with_test: bool) -> dict:
    """Return the record of one run: read from `path` if it is there, else made and written, in one piece.

    Raises:
        ValueError: If the file comes from a run with other settings.
    """
    settings = {name: recipe.value(name) for name in RUN_FIELDS} | {"steps": steps, "features": data.fingerprints}
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in a file
    if path.is_file():
        record = json.loads(path.read_text())
        check_settings(record["settings"], settings, path)
        return record
    start = time.perf_counter()
    decoder, losses = train_decoder(recipe, steps, data.training)
    trained = time.perf_counter()
    record = {
        "settings": settings,
        "settings_hash": settings_hash(settings),
        "validation": evaluate_decoder(decoder, data.validation),
        "test": evaluate_decoder(decoder, data.test) if with_test else None,
        "losses": [round(loss, 5) for loss in losses],
        "seconds": {"training": trained - start, "evaluation": time.perf_counter() - trained},
        "environment": environment(),
    }
    write_json(record, path, indent=1)
    test = f", test {100 * record['test']['mean_iou']:.2f}" if with_test else ""
    rate, seconds = recipe.optimization.learning_rate, record["seconds"]["training"]
    print(
        f"{path.stem}: {steps} steps at {rate:g} in {seconds:.0f} s; mIoU "
        f"validation {100 * record['validation']['mean_iou']:.2f}{test}"
    )
    return record


def check_settings(found: dict, needed: dict, path: Path) -> None:
    """Raise ValueError where the settings of a finished run are not those asked for."""
    differing = sorted(name for name in {*found, *needed} if found.get(name) != needed.get(name))
    if differing:
        changes = ", ".join(f"{name}={found.get(name)} there, {needed.get(name)} here" for name in differing)
        raise ValueError(
            f"{path} comes from a run with other settings ({changes}); choose another OUTPUT, or delete the file to "
            "run it again."
        )


def settings_hash(settings: dict) -> str:
    """Return a short name for the settings of a run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def compare_decoder(
    recipe: Recipe, rates: Sequence[float], seeds: Sequence[int], steps: int, data: ComparisonData, folder: Path
) -> None:
    """Choose the learning rate by validation mIoU in one trial per rate, then run every seed.

    A grid of one rate needs no trial. Trials are not evaluated on the test split.
    """
    scores = {}
    for rate in rates if len(rates) > 1 else ():
        trial = recipe.replace(learning_rate=rate, seed=TRIAL_SEED)
        path = folder / f"{recipe.model.decoder_type}_trial_lr{rate:g}.json"
        scores[rate] = run_once(trial, steps, data, path, with_test=False)["validation"]["mean_iou"]
    best = max(rates, key=lambda rate: scores.get(rate, 0.0))
    for seed in seeds:
        run = recipe.replace(learning_rate=best, seed=seed)
        run_once(run, steps, data, folder / f"{recipe.model.decoder_type}_seed{seed}.json", with_test=True)


def measure_costs(recipes: dict[str, Recipe], grid_size: tuple[int, int], repetitions: int = 15) -> dict:
    """Measure parameters, arithmetic and time of decoders on one whole image.

    Args:
        recipes: Recipes by decoder type.
        grid_size: (height, width) in patches.
        repetitions: Rounds of the timing; each round runs every decoder once, and one more round warms up.

    Returns:
        `grid_size`, `threads`, and by decoder type `decoders`: `parameters`; `flops`, two per multiply-add of matrix
        products, attention included; `milliseconds`, the median in float32.
    """
    costs, functions = {}, {}
    for name, recipe in recipes.items():
        model = build_model(recipe).eval().requires_grad_(False)  # the counter follows tensors that require a gradient
        patches = torch.randn(1, grid_size[0] * grid_size[1], model.encoder.hidden_size)
        functions[name] = partial(model.decoder, patches, grid_size)
        parameters = sum(parameter.numel() for parameter in model.decoder.parameters())
        costs[name] = {"parameters": parameters, "flops": count_flops(functions[name])}
    with torch.inference_mode():
        for name, seconds in interleaved_seconds(functions, repetitions).items():
            costs[name]["milliseconds"] = 1000 * statistics.median(seconds)
    return {"grid_size": list(grid_size), "threads": torch.get_num_threads(), "decoders": costs}


def write_report(output: Path, runs: Sequence[dict]) -> None:
    """Write comparison.json from runs and the last costs in `output`, and from it the table and the plot.

    Raises:
        OSError: If `output` holds no costs.
        ValueError: If the runs cannot be compared.
        ImportError: If matplotlib is missing; everything else is written by then.
    """
    report = build_report(runs, json.loads((output / "costs.json").read_text()))
    write_json(report, output / "comparison.json", indent=1)
    markdown = render_markdown(report)
    write_whole(markdown, output / "comparison.md")
    print(markdown)
    plot_report(report, output / "comparison.png")


def compare_decoders(
    dataset: str,
    output: Path,
    decoders: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    backbone: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train and evaluate decoders as far as `output` does not hold their runs yet, and report on all runs there.

    Args:
        dataset: Hub name or folder, as for `load_dataset_splits`.
        output: Receives `features`, `runs` and what `write_report` writes.
        decoders: Decoder types that this call trains; the report has all that `output` holds.
        rates: Learning rates to choose from.
        seeds: Seeds of the compared runs.
        steps: Optimiser steps of every run.
        backbone: Path or Hub name of the encoder; None takes the recipe's own.
        overrides: `field=value` of the recipe, for fields in `OVERRIDABLE`.

    Raises:
        ImportError: If matplotlib is missing; everything but the plot is written by then.
        OSError: If the dataset or the encoder cannot be loaded.
        ValueError: If an argument is out of its range, the data do not suit it, or `output` holds runs of others.
    """
    if TRIAL_SEED in seeds:
        raise ValueError(f"Got seed {TRIAL_SEED}, which chooses the learning rates; take another.")
    if steps < 1:
        raise ValueError(f"Got steps={steps}, needed at least 1.")
    recipes = {name: comparison_recipe(name, backbone, overrides) for name in decoders}
    data = load_data(recipes[decoders[0]], dataset, output / "features")
    for recipe in recipes.values():
        compare_decoder(recipe, rates, seeds, steps, data, output / "runs")
    runs = load_runs(output / "runs")
    compared = sorted({run["settings"]["decoder_type"] for run in runs})
    recipes = {name: comparison_recipe(name, backbone, overrides) for name in compared}
    height, width, _ = data.test.features.read_whole(0)[0].shape
    write_json(measure_costs(recipes, (height, width)), output / "costs.json", indent=1)
    write_report(output, runs)
