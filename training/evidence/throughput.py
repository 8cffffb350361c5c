"""How many images a second the training loader alone delivers, without a model."""

import time

from torch.utils.data import DataLoader

from ..data import SegmentationDataset, StreamingDataset, TrainingDataset, get_split, label_encoding
from ..recipe import Recipe
from ..recipe_data import build_augmentation, count_training_images

MEASURED_SECONDS = 30.0


def build_loader(recipe: Recipe, splits) -> DataLoader:
    """Build the training loader of a single process.

    Raises:
        ValueError: If the recipe trains on cached features, or the data do not suit it.
    """
    if recipe.data.cache_features:
        raise ValueError("The recipe trains on cached features; pass cache_features=false to time reading images.")
    encoding = label_encoding(splits, recipe.data.class_names, recipe.data.reduce_labels)
    batch_size = recipe.images_per_pass(num_processes=1)
    split = get_split(splits, recipe.data.train_split)
    if recipe.data.streaming:
        images = recipe.steps_per_epoch(count_training_images(recipe, splits)) * recipe.optimization.batch_size
        stream = StreamingDataset(
            split,
            encoding,
            build_augmentation(recipe),
            recipe.optimization.seed,
            images,
            batch_size,
            image_column=recipe.data.image_column,
            label_column=recipe.data.label_column,
            shuffle_buffer=recipe.data.shuffle_buffer,
            skip_unreadable=recipe.data.skip_unreadable,
        )
        return stream.loader(recipe.hardware.num_workers)
    samples = SegmentationDataset(
        split,
        len(recipe.data.class_names),
        image_column=recipe.data.image_column,
        label_column=recipe.data.label_column,
        encoding=encoding,
    )
    dataset = TrainingDataset(samples, build_augmentation(recipe), recipe.optimization.seed)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=recipe.hardware.num_workers, drop_last=True)


def measure(loader: DataLoader, seconds: float = MEASURED_SECONDS) -> tuple[int, float]:
    """Count images, and the seconds that they took, in passes over the loader, but for the first batch of each pass.

    Args:
        seconds: No batch is begun after so many.
    """
    images, elapsed = 0, 0.0
    while elapsed < seconds:
        start = None
        for batch in loader:
            now = time.perf_counter()
            if start is None:
                start, before = now, elapsed
                continue
            images += len(batch["labels"])
            elapsed = before + now - start
            if elapsed >= seconds:
                break
        if start is None or not images:
            raise ValueError("Got a training split of fewer than two batches, which is too little to time.")
    return images, elapsed
