"""Pictures of a few validation images at each evaluation: photograph, truth and prediction side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from torch import Tensor

from depict_hf.labels import colors_for
from depict_hf.visualization import SheetRow, contact_sheet
from depict_hf.writing import encode_picture, write_whole

COLUMN_WIDTH = 480


def sample_picture(
    image: Tensor, labels: Tensor, prediction: Tensor, title: str, id2label: dict[int, str]
) -> PIL.Image.Image:
    """Draw one photograph, its label map and the predicted one, above a legend of the classes that occur.

    Args:
        image: uint8 `(3, ., .)`, of any size.
        labels: `(height, width)`, ids or 255.
        prediction: `(height, width)`, ids.
        title: Stands above.
        id2label: Class names by id.
    """
    height, width = labels.shape
    photo = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((width, height))
    row = SheetRow(title, photo, labels.cpu().numpy(), prediction.cpu().numpy())
    names = [id2label[index] for index in range(len(id2label))]
    return contact_sheet([row], colors_for(id2label), names, COLUMN_WIDTH)


def write_picture(picture: PIL.Image.Image, output: Path, step: int, index: int, writers: Sequence = ()) -> None:
    """Write a picture to `output/samples/step-STEP/INDEX.png`.

    Args:
        picture: What `sample_picture` returned.
        output: Folder of the run.
        step: Optimiser step.
        index: Index of the image in its split.
        writers: TensorBoard's, which get it too.
    """
    path = output / "samples" / f"step-{step}" / f"{index}.png"
    write_whole(encode_picture(picture, path), path)
    for writer in writers:
        writer.add_image(f"samples/{index}", np.asarray(picture), step, dataformats="HWC")
