"""A run of `training.own_classes` from its data to its report, in one session or several."""

import argparse
import dataclasses
import json
import math
import shutil
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from torch import Tensor
from transformers import set_seed
from transformers.utils import logging

from depict_hf import DepictForSemanticSegmentation
from depict_hf.loading import load_model
from depict_hf.writing import whole_folder

from .data import (
    DecoderOnFeatures,
    EvaluationDataset,
    FeatureDataset,
    SegmentationDataset,
    TrainingDataset,
    count_pixels,
    open_data,
)
from .evaluation import (
    Execution,
    Protocol,
    WorstImages,
    draw_curves,
    environment,
    evaluate,
    render_report,
    render_table,
    save_sheet,
    spread,
    start_processes,
    write_json,
    write_whole,
)
from .machine import autocast, data_facts, measure
from .optimization import Budget, Pace, PacedTrainer, ProgressLine, clock_time, discard_unfinished, find_checkpoint
from .planning import TEST_SHARE, Plan, base_recipe, check_overrides, make_plan, stage_recipes
from .recipe import resolve_precision
from .recipe_data import build_augmentation, build_image_processor, build_samples
from .recipe_model import freeze_for
from .run_folder import HISTORY, RUN, WORK, asked_of, check_data, describe_data, open_run, plan_of, read_history
from .starting import Start, start_from
from .stopping import Stopped
from .train import build_loss, set_exactness, training_arguments

LEAST_TEST_IMAGES = 8


@dataclass
class Session:
    """What all parts of a session share.

    Args:
        output: Folder of the run.
        budget: Its time.
        plan: Its stages.
        splits: The data, as `open_data` opened them.
        history: Events of all sessions so far.
    """

    output: Path
    budget: Budget
    plan: Plan
    splits: typing.Any
    history: list[dict]

    def record(self, stage: str, event: dict) -> None:
        """Note an event of `PacedTrainer`, also for a session that goes on from here."""
        event = {"stage": stage} | event
        self.history.append(event)
        with (self.output / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def train_own_classes(arguments: argparse.Namespace, started: float) -> None:
    """Read, measure, plan, train, evaluate, report.

    Args:
        arguments: Values of the options of `own_classes.add_arguments`.
        started: When the command began, by `time.monotonic`.

    Raises:
        FloatingPointError: If the loss is not finite.
        ImportError, OSError, ValueError: If something that was asked for cannot be had.
        Stopped: If a signal ends it while it trains.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    overrides = tuple(arguments.overrides)
    check_overrides(overrides)
    state = start_processes()
    if state.num_processes > 1:
        raise ValueError(
            f"Got {state.num_processes} processes, needed one; start this command without a launcher, or train a "
            "recipe on several with training.train."
        )
    asked = asked_of(arguments)
    saved = open_run(arguments.output, arguments.resume, asked)
    if saved and (arguments.output / "report.md").is_file():
        print(f"The run in {arguments.output} is finished; its report is {arguments.output / 'report.md'}.")
        return
    history = read_history(arguments.output) if saved else []
    seconds = math.inf if asked["minutes"] is None else 60 * asked["minutes"]
    budget = Budget(seconds, history[-1]["seconds"] if history else 0.0, started=started)

    fields = _fields_of_data(overrides)
    names = None if arguments.classes is None else tuple(name.strip() for name in arguments.classes.split(","))
    opened = open_data(arguments.data, names, **fields)
    print(opened)
    data = describe_data(opened)
    set_seed(0)  # after the data, which draw random numbers where they are read for the first time
    start = start_from(arguments.source, opened.class_names, arguments.decoder)
    start_lines = start.describe()
    print("\n".join(start_lines))

    if saved:
        check_data(saved, data, arguments.output)
        plan, start_lines, record = plan_of(saved, arguments.output), saved["start"], saved
    else:
        plan = _make_plan(asked, opened, start, budget, arguments.output, overrides)
        record = {"asked": asked, "data": data, "start": start_lines, "environment": environment()}
        write_json(record | {"plan": dataclasses.asdict(plan)}, arguments.output / RUN)
    _print_plan(plan)
    session = Session(arguments.output, budget, plan, opened.splits, history)
    model = start.model
    for index in range(len(plan.stages)):
        if index and not math.isinf(budget.seconds) and not _stage_folder(session, index).exists():
            start = dataclasses.replace(start, model=model, new=())
            session.plan = _look_again(
                session.plan, _make_plan(asked, opened, start, budget, arguments.output, overrides)
            )
            write_json(record | {"plan": dataclasses.asdict(session.plan)}, arguments.output / RUN)
        model = _run_stage(session, index, model)
    _finish(session, model, arguments, start_lines)


def _fields_of_data(overrides: Sequence[str]) -> dict:
    """Return overrides that say how data are read, as arguments of `open_data`."""
    names = ("image_column", "label_column", "reduce_labels", "skip_unreadable")
    given = dict(each.partition("=")[::2] for each in overrides)
    given = {name.rpartition(".")[2]: text for name, text in given.items()}
    fields = {name: given[name] for name in names if name in given}
    return {
        name: text.lower() == "true" if text.lower() in ("true", "false") else text for name, text in fields.items()
    }


def _make_plan(asked: dict, opened, start: Start, budget: Budget, output: Path, overrides: Sequence[str]) -> Plan:
    data = data_facts(opened)
    machine = measure(start.model, opened.samples["train"], data, start.image_mean, start.image_std, output, overrides)
    base = base_recipe(data, machine, start.image_mean, start.image_std, start.model.config.decoder_type)
    steps = asked["max_steps"]
    if asked["epochs"] is not None:
        recipe = next(each for each in stage_recipes(base, machine, overrides) if each)
        steps = asked["epochs"] * recipe.steps_per_epoch(data.train)
    decoder_is_new = any(name.startswith("decoder.") for name in start.new)
    return make_plan(data, machine, base, budget.seconds, budget.spent(), steps, decoder_is_new, overrides)


def _look_again(plan: Plan, again: Plan) -> Plan:
    """The plan with fine-tuning as the machine allows it by now; unchanged where it no longer does."""
    if [stage.name for stage in again.stages] != [plan.stages[-1].name]:
        return plan
    print("The machine measured again, before fine-tuning:")
    print("\n".join(f"  {reason}" for reason in again.reasons if reason not in plan.reasons))
    again = dataclasses.replace(again, stages=(*plan.stages[:-1], *again.stages))
    first = [reason for reason in plan.reasons if reason.startswith("First")]
    return dataclasses.replace(again, reasons=(*first, *again.reasons))


def _print_plan(plan: Plan) -> None:
    print("\n".join(("Plan:", *(f"  {reason}" for reason in plan.reasons))))


def _stage_folder(session: Session, index: int) -> Path:
    return session.output / WORK / f"{index + 1}-{session.plan.stages[index].name}"


def _run_stage(session: Session, index: int, model: DepictForSemanticSegmentation) -> DepictForSemanticSegmentation:
    """Train one stage, or load what it ended with; returns the model with its best weights."""
    stage = session.plan.stages[index]
    recipe, folder = resolve_precision(stage.recipe), _stage_folder(session, index)
    set_exactness(recipe.hardware.tf32)
    done = folder / "model"
    if (done / "config.json").is_file():
        print(f"Stage {stage.name}: done before.")
        return load_model(done)[0]
    processor = build_image_processor(recipe)
    model.config.window_size, model.config.window_stride = (
        recipe.evaluation.window_size,
        recipe.evaluation.window_stride,
    )
    train = spaced(build_samples(recipe, session.splits, recipe.data.train_split), stage.images)
    validation = build_samples(recipe, session.splits, recipe.data.validation_split)
    validation = spaced(validation, session.plan.validation_images)
    freeze_for(model, recipe)
    model.to(start_processes().device)
    cached = recipe.data.cache_features
    training: FeatureDataset | TrainingDataset
    evaluated: FeatureDataset | EvaluationDataset
    if cached:
        print(f"Stage {stage.name}: encoding {len(train)} + {len(validation)} photographs once ...")
        half = recipe.hardware.precision == "bf16"
        place = (processor, session.output / WORK / "features")
        training = FeatureDataset(model, train, *place, recipe.data.crop_size, recipe.optimization.seed, half)
        evaluated = FeatureDataset(model, validation, *place, autocast=half)
    else:
        training = TrainingDataset(train, build_augmentation(recipe), recipe.optimization.seed)
        evaluated = EvaluationDataset(validation, processor)
    budget, plan = session.budget, session.plan
    pace = Pace(budget, min(budget.spent(), stage.ends_at), stage.ends_at, stage.steps)
    if index + 1 == len(plan.stages) and not math.isinf(budget.seconds):
        pace.afterwards_seconds, pace.afterwards_at_most = plan.test_seconds, TEST_SHARE * budget.seconds
        pace.afterwards_images = len(build_samples(recipe, session.splits, recipe.data.test_split))
    line = ProgressLine(session.budget)
    session.record(stage.name, {"step": 0, "seconds": session.budget.spent()})

    def report(event: dict) -> None:
        session.record(stage.name, event)
        line.show(stage.name, event, pace.seconds_left(event["step"]))

    trainer = PacedTrainer(
        pace,
        report,
        recipe=recipe,
        loss=build_loss(recipe, train),
        model=DecoderOnFeatures(model) if cached else model,
        args=training_arguments(recipe, folder, len(train)),
        train_dataset=training,
        eval_dataset=evaluated,
        processing_class=processor,
    )
    checkpoint = find_checkpoint(folder, resume=True)
    discard_unfinished(folder, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Stopped:
        # So that a session that goes on knows what this one has spent.
        session.record(stage.name, {"step": trainer.state.global_step, "seconds": budget.spent()})
        raise
    line.end()
    trainer.finish()
    with whole_folder(done) as unfinished:
        model.eval().save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return model


def spaced(samples: SegmentationDataset, at_most: int | None) -> SegmentationDataset:
    """Keep at most so many samples, evenly spaced over the split; the very same object where these are all."""
    if at_most is None or at_most >= len(samples):
        return samples
    some = samples.select(spread(len(samples), at_most))
    some.pixels = samples.pixels  # for the weights of classes, which hold for all
    return some


def _finish(session: Session, model: DepictForSemanticSegmentation, arguments, start_lines: list[str]) -> None:
    """Save the model, evaluate it on the test split, and write pictures and report."""
    output, last = session.output, session.plan.stages[-1].recipe
    processor = build_image_processor(last)
    processor.size = {"shortest_edge": last.evaluation.final_size or last.data.size}
    model.config.window_stride = last.evaluation.final_window_stride or last.evaluation.window_stride
    train = build_samples(last, session.splits, last.data.train_split)
    model.config.training_scenes = f"{len(train)} photographs of {Path(arguments.data).resolve().name}"
    with whole_folder(output) as unfinished:
        model.eval().save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    test = build_samples(last, session.splits, last.data.test_split)
    images = _affordable_test_images(session, len(test))
    session.record("evaluation", {"step": 0, "seconds": session.budget.spent()})
    print(f"Evaluating {images} of {len(test)} images of split {last.data.test_split} ...")
    record, counts = _evaluate(session, test, images, output)
    record |= {"model": str(output), "dataset": arguments.data, "split": last.data.test_split}
    write_json(record, output / "evaluation.json")
    print(render_table(record))
    curves = draw_curves(session.history, output / "curves.png")
    text = render_report(
        record,
        count_pixels(train).tolist(),
        counts,
        session.history,
        start_lines,
        session.plan.reasons,
        [(stage.name, stage.recipe) for stage in session.plan.stages],
        {
            "data": arguments.data,
            "output": str(output),
            "spent_seconds": session.budget.spent(),
            "curves": curves,
            "chosen_by_test": test is build_samples(last, session.splits, last.data.validation_split),
        },
    )
    shutil.rmtree(output / WORK)
    write_whole(text, output / "report.md")
    print(f"{output} holds the model; {output / 'report.md'} says how good it is and how to go on.")
    print(f"{clock_time(session.budget.spent())} in all.")


def _affordable_test_images(session: Session, count: int) -> int:
    """Say how many test images can be evaluated in the time that is left, by the speed of the last evaluation."""
    speeds = [event["image_seconds"] for event in session.history if event.get("image_seconds")]
    left = session.budget.left()
    if math.isinf(left) or not speeds:
        return count
    return max(min(count, LEAST_TEST_IMAGES), min(count, int(0.95 * left / speeds[-1])))


def _evaluate(session: Session, test: SegmentationDataset, images: int, output: Path) -> tuple[dict, list[int]]:
    """Return the record of `evaluate` for what was saved, and pixels of each class; writes `worst.png`."""
    recipe = session.plan.stages[-1].recipe
    state = start_processes()
    model, processor = load_model(output, state.device)
    worst = WorstImages(8)
    pixels = torch.zeros(test.num_labels, dtype=torch.long)

    def count(index: int, image: Tensor, labels: Tensor, prediction: Tensor, confusion: Tensor) -> None:
        nonlocal pixels
        pixels += confusion[:-1].sum(dim=1).cpu()

    execution = Execution(num_workers=recipe.hardware.num_workers)
    with autocast(state.device, recipe.hardware.precision):
        record = evaluate(model, processor, test, Protocol(max_images=images), execution, [worst.add, count])
    if recipe.hardware.precision == "bf16":
        record["precision"] = "float32 weights, autocast to bfloat16"
    save_sheet(worst, test, model.config.id2label, state, output / "worst.png")
    return record, pixels.tolist()
