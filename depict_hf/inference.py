"""Photographs to label maps: the published single- and multi-scale protocol."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import DepictForSemanticSegmentation
from .windows import enlarge_to_window, resize_bilinear

Photo = PIL.Image.Image | np.ndarray | str | Path


@torch.inference_mode()
def segment(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    images: Iterable[Photo],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> list[Tensor]:
    """Label every pixel of photographs of any size.

    Each photograph is resized by the image processor to its size times each scale; logits are brought back to the
    photograph's size; where there are several scales or flips, their probabilities are averaged. The window
    size and stride are those of `model.config`.

    Args:
        model: In evaluation mode, on any device.
        image_processor: Its `size` is the one at scale 1.
        images: PIL images, uint8 arrays `(height, width, 3)`, or paths of image files. Images and files are turned
            upright by their EXIF orientation, which is the size that counts.
        scales: The published multi-scale protocol uses 0.5, 0.75, 1, 1.25, 1.5 and 1.75.
        flip: Whether to add the horizontal mirror image at every scale.

    Returns:
        Per photograph `(height, width)` class ids, int64, on the CPU.

    Raises:
        ValueError: If the model is in training mode, or an argument is not of the form above.
        OSError: If a file cannot be read.

    Source:
        `inference`, segm/model/utils.py in rstrudel/segmenter@20d1bfa.
    """
    if isinstance(images, (str, Path, np.ndarray, PIL.Image.Image)):
        raise ValueError(f"Got one {type(images).__name__}, needed a list of photographs; pass [image].")
    if model.training:
        raise ValueError("The model is in training mode, with dropout and without windows; call model.eval() first.")
    scales = tuple(scales)
    if not scales or min(scales) <= 0:
        raise ValueError(f"Got scales={scales}, needed one or more positive numbers.")
    if scales != (1.0,) and not image_processor.do_resize:
        raise ValueError(f"Got scales={scales}, but the image processor does not resize; set its do_resize=True.")
    return [_segment_photo(model, image_processor, photo, scales, flip) for photo in images]


def load_photo(path: str | Path) -> PIL.Image.Image:
    """Read a photograph upright, in 8-bit RGB.

    Raises:
        OSError: If the file is missing, truncated or no image.
    """
    with PIL.Image.open(path) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        pixels = DepictImageProcessor().process_image(upright, do_convert_rgb=True)
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _as_tensor(photo: Photo, image_processor: DepictImageProcessor) -> Tensor:
    """Upright photograph, `(channels, height, width)` uint8."""
    if isinstance(photo, (str, Path)):
        photo = load_photo(photo)
    if isinstance(photo, np.ndarray):
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
            raise ValueError(
                f"Got an array of shape {photo.shape} and dtype {photo.dtype}, needed uint8 (height, width, 3); "
                "pass a PIL image to have other kinds converted."
            )
    elif isinstance(photo, PIL.Image.Image):
        photo = PIL.ImageOps.exif_transpose(photo)
    else:
        raise ValueError(f"Got a {type(photo).__name__}, needed a PIL image, a uint8 array or a path.")
    return image_processor.process_image(photo, do_convert_rgb=image_processor.do_convert_rgb)


def _segment_photo(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    photo: Photo,
    scales: tuple[float, ...],
    flip: bool,
) -> Tensor:
    image = _as_tensor(photo, image_processor)
    size = tuple(image.shape[-2:])
    if len(scales) == 1 and not flip:
        return _logits_at(model, image_processor, image, scales[0], size, flip)[0].argmax(dim=0).cpu()
    probabilities = sum(
        _logits_at(model, image_processor, image, scale, size, flip).softmax(dim=1).sum(dim=0) for scale in scales
    )
    return probabilities.argmax(dim=0).cpu()


def _logits_at(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    image: Tensor,
    scale: float,
    size: tuple[int, int],
    flip: bool,
) -> Tensor:
    """Logits of one photograph at one scale, `(1 or, with its mirror image, 2, num_labels, *size)`, float32."""
    scaled = {name: int(side * scale) for name, side in dict(image_processor.size).items() if side is not None}
    pixel_values = image_processor(image, size=scaled, return_tensors="pt")["pixel_values"].to(model.device)
    if model.config.window_size is not None:
        pixel_values = enlarge_to_window(pixel_values, model.config.window_size)
    if flip:
        pixel_values = torch.cat([pixel_values, pixel_values.flip(-1)])
    # By way of the input's size, as published; one interpolation from the patch grid gives other values.
    logits = resize_bilinear(model(pixel_values).logits.float(), pixel_values.shape[-2:])
    logits = resize_bilinear(logits, size)
    return torch.cat([logits[:1], logits[1:].flip(-1)]) if flip else logits
