"""The photographs that a model segments worst, kept small, for a contact sheet."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from depict_hf.labels import colors_for
from depict_hf.visualization import Color, SheetRow, contact_sheet
from depict_hf.writing import encode_picture, write_whole

from ..data import SegmentationDataset
from .metrics import scores

THUMBNAIL_WIDTH = 320


@dataclass(frozen=True)
class WorstImage:
    """One photograph with its figures, at most `THUMBNAIL_WIDTH` pixels wide.

    Args:
        index: Place in its split.
        mean_iou: Over the classes that occur in its label map or, on labelled pixels, in its prediction; a fraction.
        accuracy: Share of its labelled pixels with the true class.
        photo, truth, prediction: As in `SheetRow`.
    """

    index: int
    mean_iou: float
    accuracy: float
    photo: PIL.Image.Image
    truth: np.ndarray
    prediction: np.ndarray


class WorstImages:
    """Keeps the images of lowest mean IoU, counted on each image alone; memory does not grow with those seen.

    Args:
        count: How many to keep. Images without any labelled pixel never are; of equal ones the first are.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"Got count={count}, needed at least 1 image to keep.")
        self.count = count
        self.images: list[WorstImage] = []

    def add(self, index: int, image: Tensor, labels: Tensor, prediction: Tensor, confusion: Tensor) -> None:
        """Look at one image.

        Args:
            index: Place in its split.
            image: uint8 `(3, height, width)`.
            labels: `(height, width)`, integer, 255 where there is no class.
            prediction: `(height, width)`, integer.
            confusion: Confusion matrix of this image, as of `MeanIoU.count`.
        """
        results = scores(confusion)
        mean_iou = results["mean_iou"]
        full = len(self.images) == self.count
        if math.isnan(mean_iou) or (full and (mean_iou, index) > (self.images[-1].mean_iou, self.images[-1].index)):
            return
        photo = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        width = min(photo.width, THUMBNAIL_WIDTH)
        size = (width, max(1, round(photo.height * width / photo.width)))
        maps = (_shrink(each.cpu().numpy(), size) for each in (labels, prediction))
        worst = WorstImage(index, mean_iou, results["overall_accuracy"], photo.resize(size), *maps)
        self.merge([worst])

    def merge(self, images: list[WorstImage]) -> None:
        """Look at images that others have kept."""
        self.images = sorted([*self.images, *images], key=lambda each: (each.mean_iou, each.index))[: self.count]

    def sheet(self, titles: list[str], colors: list[Color], names: list[str]) -> PIL.Image.Image:
        """Draw the contact sheet, worst first.

        Args:
            titles: Titles of the kept images, in their order; their figures are added.
            colors, names: As for `contact_sheet`.

        Raises:
            ValueError: If no image was kept.
        """
        rows = [
            SheetRow(
                f"{title}: mean IoU {100 * each.mean_iou:.1f} %, accuracy {100 * each.accuracy:.1f} %",
                each.photo,
                each.truth,
                each.prediction,
            )
            for title, each in zip(titles, self.images, strict=True)
        ]
        return contact_sheet(rows, colors, names, THUMBNAIL_WIDTH)


def save_sheet(
    worst: WorstImages, samples: SegmentationDataset, id2label: dict[int, str], state: PartialState, path: Path
) -> None:
    """Write the contact sheet of the worst images of all processes, or a line on stderr where there are none.

    Args:
        worst: Those of this process.
        samples: Where they come from; their files' names are the titles.
        id2label: Class names by id.
        state: The processes, each of which has to call this.
        path: Path of a picture; folders above it are made.
    """
    if state.num_processes > 1:
        everywhere = gather_object(worst.images)
        worst = WorstImages(worst.count)
        worst.merge(everywhere)
    if not state.is_main_process:
        return
    if not worst.images:
        print(f"{path} is not written: no image has a labelled pixel.", file=sys.stderr)
        return
    titles = [f"{Path(samples.name(each.index)).name} ({each.index})" for each in worst.images]
    names = [id2label[index] for index in range(len(id2label))]
    write_whole(encode_picture(worst.sheet(titles, colors_for(id2label), names), path), path)


def check_sheet(path: Path | None) -> Path | None:
    """Refuse a file that no picture can be written to, before the images are evaluated.

    Raises:
        ValueError: If its suffix is that of no picture.
    """
    if path is not None and path.suffix.lower() not in PIL.Image.registered_extensions():
        raise ValueError(f"Got --contact-sheet {path}, needed the name of a picture, such as worst.png.")
    return path


def _shrink(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Label map at `(width, height)` pixels, by the nearest pixel."""
    width, height = size
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for new, old in zip((height, width), ids.shape, strict=True)
    )
    return ids[rows][:, columns]
