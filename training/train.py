"""Train a recipe: `python -m training.train RECIPE DATASET OUTPUT [--backbone NAME] [--resume] [field=value ...]`."""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from depict_hf import DepictForSemanticSegmentation
from depict_hf.hub import claim, push
from depict_hf.loading import load_model
from depict_hf.photo_files import shown_lines
from depict_hf.writing import whole_folder

from .data import (
    DecoderOnFeatures,
    EvaluationDataset,
    FeatureDataset,
    SegmentationDataset,
    StreamingDataset,
    TrainingDataset,
    count_pixels,
    load_dataset_splits,
    print_once,
)
from .evaluation import Execution, end_processes, environment, evaluate, render_table, write_card, write_json
from .optimization import (
    RecipeLoss,
    SegmentationTrainer,
    balanced_weights,
    check_output,
    check_same_run,
    check_sharding,
    discard_unfinished,
    find_checkpoint,
    warn_once,
    write_run_record,
)
from .recipe import Recipe, resolve_precision
from .recipe_data import (
    build_augmentation,
    build_image_processor,
    build_samples,
    build_stream,
    check_data,
    count_training_images,
    describe_data,
)
from .recipe_model import build_model, check_start, freeze_for, load_backbone
from .recipes import get_recipe
from .stopping import command_line, run_stoppable

# Its name in older releases of transformers.
_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)

__all__ = [
    "build_augmentation",
    "build_image_processor",
    "build_loss",
    "build_model",
    "build_samples",
    "build_stream",
    "build_trainer",
    "check_data",
    "check_launch",
    "check_start",
    "count_training_images",
    "describe_data",
    "freeze_for",
    "load_backbone",
    "main",
    "save_trained",
    "set_exactness",
    "trackers",
    "training_arguments",
    "upload",
    "write_run_record",
]


def build_trainer(
    recipe: Recipe, splits: Mapping[str, datasets.Dataset], output: Path
) -> tuple[SegmentationTrainer, DepictForSemanticSegmentation]:
    """Build everything that training needs, with checkpoints, logs and cached features in `output`.

    Returns:
        The trainer and the whole model, of which the trainer has the decoder alone where features are cached.

    Raises:
        ValueError: If the data do not suit the recipe, or the batch cannot be divided among the processes.
    """
    recipe = resolve_precision(recipe)
    set_exactness(recipe.hardware.tf32)
    set_seed(recipe.optimization.seed)
    image_processor = build_image_processor(recipe)
    model = build_model(recipe)
    training_samples: SegmentationDataset | None = None
    if recipe.data.streaming:
        num_images = count_training_images(recipe, splits)
    else:
        training_samples = build_samples(recipe, splits, recipe.data.train_split)
        num_images = len(training_samples)
    validation_samples = build_samples(recipe, splits, recipe.data.validation_split)
    arguments = training_arguments(recipe, output, num_images)
    training: FeatureDataset | StreamingDataset | TrainingDataset
    validation: FeatureDataset | EvaluationDataset
    if training_samples is None:
        training = build_stream(recipe, splits, num_images, arguments)
        validation = EvaluationDataset(validation_samples, image_processor)
    elif recipe.data.cache_features:
        model.to(arguments.device)  # where features are computed
        encoding = (image_processor, output / "features")
        autocast = recipe.hardware.precision == "bf16"
        with arguments.main_process_first():  # it alone computes them
            training = FeatureDataset(
                model, training_samples, *encoding, recipe.data.crop_size, recipe.optimization.seed, autocast
            )
            validation = FeatureDataset(model, validation_samples, *encoding, autocast=autocast)
    else:
        training = TrainingDataset(training_samples, build_augmentation(recipe), recipe.optimization.seed)
        validation = EvaluationDataset(validation_samples, image_processor)
    trainer = SegmentationTrainer(
        recipe,
        build_loss(recipe, training_samples),
        model=DecoderOnFeatures(model) if recipe.data.cache_features else model,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation,
        processing_class=image_processor,
    )
    return trainer, model


def set_exactness(tf32: bool) -> None:
    """Say, for this process, whether products and convolutions in float32 may be rounded to TF32.

    PyTorch by itself rounds convolutions and does not round matrix products.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def check_launch(recipe: Recipe) -> dict[str, Any]:
    """Refuse, before anything is read, what cannot work with the processes that were started.

    Returns:
        What the result depends on besides recipe and data: `processes`, the number of processes.

    Raises:
        OSError: If the trained model is to be uploaded, and the Hub does not let it, or holds another model.
        ValueError: If the batch cannot be divided, or the model is to be shared (FSDP) in a way that does not work.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.images_per_pass(processes)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        check_sharding(recipe, int(os.environ.get("FSDP_VERSION", "1")))
    if recipe.hardware.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        claim(recipe.hardware.push_to_hub)
    return {"processes": processes}


def upload(folder: Path, repository: str) -> str:
    """Upload a trained model with its records, card and curves, as `depict push` does.

    Returns:
        The address of the commit.

    Raises:
        OSError: If the Hub does not let it, or holds another model by then.
        ValueError: If the card claims what no record says, or the model does not load back.
    """
    return push(folder, repository)


def build_loss(recipe: Recipe, samples: SegmentationDataset | None) -> RecipeLoss | None:
    """Build the recipe's loss, or return None where the model's own is meant.

    Args:
        recipe: Says how classes and pixels count.
        samples: Training samples, whose label maps are counted where classes are to be balanced; None of a stream,
            with which a recipe does not balance classes.
    """
    weights = None
    if recipe.optimization.class_weights is not None:
        weights = torch.tensor(recipe.optimization.class_weights)
    elif recipe.optimization.class_balance:
        assert samples is not None  # or the recipe would have been refused
        weights = balanced_weights(count_pixels(samples), recipe.optimization.class_balance)
    if weights is None and not recipe.optimization.focal_gamma and not recipe.optimization.dice_weight:
        return None
    return RecipeLoss(weights, recipe.optimization.focal_gamma, recipe.optimization.dice_weight)


def training_arguments(recipe: Recipe, output: Path, num_images: int) -> TrainingArguments:
    """Translate the recipe for `Trainer`; optimiser, rates and schedule are `SegmentationTrainer`'s own.

    Args:
        recipe: What is translated.
        output: Folder for checkpoints and logs.
        num_images: Images of the training split.

    Raises:
        ValueError: If one process sees several GPUs, or the batch cannot be divided among the processes.
    """
    steps = recipe.steps_per_epoch(num_images) * recipe.evaluation.evaluate_every_epochs
    save_steps = steps if recipe.evaluation.keep_best else recipe.hardware.save_every_steps or steps
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=recipe.optimization.epochs,
        gradient_accumulation_steps=recipe.optimization.accumulation_steps,
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.hardware.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        learning_rate=recipe.optimization.learning_rate,
        max_grad_norm=recipe.optimization.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=recipe.hardware.precision == "bf16",
        fp16=recipe.hardware.precision == "fp16",
        seed=recipe.optimization.seed,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=save_steps,
        logging_steps=10,
        logging_nan_inf_filter=False,  # looks at every pass; `SegmentationTrainer.check_loss` at every step
        metric_for_best_model="mean_iou",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=bool(recipe.evaluation.early_stopping),
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # backbones have some, such as DINOv2's mask token
        label_names=["labels"],
        **{_CHECKPOINTING: recipe.hardware.gradient_checkpointing},
        torch_compile=recipe.hardware.compile,
        report_to=trackers(recipe),
        disable_tqdm=not sys.stderr.isatty(),
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"Got {arguments.n_gpu} GPUs in one process, needed one process for each; start training by "
            "`accelerate launch -m training.train ...`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    arguments.per_device_train_batch_size = recipe.images_per_pass(arguments.world_size)
    return arguments


def trackers(recipe: Recipe) -> list[str]:
    """Name the recipe's trackers; TensorBoard is left out, with a line that says so, where it is not installed."""
    names = [] if recipe.evaluation.report_to == "none" else recipe.evaluation.report_to.split(",")
    if "tensorboard" in names and not is_tensorboard_available():
        print_once(
            "TensorBoard is not installed, so curves are only printed; `pip install tensorboard` has them drawn."
        )
        names.remove("tensorboard")
    return names or ["none"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and save.

    Returns:
        0 if all went well, 1 if the run could not start or go on, 130 or 143 if SIGINT or SIGTERM ended it.
    """
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("recipe", help="a function of training.recipes")
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("output", type=Path, help="folder for checkpoints, records and the trained model")
    parser.add_argument("--backbone", help="path or Hub name of the encoder; the recipe's own if omitted")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT, if any")
    earlier.add_argument("--overwrite", action="store_true", help="replace the run in OUTPUT, its checkpoints included")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="go once through everything that a row of the paper needs, in minutes; see training.rehearse",
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the recipe")
    argv = sys.argv[1:] if argv is None else argv
    if "--rehearse" in argv:
        from .rehearse import rehearse_one  # which runs this command

        return rehearse_one(argv)
    arguments = parser.parse_intermixed_args(argv)
    # Lines reach a log file as they are printed, not when a buffer is full.
    cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    command = command_line(parser.prog, argv, "--resume")
    launcher = "the launcher and " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    return run_stoppable(lambda: _run(arguments), parser.prog, f"go on with: {launcher}{command}")


def _run(arguments: argparse.Namespace) -> int:
    try:
        _train(arguments)
    except (FloatingPointError, ImportError, OSError, SafetensorError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    end_processes()  # here, where the trainer is out of use
    return 0


def _train(arguments: argparse.Namespace) -> None:
    """Do what the arguments say.

    Raises:
        FloatingPointError: If loss or weights are not finite.
        ImportError: If something that is asked for is not installed.
        OSError, SafetensorError: If something cannot be read or written.
        ValueError: If recipe or data cannot be trained on.
    """
    started_in = environment()
    recipe = get_recipe(arguments.recipe).override(arguments.overrides)
    if arguments.backbone is not None:
        recipe = recipe.replace(backbone=arguments.backbone)
    asked, recipe = recipe.hardware.precision, resolve_precision(recipe)
    if asked != recipe.hardware.precision:
        print_once(f"precision={asked} is {recipe.hardware.precision} here")
    circumstances = check_launch(recipe)
    check_output(arguments.output, arguments.resume or arguments.overwrite)
    checkpoint = None if arguments.overwrite else find_checkpoint(arguments.output, arguments.resume)
    known = None if checkpoint is None else arguments.output / "recipe.json"
    if known is not None:
        if not known.is_file():
            warn_once(f"There is no {known}, so that nobody knows whether the run began with the same recipe.")
        check_same_run(recipe, known, circumstances)
    splits = load_dataset_splits(arguments.dataset, recipe.data.streaming)
    check_data(recipe, splits)
    circumstances["data"] = describe_data(recipe, splits)
    if known is not None:
        check_same_run(recipe, known, circumstances)
    test = build_samples(recipe, splits, recipe.data.test_split)
    trainer, model = build_trainer(recipe, splits, arguments.output)
    if trainer.is_world_process_zero():
        record = {"recipe": dataclasses.asdict(recipe), "dataset": arguments.dataset} | circumstances
        record["left_out"] = [name for samples in splits.opened.values() for name in samples.left_out]
        write_run_record(record, started_in, checkpoint, arguments.output / "recipe.json")
        discard_unfinished(arguments.output, checkpoint, all_of_them=arguments.overwrite)
    trainer.train(resume_from_checkpoint=checkpoint)
    save_trained(recipe, trainer, model, arguments.output)
    trainer.accelerator.wait_for_everyone()
    # What is evaluated is what was saved; a model that the processes share could not be anyway.
    model, image_processor = load_model(str(arguments.output), trainer.args.device)
    execution = Execution(num_workers=recipe.hardware.num_workers, state=PartialState())
    record = evaluate(model, image_processor, test, execution=execution)
    if trainer.is_world_process_zero():
        record |= {"model": str(arguments.output), "dataset": arguments.dataset, "split": recipe.data.test_split}
        record["environment"] = started_in
        write_json(record, arguments.output / "evaluation.json")
        if arguments.overwrite or not (arguments.output / "README.md").exists():  # a card of the user's own stays
            write_card(arguments.output)
        print(render_table(record))
        if recipe.hardware.push_to_hub is not None:
            print(f"uploaded: {upload(arguments.output, recipe.hardware.push_to_hub)}")


def save_trained(
    recipe: Recipe, trainer: SegmentationTrainer, model: DepictForSemanticSegmentation, output: Path
) -> None:
    """Write the trained model and its image processor, with the final protocol, once for all processes."""
    weights = trainer.finish()
    if not trainer.is_world_process_zero():
        return
    discard_unfinished(output)
    if weights is not None:
        model = DepictForSemanticSegmentation(model.config)
        model.load_state_dict(weights)
    final = recipe.evaluation
    model.config.window_stride = final.final_window_stride or final.window_stride
    size = final.final_size or recipe.data.size
    bound = {"longest_edge": int(final.final_long_side_factor * size)} if final.final_long_side_factor else {}
    trainer.processing_class.size = {"shortest_edge": size, **bound}
    with whole_folder(output) as unfinished:
        model.eval().save_pretrained(unfinished)
        trainer.processing_class.save_pretrained(unfinished)


if __name__ == "__main__":
    sys.exit(main())
