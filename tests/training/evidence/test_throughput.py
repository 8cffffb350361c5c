"""The loader's own speed: images are counted, starting it is not."""

import time

import pytest
import torch

from training.recipes import get_recipe
from training.throughput import build_loader, main, measure


class SlowDataset(torch.utils.data.Dataset):
    """Ten items, each of which takes 10 ms, and the first of a pass 200 ms more."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(0.21 if index == 0 else 0.01)
        return {"labels": torch.zeros(1)}


def test_first_batch_of_each_pass_is_not_timed():
    images, seconds = measure(torch.utils.data.DataLoader(SlowDataset(), batch_size=2), seconds=0.17)
    # Four batches of 20 ms in the first pass, four and more in others; 10 ms an image, whatever the machine adds.
    assert images >= 8
    assert images % 2 == 0
    assert 0.0099 < seconds / images < 0.03


def test_too_few_images_to_time():
    dataset = torch.utils.data.Subset(SlowDataset(), [1, 2])
    with pytest.raises(ValueError, match="fewer than two batches"):
        measure(torch.utils.data.DataLoader(dataset, batch_size=2))


def test_cached_features_are_refused(capsys):
    with pytest.raises(ValueError, match="pass cache_features=false"):
        build_loader(get_recipe("camvid_dinov2_small_sa"), {})
    assert main(["camvid_dinov2_small_sa", "no/such-folder-here", "epoch=3"]) == 1
    assert "did you mean 'epochs'" in capsys.readouterr().err
