"""Why decoders reached what they did: looked at after the verdicts with `depict_hf.analysis`, not planned.

Trained models are measured on test images, and trained anew with one thing changed, scored on the validation split.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import nn

from depict_hf import DepictForSemanticSegmentation
from depict_hf.analysis import coding_rate, lens, record, step_sizes
from depict_hf.analysis.steps import LAYERED_DECODERS, SUBSPACE_DECODERS, layered_decoder, subspace_layers
from depict_hf.hub.tables import pipe_table
from depict_hf.loading import load_model
from depict_hf.windows import cut_windows, enlarge_to_window

from ...data import SegmentationDataset, open_data
from ...evaluation import spread, write_json
from ..white_box import EPSILON
from .plan import Plan
from .runs import DatasetTokens, Grid, best_rate, evaluate_part, load_tokens, train
from .tokens import MovingPart

SMALL, WIDE = 0.1, 3.0
FOLDER = "exploration"


def _positive(model: DepictForSemanticSegmentation) -> None:
    for layer in subspace_layers(model, "step sizes"):
        layer.step_size.abs_()


def _small(model: DepictForSemanticSegmentation) -> None:
    for layer in subspace_layers(model, "step sizes"):
        layer.step_size.mul_(SMALL)


def _wide(model: DepictForSemanticSegmentation) -> None:
    cast(nn.LayerNorm, layered_decoder(model).mask_norm).weight.fill_(WIDE)


# What a run starts with instead; all else is as planned.
CHANGES: dict[str, tuple[str, Callable[[DepictForSemanticSegmentation], None]]] = {
    "wide": (f"logits {WIDE:g} times as far apart (weight of the LayerNorm over the classes)", _wide),
    "positive": ("step sizes of the drawn size, all positive", _positive),
    "small": (f"step sizes {SMALL:g} of those drawn", _small),
}


def explore(
    plan: Plan, output: Path, datasets: Mapping[str, str], backbone: str | None, decoders: Sequence[str]
) -> None:
    """Measure the trained models of a plan, and train decoders with each of `CHANGES`, as far as that is not done.

    Args:
        output: Folder of `run_grid`, with the models; gets `exploration/*.json` for every data set.
        datasets: Folders or Hub names by the names in the plan.
        decoders: What is looked at.

    Raises:
        OSError: If data, encoder or models cannot be had.
        ValueError: If trials are missing, or a decoder has no layers.
    """
    other = sorted(set(decoders) - set(LAYERED_DECODERS))
    if other:
        raise ValueError(f"Got {', '.join(other)}, needed decoders with layers: {', '.join(LAYERED_DECODERS)}.")
    for name, where in datasets.items():
        grid = Grid(plan, name, backbone, output / name)
        samples = open_data(where, plan.datasets[name].known_names).samples["test"]
        for decoder in decoders:
            for seed in plan.seeds:
                _look_at(grid, f"{decoder}_seed{seed}", samples)
        data = load_tokens(grid, where)
        for decoder in decoders:
            for change in changes_of(decoder):
                for seed in plan.seeds:
                    _run_changed(grid, decoder, change, seed, data)


def changes_of(decoder: str) -> list[str]:
    """Name the changes that a decoder can start with: a black box has no step sizes."""
    return list(CHANGES) if decoder in SUBSPACE_DECODERS else ["wide"]


def _look_at(grid: Grid, run: str, samples: SegmentationDataset) -> None:
    path = grid.folder / FOLDER / f"{run}.json"
    if path.is_file():
        return
    model, image_processor = load_model(grid.folder / "models" / run)
    window = grid.plan.crop_size
    figures = []
    for index in spread(len(samples), grid.plan.noise.images):
        pixel_values = image_processor(samples[index]["image"], return_tensors="pt")["pixel_values"]
        pixel_values = enlarge_to_window(pixel_values, window)
        middle = ((pixel_values.shape[-2] - window) // 2, (pixel_values.shape[-1] - window) // 2)
        figures.append(image_figures(model, cut_windows(pixel_values, [middle], window)))
    found: dict[str, Any] = {
        **weight_figures(model),
        **{name: fmean(each[name] for each in figures) for name in figures[0]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, path, indent=1)
    print(f"{grid.name} {run}: looked at")


@torch.no_grad()
def image_figures(model: DepictForSemanticSegmentation, pixel_values: torch.Tensor) -> dict[str, float]:
    """Return what the decoder's layers do to one image `(1, 3, height, width)`.

    Returns:
        `update`, the mean over the layers of the length of what a layer adds to the patch tokens, relative to theirs;
        `rate`, what the layers add to the coding rate of the patch tokens at length 1, in nats; `changed`, the share of
        patches whose class, read by the decoder's end, is another one after the layers than before.
    """
    recording = record(model, pixel_values)
    tokens = [each[0].double() for each in recording.patch_tokens]
    pairs = list(itertools.pairwise(tokens))
    first, *_, last = lens(model, recording, final_classes=True)[0].argmax(dim=1)
    rates = coding_rate(torch.stack([tokens[0], tokens[-1]]), EPSILON, normalize=True)
    return {
        "update": fmean(((after - before).norm() / before.norm()).item() for before, after in pairs),
        "rate": (rates[1] - rates[0]).item(),
        "changed": (first != last).double().mean().item(),
    }


def weight_figures(model: DepictForSemanticSegmentation) -> dict[str, Any]:
    """Return `step_sizes`, the mean of each layer, none of a black box, and `largest_probability`."""
    white = model.config.decoder_type in SUBSPACE_DECODERS
    return {
        "step_sizes": step_sizes(model).mean(dim=1).tolist() if white else [],
        "largest_probability": largest_probability(model),
    }


def largest_probability(model: DepictForSemanticSegmentation) -> float:
    """Return the most that the softmax can give a class: where its cosine is high and all others are equal.

    The LayerNorm over K classes brings such cosines K / sqrt(K - 1) apart, times its weight, here the mean of it.
    """
    weight = cast(nn.LayerNorm, layered_decoder(model).mask_norm).weight.detach().double()
    count = len(weight)
    return 1 / (1 + (count - 1) * math.exp(-weight.mean().item() * count / math.sqrt(count - 1)))


def _run_changed(grid: Grid, decoder: str, change: str, seed: int, data: DatasetTokens) -> None:
    path = grid.folder / FOLDER / f"{decoder}_{change}_seed{seed}.json"
    if path.is_file():
        return
    recipe = grid.recipe(decoder, chosen_rate(grid.plan, grid.folder, decoder), seed, data.class_names)
    model, losses = train(recipe, data.pool, grid.plan, CHANGES[change][1])
    part = MovingPart(model, grid.plan.moving_blocks).eval()
    scores = evaluate_part(part, data.validation).scores(data.class_names)
    found: dict[str, Any] = {
        "validation": scores,
        **weight_figures(model),
        "losses": [round(loss, 5) for loss in losses],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, path, indent=1)
    print(f"{grid.name} {path.stem}: mIoU validation {100 * scores['mean_iou']:.2f}")


def chosen_rate(plan: Plan, folder: Path, decoder: str) -> float:
    """Return the rate that a decoder's trials chose.

    Raises:
        OSError: If a trial is missing.
    """
    paths = {rate: folder / "runs" / f"{decoder}_trial_{rate:g}.json" for rate in plan.learning_rates[decoder]}
    return best_rate({rate: _read(path)["validation"]["mean_iou"] for rate, path in paths.items()})


def build_exploration(plan: Plan, output: Path) -> dict:
    """Gather what `explore` found, as far as it is there, with the planned runs beside it.

    Returns:
        By data set and decoder: `class_name`, the class in which the decoder is furthest behind the linear layer on the
        test split, on average over the seeds; `models`, by seed the figures of `image_figures` with step sizes, largest
        probability, `mean_iou` and `class_iou` of the test split; and `changed`, by change and seed `mean_iou` and
        `class_iou` of the validation split, with "as planned" among them.
    """
    found: dict[str, dict] = {}
    for name in plan.datasets:
        folder = output / name
        for decoder in filter(LAYERED_DECODERS.__contains__, plan.learning_rates):
            models = {seed: folder / FOLDER / f"{decoder}_seed{seed}.json" for seed in plan.seeds}
            if not all(path.is_file() for path in models.values()):
                continue
            runs = {seed: _read(folder / "runs" / f"{decoder}_seed{seed}.json") for seed in plan.seeds}
            weakest = weakest_class(plan, folder, runs)
            changed = {"as planned": {str(seed): _scores(run["validation"], weakest) for seed, run in runs.items()}}
            for change in changes_of(decoder):
                paths = {seed: folder / FOLDER / f"{decoder}_{change}_seed{seed}.json" for seed in plan.seeds}
                if all(path.is_file() for path in paths.values()):
                    changed[change] = {
                        str(seed): _scores(_read(path)["validation"], weakest) for seed, path in paths.items()
                    }
            found.setdefault(name, {})[decoder] = {
                "class_name": weakest,
                "models": {
                    str(seed): _read(path) | _scores(runs[seed]["test"], weakest) for seed, path in models.items()
                },
                "changed": changed,
            }
    return found


def weakest_class(plan: Plan, folder: Path, runs: Mapping[int, dict]) -> str:
    """Name the class whose mean test IoU lies furthest below that of the linear layer."""
    linear = [_read(folder / "runs" / f"linear_seed{seed}.json")["test"]["per_class_iou"] for seed in plan.seeds]
    own = [run["test"]["per_class_iou"] for run in runs.values()]
    return min(own[0], key=lambda name: fmean(each[name] for each in own) - fmean(each[name] for each in linear))


def render_exploration(found: Mapping[str, Mapping]) -> str:
    """Lay out what `build_exploration` gathered, as Markdown; shares in percent."""
    lines = [
        "# Why it came out so: exploratory",
        "",
        "Not planned: looked at after the [verdicts](README.md), to be tested by whoever plans the next comparison. "
        "Made from `exploration.json` by `python -m training.claims PLAN OUTPUT ... --explore sa`.",
        "",
        "Of every trained model: the mean step size of each layer; the largest probability that its logits can give a "
        "class at all; what a layer adds to the patch tokens, relative to their length; what all layers add to the "
        "coding rate of the tokens, in nats; the share of patches whose class they change; test mIoU, and test IoU of "
        "the class in which the decoder is furthest behind the linear layer. The middle window of as many test images "
        "as the plan has for noise.",
        "",
    ]
    for dataset, decoders in found.items():
        for decoder, each in decoders.items():
            lines += [f"## {dataset}, {decoder}", "", *_models_table(each), ""]
            if len(each["changed"]) > 1:
                lines += [
                    "Trained anew from another start: mIoU and IoU of "
                    f"{each['class_name']} on the validation split, by seed.",
                    "",
                    *_changed_table(each["changed"]),
                    "",
                ]
    return "\n".join(lines)


def _models_table(each: Mapping) -> list[str]:
    titles = ["seed", "step sizes", "largest probability", "update", "coding rate", "changed", "mIoU"]
    rows = [
        [
            seed,
            ", ".join(f"{step:+.2f}" for step in figures["step_sizes"]) or "-",
            f"{100 * figures['largest_probability']:.1f}",
            f"{100 * figures['update']:.1f}",
            f"{figures['rate']:+.1f}",
            f"{100 * figures['changed']:.1f}",
            f"{100 * figures['mean_iou']:.2f}",
            f"{100 * figures['class_iou']:.2f}",
        ]
        for seed, figures in each["models"].items()
    ]
    return pipe_table([*titles, each["class_name"]], rows, numeric_from=2)


def _changed_table(changed: Mapping[str, Mapping]) -> list[str]:
    rows = []
    for change, by_seed in changed.items():
        name = change if change not in CHANGES else f"{change}: {CHANGES[change][0]}"
        scores = [f"{100 * each['mean_iou']:.2f}, {100 * each['class_iou']:.2f}" for each in by_seed.values()]
        rows.append([name, *scores, f"{100 * fmean(each['mean_iou'] for each in by_seed.values()):.2f}"])
    seeds = next(iter(changed.values()))
    return pipe_table(["start", *(f"seed {seed}" for seed in seeds), "mean mIoU"], rows, numeric_from=1)


def _scores(scores: Mapping, name: str) -> dict[str, float]:
    return {"mean_iou": scores["mean_iou"], "class_iou": scores["per_class_iou"][name]}


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
