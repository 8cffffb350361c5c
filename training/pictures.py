"""Pictures of a few validation images at each evaluation: photograph, truth and prediction side by side."""

from pathlib import Path

import PIL.Image
from torch import Tensor

from depict_hf.labels import colors_for
from depict_hf.visualization import SheetRow, contact_sheet

COLUMN_WIDTH = 480


def sample_picture(
    image: Tensor, labels: Tensor, prediction: Tensor, title: str, id2label: dict[int, str]
) -> PIL.Image.Image:
    """One photograph, its label map and the predicted one, above a legend of the classes that occur.

    Args:
        image: uint8 `(3, height, width)`.
        labels: `(height, width)`, ids or 255.
        prediction: `(height, width)`, ids.
        title: Stands above.
        id2label: Class names by id.
    """
    photo = PIL.Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    row = SheetRow(title, photo, labels.cpu().numpy(), prediction.cpu().numpy())
    names = [id2label[index] for index in range(len(id2label))]
    return contact_sheet([row], colors_for(id2label), names, COLUMN_WIDTH)


def step_folder(output: Path, step: int) -> Path:
    """Where the pictures of an optimiser step are kept."""
    return output / "samples" / f"step-{step}"
