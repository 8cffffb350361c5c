"""The data that a recipe trains and evaluates on: samples of its splits, how they are prepared, what they are."""

from collections.abc import Mapping
from typing import Any

import datasets
from transformers import TrainingArguments

from depict_hf import DepictImageProcessor

from .data import (
    CHECKED_IMAGES,
    SegmentationDataset,
    StreamingDataset,
    TrainingAugmentation,
    check_stream,
    count_images,
    describe_classes,
    digest,
    get_split,
    label_encoding,
    open_samples,
    print_once,
    stream_columns,
    undecoded,
)
from .recipe import Recipe


def build_image_processor(recipe: Recipe) -> DepictImageProcessor:
    """Return the processor that prepares photographs as the recipe evaluates them."""
    return DepictImageProcessor(
        size={"shortest_edge": recipe.data.size},
        image_mean=list(recipe.data.image_mean),
        image_std=list(recipe.data.image_std),
        do_reduce_labels=recipe.data.reduce_labels,
    )


def build_samples(recipe: Recipe, splits: Mapping[str, datasets.Dataset], name: str) -> SegmentationDataset:
    """Return photographs and label maps of one split, at their own size, after reading all of them once.

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


def build_augmentation(recipe: Recipe) -> TrainingAugmentation:
    """Return the recipe's random transforms."""
    return TrainingAugmentation(
        size=recipe.data.size,
        crop_size=recipe.data.crop_size,
        long_side_factor=recipe.data.long_side_factor,
        scale_range=recipe.data.scale_range,
        photometric=recipe.data.photometric,
        degradation=recipe.data.degradation,
    )


def build_stream(
    recipe: Recipe, splits: Mapping[str, datasets.Dataset], num_images: int, arguments: TrainingArguments
) -> StreamingDataset:
    """Return this process's part of the streamed training split."""
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


def count_training_images(recipe: Recipe, splits: Mapping[str, datasets.Dataset]) -> int:
    """Return the number of images in the streamed training split.

    Raises:
        ValueError: If neither the recipe nor the dataset says how many there are.
    """
    return count_images(
        get_split(splits, recipe.data.train_split), recipe.data.train_split, recipe.data.num_train_images
    )


def check_data(recipe: Recipe, splits: Mapping[str, datasets.Dataset]) -> None:
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


def describe_data(recipe: Recipe, splits: Mapping[str, datasets.Dataset]) -> dict[str, Any]:
    """Describe what is trained and validated on, so that a later run can tell whether it is the same.

    Returns:
        For each split, `images`, their number, and `digest` of their files; in a stream the digest is that of the
        first `CHECKED_IMAGES` alone.
    """
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
