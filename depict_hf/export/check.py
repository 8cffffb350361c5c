"""Whether an exported file computes what the model computes, on a photograph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from ..image_processing_depict import DepictImageProcessor
from ..modeling_depict import DepictForSemanticSegmentation
from ..photo_files import check_resized
from ..resampling import size_of
from ..windows import enlarge_to_window, merge_windows, window_corners

# Pixels of the photograph that is made where none is given.
MADE_SIZE = (360, 480)


class Tolerance(NamedTuple):
    """What agreement is asked of a file.

    Attributes:
        equal_labels: Share of the pixels that must get the same label, at least.
        difference: Largest difference of two logits, relative to the largest logit, at most.
    """

    equal_labels: float
    difference: float


# float32: rounding stays far below it, a size that was wrongly fixed while tracing far above. The others: what is
# rounded differs visibly, but most labels stay.
TOLERANCES = {
    "float32": Tolerance(0.999, 1e-3),
    "fp16": Tolerance(0.99, 0.05),
    "int8": Tolerance(0.9, 0.25),
}
# Bytes that were resized inside the file may be rounded to the next one where PyTorch's are not.
TOLERANCE_RESIZED = Tolerance(0.995, 0.05)


@dataclass(frozen=True)
class Agreement:
    """How an exported file and the model in PyTorch, in float32, differ on one photograph.

    Attributes:
        equal_labels: Share of the pixels with the same label.
        difference: Largest difference of two logits.
        largest_logit: Largest of the model's, without sign.
        tolerance: What was asked for.
        photograph: What they were compared on.
    """

    equal_labels: float
    difference: float
    largest_logit: float
    tolerance: Tolerance
    photograph: str

    @property
    def suffices(self) -> bool:
        """Whether the file may be used; never where it computes no numbers."""
        near = self.difference <= self.tolerance.difference * self.largest_logit
        return near and self.equal_labels >= self.tolerance.equal_labels

    def __str__(self) -> str:
        return (
            f"{self.equal_labels:.3%} equal labels (at least {self.tolerance.equal_labels:.1%} needed), logits up to "
            f"{self.largest_logit:.3g} differ by at most {self.difference:.2g} (at most "
            f"{self.tolerance.difference * self.largest_logit:.2g} allowed)"
        )


def tolerance_for(precision: str, resized: bool) -> Tolerance:
    """Say what is asked of a file of this precision, a key of `TOLERANCES`, that resizes photographs or does not."""
    tolerance = TOLERANCES[precision]
    if not resized:
        return tolerance
    return Tolerance(
        min(tolerance.equal_labels, TOLERANCE_RESIZED.equal_labels),
        max(tolerance.difference, TOLERANCE_RESIZED.difference),
    )


def made_photograph(height: int = MADE_SIZE[0], width: int = MADE_SIZE[1]) -> PIL.Image.Image:
    """Draw a scene of sky, houses, trees and a road under uneven light, drawn by a rule: the same for everybody."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    scene = np.stack([120 + 90 * y, 160 + 60 * y, 225 - 10 * y], axis=-1)
    for left in np.arange(0, 1, 0.11):
        top, color = 0.15 + 0.25 * rng.random(), 60 + 140 * rng.random() * np.array([1.0, 0.85, 0.75])
        house = (x >= left) & (x < left + 0.08 + 0.05 * rng.random()) & (y >= top) & (y < 0.62)
        windows = house & ((x - left) % 0.03 > 0.018) & ((y - top) % 0.07 > 0.04)
        scene[house] = color
        scene[windows] = color * 0.4
    for center in (0.18, 0.83):
        scene[(x - center) ** 2 + (y - 0.4) ** 2 < 0.012] = (50, 95, 40)
        scene[(abs(x - center) < 0.012) & (y >= 0.4) & (y < 0.68)] = (75, 60, 45)
    scene[y >= 0.62] = (150, 145, 140)
    scene[(y >= 0.62) & (abs(x - 0.5) < 0.1 + 1.2 * (y - 0.62))] = (85, 85, 90)
    scene[(y >= 0.58) & (y < 0.72) & (abs(x - 0.62) < 0.06)] = (150, 30, 35)
    # Unevenness of every size, as photographs have it.
    for cells in (4, 16, 64):
        noise = PIL.Image.fromarray(rng.normal(0, 40 / cells**0.5, (cells, cells)).astype(np.float32))
        scene += np.asarray(noise.resize((width, height), PIL.Image.Resampling.BICUBIC))[..., None]
    return PIL.Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def photograph_tensor(photo: PIL.Image.Image, channels: int) -> Tensor:
    """Return a photograph for a model of so many channels, `(1, channels, height, width)` uint8.

    Those beyond the third repeat the first three.
    """
    values = np.asarray(photo.convert("L" if channels == 1 else "RGB"))
    values = values.reshape(*values.shape[:2], -1)
    values = values[..., np.arange(channels) % values.shape[-1]]
    return torch.from_numpy(values).permute(2, 0, 1)[None]


@torch.no_grad()
def agreement(
    run: Callable[[Tensor], dict[str, Tensor]],
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    photo: Tensor,
    tolerance: Tolerance,
    *,
    fixed_size: tuple[int, int] | None,
    multiple: int,
    photographs: bool,
    resize: bool,
    windows: bool,
    described: str,
) -> Agreement:
    """Run the file and the model on one photograph.

    Args:
        run: Computes the file's outputs from its input.
        model: The model in float32, in evaluation mode, on the CPU.
        image_processor: Prepares the photograph as for the model.
        photo: `(1, channels, height, width)` uint8.
        fixed_size: (height, width) pixels of the file's input where it takes no other; cut from the photograph's
            middle.
        multiple: Pixels that the sides of its input must be multiples of; 1 where any will do.
        photographs: Whether the file takes uint8 `(batch, height, width, channels)`.
        resize: Whether it also resizes them.
        windows: Whether it cuts and merges windows.
        described: The photograph, in words.
    """
    resized = photo
    if image_processor.do_resize:
        size = image_processor.resize_size(*size_of(photo))
        check_resized(size_of(photo), size, image_processor.max_photo_pixels)
        resized = image_processor.resize(photo, image_processor.size, resample=image_processor.resample)
    height, width = fixed_size or (max(side // multiple, 1) * multiple for side in resized.shape[-2:])
    resized = _cut(resized, (height, width))
    images = _normalized(image_processor, resized)
    image = photo if resize else resized
    outputs = run(image.permute(0, 2, 3, 1).contiguous() if photographs else images)
    expected = reference_logits(model, images, _sides(image), windows)
    found = outputs["logits"]
    # Where the file's logits lie on the patch grid, the model's cover the same area.
    if found.shape[-2:] != expected.shape[-2:]:
        found = F.interpolate(found, expected.shape[-2:], mode="bilinear", align_corners=False)
    labels = outputs.get("labels", found.argmax(dim=1))
    return Agreement(
        equal_labels=(labels == expected.argmax(dim=1)).float().mean().item(),
        difference=(found - expected).abs().max().item(),
        largest_logit=expected.abs().max().item(),
        tolerance=tolerance,
        photograph=f"{described} of {photo.shape[-1]} x {photo.shape[-2]} pixels",
    )


def reference_logits(
    model: DepictForSemanticSegmentation, images: Tensor, size: tuple[int, int], windows: bool
) -> Tensor:
    """Return PyTorch's logits at `size` = (height, width), by windows as `inference.segment` takes them."""
    window = model.config.window_size
    if not windows or window is None:
        sides = _sides(images)
        return merge_windows([model(images).logits], [(0, 0)], sides, sides, size)
    images = enlarge_to_window(images, window)
    sides = _sides(images)
    corners = window_corners(sides, window, model.config.window_stride or window)
    logits = [model(images[..., top : top + window, left : left + window]).logits for top, left in corners]
    return merge_windows(logits, corners, sides, window, size)


def _sides(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width


def _normalized(image_processor: DepictImageProcessor, images: Tensor) -> Tensor:
    """`(batch, channels, height, width)` uint8 as the image processor hands it to the model."""
    mean = np.atleast_1d(image_processor.image_mean)
    if image_processor.do_normalize and len(mean) not in (1, images.shape[1]):
        # The processor is not made for this model's images: any values will do for comparing.
        return images.float() / 127.5 - 1
    return image_processor.rescale_and_normalize(
        images,
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        image_processor.image_mean,
        image_processor.image_std,
    ).float()


def _cut(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle out of images, enlarged where they are smaller than `size` = (height, width)."""
    height, width = size
    grow = max(height / images.shape[-2], width / images.shape[-1])
    if grow > 1:
        enlarged = (max(height, round(images.shape[-2] * grow)), max(width, round(images.shape[-1] * grow)))
        images = F.interpolate(images.float(), enlarged, mode="bilinear", align_corners=False).round().to(torch.uint8)
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
