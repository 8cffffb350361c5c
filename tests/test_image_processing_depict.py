"""Values that the image processor must give; the shapes and the saving of settings are Hugging Face's own tests."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from depict_hf import DepictImageProcessor

UNTOUCHED = {"do_resize": False, "do_rescale": False, "do_normalize": False}
PHOTO = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
GREY = np.array([[0, 1, 100, 128, 9], [200, 254, 255, 3, 9]] * 3, dtype=np.uint8)
GREY_16 = np.minimum(GREY * 257.0 + 60, 65535).astype(np.uint16)
OPAQUE = np.full_like(GREY, 255)
IDS = np.array([[0, 1, 2, 3, 255, 150], [7, 7, 255, 0, 20, 1]] * 3, dtype=np.uint8)[:5]


def pixels_of(image, **settings):
    """Pixels of the only image as they are before resizing and normalising."""
    return DepictImageProcessor(**UNTOUCHED, **settings)(image)["pixel_values"][0]


def labels_of(segmentation_map, **settings):
    image = np.zeros((3, *IDS.shape), np.uint8)
    return DepictImageProcessor()(image, segmentation_map, do_resize=False, **settings)["labels"][0]


def palette(ids):
    image = PIL.Image.fromarray(ids, mode="P")
    image.putpalette([(index * 37) % 256 for index in range(768)])
    return image


def sixteen_bit(values, mode):
    return PIL.Image.frombytes(mode, values.shape[::-1], values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())


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
def test_uint8_is_resized_rounded_then_normalised(size, expected, antialias):
    photo = torch.from_numpy(PHOTO).permute(2, 0, 1)
    resized = F.interpolate(
        photo[None].float(), size=expected, mode="bilinear", align_corners=False, antialias=antialias
    )
    mean = torch.tensor([0.1, 0.2, 0.3])
    reference = (resized.round() / 255 - mean.view(3, 1, 1)) / 0.5
    decided = (resized - resized.floor() - 0.5).abs() > 1e-4  # between two grey levels, releases of torch differ
    assert decided.float().mean() > 0.99
    processor = DepictImageProcessor(do_antialias=antialias, image_mean=mean.tolist(), image_std=[0.5] * 3)
    for image in (PIL.Image.fromarray(PHOTO), PHOTO, photo):
        result = processor(image, size=size, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(result[decided], reference[decided], rtol=0, atol=1e-5)  # a grey level is 0.008
        torch.testing.assert_close(result, reference, rtol=0, atol=0.008)
    assert processor.resize_size(37, 53, size) == expected
    assert processor.resize_size(37, 53) == (512, 733)


def test_floats_are_resized_without_rounding():
    image = torch.from_numpy(PHOTO).permute(2, 0, 1).double() / 255
    (result,) = DepictImageProcessor(size=19)(image, do_rescale=False, do_normalize=False)["pixel_values"]
    reference = F.interpolate(image[None].float(), size=(19, 27), mode="bilinear", align_corners=False)[0]
    assert torch.equal(result, reference)


@pytest.mark.parametrize("resample", [PIL.Image.NEAREST, PIL.Image.BICUBIC, PIL.Image.LANCZOS])
def test_other_filters_do_not_wrap_where_they_overshoot(resample):
    image = np.zeros((9, 12, 3), np.uint8)
    image[:, 6:] = 255
    settings = {**UNTOUCHED, "do_resize": True, "resample": resample, "size": 18}
    (result,) = DepictImageProcessor(**settings)(image)["pixel_values"]
    assert torch.equal(result > 127, torch.arange(24).ge(12).expand(3, 18, 24).contiguous())


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(GREY),
        *[sixteen_bit(GREY_16, mode) for mode in ("I;16", "I;16B")],
        *[PIL.Image.fromarray(values.astype(np.int32)) for values in (GREY, GREY_16)],
        *[GREY, GREY[None], GREY[..., None], GREY[:, ::-1].astype(np.int64)[:, ::-1], torch.from_numpy(GREY)],
        *[GREY_16, GREY_16.astype(">u2"), np.dstack([GREY_16] * 3), torch.from_numpy(GREY_16)],
        np.dstack([GREY_16] * 3 + [OPAQUE.astype(np.uint16) * 257]),
    ],
)
def test_grey_and_16_bit_photographs_become_8_bit_rgb(image):
    # Contiguous, since torch.equal of torch 2.8 takes expanded tensors for different ones.
    assert torch.equal(pixels_of(image), torch.from_numpy(GREY).expand(3, -1, -1).contiguous())
    assert pixels_of(np.array([[128, 129, 65535]], dtype=np.uint16))[0].tolist() == [[0, 1, 255]]  # rounded


@pytest.mark.parametrize("image", [GREY > 99, torch.from_numpy(GREY > 99), PIL.Image.fromarray(GREY > 99)])
def test_one_bit_photographs_become_black_and_white(image):
    for settings in ({}, {"do_convert_rgb": False}):
        assert pixels_of(image, **settings)[-1].tolist() == [[0, 0, 255, 255, 0], [255, 255, 255, 0, 0]] * 3


def test_transparency_is_laid_over_white_and_cmyk_is_converted():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [0, 0, 0, 51]]] * 5, dtype=np.uint8)
    expected = [[200, 255, 204], [100, 255, 204], [0, 255, 204]]
    assert pixels_of(rgba)[:, 0].tolist() == pixels_of(PIL.Image.fromarray(rgba))[:, 0].tolist() == expected
    grey = PIL.Image.fromarray(np.array([[[90, 255], [90, 0]]], dtype=np.uint8), mode="LA")
    assert pixels_of(grey)[:, 0].tolist() == [[90, 255]] * 3
    indexed = palette(np.array([[1, 0]], dtype=np.uint8))
    indexed.info["transparency"] = 0
    assert pixels_of(indexed)[:, 0].tolist() == [[111, 255], [148, 255], [185, 255]]
    assert pixels_of(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0))).flatten().tolist() == [255, 0, 0]


def test_images_of_different_sizes_give_a_list_that_only_stacks_at_a_fixed_size():
    processor = DepictImageProcessor(size=18)
    images = [PHOTO, PHOTO[:, :40], PHOTO]
    for disable_grouping in (False, True):
        results = processor(images, [image[..., 0] for image in images], disable_grouping=disable_grouping)
        assert [tuple(labels.shape) for labels in results["labels"]] == [(18, 26), (18, 19), (18, 26)]
        for image, pixels in zip(images, results["pixel_values"], strict=True):
            assert torch.equal(pixels, processor(image)["pixel_values"][0])
    with pytest.raises(ValueError, match=r"\(18, 19\), \(18, 26\).*one image at a time, or set size="):
        processor(images, return_tensors="pt")
    assert processor(images, size={"height": 8, "width": 9}, return_tensors="pt")["pixel_values"].shape == (3, 3, 8, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 512}}, r"Got size=\{'longest_edge': 512\}; needed .* 'shortest_edge'"),
        ({"size": {"shortest_edge": 0}}, "Got size=.*positive"),
        ({"do_center_crop": True, "crop_size": 9}, "neither cropped nor padded"),
        ({"data_format": "channels_last"}, "Got data_format='channels_last'"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DepictImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        DepictImageProcessor()(PHOTO, **settings)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "Got no images"),
        (np.zeros((1, 2, 3, 4, 5)), r"Got an image of shape \(1, 2, 3, 4, 5\); needed"),
        (np.zeros((0, 4, 3), np.uint8), r"Got an image of shape \(0, 4, 3\); needed .* none of them empty"),
        (np.array([[-1, 5]]), "values from -1 to 5; rescale"),
        (np.array([[0, 65536]]), "values from 0 to 65536; rescale"),
    ],
)
def test_unreadable_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        DepictImageProcessor()(images)


@pytest.mark.parametrize(
    "segmentation_map",
    [
        *[PIL.Image.fromarray(IDS), palette(IDS), PIL.Image.fromarray(IDS.astype(np.int32))],
        *[sixteen_bit(IDS, mode) for mode in ("I;16", "I;16B")],
        *[PIL.Image.fromarray(IDS).convert(mode) for mode in ("LA", "RGB", "RGBA")],
        *[IDS.astype(kind) for kind in ("u1", "i8", "f8", ">u2")],
        *[np.stack([IDS] * channels) for channels in (1, 3)],
        *[np.dstack([IDS] * channels) for channels in (1, 3)],
        *[torch.from_numpy(IDS), [torch.from_numpy(IDS).float()], IDS[None, None]],
    ],
)
def test_every_kind_of_map_gives_the_same_ids(segmentation_map):
    labels = labels_of(segmentation_map)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[0, 1, 2, 3, 255, 150], [7, 7, 255, 0, 20, 1]] * 2 + [[0, 1, 2, 3, 255, 150]]


def test_one_bit_and_16_bit_maps_and_reduced_labels():
    reduced = labels_of(IDS, do_reduce_labels=True)
    assert reduced[:2].tolist() == [[255, 0, 1, 2, 255, 149], [6, 6, 255, 255, 19, 0]]
    assert labels_of(PIL.Image.fromarray(IDS > 6))[:2].tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0]]
    wide = sixteen_bit(IDS.astype(np.uint16) * 257, "I;16")
    assert labels_of(wide)[0].tolist() == [0, 257, 514, 771, 65535, 38550]
    assert labels_of(wide, do_reduce_labels=True)[0].tolist() == [255, 256, 513, 770, 65534, 38549]


def test_labels_are_resized_by_nearest_exact_to_the_image():
    maps = np.random.default_rng(1).integers(0, 60000, (2, 37, 53), dtype=np.uint16)
    result = DepictImageProcessor(size=64)(np.stack([PHOTO, PHOTO]), maps, return_tensors="pt")
    reference = F.interpolate(torch.from_numpy(maps.astype(np.float64))[None], size=(64, 92), mode="nearest-exact")[0]
    assert torch.equal(result["labels"], reference.to(torch.int64))
    assert result["pixel_values"].shape == (2, 3, 64, 92)


@pytest.mark.parametrize(
    ("segmentation_map", "message"),
    [
        (IDS[:4], r"size \(4, 6\) for an image of size \(5, 6\) .*must be equal; check"),
        (np.dstack([PHOTO[..., :1]] * 3), r"size \(37, 53\) for an image of size \(5, 6\)"),
        (PIL.Image.fromarray(IDS.T.copy()), r"size \(6, 5\) for an image of size \(5, 6\)"),
        ([IDS, IDS], "Got 2 segmentation maps for 1 images"),
        (np.dstack([IDS, IDS, IDS + 1]), "channels that differ, a colour image.*map each colour to its id"),
        (palette(IDS).convert("RGB"), "channels that differ"),
        (np.dstack([IDS] * 3 + [np.full_like(IDS, 254)]), "partly transparent.*save it without alpha"),
        (PIL.Image.fromarray(IDS).convert("CMYK"), "PIL mode 'CMYK'.*map each colour to its id"),
        (IDS + 0.5, "float64 with values that are no whole numbers.*do not rescale"),
        (np.full((5, 6), np.inf), "no whole numbers"),
        (IDS.astype(np.int32) - 1, "negative id -1; class ids start at 0"),
        (np.zeros((7, 5, 6), np.uint8), r"map of shape \(7, 5, 6\).*needed"),
        ("map.png", "type str; pass a PIL image"),
    ],
)
def test_ambiguous_maps_are_refused(segmentation_map, message):
    with pytest.raises(ValueError, match=message):
        labels_of(segmentation_map)


def test_saved_settings_give_identical_pixels(tmp_path):
    processor = DepictImageProcessor(size={"shortest_edge": 19, "longest_edge": 30}, do_antialias=True, image_std=0.3)
    processor.save_pretrained(tmp_path)
    pixels = processor(PHOTO, return_tensors="pt")["pixel_values"]
    loaded = DepictImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(PHOTO, return_tensors="pt")["pixel_values"], pixels)
    assert not torch.equal(loaded(PHOTO, do_antialias=False, return_tensors="pt")["pixel_values"], pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_sizes", [[(13, 9), (4, 21)], torch.tensor([[13, 9], [4, 21]])])
def test_logits_are_resized_in_float32_before_the_argmax(target_sizes, dtype):
    outputs = SimpleNamespace(logits=torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype))
    post_process = DepictImageProcessor().post_process_semantic_segmentation
    maps = post_process(outputs, target_sizes)
    scored = post_process(outputs, target_sizes, return_segmentation_scores=True)
    for logits, size, label_map, output in zip(outputs.logits, [(13, 9), (4, 21)], maps, scored, strict=True):
        reference = F.interpolate(logits[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        assert torch.equal(output.segmentation_scores, reference)
        assert torch.equal(label_map, reference.argmax(dim=0))
        assert torch.equal(output.segmentation, label_map)
    assert torch.equal(torch.stack(post_process(outputs)), outputs.logits.argmax(dim=1))


@pytest.mark.parametrize("target_sizes", [[(13, 9)], (13, 9), torch.ones(3, 2)])
def test_target_sizes_must_be_one_pair_per_image(target_sizes):
    outputs = SimpleNamespace(logits=torch.zeros(2, 5, 6, 7))
    with pytest.raises(ValueError, match="for logits of 2 images, which need as many"):
        DepictImageProcessor().post_process_semantic_segmentation(outputs, target_sizes)
