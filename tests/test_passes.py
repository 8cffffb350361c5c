"""What one photograph costs is bounded, and where memory is short for one of them the others are segmented."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictImageProcessor
from depict_hf.analysis import analyze
from depict_hf.explain import explain
from depict_hf.inference import segment, segment_files
from depict_hf.passes import is_out_of_memory

PROCESSOR = DepictImageProcessor(size={"shortest_edge": 32})
SHORT = RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.fixture
def paths(tmp_path):
    """Three photographs, the second of which is all black."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (5, 7, 3), np.uint8) for _ in range(3)]
    noise[1][:] = 0
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for array, file in zip(noise, files, strict=True):
        PIL.Image.fromarray(array).resize((70, 50)).save(file)
    return files


def maps_and_errors(model, paths, **options):
    results = list(segment_files(model, PROCESSOR, paths, lambda path, photo, labels: labels, **options))
    return [each.result for each in results], [each.error for each in results]


class TestBound:
    def test_a_narrow_photograph_is_refused_before_it_is_enlarged(self, paths):
        """By its short side, 5000 x 1 would become 3640000 x 728 pixels: 8 GB as bytes alone."""
        model, image_processor = tiny_model(), DepictImageProcessor(size={"shortest_edge": 728})
        narrow = PIL.Image.new("RGB", (5000, 1))
        message = (
            "it has 5000 x 1 pixels, which become 3640000 x 728 for the model, more than the 134217728 allowed; crop"
        )
        for use in (
            lambda: segment(model, image_processor, [narrow]),
            lambda: image_processor(narrow),
            lambda: analyze(model, image_processor, narrow),
            lambda: explain(model, image_processor, narrow),
        ):
            with pytest.raises(ValueError, match=message):
                use()

    def test_in_a_folder_it_is_that_files_error(self, paths):
        PIL.Image.new("RGB", (700, 1)).save(paths[1])
        model = tiny_model()
        limit = 70 * 50  # what the others have, and more than they are resized to
        maps, errors = maps_and_errors(model, paths, max_photo_pixels=limit)
        assert "which become 22400 x 32 for the model" in str(errors[1]) and errors[0] is errors[2] is None
        expected = segment(model, PROCESSOR, [paths[0], paths[2]])
        assert torch.equal(maps[0], expected[0]) and torch.equal(maps[2], expected[1])
        _, errors = maps_and_errors(model, [paths[0]], max_photo_pixels=limit - 1)
        assert "has 70 x 50 pixels, more than the 3499 allowed" in str(errors[0])

    @pytest.mark.parametrize(("scales", "window", "size"), [((0.5, 2.0), None, "90 x 64"), ((1.0,), 40, "56 x 40")])
    def test_every_scale_counts_and_the_enlargement_to_a_window(self, scales, window, size):
        model, photo = tiny_model(window_size=window), PIL.Image.new("RGB", (70, 50))
        pixels = int(np.prod([int(each) for each in size.split(" x ")]))
        assert segment(model, PROCESSOR, [photo], scales, max_photo_pixels=max(pixels, 3500))[0].shape == (50, 70)
        small = photo.resize((35, 25))
        with pytest.raises(ValueError, match=f"become {size} for the model"):
            segment(model, PROCESSOR, [small], scales, max_photo_pixels=pixels - 1)

    def test_it_is_a_setting_of_the_image_processor(self, paths):
        image_processor = DepictImageProcessor(size={"shortest_edge": 32}, max_photo_pixels=45 * 32 - 1)
        for use in (
            lambda: image_processor(PIL.Image.new("RGB", (70, 50))),
            lambda: segment(tiny_model(), image_processor, [PIL.Image.new("RGB", (35, 25))]),
        ):
            with pytest.raises(ValueError, match="more than the 1439 allowed"):
                use()
        assert len(image_processor(PIL.Image.new("RGB", (70, 50)), max_photo_pixels=45 * 32)["pixel_values"]) == 1
        for use in (
            lambda: DepictImageProcessor(max_photo_pixels=0),
            lambda: segment(tiny_model(), PROCESSOR, [], max_photo_pixels=0),
        ):
            with pytest.raises(ValueError, match="Got max_photo_pixels=0, needed at least 1"):
                use()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 5), (4, 3), (2, 150), (150, 4)])
@pytest.mark.parametrize("window", [None, 32])
def test_the_smallest_sizes_as_arrays_and_images(size, window):
    """Fails where the first axis of an array of 1, 3 or 4 rows is taken for its channels."""
    model, array = tiny_model(window_size=window), np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    labels, of_array = segment(model, PROCESSOR, [PIL.Image.fromarray(array), array])
    assert labels.shape == size and torch.equal(labels, of_array)


class TestMemory:
    @pytest.mark.parametrize("error", [SHORT, MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
    def test_a_pass_too_large_is_run_in_parts(self, error, paths, monkeypatch):
        model = tiny_model()
        expected = segment(model, PROCESSOR, paths)
        forward = model.forward

        def short_of_memory(pixel_values):
            if len(pixel_values) > 1:
                raise error
            return forward(pixel_values)

        monkeypatch.setattr(model, "forward", short_of_memory)
        for given, labels in zip(segment(model, PROCESSOR, paths), expected, strict=True):
            assert torch.equal(given, labels)

    @pytest.mark.parametrize("error", [SHORT, MemoryError()])
    @pytest.mark.parametrize("place", ["model", "copying", "resizing", "labelling", "finish"])
    def test_one_fails_alone(self, error, place, paths, monkeypatch):
        """The black one; fails if its neighbours, which share a pass with it, are lost or get its labels."""
        model = tiny_model()
        expected = segment(model, PROCESSOR, paths)

        def only_black(function, picture):
            def short_of_memory(*args, **options):
                if (picture(args) == picture(args).flatten()[0]).all():
                    raise error
                return function(*args, **options)

            return short_of_memory

        finish = lambda path, photo, labels: labels  # noqa: E731
        if place == "model":

            def forward(pixel_values, forward=model.forward):
                if (pixel_values[..., :16, :16].flatten(1).std(dim=1) < 1e-3).any():  # without padding
                    raise error
                return forward(pixel_values)

            monkeypatch.setattr(model, "forward", forward)
        elif place == "copying":
            copy = DepictImageProcessor.process_image

            def process_image(self, image, *args, **options):
                if isinstance(image, PIL.Image.Image) and not np.array(image).any():
                    raise error
                return copy(self, image, *args, **options)

            monkeypatch.setattr(DepictImageProcessor, "process_image", process_image)
        elif place == "resizing":
            resize = DepictImageProcessor.resize
            monkeypatch.setattr(DepictImageProcessor, "resize", only_black(resize, lambda args: args[1]))
        elif place == "labelling":
            label_views = segment.__globals__["label_views"]
            calls = iter(range(3))

            def second_fails(*args):
                if next(calls) == 1:
                    raise error
                return label_views(*args)

            monkeypatch.setattr("depict_hf.inference.label_views", second_fails)
        else:
            finish = only_black(finish, lambda args: np.array(args[1]))
        results = list(segment_files(model, PROCESSOR, paths, finish))
        assert [each.path for each in results] == paths
        assert torch.equal(results[0].result, expected[0]) and torch.equal(results[2].result, expected[2])
        assert results[1].result is None and isinstance(results[1].error, MemoryError)
        assert "not enough memory to segment its 70 x 50 pixels; lower max_batch_pixels" in str(results[1].error)
        assert results[0].error is results[2].error is None

    def test_a_list_of_photographs_ends_with_the_error(self, paths, monkeypatch):
        model = tiny_model()
        monkeypatch.setattr(model, "forward", lambda pixel_values: (_ for _ in ()).throw(SHORT))
        with pytest.raises(MemoryError, match="not enough memory to segment its 70 x 50 pixels"):
            segment(model, PROCESSOR, paths)

    def test_other_errors_of_a_model_come_through(self, paths, monkeypatch):
        model = tiny_model()
        monkeypatch.setattr(model, "forward", lambda pixel_values: (_ for _ in ()).throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            maps_and_errors(model, paths)
        assert not is_out_of_memory(RuntimeError("a bug")) and not is_out_of_memory(KeyboardInterrupt())


def test_notes_come_with_results_and_errors_keep_no_pictures(paths):
    first = PIL.Image.open(paths[0])
    first.save(paths[0].with_suffix(".gif"), save_all=True, append_images=[PIL.Image.new("RGB", (70, 50))])
    paths[2].write_bytes(paths[2].read_bytes()[:100])
    results = list(segment_files(tiny_model(), PROCESSOR, [paths[0].with_suffix(".gif"), *paths[1:]], lambda *parts: 1))
    assert "several pictures" in results[0].note and results[1].note is None
    assert results[2].error.__traceback__ is None and results[2].error.__cause__.__traceback__ is None
