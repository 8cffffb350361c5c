"""The protocol, step by step in plain tensor operations, against `segment`; what shares a pass; files and threads."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import DECODER_TYPES, ONE_LAYER, tiny_model
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend

from depict_hf import DepictImageProcessor, resampling
from depict_hf.inference import load_photo, segment, segment_files, segment_stream
from depict_hf.windows import CoarseScores, label_views
from training.evaluation.measurement import peak_extra_bytes


@pytest.fixture
def photo() -> PIL.Image.Image:
    """A smooth random photograph of 50 x 70 (height x width)."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((70, 50), PIL.Image.Resampling.BICUBIC)


def window_model(**overrides):
    return tiny_model("ca", window_size=32, window_stride=20, **overrides)


def resize(image, size):
    return F.interpolate(image, size, mode="bilinear", align_corners=False)


def test_single_scale_goes_by_way_of_the_inputs_size(photo, image_processor):
    model = window_model()
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float()
    pixels = (resize(pixels, (32, 45)).round() / 255 - 0.5) / 0.5
    expected = resize(model(pixels).logits, (50, 70)).argmax(dim=1)[0]
    [segmentation] = segment(model, image_processor, [photo])
    assert segmentation.dtype == torch.int64
    assert torch.equal(segmentation, expected)

    # One window: logits on the patch grid, which are brought to the window's size first.
    square = photo.crop((0, 0, 50, 50))
    pixels = image_processor(square, return_tensors="pt")["pixel_values"]
    expected = resize(resize(model(pixels).logits, (32, 32)), (50, 50)).argmax(dim=1)[0]
    assert torch.equal(segment(model, image_processor, [square])[0], expected)


def test_scales_and_flips_are_averaged_as_probabilities(photo, image_processor):
    """At scale 0.5 the image (16 x 22) is enlarged to the window; mirror images are mirrored back."""
    model = window_model()
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float()
    total = 0
    for size, enlarged in (((16, 22), (32, 44)), ((48, 67), (48, 67))):
        scaled = (resize(pixels, size).round() / 255 - 0.5) / 0.5
        for mirror in (False, True):
            image = resize(scaled.flip(-1) if mirror else scaled, enlarged)
            logits = resize(model(image).logits, (50, 70))
            total = total + (logits.flip(-1) if mirror else logits).softmax(dim=1)
    [segmentation] = segment(model, image_processor, [photo], scales=(0.5, 1.5), flip=True)
    assert (segmentation == total.argmax(dim=1)[0]).float().mean() > 0.999


def test_a_mirrored_photograph_gives_the_mirrored_map(photo, image_processor):
    model = tiny_model()
    mirrored = photo.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    plain, back = segment(model, image_processor, [photo, mirrored], flip=True)
    assert (plain.flip(-1) == back).float().mean() > 0.99


def test_paths_arrays_and_images_agree(photo, image_processor, tmp_path):
    photo.save(tmp_path / "photo.png")
    maps = segment(tiny_model(), image_processor, [photo, np.array(photo), tmp_path / "photo.png"])
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])


def test_photographs_are_turned_upright(photo, image_processor, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    photo.save(tmp_path / "turned.png", exif=exif)
    upright = photo.transpose(PIL.Image.Transpose.ROTATE_270)
    assert np.array_equal(np.array(load_photo(tmp_path / "turned.png")), np.array(upright))
    expected, from_file, from_image = segment(
        tiny_model(),
        image_processor,
        [upright, str(tmp_path / "turned.png"), PIL.Image.open(tmp_path / "turned.png")],
    )
    assert expected.shape == (70, 50)
    assert torch.equal(from_file, expected) and torch.equal(from_image, expected)


def test_a_fixed_size_and_a_longest_edge_scale_too(photo):
    model = tiny_model()
    for size in ({"height": 32, "width": 40}, {"shortest_edge": 32, "longest_edge": 40}):
        [segmentation] = segment(model, DepictImageProcessor(size=size), [photo], scales=(1.0, 2.0))
        doubled = {name: 2 * side for name, side in size.items()}
        logits = []
        for each in (size, doubled):
            pixels = DepictImageProcessor(size=each)(photo, return_tensors="pt")["pixel_values"]
            logits.append(resize(resize(model(pixels).logits, pixels.shape[-2:]), (50, 70)).softmax(dim=1))
        assert torch.equal(segmentation, (logits[0] + logits[1]).argmax(dim=1)[0])


def test_sixteen_bit_photographs_keep_their_contrast(tmp_path):
    ramp = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    PIL.Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = np.array(load_photo(tmp_path / "deep.png"))
    assert pixels.shape == (40, 50, 3)
    assert np.array_equal(pixels[..., 0], np.round(ramp / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("photo.png", {}, r"Got one str, needed a list of photographs"),
        ([np.zeros((4, 5), np.uint8)], {}, r"shape \(4, 5\) and dtype uint8, needed uint8 \(height, width, 3\)"),
        ([np.zeros((4, 5, 3))], {}, "dtype float64"),
        ([torch.zeros(3, 4, 5)], {}, "Got a Tensor, needed a PIL image"),
        ([], {"scales": ()}, "needed one or more positive numbers"),
        ([], {"scales": (1.0, -1.0)}, "needed one or more positive numbers"),
        ([], {"max_batch_pixels": 0}, "Got max_batch_pixels=0, needed at least 1"),
    ],
)
def test_wrong_arguments_are_refused(images, options, message, image_processor):
    with pytest.raises(ValueError, match=message):
        segment(tiny_model(), image_processor, images, **options)


def test_training_mode_and_scales_without_resizing_are_refused(photo):
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        segment(tiny_model().train(), DepictImageProcessor(), [photo])
    with pytest.raises(ValueError, match="does not resize"):
        segment(tiny_model(), DepictImageProcessor(do_resize=False), [photo], scales=(0.5,))


def random_photos(*sizes) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture
def passes(monkeypatch):
    """(model, list of the shapes of its inputs) with windows of 32 pixels, stride 20."""
    model, shapes = window_model(), []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    return model, shapes


def test_windows_of_photographs_scales_and_flips_share_passes(passes, image_processor):
    """32 x 64 pixels have 3 windows, 32 x 32 one, at scale 2 18 and 9 more; each twice for the mirror image."""
    model, shapes = passes
    photos = random_photos((32, 64), (32, 32), (32, 64))
    segment(model, image_processor, photos)
    assert shapes == [(7, 3, 32, 32)]
    shapes.clear()
    segment(model, image_processor, photos[:2], scales=(1.0, 2.0), flip=True)
    assert shapes == [(2 * (3 + 1 + 18 + 9), 3, 32, 32)]


@pytest.mark.parametrize("windows_per_pass", [1, 2, 5])
def test_passes_keep_within_the_bound_and_change_nothing(windows_per_pass, passes, image_processor):
    model, shapes = passes
    photos = random_photos((32, 64), (70, 50), (32, 32), (50, 70))
    expected = segment(model, image_processor, photos, flip=True)
    shapes.clear()
    bound = windows_per_pass * 32 * 32 + 100
    found = segment(model, image_processor, photos, flip=True, max_batch_pixels=bound)
    assert max(batch for batch, *_ in shapes) == windows_per_pass
    for each, other in zip(found, expected, strict=True):
        assert (each == other).float().mean() > 0.999


def test_images_of_different_sizes_wait_for_their_like(image_processor):
    """Without windows, whole images of one size share a pass, in whichever order they come."""
    model, shapes = tiny_model(), []
    photos = random_photos((32, 48), (48, 32), (32, 48), (48, 32), (32, 32))
    expected = [segment(model, image_processor, [photo])[0] for photo in photos]
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    found = segment(model, image_processor, photos)
    assert sorted(shapes) == [(1, 3, 32, 32), (2, 3, 32, 48), (2, 3, 48, 32)]
    for each, other in zip(found, expected, strict=True):
        assert (each == other).float().mean() > 0.999


def test_a_stream_takes_photographs_only_as_it_needs_them(image_processor):
    taken = []

    def photos():
        for photo in random_photos(*[(32, 32)] * 6):
            taken.append(photo)
            yield photo

    maps = segment_stream(tiny_model(), image_processor, photos(), max_batch_pixels=2 * 32 * 32)
    next(maps)
    assert len(taken) == 2
    assert len(list(maps)) == 5


def test_files_come_back_in_order_with_their_errors(photo, image_processor, tmp_path):
    """Unreadable files at the start, in the middle and at the end; what is written comes from another thread."""
    names = ["no.png", "a.png", "broken.png", "b.png", "c.png", "none.png"]
    for name, angle in (("a", 0), ("b", 90), ("c", 180)):
        photo.rotate(angle, expand=True).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    model, threads = tiny_model(), set()

    def finish(path, upright, labels):
        threads.add(threading.current_thread())
        return path.name, upright.size, labels

    files = list(segment_files(model, image_processor, [tmp_path / name for name in names], finish))
    assert [file.path.name for file in files] == names
    assert [isinstance(file.error, OSError) for file in files] == [True, False, True, False, False, True]
    expected = segment(model, image_processor, [tmp_path / f"{name}.png" for name in "abc"])
    for file, labels in zip([files[1], files[3], files[4]], expected, strict=True):
        name, size, found = file.result
        assert (name, size[::-1]) == (file.path.name, tuple(labels.shape))
        assert torch.equal(found, labels)
    assert threading.current_thread() not in threads


def test_what_finishing_raises_is_not_swallowed(photo, image_processor, tmp_path):
    photo.save(tmp_path / "photo.png")

    def finish(path, upright, labels):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list(segment_files(tiny_model(), image_processor, [tmp_path / "photo.png"], finish))


@pytest.mark.parametrize(
    ("decoder_type", "windows"),
    [*((each, {}) for each in DECODER_TYPES), ("sa", {"window_size": 32, "window_stride": 20})],
)
def test_a_compiled_model_is_not_compiled_anew_for_each_photograph(decoder_type, windows, image_processor):
    """No graph breaks, and three graphs: one for the first size, one for any, one for square images or single ones.

    Up to PyTorch 2.9 it is one more.
    """
    model = tiny_model(decoder_type, **ONE_LAYER, **windows)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    sizes = [(50, 70), (70, 50), (64, 90), (41, 41), (45, 97), (80, 60), (33, 120), (52, 52), (100, 47)]
    for photo in random_photos(*sizes):
        labels = segment(compiled, image_processor, [photo])[0]
        assert (labels == segment(model, image_processor, [photo])[0]).float().mean() > 0.999
    assert 1 <= counter.frame_count <= (3 if Version(torch.__version__) >= Version("2.10") else 4)
    torch.compiler.reset()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_no_scores_of_all_classes_at_full_size(image_processor):
    """A photograph of 2 megapixels and 150 classes: all scores at its size would be 1.2 GB."""
    model = tiny_model("linear", num_labels=150)
    [photo] = random_photos((1000, 2000))
    segment(model, image_processor, [photo])
    assert peak_extra_bytes(lambda: segment(model, image_processor, [photo])) < 2e8
    assert peak_extra_bytes(lambda: segment(model, image_processor, [photo], return_confidence=True)) < 2e8
    assert peak_extra_bytes(lambda: segment(model, image_processor, [photo], scales=(1.0, 1.5), flip=True)) < 2e8


def step(model, pixel_values, labels) -> torch.Tensor:
    """Gradient of the position embeddings in one training step."""
    model.zero_grad()
    model.train()(pixel_values, labels=labels).loss.backward()
    return model.encoder.embeddings.position_embeddings.grad.clone()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """A grid of 4 x 6 patches, which the position embeddings (4 x 4) are resized to."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 3, 32, 48, generator=generator), torch.randint(0, 5, (1, 32, 48), generator=generator)


def test_training_beside_an_open_stream_keeps_its_gradients(image_processor, batch):
    """A step of the same model after each photograph of a stream whose grid is the step's."""
    model = tiny_model("ca")
    expected = step(model, *batch)
    assert expected.abs().max() > 0
    labels = segment_stream(model.eval(), image_processor, random_photos(*[(32, 48)] * 12), max_batch_pixels=1)
    for _ in labels:
        assert torch.equal(step(model, *batch), expected)
        model.eval()


def test_training_beside_another_thread_keeps_its_gradients(image_processor, batch):
    """Fails if anything that depends on the weights is left on the model, or shared, by a call of `segment`."""
    model = tiny_model("ca").train()
    expected = step(model, *batch)
    over = threading.Event()
    shown = copy.copy(model)  # the same modules and weights; `training` alone is its own
    shown.training = False

    def run() -> int:
        calls = 0
        while not over.is_set() or not calls:
            segment(shown, image_processor, random_photos((32, 48), (48, 32)))
            calls += 1
        return calls

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run) for _ in range(2)]
        try:
            for _ in range(60):
                torch.testing.assert_close(step(model, *batch), expected, atol=1e-6, rtol=1e-5)
        finally:
            over.set()
        assert all(each.result() for each in running)


@pytest.mark.parametrize("return_confidence", [False, True])
def test_threads_give_what_one_gives(return_confidence, image_processor):
    """Eight threads, each with photographs of other sizes, on one model, all at once."""
    model = window_model()
    photos = [random_photos((40 + seed, 60), (70, 33 + 2 * seed)) for seed in range(8)]
    options = {"scales": (1.0, 1.5), "return_confidence": return_confidence}
    serial = [segment(model, image_processor, each, **options) for each in photos]
    resampling._kept.clear()
    start = threading.Barrier(8)

    def run(each) -> list:
        start.wait()
        return [segment(model, image_processor, each, **options) for _ in range(2)]

    with ThreadPoolExecutor(8) as pool:
        for expected, found in zip(serial, pool.map(run, photos), strict=True):
            for results in found:
                torch.testing.assert_close(results, expected, atol=0, rtol=0)


class TestConfidence:
    def probabilities(self, model, image_processor, photo, scales, flip, temperature) -> torch.Tensor:
        """`(num_labels, height, width)`, step by step at full size."""
        total, size = 0, photo.shape[:2]
        for scale in scales:
            pixels = image_processor(photo, size={"shortest_edge": int(32 * scale)}, return_tensors="pt")[
                "pixel_values"
            ]
            for mirror in (False, True) if flip else (False,):
                with torch.no_grad():
                    logits = model(pixels.flip(-1) if mirror else pixels).logits
                # By way of the resized photograph's own size, and of whole patches.
                padded = [-(-side // 8) * 8 for side in pixels.shape[-2:]]
                if logits.shape[-1] < pixels.shape[-1]:
                    logits = resize(logits, padded)[..., : pixels.shape[-2], : pixels.shape[-1]]
                logits = resize(logits, size) / temperature
                total = total + (logits.flip(-1) if mirror else logits).softmax(dim=1)[0]
        return total / (len(scales) * (1 + flip))

    @pytest.mark.parametrize("windows", [{}, {"window_size": 32, "window_stride": 20}])
    @pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0, 1.5), True)])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_is_the_probability_of_the_label(self, windows, scales, flip, temperature, image_processor, monkeypatch):
        """Fails if the margin is to another class than the next, views are averaged before the softmax, the
        temperature is left out or reaches the labels, or bands are put together wrongly."""
        monkeypatch.setitem(resampling.BAND_ELEMENTS, "cpu", 3000)
        model = tiny_model("ca", temperature=temperature, **windows)
        [photo] = random_photos((50, 70))
        options = {"scales": scales, "flip": flip}
        [plain] = segment(model, image_processor, [photo], **options)
        [result] = segment(model, image_processor, [photo], **options, return_confidence=True)
        assert torch.equal(result.labels, plain) and result.labels.dtype == torch.int64
        assert result.confidence.dtype == result.margin.dtype == torch.float32
        expected = self.probabilities(model, image_processor, photo, scales, flip, temperature)
        of_label = expected.gather(0, result.labels[None])
        others = expected.scatter(0, result.labels[None], 0).amax(dim=0)
        torch.testing.assert_close(result.confidence, of_label[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(result.margin, of_label[0] - others, atol=2e-5, rtol=0)

    def test_the_temperature_never_changes_a_label(self, image_processor):
        photos = random_photos((50, 70))
        maps = [
            segment(tiny_model("ca", temperature=temperature), image_processor, photos, (1.0, 1.5), True, **more)[0]
            for temperature, more in ((1.0, {}), (0.05, {}), (30, {}))
        ]
        assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])

    def test_a_margin_is_negative_where_the_temperature_prefers_another_class(self):
        """Two views: class 0 wins on average at temperature 1, class 1 where large logits count for less."""
        logits = torch.tensor([[8.0, 0.0, 0.0], [0.0, 2.0, -9.0]])
        views = [CoarseScores.from_windows([each[:, None, None]], [(0, 0)], (1, 1), (1, 1), (1, 1)) for each in logits]
        probabilities = (logits / 10).softmax(dim=1).mean(dim=0)
        result = label_views(views, True, 0.1), label_views(views, True, 10.0)
        assert [each.labels.item() for each in result] == [0, 0]
        torch.testing.assert_close(result[1].confidence[0, 0], probabilities[0])
        torch.testing.assert_close(result[1].margin[0, 0], probabilities[0] - probabilities[1])

    def test_one_class_is_certain(self):
        view = CoarseScores.from_windows([torch.randn(1, 2, 2)], [(0, 0)], (4, 4), (4, 4), (4, 4))
        for views in ([view], [view, view]):
            labels, confidence, margin = label_views(views, True)
            assert (labels == 0).all() and (confidence == 1).all() and (margin == 1).all()

    def test_equal_sizes(self):
        scores = torch.randn(5, 6, 7)
        view = CoarseScores.from_windows([scores], [(0, 0)], (6, 7), (6, 7), (6, 7))
        labels, confidence, margin = label_views([view], True)
        highest = scores.softmax(dim=0).topk(2, dim=0)
        assert torch.equal(labels.long(), highest.indices[0])
        torch.testing.assert_close(confidence, highest.values[0])
        torch.testing.assert_close(margin, highest.values[0] - highest.values[1])
        assert torch.equal(view.mosaic, scores.permute(1, 2, 0))  # which somebody else may hold

    def test_files_get_it_too(self, photo, image_processor, tmp_path):
        photo.save(tmp_path / "photo.png")
        [file] = segment_files(
            tiny_model(), image_processor, [tmp_path / "photo.png"], lambda *parts: parts[2], return_confidence=True
        )
        assert file.result.confidence.shape == file.result.labels.shape == (50, 70)


def test_unreadable_files_raise_oserror(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    with pytest.raises(OSError):
        load_photo(tmp_path / "broken.jpg")
