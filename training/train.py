"""Train a recipe: `python -m training.train RECIPE DATASET OUTPUT [--backbone NAME] [--resume] [field=value ...]`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import create_repo, upload_folder
from transformers import AutoConfig, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.configuration_depict import published_decoder_fields
from depict_hf.conversion import load_encoder, read_weights
from depict_hf.loading import load_model

from .data import (
    CHECKED_IMAGES,
    DecoderOnFeatures,
    EvaluationDataset,
    FeatureDataset,
    SegmentationDataset,
    StreamingDataset,
    TrainingAugmentation,
    TrainingDataset,
    check_stream,
    count_images,
    count_pixels,
    describe_classes,
    digest,
    get_split,
    label_encoding,
    load_dataset_splits,
    open_samples,
    print_once,
    stream_columns,
    undecoded,
)
from .evaluation import Execution, environment, evaluate, render_table, write_json
from .optimization import (
    RecipeLoss,
    SegmentationTrainer,
    add_adapters,
    balanced_weights,
    check_same_run,
    check_sharding,
    discard_unfinished,
    find_checkpoint,
    freeze_encoder_blocks,
)
from .recipe import Recipe, resolve_precision
from .recipes import get_recipe


def build_model(recipe: Recipe) -> DepictForSemanticSegmentation:
    """The recipe's model, float32: the pretrained encoder, frozen if so asked, and a new decoder.

    Raises:
        ImportError: If adapters are asked for and `peft` is not installed.
        OSError: If weights cannot be loaded.
        ValueError: If weights are missing, or the model to start from has another decoder.
    """
    if recipe.model.start_from is not None:
        check_start(recipe)
    fields = {
        "decoder_type": recipe.model.decoder_type,
        "id2label": dict(enumerate(recipe.data.class_names)),
        "label2id": {name: index for index, name in enumerate(recipe.data.class_names)},
        "window_size": recipe.evaluation.window_size,
        "window_stride": recipe.evaluation.window_stride,
    }
    if recipe.model.start_from is not None:
        model, loading = DepictForSemanticSegmentation.from_pretrained(
            recipe.model.start_from, dtype=torch.float32, output_loading_info=True, **fields
        )
        if loading["missing_keys"] or loading["unexpected_keys"]:
            missing, unexpected = (sorted(loading[kind])[:5] for kind in ("missing_keys", "unexpected_keys"))
            raise ValueError(
                f"{recipe.model.start_from} is no whole model: weights {missing} are missing, {unexpected} unexpected; "
                "start from a folder that training or `depict convert` wrote."
            )
    elif recipe.model.encoder is None:
        backbone_config = AutoConfig.from_pretrained(recipe.model.backbone)
        fields |= published_decoder_fields(recipe.model.decoder_type, backbone_config.hidden_size)
        model = DepictForSemanticSegmentation(DepictConfig(backbone_config=backbone_config, **fields))
        load_backbone(model, recipe.model.backbone)
    else:
        fields |= {"image_size": recipe.data.crop_size, "drop_path_rate": recipe.model.drop_path_rate}
        model = DepictForSemanticSegmentation(DepictConfig.from_preset(recipe.model.encoder, **fields))
        load_encoder(model, read_weights(recipe.model.backbone))
    model.encoder.requires_grad_(not recipe.model.freeze_encoder)
    freeze_encoder_blocks(model, recipe.model.frozen_encoder_blocks)
    # Used in pretraining only; FSDP does not resume where a trainable weight never had a gradient.
    for name, parameter in model.encoder.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)
    if recipe.model.lora_rank:
        add_adapters(model, recipe.model.lora_rank, recipe.model.lora_alpha, recipe.model.frozen_encoder_blocks)
    return model


def check_start(recipe: Recipe) -> None:
    """Refuse to start from a model whose decoder is not the recipe's.

    Raises:
        OSError: If there is no such model.
        ValueError: If decoder type or number of classes differ.
    """
    config = DepictConfig.from_pretrained(recipe.model.start_from)
    found, needed = (config.decoder_type, config.num_labels), (recipe.model.decoder_type, len(recipe.data.class_names))
    if found != needed:
        raise ValueError(
            f"Got start_from={recipe.model.start_from} with decoder {found[0]!r} and {found[1]} classes, needed "
            f"{needed[0]!r} and {needed[1]} classes, as the recipe has; choose another recipe or class_names, or "
            "start from a backbone."
        )


def load_backbone(model: DepictForSemanticSegmentation, name_or_path: str) -> None:
    """Load pretrained weights, float32, into the model's backbone, in place.

    Raises:
        OSError: If they cannot be loaded.
        ValueError: If some are missing.
    """
    # `AutoBackbone.from_pretrained` takes a local folder for the name of a timm model; the class itself does not.
    backbone_class = type(model.encoder.backbone)
    model.encoder.backbone, loading = backbone_class.from_pretrained(
        name_or_path, config=model.encoder.backbone.config, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(
            f"{name_or_path} lacks weights of {backbone_class.__name__}, among them "
            f"{sorted(loading['missing_keys'])[:5]}; choose a checkpoint of that architecture."
        )


def build_image_processor(recipe: Recipe) -> DepictImageProcessor:
    """The processor that prepares photographs as the recipe evaluates them."""
    return DepictImageProcessor(
        size={"shortest_edge": recipe.data.size},
        image_mean=list(recipe.data.image_mean),
        image_std=list(recipe.data.image_std),
        do_reduce_labels=recipe.data.reduce_labels,
    )


def build_samples(recipe: Recipe, splits, name: str) -> SegmentationDataset:
    """Photographs and label maps of one split, at their own size, after all have been read once.

    Raises:
        ValueError: If the split does not exist, its columns are neither given nor found, or images are at fault.
    """
    return open_samples(
        splits,
        name,
        recipe.data.class_names,
        recipe.data.image_column,
        recipe.data.label_column,
        recipe.data.reduce_labels,
        recipe.data.skip_unreadable,
        recipe.hardware.num_workers,
    )


def build_trainer(recipe: Recipe, splits, output: Path) -> tuple[SegmentationTrainer, DepictForSemanticSegmentation]:
    """Everything that training needs, with checkpoints, logs and cached features in `output`, and the whole model.

    Raises:
        ValueError: If the data do not suit the recipe, or the batch cannot be divided among the processes.
    """
    recipe = resolve_precision(recipe)
    set_exactness(recipe.hardware.tf32)
    set_seed(recipe.optimization.seed)
    image_processor = build_image_processor(recipe)
    model = build_model(recipe)
    training_samples = None if recipe.data.streaming else build_samples(recipe, splits, recipe.data.train_split)
    validation_samples = build_samples(recipe, splits, recipe.data.validation_split)
    num_images = count_training_images(recipe, splits) if recipe.data.streaming else len(training_samples)
    arguments = training_arguments(recipe, output, num_images)
    if recipe.data.cache_features:
        model.to(arguments.device)  # where features are computed
        encoding = (image_processor, output / "features")
        autocast = recipe.hardware.precision == "bf16"
        with arguments.main_process_first():  # it alone computes them
            training = FeatureDataset(
                model, training_samples, *encoding, recipe.data.crop_size, recipe.optimization.seed, autocast
            )
            validation = FeatureDataset(model, validation_samples, *encoding, autocast=autocast)
    else:
        if recipe.data.streaming:
            training = build_stream(recipe, splits, num_images, arguments)
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


def check_data(recipe: Recipe, splits) -> None:
    """Read what is trained and evaluated on, a stream's first images only, before anything else is done.

    Raises:
        ValueError: If splits, columns, class names, images or label maps are at fault; the message has all faults.
    """
    print_once(describe_classes(splits, recipe.data.class_names))
    faults = []
    for name in dict.fromkeys((recipe.data.train_split, recipe.data.validation_split, recipe.data.test_split)):
        try:
            if recipe.data.streaming and name == recipe.data.train_split:
                encoding = label_encoding(splits, recipe.data.class_names, recipe.data.reduce_labels)
                columns = (recipe.data.image_column, recipe.data.label_column)
                check_stream(get_split(splits, name), encoding, *columns, recipe.data.skip_unreadable)
            else:
                build_samples(recipe, splits, name)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def check_launch(recipe: Recipe) -> dict[str, Any]:
    """Refuse, before anything is read, what cannot work with the processes that were started.

    Returns:
        What the result depends on besides recipe and data: `processes`, their number.

    Raises:
        OSError: If the trained model is to be uploaded, and the Hub does not let it.
        ValueError: If the batch cannot be divided, or the model is to be shared (FSDP) in a way that does not work.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.images_per_pass(processes)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        check_sharding(recipe, int(os.environ.get("FSDP_VERSION", "1")))
    if recipe.hardware.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        try:
            create_repo(recipe.hardware.push_to_hub, exist_ok=True)
        except Exception as error:  # what is raised without a network depends on the version of huggingface_hub
            raise OSError(
                f"Got push_to_hub={recipe.hardware.push_to_hub}, which the Hub did not let be created: {error}; log in "
                "with `hf auth login`, or leave it out and upload the trained model yourself."
            ) from error
    return {"processes": processes}


def describe_data(recipe: Recipe, splits) -> dict[str, Any]:
    """What is trained and validated on: images and digest of each split, of a stream those of its first images."""
    described = {}
    for name in dict.fromkeys((recipe.data.train_split, recipe.data.validation_split)):
        if recipe.data.streaming and name == recipe.data.train_split:
            stream = get_split(splits, name)
            columns = stream_columns(stream, recipe.data.image_column, recipe.data.label_column)
            rows = undecoded(stream, *columns).take(CHECKED_IMAGES)
            described[name] = {"images": count_training_images(recipe, splits), "digest": digest(rows)}
        else:
            samples = build_samples(recipe, splits, name)
            described[name] = {"images": len(samples), "digest": digest(samples.encoded)}
    return described


def upload(folder: Path, repository: str) -> str:
    """Upload a trained model with its records, card and curves, without checkpoints and features, in one commit.

    `push_to_hub` of transformers is not used: it writes a card of its own over the folder's.

    Returns:
        Address of the commit.
    """
    left_out = ["checkpoint-*/**", "features/**", "samples/**", "deleted/**"]
    return str(upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=left_out))


def count_training_images(recipe: Recipe, splits) -> int:
    """Images of the streamed training split.

    Raises:
        ValueError: If neither the recipe nor the dataset says.
    """
    return count_images(
        get_split(splits, recipe.data.train_split), recipe.data.train_split, recipe.data.num_train_images
    )


def build_stream(recipe: Recipe, splits, num_images: int, arguments: TrainingArguments) -> StreamingDataset:
    """This process's part of the streamed training split."""
    images_per_step = recipe.optimization.batch_size // arguments.world_size
    return StreamingDataset(
        get_split(splits, recipe.data.train_split),
        label_encoding(splits, recipe.data.class_names, recipe.data.reduce_labels),
        build_augmentation(recipe),
        recipe.optimization.seed,
        images_per_epoch=recipe.steps_per_epoch(num_images) * images_per_step,
        batch_size=arguments.per_device_train_batch_size,
        image_column=recipe.data.image_column,
        label_column=recipe.data.label_column,
        shuffle_buffer=recipe.data.shuffle_buffer,
        process_index=arguments.process_index,
        num_processes=arguments.world_size,
        skip_unreadable=recipe.data.skip_unreadable,
    )


def build_augmentation(recipe: Recipe) -> TrainingAugmentation:
    """The recipe's random transforms."""
    return TrainingAugmentation(
        size=recipe.data.size,
        crop_size=recipe.data.crop_size,
        long_side_factor=recipe.data.long_side_factor,
        scale_range=recipe.data.scale_range,
        photometric=recipe.data.photometric,
    )


def build_loss(recipe: Recipe, samples: SegmentationDataset) -> RecipeLoss | None:
    """The recipe's loss where it is not the model's own; label maps are counted where classes are to be balanced."""
    weights = None
    if recipe.optimization.class_weights is not None:
        weights = torch.tensor(recipe.optimization.class_weights)
    elif recipe.optimization.class_balance:
        weights = balanced_weights(count_pixels(samples), recipe.optimization.class_balance)
    if weights is None and not recipe.optimization.focal_gamma and not recipe.optimization.dice_weight:
        return None
    return RecipeLoss(weights, recipe.optimization.focal_gamma, recipe.optimization.dice_weight)


def training_arguments(recipe: Recipe, output: Path, num_images: int) -> TrainingArguments:
    """`Trainer`'s view of the recipe; optimiser, rates and schedule are `SegmentationTrainer`'s own."""
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
        activation_checkpointing=recipe.hardware.gradient_checkpointing,
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
    """The recipe's trackers; TensorBoard is left out, with a line that says so, where it is not installed."""
    names = [] if recipe.evaluation.report_to == "none" else recipe.evaluation.report_to.split(",")
    if "tensorboard" in names and not is_tensorboard_available():
        print_once(
            "TensorBoard is not installed, so curves are only printed; `pip install tensorboard` has them drawn."
        )
        names.remove("tensorboard")
    return names or ["none"]


def write_run_record(record: dict, session: dict, checkpoint: str | None, path: Path) -> None:
    """Write `record` and the sessions of the run, a new one for each start, to `path`."""
    known = checkpoint is not None and path.is_file()
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if known else []
    session = {"resumed_from": Path(checkpoint).name if checkpoint else None, "environment": session}
    write_json(record | {"sessions": [*sessions, session]}, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("recipe", help="a function of training.recipes")
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("output", type=Path, help="folder for checkpoints, records and the trained model")
    parser.add_argument("--backbone", help="path or Hub name of the encoder; the recipe's own if omitted")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT, if any")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    # Lines reach a log file as they are printed, not when a buffer is full.
    sys.stdout.reconfigure(line_buffering=True)
    started_in = environment()
    try:
        recipe = get_recipe(arguments.recipe).override(arguments.overrides)
        if arguments.backbone is not None:
            recipe = recipe.replace(backbone=arguments.backbone)
        asked, recipe = recipe.hardware.precision, resolve_precision(recipe)
        if asked != recipe.hardware.precision:
            print_once(f"precision={asked} is {recipe.hardware.precision} here")
        circumstances = check_launch(recipe)
        checkpoint = find_checkpoint(arguments.output, arguments.resume)
        known = None if checkpoint is None else arguments.output / "recipe.json"
        if known is not None:
            check_same_run(recipe, known, circumstances)
        splits = load_dataset_splits(arguments.dataset, recipe.data.streaming)
        check_data(recipe, splits)
        circumstances["data"] = describe_data(recipe, splits)
        if known is not None:
            check_same_run(recipe, known, circumstances)
        test = build_samples(recipe, splits, recipe.data.test_split)
        trainer, model = build_trainer(recipe, splits, arguments.output)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if trainer.is_world_process_zero():
        record = {"recipe": dataclasses.asdict(recipe), "dataset": arguments.dataset} | circumstances
        record["left_out"] = [name for samples in splits.opened.values() for name in samples.left_out]
        write_run_record(record, started_in, checkpoint, arguments.output / "recipe.json")
        discard_unfinished(arguments.output)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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
        print(render_table(record))
        if recipe.hardware.push_to_hub is not None:
            print(f"uploaded: {upload(arguments.output, recipe.hardware.push_to_hub)}")
    # Processes that end with their connections open may crash.
    trainer.accelerator.wait_for_everyone()
    PartialState().destroy_process_group()
    return 0


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
    model.eval().save_pretrained(output)
    size = final.final_size or recipe.data.size
    bound = {"longest_edge": int(final.final_long_side_factor * size)} if final.final_long_side_factor else {}
    trainer.processing_class.size = {"shortest_edge": size, **bound}
    trainer.processing_class.save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
