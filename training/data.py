"""Datasets of photographs and label maps: where their columns are, how they are read, trained on and evaluated."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from depict_hf import DepictImageProcessor

from .augmentation import IGNORE_INDEX, TrainingAugmentation

IMAGE_COLUMNS = ("image", "img", "pixel_values", "photo")
LABEL_COLUMNS = (
    "label",
    "labels",
    "annotation",
    "annotations",
    "mask",
    "segmentation",
    "segmentation_mask",
    "semantic_segmentation",
)


def load_dataset_splits(name_or_path: str | Path) -> datasets.DatasetDict:
    """Load every split of a dataset on the Hub, or of a local folder laid out like one.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a dataset.
    """
    return datasets.load_dataset(str(name_or_path))


def get_split(splits: datasets.DatasetDict, name: str) -> datasets.Dataset:
    """One split by name.

    Raises:
        ValueError: If the dataset has no such split.
    """
    if name not in splits:
        raise ValueError(f"Got split {name!r}, needed one of those in the dataset: {', '.join(splits)}.")
    return splits[name]


def find_columns(
    features: datasets.Features, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Names of the photograph's and the label map's column: as given, else found by their usual names.

    Args:
        features: Of the dataset; only columns of images are candidates.
        image_column: Its name where it is known.
        label_column: Its name where it is known.

    Raises:
        ValueError: If a given column does not exist or holds no images, or none or several have a usual name.
    """
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = _find_column("image", image_column, IMAGE_COLUMNS, candidates, list(features))
    label_column = _find_column("label", label_column, LABEL_COLUMNS, candidates, list(features))
    return image_column, label_column


def _find_column(
    kind: str, given: str | None, usual_names: Sequence[str], candidates: list[str], columns: list[str]
) -> str:
    existing = f"columns: {', '.join(columns)}; columns of images: {', '.join(candidates) or 'none'}"
    if given is not None:
        if given not in candidates:
            raise ValueError(f"Got {kind}_column={given!r}, which is no column of images of the dataset ({existing}).")
        return given
    found = [name for name in candidates if name in usual_names]
    if len(found) != 1:
        raise ValueError(
            f"Found {len(found)} columns that could be the {kind} ({', '.join(found) or 'none'}), needed one; pass "
            f"{kind}_column=NAME ({existing})."
        )
    return found[0]


class SegmentationDataset(torch.utils.data.Dataset):
    """Photographs and label maps at their own size, read one by one.

    Args:
        dataset: One split.
        num_labels: Number of classes; a label map may hold ids below it and 255.
        image_column: Of the photographs; found by its usual name if omitted.
        label_column: Of the label maps; found likewise.
        reduce_labels: Whether label 0 becomes 255 and the others go down by one.

    Items are `image`, uint8 `(3, height, width)`, and `labels`, int64 `(height, width)`, decoded by the rules of
    `DepictImageProcessor` (palettes count by index).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        num_labels: int,
        image_column: str | None = None,
        label_column: str | None = None,
        reduce_labels: bool = False,
    ):
        self.dataset = dataset
        self.num_labels = num_labels
        self.image_column, self.label_column = find_columns(dataset.features, image_column, label_column)
        self.decoder = DepictImageProcessor(
            do_resize=False, do_rescale=False, do_normalize=False, do_reduce_labels=reduce_labels
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one pair.

        Raises:
            ValueError: If the image cannot be decoded, or its label map holds an id that is no class; both name it.
        """
        where = f"Image {index} of split {self.dataset.split}"
        try:
            row = self.dataset[index]
            decoded = self.decoder(row[self.image_column], segmentation_maps=row[self.label_column])
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{where} cannot be read; repair it or leave it out: {error}") from error
        image, labels = decoded["pixel_values"][0], decoded["labels"][0]
        wrong = labels[(labels != IGNORE_INDEX) & (labels >= self.num_labels)]
        if wrong.numel():
            raise ValueError(
                f"{where} has label ids {wrong.unique()[:10].tolist()}, needed 0 to {self.num_labels - 1} or "
                f"{IGNORE_INDEX} (ignored); check the class names and reduce_labels."
            )
        return {"image": image, "labels": labels}


def count_pixels(samples: SegmentationDataset) -> Tensor:
    """Labelled pixels of each class over all label maps, `(num_labels,)` int64."""
    counts = torch.zeros(samples.num_labels, dtype=torch.long)
    for index in range(len(samples)):
        labels = samples[index]["labels"]
        counts += torch.bincount(labels[labels != IGNORE_INDEX], minlength=samples.num_labels)
    return counts


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Randomness of one sample in one epoch, the same in whichever process and order samples are read."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


class TrainingDataset(torch.utils.data.Dataset):
    """Augmented crops: `pixel_values` `(3, crop, crop)` float32, normalised, and `labels` `(crop, crop)` int64.

    What is drawn for a sample depends on seed, epoch and index alone, not on workers or on the order of reading.
    """

    def __init__(self, samples: SegmentationDataset, augmentation: TrainingAugmentation, seed: int):
        self.samples = samples
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch, in the process that starts the workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        generator = sample_generator(self.seed, self.epoch, index)
        pixel_values, labels = self.augmentation(sample["image"], sample["labels"], generator)
        return {"pixel_values": pixel_values, "labels": labels}


class EvaluationDataset(torch.utils.data.Dataset):
    """Whole images as the processor prepares them, `pixel_values`, with `labels` at the photograph's own size."""

    def __init__(self, samples: SegmentationDataset, image_processor: DepictImageProcessor):
        self.samples = samples
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return {"pixel_values": self.image_processor(sample["image"])["pixel_values"][0], "labels": sample["labels"]}
