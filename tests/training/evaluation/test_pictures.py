"""Where photograph, truth and prediction stand in a picture, and where the picture goes."""

import numpy as np
import PIL.Image
import torch

from depict_hf.labels import colors_for
from training.evaluation.pictures import COLUMN_WIDTH, sample_picture, write_picture

ID2LABEL = {0: "road", 1: "sky"}


def test_columns_are_photograph_truth_and_prediction():
    image = torch.full((3, 30, 40), 77, dtype=torch.uint8)
    labels, prediction = torch.zeros(60, 80, dtype=torch.long), torch.ones(60, 80, dtype=torch.long)
    picture = np.asarray(sample_picture(image, labels, prediction, "street", ID2LABEL))
    height = COLUMN_WIDTH * 60 // 80
    colors = colors_for(ID2LABEL)
    gap = (picture.shape[1] - 3 * COLUMN_WIDTH) // 4
    for column, color in enumerate([(77, 77, 77), colors[0], colors[1]]):
        middle = gap + column * (COLUMN_WIDTH + gap) + COLUMN_WIDTH // 2
        assert (picture[:, middle] == color).all(axis=-1).sum() >= height


def test_a_picture_goes_to_its_step_and_to_tensorboard(tmp_path):
    added = []

    class Writer:
        def add_image(self, tag, image, step, dataformats):
            added.append((tag, image.shape, step, dataformats))

    picture = PIL.Image.new("RGB", (7, 5), "red")
    write_picture(picture, tmp_path, step=30, index=2, writers=[Writer()])
    assert PIL.Image.open(tmp_path / "samples" / "step-30" / "2.png").getpixel((3, 3)) == (255, 0, 0)
    assert added == [("samples/2", (5, 7, 3), 30, "HWC")]
