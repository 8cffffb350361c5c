"""Joint random transforms of one photograph and its label map, for training.

Images are uint8 `(3, height, width)` (float32 in 0 to 255 where a transform says so), labels integers
`(height, width)`. Randomness comes only from the `torch.Generator` that is passed in. Squares travel as bytes to where
the model is, and become numbers of mean 0 there, by `Normalization`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from depict_hf.configuration_depict import IGNORE_LABEL


@dataclass(frozen=True)
class TrainingAugmentation:
    """Random scale, crop, flip and colours, then padding, in the published order.

    Args:
        size: Pixels of the shorter side at ratio 1, at most.
        crop_size: Side in pixels of the square result.
        long_side_factor: The longer side is at most this times `size` at ratio 1.
        scale_range: Bounds of the uniform random ratio.
        photometric: Whether to distort colours.
        degradation: Probability of `degrade` after that, which is no part of the published pipeline.

    Source:
        segm/data/config/ade20k.py in rstrudel/segmenter@20d1bfa (pipeline of mmsegmentation 0.14). There, too, what
        is normalised are whole numbers; colour steps cut off fractions one by one, here they are rounded once.
    """

    size: int
    crop_size: int
    long_side_factor: float = 4.0
    scale_range: tuple[float, float] = (0.5, 2.0)
    photometric: bool = True
    degradation: float = 0.0

    def __call__(self, image: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw one square.

        Returns:
            `pixel_values`, uint8 `(3, crop_size, crop_size)`, `labels`, uint8 `(crop_size, crop_size)`, 255 beyond
            the image, and `input_size`, its height and width in the square, from the top left corner on.
        """
        labels = labels.to(torch.uint8)  # ids end at 255, which is ignored
        image, labels = random_resize(
            image, labels, self.size, self.long_side_factor * self.size, self.scale_range, generator
        )
        image, labels = random_crop(image, labels, self.crop_size, generator)
        image, labels = random_flip(image, labels, generator)
        if self.photometric:
            # Colour steps are several times as fast on channels that lie apart in memory.
            image = image.to(torch.float32, memory_format=torch.contiguous_format)
            image = photometric_distortion(image, generator).round_().to(torch.uint8)
        if self.degradation and _uniform(0, 1, generator) < self.degradation:
            image = degrade(image, generator)
        input_size = torch.tensor(labels.shape)
        image, labels = pad(image, labels, self.crop_size)
        return {"pixel_values": image, "labels": labels, "input_size": input_size}


class Normalization:
    """Brings squares of `TrainingAugmentation` to mean 0 and deviation 1, on the device that they are on.

    Args:
        mean: Means of each channel, for values in 0 to 1.
        std: Deviations of each channel, for values in 0 to 1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixel_values: Tensor, input_size: Tensor) -> Tensor:
        """Normalise a batch; what lies beyond the images becomes 0, as where padding comes after normalisation.

        Args:
            pixel_values: `(batch, 3, height, width)`, uint8.
            input_size: `(batch, 2)`, height and width of the images in them.

        Returns:
            float32, of the same shape.
        """
        device = pixel_values.device
        if self.mean.device != device:  # copied once: a copy at every step would have the device waited for
            self.mean, self.std = (each.to(device, non_blocking=True) for each in (self.mean, self.std))
        result = pixel_values.float().div_(255).sub_(self.mean).div_(self.std)
        rows, columns = (
            torch.arange(length, device=device) >= input_size[:, [axis]]
            for axis, length in enumerate(pixel_values.shape[-2:])
        )
        return result.masked_fill_((rows[:, :, None] | columns[:, None, :])[:, None], 0)


def random_resize(
    image: Tensor,
    labels: Tensor,
    short_side: float,
    long_side: float,
    scale_range: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Resize to fit `short_side` and `long_side` pixels times a random ratio, keeping the aspect ratio.

    Source:
        `Resize` with `ratio_range`, mmseg/datasets/pipelines/transforms.py, and `imrescale` of mmcv: bilinear without
        antialiasing for the image, nearest (rounding down) for the labels.
    """
    ratio = _uniform(*scale_range, generator)
    height, width = labels.shape
    scale = min(int(long_side * ratio) / max(height, width), int(short_side * ratio) / min(height, width))
    size = [max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))]
    # Six times as fast on channels that lie together in memory.
    image = tvf.resize(image.permute(1, 2, 0).contiguous().permute(2, 0, 1), size, antialias=False)
    rows, columns = (np.arange(new) * old // new for old, new in zip((height, width), size, strict=True))
    # numpy's `take` is several times as fast as torch's indexing, and columns cost less while there are few rows.
    return image, torch.from_numpy(labels.numpy().take(columns, axis=1).take(rows, axis=0))


def random_crop(
    image: Tensor,
    labels: Tensor,
    crop_size: int,
    generator: torch.Generator,
    max_class_share: float = 0.75,
    tries: int = 10,
) -> tuple[Tensor, Tensor]:
    """Cut a random square, smaller where the image is; the last try is taken when none is varied enough.

    Args:
        max_class_share: A try is taken when it holds two classes or more and none covers this share of its labelled
            pixels.

    Source:
        `RandomCrop` with `cat_max_ratio`, mmseg/datasets/pipelines/transforms.py.
    """
    height, width = labels.shape
    for _ in range(tries):
        top, left = (
            int(torch.randint(max(length - crop_size, 0) + 1, (), generator=generator)) for length in (height, width)
        )
        crop = labels[top : top + crop_size, left : left + crop_size]
        counts = torch.bincount(crop.flatten(), minlength=IGNORE_LABEL + 1)
        counts[IGNORE_LABEL] = 0
        if (counts > 0).sum() > 1 and counts.max() < max_class_share * counts.sum():
            break
    return image[:, top : top + crop_size, left : left + crop_size], crop


def random_flip(image: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror left and right with probability one half."""
    if _coin(generator):
        return image.flip(-1), labels.flip(-1)
    return image, labels


def photometric_distortion(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability one half.

    Args:
        image: Float, 0 to 255. Brightness moves by up to 32, contrast and saturation are scaled by 0.5 to 1.5, hue
            turns by up to 18/180 of the circle. Contrast comes before or after the colour steps.

    Source:
        `PhotoMetricDistortion`, mmseg/datasets/pipelines/transforms.py; here values stay fractional between steps.
    """
    if _coin(generator):
        image = (image + _uniform(-32.0, 32.0, generator)).clamp(0, 255)
    contrast_first = _coin(generator)
    if contrast_first:
        image = _random_contrast(image, generator)
    if _coin(generator):
        image = scale_saturation(image, _uniform(0.5, 1.5, generator))
    if _coin(generator):
        image = tvf.adjust_hue(image / 255, _uniform(-18.0, 18.0, generator) / 180) * 255
    if not contrast_first:
        image = _random_contrast(image, generator)
    return image


def degrade(image: Tensor, generator: torch.Generator) -> Tensor:
    """Do one of five things to a photograph that other cameras, weather and files do, each as likely as the others.

    Args:
        image: uint8 `(3, height, width)`.

    Returns:
        uint8, of the same shape: blurred (Gaussian, sigma of 0.5 to 2.5 pixels), with Gaussian noise (deviation of 4
        to 32 grey levels), without colour, with each channel times 0.7 to 1.3, or compressed (JPEG, quality of 15 to
        70).
    """
    kind = int(torch.randint(5, (), generator=generator))
    if kind == 0:
        kernel = [2 * min(4, side - 1) + 1 for side in image.shape[:0:-1]]  # mirrored at edges, so within the image
        return tvf.gaussian_blur(image, kernel, [_uniform(0.5, 2.5, generator)])
    if kind == 1:
        noise = torch.randn(image.shape, generator=generator) * _uniform(4, 32, generator)
        return (image + noise).round_().clamp_(0, 255).to(torch.uint8)
    if kind == 2:
        return tvf.rgb_to_grayscale(image, num_output_channels=3)
    if kind == 3:
        gains = torch.tensor([_uniform(0.7, 1.3, generator) for _ in range(3)]).view(3, 1, 1)
        return (image * gains).round_().clamp_(0, 255).to(torch.uint8)
    return tvf.jpeg(image.contiguous(), quality=int(torch.randint(15, 71, (), generator=generator)))


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV by `factor`, up to full saturation, at the same hue and value.

    Args:
        image: `(3, height, width)`, any range that starts at 0.
    """
    value = image.amax(dim=0, keepdim=True)
    chroma = value - image.amin(dim=0, keepdim=True)
    # At full saturation the smallest channel is 0: it must not be scaled beyond.
    limit = value / chroma.clamp(min=1e-6)
    return value - (value - image) * limit.clamp(max=factor)


def pad(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Fill up to `size` x `size` pixels at the bottom and right: the image with 0, the labels with 255."""
    height, width = labels.shape
    padding = (0, max(size - width, 0), 0, max(size - height, 0))
    if not any(padding):
        return image.contiguous(), labels.contiguous()
    return F.pad(image, padding), F.pad(labels, padding, value=IGNORE_LABEL)


def _random_contrast(image: Tensor, generator: torch.Generator) -> Tensor:
    if _coin(generator):
        return (image * _uniform(0.5, 1.5, generator)).clamp(0, 255)
    return image


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _coin(generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < 0.5)
