"""The protocol behind the published figures, against a reference written from its description alone.

The reference knows nothing of the converter or of `segment`: it has its own numbers of each data set, resizes in
float64, cuts window by window and keeps full-size probabilities. It shares the network only, one window at a time.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.conversion import convert_checkpoint, convert_with_report, published_protocol
from depict_hf.inference import segment

PUBLISHED = Path(__file__).parent / "data" / "published"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Shorter side, and how many times it the longer side may be; means and deviations on the scale of 0 to 255.
IM_SIZES = {"ade20k": (512, 4), "pascal_context": (520, 8), "cityscapes": (1024, 2)}
STATISTICS = {
    "vit": ([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
    "deit": ([123.68, 116.28, 103.53], [58.4, 57.12, 57.38]),
}


def variant(tmp_path: Path, name: str, **dataset_kwargs) -> Path:
    """A published model whose variant has other `dataset_kwargs`; None removes a field."""
    folder = tmp_path / name
    shutil.copytree(PUBLISHED / name, folder)
    text = (folder / "variant.yml").read_text()
    for field, value in dataset_kwargs.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"  {field}: ") and "im_size" not in line][:1]
        before, after = text.split(line, 1)
        text = before + ("" if value is None else f"  {field}: {value}") + after
    (folder / "variant.yml").write_text(text)
    return folder


def photo(height: int, width: int) -> np.ndarray:
    """Smooth shapes with sharp edges, so that labels vary and depend on every step."""
    rows, columns = np.mgrid[:height, :width] / 23.0
    channels = [np.sin(rows * a + columns * b) * 90 + 128 + 30 * (np.sin(columns * c) > 0) for a, b, c in WAVES]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


WAVES = ((1.0, 0.3, 1.7), (-0.4, 0.9, 0.6), (0.2, -1.3, 2.9))


def resize_axis(values: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation along the first axis between centres of pixels, constant beyond the outermost."""
    old = values.shape[0]
    position = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (position - low).reshape(-1, *[1] * (values.ndim - 1))
    return values[low] * (1 - weight) + values[high] * weight


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(height, width, channels)` float64."""
    return resize_axis(resize_axis(image, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)


def reference(model, image, bounds, window, stride, normalization, scales, flips) -> np.ndarray:
    mean, std = STATISTICS[normalization]
    total = 0.0
    for scale in scales:
        height, width = image.shape[:2]
        short, long = (int(bound * scale) for bound in bounds)
        factor = min(long / max(height, width), short / min(height, width))
        size = int(height * factor + 0.5), int(width * factor + 0.5)
        pixels = image if size == (height, width) else np.rint(resize(image.astype(np.float64), size))
        pixels = (pixels - np.array(mean)) / np.array(std)
        height, width = size
        if min(size) < window:
            ratio = width / height if height < width else height / width
            size = (window, int(ratio * window)) if height < width else (int(ratio * window), window)
            pixels = resize(pixels, size)
        for flip in flips:
            view = pixels[:, ::-1] if flip else pixels
            scores = merged_scores(model, view, window, stride)
            scores = F.interpolate(scores[None], image.shape[:2], mode="bilinear")[0]
            total = total + (scores.flip(-1) if flip else scores).softmax(dim=0)
    return total.argmax(dim=0).numpy()


@torch.no_grad()
def merged_scores(model, pixels: np.ndarray, window: int, stride: int) -> torch.Tensor:
    height, width = pixels.shape[:2]
    tops, lefts = ([*range(0, side - window, stride), side - window] for side in (height, width))
    total, count = torch.zeros(model.config.num_labels, height, width), torch.zeros(height, width)
    patch = model.config.patch_size
    for top in tops:
        for left in lefts:
            crop = torch.from_numpy(pixels[top : top + window, left : left + window].copy()).float()
            crop = F.pad(crop.movedim(-1, 0), (0, -window % patch, 0, -window % patch))
            grid = model(crop[None]).logits
            scores = F.interpolate(grid, crop.shape[-2:], mode="bilinear")[0, :, :window, :window]
            total[:, top : top + window, left : left + window] += scores
            count[top : top + window, left : left + window] += 1
    return total / count


def agreement(folder, tmp_path, image, bounds, window, scales=(1.0,), flips=(False,), **options) -> float:
    """Of `segment` on what was converted, saved and loaded, with the reference."""
    model, image_processor = convert_checkpoint(folder, **options)
    model.save_pretrained(tmp_path / "saved")
    image_processor.save_pretrained(tmp_path / "saved")
    model = DepictForSemanticSegmentation.from_pretrained(tmp_path / "saved").eval()
    image_processor = DepictImageProcessor.from_pretrained(tmp_path / "saved")
    [labels] = segment(model, image_processor, [image], scales, flip=len(flips) > 1)
    normalization = yaml.safe_load((folder / "variant.yml").read_text().replace("!!python/tuple", ""))
    normalization = normalization["dataset_kwargs"]["normalization"]
    model.config.window_size = model.config.window_stride = None
    expected = reference(model, image, bounds, window, window - 32, normalization, scales, flips)
    assert len(np.unique(expected)) > 2, "a constant map shows nothing"
    return float((labels.numpy() == expected).mean())


# Photographs that meet each bound: plain ones at the sizes of the table, among them that of a model trained on squares
# of 640 and read at 512; then portraits, panoramas whose longer side is bounded (at 4, 8 and 2 times), and windows that
# the resized photograph does not fill, at a smaller `im_size`, which goes before the table's.
CASES = [
    ("ca_vit", "ade20k", 512, (90, 120), None),
    ("ca_vit", "ade20k", 640, (120, 160), None),
    ("segmenter_linear", "pascal_context", 480, (333, 500), None),
    ("sa_deit_distilled", "cityscapes", 768, (90, 180), None),
    ("segmenter_linear", "ade20k", 128, (180, 120), 128),
    ("sa_deit_distilled", "ade20k", 64, (60, 240), 128),
    ("sa_deit_distilled", "ade20k", 96, (40, 360), 128),
    ("segmenter_linear", "pascal_context", 96, (40, 360), 104),
    ("ca_vit", "cityscapes", 96, (240, 80), 128),
]


@pytest.mark.parametrize(("name", "dataset", "crop_size", "size", "im_size"), CASES)
def test_single_scale(tmp_path, name, dataset, crop_size, size, im_size):
    folder = variant(tmp_path, name, dataset=dataset, crop_size=crop_size, image_size=crop_size)
    side, ratio = IM_SIZES[dataset]
    side = im_size or side
    assert agreement(folder, tmp_path, photo(*size), (side, ratio * side), crop_size, im_size=im_size) >= 0.9999


@pytest.mark.parametrize(
    ("name", "crop_size", "size", "im_size"),
    [("ca_vit", 128, (60, 81), 128), ("sa_deit_distilled", 64, (40, 360), 97)],
)
def test_multi_scale(tmp_path, name, crop_size, size, im_size):
    """Both bounds are multiplied and cut off: the second photograph is bounded by its longer side at every scale."""
    folder = variant(tmp_path, name, crop_size=crop_size)
    bounds = (im_size, 4 * im_size)
    result = agreement(folder, tmp_path, photo(*size), bounds, crop_size, SCALES, (False, True), im_size=im_size)
    assert result >= 0.999


class TestSettings:
    """What a converted model carries, and what is said of it."""

    @pytest.mark.parametrize(
        ("dataset", "crop_size", "size", "stride"),
        [
            ("ade20k", 512, (512, 2048), 480),
            ("ade20k", 640, (512, 2048), 608),
            ("pascal_context", 480, (520, 4160), 448),
            ("cityscapes", 768, (1024, 2048), 736),
        ],
    )
    def test_table(self, dataset, crop_size, size, stride):
        assert published_protocol(dataset, crop_size) == {
            "size": {"shortest_edge": size[0], "longest_edge": size[1]},
            "window_size": crop_size,
            "window_stride": stride,
        }

    def test_the_table_refuses_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="Got dataset='coco', needed one of ade20k, pascal_context, cityscapes"):
            published_protocol("coco", 512)
        with pytest.raises(ValueError, match=r'crop_size=32, .* convert with protocol="training"'):
            published_protocol("ade20k", 32)

    def test_means_and_deviations_are_rounded_on_the_scale_of_255(self, tmp_path):
        for name, kind in (("sa_deit_distilled", "deit"), ("ca_vit", "vit")):
            _, image_processor = convert_checkpoint(variant(tmp_path, name))
            mean, std = STATISTICS[kind]
            assert (255 * np.array(image_processor.image_mean)).tolist() == pytest.approx(mean, abs=1e-12)
            assert (255 * np.array(image_processor.image_std)).tolist() == pytest.approx(std, abs=1e-12)

    def test_training_protocol_follows_inference_kwargs(self, tmp_path):
        folder = variant(tmp_path, "ca_vit")
        model, image_processor = convert_checkpoint(folder, protocol="training")
        assert (model.config.window_size, model.config.window_stride) == (64, 48)
        assert dict(image_processor.size) == {"shortest_edge": 80}
        _, image_processor = convert_checkpoint(folder, protocol="training", im_size=96)
        assert dict(image_processor.size) == {"shortest_edge": 96}

    def test_another_data_set_gets_its_own_sizes_and_a_line(self, tmp_path, caplog):
        folder = variant(tmp_path, "ca_vit", dataset="kitti")
        with caplog.at_level(logging.WARNING, logger="depict_hf.conversion"):
            model, image_processor = convert_checkpoint(folder)
        assert (model.config.window_size, model.config.window_stride) == (64, 32)
        assert dict(image_processor.size) == {"shortest_edge": 80}
        assert "data set kitti is none of those" in caplog.text and "is not bounded" in caplog.text
        _, image_processor = convert_checkpoint(folder, im_size=100)
        assert dict(image_processor.size) == {"shortest_edge": 100}
        caplog.clear()
        convert_checkpoint(folder, protocol="training")
        convert_checkpoint(variant(tmp_path / "known", "ca_vit"))
        assert not caplog.text

    def test_a_variant_without_a_data_set_is_known_by_its_classes(self, tmp_path):
        for name, expected in (
            ("cbsa", {"shortest_edge": 512, "longest_edge": 2048}),
            ("ca_vit", {"shortest_edge": 80}),
        ):
            conversion = convert_with_report(variant(tmp_path, name, dataset=None))
            assert dict(conversion.image_processor.size) == expected
            assert (conversion.warning is None) == (name == "cbsa")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"protocol": "paper"}, "Got protocol='paper', needed one of published, training"),
            ({"im_size": 0}, "Got im_size=0, needed a positive number"),
        ],
    )
    def test_options_that_do_not_exist(self, options, message):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(PUBLISHED / "ca_vit", **options)
