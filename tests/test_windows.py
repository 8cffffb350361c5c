"""Windows, and label maps made without full-size scores, against the same steps in plain tensor operations."""

import pytest
import torch

from depict_hf import windows
from depict_hf.windows import (
    CoarseScores,
    axis_operator,
    cut_windows,
    enlarge_to_window,
    label_map,
    merge_windows,
    pad_to_multiple,
    resize_bilinear,
    upsampling_bands,
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


def random_windows(seed: int, size: tuple[int, int], num_labels: int = 7) -> tuple[list, list]:
    """Corners of windows of 16 pixels with stride 11 on an image of `size`, and their logits on a grid of 4 x 4."""
    corners = window_corners(size, 16, 11)
    generator = torch.Generator().manual_seed(seed)
    return corners, [torch.randn(num_labels, 4, 4, generator=generator) for _ in corners]


def full_size_logits(corners, logits, size, target_size) -> torch.Tensor:
    """`(num_labels, *target_size)`: windows upsampled, averaged, then resized."""
    total, count = torch.zeros(1, len(logits[0]), *size), torch.zeros(size)
    for (top, left), each in zip(corners, logits, strict=True):
        total[..., top : top + 16, left : left + 16] += resize_bilinear(each[None], (16, 16))
        count[top : top + 16, left : left + 16] += 1
    return resize_bilinear(total / count, target_size)[0]


@pytest.fixture(params=["one band", "many bands and tiles"])
def few_elements_at_a_time(request, monkeypatch):
    if request.param != "one band":
        monkeypatch.setitem(windows.BAND_ELEMENTS, "cpu", 1500)
        monkeypatch.setattr(windows, "STRIP_ELEMENTS", 3000)


def test_windows_are_merged_straight_to_another_size():
    corners, logits = random_windows(0, (16, 38))
    merged = merge_windows([each[None] for each in logits], corners, (16, 38), 16, (33, 70))
    torch.testing.assert_close(merged[0], full_size_logits(corners, logits, (16, 38), (33, 70)))


def test_a_label_map_is_that_of_full_size_scores(few_elements_at_a_time):
    corners, logits = random_windows(1, (27, 38))
    scores = CoarseScores.from_windows(logits, corners, (16, 16), (27, 38), (131, 150))
    labels = label_map([scores])
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), full_size_logits(corners, logits, (27, 38), (131, 150)).argmax(dim=0))


def test_several_views_are_averaged_as_probabilities(few_elements_at_a_time):
    """Two scales, one of them mirrored; the average of probabilities is not that of logits."""
    target_size, views, total = (90, 120), [], 0
    for seed, size, mirrored in ((2, (27, 38), False), (3, (16, 23), True)):
        corners, logits = random_windows(seed, size)
        logits = [8 * each for each in logits]
        views.append(CoarseScores.from_windows(logits, corners, (16, 16), size, target_size, mirrored))
        full = full_size_logits(corners, logits, size, target_size)
        total = total + (full.flip(-1) if mirrored else full).softmax(dim=0)
    assert (label_map(views).long() == total.argmax(dim=0)).float().mean() > 0.999


@pytest.mark.parametrize("mirrored", [False, True])
def test_one_pixels_scores_are_those_of_all(mirrored):
    """Fails if rows and columns change places, or a mirrored view is read from the wrong side."""
    corners, logits = random_windows(4, (27, 38))
    view = CoarseScores.from_windows(logits, corners, (16, 16), (27, 38), (60, 90), mirrored)
    whole = torch.zeros(60, 90, 7)
    for rows, columns, scores in windows.score_bands([view]):
        whole[rows, columns] = next(scores)
    for row, column in ((0, 0), (59, 89), (13, 40), (40, 13)):
        torch.testing.assert_close(view.at(row, column), whole[row, column])
    same = CoarseScores.from_windows([torch.arange(24.0).view(2, 3, 4)], [(0, 0)], (3, 4), (3, 4), (3, 4))
    assert same.at(2, 1).tolist() == [9, 21]


def test_more_classes_than_a_byte_holds():
    scores = torch.zeros(300, 2, 2)
    scores[299, 0] = 1
    labels = label_map([CoarseScores.from_windows([scores], [(0, 0)], (4, 4), (4, 4), (4, 4))])
    assert labels.tolist() == [[299] * 4] * 3 + [[0] * 4]  # rows at 0.25 and 0.75 of both lie between them


def test_padding_is_cut_off_before_resizing():
    """A window of 16 rows of which 10 are image: the last rows of the map show the image's last rows."""
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(4))
    expected = resize_bilinear(resize_bilinear(logits[None], (16, 16))[..., :10, :], (40, 32))[0].argmax(dim=0)
    scores = CoarseScores.from_windows([logits], [(0, 0)], (16, 16), (10, 16), (40, 32))
    assert torch.equal(label_map([scores]).long(), expected)


def test_operators_keep_constants():
    operator = axis_operator(4, [0, 11, 22], 16, 38, 151)
    torch.testing.assert_close(operator.sum(dim=1), torch.ones(151))


@pytest.mark.parametrize(("length", "target"), [(4, 32), (32, 5), (7, 7), (1, 9)])
def test_bands_together_are_the_upsampled_rows(length, target, few_elements_at_a_time):
    rows = torch.randn(length, 400, generator=torch.Generator().manual_seed(5))
    result = torch.full((target, 400), torch.nan)
    for band, operator, used in upsampling_bands(length, target, 400, rows):
        result[band] = operator @ rows[used]
    torch.testing.assert_close(result, resize_bilinear(rows[None, None], (target, 400))[0, 0])


def test_other_scores_take_the_place_of_a_views():
    """Fails if windows are laid out in another order than by `from_windows`."""
    first, second = torch.randn(2, 6, 3, 4, 5).unbind(0)
    corners = windows.window_corners((24, 30), 20, 10)
    first, second = first[: len(corners)], second[: len(corners)]
    make = windows.CoarseScores.from_windows
    expected = make(list(second), corners, (20, 20), (24, 30), (24, 30))
    found = make(list(first), corners, (20, 20), (24, 30), (24, 30)).with_logits(list(second))
    assert torch.equal(found.mosaic, expected.mosaic) and found.vertical == expected.vertical
