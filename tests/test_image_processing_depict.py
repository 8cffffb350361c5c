"""Values that the image processor must give; the shapes and the saving of settings are Hugging Face's own tests."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from depict_hf import DepictImageProcessor

IDS = np.array([[0, 1, 2, 3], [3, 2, 255, 0], [7, 7, 0, 150]], dtype=np.uint8)
UNTOUCHED = {"do_resize": False, "do_rescale": False, "do_normalize": False}


@pytest.fixture
def photo():
    """(height, width, 3) uint8 of odd size, with its full range of values."""
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def channels_first(array):
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def pixels_of(image, **settings):
    """The only image's pixels as they are before resizing and normalising."""
    (pixels,) = DepictImageProcessor()(image, **UNTOUCHED, **settings)["pixel_values"]
    return pixels


def labels_of(segmentation_map, **settings):
    (labels,) = DepictImageProcessor()(np.zeros((3, 4, 3), np.uint8), segmentation_map, do_resize=False, **settings)[
        "labels"
    ]
    return labels


def palette(ids):
    image = PIL.Image.fromarray(ids, mode="P")
    image.putpalette([(index * 37) % 256 for index in range(768)])
    return image


def sixteen_bit(values, mode):
    values = np.asarray(values)
    return PIL.Image.frombytes(
        mode, values.shape[::-1], values.astype(">u2" if mode.endswith("B") else "<u2").tobytes()
    )


# --- images ---


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"shortest_edge": 19}, (19, 27)),  # 53 * 19 / 37 = 27.2
        ({"shortest_edge": 64}, (64, 92)),  # 91.7: rounded, not cut off
        ({"shortest_edge": 64, "longest_edge": 80}, (56, 80)),
        ({"height": 20, "width": 61}, (20, 61)),
        ({"shortest_edge": 37}, (37, 53)),
    ],
)
def test_uint8_is_resized_rounded_then_normalised(photo, size, expected, antialias):
    processor = DepictImageProcessor(size=size, do_antialias=antialias, image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)
    resized = F.interpolate(
        channels_first(photo)[None].float(), size=expected, mode="bilinear", align_corners=False, antialias=antialias
    )
    reference = resized.round().clamp(0, 255) / 255
    reference = (reference - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    for image in (PIL.Image.fromarray(photo), photo, channels_first(photo)):
        result = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-5)  # a grey level is 0.008
    assert processor.resize_size(37, 53) == expected


def test_floats_are_resized_without_rounding(photo):
    image = channels_first(photo).double() / 255
    (result,) = DepictImageProcessor(size=19)(image, do_rescale=False, do_normalize=False)["pixel_values"]
    reference = F.interpolate(image[None].float(), size=(19, 27), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(result, reference, rtol=0, atol=0)


@pytest.mark.parametrize("resample", [PIL.Image.NEAREST, PIL.Image.BICUBIC, PIL.Image.LANCZOS])
def test_other_filters_give_a_uniform_image_back(resample):
    image = np.full((9, 11, 3), 200, np.uint8)
    result = DepictImageProcessor(size=6)(image, resample=resample, do_rescale=False, do_normalize=False)
    assert torch.equal(result["pixel_values"][0], torch.full((3, 6, 7), 200, dtype=torch.uint8))


def test_size_can_be_overridden_for_one_call(photo):
    processor = DepictImageProcessor()
    assert processor(photo, size={"shortest_edge": 18})["pixel_values"][0].shape == (3, 18, 26)
    assert processor(photo)["pixel_values"][0].shape == (3, 512, 733)


GREY = np.array([[0, 1, 100, 128], [200, 254, 255, 3]], dtype=np.uint8)
GREY_16 = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(GREY),
        GREY,
        GREY[..., None],
        GREY[None],
        GREY[:, ::-1].astype(np.int64)[:, ::-1],
        torch.from_numpy(GREY),
        sixteen_bit(GREY_16, "I;16"),
        sixteen_bit(GREY_16, "I;16B"),
        PIL.Image.fromarray(GREY_16.astype(np.int32)),
        PIL.Image.fromarray(GREY.astype(np.int32)),
        GREY_16,
        GREY_16[..., None].repeat(3, -1).astype(">u2"),
        torch.from_numpy(GREY_16),
        np.dstack([GREY_16, GREY_16, GREY_16, np.full_like(GREY_16, 65535)]),
    ],
)
def test_grey_and_16_bit_photographs_become_8_bit_rgb(image):
    assert torch.equal(pixels_of(image), torch.from_numpy(GREY).expand(3, -1, -1))


def test_16_bit_values_are_rounded():
    image = np.array([[128, 129, 40000, 65535]], dtype=np.uint16)
    assert pixels_of(image)[0].tolist() == [[0, 1, 156, 255]]


@pytest.mark.parametrize("image", [GREY > 100, torch.from_numpy(GREY > 100), PIL.Image.fromarray(GREY > 100)])
def test_one_bit_photographs_become_black_and_white(image):
    assert pixels_of(image)[2].tolist() == [[0, 0, 0, 255], [255, 255, 255, 0]]


def test_transparency_is_laid_over_white_and_cmyk_is_converted():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[200, 255, 204]], [[100, 255, 204]], [[0, 255, 204]]]
    assert pixels_of(rgba).tolist() == pixels_of(PIL.Image.fromarray(rgba)).tolist() == expected
    grey = PIL.Image.fromarray(np.array([[[90, 255], [90, 0]]], dtype=np.uint8), mode="LA")
    assert pixels_of(grey).tolist() == [[[90, 255]]] * 3
    indexed = palette(np.array([[1, 0]], dtype=np.uint8))
    indexed.info["transparency"] = 0
    assert pixels_of(indexed).tolist() == [[[111, 255]], [[148, 255]], [[185, 255]]]
    assert pixels_of(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0))).tolist() == [[[255]], [[0]], [[0]]]


def test_images_of_different_sizes_give_a_list_that_only_stacks_at_a_fixed_size(photo):
    processor = DepictImageProcessor(size=18)
    images = [photo, photo[:, :40], photo]
    listed = processor(images, segmentation_maps=[image[..., 0] for image in images])
    assert [tuple(labels.shape) for labels in listed["labels"]] == [(18, 26), (18, 19), (18, 26)]
    for image, pixels in zip(images, listed["pixel_values"], strict=True):
        assert torch.equal(pixels, processor(image)["pixel_values"][0])
    grouped = processor(images, disable_grouping=False)["pixel_values"]
    assert all(torch.equal(one, other) for one, other in zip(grouped, listed["pixel_values"], strict=True))
    with pytest.raises(ValueError, match=r"\(18, 19\), \(18, 26\).*one image at a time, or set size="):
        processor(images, return_tensors="pt")
    assert processor(images, size={"height": 8, "width": 9}, return_tensors="pt")["pixel_values"].shape == (3, 3, 8, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 512}}, r"Got size=\{'longest_edge': 512\}; needed .* 'shortest_edge'"),
        ({"size": {"shortest_edge": 0}}, "Got size=.*positive"),
        ({"do_pad": True, "pad_size": 9}, "neither cropped nor padded"),
        ({"do_center_crop": True, "crop_size": 9}, "neither cropped nor padded"),
        ({"data_format": "channels_last"}, "Got data_format='channels_last'"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DepictImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        DepictImageProcessor()(GREY, **settings)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "Got no images"),
        (np.zeros((1, 2, 3, 4, 5)), r"Got an image of shape \(2, 3, 4, 5\); needed"),
        (np.zeros((0, 4, 3), np.uint8), r"Got an image of shape \(0, 4, 3\); needed .* none of them empty"),
        (np.array([[-1, 5]]), "values from -1 to 5; rescale"),
        (np.array([[0, 65536]]), "values from 0 to 65536; rescale"),
    ],
)
def test_unreadable_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        DepictImageProcessor()(images)


# --- segmentation maps ---


@pytest.mark.parametrize(
    "segmentation_map",
    [
        PIL.Image.fromarray(IDS),
        palette(IDS),
        sixteen_bit(IDS, "I;16"),
        sixteen_bit(IDS, "I;16B"),
        PIL.Image.fromarray(IDS.astype(np.int32)),
        PIL.Image.fromarray(np.dstack([IDS] * 3)),
        PIL.Image.fromarray(np.dstack([IDS] * 3 + [np.full_like(IDS, 255)])),
        PIL.Image.fromarray(np.dstack([IDS, np.full_like(IDS, 255)]), mode="LA"),
        IDS,
        IDS.astype(np.uint16),
        IDS.astype(np.float64),
        IDS[None],
        IDS[..., None],
        np.stack([IDS] * 3),
        np.dstack([IDS] * 3),
        torch.from_numpy(IDS).to(torch.int64),
        [torch.from_numpy(IDS)],
        IDS[None, None],
    ],
)
def test_every_kind_of_map_gives_the_same_ids(segmentation_map):
    labels = labels_of(segmentation_map)
    assert labels.dtype == torch.int64
    assert labels.tolist() == IDS.tolist()


def test_one_bit_and_16_bit_maps():
    assert labels_of(PIL.Image.fromarray(IDS > 6)).tolist() == (IDS > 6).astype(int).tolist()
    ids = IDS.astype(np.uint16) * 100
    assert labels_of(sixteen_bit(ids, "I;16")).tolist() == ids.tolist()


def test_reduce_labels():
    expected = [[255, 0, 1, 2], [2, 1, 255, 255], [6, 6, 255, 149]]
    assert labels_of(IDS, do_reduce_labels=True).tolist() == expected
    wide = np.array([[0, 1, 255, 1000], [40000] * 4, [65535] * 4], dtype=np.uint16)
    assert labels_of(wide, do_reduce_labels=True).tolist() == [[255, 0, 255, 999], [39999] * 4, [65534] * 4]


def test_labels_are_resized_by_nearest_exact_to_the_image(photo):
    maps = np.random.default_rng(1).integers(0, 60000, (2, 37, 53), dtype=np.uint16)
    images = np.stack([photo, photo])
    result = DepictImageProcessor(size=64)(images, maps, return_tensors="pt")
    reference = F.interpolate(torch.from_numpy(maps.astype(np.float64))[None], size=(64, 92), mode="nearest-exact")[0]
    assert result["labels"].dtype == torch.int64
    assert torch.equal(result["labels"], reference.to(torch.int64))
    assert result["pixel_values"].shape == (2, 3, 64, 92)


@pytest.mark.parametrize(
    ("segmentation_map", "message"),
    [
        (IDS[:2], r"size \(2, 4\) for an image of size \(3, 4\) .*must be equal; check"),
        (np.dstack([IDS[:2]] * 3), r"size \(2, 4\) for an image of size \(3, 4\)"),
        (PIL.Image.fromarray(IDS.T.copy()), r"size \(4, 3\) for an image of size \(3, 4\)"),
        ([IDS, IDS], "Got 2 segmentation maps for 1 images"),
        (np.dstack([IDS, IDS, IDS + 1]), "channels that differ, a colour image.*map each colour to its id"),
        (palette(IDS).convert("RGB"), "channels that differ"),
        (np.dstack([IDS] * 3 + [np.full_like(IDS, 254)]), "partly transparent.*save it without alpha"),
        (PIL.Image.fromarray(IDS).convert("CMYK"), "PIL mode 'CMYK'.*map each colour to its id"),
        (IDS + 0.5, "float64 with values that are no whole numbers.*do not rescale"),
        (np.full((3, 4), np.nan), "no whole numbers"),
        (IDS.astype(np.int32) - 1, "negative id -1; class ids start at 0"),
        (np.zeros((5, 3, 4), np.uint8), r"map of shape \(5, 3, 4\)"),
        ("map.png", "type str; pass a PIL image"),
    ],
)
def test_ambiguous_maps_are_refused(segmentation_map, message):
    with pytest.raises(ValueError, match=message):
        labels_of(segmentation_map)


# --- saving, logits ---


def test_saved_settings_give_identical_pixels(photo, tmp_path):
    processor = DepictImageProcessor(size={"shortest_edge": 19, "longest_edge": 30}, do_antialias=True, image_std=0.3)
    processor.save_pretrained(tmp_path)
    loaded = DepictImageProcessor.from_pretrained(tmp_path)
    results = [each(photo, return_tensors="pt")["pixel_values"] for each in (processor, loaded)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], processor(photo, do_antialias=False, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_logits_are_resized_in_float32_before_the_argmax(dtype, as_tensor):
    outputs = SimpleNamespace(logits=torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype))
    sizes = [(13, 9), (4, 21)]
    processor = DepictImageProcessor()
    target_sizes = torch.tensor(sizes) if as_tensor else sizes
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes)
    scored = processor.post_process_semantic_segmentation(outputs, target_sizes, return_segmentation_scores=True)
    for logits, size, label_map, output in zip(outputs.logits, sizes, maps, scored, strict=True):
        reference = F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        assert torch.equal(output.segmentation_scores, reference)
        assert torch.equal(label_map, reference.argmax(dim=0))
        assert torch.equal(output.segmentation, label_map)
    unresized = torch.stack(processor.post_process_semantic_segmentation(outputs))
    assert torch.equal(unresized, outputs.logits.argmax(dim=1))


@pytest.mark.parametrize("target_sizes", [[(13, 9)], (13, 9), torch.ones(3, 2)])
def test_target_sizes_must_be_one_pair_per_image(target_sizes):
    outputs = SimpleNamespace(logits=torch.zeros(2, 5, 6, 7))
    with pytest.raises(ValueError, match="for logits of 2 images, which need as many"):
        DepictImageProcessor().post_process_semantic_segmentation(outputs, target_sizes)
