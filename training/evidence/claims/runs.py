"""Runs of a plan: trained, evaluated on the validation split and, where seeds are compared, on the test split, kept."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from depict_hf import DepictForSemanticSegmentation
from depict_hf.modeling_depict import segmentation_loss

from ...data import SegmentationDataset, open_data
from ...evaluation import environment, write_json
from ...optimization import (
    PlainAttention,
    count_encoder_blocks,
    create_optimizer,
    create_scheduler,
    freeze_encoder_blocks,
    parameter_groups,
)
from ...recipe import Recipe
from ...recipe_data import build_image_processor
from ...recipe_model import build_model
from ..noise import ATTENTION_MATRICES
from .maps import MapCounts, count_maps
from .noise import measure_run_noise
from .plan import Plan, steps_of
from .tokens import MovingPart, Pool, WholeImages, build_pool, build_whole_images, shuffled


@dataclass(frozen=True)
class DatasetTokens:
    """One data set as runs need it: class names, training squares, images of the validation and of the test split."""

    class_names: tuple[str, ...]
    pool: Pool
    validation: WholeImages
    test: WholeImages


@dataclass(frozen=True)
class Grid:
    """Where the runs of one data set are kept, and what they are made from.

    Args:
        plan: The plan.
        name: Name of the data set in it.
        backbone: Where the encoder lies, if not where the plan says.
        folder: Gets `runs/*.json` and `*.npz`, `noise/*.json`, `models/*` and `tokens`. The first two are all that
            verdicts need; of the models, costs need the configurations of the first seed.
    """

    plan: Plan
    name: str
    backbone: str | None
    folder: Path

    def recipe(self, decoder_type: str, learning_rate: float, seed: int, names: Sequence[str]) -> Recipe:
        """Return the recipe of one run."""
        return self.plan.recipe(decoder_type, learning_rate, seed, self.backbone, names)

    def record(self, run: str) -> Path:
        """Return the path of a run's record; its counts lie beside it as .npz."""
        return self.folder / "runs" / f"{run}.json"


def run_grid(
    plan: Plan,
    output: Path,
    datasets: Mapping[str, str],
    backbone: str | None = None,
    decoders: Sequence[str] | None = None,
) -> None:
    """Make all runs of a plan that `output` does not hold yet.

    Args:
        output: Folder of all data sets' runs; the same call continues where it was interrupted.
        datasets: Folders or Hub names by the names in the plan; those left out are left for another call.
        decoders: Decoders to run; all of the plan's if None.

    Raises:
        OSError: If data or encoder cannot be had.
        ValueError: If the plan has no such data set or decoder, or `output` holds runs of another plan.
    """
    unknown = sorted(set(datasets) - set(plan.datasets)) + sorted(set(decoders or ()) - set(plan.learning_rates))
    if unknown:
        raise ValueError(f"Got {', '.join(unknown)}, which the plan does not name.")
    for name, where in datasets.items():
        grid = Grid(plan, name, backbone, output / name)
        _check_plan(grid)
        data = load_tokens(grid, where)
        for decoder_type in decoders or plan.learning_rates:
            rates = plan.learning_rates[decoder_type]
            scores = {
                rate: run_once(grid, decoder_type, rate, plan.trial_seed, data)["validation"]["mean_iou"]
                for rate in rates
            }
            best = best_rate(scores)
            for seed in plan.seeds:
                run_once(grid, decoder_type, best, seed, data)
                if decoder_type in ATTENTION_MATRICES:
                    measure_run_noise(plan, grid.folder, f"{decoder_type}_seed{seed}", data.test.samples)


def best_rate(scores: Mapping[float, float]) -> float:
    """Return the learning rate of the highest validation mIoU, of equals the lowest one."""
    return min(scores, key=lambda rate: (-scores[rate], rate))


def load_tokens(grid: Grid, where: str) -> DatasetTokens:
    """Read a data set, and compute what its runs share.

    Raises:
        OSError, ValueError: If the data cannot be had or are at fault.
    """
    plan = grid.plan
    opened = open_data(where, plan.datasets[grid.name].known_names)
    recipe = grid.recipe("linear", 1e-3, plan.trial_seed, opened.class_names)
    model = build_model(recipe).eval()
    common = (plan.moving_blocks, grid.folder / "tokens")
    samples = opened.samples
    return DatasetTokens(
        opened.class_names,
        build_pool(model, recipe, samples["train"], plan.datasets[grid.name].squares_per_image, *common),
        build_whole_images(model, recipe, samples["validation"], *common),
        build_whole_images(model, recipe, samples["test"], *common),
    )


def run_once(grid: Grid, decoder_type: str, learning_rate: float, seed: int, data: DatasetTokens) -> dict:
    """Return the record of one run, read where it is finished, else made; trials do not see the test split."""
    is_trial = seed == grid.plan.trial_seed
    run = f"{decoder_type}_trial_{learning_rate:g}" if is_trial else f"{decoder_type}_seed{seed}"
    path = grid.record(run)
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["learning_rate"] != learning_rate:
            raise ValueError(
                f"{path} was made at rate {record['learning_rate']:g}, where the trials now say {learning_rate:g}; "
                "delete it to run it again."
            )
        return record
    begin = time.perf_counter()
    recipe = grid.recipe(decoder_type, learning_rate, seed, data.class_names)
    model, losses = train(recipe, data.pool, grid.plan)
    trained = time.perf_counter()
    part = MovingPart(model, grid.plan.moving_blocks).eval()
    counts = {"validation": evaluate_part(part, data.validation)}
    if not is_trial:
        counts["test"] = evaluate_part(part, data.test)
        folder = grid.folder / "models" / run
        if model.config.backbone_config is not None:  # where the encoder lay is of no use elsewhere
            cast(Any, model.config.backbone_config)._name_or_path = ""
        model.save_pretrained(folder)
        build_image_processor(recipe).save_pretrained(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"{split}_{kind}": value for split, each in counts.items() for kind, value in each.arrays().items()
    }
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    record = {
        "dataset": grid.name,
        "decoder": decoder_type,
        "learning_rate": learning_rate,
        "seed": seed,
        "trial": is_trial,
        "steps": len(losses),
        "class_names": list(data.class_names),
        **{split: each.scores(data.class_names) for split, each in counts.items()},
        "losses": [round(loss, 5) for loss in losses],
        "seconds": {"training": trained - begin, "evaluation": time.perf_counter() - trained},
        "environment": environment(),
    }
    write_json(record, path, indent=1)
    test = "" if is_trial else f", test {100 * record['test']['mean_iou']:.2f}"
    print(
        f"{grid.name} {run}: {record['seconds']['training']:.0f} s, mIoU validation "
        f"{100 * record['validation']['mean_iou']:.2f}{test}"
    )
    return record


def train(
    recipe: Recipe, pool: Pool, plan: Plan, change: Callable[[DepictForSemanticSegmentation], None] | None = None
) -> tuple[DepictForSemanticSegmentation, list[float]]:
    """Train a new decoder and the end of the encoder on every square of the pool once.

    Args:
        change: Gets the model before the first step, and may change its weights.

    Returns:
        The whole model in evaluation mode, float32, and the loss of every step.
    """
    set_seed(recipe.optimization.seed)
    model = build_model(recipe)
    freeze_encoder_blocks(model, count_encoder_blocks(model) - plan.moving_blocks)
    if change is not None:
        with torch.no_grad():
            change(model)
    part = MovingPart(model, plan.moving_blocks).train()
    optimizer = create_optimizer(parameter_groups(part, recipe), recipe)
    scheduler = create_scheduler(optimizer, recipe, steps_of(plan, len(pool)))
    losses = []
    for batch in shuffled(len(pool), recipe.optimization.batch_size, recipe.optimization.seed):
        tokens, labels = pool.batch(batch)
        with (
            PlainAttention(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.hardware.precision == "bf16"),
        ):
            loss = segmentation_loss(part(tokens), labels, model.config.semantic_loss_ignore_index)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), recipe.optimization.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@torch.inference_mode()
def evaluate_part(part: MovingPart, images: WholeImages) -> MapCounts:
    """Predict every image at its own size and count pixels."""

    def pairs():
        for index in range(len(images)):
            labels = _labels(images.samples, index)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = images.logits(part, index, (int(labels.shape[0]), int(labels.shape[1])))
            yield logits.argmax(dim=0), labels

    return count_maps(pairs(), part.config.num_labels)


def _labels(samples: SegmentationDataset, index: int) -> Tensor:
    return samples[index]["labels"]


def _check_plan(grid: Grid) -> None:
    """Note the plan beside its runs, and refuse to go on with runs of another plan."""
    path = grid.folder / "plan.json"
    now = {"digest": grid.plan.digest, "settings": json.loads(json.dumps(dataclasses.asdict(grid.plan)))}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["digest"] != now["digest"]:
            changed = [name for name, value in now["settings"].items() if before["settings"].get(name) != value]
            raise ValueError(
                f"{grid.folder} holds runs of a plan with other {', '.join(changed)}; take another OUTPUT."
            )
        return
    write_json(now, path, indent=1)
