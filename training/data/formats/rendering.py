"""Label maps that are drawn from annotations once, as PNG files in the cache of `datasets`."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm

from depict_hf.writing import encode_picture, write_whole

from ..reading import UnreadableImageError, read_image
from .found import refuse

# To be raised whenever the same annotation is drawn differently.
_VERSION = "1"


@dataclass(frozen=True)
class Drawing:
    """A label map that is not a file yet.

    Args:
        name: Name of what it is drawn from, for messages.
        depends_on: Texts that together determine what is drawn.
        draw: Draws it: ids of classes, uint8 `(height, width)`. Raises `ValueError` or `OSError` where it cannot.
        source: The picture that it is drawn from. Where that cannot be decoded, it takes the drawing's place, so that
            it is reported with all other files that cannot be read, or left out with them.
    """

    name: str
    depends_on: tuple[str, ...]
    draw: Callable[[], np.ndarray]
    source: Path | None = None

    @property
    def path(self) -> Path:
        """Where its file is, or will be."""
        digest = hashlib.sha256("\n".join((_VERSION, *self.depends_on)).encode()).hexdigest()[:32]
        return cache_folder() / "depict_label_maps" / digest[:2] / f"{digest[2:]}.png"


def cache_folder() -> Path:
    """Return the cache of `datasets`, as it is set now."""
    return Path(datasets.config.HF_DATASETS_CACHE)


def render(drawings: Sequence[Drawing]) -> list[Path]:
    """Return the files of all label maps, drawn unless they were before.

    Raises:
        ValueError: If some cannot be drawn; the message names all of them.
    """
    paths, faults = [], []
    for drawing in tqdm(drawings, desc="Drawing label maps", disable=not sys.stderr.isatty(), leave=False):
        paths.append(drawing.path)
        if drawing.path.is_file():
            continue
        try:
            ids = drawing.draw()
        except Exception as error:  # whatever a damaged annotation makes of the code that draws it
            if drawing.source is not None and not _can_be_decoded(drawing.source):
                paths[-1] = drawing.source
                continue
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            faults.append(f"{drawing.name}: {kind}{error}")
            continue
        write_whole(encode_picture(Image.fromarray(ids.astype(np.uint8)), drawing.path), drawing.path)
    refuse(faults, f"{len(faults)} of {len(drawings)} label maps cannot be made:")
    return paths


def render_splits(splits: Mapping[str | None, Sequence[tuple[Path, Drawing]]]) -> dict[str, list[tuple[Path, Path]]]:
    """Pair the photographs of all splits with their label maps, drawn as by `render`.

    Photographs in no split (None) become those of "train".
    """
    drawn = iter(render([drawing for pairs in splits.values() for _, drawing in pairs]))
    return {split or "train": [(photograph, next(drawn)) for photograph, _ in pairs] for split, pairs in splits.items()}


def _can_be_decoded(path: Path) -> bool:
    try:
        read_image({"path": str(path), "bytes": None})
    except UnreadableImageError:
        return False
    return True


def content_key(path: Path) -> str:
    """Changes with what a file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_key(path: Path) -> str:
    """Changes when a file is written anew, without reading it."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
