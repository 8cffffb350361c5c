"""A training split that is read on the way, from the Hub or from files, instead of being stored first.

The order of images depends on the seed, the epoch, the number of processes and the number of workers. Each process
reads its own part: whole files where they divide evenly among the processes, else every n-th image. A run that is
resumed in the middle of an epoch reads that epoch's images again from its beginning, without training on them.
"""

import sys
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate.data_loader import DataLoaderShard
from datasets.distributed import split_dataset_by_node
from torch.utils.data import default_collate

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.photo_files import shown_lines

from ..stopping import survive
from .augmentation import TrainingAugmentation
from .failures import Collate, ReportedStream
from .loading import find_columns
from .reading import LabelEncoding, UnreadableImageError, name_of
from .samples import read_sample, sample_generator, undecoded

CHECKED_IMAGES = 64


class StreamingDataset(torch.utils.data.IterableDataset):
    """Augmented crops of this process's part of a stream, as those of `TrainingDataset`, each with its `name`.

    Every epoch has the same number of images in all processes, and in all workers of each: where a part is shorter, it
    begins again, and where it is longer, the epoch ends before it does. Parts are equal where the number of files
    divides evenly and files are equal.

    Args:
        stream: The stream of the training split, not shuffled.
        encoding: Meaning of the ids in its label maps.
        augmentation: Random transforms.
        seed: Seed of order and transforms.
        images_per_epoch: Images of this process, in whole batches.
        batch_size: Images of this process.
        image_column, label_column: Found by their usual names if None.
        shuffle_buffer: Images among which the next one is chosen.
        process_index, num_processes: Which part of the stream is read.
        skip_unreadable: Whether images that cannot be decoded are left out, and printed, instead of raised.

    Raises:
        ValueError: If its columns are not known, or neither given nor found.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        encoding: LabelEncoding,
        augmentation: TrainingAugmentation,
        seed: int,
        images_per_epoch: int,
        batch_size: int,
        image_column: str | None = None,
        label_column: str | None = None,
        shuffle_buffer: int = 1000,
        process_index: int = 0,
        num_processes: int = 1,
        skip_unreadable: bool = False,
    ):
        self.columns = stream_columns(stream, image_column, label_column)
        stream = undecoded(stream, *self.columns).shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.stream = split_dataset_by_node(stream, rank=process_index, world_size=num_processes)
        shares_files = stream.num_shards % num_processes == 0
        self.num_files = stream.num_shards // num_processes if shares_files else stream.num_shards
        self.encoding = encoding
        self.augmentation = augmentation
        self.seed = seed
        self.images_per_epoch = images_per_epoch
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.skip_unreadable = skip_unreadable
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch, in the process that starts the workers."""
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def __len__(self) -> int:
        return self.images_per_epoch

    def loader(self, num_workers: int, pin_memory: bool = False) -> DataLoaderShard:
        """Load batches of this process alone, which `accelerate` needs not divide any more.

        Args:
            num_workers: No more are started than there are files for this process.
        """
        return DataLoaderShard(
            ReportedStream(self),
            batch_size=self.batch_size,
            num_workers=min(num_workers, self.num_files),
            pin_memory=pin_memory,
            collate_fn=Collate(default_collate),
            worker_init_fn=survive,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batches = self.images_per_epoch // self.batch_size
        images = (batches // count + (index < batches % count)) * self.batch_size
        part, parts = self.process_index * count + index, self.num_processes * count
        for place, sample in zip(range(images), self._samples(), strict=False):
            generator = sample_generator(self.seed, self.epoch, place * parts + part)
            yield self.augmentation(sample["image"], sample["labels"], generator) | {"name": sample["name"]}

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Yield all samples of this worker's part, again and again."""
        while True:
            empty = True
            for row in self._rows():
                encoded_image, encoded_labels = (row[column] for column in self.columns)
                try:
                    sample = read_sample(encoded_image, encoded_labels, self.encoding, "An image of the stream")
                except UnreadableImageError as error:
                    if not self.skip_unreadable:
                        raise
                    print(f"left out: {shown_lines(error)}", file=sys.stderr, flush=True)
                    continue
                empty = False
                yield sample | {"name": name_of(encoded_image) or "an image of the stream without a name"}
            if empty:
                raise ValueError("A part of the stream has no image that can be read; use fewer processes or workers.")

    def _rows(self) -> Iterator[dict]:
        """Yield the rows of this worker's part.

        Raises:
            ValueError: If the stream breaks off, whatever that is to the library that reads it.
        """
        try:
            yield from self.stream
        except Exception as error:
            raise ValueError(
                f"The stream of training images broke off ({type(error).__name__}: {error}); see whether its files "
                "are whole and can be reached, and go on with --resume, or leave streaming out."
            ) from error


def stream_columns(
    stream: datasets.IterableDataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Do as `find_columns` does, of a stream.

    Raises:
        ValueError: If its columns are not known before it is read, or neither given nor found.
    """
    if stream.features is None:
        raise ValueError("Got a stream whose columns are not known before it is read; leave streaming out.")
    return find_columns(stream.features, image_column, label_column)


def check_stream(
    stream: datasets.IterableDataset,
    encoding: LabelEncoding,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_unreadable: bool = False,
) -> None:
    """Read the first `CHECKED_IMAGES` of a stream; the others are checked while they are trained on.

    Raises:
        ValueError: If images or label maps are at fault, the message names all of those, or they have but one class,
            as masks of 0 and 255 seem to have.
    """
    columns = stream_columns(stream, image_column, label_column)
    faults, seen = [], set()
    for place, row in enumerate(undecoded(stream, *columns).take(CHECKED_IMAGES)):
        try:
            sample = read_sample(row[columns[0]], row[columns[1]], encoding, f"Image {place} of the stream")
            seen |= set(sample["labels"].unique().tolist())
        except ValueError as error:
            if not (skip_unreadable and isinstance(error, UnreadableImageError)):
                faults.append(str(error))
    if not faults and seen == {0, IGNORE_LABEL}:
        raise ValueError(
            f"The first {CHECKED_IMAGES} label maps of the stream hold class 0 and ignored pixels only, as masks of 0 "
            "and 255 do; without streaming, and with two class names, their 255 is taken for the second class."
        )
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise ValueError(
            f"{len(faults)} of the first {CHECKED_IMAGES} images of the stream are at fault:{lines}\nThose that cannot "
            "be read are left out with skip_unreadable=true."
        )


def count_images(stream: datasets.IterableDataset, split: str, given: int | None) -> int:
    """Return the number of images of a streamed split: as given, else as the dataset says.

    Raises:
        ValueError: If neither says.
    """
    known = (stream.info.splits or {}).get(split)
    number = (0 if known is None else known.num_examples) if given is None else given
    if given is None and not number:
        raise ValueError(
            f"The number of images in the streamed split {split} is not known; pass num_train_images=NUMBER."
        )
    return number


def store(stream: datasets.IterableDataset, split: str) -> datasets.Dataset:
    """Store a whole split of a stream in the cache of `datasets`: evaluation needs each image, and each once."""
    features = stream.features
    return datasets.Dataset.from_generator(
        _encoded_rows, features=features, gen_kwargs={"stream": stream}, split=datasets.NamedSplit(split)
    )


def _encoded_rows(stream: datasets.IterableDataset) -> Iterator[dict]:
    for column, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    yield from stream
