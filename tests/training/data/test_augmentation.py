"""Joint transforms: image and labels stay aligned, and every random choice has the published range."""

import colorsys

import pytest
import torch

from training.data.augmentation import (
    Normalization,
    TrainingAugmentation,
    degrade,
    pad,
    photometric_distortion,
    random_crop,
    random_flip,
    random_resize,
    scale_saturation,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels in 8 x 8 blocks, 48 x 64 pixels; every pixel of the image shows its label times 20."""
    blocks = torch.randint(0, 12, (6, 8), generator=seeded(0))
    labels = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return (labels * 20).to(torch.uint8).expand(3, -1, -1).clone(), labels


@pytest.mark.parametrize(
    ("short_side", "long_side", "ratio", "size"),
    [(96, 1000, 1.0, (96, 128)), (96, 100, 1.0, (75, 100)), (96, 1000, 0.5, (48, 64)), (33, 1000, 1.5, (49, 65))],
)
def test_resize_fits_both_sides(sample, short_side, long_side, ratio, size):
    image, labels = random_resize(*sample, short_side, long_side, (ratio, ratio), seeded(0))
    assert tuple(image.shape) == (3, *size)
    assert tuple(labels.shape) == size


def test_resize_keeps_image_and_labels_aligned(sample):
    image, labels = random_resize(*sample, 96, 1000, (1, 1), seeded(0))
    # Away from the borders of the blocks, which bilinear interpolation blurs.
    inner = (torch.arange(96) % 16 > 1)[:, None] & (torch.arange(128) % 16 > 1) & (torch.arange(128) % 16 < 14)
    inner &= (torch.arange(96) % 16 < 14)[:, None]
    assert torch.equal(image[0].long()[inner], labels[inner] * 20)


def test_resize_draws_the_whole_range(sample):
    generator = seeded(0)
    heights = [random_resize(*sample, 100, 1000, (0.5, 2.0), generator)[1].shape[0] for _ in range(200)]
    assert 50 <= min(heights) < 60
    assert 190 < max(heights) <= 200


def test_crop_avoids_one_class_covering_nearly_all():
    """Class 1 covers all but a strip; of the labelled pixels it may not exceed three quarters."""
    labels = torch.ones(40, 400, dtype=torch.long)
    labels[:, :20] = 0
    labels[:, 20:40] = 255
    image = labels.to(torch.uint8).expand(3, -1, -1)
    shares = []
    for seed in range(40):
        cropped, crop = random_crop(image, labels, 40, seeded(seed), tries=2000)
        assert crop.shape == (40, 40)
        assert torch.equal(cropped[0].long(), crop)
        labelled = crop[crop != 255]
        shares.append((labelled == 1).float().mean())
    # Columns 5 to 15 pass: 15 to 5 columns of class 0, 5 to 15 of class 1.
    assert max(shares) < 0.75
    assert min(shares) > 0.25


def test_crop_gives_up_after_its_tries_and_keeps_small_images_whole():
    labels = torch.zeros(30, 50, dtype=torch.long)
    image = torch.arange(30 * 50).view(1, 30, 50)
    assert random_crop(image, labels, 40, seeded(0))[1].shape == (30, 40)
    lefts = {int(random_crop(image, labels, 40, seeded(seed))[0][0, 0, 0]) for seed in range(100)}
    assert lefts == set(range(11))


def test_flip_mirrors_both_half_of_the_time(sample):
    image, labels = sample
    flipped = 0
    for seed in range(200):
        new_image, new_labels = random_flip(image, labels, seeded(seed))
        if torch.equal(new_labels, labels):
            assert torch.equal(new_image, image)
        else:
            flipped += 1
            assert torch.equal(new_labels, labels.flip(1))
            assert torch.equal(new_image, image.flip(2))
    assert 75 < flipped < 125


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_is_that_of_hsv(factor):
    colours = torch.rand(3, 5, 4, generator=seeded(3))
    colours[:, 0, 0] = 0.0
    colours[:, 0, 1] = torch.tensor([1.0, 0.0, 0.5])
    expected = torch.empty_like(colours)
    for row in range(5):
        for column in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*colours[:, row, column].tolist())
            expected[:, row, column] = torch.tensor(colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value))
    torch.testing.assert_close(scale_saturation(colours * 255, factor), expected * 255, atol=1e-3, rtol=0)


def test_photometric_distortion_of_grey_is_brightness_and_contrast():
    """Grey has neither hue nor saturation: a quarter of the draws keep it, and the rest stay in range."""
    grey = torch.full((3, 4, 4), 100.0)
    values = []
    for seed in range(400):
        distorted = photometric_distortion(grey, seeded(seed))
        assert distorted.max() - distorted.min() < 1e-2
        values.append(float(distorted[0, 0, 0]))
    values = torch.tensor(values)
    assert 0.18 < ((values - 100).abs() < 1e-2).float().mean() < 0.32
    assert (100 - 32) * 0.5 <= values.min() < 60
    assert 150 < values.max() <= (100 + 32) * 1.5


def test_photometric_distortion_turns_hue_by_at_most_a_tenth():
    colour = torch.tensor([200.0, 60.0, 60.0]).view(3, 1, 1).expand(3, 2, 2)
    hues = []
    for seed in range(300):
        rgb = photometric_distortion(colour, seeded(seed))[:, 0, 0]
        if rgb.max() < 255 and rgb.min() > 0:
            hues.append((colorsys.rgb_to_hsv(*rgb.tolist())[0] + 0.5) % 1 - 0.5)
    assert -0.1 - 1e-3 < min(hues) < -0.08
    assert 0.08 < max(hues) < 0.1 + 1e-3
    assert 0.35 < sum(abs(hue) < 1e-4 for hue in hues) / len(hues) < 0.65


def test_a_degraded_photograph_is_blurred_noisy_grey_tinted_or_compressed():
    """Each kind about as often as the others, told by what it does to a flat colour and to a step."""
    image = torch.tensor([200, 60, 100], dtype=torch.uint8).view(3, 1, 1).repeat(1, 16, 32)
    image[:, :, 16:] = image[:, :, 16:] // 2
    counts = dict.fromkeys(("blurred", "noisy", "grey", "tinted", "compressed"), 0)
    for seed in range(200):
        found = degrade(image, seeded(seed))
        assert found.dtype == torch.uint8 and found.shape == image.shape
        spread = found[:, :, :4].float().std(dim=(1, 2)).max()
        if (found[0] == found[1]).all():
            counts["grey"] += 1
        elif spread > 3:
            counts["noisy"] += 1
            assert (found.float() - image).abs().mean() < 32
        elif ((found[:, :, :4].float() - image[:, :, :4]).abs().amax(dim=(1, 2)) > 6).any():
            counts["tinted"] += 1
            gains = found[:, 0, 0] / image[:, 0, 0]
            assert gains.min() > 0.69 and gains.max() < 1.31
        elif (found[:, :, :8] == image[:, :, :8]).all():
            counts["blurred"] += 1
            assert image[0, 0, 16] < found[0, 0, 16] < found[0, 0, 15] < image[0, 0, 15]
        else:
            counts["compressed"] += 1
    assert min(counts.values()) > 20, counts


def test_degradation_is_as_probable_as_said_and_draws_nothing_where_it_is_not(sample):
    plain = {"size": 48, "crop_size": 40, "photometric": False, "scale_range": (1.0, 1.0)}
    pairs = [
        [TrainingAugmentation(**plain, degradation=share)(*sample, seeded(seed)) for share in (0.0, 0.5)]
        for seed in range(60)
    ]
    changed = sum(not torch.equal(one["pixel_values"], other["pixel_values"]) for one, other in pairs)
    assert 15 < changed < 40
    assert all(torch.equal(one["labels"], other["labels"]) for one, other in pairs)
    small = sample[0][:, :3, :2], sample[1][:3, :2]
    for seed in range(20):
        TrainingAugmentation(size=2, crop_size=4, degradation=1.0)(*small, seeded(seed))


def test_what_is_padded_is_zero_after_normalisation():
    """As where padding comes after it, though bytes are padded before; labels with 255, which is also inside."""
    image = torch.tensor([255, 0, 127], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 3)
    labels = torch.tensor([[0, 1, 2], [3, 255, 4]])
    padded, padded_labels = pad(image, labels, 4)
    whole = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    sizes = torch.tensor([[2, 3], [4, 4]])
    normalised = Normalization(MEAN, STD)(torch.stack([padded, whole]), sizes)
    assert normalised.shape == (2, 3, 4, 4) and normalised.dtype == torch.float32
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (127 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(normalised[0, :, :2, :3], expected.view(3, 1, 1).expand(3, 2, 3))
    assert (normalised[0, :, 2:] == 0).all()
    assert (normalised[0, :, :, 3:] == 0).all()
    torch.testing.assert_close(normalised[1, 0], torch.full((4, 4), (1 - 0.485) / 0.229))
    assert padded_labels.tolist() == [[0, 1, 2, 255], [3, 255, 4, 255], [255] * 4, [255] * 4]


def test_whole_augmentation_is_aligned_and_reproducible(sample):
    augmentation = TrainingAugmentation(size=48, crop_size=40, scale_range=(0.5, 1.5), photometric=False)
    drawn, again, other = (augmentation(*sample, seeded(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(each, again[name]) for name, each in drawn.items())
    pixels, labels, input_size = drawn["pixel_values"], drawn["labels"], drawn["input_size"]
    assert not torch.equal(pixels, other["pixel_values"])
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((3, 40, 40), torch.uint8, torch.uint8)
    labelled = labels != 255
    rows, columns = labelled.nonzero().amax(dim=0) + 1
    assert input_size.tolist() == [rows, columns]
    # Most pixels are not blurred by the resize, and those show their label.
    assert ((pixels[0] / 20).round()[labelled] == labels[labelled]).float().mean() > 0.8
    assert (pixels[0][~labelled] == 0).all()


def test_colours_are_rounded_once_at_the_end(sample):
    """Bytes are those of the fractional colours, rounded."""
    augmentation = TrainingAugmentation(size=48, crop_size=64, scale_range=(1.0, 1.0))
    differences = []
    for seed in range(20):
        generator = seeded(seed)
        image, labels = random_resize(*sample, 48, 4 * 48, (1.0, 1.0), generator)
        image, labels = random_crop(image, labels, 64, generator)
        image, _ = random_flip(image, labels, generator)
        expected = photometric_distortion(image.float(), generator)
        height, width = expected.shape[-2:]
        drawn = augmentation(*sample, seeded(seed))["pixel_values"][:, :height, :width]
        differences.append((drawn - expected).flatten())
    assert torch.cat(differences).abs().max() <= 0.5 + 1e-3
