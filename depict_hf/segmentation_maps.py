"""Maps of class ids, as a user passes them to the image processor."""

import numpy as np
import PIL.Image
import torch
from transformers.image_utils import ImageInput

from .configuration_depict import IGNORE_LABEL
from .photo_files import decoding

MAP_MODES = ("1", "L", "P", "I", "F", "LA", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I;16N")


def read_segmentation_maps(segmentation_maps: ImageInput, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Read one map of class ids, `(height, width)` int64, for each image, whose (height, width) are `sizes`."""
    counted = getattr(segmentation_maps, "ndim", None) == 3 and len(sizes) > 1  # The first axis counts images then.
    maps = list(segmentation_maps) if counted else flatten(segmentation_maps)
    if len(maps) != len(sizes):
        raise ValueError(f"Got {len(maps)} segmentation maps for {len(sizes)} images; pass exactly one map per image.")
    return [_read_map(segmentation_map, size) for segmentation_map, size in zip(maps, sizes, strict=True)]


def _read_map(segmentation_map, size: tuple[int, int]) -> torch.Tensor:
    """Read the map of class ids, `(height, width)` int64, of one image, whose (height, width) is `size`."""
    if isinstance(segmentation_map, PIL.Image.Image):
        if segmentation_map.mode not in MAP_MODES:
            raise ValueError(
                f"Got a segmentation map of PIL mode {segmentation_map.mode!r}; modes that hold class ids are "
                f"{', '.join(MAP_MODES)}: map each colour to its id first."
            )
        with decoding(segmentation_map.size):
            segmentation_map.load()
        segmentation_map = np.array(segmentation_map)
        if segmentation_map.ndim == 3:  # channels first, which a side of at most 4 pixels would be taken for
            segmentation_map = np.moveaxis(segmentation_map, -1, 0)
    if isinstance(segmentation_map, np.ndarray):
        segmentation_map = to_tensor(segmentation_map)
    if not isinstance(segmentation_map, torch.Tensor):
        raise ValueError(
            f"Got a segmentation map of type {type(segmentation_map).__name__}; pass a PIL image, a numpy array or a "
            "torch tensor (open a path with PIL.Image.open)."
        )
    ids = _single_channel(segmentation_map)
    if ids.is_floating_point() and not torch.equal(ids, ids.round().nan_to_num()):
        raise ValueError(
            f"Got a segmentation map of {ids.dtype} with values that are no whole numbers; class ids are needed: do "
            "not rescale, normalise or interpolate the map."
        )
    ids = ids.to(torch.int64)
    if (ids < 0).any():
        raise ValueError(
            f"Got a segmentation map with the negative id {ids.min().item()}; class ids start at 0: give pixels "
            f"without a class the ignored id {IGNORE_LABEL}."
        )
    if ids.shape != size:
        raise ValueError(
            f"Got a segmentation map of size {tuple(ids.shape)} for an image of size {size} (height, width), but they "
            "must be equal; check that they belong together and are rotated alike (EXIF), or resize the map (nearest)."
        )
    return ids


def _single_channel(values: torch.Tensor) -> torch.Tensor:
    """Reduce a map with 1 to 4 equal channels, first or last, the 2nd or 4th being opaque alpha, to one channel."""
    shape = tuple(values.shape)
    if values.ndim == 2:
        return values
    if values.ndim == 3 and len(values) > 4:
        values = values.movedim(-1, 0)  # channels were last
    if values.ndim != 3 or not 1 <= len(values) <= 4:
        raise ValueError(
            f"Got a segmentation map of shape {shape}; needed is (height, width), or with equal channels first or last."
        )
    if len(values) in (2, 4):
        if (values[-1] != 255).any():
            raise ValueError(
                f"Got a segmentation map of shape {shape} that is partly transparent; the id of such pixels is "
                f"ambiguous: save it without alpha, with id {IGNORE_LABEL} where there is no class."
            )
        values = values[:-1]
    if (values != values[:1]).any():
        raise ValueError(
            f"Got a segmentation map of shape {shape} with channels that differ, a colour image; needed is one channel "
            "of class ids: map each colour to its id first."
        )
    return values[0]


def flatten(images) -> list:
    """Single images out of one image, a batch with four dimensions, or nested lists of either."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten(item)]
    return list(images) if getattr(images, "ndim", None) == 4 else [images]


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array into a tensor where torch refuses its byte order or strides, or warns about read-only memory."""
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
