"""A row of the paper gone through once, in minutes: every step of its training, on a few images."""

import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.conversion import convert_checkpoint, published_protocol
from depict_hf.loading import load_model
from depict_hf.to_published import published_dataset, write_published

from .. import train
from ..data import load_dataset_splits
from ..evaluation import (
    Execution,
    Protocol,
    environment,
    evaluate,
    peak_extra_bytes,
    render_table,
    start_processes,
    write_card,
    write_json,
)
from ..recipe import Recipe
from ..recipe_data import build_samples
from .costs import cost_of, describe_cost, step_bytes, training_cost
from .paper import PUBLISHED_SCALES
from .rehearsal_setup import (
    STEPS,
    STEPS_UNTIL_RESUMED,
    check_disk,
    dataset_of,
    least_minutes,
    make_data,
    overrides_of,
    reduce_recipe,
    take_data,
    write_random_encoder,
)

RANDOM_WEIGHTS = (
    "The encoder started from random numbers of the published shape, not from pretrained weights: figures mean "
    "nothing, only that every step works."
)


@dataclass
class Rehearsal:
    """What is gone through, and what has been found.

    Args:
        recipe: As it is trained in earnest.
        work: Folder for everything that is written.
        dataset: Data of the user's own, a few images of which are used; made ones if None.
        backbone: The encoder's weights, as for `read_weights`; random ones if None.
        say: Called with every line for people.
    """

    recipe: Recipe
    work: Path
    dataset: str | None = None
    backbone: str | None = None
    say: Callable[[str], None] = print
    stages: list[dict] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict]:
        """Time a step and say its result, which the caller puts under "result"; what it prints goes to the log.

        Raises:
            RuntimeError: If it failed; the message has the end of the log.
        """
        found: dict[str, Any] = {"stage": name}
        log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        start = time.perf_counter()
        try:
            with redirect_stdout(log), redirect_stderr(log):
                yield found
        except Exception as error:
            tail = _text(log)[-2000:]
            raise RuntimeError(f"The rehearsal failed at {name}: {error}\n{tail}") from error
        finally:
            with (self.work / "rehearsal.log").open("a", encoding="utf-8") as file:
                file.write(f"== {name}\n{_text(log)}")
        found["seconds"] = round(time.perf_counter() - start, 1)
        self.stages.append(found)
        self.say(f"{name:<22}{found['seconds']:>8.1f} s  {found['result']}")


def _text(log: io.TextIOWrapper) -> str:
    return log.buffer.getvalue().decode("utf-8", errors="replace")  # type: ignore[attr-defined]


def rehearse(rehearsal: Rehearsal) -> dict[str, Any]:
    """Read, train ten steps, resume, evaluate by the published protocol, write a card, convert there and back.

    Returns:
        A record ready for JSON: `recipe`; `started_from`; `cost` of the whole recipe as `cost_of` says; `reduced`, in
        sentences; `rehearsed`, what was computed instead: `encoder`, `batch_size`, `crop_size`, `precision`,
        `flops_per_step`, `estimated_bytes` of a step and the measured `peak_bytes` of training with its evaluation
        above what the process held before (None where it cannot be had); `stages` with seconds and results; `seconds`;
        `environment`.

    Raises:
        OSError: If data cannot be had, or the disk is too small.
        RuntimeError: If a stage failed.
        ValueError: If the recipe is no row of the paper, or the data do not suit it.
    """
    recipe, work = rehearsal.recipe, rehearsal.work
    started_in = environment()
    dataset = dataset_of(recipe)
    device = start_processes().device
    cost = cost_of(recipe)
    rehearsal.say("\n".join(describe_cost(recipe.name, cost)))
    small, reduced = reduce_recipe(recipe, psutil.virtual_memory().available)
    check_disk(small, work)

    with rehearsal.stage("reading") as found:
        if rehearsal.dataset is None:
            source = str(work / "data")
            small, found["result"], more = make_data(small, dataset, work / "data")
        else:
            source = rehearsal.dataset
            small, found["result"], more = take_data(small, source)
        reduced += more
    if rehearsal.backbone is None:
        with rehearsal.stage("encoder") as found:
            small = small.replace(backbone=str(write_random_encoder(small.model.encoder or "", work / "encoder")))
            found["result"] = f"random weights of the shape of {small.model.encoder}, by timm's names"
    else:
        small = small.replace(backbone=rehearsal.backbone)
    rehearsed: dict[str, Any] = {
        "encoder": small.model.encoder,
        "batch_size": small.optimization.batch_size,
        "crop_size": small.data.crop_size,
        "precision": small.hardware.precision,
        "flops_per_step": training_cost(small).flops_per_step,
        "estimated_bytes": step_bytes(small, small.optimization.batch_size),
    }
    rehearsal.say("\n".join(f"reduced: {each}" for each in reduced))
    rehearsal.say(
        f"rehearsed: {rehearsed['flops_per_step'] / 1e12:.3g} TFLOP and {rehearsed['estimated_bytes'] / 2**30:.1f} GiB "
        f"a step; all of it takes at least {least_minutes(small, dataset, PUBLISHED_SCALES):.1f} minutes here"
    )

    run = work / "run"
    command = [recipe.name, source, str(run), *overrides_of(small)]
    with rehearsal.stage("training") as found:
        rehearsed["peak_bytes"] = peak_extra_bytes(lambda: _train(command), device)
        found["result"] = f"{STEPS} steps, last loss {_last_loss(run / f'checkpoint-{STEPS}'):.3f}, evaluated"
        if rehearsed["peak_bytes"] is not None:
            found["result"] += f"; peak memory {rehearsed['peak_bytes'] / 2**30:.1f} GiB"
    with rehearsal.stage("resuming") as found:
        found["result"] = _resume(run, command)
    with rehearsal.stage("single-scale") as found:
        found["result"] = _check_protocol(small, run)
    with rehearsal.stage("multi-scale") as found:
        model, image_processor = load_model(str(run), device)
        found["result"] = _evaluate_scales(small, source, run, model, image_processor)
    note = None if rehearsal.backbone else RANDOM_WEIGHTS
    with rehearsal.stage("card") as found:
        found["result"] = _check_card(run, note)
    with rehearsal.stage("published format") as found:
        found["result"] = _convert(model.cpu(), image_processor, work / "published")
    return {
        "recipe": recipe.name,
        "started_from": note or rehearsal.backbone,
        "cost": cost,
        "reduced": reduced,
        "rehearsed": rehearsed,
        "stages": rehearsal.stages,
        "seconds": round(sum(each["seconds"] for each in rehearsal.stages), 1),
        "environment": started_in | {"memory_bytes": psutil.virtual_memory().total},
    }


def _train(command: list[str]) -> None:
    if train.main(command):
        raise RuntimeError(f"training.train {command[0]} ended with an error")


def _last_loss(checkpoint: Path) -> float:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [each["loss"] for each in state["log_history"] if "loss" in each]
    if state["global_step"] != STEPS or not losses or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"Found {state['global_step']} steps with losses {losses}, needed {STEPS} with finite ones.")
    return losses[-1]


def _resume(run: Path, command: list[str]) -> str:
    """Go on from the checkpoint in the middle as if the run had been killed there, and compare the weights."""
    (run / "model.safetensors").rename(run.parent / "whole.safetensors")
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    _train([*command, "--resume"])
    sessions = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["sessions"]
    middle = f"checkpoint-{STEPS_UNTIL_RESUMED}"
    if sessions[-1]["resumed_from"] != middle:
        raise RuntimeError(f"The run went on from {sessions[-1]['resumed_from']}, needed {middle}.")
    different, moved = distances(run.parent / "whole.safetensors", run / "model.safetensors", run / middle)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (run.parent / "whole.safetensors").unlink()
    if not moved:
        raise RuntimeError(f"No weight moved after {middle}, needed training to go on.")
    # Sums in another order, as GPUs make them, are no reason for another result.
    if different > 1e-2 * moved:
        raise RuntimeError(
            f"The resumed run ended {different:.3g} away from the uninterrupted one, after weights had moved by "
            f"{moved:.3g}; needed the same weights."
        )
    how = "the same weights, bit for bit" if not different else f"weights {different / moved:.1e} of the way apart"
    return f"from {middle}, ends with {how}"


def distances(whole: Path, resumed: Path, middle: Path) -> tuple[float, float]:
    """Return how far resumed weights are from the uninterrupted ones, and these from the checkpoint's; Euclidean."""
    different = moved = 0.0
    with (
        safe_open(whole, "pt") as first,
        safe_open(resumed, "pt") as second,
        safe_open(middle / "model.safetensors", "pt") as third,
    ):
        names = set(first.keys())
        if names != set(second.keys()):
            raise RuntimeError("The resumed run has other weights than the uninterrupted one.")
        for name in names:
            different += _square(first.get_tensor(name) - second.get_tensor(name))
            moved += _square(first.get_tensor(name) - third.get_tensor(name))
    return math.sqrt(different), math.sqrt(moved)


def _square(difference: Tensor) -> float:
    return float(difference.double().square().sum())


def _check_protocol(recipe: Recipe, run: Path) -> str:
    """Check that the trained model was evaluated by the protocol that the recipe ends with."""
    record = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    final = recipe.evaluation
    size = final.final_size or recipe.data.size
    needed = {
        "size": {"shortest_edge": size, "longest_edge": int((final.final_long_side_factor or 0) * size)},
        "window_size": final.window_size,
        "window_stride": final.final_window_stride,
        "scales": [1.0],
        "flip": False,
    }
    found = {name: record["protocol"][name] for name in needed}
    if found != needed:
        raise RuntimeError(f"Evaluated by {found}, needed the published protocol {needed}.")
    return (
        f"single-scale on {record['num_images']} images: shorter side {size}, windows of {final.window_size} at stride "
        f"{final.final_window_stride}"
    )


def _evaluate_scales(
    recipe: Recipe,
    dataset: str,
    run: Path,
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
) -> str:
    samples = build_samples(recipe, load_dataset_splits(dataset), recipe.data.test_split)
    protocol = Protocol(PUBLISHED_SCALES, flip=True, max_images=1)
    record = evaluate(model, image_processor, samples, protocol, Execution(1))
    record |= {"model": str(run), "dataset": dataset, "split": recipe.data.test_split}
    write_json(record, run / "evaluation_multi_scale.json")
    return f"{len(PUBLISHED_SCALES)} scales with mirror images on one image"


def _check_card(run: Path, note: str | None) -> str:
    text = write_card(run, note).read_text(encoding="utf-8")
    record = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    if render_table(record) not in text or (note is not None and note not in text):
        raise RuntimeError(f"{run / 'README.md'} does not show its record.")
    return f"README.md with {len(record['per_class_iou'])} classes and both protocols"


def _convert(model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, folder: Path) -> str:
    """Write the published files and read them again; the same weights and protocol must come back."""
    path = write_published(model, image_processor, folder)
    config, size = model.config, {name: side for name, side in dict(image_processor.size).items() if side is not None}
    again, processor_again = convert_checkpoint(path, im_size=size["shortest_edge"])
    state = again.state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    if changed:
        raise RuntimeError(f"Weights came back with other values, among them {', '.join(changed[:3])}.")
    megabytes = path.stat().st_size / 1e6
    shutil.rmtree(folder)
    result = f"checkpoint.pth of {megabytes:.0f} MB and variant.yml, read again with the same weights, bit for bit"
    # Somebody's own classes, sizes and windows have no place in the published files.
    dataset, crop_size = published_dataset(model), config.window_size or 0
    own = size | {"window_size": crop_size, "window_stride": config.window_stride}
    published = {} if dataset is None else published_protocol(dataset, crop_size, size["shortest_edge"])
    if own != published.pop("size", {}) | published:
        return result
    if dict(processor_again.size) != dict(image_processor.size) or again.config.id2label != config.id2label:
        raise RuntimeError(f"The protocol came back as {processor_again.size}, needed {image_processor.size}.")
    return result + ", and with the same protocol"
