import pytest
import torch

from depict_hf.windows import (
    cut_windows,
    enlarge_to_window,
    merge_windows,
    pad_to_multiple,
    resize_bilinear,
    window_corners,
    window_starts,
)


@pytest.mark.parametrize(
    ("length", "stride", "expected"),
    [
        (10, 4, [0, 4, 6]),  # the last window is flush with the border
        (12, 6, [0, 6]),  # and is not repeated where the stride reaches it
        (4, 4, [0]),
        (5, 1, [0, 1]),
    ],
)
def test_window_starts(length, stride, expected):
    window = {10: 4, 12: 6, 4: 4, 5: 4}[length]
    assert window_starts(length, window, stride) == expected


def test_cut_and_merge_give_the_image_back():
    """Fails if rows and columns are swapped, or windows are merged in another order than they are cut."""
    image = torch.randn(2, 3, 10, 17)
    corners = window_corners((10, 17), 4, 3)
    windows = cut_windows(image, corners, 4)
    assert corners[:2] == [(0, 0), (0, 3)]
    torch.testing.assert_close(merge_windows(list(windows.split(2)), corners, (10, 17), 4), image)


def test_overlaps_are_averaged_and_coarse_logits_upsampled():
    merged = merge_windows(
        [torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 5.0)], [(0, 0), (0, 2)], (4, 6), window_size=4
    )
    assert merged[0, 0, 0].tolist() == [1, 1, 3, 3, 5, 5]


def test_padding_is_zero_at_the_bottom_and_right():
    padded = pad_to_multiple(torch.ones(1, 1, 3, 4), 4)
    assert padded[0, 0].sum(dim=1).tolist() == [4, 4, 4, 0]
    image = torch.ones(1, 1, 8, 4)
    assert pad_to_multiple(image, 4) is image


@pytest.mark.parametrize(
    ("size", "expected"), [((32, 42), (64, 84)), ((45, 31), (92, 64)), ((30, 30), (64, 64)), ((64, 20), (204, 64))]
)
def test_short_sides_are_enlarged_to_the_window(size, expected):
    image = torch.randn(1, 2, *size)
    enlarged = enlarge_to_window(image, 64)
    assert tuple(enlarged.shape[-2:]) == expected
    torch.testing.assert_close(enlarged, torch.nn.functional.interpolate(image, expected, mode="bilinear"))


def test_images_that_fit_are_not_touched():
    image = torch.randn(1, 1, 64, 70)
    assert enlarge_to_window(image, 64) is image
    assert resize_bilinear(image, (64, 70)) is image
