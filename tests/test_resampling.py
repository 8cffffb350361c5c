"""Resizing by matrices: against `F.interpolate` and float64, under every setting, and what of it is kept."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from depict_hf import resampling
from depict_hf.resampling import Axis, product_dtype, resample, resize_bilinear
from depict_hf.windows import CoarseScores, label_views, merge_windows, window_corners

CPU = torch.device("cpu")
AXES = [
    Axis(4, (0,), 32, 32, 32),
    Axis(4, (0,), 32, 29, 29),  # padding is cut off
    Axis(32, (0,), 512, 512, 683),
    Axis(4, (0, 11, 22), 16, 38, 151),
    Axis(4, (0, 3, 6, 9, 10), 16, 26, 500, mirrored=True),  # windows that overlap by more than half
    Axis(9, (0,), 9, 9, 5),
    Axis(32, (0, 171), 512, 683, 6000),
    Axis(1, (0,), 8, 8, 20),
    Axis(700, (0,), 700, 700, 8191),
]


@pytest.fixture(autouse=True)
def nothing_kept():
    resampling._kept.clear()
    yield
    resampling._kept.clear()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("height", [1, 7, 10**6])
def test_bands_together_are_the_matrix(axis, height):
    """Fails if a band leaves out a column that is not zero, also by rounding at large sizes."""
    columns = len(axis.starts) * axis.grid_length
    source = torch.randn(columns, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bands = axis.bands(height, torch.float64, CPU)
    assert [row for band in bands for row in range(band.rows.start, band.rows.stop)] == [*range(axis.target_length)]
    if height == 1:
        bands = bands[:50] + bands[len(bands) // 2 :][:50] + bands[-50:]
    matrix = axis.matrix(torch.float64)
    for band in bands:
        rows = source[band.used] if band.matrix is None else band.matrix @ source[band.used]
        torch.testing.assert_close(rows, matrix[band.rows] @ source, atol=1e-12, rtol=0)
        float32 = axis.matrix(torch.float32)[band.rows] if len(matrix) < 1000 else matrix[band.rows]
        others = set(range(columns)) - set(axis.columns(band.rows))
        assert not float32[:, sorted(others)].any()


def test_few_columns_are_used():
    """A band of one row between two windows far apart in the mosaic reads some of each, not all between."""
    axis = Axis(32, (0, 171), 512, 683, 683)
    [band] = [band for band in axis.bands(1, torch.float32, CPU) if band.rows.start == 400]
    assert band.matrix.shape[1] == len(band.used) <= 6


@pytest.fixture(params=["as it is", "medium", "mkldnn", "all backends", "autocast"])
def surroundings(request):
    """Settings that let matrix products of float32 be computed in fewer bits where the processor can."""
    if request.param in ("mkldnn", "all backends") and not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this PyTorch has no such setting")
    if hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "mkldnn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    elif request.param == "all backends":
        torch.backends.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "autocast"):
            yield request.param
    finally:
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.fp32_precision = "none"
            torch.backends.mkldnn.fp32_precision = "none"
            torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def windows_of(size: tuple[int, int], num_labels: int = 40) -> tuple[list, list]:
    corners = window_corners(size, 64, 48)
    generator = torch.Generator().manual_seed(1)
    return corners, [torch.randn(1, num_labels, 16, 16, generator=generator) for _ in corners]


def test_scores_are_exact_whatever_the_surroundings(surroundings):
    """Products in bfloat16 would be off by 1e-2, in TF32 by 1e-3; positions in float32, as `F.interpolate`'s, by 1e-5.

    Few processors act on the settings at all, so the type is asked for, too.
    """
    reduced = surroundings not in ("as it is", "autocast")
    assert product_dtype(torch.float32, CPU) == (torch.float64 if reduced else torch.float32)
    corners, logits = windows_of((80, 112))
    exact = merge_windows([each.double() for each in logits], corners, (80, 112), 64, (300, 400))
    leaf = logits[0].clone().requires_grad_()
    merged = merge_windows([leaf, *logits[1:]], corners, (80, 112), 64, (300, 400))
    torch.testing.assert_close(merged.double(), exact, atol=2e-5, rtol=0)
    with torch.autocast("cpu", enabled=False):  # where PyTorch wants backward passes to run
        merged[..., 5, 7].sum().backward()
    torch.testing.assert_close(leaf.grad.sum(), torch.tensor(40.0), atol=1e-4, rtol=0)


def test_label_maps_are_those_of_float64_whatever_the_surroundings(surroundings):
    corners, logits = windows_of((80, 112))
    exact = merge_windows([each.double() for each in logits], corners, (80, 112), 64, (300, 400))[0]
    view = CoarseScores.from_windows([each[0] for each in logits], corners, (64, 64), (80, 112), (300, 400))
    labels, confidence, margin = label_views([view], True)
    assert (labels == exact.argmax(dim=0)).float().mean() > 0.9999
    highest = exact.softmax(dim=0).topk(2, dim=0).values
    torch.testing.assert_close(confidence.double(), highest[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(margin.double(), highest[0] - highest[1], atol=1e-5, rtol=0)


def test_tf32_makes_products_on_cuda_float64(monkeypatch):
    cuda, mps = torch.device("cuda"), torch.device("mps")
    assert product_dtype(torch.bfloat16, cuda) == torch.float32
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert product_dtype(torch.float32, cuda) == torch.float64
        assert product_dtype(torch.float32, mps) == torch.float32  # which has no float64
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    monkeypatch.setattr(resampling, "_products_are_rounded", lambda device_type: True)
    assert product_dtype(torch.float32, CPU) == torch.float64


def test_the_settings_of_the_process_are_not_touched():
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        corners, logits = windows_of((80, 112))
        merge_windows(logits, corners, (80, 112), 64)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)


class TestKept:
    axis = Axis(8, (0,), 64, 64, 100)

    def test_the_next_call_gets_the_same(self):
        first = self.axis.bands(10, torch.float32, CPU)
        assert self.axis.bands(10, torch.float32, CPU) is first
        for other in (
            self.axis.bands(11, torch.float32, CPU),
            self.axis.bands(10, torch.float64, CPU),
            Axis(8, (0,), 64, 64, 100, mirrored=True).bands(10, torch.float32, CPU),
        ):
            assert other is not first
        assert self.axis.bands(10, torch.float64, CPU)[0].matrix.dtype == torch.float64

    def test_a_training_step_can_use_what_inference_made(self):
        """Inference tensors cannot be saved for a backward pass."""
        with torch.inference_mode():
            self.axis.whole(torch.float32, CPU)
        scores = torch.randn(1, 8, 8, requires_grad=True)
        resample(scores, self.axis, self.axis).sum().backward()
        torch.testing.assert_close(scores.grad.sum(), torch.tensor(100.0 * 100))

    def test_what_a_transform_made_is_not_kept(self):
        scores = torch.randn(1, 8, 8)
        torch.func.grad(lambda values: resample(values, self.axis, self.axis).square().sum())(scores)
        assert not resampling._kept._entries
        expected = resize_bilinear(resize_bilinear(scores[None], (64, 64)), (100, 100))[0]
        torch.testing.assert_close(resample(scores, self.axis, self.axis), expected)

    def test_bytes_and_number_are_bounded(self, monkeypatch):
        monkeypatch.setattr(resampling, "KEPT_BYTES", 40_000)
        monkeypatch.setattr(resampling, "KEPT_ENTRIES", 5)
        kept = resampling._kept
        for target in (100, 200, 300, 400, 500, 600, 700, 800):
            Axis(8, (0,), 64, 64, target).bands(50, torch.float32, CPU)
            assert kept._num_bytes == sum(size for _, size in kept._entries.values()) <= 40_000
            assert len(kept._entries) <= 5
        assert [key[0].target_length for key in kept._entries] == [800]  # 25,600 bytes; 700 would be 22,400 more
        Axis(8, (0,), 64, 64, 2000).bands(50, torch.float32, CPU)  # 64,000 bytes alone
        assert [key[0].target_length for key in kept._entries] == [800]

    def test_index_copies_count(self):
        axis = Axis(32, (0, 171), 512, 683, 683)
        bands = axis.bands(1, torch.float32, CPU)
        assert resampling._num_bytes(bands) > 683 * 64 * 4 + 340 * 6 * 4

    def test_threads_share(self):
        """Fails if the dictionary is changed by two threads at once, or sizes are mixed up."""
        start = threading.Barrier(8)

        def run(seed: int) -> None:
            start.wait()
            for number in range(200):
                target = 20 + (seed * 7 + number) % 40
                [band] = Axis(8, (0,), 64, 64, target).bands(target, torch.float32, CPU)
                assert band.matrix.shape == (target, 8)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(run, range(8)))
        entries = resampling._kept._entries.values()
        assert resampling._kept._num_bytes == sum(size for _, size in entries)


def test_equal_sizes_need_no_product(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a product")

    monkeypatch.setattr(Axis, "bands", refuse)
    scores = torch.randn(7, 5, 6)
    view = CoarseScores.from_windows([scores], [(0, 0)], (5, 6), (5, 6), (5, 6))
    assert torch.equal(label_views([view]).labels.long(), scores.argmax(dim=0))
    assert merge_windows([scores[None]], [(0, 0)], (5, 6), (5, 6)).equal(scores[None])
