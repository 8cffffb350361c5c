"""Corruptions of photographs in five severities: noise, blur, weather and digital artefacts.

Kinds and the numbers of each severity are those of ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations"), in pixels of the photograph at its own size, where
ImageNet-C has crops of 224 x 224. Other differences are named with each function; nothing is stored as JPEG afterwards.
"""

import difflib
import io
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption in one severity.

    Args:
        name: A key of `CORRUPTIONS`.
        severity: 1 to 5.

    Raises:
        ValueError: If there is no such kind or severity.
    """

    name: str
    severity: int

    def __post_init__(self):
        if self.name not in CORRUPTIONS:
            nearest = difflib.get_close_matches(self.name, CORRUPTIONS, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"Got corruption {self.name!r}; {hint}Known are: {', '.join(CORRUPTIONS)}.")
        if self.severity not in SEVERITIES:
            raise ValueError(f"Got severity {self.severity} of {self.name}, needed 1 to {SEVERITIES[-1]}.")

    def __str__(self) -> str:
        return f"{self.name}:{self.severity}"

    def __call__(self, image: Tensor, index: int) -> Tensor:
        """Corrupt a photograph, uint8 `(3, height, width)`, into one of the same form.

        What is drawn depends on kind, severity and `index` alone, not on the order or the process of the calls.
        """
        state = np.random.SeedSequence([zlib.crc32(self.name.encode()), self.severity, index]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        function, parameters = CORRUPTIONS[self.name]
        corrupted = function(image.float() / 255, parameters[self.severity - 1], generator)
        return (corrupted.clamp(0, 1) * 255).round().to(torch.uint8)


def parse_corruptions(specifications: Iterable[str], severities: Iterable[int] = SEVERITIES) -> list[Corruption]:
    """Return the corruptions of a command line: `NAME:SEVERITY`, `NAME` for all of `severities`, `all` for every kind.

    Raises:
        ValueError: If one is unknown, or its severity is not a whole number from 1 to 5.
    """
    severities = list(severities)
    corruptions = []
    for specification in specifications:
        name, colon, severity = specification.partition(":")
        if colon and not severity.isdecimal():
            raise ValueError(f"Got corruption {specification!r}, needed NAME or NAME:SEVERITY, such as fog:3.")
        for each in CORRUPTIONS if name == "all" else [name]:
            corruptions += [Corruption(each, value) for value in ([int(severity)] if colon else severities)]
    return list(dict.fromkeys(corruptions))


# All functions below take a float image `(3, height, width)` in 0 to 1, the numbers of one severity and a source of
# randomness, and return an image of the same size; what leaves 0 to 1 is clipped by the caller.


def gaussian_noise(image: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of this standard deviation to every value."""
    return image + deviation * torch.randn(image.shape, generator=generator)


def shot_noise(image: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Count Poisson-distributed photons, so many on average where a value is 1."""
    return torch.poisson(image * photons, generator=generator) / photons


def impulse_noise(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Replace this share of the values by 0 or 1, each with probability one half; channels are drawn apart."""
    drawn = torch.rand(image.shape, generator=generator)
    return torch.where(drawn < amount, (drawn < amount / 2).to(image.dtype), image)


def gaussian_blur(image: Tensor, sigma: float, generator: torch.Generator | None = None) -> Tensor:
    """Blur by a Gaussian of this standard deviation in pixels, cut off at four of them."""
    kernel = _gaussian_kernel(sigma, math.ceil(4 * sigma))
    return _convolve(_convolve(image, kernel[:, None]), kernel[None, :])


def defocus_blur(image: Tensor, disk: tuple[int, float], generator: torch.Generator | None = None) -> Tensor:
    """Blur by a disk.

    Args:
        disk: Radius in pixels, and standard deviation of the Gaussian that softens the disk's edge.
    """
    radius, softness = disk
    edge = _gaussian_kernel(softness, 1 if radius <= 8 else 2)
    reach = radius + len(edge) // 2
    steps = torch.arange(-reach, reach + 1)
    inside = (steps[:, None] ** 2 + steps[None, :] ** 2 <= radius**2).float()
    soft = _convolve(_convolve(inside[None], edge[:, None]), edge[None, :])[0]
    return _convolve(image, soft / soft.sum())


def motion_blur(image: Tensor, trail: tuple[int, float], generator: torch.Generator) -> Tensor:
    """Smear along a straight line at a random angle of -45 to 45 degrees to the horizontal.

    Args:
        trail: Radius, and standard deviation of the half Gaussian by which the trail fades: it has one step of a pixel
            at the pixel itself and two per unit of the radius after it.

    Source:
        ImageNet-C calls ImageMagick; here each step falls on the nearest pixel.
    """
    radius, sigma = trail
    angle = math.radians(-45 + 90 * float(torch.rand((), generator=generator)))
    steps = torch.arange(2 * radius + 1)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    height, width = image.shape[-2:]
    reach = 2 * radius
    padded = F.pad(image[None], (reach,) * 4, mode="replicate")[0]
    blurred = torch.zeros_like(image)
    for step, weight in zip(steps.tolist(), weights.tolist(), strict=True):
        top, left = reach + round(step * math.sin(angle)), reach + round(step * math.cos(angle))
        blurred += weight * padded[:, top : top + height, left : left + width]
    return blurred


def fog(image: Tensor, clouds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Add clouds and dim, so that the brightest value stays where the clouds are densest.

    Args:
        clouds: Their strength, and by how much each octave is finer: its noise is weaker by the square of this.

    Source:
        The clouds of ImageNet-C fill a map of 256 x 256; here one of the next power of two above the longer side.
    """
    strength, decay = clouds
    height, width = image.shape[-2:]
    plasma = cloud_map(max(height, width), decay, generator)[:height, :width]
    brightest = image.max()
    return (image + strength * plasma) * brightest / (brightest + strength)


def cloud_map(size: int, decay: float, generator: torch.Generator) -> Tensor:
    """Draw random fractal clouds from 0 to 1, by the diamond-square algorithm on a torus.

    Returns:
        `(side, side)`, side the smallest power of two from `size` up, and at least 2.
    """
    corners, amplitude = torch.zeros(1, 1), 1.0
    while len(corners) < max(size, 2):
        side = len(corners)
        noise = amplitude * (2 * torch.rand(3, side, side, generator=generator) - 1)
        right, below = corners.roll(-1, dims=1), corners.roll(-1, dims=0)
        centers = (corners + right + below + below.roll(-1, dims=1)) / 4 + noise[0]
        across = (corners + right + centers + centers.roll(1, dims=0)) / 4 + noise[1]
        along = (corners + below + centers + centers.roll(1, dims=1)) / 4 + noise[2]
        rows = [torch.stack(pair, dim=-1).flatten(1) for pair in ((corners, across), (along, centers))]
        corners = torch.stack(rows, dim=1).flatten(0, 1)
        amplitude /= decay**2
    lowest, highest = corners.aminmax()
    return (corners - lowest) / (highest - lowest)


def brightness(image: Tensor, amount: float, generator: torch.Generator | None = None) -> Tensor:
    """Raise the value of HSV by this much, at most to 1, at the same hue and saturation."""
    value = image.amax(dim=0, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, image * brighter / value.clamp(min=1e-6), brighter)


def contrast(image: Tensor, factor: float, generator: torch.Generator | None = None) -> Tensor:
    """Multiply each channel's distance from its mean over the image by this."""
    mean = image.mean(dim=(-2, -1), keepdim=True)
    return mean + factor * (image - mean)


def jpeg_compression(image: Tensor, quality: int, generator: torch.Generator | None = None) -> Tensor:
    """Store and read as JPEG of this quality."""
    file = io.BytesIO()
    _to_pil(image).save(file, format="JPEG", quality=quality)
    with PIL.Image.open(file) as stored:
        return _from_pil(stored)


def pixelate(image: Tensor, factor: float, generator: torch.Generator | None = None) -> Tensor:
    """Reduce both sides by this factor and enlarge to the old size, each by averaging over areas."""
    height, width = image.shape[-2:]
    small = _to_pil(image).resize((max(1, int(width * factor)), max(1, int(height * factor))), PIL.Image.Resampling.BOX)
    return _from_pil(small.resize((width, height), PIL.Image.Resampling.BOX))


CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], tuple]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}


def _gaussian_kernel(sigma: float, radius: int) -> Tensor:
    """Return a Gaussian `(2 * radius + 1,)` of sum 1."""
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def _convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel with an odd-sized symmetric kernel `(rows, columns)`; edges are repeated beyond them."""
    bottom, right = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(image[None], (right, right, bottom, bottom), mode="replicate")
    return F.conv2d(padded.transpose(0, 1), kernel[None, None])[:, 0]


def _to_pil(image: Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _from_pil(image: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
