"""Where the windows and patches of a photograph lie, and a record of every window."""

from dataclasses import dataclass

import numpy as np
import PIL.Image

from ..analysis import Recording, record
from ..image_processing_depict import DepictImageProcessor
from ..modeling_depict import DepictForSemanticSegmentation
from ..photo_files import check_resized
from ..resampling import size_of
from ..windows import enlarge_to_window, enlarged_size, window_corners, window_starts


@dataclass(frozen=True)
class Layout:
    """Where windows and patches lie. Sizes are (height, width), corners (top, left).

    Attributes:
        photo: Pixels of the upright photograph.
        resized: Pixels of what the model gets, windows together.
        window: Pixels of a window; `resized` where the model has none.
        starts: Tops of the rows of windows and lefts of their columns; windows are counted row by row.
        grid: Patches of a window.
        patch: Pixels of a patch's side.
    """

    photo: tuple[int, int]
    resized: tuple[int, int]
    window: tuple[int, int]
    starts: tuple[list[int], list[int]]
    grid: tuple[int, int]
    patch: int

    def along(self, axis: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """For a picture of the photograph that is `length` pixels high (axis 0) or wide (axis 1), pixel by pixel: in
        which row or column of windows it lies, and in which row or column of that window's patches.

        Where windows overlap, a pixel belongs to the one whose centre is nearest.
        """
        position = (np.arange(length) + 0.5) * self.resized[axis] / length
        starts = np.array(self.starts[axis])
        window = np.abs(position[:, None] - (starts + self.window[axis] / 2)).argmin(1)
        return window, ((position - starts[window]) // self.patch).astype(int)

    def locate(self, x: int, y: int) -> tuple[int, int, int]:
        """Return the patch at a pixel of the photograph: window, row, column.

        Raises:
            ValueError: If the photograph has no such pixel.
        """
        height, width = self.photo
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"Got the pixel x={x}, y={y}, but the upright photograph has {width} x {height} pixels; x goes from 0 "
                f"to {width - 1}, y from 0 to {height - 1}."
            )
        (window_row, row), (window_column, column) = (
            tuple(int(each[at]) for each in self.along(axis, length))
            for axis, (at, length) in enumerate(((y, height), (x, width)))
        )
        return window_row * len(self.starts[1]) + window_column, row, column

    def index(self, window: int, row: int, column: int) -> int:
        """Return the index of a patch among those of all windows."""
        return (window * self.grid[0] + row) * self.grid[1] + column

    def place(self, index: int) -> tuple[int, int, int]:
        """Return window, row and column of the patch with that index."""
        window, patch = divmod(index, self.grid[0] * self.grid[1])
        return window, *divmod(patch, self.grid[1])

    def box(self, window: int, row: int, column: int) -> list[float]:
        """Return [left, top, right, bottom] of a patch in pixels of the photograph."""
        starts = (self.starts[0][window // len(self.starts[1])], self.starts[1][window % len(self.starts[1])])
        edges = []
        for axis, number in enumerate((row, column)):
            first = starts[axis] + number * self.patch
            scale = self.photo[axis] / self.resized[axis]
            edges.append((first * scale, min((first + self.patch) * scale, self.photo[axis])))
        (top, bottom), (left, right) = edges
        return [round(each, 2) for each in (left, top, right, bottom)]

    def areas(self, picture: tuple[int, int]) -> np.ndarray:
        """Return the share of a picture, `(height, width)` pixels, that belongs to each patch of each window.

        Returns:
            In the order of `index`; 0 for patches that lie nearer to the centre of another window.
        """
        counts = []
        for axis, length in enumerate(picture):
            window, patch = self.along(axis, length)
            count = np.zeros((len(self.starts[axis]), self.grid[axis]))
            np.add.at(count, (window, patch), 1 / length)
            counts.append(count)
        return np.einsum("ar,bc->abrc", *counts).ravel()


def record_windows(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, photo: PIL.Image.Image
) -> tuple[Layout, list[Recording]]:
    """Make one record per window, or one of the whole photograph where the model has no windows."""
    pixel_values = image_processor(photo, return_tensors="pt")["pixel_values"]
    size = model.config.window_size
    if size is not None:
        enlarged = enlarged_size(*size_of(pixel_values), size)
        check_resized((photo.height, photo.width), enlarged, image_processor.max_photo_pixels)
        pixel_values = enlarge_to_window(pixel_values, size)
    height, width = resized = pixel_values.shape[-2:]
    window, starts, corners = resized, ([0], [0]), [(0, 0)]
    if size is not None:
        stride = model.config.window_stride or size
        window, starts = (size, size), (window_starts(height, size, stride), window_starts(width, size, stride))
        corners = window_corners(resized, size, stride)
    recordings = [
        record(model, pixel_values[..., top : top + window[0], left : left + window[1]], origin=(top, left))
        for top, left in corners
    ]
    patch = model.config.encoder_patch_size
    return Layout((photo.height, photo.width), resized, window, starts, recordings[0].grid_size, patch), recordings
