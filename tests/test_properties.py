"""Properties that hold for any input, against naive references in float64 that are written here in loops.

`PROPERTY_EXAMPLES=5000 pytest tests/test_properties.py` tries so many inputs of each, and others each time; without it
they are few, and the same ones.
"""

import math
import os
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from depict_hf import DepictConfig, DepictImageProcessor
from depict_hf.resampling import axis_operator, resize_bilinear
from depict_hf.windows import (
    CoarseScores,
    cut_windows,
    enlarged_size,
    label_map,
    label_views,
    merge_windows,
    pad_to_multiple,
    window_corners,
    window_starts,
)

MANY = os.environ.get("PROPERTY_EXAMPLES")
settings.register_profile(
    "properties", deadline=None, database=None, derandomize=MANY is None, max_examples=int(MANY or 25)
)
settings.load_profile("properties")

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 24)
NAMES = st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1, max_size=12)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize `(h, w)` bilinearly, pixel by pixel: centres of pixels meet, and beyond the border lies the border."""
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            places = []
            for index, old, new in ((row, image.shape[0], height), (column, image.shape[1], width)):
                place = min(max((index + 0.5) * old / new - 0.5, 0), old - 1)
                low = min(int(place), old - 1)
                places.append((low, min(low + 1, old - 1), place - low))
            (top, bottom, down), (left, right, across) = places
            upper = (1 - across) * image[top, left] + across * image[top, right]
            lower = (1 - across) * image[bottom, left] + across * image[bottom, right]
            result[row, column] = (1 - down) * upper + down * lower
    return result


@st.composite
def tilings(draw) -> tuple[tuple[int, int], int, int]:
    """An image's (height, width), and the size and stride of windows on it."""
    window = draw(st.integers(1, 12))
    size = (draw(st.integers(window, 20)), draw(st.integers(window, 20)))
    return size, window, draw(st.integers(1, window))


class TestWindows:
    @given(tilings())
    def test_every_pixel_is_in_a_window_and_none_reaches_out(self, tiling):
        (height, width), window, stride = tiling
        covered = np.zeros((height, width), int)
        corners = window_corners((height, width), window, stride)
        for top, left in corners:
            assert 0 <= top <= height - window and 0 <= left <= width - window
            covered[top : top + window, left : left + window] += 1
        assert covered.all() and corners == sorted(set(corners))
        starts = window_starts(height, window, stride)
        assert all(0 < later - earlier <= stride for earlier, later in pairwise(starts))

    @given(tilings(), st.integers(1, 6), SEEDS)
    def test_merging_is_the_average_of_enlarged_windows(self, tiling, grid, seed):
        """Fails if windows are weighted, misplaced by a pixel, or enlarged after they are merged."""
        size, window, stride = tiling
        corners = window_corners(size, window, stride)
        logits = [noise(seed + index, 1, 2, grid, grid) for index in range(len(corners))]
        total, count = np.zeros((2, *size)), np.zeros(size)
        for (top, left), each in zip(corners, logits, strict=True):
            for label in range(2):
                enlarged = resized(each[0, label].double().numpy(), window, window)
                total[label, top : top + window, left : left + window] += enlarged
            count[top : top + window, left : left + window] += 1
        merged = merge_windows(logits, corners, size, window)[0].double().numpy()
        np.testing.assert_allclose(merged, total / count, atol=1e-5)

    @given(tilings(), SEEDS)
    def test_what_was_cut_is_merged_to_itself(self, tiling, seed):
        size, window, _ = tiling
        image, corners = noise(seed, 1, 3, *size), window_corners(*tiling)
        merged = merge_windows(cut_windows(image, corners, window)[:, None], corners, size, window)
        torch.testing.assert_close(merged, image)

    @given(SIDES, SIDES, st.integers(1, 9), SEEDS)
    def test_padding_reaches_the_next_multiple_with_zeros(self, height, width, multiple, seed):
        image = noise(seed, 1, 1, height, width)
        padded = pad_to_multiple(image, multiple)
        tall, wide = padded.shape[-2:]
        assert tall % multiple == wide % multiple == 0 and tall - height < multiple > wide - width
        assert torch.equal(padded[..., :height, :width], image)
        assert not padded[..., height:, :].any() and not padded[..., width:].any()

    @given(SIDES, SIDES, SIDES)
    def test_enlarging_fits_the_window_and_keeps_the_shape(self, height, width, window):
        tall, wide = enlarged_size(height, width, window)
        assert min(tall, wide) == max(window, min(height, width))
        if min(height, width) < window:
            longer = max(height, width) * window / min(height, width)
            assert longer - 1 < max(tall, wide) <= longer + 1e-9
        else:
            assert (tall, wide) == (height, width)


class TestResizing:
    @given(SIDES, SIDES, SIDES, SIDES, SEEDS)
    def test_as_pixel_by_pixel(self, height, width, new_height, new_width, seed):
        image = noise(seed, 1, 1, height, width)
        expected = resized(image[0, 0].double().numpy(), new_height, new_width)
        got = resize_bilinear(image, (new_height, new_width))[0, 0].double().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5)

    @given(tilings(), st.integers(1, 6), SIDES)
    def test_matrices_of_an_axis_average(self, tiling, grid, target):
        """Fails if any pixel is not an average of scores: then constant scores would not stay constant."""
        (length, _), window, stride = tiling
        matrix = axis_operator(grid, window_starts(length, window, stride), window, length, target, torch.float64)
        assert matrix.shape[0] == target and matrix.min() >= -1e-12
        np.testing.assert_allclose(matrix.sum(dim=1), 1, atol=1e-9)

    @given(SIDES, SIDES, st.integers(1, 40), st.sampled_from([None, 1, 2, 5]), SEEDS)
    def test_of_the_image_processor(self, height, width, shortest, factor, seed):
        """The size keeps the proportions up to a pixel, and uint8 photographs are rounded as the reference."""
        size = {"shortest_edge": shortest} | ({} if factor is None else {"longest_edge": shortest * factor})
        processor = DepictImageProcessor(size=size, do_rescale=False, do_normalize=False)
        photo = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        pixels = processor(PIL.Image.fromarray(photo), return_tensors="pt")["pixel_values"][0].double().numpy()
        scale = shortest / min(height, width)
        if factor is not None:
            scale = min(scale, shortest * factor / max(height, width))
        for got, old in zip(pixels.shape[1:], (height, width), strict=True):
            assert abs(got - old * scale) <= 1 and got >= 1
        for channel in range(3):
            expected = resized(photo[..., channel].astype(float), *pixels.shape[1:])
            assert np.abs(pixels[channel] - expected).max() <= 0.5 + 1e-3


class TestLabels:
    @given(tilings(), st.integers(1, 4), st.integers(2, 5), st.booleans(), SEEDS)
    def test_the_largest_score_of_any_pixel(self, tiling, grid, num_labels, mirrored, seed):
        """Fails if bands are put together wrongly, a mirror image is not mirrored back, or classes are exchanged."""
        size, window, stride = tiling
        corners = window_corners(size, window, stride)
        logits = [noise(seed + index, num_labels, grid, grid) for index in range(len(corners))]
        target = (size[1] + 3, size[0] + 1)
        view = CoarseScores.from_windows(logits, corners, (window, window), size, target, mirrored)
        whole = merge_windows([each[None].double() for each in logits], corners, size, window)[0].numpy()
        scores = np.stack([resized(each, *target) for each in whole])
        scores = scores[..., ::-1] if mirrored else scores
        labels = label_map([view]).numpy()
        chosen = np.take_along_axis(scores, labels[None].astype(int), 0)[0]
        np.testing.assert_allclose(chosen, scores.max(0), atol=1e-5)

    @given(st.integers(1, 3), st.integers(2, 5), st.floats(0.1, 10), SEEDS)
    def test_confidence_is_a_probability(self, num_views, num_labels, temperature, seed):
        logits = [3 * noise(seed + index, num_labels, 4, 3) for index in range(num_views)]
        views = [CoarseScores.from_windows([each], [(0, 0)], (8, 6), (8, 6), (5, 7)) for each in logits]
        found = label_views(views, return_confidence=True, temperature=temperature)
        probabilities, tempered = np.zeros((num_labels, 5, 7)), np.zeros((num_labels, 5, 7))
        for each in logits:
            full = np.stack([resized(resized(one.double().numpy(), 8, 6), 5, 7) for one in each])
            for total, scale in ((probabilities, 1.0), (tempered, temperature)):
                powers = np.exp((full - full.max(0)) / scale)
                total += powers / powers.sum(0) / num_views
        labels = found.labels.numpy().astype(int)[None]
        np.testing.assert_allclose(np.take_along_axis(probabilities, labels, 0)[0], probabilities.max(0), atol=1e-5)
        confidence = np.take_along_axis(tempered, labels, 0)[0]
        np.testing.assert_allclose(found.confidence.numpy(), confidence, atol=1e-5)
        others = tempered.copy()
        np.put_along_axis(others, labels, -1, 0)
        np.testing.assert_allclose(found.margin.numpy(), confidence - others.max(0), atol=1e-5)


class TestSegmentationMaps:
    @given(st.integers(2, 200), SIDES, SIDES, st.booleans(), SEEDS)
    def test_ids_of_every_mode_are_the_same(self, num_labels, height, width, reduce_labels, seed):
        """Fails if a mode changes ids, or 255 is taken for a class where labels go down by one."""
        ids = np.random.default_rng(seed).integers(0, num_labels + 1, (height, width)).astype(np.uint8)
        ids[ids == num_labels] = 255
        expected = ids.astype(np.int64)
        if reduce_labels:
            for row in range(height):
                for column in range(width):
                    value = ids[row, column]
                    expected[row, column] = 255 if value in (0, 255) else value - 1
        grey = PIL.Image.fromarray(ids)
        palette = grey.copy()
        palette.putpalette([each for index in range(256) for each in (255 - index, index, 7)])
        processor = DepictImageProcessor(do_resize=False, do_reduce_labels=reduce_labels)
        photo = PIL.Image.new("RGB", grey.size)
        for given_map in (
            grey,
            palette,
            PIL.Image.merge("RGB", [grey] * 3),
            PIL.Image.merge("LA", [grey, PIL.Image.new("L", grey.size, 255)]),
            PIL.Image.fromarray(ids.astype(np.int32)),
            PIL.Image.fromarray(ids.astype(np.uint16)),
            PIL.Image.fromarray(ids.astype(np.float32)),
            ids.astype(np.int16),
            torch.from_numpy(ids),
        ):
            [labels] = processor(photo, segmentation_maps=given_map, return_tensors="pt")["labels"]
            assert np.array_equal(labels.numpy(), expected)

    @given(st.integers(1, 200), SEEDS)
    def test_ids_of_data_sets(self, num_labels, seed):
        from training.data.reading import LabelEncoding

        rng = np.random.default_rng(seed)
        table = {int(key): int(rng.choice([255, rng.integers(0, num_labels)])) for key in rng.integers(0, 300, 9)}
        encoding = LabelEncoding.from_table(table)
        meant = {**table, 255: 255}
        ids = rng.choice([*meant], (4, 5))
        assert encoding.decode(ids).tolist() == [[meant[each] for each in row] for row in ids.tolist()]
        other = next(each for each in range(400) if each not in meant)
        with pytest.raises(ValueError, match=rf"Got label ids \[{other}\]"):
            encoding.decode(np.full((2, 2), other))
        assert encoding.meaningless(range(-2, 400)) == [each for each in range(-2, 400) if each not in meant]


class TestMetrics:
    @given(st.integers(2, 7), st.integers(1, 3), st.booleans(), SEEDS)
    def test_as_counted_pixel_by_pixel(self, num_labels, num_images, reduce_labels, seed):
        """Fails if ignored pixels count, absent classes become 0, or images are averaged instead of their counts."""
        from training.evaluation.metrics import MeanIoU

        rng = np.random.default_rng(seed)
        metric = MeanIoU(num_labels, reduce_labels=reduce_labels)
        intersection, predicted, true = np.zeros((3, num_labels))
        for _ in range(num_images):
            shape = tuple(rng.integers(1, 6, 2))
            prediction = rng.integers(0, num_labels, shape)
            reference = rng.integers(0, num_labels + reduce_labels, shape)
            reference[rng.random(shape) < 0.2] = 255
            metric.add_batch(predictions=[prediction], references=[reference])
            for guess, truth in zip(prediction.ravel(), reference.ravel(), strict=True):
                truth = truth if truth == 255 or not reduce_labels else truth - 1 if truth else 255
                if truth != 255:
                    intersection[guess] += guess == truth
                    predicted[guess] += 1
                    true[truth] += 1
        found = metric.compute()
        with np.errstate(invalid="ignore"):
            iou = intersection / (predicted + true - intersection)
            accuracy = intersection / true
        np.testing.assert_allclose(found["per_category_iou"], iou, atol=1e-12)
        np.testing.assert_allclose(found["per_category_accuracy"], accuracy, atol=1e-12)
        for name, values in (("mean_iou", iou), ("mean_accuracy", accuracy)):
            mean = np.nanmean(values) if not np.isnan(values).all() else math.nan
            np.testing.assert_allclose(found[name], mean, atol=1e-12)
        total = true.sum()
        overall = intersection.sum() / total if total else math.nan
        np.testing.assert_allclose(found["overall_accuracy"], overall, atol=1e-12)

    @given(st.integers(2, 6), st.integers(1, 60), SEEDS)
    def test_calibration_as_counted_pixel_by_pixel(self, num_labels, count, seed):
        from training.evaluation.calibration import Calibration

        scores = 2 * noise(seed, count, num_labels)
        labels = torch.randint(num_labels, (count,), generator=torch.Generator().manual_seed(seed))
        calibration = Calibration(num_bins=5)
        calibration.add(scores[:, None], labels)
        figures = calibration.figures()
        bins = [[] for _ in range(5)]
        surprise, squares = 0.0, 0.0
        for values, label in zip(scores.double().tolist(), labels.tolist(), strict=True):
            powers = [math.exp(value - max(values)) for value in values]
            probabilities = [power / sum(powers) for power in powers]
            best = max(range(num_labels), key=probabilities.__getitem__)
            bins[min(int(probabilities[best] * 5), 4)].append((probabilities[best], best == label))
            surprise -= math.log(probabilities[label])
            squares += sum((each - (index == label)) ** 2 for index, each in enumerate(probabilities))
        gaps = [abs(sum(each for each, _ in one) - sum(right for _, right in one)) for one in bins if one]
        assert figures["expected_calibration_error"] == pytest.approx(sum(gaps) / count, abs=1e-5)
        assert figures["negative_log_likelihood"] == pytest.approx(surprise / count, rel=1e-5)
        assert figures["brier_score"] == pytest.approx(squares / count, rel=1e-4)


class TestConfiguration:
    @given(
        st.integers(1, 4),
        st.integers(1, 16),
        st.integers(1, 16),
        st.lists(
            st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1), min_size=2, max_size=6, unique=True
        ),
        st.one_of(st.none(), st.integers(16, 64)),
        st.floats(1e-3, 1e3),
    )
    def test_comes_back_from_its_file(self, heads, width, patch, names, window, temperature):
        fields = {"num_attention_heads": heads, "hidden_size": heads * width, "patch_size": patch}
        config = tiny_config(
            **fields,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            window_size=window,
            window_stride=window and window // 2,
            temperature=temperature,
        )
        again = DepictConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert list(again.id2label.values()) == names
        assert config.grid_size == (32 // patch, 32 // patch)

    @given(st.sampled_from(["hidden_size", "num_hidden_layers", "patch_size", "decoder_head_dim"]), st.data())
    def test_numbers_out_of_range_are_refused_by_name(self, name, data):
        value = data.draw(st.one_of(st.integers(max_value=0), st.integers(min_value=2**17)))
        with pytest.raises(ValueError, match=name):
            tiny_config(**{name: value})

    @given(st.integers(1, 200), st.integers(1, 200))
    def test_strides_never_leave_pixels_out(self, window, stride):
        patch = 8
        if patch <= window >= stride:
            assert tiny_config(window_size=window, window_stride=stride).window_stride == stride
        else:
            with pytest.raises(ValueError, match="window"):
                tiny_config(window_size=window, window_stride=stride)


class TestRecipes:
    @given(
        st.integers(1, 64),
        st.integers(1, 8),
        st.floats(1e-6, 1.0),
        st.lists(st.text("abcdefgh ", min_size=1).filter(str.strip), min_size=2, max_size=5, unique_by=str.strip),
    )
    def test_overrides_are_what_their_text_says(self, batch_size, accumulation, rate, names):
        from training.recipes import camvid_dinov2_small
        from training.settings import text_of

        recipe = camvid_dinov2_small("sa")
        fields = {
            "batch_size": batch_size * accumulation,
            "accumulation_steps": accumulation,
            "learning_rate": rate,
            "final_learning_rate": rate / 2,
            "class_names": tuple(names),
        }
        overridden = recipe.override([f"{name}={text_of(value)}" for name, value in fields.items()])
        assert {name: overridden.value(name) for name in fields} == fields
        assert overridden == recipe.replace(**fields)
        assert overridden.images_per_pass(1) == batch_size


class TestLayouts:
    @given(st.lists(st.sampled_from(["train", "val", "test"]), min_size=1, max_size=6), st.booleans(), SEEDS)
    def test_pairs_find_each_other_in_either_order_of_folders(self, splits, split_first, seed):
        """Fails if a photograph meets another's label map, or a split's name is read from elsewhere."""
        import tempfile
        from pathlib import Path

        from training.data.formats import Tree, find_format

        rng = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as place:
            expected: dict[str, set[tuple[str, str]]] = {}
            for index, split in enumerate(splits):
                stem = f"{rng.integers(10**6)}-{index}"
                files = []
                for kind, shape in (("images", (4, 5, 3)), ("masks", (4, 5))):
                    parts = (split, kind) if split_first else (kind, split)
                    path = Path(place, *parts, f"{stem}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    PIL.Image.fromarray(np.full(shape, index, np.uint8)).save(path)
                    files.append(str(path))
                expected.setdefault({"val": "validation"}.get(split, split), set()).add(tuple(files))
            found = find_format(Tree(Path(place)))
        pairs = {name: {(str(image), str(labels)) for image, labels in each} for name, each in found.pairs.items()}
        assert pairs == expected

    @given(st.integers(3, 40), st.integers(0, 5), SEEDS)
    def test_splits_that_are_made_depend_on_names_alone(self, count, more, seed):
        """Fails if the order of photographs matters, many change their split when others come, or one is empty."""
        from training.data.splitting import SHARES, assign

        names = [f"{seed}-{index}" for index in range(count + more)]
        before, after = assign(names[:count], SHARES), assign(names, SHARES)
        assert set(before) == set(SHARES)
        assert assign(names[::-1], SHARES) == after[::-1]
        # But for those that were moved since a split would have been empty.
        assert sum(old != new for old, new in zip(before, after, strict=False)) <= len(SHARES) - 1
