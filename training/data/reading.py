"""One photograph and its label map out of their files, and the classes that the ids in a label map mean."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets.download.streaming_download_manager import xopen
from PIL import Image
from torch import Tensor

from depict_hf import DepictImageProcessor, photo_files
from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.photo_files import SEVERAL_PICTURES, UnreadableImageError

_EXIF_ORIENTATION = 0x0112
_DECODER = DepictImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)


@dataclass(frozen=True)
class LabelEncoding:
    """The class that each id in a label map means.

    Args:
        classes: Classes of id 0, 1, 2, ..., at least 256: 255 where the id is ignored, -1 where it means nothing and is
            refused, as all ids beyond the last are.
    """

    classes: tuple[int, ...]

    @classmethod
    def from_table(cls, table: dict[int, int]) -> "LabelEncoding":
        """Make it by a table from ids to classes, 255 for ignored ones; 255 itself is ignored in any case."""
        table = table | {IGNORE_LABEL: IGNORE_LABEL}
        return cls(tuple(table.get(index, -1) for index in range(max(table) + 1)))

    @classmethod
    def binary(cls) -> "LabelEncoding":
        """Make it for masks of two classes that hold 0 and 255: 255 is class 1, and nothing is ignored."""
        return cls((0, *[-1] * (IGNORE_LABEL - 1), 1))

    @classmethod
    def counted(cls, num_labels: int, reduce_labels: bool = False) -> "LabelEncoding":
        """Make it for ids that are the classes or, with `reduce_labels`, the classes plus one; 0 is then ignored."""
        if reduce_labels:
            return cls.from_table({0: IGNORE_LABEL} | {index + 1: index for index in range(num_labels)})
        return cls.from_table({index: index for index in range(num_labels)})

    def decode(self, ids: np.ndarray) -> Tensor:
        """Return the classes of an array of ids, int64, in the shape of the array.

        Raises:
            ValueError: If an id means nothing; the message says which, and those that do.
        """
        lookup = np.array([*self.classes, -1])
        if ids.dtype == np.uint8:
            classes = lookup.take(ids)
        else:
            classes = lookup.take(np.where((ids >= 0) & (ids < len(self.classes)), ids, len(self.classes)))
        if classes.min() < 0:
            raise ValueError(self.refusal(np.unique(ids[classes < 0]).tolist()))
        return torch.from_numpy(classes)

    def meaningless(self, ids: Iterable[int]) -> list[int]:
        """Return those of some ids that mean nothing."""
        return [each for each in ids if not 0 <= each < len(self.classes) or self.classes[each] < 0]

    def refusal(self, wrong: Sequence[int]) -> str:
        """Write an error's text on ids that mean nothing."""
        return f"Got label ids {list(wrong[:10])}, needed {self}; check the class names and reduce_labels."

    def __str__(self) -> str:
        ignored = [index for index, each in enumerate(self.classes) if each == IGNORE_LABEL]
        meant = [index for index, each in enumerate(self.classes) if each not in (IGNORE_LABEL, -1)]
        return f"{_ranges(meant)}, or {_ranges(ignored)} (ignored)" if ignored else _ranges(meant)


def read_image(encoded: dict | None) -> Image.Image:
    """Decode one image of a dataset, turned as its EXIF orientation says; of several in a file, the first.

    Args:
        encoded: Its `path` and `bytes`, as a column of `datasets.Image(decode=False)` has them.

    Raises:
        UnreadableImageError: If it cannot be decoded, for whatever reason, or is of no format that
            `depict_hf.photo_files` opens.
    """
    return _read(encoded)[0]


def _read(encoded: dict | None) -> tuple[Image.Image, str | None]:
    """Do as `read_image` does, and return the note of `photo_files.read_image`, too."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise UnreadableImageError("the dataset has none here")
    data, path = encoded["bytes"], encoded["path"]
    try:
        if data is None and "://" in path:  # inside an archive, or on the network
            with xopen(path, "rb") as file:
                data = file.read()
        return photo_files.read_image(path if data is None else data)
    except UnreadableImageError:
        raise
    except OSError as error:
        raise UnreadableImageError(f"it cannot be read ({error}); check the disk or the network") from error


def read_pair(
    encoded_image: dict | None, encoded_labels: dict | None, encoding: LabelEncoding
) -> tuple[Tensor, Tensor]:
    """Decode a photograph and its label map by the rules of `DepictImageProcessor` (palettes count by index).

    Returns:
        The photograph, uint8 `(3, height, width)`, and classes, int64 `(height, width)`, 255 where ignored.

    Raises:
        UnreadableImageError: If one of them cannot be decoded.
        ValueError: If the map does not fit the photograph, is no map of ids, or has ids that mean nothing.
    """
    image, ids = read_ids(encoded_image, encoded_labels)
    return image, encoding.decode(ids)


def read_ids(encoded_image: dict | None, encoded_labels: dict | None) -> tuple[Tensor, np.ndarray]:
    """Read as `read_pair` does, but return the ids of the label map, integers `(height, width)`, whatever they mean.

    Raises:
        UnreadableImageError: If one of them cannot be decoded.
        ValueError: If the map does not fit the photograph, or is no map of ids.
    """
    images = []
    for kind, encoded in (("photograph", encoded_image), ("label map", encoded_labels)):
        try:
            image, note = _read(encoded)
            images.append(image)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{kind} {name_of(encoded) or '(no name)'}: {error}") from error
    image, labels = images
    if note == SEVERAL_PICTURES:
        raise ValueError(
            "Got a label map whose file holds several pictures (pages, or an animation), of which nobody knows which "
            "is meant; save the one that is as PNG."
        )
    if labels.format in ("JPEG", "MPO"):
        raise ValueError("Got a label map saved as JPEG, which changes ids; needed is PNG or another lossless format.")
    if image.size != labels.size:
        assert encoded_image is not None  # it has been read
        raise ValueError(_sizes_differ(image, labels, encoded_image))
    if image.mode == "RGB" and labels.mode in ("L", "P"):
        # The processor's results for the usual modes, without its work for all others.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), np.array(labels)
    decoded = _DECODER(image, segmentation_maps=labels)
    return decoded["pixel_values"][0], decoded["labels"][0].numpy()


def _sizes_differ(image: Image.Image, labels: Image.Image, encoded_image: dict) -> str:
    """Write an error's text, which says whether the photograph's EXIF orientation is the reason."""
    (width, height), (label_width, label_height) = image.size, labels.size
    sizes = (
        f"Got a segmentation map of size ({label_height}, {label_width}) for an image of size ({height}, {width}) "
        "(height, width), but they must be equal;"
    )
    data = encoded_image["bytes"]
    with Image.open(encoded_image["path"] if data is None else io.BytesIO(data)) as stored:
        orientation = stored.getexif().get(_EXIF_ORIENTATION, 1)
        turned = orientation in (5, 6, 7, 8) and stored.size == labels.size
    if turned:
        return (
            f"{sizes} the photograph is stored lying and turned by its EXIF orientation {orientation}, and the map was "
            "made for the lying one: turn the map alike, or remove the orientation from the photograph."
        )
    return f"{sizes} check that they belong together, or resize the map (nearest neighbour, no smoothing)."


def content_hash(encoded: dict) -> str:
    """Return a short text that is the same for files of the same bytes, 16 characters.

    Raises:
        OSError: If there is no such file.
    """
    data = encoded["bytes"]
    return hashlib.blake2b(Path(encoded["path"]).read_bytes() if data is None else data, digest_size=8).hexdigest()


def name_of(encoded: dict | None) -> str | None:
    """Return the path of an image, or its name where the image itself is in the dataset; None where it has none."""
    return None if encoded is None else encoded["path"]


def _ranges(numbers: list[int]) -> str:
    """Write increasing numbers in few words: "0 to 4 and 7"."""
    parts: list[tuple[int, int]] = []
    for index, number in enumerate(numbers):
        if index and number == numbers[index - 1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return " and ".join(str(first) if first == last else f"{first} to {last}" for first, last in parts)
