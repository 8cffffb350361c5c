"""Each corruption does what its numbers say, alike in every call, and more so with every severity."""

import io
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from training.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption, cloud_map, parse_corruptions

STREET = Path(__file__).parents[2] / "data" / "street.jpg"
RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog"}
SIZE = (3, 200, 260)


@pytest.fixture(scope="module")
def street() -> torch.Tensor:
    with PIL.Image.open(STREET) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[:, 60:240, 100:330].contiguous()


@pytest.fixture
def grey() -> torch.Tensor:
    return torch.full(SIZE, 102, dtype=torch.uint8)  # 0.4


@pytest.fixture
def point() -> torch.Tensor:
    """One white pixel on black, far from the edges."""
    image = torch.zeros(3, 101, 101, dtype=torch.uint8)
    image[:, 50, 50] = 255
    return image


def spread_of(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights `(101, 101)` of sum 1, and row and column of each relative to the middle."""
    weights = image[0].double() / image[0].sum()
    steps = torch.arange(-50, 51).double()
    return weights, steps[:, None].expand(101, 101), steps[None, :].expand(101, 101)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_index_gives_the_same_photograph(street, name):
    corruption = Corruption(name, 3)
    first, again, other = corruption(street, 4), corruption(street, 4), corruption(street, 5)
    assert first.dtype == torch.uint8 and first.shape == street.shape
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name not in RANDOM)
    assert not torch.equal(first, street)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"fog"}))
def test_errors_grow_with_the_severity(street, name):
    errors = [
        sum(float((Corruption(name, severity)(street, index).float() - street).square().mean()) for index in range(4))
        for severity in SEVERITIES
    ]
    if name == "pixelate":  # 0.4 falls on the pixels' grid less badly than 0.5
        errors = [errors[0], errors[1], errors[4]]
    assert errors == sorted(errors) and errors[-1] > 1.5 * errors[0]


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (2, 0.12)])
def test_gaussian_noise_has_its_deviation(grey, severity, deviation):
    noise = (Corruption("gaussian_noise", severity)(grey, 0).float() - 102) / 255
    assert float(noise.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(noise.mean())) < 0.002


@pytest.mark.parametrize(("severity", "photons"), [(1, 60), (2, 25)])
def test_shot_noise_has_the_variance_of_counted_photons(grey, severity, photons):
    counted = Corruption("shot_noise", severity)(grey, 0).float() / 255
    assert float(counted.mean()) == pytest.approx(0.4, abs=0.002)
    assert float(counted.var()) == pytest.approx(0.4 / photons, rel=0.03)


@pytest.mark.parametrize(("severity", "amount"), [(1, 0.03), (5, 0.27)])
def test_impulse_noise_replaces_its_share(grey, severity, amount):
    noisy = Corruption("impulse_noise", severity)(grey, 0)
    for value in (0, 255):
        assert float((noisy == value).float().mean()) == pytest.approx(amount / 2, rel=0.1)
    assert set(noisy.unique().tolist()) == {0, 102, 255}


@pytest.mark.parametrize(("severity", "sigma"), [(1, 1), (2, 2)])
def test_gaussian_blur_has_its_width(severity, sigma):
    """A step's edge, between the columns 39 and 40, becomes the integral of the Gaussian."""
    step = torch.zeros(3, 20, 80, dtype=torch.uint8)
    step[:, :, 40:] = 255
    blurred = Corruption("gaussian_blur", severity)(step, 0).float() / 255
    for column in (38, 40, 41, 43):
        expected = 0.5 * (1 + math.erf((column - 39.5) / (sigma * math.sqrt(2))))
        assert float(blurred[0, 10, column]) == pytest.approx(expected, abs=0.01)
    assert torch.equal(blurred[:, 0], blurred[:, 10])


def test_defocus_blur_is_a_disk(point):
    weights, rows, columns = spread_of(Corruption("defocus_blur", 1)(point, 0))
    inside = rows**2 + columns**2 <= 9
    assert float(weights[inside].sum()) == pytest.approx(1)
    assert weights[inside].unique().numel() == 1


def test_motion_blur_is_a_line_that_fades(point):
    angles = []
    for index in range(8):
        weights, rows, columns = spread_of(Corruption("motion_blur", 2)(point, index))
        taken = weights > 0
        # Beyond 14.7 steps the weight is below half of a 255th.
        assert 13 <= float(torch.hypot(rows, columns)[taken].max()) <= 16
        center = -float((weights * columns).sum()), -float((weights * rows).sum())
        angle = np.arctan2(center[1], center[0])
        # Half a Gaussian of deviation 5 on whole steps has its mean at 3.51.
        assert np.hypot(*center) == pytest.approx(3.51, abs=0.4)
        across = rows * np.cos(angle) - columns * np.sin(angle)
        assert float(across[taken].abs().max()) < 2
        angles.append(np.degrees(angle))
    assert min(angles) < -10 and max(angles) > 10 and np.abs(angles).max() <= 48


def test_fog_dims_towards_its_clouds(street):
    """Between the photograph dimmed and the same with the full strength added; it hides contrast."""
    foggy = Corruption("fog", 1)(street, 0).float() / 255
    image = street.float() / 255
    brightest = float(image.max())
    dimmed = image * brightest / (brightest + 1.5)
    clouds = (foggy - dimmed) * (brightest + 1.5) / (brightest * 1.5)
    assert float(clouds.min()) > -0.01 and float(clouds.max()) < 1.01
    # The same clouds in every channel.
    torch.testing.assert_close(clouds[0], clouds[2], atol=0.01, rtol=0)
    assert float(clouds[0].std()) > 0.05


def test_clouds_are_rough_at_every_scale():
    """From 0 to 1; neighbours differ little, and less with a stronger decay."""
    roughness = []
    for decay in (1.4, 2.0):
        clouds = cloud_map(100, decay, torch.Generator().manual_seed(0))
        assert clouds.shape == (128, 128)
        assert (float(clouds.min()), float(clouds.max())) == (0, 1)
        roughness.append(float(clouds.diff(dim=0).abs().mean()))
    assert roughness[1] < roughness[0] < 0.1


def test_brightness_keeps_hue_and_saturation():
    colors = torch.tensor([[200, 100, 50], [0, 0, 0], [250, 250, 125]], dtype=torch.uint8)
    image = colors.T[:, :, None].expand(3, 3, 4).contiguous()
    brighter = Corruption("brightness", 2)(image, 0)[:, :, 0].T
    # 200 + 51 = 251, and 250 is raised to 255 only; black becomes grey.
    assert brighter.tolist() == [[251, 126, 63], [51, 51, 51], [255, 255, 128]]


def test_contrast_pulls_each_channel_to_its_mean():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0, 0], image[1, :, 0] = 200, 100
    flat = Corruption("contrast", 1)(image, 0)
    assert flat[0].tolist() == [[140, 140], [60, 60]]
    assert flat[1].tolist() == [[70, 30], [70, 30]]
    assert flat[2].unique().tolist() == [0]


def test_jpeg_compression_is_that_of_the_quality(street):
    file = io.BytesIO()
    PIL.Image.fromarray(street.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=10)
    expected = np.array(PIL.Image.open(file))
    assert np.array_equal(Corruption("jpeg_compression", 4)(street, 0).permute(1, 2, 0).numpy(), expected)


def test_pixelation_makes_blocks_of_means():
    """A quarter of each side: blocks of 4 x 4 pixels, each its mean."""
    image = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blocks = Corruption("pixelate", 5)(image, 0).reshape(3, 4, 4, 6, 4).float()
    means = image.reshape(3, 4, 4, 6, 4).float().mean(dim=(2, 4), keepdim=True)
    assert float((blocks - means).abs().max()) <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_photograph_is_corrupted_too(name):
    for severity in (1, 5):
        image = torch.full((3, 1, 2), 100, dtype=torch.uint8)
        assert Corruption(name, severity)(image, 0).shape == (3, 1, 2)


def test_command_lines_name_corruptions():
    assert parse_corruptions(["fog:3"]) == [Corruption("fog", 3)]
    assert [str(each) for each in parse_corruptions(["fog", "contrast:2", "fog:1"], [1, 4])] == [
        "fog:1",
        "fog:4",
        "contrast:2",
    ]
    assert len(parse_corruptions(["all"])) == 5 * len(CORRUPTIONS) == 55


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("motion:2", "Got corruption 'motion'; did you mean 'motion_blur'"),
        ("xyz", "Got corruption 'xyz'; Known are: gaussian_noise"),
        ("fog:6", "Got severity 6 of fog, needed 1 to 5"),
        ("fog:high", "Got corruption 'fog:high', needed NAME or NAME:SEVERITY"),
    ],
)
def test_unknown_corruptions_are_refused(specification, message):
    with pytest.raises(ValueError, match=message):
        parse_corruptions([specification])
