"""Photographs and label maps as samples: read one by one, trained on as crops, evaluated whole."""

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import torch
from torch import Tensor

from depict_hf import DepictImageProcessor
from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.photo_files import shown_lines

from .augmentation import TrainingAugmentation
from .loading import find_columns
from .reading import LabelEncoding, UnreadableImageError, name_of, read_pair

_DIGESTED_BYTES = 4096
# Pauses before an image that cannot be read is read again: all could be when they were checked, so that it is likely
# the network or the disk that fails.
RETRY_SECONDS = (0.5, 2.0)


class SegmentationDataset(torch.utils.data.Dataset):
    """Photographs and label maps at their own size, read one by one.

    Args:
        dataset: One split.
        num_labels: Number of classes.
        image_column: Column of the photographs; found by its usual name if omitted.
        label_column: Column of the label maps; found likewise.
        reduce_labels: Whether label 0 becomes 255 and the others go down by one.
        encoding: Meaning of the ids in label maps, instead of `reduce_labels`; by default they hold ids below
            `num_labels` and 255.
        split: Its name, for messages; the dataset's own if omitted.
        skip_unreadable: Whether `read_or_blank` leaves out an image that cannot be read any more.

    Items are `image`, uint8 `(3, height, width)`, and `labels`, int64 `(height, width)`, decoded by the rules of
    `DepictImageProcessor` (palettes count by index) and turned as EXIF orientations say.

    Attributes:
        pixels: Number of pixels of each class over all label maps, `(num_labels,)` int64, where they have been counted.
        left_out: Names of images of the split that are not among the samples.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        num_labels: int,
        image_column: str | None = None,
        label_column: str | None = None,
        reduce_labels: bool = False,
        encoding: LabelEncoding | None = None,
        split: str | None = None,
        skip_unreadable: bool = False,
    ):
        self.dataset = dataset
        self.num_labels = num_labels
        self.image_column, self.label_column = find_columns(dataset.features, image_column, label_column)
        self.encoding = LabelEncoding.counted(num_labels, reduce_labels) if encoding is None else encoding
        self.split = str(dataset.split) if split is None else split
        self.skip_unreadable = skip_unreadable
        self.pixels: Tensor | None = None
        self.left_out: tuple[str, ...] = ()
        self.encoded = undecoded(dataset, self.image_column, self.label_column)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Read one pair, if need be again after `RETRY_SECONDS`.

        Raises:
            UnreadableImageError: If the photograph or its label map cannot be decoded.
            ValueError: If the label map does not fit, or holds an id that is no class.
        """
        row = self.encoded[index]
        encoded = (row[self.image_column], row[self.label_column])
        where = f"Image {index} of split {self.split}"
        for seconds in RETRY_SECONDS:
            try:
                return read_sample(*encoded, self.encoding, where)
            except UnreadableImageError:
                time.sleep(seconds)
        return read_sample(*encoded, self.encoding, where)

    def read_or_blank(self, index: int) -> dict[str, Tensor]:
        """Read one pair, or return a single black pixel without a label where it cannot be read and is to be left out.

        Shapes are those of `__getitem__`.

        Without a label it counts neither in a loss nor in a metric. A line on stderr names it.

        Raises:
            UnreadableImageError: If it cannot be read, and is not to be left out.
            ValueError: As `__getitem__`.
        """
        try:
            return self[index]
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise
            print(f"left out: {shown_lines(error)}", file=sys.stderr, flush=True)
            ignored = torch.full((1, 1), IGNORE_LABEL)
            return {"image": torch.zeros((3, 1, 1), dtype=torch.uint8), "labels": ignored}

    def name(self, index: int) -> str:
        """Return the path or name of a photograph, or its place in the split where it has none."""
        return name_of(self.encoded[index][self.image_column]) or f"image {index} of split {self.split}"

    def select(self, indices: Iterable[int]) -> "SegmentationDataset":
        """Return some of the samples, in the order of the indices; their pixels are not counted."""
        return SegmentationDataset(
            self.dataset.select(list(indices)),
            self.num_labels,
            self.image_column,
            self.label_column,
            encoding=self.encoding,
            split=self.split,
            skip_unreadable=self.skip_unreadable,
        )

    def without(self, indices: Iterable[int]) -> "SegmentationDataset":
        """Return all samples but some; their names are noted in `left_out`."""
        dropped = set(indices)
        rest = self.select(index for index in range(len(self)) if index not in dropped)
        rest.left_out = (*self.left_out, *(self.name(index) for index in sorted(dropped)))
        return rest

    @property
    def fingerprint(self) -> str:
        """Changes with the data: with the dataset, the meaning of its ids, and files that it only names."""
        parts = [self.dataset._fingerprint]
        if self.encoding != LabelEncoding.counted(self.num_labels):
            parts.append(str(self.encoding.classes))
        images = (row[self.image_column] for row in self.encoded)
        first = next((each for each in images if each is not None), None)
        if first is not None and first["bytes"] is None:
            for row in self.encoded:
                for path in (each["path"] for each in row.values() if each is not None and each["path"] is not None):
                    status = os.stat(path) if os.path.isfile(path) else None
                    parts.append(f"{path} {status and (status.st_size, status.st_mtime_ns)}")
        return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def undecoded(dataset, image_column: str, label_column: str):
    """Return a dataset or stream of these two columns, whose items have `path` and `bytes` instead of images."""
    dataset = dataset.select_columns([image_column, label_column])
    for column in (image_column, label_column):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def digest(rows: Iterable[dict[str, dict | None]]) -> str:
    """Return a number for the contents of images and label maps, wherever they lie and whenever they were written.

    Args:
        rows: Rows of what `undecoded` returns.

    Returns:
        Sixteen hexadecimal digits of SHA-256 over the name, the size and the first 4096 bytes of each file, in order.
    """
    summary = hashlib.sha256()
    for row in rows:
        for encoded in row.values():
            path, data = (None, b"") if encoded is None else (encoded["path"], encoded["bytes"])
            if data is None and path is not None and os.path.isfile(path):
                with open(path, "rb") as file:
                    beginning, size = file.read(_DIGESTED_BYTES), os.fstat(file.fileno()).st_size
            else:
                beginning, size = (data or b"")[:_DIGESTED_BYTES], len(data or b"")
            summary.update(f"{os.path.basename(path or '')} {size} {len(beginning)}\n".encode())
            summary.update(beginning)
    return summary.hexdigest()[:16]


def read_sample(
    encoded_image: dict | None, encoded_labels: dict | None, encoding: LabelEncoding, where: str
) -> dict[str, Tensor]:
    """Decode an item of `SegmentationDataset` from its columns; errors begin with `where` and the image's name.

    Names and shapes are those of its `__getitem__`.

    Raises:
        UnreadableImageError: If the photograph or its label map cannot be decoded.
        ValueError: If the label map does not fit, or holds an id that is no class.
    """
    try:
        image, labels = read_pair(encoded_image, encoded_labels, encoding)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{where} cannot be read: {error}") from error
    except ValueError as error:
        name = name_of(encoded_image)
        raise ValueError(f"{where}{f' ({name})' if name else ''}: {error}") from error
    return {"image": image, "labels": labels}


def count_pixels(samples: SegmentationDataset) -> Tensor:
    """Count the labelled pixels of each class over all label maps, `(num_labels,)` int64."""
    if samples.pixels is not None:
        return samples.pixels
    counts = torch.zeros(samples.num_labels, dtype=torch.long)
    for index in range(len(samples)):
        labels = samples[index]["labels"]
        counts += torch.bincount(labels[labels != IGNORE_LABEL], minlength=samples.num_labels)
    return counts


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return the randomness of one sample in one epoch, the same in whichever process and order samples are read."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


class EpochSampler(torch.utils.data.Sampler):
    """Indices of samples in an order that depends on seed and epoch alone, not on processes or earlier epochs.

    Args:
        num_samples: Number of samples of the dataset.
        seed: Seed of the order.
        batch_size: Images of an optimiser step over all processes and passes. Only whole batches are taken in an epoch,
            so that how they are divided decides neither their number nor what is in each.
    """

    def __init__(self, num_samples: int, seed: int, batch_size: int = 1):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_taken = num_samples // batch_size * batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_taken

    def __iter__(self) -> Iterator[int]:
        # The index after the last sample: augmentation draws from those of the samples.
        generator = sample_generator(self.seed, self.epoch, self.num_samples)
        return iter(torch.randperm(self.num_samples, generator=generator)[: self.num_taken].tolist())

    def of_step(self, step: int) -> list[int]:
        """Return the indices in an optimiser step of the present epoch, over all processes and passes.

        Args:
            step: Number of the step, counted from 0 over all epochs.
        """
        first = step * self.batch_size % max(self.num_taken, 1)
        return list(self)[first : first + self.batch_size]


class EpochDataset(torch.utils.data.Dataset):
    """A dataset whose items depend on the epoch, also in workers that were started in an earlier one."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """What `set_epoch` was told last, in whichever process."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, while no worker is reading."""
        self._epoch.fill_(epoch)


class TrainingDataset(EpochDataset):
    """Augmented squares, bytes, as `TrainingAugmentation` returns them.

    What is drawn for a sample depends on seed, epoch and index alone, not on workers or on the order of reading.
    """

    def __init__(self, samples: SegmentationDataset, augmentation: TrainingAugmentation, seed: int):
        super().__init__()
        self.samples = samples
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples.read_or_blank(index)
        return self.augmentation(sample["image"], sample["labels"], sample_generator(self.seed, self.epoch, index))


class EvaluationDataset(torch.utils.data.Dataset):
    """Whole images as the processor prepares them, `pixel_values`, with `labels` at the photograph's own size."""

    def __init__(self, samples: SegmentationDataset, image_processor: DepictImageProcessor):
        self.samples = samples
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples.read_or_blank(index)
        return {"pixel_values": self.image_processor(sample["image"])["pixel_values"][0], "labels": sample["labels"]}
