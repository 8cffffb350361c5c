"""Images that cannot be read while training goes on: told to the process that trains in its own words, not as a stack.

What a worker of a `DataLoader` raises arrives as a text with the worker's stack; so a failure travels as an item.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Dataset, IterableDataset

from depict_hf.photo_files import shown_lines

# What reading data raises: files, folders and networks; damaged or unsuitable contents.
READING_ERRORS = (OSError, ValueError)
# What `datasets.load_dataset` raises of a damaged folder.
LOADING_ERRORS = (
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    yaml.YAMLError,
    DatasetGenerationError,
)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Have errors of reading data, in which names of files stand, say nothing that a terminal would obey."""
    try:
        yield
    except READING_ERRORS as error:
        if not all(line.isprintable() for line in str(error).split("\n")):
            error.args = tuple(shown_lines(each) if isinstance(each, str) else each for each in error.args)
        raise


@dataclass(frozen=True)
class Failure:
    """Why an item is not there, in words."""

    reason: str


class Reported(Dataset):
    """The items of a dataset, or a `Failure` where one cannot be read."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except READING_ERRORS as error:
            return Failure(str(error))


class ReportedStream(IterableDataset):
    """The items of a stream, and in the end a `Failure` where it cannot be read further."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except READING_ERRORS as error:
            yield Failure(str(error))


class Collate:
    """Makes a batch of items; of ones with a failure, a batch that `check_batch` refuses.

    Args:
        collate: Makes batches where nothing failed.
    """

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Any:
        failed = next((each for each in items if isinstance(each, Failure)), None)
        return self.collate(list(items)) if failed is None else {"failure": failed.reason}


def check_batch(batch: Any) -> Any:
    """Return a batch that a `Collate` made.

    Raises:
        ValueError: If some of it could not be read; the message says which and why.
    """
    if isinstance(batch, dict) and "failure" in batch:
        raise ValueError(batch["failure"])
    return batch
