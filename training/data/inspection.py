"""Every photograph and label map of a split is read once; what was found is kept in the cache of `datasets`."""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from depict_hf.writing import write_whole

from . import reading
from .reading import UnreadableImageError, content_hash, name_of, read_ids
from .samples import SegmentationDataset

_BATCH = 16


@dataclass(frozen=True)
class Inspection:
    """What reading all samples showed, whatever their ids mean.

    Args:
        unreadable: Place and message of each image that cannot be decoded, or whose label map cannot.
        wrong: The same for label maps that do not fit their photograph, or are no maps of ids.
        ids: Those in each label map, in increasing order; empty where it is at fault.
        pixels: Each id and how many pixels have it, over all label maps that are not at fault.
        hashes: Hash of each photograph's file, equal where files are; empty where there is none.
    """

    unreadable: list[tuple[int, str]]
    wrong: list[tuple[int, str]]
    ids: list[list[int]]
    pixels: list[tuple[int, int]]
    hashes: list[str]

    @property
    def all_ids(self) -> set[int]:
        """Ids in any label map."""
        return {index for index, _ in self.pixels}

    def meaningless(self, encoding: reading.LabelEncoding) -> list[tuple[int, list[int]]]:
        """Find the places of label maps with ids that mean nothing, and these ids."""
        wrong = set(encoding.meaningless(self.all_ids))
        found = ((place, sorted(wrong.intersection(ids))) for place, ids in enumerate(self.ids)) if wrong else ()
        return [(place, ids) for place, ids in found if ids]

    def pixels_by_class(self, encoding: reading.LabelEncoding, num_labels: int) -> tuple[list[int], int]:
        """Count the pixels of each class, and ignored ones; ids that mean nothing are in neither."""
        counts, ignored = [0] * num_labels, 0
        for index, count in self.pixels:
            if encoding.meaningless([index]):
                continue
            label = encoding.classes[index]
            if label == reading.IGNORE_LABEL:
                ignored += count
            else:
                counts[label] += count
        return counts, ignored


def inspect_once(samples: SegmentationDataset, num_workers: int = 0) -> Inspection:
    """Do as `inspect_samples` does, or return what it found earlier in the same data.

    It is read once for each state of the data, and once for all processes that share the cache of `datasets`.
    """
    depends_on = [samples.fingerprint, samples.image_column, samples.label_column, samples.split, PIL.__version__]
    code = b"".join(Path(each).read_bytes() for each in (__file__, reading.__file__))
    name = hashlib.sha256(json.dumps(depends_on).encode() + code).hexdigest()[:16]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "depict_checks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = _read_back(path, len(samples))
        # What could not be read may have been a network or disk that failed.
        if known is not None and not any(_Readings(samples).is_readable(index) for index, _ in known.unreadable):
            return known
        found = inspect_samples(samples, num_workers)
        write_whole(json.dumps(asdict(found)), path)
    return found


def _read_back(path: Path, count: int) -> Inspection | None:
    """Read what was found earlier; None where nothing was, or the file is damaged."""
    try:
        found = Inspection(**json.loads(path.read_text(encoding="utf-8")))
        return found if len(found.ids) == len(found.hashes) == count else None
    except (OSError, ValueError, TypeError):
        return None


def inspect_samples(samples: SegmentationDataset, num_workers: int = 0) -> Inspection:
    """Read all samples, in `num_workers` processes or in this one."""
    loader = DataLoader(_Readings(samples), batch_size=_BATCH, num_workers=num_workers, collate_fn=_as_is)
    unreadable: list[tuple[int, str]] = []
    wrong: list[tuple[int, str]] = []
    ids: list[list[int]] = []
    hashes: list[str] = []
    pixels: Counter[int] = Counter()
    progress = tqdm(total=len(samples), desc=f"Checking {samples.split}", disable=not sys.stderr.isatty())
    for batch in loader:
        for index, fault, counts, digest in batch:
            if fault:
                (unreadable if fault[0] else wrong).append((index, fault[1]))
            pixels.update(counts)
            ids.append(sorted(counts))
            hashes.append(digest)
        progress.update(len(batch))
    progress.close()
    return Inspection(unreadable, wrong, ids, sorted(pixels.items()), hashes)


class _Readings(Dataset):
    """For each sample its place, its fault or None, the pixels of each id, and the hash of its photograph.

    A fault is whether it cannot be decoded, and a message.
    """

    def __init__(self, samples: SegmentationDataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, tuple[bool, str] | None, dict[int, int], str]:
        row = self.samples.encoded[index]
        photograph, label_map = row[self.samples.image_column], row[self.samples.label_column]
        try:
            _, ids = read_ids(photograph, label_map)
        except UnreadableImageError as error:
            return index, (True, f"image {index}: {error}"), {}, ""
        except ValueError as error:
            return index, (False, f"{place_of(self.samples, index)}: {error}"), {}, content_hash(photograph)
        return index, None, count_ids(ids), content_hash(photograph)

    def is_readable(self, index: int) -> bool:
        fault = self[index][1]
        return fault is None or not fault[0]


def place_of(samples: SegmentationDataset, index: int) -> str:
    """Name a sample's place and file, for messages."""
    name = name_of(samples.encoded[index][samples.image_column])
    return f"Image {index} of split {samples.split}{f' ({name})' if name else ''}"


def count_ids(ids: np.ndarray) -> dict[int, int]:
    """Count the pixels of each id that occurs."""
    if ids.min() >= 0 and ids.max() < 2**16:
        counts = np.bincount(ids.ravel())
        present = counts.nonzero()[0]
        counts = counts[present]
    else:
        present, counts = np.unique(ids, return_counts=True)
    return dict(zip(present.tolist(), counts.tolist(), strict=True))


def _as_is(batch: list) -> list:
    return batch
