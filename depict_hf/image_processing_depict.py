"""Images to tensors, segmentation maps to labels, logits to label maps."""

import os
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .configuration_depict import IGNORE_LABEL
from .photo_files import MAX_PHOTO_PIXELS, check_resized, decoding, grey_or_colored, read_image
from .ranges import check_image_settings, check_whole
from .resampling import resize_bilinear, size_of
from .segmentation_maps import flatten, read_segmentation_maps, to_tensor
from .windows import CoarseScores, label_map

SIZE_KEYS = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"height", "width"})


# The checker does not read transformers, so that it does not see that the base is a `TypedDict`, which takes `total`.
class DepictImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of `DepictImageProcessor` beyond those of every image processor.

    Attributes:
        do_reduce_labels: Whether label 0 becomes 255 (ignored) and every other label but 255 one less, as for ADE20K,
            whose annotations count the classes from 1.
        do_antialias: Whether images are low-pass filtered while they are made smaller. The published protocol does
            not.
        max_photo_pixels: Pixels that an image may have after it was resized; bounds the memory for narrow ones.
    """

    do_reduce_labels: bool
    do_antialias: bool
    max_photo_pixels: int


class DepictImageProcessor(TorchvisionBackend):
    """Resizes photographs, rescales and normalises them; turns segmentation maps into labels and logits into maps.

    `size` is `{"shortest_edge": pixels}` (the aspect ratio is kept; an additional `"longest_edge"` bounds the other
    side) or `{"height": pixels, "width": pixels}`. A uint8 image is rounded to uint8 again after it was resized and
    before it is normalised, as in the published protocol; an image of floats is not rounded.

    Photographs may be PIL images of any mode, or arrays and tensors of shape `(height, width)`, with 1, 3 or 4
    channels first or last, or batches of those. Transparency is laid over white; 16-bit values are divided by 257.
    The EXIF orientation of a PIL image is not applied.

    Source:
        `BaseMMSeg`, segm/data/base.py in rstrudel/segmenter@20d1bfa; sizes as in mmcv's `rescale_size`. There the
        longest edge is always bounded, at 2 (Cityscapes), 4 (ADE20K) or 8 times (Pascal Context) the shortest; here
        if `size` says so, as that of converted models does (`published_protocol` in conversion.py).
    """

    valid_kwargs = DepictImageProcessorKwargs

    do_resize = True
    size = {"shortest_edge": 512}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_antialias = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_convert_rgb = True
    do_reduce_labels = False
    max_photo_pixels = MAX_PHOTO_PIXELS

    def fetch_images(self, image_url_or_urls):
        """Read what is given as text, as the base class does: the names of files here, by `photo_files.read_image`.

        Raises:
            UnreadableImageError: If no picture can be read from a file, an address or encoded text.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(each) for each in image_url_or_urls]
        if not isinstance(image_url_or_urls, str):
            return super().fetch_images(image_url_or_urls)
        if os.path.lexists(image_url_or_urls):
            return read_image(image_url_or_urls)[0]
        with decoding():
            return super().fetch_images(image_url_or_urls)

    def __init__(self, **kwargs: Unpack[DepictImageProcessorKwargs]):
        for name in kwargs:
            if callable(getattr(type(self), name, None)):
                raise ValueError(f"{name!r} is no setting, but a method of the image processor; remove it.")
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """Load as every image processor does.

        Raises:
            OSError: If there are no settings, or they are no JSON.
            ValueError: If they are no text, or settings are unknown or out of their ranges.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The settings of the image processor in {pretrained_model_name_or_path} are no text in UTF-8; copy or "
                "download them again."
            ) from error

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[DepictImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images, and their segmentation maps if there are any, for the model.

        Args:
            images: One photograph or several.
            segmentation_maps: One map of class ids per image, of the image's size: PIL images (palette images count
                by index), or arrays and tensors of shape `(height, width)`, or with equal channels first or last.
            kwargs: Overrides of the processor's settings for this call, among them `size` and `return_tensors`.

        Returns:
            `pixel_values`, `(3, height, width)` float32 for each image, and with maps `labels`, `(height, width)`
            int64 for each image, resized to the same size with nearest-exact. Lists of tensors, or one stacked
            tensor each where `return_tensors` is given.

        Raises:
            ValueError: If an argument has no meaning here, an image or map cannot be read unambiguously, an image would
                be resized to more than `max_photo_pixels`, maps and images differ in number or size, or images of
                different sizes were to be stacked.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def resize_size(self, height: int, width: int, size: SizeDict | dict[str, int] | None = None) -> tuple[int, int]:
        """Return (height, width) in pixels that an image of `height` x `width` is resized to.

        Args:
            size: As in the constructor; the processor's own `size` if omitted. At a scale of the published multi-scale
                protocol, both edges of `size` are multiplied by the scale and cut off to whole pixels.
        """
        size = self.size if size is None else size
        if size.get("height"):
            return size["height"], size["width"]
        ratio = size["shortest_edge"] / min(height, width)
        if size.get("longest_edge"):
            ratio = min(ratio, size["longest_edge"] / max(height, width))
        return max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)

    def resize(
        self,
        image: torch.Tensor,
        size: SizeDict,
        resample: PILImageResampling | int | None = None,
        antialias: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Resize `(..., channels, height, width)` to `resize_size`; the input itself where the size already fits.

        uint8 is resized as float32, a channel at a time to save memory, and rounded: torchvision's own uint8 kernels
        round differently. Lanczos, which torchvision knows only with antialiasing, always has it.
        """
        height, width = self.resize_size(*size_of(image), size)
        if (height, width) == size_of(image):
            return image
        antialias = antialias or resample == PILImageResampling.LANCZOS
        resize, size = super().resize, SizeDict(height=height, width=width)
        channels = []
        for channel in image.split(1, dim=-3):
            resized = resize(channel.float(), size, resample, antialias)
            channels.append(resized.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else resized)
        return torch.cat(channels, dim=-3)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Turn one photograph into `(channels, height, width)`: uint8 in 0..255, or the floats that arrived.

        Raises:
            UnreadableImageError: If it is a PIL image that was opened but cannot be decoded.
        """
        if isinstance(image, PIL.Image.Image):
            image = grey_or_colored(image, do_convert_rgb)
            # More than 8 bits would be clipped on the way by PIL.
            image = np.array(image) if image.mode[0] in "IF" else tvF.pil_to_tensor(image)
            input_data_format = ChannelDimension.FIRST
        if isinstance(image, np.ndarray):
            image = to_tensor(image)
        if isinstance(image, torch.Tensor):
            image = _to_8_bits(image)
            if image.ndim == 3 and input_data_format is None:
                input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        # Releases of transformers differ in whether they convert tensors, and how.
        image = super().process_image(image, False, input_data_format, device, **kwargs)
        return _to_rgb(image) if do_convert_rgb else image

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turn the model's logits into one label map per image.

        Args:
            outputs: The model's output; `outputs.logits` is `(batch, num_labels, height, width)`.
            target_sizes: (height, width) pixels to which each image's logits are resized (bilinear, in float32,
                `align_corners=False`) before the largest is taken; the logits' own size if omitted.
            return_segmentation_scores: Whether the (resized) logits are returned too.

        Returns:
            `(height, width)` int64 maps; with scores, outputs with such a map as `segmentation` and
            `segmentation_scores` of shape `(num_labels, height, width)`.

        Raises:
            ValueError: If `target_sizes` is not one (height, width) for each image.
        """
        logits = outputs.logits
        if target_sizes is not None:
            target_sizes = target_sizes.tolist() if isinstance(target_sizes, torch.Tensor) else list(target_sizes)
            if len(target_sizes) != len(logits) or any(np.shape(size) != (2,) for size in target_sizes):
                raise ValueError(
                    f"Got target_sizes={target_sizes} for logits of {len(logits)} images, which need as many "
                    "(height, width) pairs; pass the size of each image, in their order."
                )
        results = []
        for index, scores in enumerate(logits):
            height, width = size_of(scores) if target_sizes is None else target_sizes[index]
            size = (int(height), int(width))
            if return_segmentation_scores:
                scores = scores if target_sizes is None else resize_bilinear(scores[None].float(), size)[0]
                data = {"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
                results.append(SemanticSegmentationPostProcessorOutput(data))
            else:  # without scores of all classes at full size
                results.append(label_map([CoarseScores.from_windows([scores], [(0, 0)], size, size, size)]).long())
        return results

    def _standardize_kwargs(self, **kwargs) -> dict:
        """Refuse settings that this processor would not act on; called at construction and at each call."""
        check_image_settings(kwargs)
        kwargs = super()._standardize_kwargs(**kwargs)
        size = kwargs["size"]
        if size is not None and set(dict(size)) not in SIZE_KEYS:
            raise ValueError(
                f"Got size={dict(size)}; needed are positive pixels under the keys 'shortest_edge', or "
                "'shortest_edge' and 'longest_edge', or 'height' and 'width'."
            )
        if kwargs.get("max_photo_pixels") is not None:
            check_whole("Got max_photo_pixels", kwargs["max_photo_pixels"], -(2**40), 2**40)
            if kwargs["max_photo_pixels"] < 1:
                raise ValueError(f"Got max_photo_pixels={kwargs['max_photo_pixels']}, needed at least 1.")
        elif "max_photo_pixels" in kwargs:
            kwargs["max_photo_pixels"] = MAX_PHOTO_PIXELS
        if kwargs.get("do_center_crop") or kwargs.get("do_pad"):
            raise ValueError(
                "Got do_center_crop or do_pad, but images are neither cropped nor padded (the model pads); set `size`."
            )
        if kwargs.get("data_format") not in (None, ChannelDimension.FIRST):
            raise ValueError(f"Got data_format={kwargs['data_format']!r}, but images come out channels first; drop it.")
        return kwargs

    def _prepare_images_structure(self, images: ImageInput, expected_ndims: int = 3) -> list:
        """Flatten nested lists and batches to a list of single images; unlike the base class, with 2-D arrays."""
        images = flatten(self.fetch_images(images))
        if not images:
            raise ValueError("Got no images; pass at least one.")
        for image in images:
            if not isinstance(image, PIL.Image.Image) and (image.ndim not in (2, 3) or 0 in image.shape):
                raise ValueError(
                    f"Got an image of shape {tuple(image.shape)}; needed is (height, width), or with 1, 3 or 4 "
                    "channels first or last, or a batch of such with four dimensions, and none of them empty."
                )
        return images

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_reduce_labels: bool,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        reading = {name: kwargs.pop(name, None) for name in ("do_convert_rgb", "input_data_format", "device")}
        images = self._prepare_image_like_inputs(images, **reading)
        data: dict[str, Any] = {"pixel_values": self._preprocess(images, **kwargs)}
        if segmentation_maps is not None:
            labels = read_segmentation_maps(segmentation_maps, [size_of(image) for image in images])
            if do_reduce_labels:
                labels = [torch.where((ids == 0) | (ids == IGNORE_LABEL), IGNORE_LABEL, ids - 1) for ids in labels]
            data["labels"] = [  # `F.interpolate` takes no integers; float32 holds ids up to 2**24 exactly.
                F.interpolate(
                    ids.to(pixels.device, torch.float32)[None, None], pixels.shape[-2:], mode="nearest-exact"
                )[0, 0].long()
                for ids, pixels in zip(labels, data["pixel_values"], strict=True)
            ]
        if return_tensors is not None:
            data = {name: _stack(tensors) for name, tensors in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_antialias: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        disable_grouping: bool | None,
        max_photo_pixels: int,
        **kwargs,
    ) -> list[torch.Tensor]:
        """Resize, rescale and normalise `(channels, height, width)` images, those of one size together."""
        groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        normalization = (do_rescale, rescale_factor, do_normalize, image_mean, image_std)
        for shape, group in groups.items():
            if do_resize:
                check_resized(size_of(group), self.resize_size(*size_of(group), size), max_photo_pixels)
                group = self.resize(group, size, resample=resample, antialias=do_antialias)
            groups[shape] = self.rescale_and_normalize(group, *normalization)
        return reorder_images(groups, order)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    sizes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
    if len(sizes) > 1:
        raise ValueError(
            f"Got images that come out as {sizes} (height, width), but return_tensors stacks only equal sizes; "
            'pass one image at a time, or set size={"height": ..., "width": ...}, or leave return_tensors out.'
        )
    return torch.stack(tensors)


def _to_rgb(image: torch.Tensor) -> torch.Tensor:
    """Repeat the channel of a grey image, and lay a transparent one over white; `(channels, height, width)`."""
    if len(image) == 1:
        return image.expand(3, -1, -1)
    if len(image) != 4:
        return image
    if image.is_floating_point() and (image.min() < 0 or image.max() > 1):
        raise ValueError(
            f"Got a transparent image of {image.dtype} with values from {image.min().item()} to {image.max().item()}, "
            "needed 0 to 1; rescale it, or pass uint8."
        )
    *colors, alpha = tvF.to_dtype(image, torch.float32, scale=True)
    return tvF.to_dtype(torch.stack(colors) * alpha + (1 - alpha), image.dtype, scale=True)


def _to_8_bits(image: torch.Tensor) -> torch.Tensor:
    """Bring integers of any type to uint8; floats stay as they are.

    uint16 counts as 16-bit. The wider types, in which 8-bit and 16-bit images arrive alike, count as 16-bit where a
    value exceeds 255.
    """
    if image.dtype == torch.uint8 or image.is_floating_point():
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    values = image.to(torch.int64)
    low, high = (bound.item() for bound in values.aminmax())
    if low < 0 or high > 65535:
        raise ValueError(f"Got {image.dtype} values from {low} to {high}; rescale the image to 0..255 or 0..65535.")
    if image.dtype == torch.uint16 or high > 255:
        values = (values + 128) // 257  # 65535 = 255 * 257, rounded
    return values.to(torch.uint8)
